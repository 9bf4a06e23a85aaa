"""The commands as a person types them, against a running server."""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import graphs
from support.graphs import images, tiny_net
from support.servers import RunningServer

from ensemerge_client import Client


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ensemerge.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_call_shows_an_answer(server: RunningServer, tmp_path: Path, client: Client) -> None:
    np.save(tmp_path / "digit.npy", images(1)[0])
    words = ("call", "ensemble", "--server", server.grpc, "--input", f"image={tmp_path / 'digit.npy'}")
    shown = run(*words)
    assert shown.returncode == 0, shown.stderr
    assert "ensemble:1" in shown.stdout
    assert "members: a:1,b:1" in shown.stdout
    told = json.loads(run(*words, "--json", "--id", "i-1").stdout)
    assert told["id"] == "i-1"
    assert told["outputs"]["probabilities"] == pytest.approx(
        client.infer("ensemble", {"image": images(1)})["probabilities"], abs=1e-6
    )


def test_call_shows_what_there_is(server: RunningServer) -> None:
    shown = run("call", "--server", server.grpc).stdout
    assert "ensemerge 0.1.0: ready" in shown
    assert "ensemble:1 READY" in shown
    metadata = run("call", "digits", "--metadata", "--server", server.grpc).stdout
    assert "takes image FP32 [-1, 1, 6, 6]" in metadata
    assert "gives probabilities FP32 [-1, 3]" in metadata


def test_call_reads_what_people_write_and_refuses_the_rest(server: RunningServer, tmp_path: Path) -> None:
    words = ("call", "plain", "--server", server.grpc, "--input")
    (tmp_path / "row.json").write_text("[1, 2, 3, 4]")
    assert run(*words, f"x={tmp_path / 'row.json'}").returncode == 0
    for name, content in (
        ("empty.npy", b""),
        ("broken.npz", b"PK\x03\x04"),
        ("words.json", b'["a"]'),
        ("map.json", b"{}"),
    ):
        (tmp_path / name).write_bytes(content)
        done = run(*words, f"x={tmp_path / name}")
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert f"{name} cannot be read as input 'x' (FP32)" in done.stderr


def test_call_says_what_it_lacks(server: RunningServer) -> None:
    for words, text in [
        (("a",), "no value for image; give --input image=FILE, or --fill random"),
        (("a", "--input", "img=x.npy"), "expected NAME=FILE with one of the inputs image"),
        (("a", "--input", "image=nowhere.npy"), "nowhere.npy cannot be read"),
        (("nobody", "--fill", "zeros"), "unknown model: 'nobody'"),
    ]:
        done = run("call", *words, "--server", server.grpc)
        assert (done.returncode, done.stdout) == (1, "")
        assert text in done.stderr


def test_label_sends_a_file(server: RunningServer, client: Client, tmp_path: Path) -> None:
    answer = client.infer("a", {"image": images(3)})
    file = tmp_path / "labels.csv"
    lines = [f"{answer.prediction_id},{row},{row}" for row in range(3)]
    file.write_text("\n".join(["prediction_id,row,label", *lines, f"{answer.prediction_id},0,0"]))
    done = run("label", file, "--server", server.grpc)
    assert (done.returncode, done.stdout) == (0, "3 joined, 1 duplicate\n")
    file.write_text(f"prediction_id,row,label\n{answer.prediction_id},9,0\n")
    refused = run("label", file, "--server", server.grpc, "--json")
    assert (refused.returncode, json.loads(refused.stdout)["invalid"]) == (1, 1)
    assert "line 2: row 9 does not exist" in refused.stderr
    file.write_text(f"\ufeffprediction_id,row,label\n\n{answer.prediction_id},9,0\n")
    assert "line 3: row 9 does not exist" in run("label", file, "--server", server.grpc).stderr
    file.write_text("id,label\n1,2\n")
    assert "no column prediction_id, row" in run("label", file, "--server", server.grpc).stderr


def test_export_then_build_makes_a_repository(tmp_path: Path) -> None:
    # A factory in a file of the user's own, found from the folder where the command runs.
    (tmp_path / "mynet.py").write_text(inspect.getsource(graphs) + "\nmake = TinyNet\n")
    models = tmp_path / "models"
    for name, seed in (("a", 1), ("b", 2)):
        torch.save({"state_dict": tiny_net(seed).state_dict()}, tmp_path / f"{name}.pt")
        words = ("export", "mynet:make", tmp_path / f"{name}.pt", "--to", models / name, "--input", "image:1x6x6")
        done = run(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (models / "both").mkdir()
    (models / "both" / "model.yaml").write_text("kind: ensemble\nmembers: [a, b]\n")
    done = run("build", models / "both", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"][0]["name"] == "equals_members"
    (models / "both" / "model.yaml").write_text("kind: ensemble\nmembrs: [a, b]\n")
    refused = run("build", models / "both")
    assert refused.returncode == 1
    assert "did you mean" in refused.stderr


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    words = ("export", "torch.nn:Identity", tmp_path / "hostile.pt", "--to", tmp_path / "m" / "x", "--input", "x:3")
    done = run(*words)
    assert done.returncode == 1
    assert "is no checkpoint of tensors" in done.stderr
    assert not (tmp_path / "executed").exists()


def test_unknown_commands_and_help() -> None:
    done = run("srve")
    assert done.returncode == 2
    assert "unknown command 'srve'" in done.stderr
    assert "serve" in run("--help").stdout
    for command in ("build", "call", "demo", "export", "label", "serve"):
        shown = run(command, "--help")
        assert shown.returncode == 0
        assert "example: ensemerge" in shown.stdout
