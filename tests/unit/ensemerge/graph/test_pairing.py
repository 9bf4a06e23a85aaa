import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text, linear_text

from ensemerge.errors import StructureMismatch
from ensemerge.graph.pairing import pair_values, pair_weights, weights_among


def test_weights_pair_by_structure_whatever_they_are_called() -> None:
    first, second = from_text(linear_text(0)), from_text(linear_text(1, prefix="val_"))
    assert pair_weights(first, second) == {"w": "val_w", "b": "val_b"}


def test_another_operator_is_named() -> None:
    other = from_text(linear_text(1).replace("MatMul(x, w)", "Gemm(x, w)"))
    with pytest.raises(StructureMismatch, match="expected MatMul, got the Gemm that makes 'h'"):
        pair_weights(from_text(linear_text(0)), other)


def test_another_depth_is_refused() -> None:
    with pytest.raises(StructureMismatch, match="got 2 and 3 nodes"):
        pair_weights(from_text(linear_text(0)), from_text(linear_text(0, softmax=True)))


def test_another_width_names_the_weight_and_both_shapes() -> None:
    wide = from_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        linear (float[batch, 4] x) => (float[batch, 2] logits)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {0, 0}>
        { h = MatMul(x, w)  logits = Add(h, b) }
        """
    )
    with pytest.raises(StructureMismatch, match=r"weight 'b' is FLOAT \[3\], its counterpart 'b' FLOAT \[2\]"):
        pair_weights(from_text(linear_text(0)), wide)


def test_other_attributes_are_named() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y) { y = Softmax<axis=-1>(x) }
    """
    with pytest.raises(StructureMismatch, match="attributes differ: axis"):
        pair_weights(from_text(text), from_text(text.replace("axis=-1", "axis=0")))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ("y = Sub(b, a)", "the Relu that makes 'a': expected Relu, got the Neg that makes 'b'"),
        ("y = Sub(b, b)", "expected graphs of one architecture, got 3 and 2 nodes"),
        ("y = Sub(a, x)", "expected graphs of one architecture, got 3 and 2 nodes"),
    ],
)
def test_other_wiring_is_refused(other: str, problem: str) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y)
        { a = Relu(x)  b = Neg(x)  y = Sub(a, b) }
    """
    with pytest.raises(StructureMismatch, match=problem):
        pair_weights(from_text(text), from_text(text.replace("y = Sub(a, b)", other)))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ("Sub(c, b)", "'a' meets 'a' here and 'b' elsewhere"),
        ("Sub(c, x)", "'a' is made by Relu, its counterpart 'x' is an input"),
    ],
)
def test_a_value_used_twice_is_used_twice_in_both(other: str, problem: str) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y)
        { a = Relu(x)  b = Relu(x)  c = Sub(a, b)  y = Sub(c, a) }
    """
    with pytest.raises(StructureMismatch, match=problem):
        pair_weights(from_text(text), from_text(text.replace("Sub(c, a)", other)))


BRANCHES = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 4] x) => (float[batch, 4] y)
    <float[4, 4] w1, float[4, 4] w2>
    {{ {nodes}  y = Sub(a, b) }}
"""


def branches(*nodes: str, names: tuple[str, ...] = ("w1", "w2"), seed: int = 0) -> ir.Model:
    """Two products with square weights, subtracted; random weights under `names`."""
    text = BRANCHES.format(nodes="\n".join(nodes))
    held = ", ".join(
        f"float[4, 4] {name} = {{{', '.join(map(str, _values(seed + k)))}}}" for k, name in enumerate(names)
    )
    return from_text(text.replace("float[4, 4] w1, float[4, 4] w2", held))


def _values(seed: int) -> list[float]:
    return [round(float(value), 3) for value in np.random.default_rng(seed).standard_normal(16)]


def test_the_order_of_nodes_does_not_matter() -> None:
    reference = branches("a = MatMul(x, w1)", "b = MatMul(x, w2)")
    other = branches("b = MatMul(x, w2)", "a = MatMul(x, w1)", seed=2)
    assert pair_weights(reference, other) == {"w1": "w1", "w2": "w2"}


def test_what_nobody_uses_needs_no_counterpart() -> None:
    other = branches("a = MatMul(x, w1)", "unused = Neg(x)", "b = MatMul(x, w2)", seed=2)
    assert pair_weights(branches("a = MatMul(x, w1)", "b = MatMul(x, w2)"), other) == {"w1": "w1", "w2": "w2"}


def test_a_weight_that_is_two_in_the_other_graph_says_what_to_do() -> None:
    tied = branches("a = MatMul(x, w)", "b = MatMul(x, w)", names=("w",))
    untied = branches("a = MatMul(x, w1)", "b = MatMul(x, w2)", seed=2)
    with pytest.raises(
        StructureMismatch, match=r"'w' is one weight .* two in the other, 'w1' and 'w2'.* the first one"
    ):
        pair_weights(tied, untied)
    assert pair_weights(untied, tied) == {"w1": "w", "w2": "w"}


def test_a_weight_that_is_there_twice_is_one() -> None:
    tied = branches("a = MatMul(x, w)", "b = MatMul(x, w)", names=("w",))
    twice = branches("a = MatMul(x, w1)", "b = MatMul(x, w2)")
    twice.graph.initializers["w2"].const_value = twice.graph.initializers["w1"].const_value
    assert pair_weights(tied, twice) == {"w": "w1"}


def test_a_deep_graph_is_walked() -> None:
    nodes = "\n".join(f"h{k + 1} = Relu(h{k})" for k in range(3000))
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] h0) => (float[batch, 4] y) <float[4] w = {1, 2, 3, 4}> { %s  y = Mul(h3000, w) }
    """
    assert pair_weights(from_text(text % nodes), from_text(text % nodes)) == {"w": "w"}


def test_a_constant_is_a_weight_where_any_graph_has_other_floats() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y)
        {
            half = Constant<value = float {0.5}>()
            scale = Constant<value = float[4] {%s, 2, 3, 4}>()
            h = Mul(x, half)
            y = Mul(h, scale)
        }
    """
    graphs = [from_text(text % first) for first in "112"]
    pairings = [pair_values(graphs[0], graph) for graph in graphs]
    assert [value.name for value in weights_among(graphs[0], pairings)] == ["scale"]
    assert weights_among(graphs[0], pairings[:2]) == []


def test_truth_values_must_be_equal() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 2] x) => (float[batch, 2] y) <bool[2] mask = {%s}, float zero = {0}>
        { y = Where(mask, x, zero) }
    """
    with pytest.raises(StructureMismatch, match="constants 'mask' and 'mask' differ"):
        pair_weights(from_text(text % "1, 0"), from_text(text % "0, 1"))


def test_constants_must_be_equal() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 2, 2] y) <int64[3] shape = {-1, 2, 2}> { y = Reshape(x, shape) }
    """
    other = ir.from_proto(ir.to_proto(from_text(text)))
    other.graph.initializers["shape"].const_value = ir.tensor([2, -1, 2], dtype=ir.DataType.INT64, name="shape")
    with pytest.raises(StructureMismatch, match="constants 'shape' and 'shape' differ"):
        pair_weights(from_text(text), other)


def test_other_opsets_and_functions_are_refused() -> None:
    with pytest.raises(StructureMismatch, match="expected opsets"):
        pair_weights(from_text(linear_text(0)), from_text(linear_text(0).replace('"" : 20', '"" : 18')))
    text = """
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float[batch, 4] x) => (float[batch, 4] y) { y = own.f(x) }
        <domain: "own", opset_import: ["" : 20]> f (a) => (b) { b = Relu(a) }
    """
    with pytest.raises(StructureMismatch, match="local functions"):
        pair_weights(from_text(text), from_text(text.replace("Relu", "Neg")))


def test_another_number_of_outputs_is_refused() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 1, 4, 4] x) => (float[batch, 1, 2, 2] y)
        { y%s = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(x) }
    """
    with pytest.raises(StructureMismatch, match="expected 1 values, got 2"):
        pair_weights(from_text(text % ""), from_text(text % ", where"))
