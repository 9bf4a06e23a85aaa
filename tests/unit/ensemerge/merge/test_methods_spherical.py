import math
from typing import Any

import numpy as np
import pytest
import torch
from support.merging import merge

from ensemerge.errors import InvalidSpec
from ensemerge.merge.methods.spherical import inner_products, karcher, multislerp, slerp
from ensemerge.merge.methods.table import METHODS

X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
P, Q = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-2.0, 1.0, 0.5, 3.0])


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.acos(float(torch.dot(a, b) / a.norm() / b.norm()))


def test_slerp_by_hand() -> None:
    expected = torch.tensor([0.073935, 1.830947, 2.409805, 3.998510])
    torch.testing.assert_close(merge("slerp", [P, Q], t=0.3), expected, rtol=0, atol=1e-6)


def test_slerp_goes_from_one_model_to_the_other() -> None:
    assert torch.equal(merge("slerp", [P, Q], t=0.0), P)
    torch.testing.assert_close(merge("slerp", [P, Q], t=1.0), Q)
    # At right angles: cos 30° of one and sin 30° of the other.
    torch.testing.assert_close(merge("slerp", [X, Y], t=1 / 3), torch.tensor([3**0.5 / 2, 1.5]))


@pytest.mark.parametrize("other", [P * 3, -P, torch.zeros(4), P + 1e-4])
def test_parallel_opposite_and_zero_models_are_interpolated_linearly(other: torch.Tensor) -> None:
    torch.testing.assert_close(merge("slerp", [P, other], t=0.25), 0.75 * P + 0.25 * other)


def test_an_arc_is_longer_than_its_chord() -> None:
    assert slerp(np.array([[1.0, 0.0], [0.0, 1.0]]), 0.5) == pytest.approx([math.sqrt(0.5)] * 2)


def test_nuslerp_is_slerp_at_the_second_weights_share() -> None:
    expected = merge("slerp", [P, Q], t=0.3)
    torch.testing.assert_close(merge("nuslerp", [P, Q], each={"weight": [0.7, 0.3]}), expected)
    torch.testing.assert_close(merge("nuslerp", [P, Q], each={"weight": [7.0, 3.0]}), expected)
    with pytest.raises(InvalidSpec, match="sum to 0"):
        merge("nuslerp", [P, Q], each={"weight": [1.0, -1.0]})


def test_nuslerp_has_an_optional_origin() -> None:
    base = torch.tensor([5.0, -5.0, 0.0, 1.0])
    expected = base + merge("slerp", [P, Q], t=0.3)
    torch.testing.assert_close(merge("nuslerp", [P + base, Q + base], base, each={"weight": [0.7, 0.3]}), expected)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_nuslerp_takes_rows_or_columns_by_themselves(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, generator=generator) for _ in range(2))
    rows = torch.stack([merge("slerp", [x, y], t=0.3) for x, y in zip(a, b, strict=True)])
    columns = torch.stack([merge("slerp", [x, y], t=0.3) for x, y in zip(a.T, b.T, strict=True)], 1)
    weights = {"weight": [0.7, 0.3]}
    by_row = merge("nuslerp", [a, b], nuslerp_flatten=False, each=weights, block_elements=block)
    by_column = merge(
        "nuslerp", [a, b], nuslerp_flatten=False, nuslerp_row_wise=True, each=weights, block_elements=block
    )
    torch.testing.assert_close(by_row, rows)
    torch.testing.assert_close(by_column, columns)


@pytest.mark.parametrize("row_wise", [False, True])
def test_a_vector_has_one_axis(row_wise: bool) -> None:
    merged = merge("nuslerp", [P, Q], nuslerp_flatten=False, nuslerp_row_wise=row_wise, each={"weight": [0.7, 0.3]})
    torch.testing.assert_close(merged, merge("slerp", [P, Q], t=0.3))


def test_multislerp_of_two_models_is_slerp_of_their_directions() -> None:
    merged = merge("multislerp", [P, Q], each={"weight": [0.7, 0.3]})
    unit = merge("slerp", [P / P.norm(), Q / Q.norm()], t=0.3)
    torch.testing.assert_close(merged, unit * (0.7 * P.norm() + 0.3 * Q.norm()))


def test_multislerp_of_the_axes_is_their_diagonal() -> None:
    axes = list(torch.eye(3) * 2)
    torch.testing.assert_close(merge("multislerp", axes, weight=1.0), torch.full((3,), 2 / 3**0.5))


def test_multislerp_measures_from_an_origin() -> None:
    base = torch.tensor([1.0, 1.0, 1.0])
    merged = merge("multislerp", [row + base for row in torch.eye(3)], base, weight=1.0)
    torch.testing.assert_close(merged, base + 1 / 3**0.5)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_are_averaged_linearly(method: str) -> None:
    opposite = [torch.tensor([3.0]), torch.tensor([-1.0])]
    parameters: dict[str, Any] = {"weight": 1.0} if method == "multislerp" else {}
    torch.testing.assert_close(merge(method, opposite, **parameters), torch.tensor([1.0]))
    assert merge(method, [torch.zeros(2)] * 3, **parameters).tolist() == [0, 0]


def test_weights_of_the_sphere_may_stay_as_they_are() -> None:
    doubled = merge("multislerp", [X, X], weight=1.0, normalize_weights=False)
    torch.testing.assert_close(doubled, 2 * X)


def test_the_karcher_mean_is_where_the_logarithms_cancel() -> None:
    generator = torch.Generator().manual_seed(1)
    models = [torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(4)]
    mean = merge("karcher", models, max_iter=100, tol=1e-12)
    unit = mean / mean.norm()
    logarithms = [
        angle(unit, m) / math.sin(angle(unit, m)) * (m / m.norm() - math.cos(angle(unit, m)) * unit) for m in models
    ]
    assert torch.stack(logarithms).sum(0).norm() < 1e-9
    torch.testing.assert_close(mean.norm(), torch.stack([m.norm() for m in models]).mean())


def test_the_karcher_mean_of_two_models_is_half_way() -> None:
    torch.testing.assert_close(merge("karcher", [X, Y]), torch.tensor([2**0.5, 2**0.5]))


def test_inner_products_lose_little_over_a_block() -> None:
    rows = [torch.randn(1 << 17, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    exact = np.array([[(a.double() @ b.double()).item() for b in rows] for a in rows])
    assert np.abs(inner_products(rows, (0,)) - exact).max() < 2e-7 * exact.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_cancel_in_spite_of_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(4)).to(dtype)
    gram = inner_products([x.float(), (-3 * x).float()], (0,))
    assert multislerp(gram, [0.5, 0.5], 1e-8).tolist() == [0.5, 0.5]
    assert karcher(gram, 10, 1e-5).tolist() == [0.5, 0.5]


def test_small_weights_of_the_sphere_do_not_look_as_if_they_cancelled() -> None:
    gram = np.eye(2)
    small, large = (multislerp(gram, [weight, weight], 1e-8) for weight in (1e-5, 0.5))
    assert small == pytest.approx(large * 2e-5)


def test_the_squares_of_very_small_models_do_not_vanish() -> None:
    gram = inner_products([P * 1e-25, Q * 1e-25], (0,))
    assert slerp(gram, 0.3) == pytest.approx(slerp(inner_products([P, Q], (0,)), 0.3))


def test_the_steps_of_the_karcher_mean_are_bounded() -> None:
    (steps,) = (p for p in METHODS["karcher"].parameters if p.name == "max_iter")
    assert steps.high == 10_000
