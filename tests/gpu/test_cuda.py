"""The CUDA provider gives the CPU's answers. Needs an NVIDIA GPU and onnxruntime-gpu; elsewhere it skips."""

from pathlib import Path

import numpy as np
import pytest
from support.graphs import images, publish_family

from ensemerge.repository import Repository
from ensemerge_server.session import Session, available_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(available_device() != "cuda", reason="ONNX Runtime offers no CUDA provider here"),
]


@pytest.mark.parametrize("model", ["a", "ensemble", "merged"])
def test_cuda_equals_cpu(tmp_path: Path, model: str) -> None:
    repository = Repository(tmp_path)
    publish_family(repository)
    path = repository.version(model).model_path
    answers: dict[str, np.ndarray] = {}
    for device in ("cpu", "cuda"):
        session = Session(path, device, threads=1)
        (answers[device],) = session.run({"image": images(16)}, [session.signature.outputs[0].name])
    assert Session(path, "cuda", threads=1).provider == "CUDAExecutionProvider"
    # cuDNN may take TF32 products: 10 bits of mantissa, two convolutions deep.
    assert answers["cuda"] == pytest.approx(answers["cpu"], abs=5e-3)
