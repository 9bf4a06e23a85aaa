import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemerge.errors import InvalidSpec
from ensemerge.merge.methods import linear

A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, -1.0])


def test_linear_is_the_weighted_mean() -> None:
    assert linear([A, B], [1, 3]).tolist() == [2.5, 2.0, 0.0]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_merging_a_model_with_itself_returns_it(weights: list[float]) -> None:
    # One rounding for each addition: five of them in float32.
    torch.testing.assert_close(linear([A] * len(weights), weights), A, rtol=1e-6, atol=0)


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    # In bfloat16 256 + 1 is 256 again, so that a running sum would give 64.
    tensors = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    running = sum(tensors[1:], tensors[0]) / 4
    merged = linear(tensors, [1, 1, 1, 1])
    assert merged.dtype == torch.bfloat16
    assert merged.item() == torch.tensor(259 / 4).to(torch.bfloat16).item() != running.item()


def test_weights_that_cancel_are_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"sum to 0.*expected a sum that is not zero"):
        linear([A, B], [1, -1])


def test_scalars_and_empty_tensors_have_a_mean_too() -> None:
    assert linear([torch.tensor(1.0), torch.tensor(2.0)], [1, 1]).item() == 1.5
    assert linear([torch.empty(0, 3), torch.empty(0, 3)], [1, 1]).shape == (0, 3)
