"""The committed messages are what the pinned generator makes of the .proto files."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from google.protobuf import descriptor_pool

from ensemerge_protos import POOL, ensemerge_pb2, health_pb2, inference_pb2

GENERATE = Path(__file__).parents[2] / "protos" / "generate.py"


def test_the_generated_code_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(GENERATE), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert version("grpcio-tools") == "1.76.0"


def test_our_messages_stay_out_of_the_shared_pool() -> None:
    for module in (ensemerge_pb2, health_pb2, inference_pb2):
        assert module.DESCRIPTOR.pool is POOL
        assert module.DESCRIPTOR.pool is not descriptor_pool.Default()
