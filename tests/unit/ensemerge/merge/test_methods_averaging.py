import pytest
import torch
from support.merging import merge

from ensemerge.errors import InvalidSpec
from ensemerge.merge.method import Block, NotFinite, Place
from ensemerge.merge.methods.averaging import WeightedSum, ema, lawa, normalized, swa, weighted_sum

A, B, C = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, -1.0]), torch.tensor([0.0, 6.0, 1.0])


def test_linear_is_the_weighted_mean() -> None:
    assert merge("linear", [A, B], each={"weight": [1.0, 3.0]}).tolist() == [2.5, 2.0, 0.0]
    assert merge("linear", [A, B], normalize=False, each={"weight": [1.0, 3.0]}).tolist() == [10, 8, 0]


def test_weights_that_cancel_are_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"sum to 0.*expected a sum that is not zero.*normalize: false"):
        normalized([1, -1])
    assert merge("linear", [A, B], normalize=False, each={"weight": [1.0, -1.0]}).tolist() == [-2, 0, 4]


def test_half_precision_is_summed_in_float32() -> None:
    # In bfloat16 256 + 1 is 256 again, so that a running sum would give 64.
    tensors = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    merged = merge("uniform_soup", tensors)
    assert merged.dtype == torch.float32
    assert merged.item() == 259 / 4


def test_the_inputs_stay_as_they_are() -> None:
    models = [A.clone(), B.clone()]
    merge("linear", models, weight=1.0)
    assert torch.equal(models[0], A)


def test_the_uniform_soup_is_the_mean() -> None:
    torch.testing.assert_close(merge("uniform_soup", [A, B, C]), torch.tensor([4 / 3, 10 / 3, 1.0]))


def test_passthrough_scales() -> None:
    assert torch.equal(merge("passthrough", [A]), A)
    assert merge("passthrough", [A], scale=2.0).tolist() == [2, 4, 6]


def test_swa_is_the_mean_from_a_start_on() -> None:
    assert swa(4, 1) == [0, 1 / 3, 1 / 3, 1 / 3]
    assert torch.equal(merge("swa", [A, B, C], start=2), C)
    with pytest.raises(InvalidSpec, match="`start` is 4, but there are 4 checkpoints"):
        swa(4, 4)


def test_ema_is_its_own_recursion() -> None:
    average = A.clone()
    for model in (B, C):
        average = 0.9 * average + 0.1 * model
    torch.testing.assert_close(merge("ema", [A, B, C], beta=0.9), average)
    assert sum(ema(5, 0.7)) == pytest.approx(1)


def test_lawa_is_the_mean_of_the_latest() -> None:
    assert lawa(3, 2) == [0, 0.5, 0.5]
    torch.testing.assert_close(merge("lawa", [A, B, C], k=2), (B + C) / 2)
    with pytest.raises(InvalidSpec, match="`k` is 4, but there are 3 checkpoints"):
        lawa(3, 4)


def test_a_weighted_sum_overwrites_its_first_tensor_only() -> None:
    first, second = A.clone(), B.clone()
    total = weighted_sum([first, second], [2, 1])
    assert total is first
    assert torch.equal(second, B)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e30])
def test_weights_may_be_of_any_size(size: float) -> None:
    assert normalized([size, 3 * size]) == pytest.approx([0.25, 0.75])
    with pytest.raises(InvalidSpec, match=r"expected a sum that is not zero"):
        normalized([size, -size])


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"sum to 0"):
        normalized([0.0, 0.0])


def test_a_model_of_coefficient_zero_is_read_too() -> None:
    models = [torch.tensor([1.0]), torch.tensor([float("nan")])]
    with pytest.raises(NotFinite):
        WeightedSum([1.0, 0.0]).combine(Block(Place("w", 0, 1), models), ())
    # The engine checks only the result of a method that says that it propagates.
    assert WeightedSum([0.0, 1.0]).combine(Block(Place("w", 0, 1), models[::-1], checked=True), ()).isnan().all()
    assert WeightedSum([0.0, 1.0]).combine(Block(Place("w", 0, 1), [B[:1], A[:1]]), ()).tolist() == [1]
