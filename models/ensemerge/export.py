"""A user's torch model to ONNX: dynamic batch, normalisation kept, compared with torch before anybody relies on it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ensemerge import __version__
from ensemerge.errors import InvalidData, InvalidModel
from ensemerge.graph.files import load, save
from ensemerge.graph.run import Runner
from ensemerge.graph.tasks import settle_task
from ensemerge.graph.tidy import tidy
from ensemerge.measures.differences import relative_difference
from ensemerge.repository import MODEL_FILE, Check, Manifest, Repository, Task, Version

OPSET = 20
BATCHES = (1, 2, 7)
# The same float32 arithmetic in another order: about 1e-6 relative for networks of some dozen layers.
PARITY_BOUND = 1e-4
# Half precision has 11 bits, and a three-layer perceptron in it differs by 1e-3.
PARITY_BOUND_FLOAT16 = 5e-3


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
        if self.high < 1:
            raise InvalidData(f"input '{self.name}': numbers below {self.high} are asked for; expected at least 1")
        return torch.randint(0, self.high, (rows, *self.shape), generator=generator).to(dtype)


@dataclass(frozen=True)
class Provenance:
    """What a manifest shall say beside what the export itself finds: hashes of sources, recipe, seed, other checks."""

    sources: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    checks: tuple[Check, ...] = ()


def export_module(module: nn.Module, inputs: Sequence[InputSpec], outputs: Sequence[str], path: Path) -> list[Check]:
    """Write `module` as ONNX to `path` and return what was checked. The module is put into evaluation mode.

    `outputs` names the first outputs; others keep the exporter's names. Raises InvalidModel when torch cannot export
    it, CheckFailed when the file does not compute the same.
    """
    module.eval()
    model = _to_onnx(module, inputs, outputs)
    tidy(model)
    save(model, path)
    return [
        _check_parity(module, inputs, path),
        _check_rows(inputs, path),
        _check_normalisation(module, inputs, model),
    ]


def publish_module(
    repository: Repository,
    name: str,
    module: nn.Module,
    inputs: Sequence[InputSpec],
    *,
    outputs: Sequence[str] = ("logits",),
    task: Task | None = None,
    provenance: Provenance = Provenance(),
) -> Version:
    """Export `module` as a new version of the model `name`.

    `task` says what an output means; without it the graph is asked. Raises as `export_module`, and InvalidSpec for a
    task that does not fit the graph.
    """

    def fill(folder: Path) -> Manifest:
        checks = export_module(module, inputs, outputs, folder / MODEL_FILE)
        return Manifest(
            kind="onnx",
            task=settle_task(task, load(folder / MODEL_FILE)),
            inputs=dict(provenance.sources),
            recipe={"export": f"torch {torch.__version__}, opset {OPSET}", **provenance.recipe},
            seed=provenance.seed,
            checks=(*provenance.checks, *checks),
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
        answers = _answers(module, examples)
        got = runner.run(_feeds(inputs, examples))
        for expected, name in zip(answers, runner.outputs, strict=True):
            worst = max(worst, relative_difference(got[name], expected))
    detail = f"largest relative difference of an output, batches of {BATCHES}"
    return Check.measured("equals_torch", worst, _bound(got.values()), detail)


def _bound(outputs: Iterable[np.ndarray]) -> float:
    return PARITY_BOUND_FLOAT16 if any(output.dtype == np.float16 for output in outputs) else PARITY_BOUND


def _answers(module: nn.Module, examples: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The module's outputs in the order in which the exporter flattens them. Raises InvalidModel."""
    with torch.no_grad():
        leaves = [leaf for leaf in tree_leaves(module(*examples)) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or len(leaf) != len(examples[0]):
            shape = list(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise InvalidModel(f"the module has an output {shape}; expected tensors whose first axis is the batch")
    return [leaf.numpy() for leaf in leaves]


def _check_rows(inputs: Sequence[InputSpec], path: Path) -> Check:
    """A server puts rows of different callers into one batch: no row may change the answer to another."""
    generator = torch.Generator().manual_seed(2)
    feeds = _feeds(inputs, [spec.example(max(BATCHES), generator) for spec in inputs])
    together, alone = Runner(path).run(feeds), Runner(path, batch_rows=1).run(feeds)
    worst = max(relative_difference(together[name], alone[name]) for name in together)
    detail = f"largest relative difference between {max(BATCHES)} rows in one batch and the same rows one by one"
    return Check.measured("rows_are_independent", worst, _bound(together.values()), detail)


def _feeds(inputs: Sequence[InputSpec], examples: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    return {spec.name: example.numpy() for spec, example in zip(inputs, examples, strict=True)}


def _check_normalisation(module: nn.Module, inputs: Sequence[InputSpec], model: ir.Model) -> Check:
    """Every BatchNorm that evaluation reaches is a node of its own: merging must be able to restore its statistics."""
    reached = 0

    def count(*_: object) -> None:
        nonlocal reached
        reached += 1

    hooks = [part.register_forward_hook(count) for part in module.modules() if isinstance(part, _BatchNorm)]
    _answers(module, [spec.example(2, torch.Generator().manual_seed(3)) for spec in inputs])
    for hook in hooks:
        hook.remove()
    kept = sum(node.op_type == "BatchNormalization" for node in model.graph.all_nodes())
    detail = f"layers without a node of their own, of {reached} that evaluation reaches,"
    return Check.measured("keeps_batch_norm", max(0, reached - kept), 0, detail)
