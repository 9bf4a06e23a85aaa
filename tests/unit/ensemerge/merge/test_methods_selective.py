import math

import numpy as np
import pytest
import torch
from support.merging import merge

from ensemerge.merge.method import Block, Place
from ensemerge.merge.methods.mergekit import MERGEKIT, floored_energies
from ensemerge.merge.methods.sce import Energies, SelectAll, energies, variance
from ensemerge.merge.methods.selective import importance

ZERO = torch.zeros(4)


def test_nearswap_takes_a_clipped_step() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    model = torch.tensor([1.05, 2.0, 0.0, 1.0])
    torch.testing.assert_close(merge("nearswap", [model], base, t=0.1), torch.tensor([1.05, 1.1, 0.9, 1.0]))


def test_nearswap_is_exact_for_tiny_differences() -> None:
    merged = merge("nearswap", [torch.full((1,), 1e-7)], torch.zeros(1), t=5e-8)
    assert merged.item() == pytest.approx(5e-8)
    floored = merge("nearswap", [torch.full((1,), 1e-7)], torch.zeros(1), table=MERGEKIT, t=5e-8)
    assert floored.item() == pytest.approx(5e-9)


def test_importance_is_the_divergence_times_the_change() -> None:
    model, base = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(importance(model, base), torch.tensor([[math.log(3) * divergence, 0]]))


@pytest.mark.parametrize("block", [9, 1 << 17])
def test_arcee_fusion_takes_the_outliers_of_importance(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, model = (torch.randn(40, 9, generator=generator) for _ in range(2))
    scores = importance(model.clone(), base)
    ordered = scores.flatten().sort().values
    low, median, high = (ordered[int(q * (scores.numel() - 1))] for q in (0.25, 0.5, 0.75))
    expected = torch.where(scores >= median + 1.5 * (high - low), model, base)
    assert 0 < (expected != base).sum() < 120
    torch.testing.assert_close(merge("arcee_fusion", [model], base, block_elements=block), expected)


def test_ram_adds_what_is_a_models_alone_and_averages_what_is_shared() -> None:
    taus = [torch.tensor([2.0, 2, 0, 1e-6]), torch.tensor([0.0, 4, 0, 3])]
    assert merge("ram", taus, ZERO).tolist() == [2, 3, 0, 3]


def test_ram_plus_amplifies_by_what_is_shared() -> None:
    taus = [torch.tensor([2.0, 2, 0, 0]), torch.tensor([0.0, 4, 0, 3])]
    # Each shares one change and has one alone: a ratio of 1, bounded by alpha.
    torch.testing.assert_close(merge("ramplus_tl", taus, ZERO), torch.tensor([2.04, 3, 0, 3.06]))
    torch.testing.assert_close(merge("ramplus_tl", taus, ZERO, r=0.5, alpha=2.0), torch.tensor([3, 3, 0, 4.5]))
    assert merge("ramplus_tl", [taus[0]] * 2, ZERO).tolist() == [2, 2, 0, 0]


def test_sce_weighs_by_energy_and_erases_minorities() -> None:
    taus = [torch.tensor([3.0, 1, 0, 0]), torch.tensor([-1.0, 2, 0, 0])]
    # Energies 10 and 5: shares 2/3 and 1/3.
    torch.testing.assert_close(merge("sce", taus, ZERO), torch.tensor([3.0, 4 / 3, 0, 0]))


@pytest.mark.parametrize("block", [1, 1 << 17])
def test_sce_selects_where_models_vary(block: int) -> None:
    taus = [torch.tensor([3.0, 1, 5, 0]), torch.tensor([-1.0, 2, 5, 0])]
    # Two of four elements vary; half of them is the first alone. Energies 9 and 1.
    selected = merge("sce", taus, ZERO, select_topk=0.5, block_elements=block)
    torch.testing.assert_close(selected, torch.tensor([3.0, 0, 0, 0]))
    assert merge("sce", taus, ZERO, select_topk=0.4, block_elements=block).tolist() == [0, 0, 0, 0]


def test_sce_does_not_mind_small_updates() -> None:
    taus = [torch.tensor([3e-5, 1e-5, 0, 0]), torch.tensor([-1e-5, 2e-5, 0, 0])]
    torch.testing.assert_close(merge("sce", taus, ZERO), torch.tensor([3e-5, 4e-5 / 3, 0, 0]), atol=0, rtol=1e-5)
    equal = merge("sce", taus, ZERO, table=MERGEKIT)
    torch.testing.assert_close(equal, torch.tensor([3e-5, 1.5e-5, 0, 0]), atol=0, rtol=1e-5)


def test_equal_models_have_exactly_no_variance() -> None:
    assert variance([torch.full((3,), 0.1) for _ in range(3)]).tolist() == [0, 0, 0]
    torch.testing.assert_close(variance([torch.tensor([1.0]), torch.tensor([4.0])]), torch.tensor([2.25]))


def test_importance_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 8, generator=generator)
    model = base + 1e-5 * torch.randn(200, 8, generator=generator)
    logits, reference = torch.log_softmax(model, -1), torch.log_softmax(base, -1)
    assert (logits.exp() * (logits - reference)).sum(-1).min() < 0  # so that there is something to clamp
    assert importance(model, base).min() >= 0


def test_sce_keeps_a_model_that_is_alone() -> None:
    tau = torch.tensor([3.0, -1, 0.5, 0])
    torch.testing.assert_close(merge("sce", [tau], ZERO, select_topk=0.5), tau)
    assert torch.equal(merge("sce", [tau], ZERO, table=MERGEKIT, select_topk=0.5), ZERO)


@pytest.mark.parametrize("size", [1e-10, 1e-25, 1e-30])
def test_the_energies_of_very_small_updates_do_not_vanish(size: float) -> None:
    taus = [torch.tensor([3.0, 1, 0, 0]) * size, torch.tensor([-1.0, 2, 0, 0]) * size]
    survey = Energies(SelectAll(), energies)
    found = survey.measure(Block(Place("w", 0, 4), taus, ZERO), ())
    assert survey.conclude(found, 4, ()) == pytest.approx([2 / 3, 1 / 3])


def test_energies_are_means_over_the_tensor() -> None:
    # mergekit's bound of 1e-6 is one for mean squares: these sum to 4e-7, the squares themselves to 4e-5.
    survey = Energies(SelectAll(), floored_energies)
    assert survey.conclude(np.array([3e-5, 1e-5]), 100, ()) == [0.5, 0.5]
    assert survey.conclude(np.array([3e-5, 1e-5]), 10, ()) == pytest.approx([0.75, 0.25])
