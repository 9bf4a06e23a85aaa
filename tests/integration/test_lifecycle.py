"""Starting and stopping: nothing accepted is lost, no port is taken twice, a full disk is survived."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.graphs import images
from support.servers import RunningServer, running

from ensemerge_client import AsyncClient, Client, Label, Unavailable


def test_sigterm_lets_requests_in_flight_finish(repository: Path, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        answered, refused = asyncio.run(_ask_and_terminate(server))
        assert server.process.wait(30) == 0
    # Whatever the server took it answered; whatever came later was refused as unavailable, nothing else happened.
    assert answered > 0
    assert answered + refused == 400


async def _ask_and_terminate(server: RunningServer) -> tuple[int, int]:
    async with AsyncClient(server.grpc, timeout_seconds=30) as client:

        async def ask() -> bool:
            try:
                await client.infer("a", {"image": images(64)})
            except Unavailable:
                return False
            return True

        tasks = [asyncio.create_task(ask()) for _ in range(400)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        server.process.terminate()
        outcomes = await asyncio.gather(*tasks)
    return sum(outcomes), len(outcomes) - sum(outcomes)


def test_predictions_made_before_sigterm_are_on_disk(repository: Path, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        with Client(server.grpc) as client:
            ids = [client.infer("a", {"image": images(1)}).prediction_id for _ in range(50)]
        assert server.terminate() == 0
    with running(repository, tmp_path) as again, Client(again.grpc) as client:
        results = client.send_labels([Label(prediction_id, 0, 1) for prediction_id in ids])
    assert {result.status.name for result in results} == {"JOINED"}


def test_a_port_in_use_is_said_so(server: RunningServer, repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ensemerge_server", str(repository), f"--state={tmp_path}", "--http-port=0"]
    port = server.grpc.rpartition(":")[2]
    done = subprocess.run(
        [*command, f"--grpc-port={port}", "--metrics-port=0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"gRPC cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "choose --grpc-port" in done.stderr


def test_a_missing_repository_is_said_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ensemerge_server", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no model repository at" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of one megabyte, unmounted by its own container of a test: see the finalizer."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here: this test needs root and mount")
    return folder


def test_a_full_disk_fails_labels_not_answers(repository: Path, small_disk: Path) -> None:
    try:
        with running(repository, small_disk) as server, Client(server.grpc) as client:
            filler = small_disk / "filler"
            answer = client.infer("a", {"image": images(1)})
            assert client.send_labels([Label(answer.prediction_id, 0, 1)])[0].status.name == "JOINED"
            _fill(filler)
            with pytest.raises(Unavailable, match=r"cannot write to the store.*full"):
                client.send_labels([Label(f"{n:064}", 0, 1) for n in range(2000)])
            assert client.infer("a", {"image": images(1)})["logits"].shape == (1, 3)
            filler.unlink()
            assert client.send_labels([Label(answer.prediction_id, 0, 1)])[0].status.name == "DUPLICATE"
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return
