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


def test_nan_is_refused_by_name_and_model() -> None:
    with pytest.raises(InvalidModel, match="weight 'w' of model 1 holds NaN"):
        merge({"w": torch.tensor([1.0])}, {"w": torch.tensor([float("nan")])})


def test_masks_with_infinities_are_copied_where_equal_and_refused_elsewhere() -> None:
    mask = torch.tensor([0.0, float("-inf")])
    assert torch.equal(merge({"mask": mask}, {"mask": mask.clone()})["mask"], mask)
    with pytest.raises(InvalidModel, match="merging 'mask' gives values that are not finite"):
        merge({"mask": mask}, {"mask": torch.zeros(2)})


def test_a_result_beyond_the_dtype_is_refused() -> None:
    large = torch.tensor([60000.0], dtype=torch.float16)
    readers = [InMemory({"w": large}), InMemory({"w": -large})]
    with pytest.raises(InvalidModel, match=r"not finite.*float16"):
        dict(merge_weights(readers, [3.0, -2.0], linear))
