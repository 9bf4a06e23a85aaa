import math

import numpy as np
import pytest

from ensemerge.measures.differences import largest_difference, relative_difference

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("got", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([INF, -INF], [INF, -INF], 0.0),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [1.0, NAN], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_what_is_not_a_number_is_never_overlooked(got: list[float], expected: list[float], difference: float) -> None:
    assert largest_difference(np.array(got), np.array(expected)) == difference


def test_relative_to_the_largest_finite_magnitude() -> None:
    assert relative_difference(np.array([4.1, 0.0]), np.array([4.0, INF])) == INF
    assert relative_difference(np.array([4.1, INF]), np.array([4.0, INF])) == pytest.approx(0.025)
    assert relative_difference(np.array([0.5]), np.array([0.0])) == 0.5
