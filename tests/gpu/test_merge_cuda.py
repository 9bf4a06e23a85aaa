"""Merging on a GPU gives the processor's numbers, and the same bytes each time. Skips without an NVIDIA GPU."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import llama, read_checkpoint, write_checkpoint

from ensemerge.cli.merge import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

RECIPE = """
merge_method: {method}
base_model: base
models:
  - {{model: one, parameters: {{weight: 1, density: 0.4}}}}
  - {{model: two, parameters: {{weight: 0.7, density: 0.6}}}}
"""


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs"])
def test_cuda_equals_cpu(tmp_path: Path, method: str) -> None:
    for step, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, llama(step, hidden=64))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(method=method))
    for out, device in (("cpu", "cpu"), ("cuda", "cuda"), ("again", "cuda")):
        assert main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / out), "--device", device]) == 0
    cpu, cuda, again = (read_checkpoint(tmp_path / out) for out in ("cpu", "cuda", "again"))
    for name, tensor in cpu.items():
        torch.testing.assert_close(cuda[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(cuda[name], again[name])
