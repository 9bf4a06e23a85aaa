import numpy as np
import pytest
from support.graphs import from_text, linear_text

from ensemerge.errors import InvalidModel, StructureMismatch
from ensemerge.graph.run import Runner
from ensemerge.graph.surgery import prefixed, up_to, with_weights

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def test_replaced_weights_compute_and_the_original_stays() -> None:
    model = from_text(linear_text())
    before = Runner(model).run({"x": X})["logits"]
    zeros = with_weights(model, {"w": np.zeros((4, 3), np.float32), "b": np.ones(3, np.float32)})
    assert Runner(zeros).run({"x": X})["logits"] == pytest.approx(np.ones((5, 3)))
    assert np.array_equal(Runner(model).run({"x": X})["logits"], before)


def test_a_weight_of_another_shape_or_dtype_is_refused() -> None:
    model = from_text(linear_text())
    for wrong in (np.zeros((3, 4), np.float32), np.zeros((4, 3), np.float64)):
        with pytest.raises(StructureMismatch, match="weight 'w': expected FLOAT"):
            with_weights(model, {"w": wrong})
    with pytest.raises(StructureMismatch, match="no weight 'v'"):
        with_weights(model, {"v": np.zeros(3, np.float32)})


def test_the_cut_part_computes_the_inner_value() -> None:
    model = from_text(linear_text())
    weights = model.graph.initializers["w"].const_value
    assert weights is not None
    hidden = Runner(up_to(model, ["h"])).run({"x": X})["h"]
    assert hidden == pytest.approx(X @ weights.numpy(), abs=1e-6)
    with pytest.raises(InvalidModel, match="cannot cut the graph"):
        up_to(model, ["nothing"])


def test_a_prefix_reaches_every_name_and_changes_no_figure() -> None:
    model = from_text(linear_text())
    renamed = prefixed(model, "m1/")
    names = [value.name for node in renamed.graph for value in (*node.inputs, *node.outputs) if value is not None]
    assert all(name is not None and name.startswith("m1/") for name in names)
    answer = Runner(renamed).run({"m1/x": X})["m1/logits"]
    assert np.array_equal(answer, Runner(model).run({"x": X})["logits"])
