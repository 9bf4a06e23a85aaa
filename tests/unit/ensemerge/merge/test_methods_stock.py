import math

import numpy as np
import pytest
import torch
from support.merging import merge

from ensemerge.merge.methods.mergekit import MERGEKIT
from ensemerge.merge.methods.spherical import inner_products
from ensemerge.merge.methods.stock import mean_angle, ratio


def test_the_ratio_by_hand() -> None:
    assert ratio(np.array(0.5), 2) == pytest.approx(2 / 3)
    assert ratio(np.array([0.0, 1.0]), 3) == pytest.approx([0, 1])
    # The pole of two models is at −1, of three at −1/2; near it t would be less than −1.
    assert ratio(np.array([-1.0, -0.6]), 2).tolist() == [0, 0]
    assert ratio(np.array([-0.5, -0.9]), 3).tolist() == [0, 0]
    assert ratio(np.array(-0.2), 2) == pytest.approx(-0.5)


def test_angles_are_averaged_and_not_cosines() -> None:
    # Angles 0, 90° and 90°: their mean is 60°, the mean of their cosines 1/3.
    gram = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert mean_angle(gram) == pytest.approx(0.5)
    taus, base = [torch.tensor([1.0, 0]), torch.tensor([1.0, 0]), torch.tensor([0.0, 1])], torch.zeros(2)
    torch.testing.assert_close(merge("model_stock", taus, base), 0.75 * torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(merge("model_stock", taus, base, table=MERGEKIT), 0.6 * torch.tensor([2 / 3, 1 / 3]))


def test_small_updates_have_the_same_angle() -> None:
    taus = [torch.tensor([1e-5, 0]), torch.tensor([1e-5, 1e-5])]
    cosine = math.sqrt(0.5)
    expected = 2 * cosine / (1 + cosine) * torch.tensor([1e-5, 0.5e-5])
    torch.testing.assert_close(merge("model_stock", taus, torch.zeros(2)), expected, atol=0, rtol=1e-5)


def test_a_model_that_is_the_base_is_orthogonal_to_all() -> None:
    base = torch.tensor([1.0, 2.0])
    assert torch.equal(merge("model_stock", [base, base + 1], base), base)


@pytest.mark.parametrize("block", [1, 6, 1 << 17])
@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3), (6,), ()])
def test_filters_have_ratios_of_their_own(shape: tuple[int, ...], block: int) -> None:
    generator = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(shape, generator=generator) for _ in range(4))
    models = [base + (model - base) * 0.1 + 0.3 for model in models]
    merged = merge("model_stock", models, base, filter_wise=True, block_elements=block)
    if len(shape) < 2:
        expected = merge("model_stock", models, base)
    else:
        rows = [merge("model_stock", [m[i] for m in models], base[i]) for i in range(shape[0])]
        expected = torch.stack(rows)
    torch.testing.assert_close(merged, expected)


def test_the_angles_of_very_small_updates_do_not_vanish() -> None:
    rows = [torch.tensor([1e-25, 0]), torch.tensor([1e-25, 1e-25])]
    assert mean_angle(inner_products(rows, (0,))) == pytest.approx(math.sqrt(0.5))
