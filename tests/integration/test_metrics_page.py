"""The metrics page as Prometheus' own tool sees it."""

import shutil
import subprocess

import numpy as np
import pytest
from support.graphs import images
from support.servers import RunningServer

from ensemerge_client import Client, InvalidArgument, Label


def test_promtool_finds_nothing_to_complain_about(server: RunningServer, client: Client) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian has it in the package prometheus")
    answer = client.infer("digits", {"image": images(2)})
    client.send_labels([Label(answer.prediction_id, 0, 1)])
    with pytest.raises(InvalidArgument):
        client.infer("a", {"image": np.zeros(3, np.float32)})
    page = server.metrics_page()
    assert "ensemerge_labelled_total" in page
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_requests_are_counted_by_outcome_and_unknown_names_are_no_labels(server: RunningServer, client: Client) -> None:
    before = server.metric("ensemerge_requests_total", model="plain", code="OK")
    client.infer("plain", {"x": np.zeros((1, 4), np.float32)})
    assert server.metric("ensemerge_requests_total", model="plain", code="OK") == before + 1
    for name in ("mallory-1", "mallory-2"):
        assert not client.is_model_ready(name)
        with pytest.raises(Exception, match="is not found"):
            client.infer(name, {})
    assert "mallory" not in server.metrics_page()
    assert server.metric("ensemerge_requests_in_flight") == 0
