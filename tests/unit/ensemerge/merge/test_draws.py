import pytest
import torch

from ensemerge.merge.draws import KeyedDraws
from ensemerge.merge.method import Place

N = 20_000


def keep(
    start: int = 0, count: int = N, probability: torch.Tensor | float = 0.3, model: int = 0, seed: int = 0
) -> torch.Tensor:
    return KeyedDraws(seed).keep(Place("w", start, N), model, probability, count)


@pytest.mark.parametrize("start", [1, 7, 8, 9, 131])
def test_an_element_has_one_fate_whatever_the_block(start: int) -> None:
    assert torch.equal(keep()[start:], keep(start, N - start))


def test_tensors_models_and_seeds_have_draws_of_their_own() -> None:
    others = [keep(model=1), keep(seed=1), KeyedDraws().keep(Place("v", 0, N), 0, 0.3, N)]
    # Two independent draws of probability .3 agree on .58 of the elements, give or take .0035.
    assert all(abs((keep() == other).float().mean().item() - 0.58) < 0.02 for other in others)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.93])
def test_the_share_kept_is_the_probability(probability: float) -> None:
    # Five standard deviations.
    assert abs(keep(probability=probability).float().mean().item() - probability) < 5 * (0.25 / N) ** 0.5


def test_probabilities_for_each_element_are_those_of_one() -> None:
    assert torch.equal(keep(probability=torch.full((N,), 0.25)), keep(probability=0.25))
    mixed = keep(probability=torch.tensor([0.0, 1.0]).repeat(N // 2))
    assert not mixed[::2].any()
    assert mixed[1::2].all()


def test_certainties() -> None:
    assert keep(probability=1.0).all()
    assert not keep(probability=0.0).any()


def test_lower_bits_decide_where_the_upper_ones_do_not() -> None:
    """Of the elements whose upper bits are those of the limit, half lie below the middle of that step."""
    count = 1 << 23
    place = Place("w", 0, count)
    low, middle, high = (KeyedDraws().keep(place, 0, p / 2**17, count) for p in (2**16, 2**16 + 1, 2**16 + 2))
    tied = int((high & ~low).sum())
    assert 64 < tied < 192  # 128 on average
    assert 0.3 < int((middle & ~low).sum()) / tied < 0.7
    assert not (low & ~middle).any()


def test_one_probability_and_one_for_each_element_agree_on_lower_bits() -> None:
    count, probability = 1 << 22, 0.5 + 2**-17
    place = Place("w", 3, count + 3)
    each = KeyedDraws().keep(place, 0, torch.full((count,), probability, dtype=torch.float64), count)
    assert torch.equal(each, KeyedDraws().keep(place, 0, probability, count))
