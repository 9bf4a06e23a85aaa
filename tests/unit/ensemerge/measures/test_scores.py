import numpy as np
import pytest

from ensemerge.measures.scores import accuracy, agreement, log_losses, softmax

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.5, 0.0]])
LABELS = np.array([0, 1, 0, 1])


def test_accuracy_counts_the_first_of_equal_classes() -> None:
    assert accuracy(PROBABILITIES, LABELS) == 0.5


def test_log_loss_is_minus_ln_p_and_clipped() -> None:
    losses = log_losses(PROBABILITIES, np.array([0, 1, 0, 2]))
    assert losses[:3] == pytest.approx(-np.log([0.7, 0.8, 0.3]))
    assert losses[3] == pytest.approx(-np.log(1e-6))


def test_softmax_survives_large_logits_and_keeps_its_dtype() -> None:
    values = softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], dtype=np.float32))
    assert values.dtype == np.float32
    assert values == pytest.approx(np.array([[1.0, 0.0], [0.5, 0.5]]))


def test_agreement_is_the_share_of_equal_answers() -> None:
    assert agreement(PROBABILITIES, PROBABILITIES[:, ::-1]) == pytest.approx(0.25)
