from __future__ import annotations

import pytest
import torch
from support.memory import InMemory, peak_bytes_of

from ensemerge.merge.engine import Job, Machine, Source
from ensemerge.merge.estimate import estimate_seconds
from ensemerge.merge.method import Grain
from ensemerge.merge.methods.averaging import WeightedSum
from ensemerge.merge.plan import MergePlan, Output


def plan_of(shape: tuple[int, ...], grain: Grain = Grain.ELEMENT) -> MergePlan:
    reader = InMemory({"w": torch.zeros(()).expand(shape)})
    sources = tuple(Source(reader, "w", model) for model in "ab")
    job = Job("w", reader.info("w"), sources, None, WeightedSum([0.5, 0.5], grain))
    return MergePlan("linear", (Output("", (job,)),), Machine(1), 0, ())


@pytest.mark.parametrize("shape", [(1, 1 << 28), (1 << 28,), (2, 1 << 27), (1, 4, 1 << 26), (1 << 14, 1 << 14)])
def test_what_is_tried_is_small_however_long_a_row_is(shape: tuple[int, ...]) -> None:
    estimate_seconds(plan_of((64, 64)))  # what torch takes when it is first used
    assert peak_bytes_of(lambda: estimate_seconds(plan_of(shape))) < 64 << 20


@pytest.mark.parametrize("grain", list(Grain))
@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (7, 5, 3), (1, 1 << 21)])
def test_every_shape_and_grain_can_be_tried(shape: tuple[int, ...], grain: Grain) -> None:
    assert estimate_seconds(plan_of(shape, grain)) > 0
