from collections.abc import Mapping, Sequence

import pytest
import torch

from ensemerge.errors import InvalidModel
from ensemerge.merge.engine import merge_weights
from ensemerge.merge.methods import linear


class InMemory:
    """Weights without a file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def merge(*models: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(merge_weights([InMemory(model) for model in models], [1.0] * len(models), linear))


def test_floats_are_merged_and_equal_integers_copied() -> None:
    merged = merge(
        {"w": torch.tensor([1.0]), "steps": torch.tensor([7])}, {"w": torch.tensor([3.0]), "steps": torch.tensor([7])}
    )
    assert (merged["w"].item(), merged["steps"].item()) == (2.0, 7)


def test_integers_that_differ_are_refused() -> None:
    with pytest.raises(InvalidModel, match="integers 'steps' differ"):
        merge({"steps": torch.tensor([7])}, {"steps": torch.tensor([8])})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name_and_model(bad: float) -> None:
    with pytest.raises(InvalidModel, match="weight 'w' of model 1 holds NaN or infinity"):
        merge({"w": torch.tensor([1.0])}, {"w": torch.tensor([bad])})
