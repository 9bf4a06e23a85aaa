import numpy as np
import pytest
from scipy.special import softmax

from ensemerge.ensemble.combiners import COMBINERS, combine, mean_probability

LOGITS = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)


def test_mean_probability_is_the_mean_and_sums_to_one() -> None:
    members = softmax(LOGITS, axis=-1)
    pooled = mean_probability(members)
    assert pooled == pytest.approx(members.mean(axis=0))
    assert pooled.sum(axis=-1) == pytest.approx(np.ones(5))


def test_members_may_answer_on_different_scales() -> None:
    outputs = [LOGITS[0], softmax(LOGITS[1], axis=-1), LOGITS[2]]
    pooled = combine(outputs, ["logits", "probabilities", "logits"], COMBINERS["mean_probability"])
    assert pooled == pytest.approx(softmax(LOGITS, axis=-1).mean(axis=0), abs=1e-6)


def test_a_member_alone_is_its_own_ensemble() -> None:
    assert np.array_equal(mean_probability(LOGITS[:1]), LOGITS[0])
