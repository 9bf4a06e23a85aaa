from pathlib import Path

import numpy as np
import pytest

from ensemerge.repository import Task
from ensemerge_server.catalogue import Deployed
from ensemerge_server.experiments.scale import Probabilities
from ensemerge_server.metrics import Metrics
from ensemerge_server.recording import PredictionIds, Recorder
from ensemerge_server.servable import Done, Reply, Request, Signature, TensorSpec
from ensemerge_server.store.sqlite import SqliteStore
from ensemerge_server.store.writer import StoreWriter

TASK = Task("classification", "y", "logits", ("a", "b"))


class Never:
    signature = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), True)

    def submit(self, request: Request, done: Done) -> None:
        raise NotImplementedError


def test_ids_are_issued_once_by_any_number_of_processes() -> None:
    first, second = PredictionIds(), PredictionIds()
    issued = [ids.next() for ids in (first, second) for _ in range(1000)]
    assert len(set(issued)) == 2000


@pytest.mark.parametrize(
    ("output", "classes"),
    [(np.zeros((3, 2), np.float32), 3), (np.zeros((0, 2), np.float32), 0), (np.zeros((3, 0), np.float32), 0),
     (np.zeros(3, np.float32), 0), (np.array([["a", "b"]], object), 0)],
)  # fmt: skip
def test_only_what_names_a_class_for_each_row_is_kept(tmp_path: Path, output: np.ndarray, classes: int) -> None:
    metrics = Metrics()
    store = SqliteStore(tmp_path / "store.sqlite")
    writer = StoreWriter(store, metrics)
    recorder = Recorder(metrics, writer, PredictionIds())
    deployed = Deployed("m", 1, "onnx", TASK, Probabilities(Never(), TASK))
    told = {"experiment": "x", "arm": "a", "assignment": "unit"}
    recorder.answered(deployed, Request("", {"x": output}), Reply({"y": output}, "1", told), 0.1)
    writer.close()
    reader = SqliteStore(tmp_path / "store.sqlite")
    assert [arm.predictions for arm in reader.arms("x")] == [classes or len(output)]
    reader.close()
