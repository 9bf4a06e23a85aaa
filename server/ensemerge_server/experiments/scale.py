"""One answer whatever the arm: a classifier on the scale of probabilities.

An ensemble answers probabilities, a merged model logits under a name of its own. An experiment has one signature, so
arms that differ are wrapped in this.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ensemerge.ensemble.combiners import OUTPUT, to_probabilities
from ensemerge.errors import EnsemergeError, ExecutionFailed, InvalidModel
from ensemerge.repository import Task
from ensemerge_server.servable import Done, Reply, Request, Servable, Signature, TensorSpec


class Probabilities:
    """A classifier whose only output is `probabilities`, `(batch, classes) float32`. Raises InvalidModel."""

    def __init__(self, inner: Servable, task: Task) -> None:
        spec = next((spec for spec in inner.signature.outputs if spec.name == task.output), None)
        if spec is None or spec.datatype != "FP32":
            raise InvalidModel(f"expected an FP32 output '{task.output}', as its task states; got {spec}")
        self._inner = inner
        self._task = task
        output = TensorSpec(OUTPUT, "FP32", spec.shape)
        self.signature = Signature(inner.signature.inputs, (output,), inner.signature.batched)

    def submit(self, request: Request, done: Done) -> None:
        inner = replace(request, outputs=(self._task.output,))
        self._inner.submit(inner, lambda outcome: done(self._converted(outcome)))

    def _converted(self, outcome: Reply | EnsemergeError) -> Reply | EnsemergeError:
        if isinstance(outcome, EnsemergeError):
            return outcome
        output = outcome.outputs[self._task.output]
        if output.ndim != 2 or output.shape[1] == 0:
            return ExecutionFailed(f"the model answered {list(output.shape)}; expected (batch, classes)")
        return replace(outcome, outputs={OUTPUT: np.asarray(to_probabilities(output, self._task.scale))})
