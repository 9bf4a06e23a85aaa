"""A user's torch model to ONNX: dynamic batch, normalisation kept, compared with torch before anybody relies on it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ensemerge import __version__
from ensemerge.errors import CheckFailed, InvalidData, InvalidModel
from ensemerge.graph.files import load, save
from ensemerge.graph.run import Runner
from ensemerge.graph.tasks import infer_task
from ensemerge.graph.tidy import tidy
from ensemerge.repository import MODEL_FILE, Check, Manifest, Repository, Task, Version

OPSET = 20
BATCHES = (1, 2, 7)
# The same float32 arithmetic in another order: about 1e-6 relative for networks of some dozen layers.
PARITY_BOUND = 1e-4
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class InputSpec:
    """One input of a network: `shape` without the batch; whole numbers are drawn below `high` in the parity check."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    high: int = 2

    def example(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Random values `(rows, *shape)` of the input's dtype."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InvalidData(f"input '{self.name}': '{self.dtype}' is no dtype; expected float32, int64, …")
        if dtype.is_floating_point:
            return torch.randn((rows, *self.shape), generator=generator, dtype=dtype)
        return torch.randint(0, self.high, (rows, *self.shape), generator=generator).to(dtype)


def export_module(module: nn.Module, inputs: Sequence[InputSpec], outputs: Sequence[str], path: Path) -> list[Check]:
    """Write `module` as ONNX to `path` and return what was checked. The module is put into evaluation mode.

    Raises InvalidModel when torch cannot export it, CheckFailed when the file does not compute the same.
    """
    module.eval()
    model = _to_onnx(module, inputs, outputs)
    tidy(model)
    save(model, path)
    return [_check_parity(module, inputs, path), _check_normalisation(module, model)]


def publish_module(
    repository: Repository,
    name: str,
    module: nn.Module,
    inputs: Sequence[InputSpec],
    *,
    output: str = "logits",
    task: Task | None = None,
    sources: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    seed: int | None = None,
    checks: Sequence[Check] = (),
) -> Version:
    """Export `module` as a new version of the model `name`.

    `task` says what the output means; without it the graph is asked. `sources` maps what the model came from (its
    checkpoint) to a SHA-256; `recipe`, `seed` and `checks` are what else its manifest shall say. Raises as
    `export_module`.
    """

    def fill(folder: Path) -> Manifest:
        parity = export_module(module, inputs, [output], folder / MODEL_FILE)
        return Manifest(
            kind="onnx",
            task=task or infer_task(load(folder / MODEL_FILE)),
            inputs=dict(sources or {}),
            recipe={"export": f"torch {torch.__version__}, opset {OPSET}", **(recipe or {})},
            seed=seed,
            checks=(*checks, *parity),
            made_by=f"ensemerge {__version__}",
        )

    return repository.publish(name, fill)


def _to_onnx(module: nn.Module, inputs: Sequence[InputSpec], outputs: Sequence[str]) -> ir.Model:
    generator = torch.Generator().manual_seed(0)
    # Two rows: with one the exporter takes the batch for a constant.
    examples = tuple(spec.example(2, generator) for spec in inputs)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                input_names=[spec.name for spec in inputs],
                output_names=list(outputs),
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                opset_version=OPSET,
                # Its optimiser folds normalisation into convolutions; `tidy` cleans up without that.
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter lets through whatever the user's code or torch raises
        raise InvalidModel(f"torch cannot export the module with inputs {list(inputs)}: {error}") from error
    if program is None:
        raise InvalidModel("torch's exporter returned nothing; expected a program")
    model: ir.Model = program.model
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about packages nobody asked for; what goes wrong it raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_parity(module: nn.Module, inputs: Sequence[InputSpec], path: Path) -> Check:
    """Compare torch and ONNX Runtime at several batch sizes, relative to the largest output."""
    runner = Runner(path, batch_rows=max(BATCHES))
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for rows in BATCHES:
        examples = [spec.example(rows, generator) for spec in inputs]
        with torch.no_grad():
            expected = module(*examples)
        expected = expected if isinstance(expected, (tuple, list)) else [expected]
        feeds = {spec.name: example.numpy() for spec, example in zip(inputs, examples, strict=True)}
        got = runner.run(feeds)
        for tensor, name in zip(expected, runner.outputs, strict=True):
            worst = max(worst, relative_difference(got[name], tensor.numpy()))
    if not worst <= PARITY_BOUND:
        raise CheckFailed(
            f"the exported graph differs from torch by {worst:.2e}, relative; expected at most {PARITY_BOUND:.0e}",
            difference=worst,
            bound=PARITY_BOUND,
        )
    return Check("equals_torch", worst, PARITY_BOUND, f"largest relative difference of an output, batches of {BATCHES}")


def relative_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two arrays of one shape, relative to the largest magnitude expected."""
    if got.shape != expected.shape:
        raise InvalidModel(f"the exported graph answers with shape {got.shape}; torch with {expected.shape}")
    unit = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(got.astype(np.float64) - expected).max(initial=0.0)) / unit


def _check_normalisation(module: nn.Module, model: ir.Model) -> Check:
    """Every BatchNorm of the module is still a node of its own: merging must be able to restore its statistics."""
    expected = sum(isinstance(part, _NORMALISATIONS) for part in module.modules())
    got = sum(node.op_type == "BatchNormalization" for node in model.graph.all_nodes())
    if got < expected:
        raise CheckFailed(
            f"{expected} BatchNorm layers became {got} BatchNormalization nodes; expected all of them to be kept",
            difference=expected - got,
            bound=0,
        )
    return Check("keeps_batch_norm", max(0, expected - got), 0, f"{got} BatchNormalization nodes")
