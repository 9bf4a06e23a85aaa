from typing import Any

import numpy as np
import pytest
import torch
from support.merging import Run, merge, run, settings

from ensemerge.merge.methods.masks import Rescalers, tall_mask
from ensemerge.merge.methods.table import METHODS

TAUS = [torch.tensor([1.0, -2, 3, 0]), torch.tensor([2.0, 1, -1, 0]), torch.tensor([-0.5, -4, 1, 0])]
ZERO = torch.zeros(4)


def for_task(name: str, task: int, **shared: Any) -> torch.Tensor:
    entry = METHODS[name]
    assert entry.make_for is not None
    return run(entry.make_for(settings(entry, 3, **shared), task), TAUS, ZERO)


def test_emr_elects_the_largest_that_agrees() -> None:
    assert merge("emr", TAUS, ZERO).tolist() == [2, -4, 3, 0]


def test_emr_masks_and_rescales_for_each_task() -> None:
    # Task 0 agrees with (2, −4, 3): |τ_0| sums to 6, the elected to 9.
    torch.testing.assert_close(for_task("emr", 0), torch.tensor([2, -4, 3, 0]) * 6 / 9)
    torch.testing.assert_close(for_task("emr", 1), torch.tensor([2.0, 0, 0, 0]) * 4 / 2)
    torch.testing.assert_close(for_task("emr", 2), torch.tensor([0.0, -4, 3, 0]) * 5.5 / 7)


@pytest.mark.parametrize("block", [1, 1 << 17])
def test_emr_rescales_over_the_whole_model(block: int) -> None:
    entry = METHODS["emr"]
    assert entry.make_for is not None
    split = [{"a": tau[:1], "b": tau[1:]} for tau in TAUS]
    base = {"a": ZERO[:1], "b": ZERO[1:]}
    merged = Run(entry.make_for(settings(entry, 3), 0), split, base, block).merged()
    torch.testing.assert_close(torch.cat(list(merged.values())), for_task("emr", 0))


def test_a_tall_mask_keeps_what_matters_to_its_task() -> None:
    # The sum is (2.5, −5, 3, 0); task 0 lacks (1.5, −3, 0, 0) of it.
    assert merge("tall_masks", TAUS, ZERO).tolist() == [2.5, -5, 3, 0]
    assert for_task("tall_masks", 0, lambda_=0.6).tolist() == [2.5, -5, 3, 0]
    assert for_task("tall_masks", 0, lambda_=0.7).tolist() == [0, 0, 3, 0]
    assert for_task("tall_masks", 2, lambda_=0.6).tolist() == [0, -5, 0, 0]


def test_a_model_that_disagrees_everywhere_is_not_rescaled() -> None:
    # The first of the rows is Σ |τ_k|, the second what its mask leaves of the elected: nothing for the second model.
    assert Rescalers().conclude(np.array([[3.0, 2.0], [1.5, 0.0]]), 4, ()) == [2, 1]


def test_a_tall_mask_keeps_what_is_exactly_at_its_bound() -> None:
    assert tall_mask(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.5]), 1.0).tolist() == [1, 0]
