import math

import numpy as np
import pytest

from ensemerge.measures.intervals import paired_difference, wilson


def test_wilson_gives_the_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    for successes, trials, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_without_trials_nothing_is_known() -> None:
    interval = wilson(0, 0)
    assert math.isnan(interval.estimate)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shared = generator.random(500)
        first, second = shared < 0.8, shared + generator.normal(0, 0.05, 500) < 0.8
        truth = 0.0
        interval = paired_difference(first, second)
        covered += interval.low <= truth <= interval.high
    # 400 draws of a 95 % interval: 380 expected, deviation 4.4.
    assert 360 <= covered <= 397


def test_pairing_is_narrower_than_two_separate_shares() -> None:
    generator = np.random.default_rng(1)
    first = generator.random(1000) < 0.9
    second = first.copy()
    second[:10] = ~second[:10]
    paired = paired_difference(first, second)
    assert paired.high - paired.low < 0.5 * 2 * (wilson(int(first.sum()), 1000).high - first.mean())
