from support.graphs import from_text, linear_text

from ensemerge.graph.tasks import infer_task
from ensemerge.repository import Task


def test_rows_of_floats_are_classes_on_the_scale_of_logits() -> None:
    assert infer_task(from_text(linear_text())) == Task("classification", "logits", "logits", ("0", "1", "2"))


def test_a_softmax_at_the_end_makes_them_probabilities() -> None:
    task = infer_task(from_text(linear_text(softmax=True)))
    assert task is not None
    assert task.scale == "probabilities"


def test_what_the_graph_does_not_tell_stays_open() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g ({}) => ({}) {{ y = Identity(x) }}'
    for tensor in ("float[batch, 1]", "float[batch, 2, 2]", "int64[batch, 3]", "float[batch, n]"):
        assert infer_task(from_text(text.format(f"{tensor} x", f"{tensor} y"))) is None
