from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemerge.merge.method import Block, Place, SampledSurvey, Scope, Survey
from ensemerge.merge.methods.sparsify import Magnitudes, TopFraction
from ensemerge.merge.selection import order_statistics


def blocks(values: torch.Tensor, size: int) -> list[Block]:
    """Of one model whose base is zero."""
    parts = [(start, values[start : start + size]) for start in range(0, len(values), size)]
    return [Block(Place("w", start, len(values)), [part], torch.zeros_like(part)) for start, part in parts]


def select(survey: Survey, parts: Sequence[Block], numel: int) -> tuple[float, list[str]]:
    """The finding of a survey and of those that follow from it, and which they were."""
    made = []
    while True:
        made.append(type(survey).__name__)
        seen = parts[:: survey.every] if isinstance(survey, SampledSurvey) else parts
        found = survey.conclude(sum(survey.measure(block, []) for block in seen), numel, [])
        if isinstance(found, torch.Tensor):
            return found[0, 0].item(), made
        survey = found


def kth(values: torch.Tensor, density: float, block: int = 1000) -> float:
    """The k-th largest magnitude."""
    (survey,) = order_statistics(Magnitudes(), TopFraction((density,)), Scope.TENSOR)
    return select(survey, blocks(values, block), len(values))[0]


@given(
    st.lists(st.floats(-(2.0**59), 2.0**59, width=32), min_size=1, max_size=40), st.floats(0.01, 1), st.integers(1, 9)
)
def test_it_finds_what_a_sort_finds(values: list[float], density: float, block: int) -> None:
    tensor = torch.tensor(values)
    k = max(1, int(density * len(values)))
    assert kth(tensor, density, block) == tensor.abs().sort(descending=True).values[k - 1].item()


def test_it_finds_it_among_many_that_share_their_upper_half() -> None:
    tensor = torch.linspace(1, 1.001, 5001)[torch.randperm(5001)]
    assert kth(tensor, 0.25) == tensor.sort(descending=True).values[1249].item()


def test_ties_zeros_and_doubles() -> None:
    assert kth(torch.tensor([1.0, -1.0, 1.0, 0.0]), 0.5) == 1
    assert kth(torch.zeros(4), 0.5) == 0
    assert kth(torch.tensor([1 + 1e-12, 2.0], dtype=torch.float64), 1.0) == 1


def test_rank_0_is_infinity() -> None:
    assert kth(torch.tensor([1.0, 2.0]), 0.0) == np.inf


def test_scores_that_were_left_out_do_not_count() -> None:
    # The engine passes over blocks that are copied: fewer scores come than the tensor has elements.
    (survey,) = order_statistics(Magnitudes(), TopFraction((1.0,)), Scope.TENSOR)
    block = Block(Place("w", 0, 10), [torch.tensor([3.0, 2.0])], torch.zeros(2))
    assert select(survey, [block], 10)[0] == 2


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_a_sample_and_one_pass_are_enough_for_an_even_tensor(density: float) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    (survey,) = order_statistics(Magnitudes(), TopFraction((density,)), Scope.TENSOR)
    found, made = select(survey, blocks(values, 1000), len(values))
    assert found == values.abs().sort(descending=True).values[int(density * 200_000) - 1].item()
    assert made == ["Sketch", "Count"]


def test_a_sample_that_misleads_costs_two_more_passes() -> None:
    # Every sixteenth block, which is all that the sketch sees, is much smaller than the others.
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).reshape(100, 1000)
    values[::16] *= 1e-3
    values = values.reshape(-1)
    (survey,) = order_statistics(Magnitudes(), TopFraction((0.3,)), Scope.TENSOR)
    found, made = select(survey, blocks(values, 1000), len(values))
    assert found == values.abs().sort(descending=True).values[29_999].item()
    assert made == ["Sketch", "Count", "Coarse", "Fine"]


def test_many_scores_inside_a_bracket_are_kept_as_counts() -> None:
    values = 1 + torch.rand(300_000, generator=torch.Generator().manual_seed(0)) / 1000
    (survey,) = order_statistics(Magnitudes(), TopFraction((0.5,)), Scope.TENSOR)
    found, made = select(survey, blocks(values, 1000), len(values))
    assert found == values.sort(descending=True).values[149_999].item()
    assert made == ["Sketch", "Count"]


@pytest.mark.parametrize(("density", "rank"), [(0.5, 3), (0.01, 1), (1.0, 6), (0.0, 0)])
def test_the_rank_of_a_density(density: float, rank: int) -> None:
    assert TopFraction((density,))(0, 6, []) == (rank,)


def test_surveys_are_values() -> None:
    def surveys(density: float) -> object:
        return order_statistics(Magnitudes(), TopFraction((density,)), Scope.MODEL)

    assert surveys(0.5) == surveys(0.5) != surveys(0.4)
    assert hash(surveys(0.5)) == hash(surveys(0.5))
