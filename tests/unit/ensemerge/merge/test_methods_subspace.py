from functools import partial
from typing import Any

import pytest
import torch
from support.merging import merge

from ensemerge.merge.methods.consensus import AgreeingMean
from ensemerge.merge.methods.subspace import Knots, MergeMatrices, iso_c, iso_cts, orthogonal, svd, tsv_m
from ensemerge.merge.methods.table import METHODS

SUBSPACE = ["tsv_m", "iso_c", "iso_cts"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank_one(left: int, right: int, value: float, shape: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """A matrix with one singular value, along two axes."""
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix[left, right] = value
    return matrix


def test_tasks_in_orthogonal_subspaces_do_not_interfere() -> None:
    # Two triplets each: τ_0 lives on axes 0 and 1, τ_1 on 2 and 3; the merge is their sum.
    taus = [rank_one(0, 0, 5) + rank_one(1, 1, 3), rank_one(2, 2, 4) + rank_one(3, 3, 2)]
    torch.testing.assert_close(tsv_m(taus), taus[0] + taus[1])


def test_tsv_keeps_each_tasks_leading_triplets() -> None:
    taus = [rank_one(0, 0, 5) + rank_one(1, 1, 3) + rank_one(2, 2, 1), rank_one(3, 3, 4) + rank_one(2, 2, 2)]
    # The third triplet of task 0 is dropped.
    torch.testing.assert_close(tsv_m(taus), rank_one(0, 0, 5) + rank_one(1, 1, 3) + taus[1])


def test_tsv_makes_parallel_directions_orthogonal() -> None:
    merged = tsv_m([random(6, 5), random(6, 5, seed=1)])
    s = torch.linalg.svdvals(merged)
    singular = [torch.linalg.svdvals(random(6, 5, seed=seed))[:2] for seed in (0, 1)]
    torch.testing.assert_close(s[:4], torch.cat(singular).sort(descending=True).values)


def test_more_tasks_than_rows_fall_back_to_the_mean() -> None:
    taus = [random(2, 5, seed=seed) for seed in range(3)]
    torch.testing.assert_close(tsv_m(taus), torch.stack(taus).mean(0))


def test_iso_c_makes_every_singular_value_the_mean() -> None:
    taus = [random(5, 7), random(5, 7, seed=1)]
    total = taus[0] + taus[1]
    singular = torch.linalg.svdvals(iso_c(taus))
    torch.testing.assert_close(singular, torch.linalg.svdvals(total).mean().expand(5))
    torch.testing.assert_close(iso_c([torch.diag(torch.tensor([3.0, 1.0]))] * 2), torch.eye(2) * 4)


def test_iso_cts_without_own_directions_is_iso_c() -> None:
    taus = [random(6, 5), random(6, 5, seed=1)]
    torch.testing.assert_close(iso_cts(taus, 1.0), iso_c(taus))


def test_iso_cts_gives_each_task_directions_of_its_own() -> None:
    # The sum is led by axis 0; axes 1 and 2 belong to one task each, and all get the mean of 10, 3 and 2.
    shape = (3, 3)
    taus = [rank_one(0, 0, 5, shape) + rank_one(1, 1, 3, shape), rank_one(0, 0, 5, shape) + rank_one(2, 2, 2, shape)]
    torch.testing.assert_close(iso_cts(taus, 0.4), torch.eye(3, dtype=torch.float64) * 5)


def test_the_nearest_orthogonal_matrix() -> None:
    tall = orthogonal(random(6, 3))
    torch.testing.assert_close(tall.T @ tall, torch.eye(3, dtype=torch.float64))
    wide = orthogonal(random(3, 6))
    torch.testing.assert_close(wide @ wide.T, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("method", SUBSPACE)
@pytest.mark.parametrize("shape", [(), (4,), (3, 2, 2)])
def test_what_is_no_matrix_is_averaged(method: str, shape: tuple[int, ...]) -> None:
    models = [random(*shape, seed=seed) for seed in range(3)]
    base = random(*shape, seed=9)
    merged = merge(method, models, base, lambda_=0.5)
    torch.testing.assert_close(merged, base + 0.5 * (torch.stack(models).mean(0) - base))


@pytest.mark.parametrize("method", [*SUBSPACE, "knots_linear", "knots_ties"])
def test_no_change_stays_no_change(method: str) -> None:
    base = random(4, 5).float()
    parameters: dict[str, Any] = {"weight": 1.0} if "weight" in {p.name for p in METHODS[method].parameters} else {}
    assert torch.equal(merge(method, [base] * 3, base, **parameters), base)


def test_knots_with_sums_is_task_arithmetic() -> None:
    # The decomposition is linear, so that merging V by sums changes nothing.
    models, base = [random(6, 4, seed=seed) for seed in range(3)], random(6, 4, seed=9)
    weights = {"weight": [0.2, 0.5, 0.9]}
    expected = merge("task_arithmetic", models, base, each=weights)
    torch.testing.assert_close(merge("knots_linear", models, base, each=weights), expected)


def test_knots_aligns_adapters_of_different_ranks() -> None:
    # Both adapters write into axis 0; the second has another direction too, which no one disputes.
    a = rank_one(0, 0, 3.0)
    b = rank_one(0, 0, 1.0) + rank_one(1, 2, 2.0)
    merged = merge("knots_ties", [a, b], torch.zeros(4, 4, dtype=torch.float64), weight=1.0)
    torch.testing.assert_close(merged, rank_one(0, 0, 2.0) + rank_one(1, 2, 2.0))


def test_knots_trims_the_shared_directions() -> None:
    a = rank_one(0, 0, 3.0) + rank_one(1, 1, 1.0)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    # V has eight entries, of which two are not zero; a quarter of them keeps both, an eighth one or both, tied.
    torch.testing.assert_close(merge("knots_ties", [a], zero, weight=1.0, density=0.25), a)
    assert torch.equal(merge("knots_ties", [a], zero, weight=1.0, density=0.0), zero)


def low_rank(rank: int, seed: int, shape: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return random(shape[0], rank, seed=seed) @ random(rank, shape[1], seed=seed + 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_in_orthogonal_subspaces_do_not_interfere(dtype: torch.dtype) -> None:
    left, right = (torch.linalg.qr(random(64, 4, seed=seed)).Q for seed in (0, 1))
    values = torch.tensor([[3.0, 2.0], [5.0, 1.0]], dtype=torch.float64)
    taus = [((left[:, k : k + 2] * s) @ right[:, k : k + 2].T).to(dtype) for k, s in zip((0, 2), values, strict=True)]
    torch.testing.assert_close(tsv_m(taus), taus[0] + taus[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tsv_of_one_adapter_and_nothing_or_itself_is_the_adapter(dtype: torch.dtype) -> None:
    tau = low_rank(2, 0).to(dtype)
    for taus in ([tau, torch.zeros_like(tau)], [torch.zeros_like(tau), tau], [tau, tau]):
        torch.testing.assert_close(tsv_m(taus), tau, rtol=1e-5, atol=1e-5)


def test_the_rank_leaves_out_what_is_noise() -> None:
    eps = torch.finfo(torch.float64).eps
    assert len(svd(torch.diag(torch.tensor([2.0, 5 * eps, 0, 0], dtype=torch.float64)))[1]) == 1
    assert len(svd(torch.diag(torch.tensor([2.0, 12 * eps, 0, 0], dtype=torch.float64)))[1]) == 2
    assert len(svd(torch.zeros(3, 4))[1]) == 0


def test_knots_lets_no_noise_vote() -> None:
    # The second direction is noise beside the first (6 · 10 eps); in it alone the models would disagree.
    noise = 20 * torch.finfo(torch.float64).eps
    a, b = rank_one(0, 0, 10) + rank_one(1, 1, noise), rank_one(0, 0, 10)
    kept = Knots([1.0, 1.0], AgreeingMean([1.0, 1.0]))([a, b])
    assert kept[1, 1] == 0
    a[1, 1] = 400 * torch.finfo(torch.float64).eps
    assert Knots([1.0, 1.0], AgreeingMean([1.0, 1.0]))([a, b])[1, 1] != 0


@pytest.mark.parametrize("merge_matrices", [iso_c, partial(iso_cts, common=0.5)])
def test_isotropic_merges_stay_within_the_rank(merge_matrices: MergeMatrices) -> None:
    taus = [low_rank(2, seed, (9, 8)) for seed in range(3)]
    s = torch.linalg.svdvals(merge_matrices(taus))
    torch.testing.assert_close(s[:6], s[0].expand(6))
    assert s[6:].max() < 1e-12 * s[0]


def test_iso_cts_rounds_the_number_of_own_directions() -> None:
    # Of rank 8, ⌊0.45 · 8⌋ = 3 would be shared; the other 5 among 3 tasks make 2 for each, and leave 2 shared ones.
    values = [20.0, 19, 6, 5, 4, 3, 2, 1]
    axes = [rank_one(i, i, value, (8, 8)) for i, value in enumerate(values)]
    taus = [(axes[0] + axes[1]) / 3 + axes[2 + 2 * k] + axes[3 + 2 * k] for k in range(3)]
    expected = torch.eye(8, dtype=torch.float64) * sum(values) / 8
    torch.testing.assert_close(iso_cts(taus, 0.45), expected)


def test_iso_cts_never_gives_out_more_directions_than_there_are() -> None:
    # A quarter of 7 directions rounds up to 2 for each of four tasks, which would be 8: one each then, 3 are shared.
    taus = [random(7, 7, seed=seed) for seed in range(4)]
    u, s, _ = torch.linalg.svd(torch.stack(taus).sum(0))
    own = [torch.linalg.svdvals(tau - u[:, :3] @ u[:, :3].T @ tau)[:1] for tau in taus]
    singular = torch.linalg.svdvals(iso_cts(taus, 0.0))
    torch.testing.assert_close(singular, torch.cat([s[:3], *own]).mean().expand(7))


def test_a_task_within_the_common_subspace_has_no_directions_of_its_own() -> None:
    left, right = (torch.linalg.qr(random(9, 4, seed=seed)).Q for seed in (0, 1))
    a, b = ((left[:, k] * torch.tensor(s).double()) @ right[:, k].T for k, s in (([0, 1], [10, 9]), ([2, 3], [2, 1])))
    # Both directions of a are shared, b adds its first one: what a leaves outside is rounding.
    expected = left[:, :3] @ right[:, :3].T * (10 + 9 + 2) / 3
    torch.testing.assert_close(iso_cts([a, b], 0.5), expected)
