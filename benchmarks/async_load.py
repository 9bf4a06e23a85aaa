"""Load from our AsyncClient, for machines without h2load: so many requests, so many of them on the way.

    python benchmarks/async_load.py 127.0.0.1:8001 request.bin IN_FLIGHT REQUESTS

Prints one line of JSON. Any failed request ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np

from ensemerge_client import AsyncClient
from ensemerge_protos import inference_pb2
from ensemerge_protos.datatypes import NUMPY


async def generate(address: str, message: bytes, in_flight: int, requests: int) -> dict[str, object]:
    """Send the request of `message` and note how long each took."""
    request = inference_pb2.ModelInferRequest.FromString(message)
    inputs = _arrays(request)
    latencies_seconds: list[float] = []
    waiting = iter(range(requests))

    async def worker() -> None:
        for _ in waiting:
            sent = time.perf_counter()
            await client.infer(request.model_name, inputs)
            latencies_seconds.append(time.perf_counter() - sent)

    async with AsyncClient(address) as client:
        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "latencies_seconds": latencies_seconds}


def _arrays(request: inference_pb2.ModelInferRequest) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.frombuffer(raw, NUMPY[tensor.datatype]).reshape(tuple(tensor.shape))
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }


if __name__ == "__main__":
    address, body, in_flight, requests = sys.argv[1:]
    print(json.dumps(asyncio.run(generate(address, Path(body).read_bytes(), int(in_flight), int(requests)))))
