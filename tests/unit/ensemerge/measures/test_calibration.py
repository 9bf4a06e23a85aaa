import numpy as np
import pytest

from ensemerge.measures.calibration import reliability


def stream(rows: int, honest: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1.0, rows)
    right = generator.random(rows) < (confidence if honest else confidence - 0.2)
    return np.stack([confidence, 1 - confidence], axis=1), np.where(right, 0, 1)


def test_an_honest_stream_lies_on_the_diagonal() -> None:
    # A calibrated stream of 20,000 rows shows an error below .01 by chance alone.
    assert reliability(*stream(20_000, honest=True)).calibration_error < 0.015


def test_overconfidence_shows_as_its_own_size() -> None:
    assert reliability(*stream(20_000, honest=False)).calibration_error == pytest.approx(0.2, abs=0.015)


def test_bins_have_equal_mass_and_few_rows_make_few_bins() -> None:
    assert set(reliability(*stream(1500, honest=True)).rows) == {100}
    assert reliability(*stream(4, honest=True)).rows.tolist() == [1, 1, 1, 1]
