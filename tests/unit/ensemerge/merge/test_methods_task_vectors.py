from typing import Any

import pytest
import torch
from support.merging import Given, Run, merge, settings

from ensemerge.errors import InvalidSpec
from ensemerge.merge.draws import KeyedDraws
from ensemerge.merge.method import Block, Place
from ensemerge.merge.methods.mergekit import MERGEKIT
from ensemerge.merge.methods.sparsify import Drop, DropByRank, Sparsify, at_least, at_most, rank_probabilities
from ensemerge.merge.methods.table import METHODS

ZERO = torch.zeros(6)
TAUS = [
    torch.tensor([1, -2, 0.5, 0, 3, -0.1]),
    torch.tensor([-1.5, -1, 0.4, 2, -3, 0.2]),
    torch.tensor([0.6, 4, -0.3, 0, 1, 0.9]),
]
TAU = torch.tensor([4.0, -1, 2, -3, 0.5, -2])
KEEP = Given({("w", 0): torch.tensor([1, 0, 1, 0, 1, 0])})


def test_task_arithmetic_by_hand() -> None:
    base = torch.ones(6)
    merged = merge("task_arithmetic", [tau + 1 for tau in TAUS], base, each={"weight": [1.0, 2.0, 0.0]}, lambda_=0.5)
    torch.testing.assert_close(merged, torch.tensor([0, -1, 1.65, 3, -0.5, 1.15]))


def test_normalized_task_arithmetic_is_linear() -> None:
    weights = {"weight": [1.0, 2.0, 3.0]}
    merged = merge("task_arithmetic", TAUS, torch.ones(6), normalize=True, each=weights)
    torch.testing.assert_close(merged, merge("linear", TAUS, each=weights))
    with pytest.raises(InvalidSpec, match="sum to 0"):
        merge("task_arithmetic", TAUS, ZERO, normalize=True, each={"weight": [1.0, 1.0, -2.0]})


def test_ties_by_hand() -> None:
    merged = merge("ties", TAUS, ZERO, weight=1.0, density=0.5)
    torch.testing.assert_close(merged, torch.tensor([-1.5, 4, 0, 2, 2, 0.9]))


def test_ties_without_normalizing_adds_those_that_agree() -> None:
    merged = merge("ties", TAUS, ZERO, weight=1.0, density=0.5, normalize=False, lambda_=2.0)
    torch.testing.assert_close(merged, torch.tensor([-3, 8, 0, 4, 8, 1.8]))


def test_the_mean_of_ties_is_weighted() -> None:
    taus = [torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([-2.0])]
    merged = merge("ties", taus, torch.zeros(1), each={"weight": [1.0, 3.0, 1.0]})
    torch.testing.assert_close(merged, torch.tensor([13 / 4]))


def test_a_negative_weight_takes_a_task_away() -> None:
    tau, zero = [torch.tensor([2.0])], torch.zeros(1)
    assert merge("ties", tau, zero, weight=-0.5).item() == -2
    assert merge("ties", tau, zero, table=MERGEKIT, weight=-0.5).item() == 2


def test_a_sum_of_zero_elects_nothing() -> None:
    assert merge("ties", [TAU, -TAU], ZERO, weight=1.0).tolist() == [0] * 6


def test_elements_that_tie_at_the_threshold_are_all_kept() -> None:
    tau = torch.tensor([1.0, -1, 1, 0.5, 2, 0])
    # ⌊0.4 · 6⌋ = 2, and the second largest magnitude is 1, three times.
    assert merge("ties", [tau], ZERO, weight=1.0, density=0.4).tolist() == [1, -1, 1, 0, 2, 0]


def test_at_least_one_element_is_kept_unless_the_density_is_0() -> None:
    assert merge("ties", [TAU], ZERO, weight=1.0, density=0.01).tolist() == [4, 0, 0, 0, 0, 0]
    assert merge("ties", [TAU], ZERO, weight=1.0, density=0.0).tolist() == [0] * 6
    assert torch.equal(merge("ties", [TAU], ZERO, weight=1.0), TAU)


@pytest.mark.parametrize("block", [1, 2, 1 << 17])
def test_ties_trims_the_model_as_a_whole_and_mergekit_each_tensor(block: int) -> None:
    model = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([4.0, 5, 0.5])}
    base = {name: torch.zeros(3) for name in model}
    kept = {}
    for table in (METHODS, MERGEKIT):
        method = table["ties"].make(settings(table["ties"], 1, weight=1.0, density=1 / 3))
        merged = Run(method, [model], base, block).merged()
        kept[table is METHODS] = [tensor.tolist() for tensor in merged.values()]
    assert kept[True] == [[0, 0, 0], [4, 5, 0]]
    assert kept[False] == [[0, 0, 3], [0, 5, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_keep_the_element_that_they_are(dtype: torch.dtype) -> None:
    tau = torch.tensor([0.1, -0.1, 0.2, 0.05, 0], dtype=dtype)
    bound = torch.tensor(0.1).item()
    assert (at_least(tau.clone(), bound) != 0).tolist() == [True, True, True, False, False]
    assert (at_most(tau.clone(), bound) != 0).tolist() == [True, True, False, True, False]
    assert torch.equal(at_least(tau.clone(), 0), tau)


def test_dare_by_hand() -> None:
    merged = merge("dare_linear", [TAU], ZERO, weight=1.0, density=0.5, draws=KEEP)
    assert merged.tolist() == [8, 0, 4, 0, 1, 0]
    assert merge("dare_linear", [TAU], ZERO, weight=1.0, density=0.5, rescale=False, draws=KEEP).tolist() == [
        4,
        0,
        2,
        0,
        0.5,
        0,
    ]


def test_mergekits_dare_keeps_the_l1_norm() -> None:
    merged = merge("dare_linear", [TAU], ZERO, table=MERGEKIT, weight=1.0, density=0.5, draws=KEEP)
    torch.testing.assert_close(merged, torch.tensor([4, 0, 2, 0, 0.5, 0]) * 12.5 / 6.5)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_dropped_is_made_up_for_on_average(method: str) -> None:
    tau = torch.full((400, 500), 0.01)
    merged = merge(method, [tau], torch.zeros(400, 500), weight=1.0, density=0.3)
    assert (merged == 0).float().mean().item() == pytest.approx(0.7, abs=0.006)
    assert merged.mean().item() == pytest.approx(0.01, rel=0.02)


def test_dare_ties_elects_after_it_drops() -> None:
    masks = Given({("w", 0): torch.tensor([1, 0]), ("w", 1): torch.tensor([1, 1])})
    taus = [torch.tensor([3.0, 3.0]), torch.tensor([-1.0, -1.0])]
    assert merge("dare_ties", taus, torch.zeros(2), weight=1.0, density=0.5, draws=masks).tolist() == [6, -2]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_densities_of_0_and_1_draw_nothing(method: str) -> None:
    taus = [TAUS[0].reshape(2, 3), TAUS[1].reshape(2, 3)]
    merged = merge(method, taus, torch.zeros(2, 3), weight=1.0, each={"density": [1.0, 0.0]}, draws=Given({}))
    assert torch.equal(merged, taus[0])


def test_probabilities_follow_the_rank_within_a_row() -> None:
    probabilities = rank_probabilities(torch.tensor([[3.0, -1, 2], [0, 0, -5]]), 0.5, 0.2)
    torch.testing.assert_close(probabilities, torch.tensor([[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]]))
    assert rank_probabilities(torch.ones(3, 1), 0.5, 0.2).tolist() == [[0.5]] * 3


def test_ranks_of_wide_rows_keep_their_order() -> None:
    probabilities = rank_probabilities(torch.arange(5000.0)[None], 0.5, 0.2)
    assert (probabilities.diff() > 0).all()


def test_della_divides_by_each_elements_own_probability() -> None:
    keep = Given({("w", 0): torch.tensor([1, 1, 0])})
    merged = merge(
        "della_linear",
        [torch.tensor([[3.0, -1, 2]])],
        torch.zeros(1, 3),
        draws=keep,
        weight=1.0,
        density=0.5,
        epsilon=0.2,
    )
    torch.testing.assert_close(merged, torch.tensor([[3 / 0.7, -1 / 0.3, 0]]))


def test_della_refuses_what_is_no_probability() -> None:
    with pytest.raises(InvalidSpec, match=r"density 0.9 and epsilon 0.2.*from 0.7 to 1.1.*make epsilon smaller"):
        merge("della", [TAU], ZERO, weight=1.0, density=0.9, epsilon=0.2)


def test_breadcrumbs_by_hand() -> None:
    tau = torch.tensor([10.0, -9, 8, -7, 6, -5, 4, -3, 2, -1])
    merged = merge("breadcrumbs", [tau], torch.zeros(10), weight=1.0, density=0.5, gamma=0.2)
    assert merged.tolist() == [0, 0, 8, -7, 6, -5, 4, 0, 0, 0]


def test_breadcrumbs_cut_fewer_outliers_where_the_density_asks_for_them() -> None:
    tau = torch.tensor([10.0, -9, 8, -7])
    assert merge("breadcrumbs", [tau], torch.zeros(4), weight=1.0, density=0.75, gamma=0.5).tolist() == [0, -9, 8, -7]
    assert torch.equal(merge("breadcrumbs", [tau], torch.zeros(4), weight=1.0, gamma=0.5), tau)


def test_breadcrumbs_of_a_small_tensor_keep_something() -> None:
    tau = torch.tensor([2.0, 1.0])
    assert merge("breadcrumbs", [tau], torch.zeros(2), weight=1.0, density=0.3).tolist() == [2, 0]
    assert merge("breadcrumbs", [tau], torch.zeros(2), table=MERGEKIT, weight=1.0, density=0.3).tolist() == [0, 0]


def test_breadcrumbs_ties_elects_among_what_is_left() -> None:
    taus = [torch.tensor([9.0, 2, 1]), torch.tensor([-3.0, -1, 5])]
    merged = merge("breadcrumbs_ties", taus, torch.zeros(3), weight=1.0, density=0.67, gamma=0.34)
    # Of three elements one outlier goes, and ⌊0.67 · 3⌋ = 2 stay: (0, 2, 1) and (−3, −1, 0).
    assert merged.tolist() == [-3, 2, 1]


def test_rescaling_restores_the_l1_norm() -> None:
    merged = merge("ties", [TAU], ZERO, weight=1.0, density=0.5, rescale=True)
    torch.testing.assert_close(merged, torch.tensor([4.0, 0, 2, -3, 0, -2]) * 12.5 / 11)
    assert merge("ties", [ZERO], ZERO, weight=1.0, density=0.5, rescale=True).tolist() == [0] * 6


@pytest.mark.parametrize("block", [3, 64, 1 << 17])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties", "sce", "arcee_fusion"])
def test_blocks_do_not_show(method: str, block: int) -> None:
    generator = torch.Generator().manual_seed(3)
    count = METHODS[method].most or 3
    models = [torch.randn(12, 16, generator=generator) for _ in range(count)]
    names = {parameter.name for parameter in METHODS[method].parameters}
    chosen: dict[str, Any] = {
        k: v for k, v in {"weight": 0.8, "density": 0.4, "select_topk": 0.5}.items() if k in names
    }
    whole = merge(method, models, torch.zeros(12, 16), draws=KeyedDraws(5), **chosen)
    cut = merge(method, models, torch.zeros(12, 16), draws=KeyedDraws(5), block_elements=block, **chosen)
    # SCE sums squares, in an order that blocks decide: they depend on the tensor alone in a real merge.
    torch.testing.assert_close(cut, whole, rtol=2e-7 if method == "sce" else 0, atol=0)


@pytest.mark.parametrize("step", [Drop((0.0,), KeyedDraws()), DropByRank((0.0,), (0.1,), KeyedDraws())])
def test_dropping_everything_lets_nan_be_seen(step: Sparsify) -> None:
    # The engine checks only the result of a method that says that it propagates.
    block = Block(Place("w", 0, 2), [torch.tensor([[float("nan"), 1.0]])], torch.zeros(1, 2), checked=True)
    (kept,) = step(block, block.deltas(), ())
    assert kept[0, 0].isnan()
    assert kept[0, 1] == 0
