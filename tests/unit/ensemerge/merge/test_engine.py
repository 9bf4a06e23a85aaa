from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.memory import Collected, InMemory

from ensemerge.errors import InvalidModel
from ensemerge.merge.draws import KeyedDraws
from ensemerge.merge.engine import Job, Machine, Source, merge_weights, worker_bytes
from ensemerge.merge.method import Block, Grain, Method, Scope, Survey
from ensemerge.merge.methods.averaging import WeightedSum
from ensemerge.merge.methods.table import METHODS, Settings
from ensemerge.weights.reader import TensorInfo

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Total:
    """A survey whose sum has an order: float32 sums of all values of all models."""

    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        return np.array([float(model.sum()) for model in block.models()])

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> tuple[float, int]:
        return float(total.sum()), numel


@dataclass(frozen=True)
class Centred:
    """The mean of the models less the mean of all values: needs a survey, and tells over what it was made."""

    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = (Total(),)
    buffers: int = 1
    propagates: bool = False

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        total, numel = findings[0]
        mean: torch.Tensor = torch.stack(block.models()).mean(0)
        return mean.sub_(total / (numel * block.count))


class Noted:
    """A journal in memory."""

    def __init__(self, done: Sequence[str] = ()) -> None:
        self.names = list(done)

    def holds(self, name: str) -> bool:
        return name in self.names

    def add(self, name: str) -> None:
        self.names.append(name)


def jobs(models: Sequence[InMemory], method: Method, dtype: torch.dtype | None = None) -> list[Job]:
    found = []
    for name in models[0].names:
        info = models[0].info(name)
        sources = tuple(Source(model, name, f"model-{k}") for k, model in enumerate(models))
        used = method if info.dtype.is_floating_point and info.numel else None
        found.append(Job(name, TensorInfo(info.shape, dtype or info.dtype), sources, None, used))
    return found


def merge(models: Sequence[Tensors], method: Method, machine: Machine | None = None) -> Collected:
    readers = [InMemory(model) for model in models]
    work = jobs(readers, method)
    out = Collected({job.name: job.info for job in work})
    merge_weights(work, out, machine)
    assert not any(reader.out for reader in readers)  # every window was given back
    return out


def mean(count: int = 2) -> WeightedSum:
    return WeightedSum([1 / count] * count)


def family(*shapes: tuple[int, ...], models: int = 3, dtype: torch.dtype = torch.bfloat16) -> list[Tensors]:
    generator = torch.Generator().manual_seed(0)
    return [
        {f"w{k}": torch.randn(shape, generator=generator).to(dtype) for k, shape in enumerate(shapes)}
        for _ in range(models)
    ]


def test_floats_are_merged_and_equal_integers_copied() -> None:
    steps = torch.tensor([7])
    out = merge([{"w": torch.tensor([1.0]), "steps": steps}, {"w": torch.tensor([3.0]), "steps": steps}], mean())
    assert (out.tensors["w"].item(), out.tensors["steps"].item()) == (2.0, 7)


def test_integers_that_differ_are_refused() -> None:
    with pytest.raises(InvalidModel, match="integers 'steps' differ"):
        merge([{"steps": torch.tensor([7])}, {"steps": torch.tensor([8])}], mean())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name_and_model(bad: float) -> None:
    with pytest.raises(InvalidModel, match="weight 'w' of model-1 holds NaN or infinity"):
        merge([{"w": torch.tensor([1.0])}, {"w": torch.tensor([bad])}], mean())


def test_nan_in_all_models_is_refused() -> None:
    bad = {"w": torch.tensor([float("nan")])}
    with pytest.raises(InvalidModel, match="holds NaN"):
        merge([bad, bad], Centred())


def test_masks_with_infinities_are_copied_where_equal() -> None:
    mask = torch.tensor([0.0, float("-inf")])
    for method in (mean(), Centred()):
        assert torch.equal(merge([{"m": mask}, {"m": mask.clone()}], method).tensors["m"], mask)
    with pytest.raises(InvalidModel, match="'m' of model-0 holds NaN or infinity"):
        merge([{"m": mask}, {"m": torch.zeros(2)}], mean())


@pytest.mark.parametrize("low", [float("-inf"), torch.finfo(torch.float32).min])
def test_masks_are_copied_by_methods_that_square(low: float) -> None:
    mask = torch.tensor([0.0, low, 0.0])
    slerp = METHODS["slerp"].make(Settings([{}, {}], {"t": 0.5}, KeyedDraws()))
    assert torch.equal(merge([{"m": mask}, {"m": mask.clone()}], slerp).tensors["m"], mask)


def test_infinities_beside_weights_are_no_mask_not_even_in_a_single_model() -> None:
    with pytest.raises(InvalidModel, match="'w' of model-0 holds NaN or infinity"):
        merge([{"w": torch.tensor([1.0, 2.0, float("inf")])}], WeightedSum([2.0]))


def test_a_result_beyond_the_dtype_is_refused() -> None:
    large = torch.tensor([60000.0], dtype=torch.float16)
    with pytest.raises(InvalidModel, match=r"not finite.*float16"):
        merge([{"w": large}, {"w": -large}], WeightedSum([3.0, -2.0]))


def test_the_result_is_rounded_once_from_float32() -> None:
    # In bfloat16 256 + 1 is 256 again, so that a running sum would give 64; 64.75 is rounded to 65.
    values = [{"w": torch.tensor([256.0 if k == 0 else 1.0], dtype=torch.bfloat16)} for k in range(4)]
    assert merge(values, mean(4)).tensors["w"].item() == 65.0


def test_scalars_and_empty_tensors_keep_their_shape() -> None:
    model = {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    out = merge([model, model], Centred())
    assert out.tensors["scalar"].shape == ()
    assert out.tensors["empty"].shape == (0, 3)


@pytest.mark.parametrize("grain", list(Grain))
def test_the_bits_do_not_depend_on_threads(grain: Grain) -> None:
    models = family((1100, 2048), (3, 50_001), (17,), (5, 4, 3, 3))
    outs = [merge(models, Centred(grain), Machine(threads)).tensors for threads in (1, 2, 5)]
    for name in models[0]:
        assert all(torch.equal(outs[0][name], out[name]) for out in outs[1:])


def test_every_element_is_written_once_across_the_borders_of_spans() -> None:
    models = family((2_500_001,), models=2, dtype=torch.float32)
    out = merge(models, mean(), Machine(2))
    assert out.elements == {"w0": 2_500_001}
    torch.testing.assert_close(out.tensors["w0"], (models[0]["w0"] + models[1]["w0"]) / 2)


def test_surveys_of_the_model_are_shared_by_all_tensors() -> None:
    models = [{"a": torch.full((2,), 1.0), "b": torch.full((2,), 5.0)}]
    alone = merge(models, Centred()).tensors
    together = merge(models, Centred(surveys=(Total(Scope.MODEL),))).tensors
    assert (alone["a"].tolist(), alone["b"].tolist()) == ([0.0, 0.0], [0.0, 0.0])
    assert (together["a"].tolist(), together["b"].tolist()) == ([-2.0, -2.0], [2.0, 2.0])


def test_what_the_journal_holds_is_not_written_again() -> None:
    readers = [InMemory({"a": torch.ones(2), "b": torch.ones(2)})]
    work = jobs(readers, mean(1))
    out = Collected({job.name: job.info for job in work})
    journal = Noted(["a"])
    merge_weights(work, out, journal=journal)
    assert out.elements == {"a": 0, "b": 2}
    assert journal.names == ["a", "b"]


def test_workers_share_the_memory_they_are_given() -> None:
    models = family(*[(64, 64)] * 12, models=2)
    work = jobs([InMemory(model) for model in models], Centred(Grain.TENSOR))
    machine = Machine(4, working_bytes=worker_bytes(work[0], Machine(4)))  # enough for one at a time
    out = merge(models, Centred(Grain.TENSOR), machine)
    assert out.elements == dict.fromkeys(models[0], 64 * 64)


def test_progress_counts_every_pass_to_its_end() -> None:
    seen: list[tuple[str, int, int]] = []
    readers = [InMemory({"w": torch.ones(10)})]
    work = jobs(readers, Centred())
    merge_weights(work, Collected({"w": work[0].info}), notify=lambda *report: seen.append(report))
    assert seen == [("merge", 40, 80), ("merge", 80, 80)]


def test_a_failure_in_a_worker_reaches_the_caller_and_ends_the_others() -> None:
    models = family(*[(300, 300)] * 30, models=2)
    models[1] = {**models[1], "w7": torch.full((300, 300), float("nan"))}
    with pytest.raises(InvalidModel, match="'w7' of model-1"):
        merge(models, Centred(), Machine(3))
