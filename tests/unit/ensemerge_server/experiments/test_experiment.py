from collections import Counter
from typing import Any

import numpy as np
import pytest

from ensemerge.errors import EnsemergeError, ExecutionFailed, InvalidSpec
from ensemerge.repository import Spec, Task
from ensemerge_server.experiments.experiment import ArmModel, build_experiment
from ensemerge_server.experiments.spec import ExperimentSpec, parse_experiment
from ensemerge_server.servable import Done, Reply, Request, Servable, Signature, TensorSpec

INPUT = (TensorSpec("x", "FP32", (-1, 4)),)
LOGITS = np.log(np.array([[0.2, 0.3, 0.5]], np.float32))
TASK = Task("classification", "logits", "logits", ("a", "b", "c"))


class Fixed:
    """Answers the same array under a name of its own."""

    def __init__(self, output: str, array: np.ndarray) -> None:
        self.signature = Signature(INPUT, (TensorSpec(output, "FP32", (-1, array.shape[1])),), True)
        self._output = output
        self._array = array
        self.asked: list[Request] = []

    def submit(self, request: Request, done: Done) -> None:
        self.asked.append(request)
        done(Reply({self._output: self._array}, "7"))


class Failing(Fixed):
    def submit(self, request: Request, done: Done) -> None:
        done(ExecutionFailed("no"))


def spec(**body: Any) -> ExperimentSpec:
    whole = {"arms": {"e": {"model": "big"}, "m": {"model": "small"}}, "unit": "user_id", **body}
    return parse_experiment(Spec("digits", "experiment", None, whole, "digits/model.yaml"))


def ask(servable: Servable, request: Request) -> Reply | EnsemergeError:
    outcomes: list[Reply | EnsemergeError] = []
    servable.submit(request, outcomes.append)
    (outcome,) = outcomes
    return outcome


def request(**rest: Any) -> Request:
    return Request(rest.pop("id", ""), {"x": np.zeros((1, 4), np.float32)}, **rest)


def test_a_unit_stays_on_its_arm_and_the_answer_says_which() -> None:
    arms = {"e": ArmModel(Fixed("logits", LOGITS), TASK), "m": ArmModel(Fixed("logits", LOGITS), TASK)}
    experiment, task = build_experiment("digits", spec(), arms)
    assert task == TASK
    seen = set()
    for number in range(50):
        replies = [ask(experiment, request(parameters={"user_id": f"u{number}"})) for _ in range(3)]
        (told,) = {tuple(sorted(reply.parameters.items())) for reply in replies if isinstance(reply, Reply)}
        seen.add(told)
    assert {dict(told)["arm"] for told in seen} == {"e", "m"}
    assert all(dict(told)["experiment"] == "digits" and dict(told)["assignment"] == "unit" for told in seen)


def test_without_a_unit_the_request_decides_and_without_that_chance() -> None:
    arm = ArmModel(Fixed("logits", LOGITS), TASK)
    experiment, _ = build_experiment("digits", spec(), {"e": arm, "m": arm})
    by_id = [ask(experiment, request(id="r-1")) for _ in range(5)]
    assert {(r.parameters["arm"], r.parameters["assignment"]) for r in by_id if isinstance(r, Reply)} == {
        (by_id[0].parameters["arm"], "request")
    }
    by_chance = [ask(experiment, request()) for _ in range(64)]
    counts = Counter(r.parameters["arm"] for r in by_chance if isinstance(r, Reply))
    # All 64 on one arm: once in 9e18 runs.
    assert len(counts) == 2


def test_arms_on_different_scales_answer_probabilities() -> None:
    probabilities = np.array([[0.1, 0.1, 0.8]], np.float32)
    arms = {
        "e": ArmModel(
            Fixed("probabilities", probabilities),
            Task("classification", "probabilities", "probabilities", TASK.classes),
        ),
        "m": ArmModel(Fixed("logits", LOGITS), TASK),
    }
    experiment, task = build_experiment("digits", spec(), arms)
    assert task == Task("classification", "probabilities", "probabilities", ("a", "b", "c"))
    assert experiment.signature.outputs == (TensorSpec("probabilities", "FP32", (-1, 3)),)
    answers = {}
    for number in range(50):
        reply = ask(experiment, request(parameters={"user_id": number}, outputs=("probabilities",)))
        assert isinstance(reply, Reply)
        answers[reply.parameters["arm"]] = reply.outputs["probabilities"]
    assert answers["e"] == pytest.approx(probabilities)
    assert answers["m"] == pytest.approx(np.array([[0.2, 0.3, 0.5]]), abs=1e-6)


def test_an_arm_that_fails_fails_the_request() -> None:
    arm = ArmModel(Failing("logits", LOGITS), TASK)
    experiment, _ = build_experiment("digits", spec(), {"e": arm, "m": arm})
    assert isinstance(ask(experiment, request()), ExecutionFailed)


def test_arms_that_cannot_be_compared_are_refused() -> None:
    first = ArmModel(Fixed("logits", LOGITS), TASK)
    for other, problem in [
        (ArmModel(Fixed("scores", LOGITS), None), "is no classification"),
        (ArmModel(Fixed("z", LOGITS), Task("classification", "z", "logits", ("a", "b"))), "has classes"),
        (ArmModel(Fixed("z", LOGITS[:, :2]), Task("classification", "z", "logits", TASK.classes)), "takes and gives"),
    ]:
        with pytest.raises(InvalidSpec, match=problem):
            build_experiment("digits", spec(), {"e": first, "m": other})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"arms": {"only": {"model": "a"}}}, "at least two arms"),
        ({"arms": {"a": {"model": "a", "weight": 0}, "b": {"model": "b", "weight": 0}}}, "weights above zero"),
        ({"arms": {"a": {"model": "a", "weight": -1}, "b": {"model": "b"}}}, "weight is -1"),
        ({"arms": {"a": {"model": "a", "wieght": 1}, "b": {"model": "b"}}}, "did you mean 'weight'"),
        ({"arms": {"a b": {"model": "a"}, "b": {"model": "b"}}}, "an arm's name has letters"),
        ({"mode": "spilt"}, "did you mean 'split'"),
        ({"untis": "x"}, "unknown key 'untis'; did you mean 'unit'"),
    ],
)
def test_an_experiment_that_is_not_understood_says_where(body: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        spec(**body)
