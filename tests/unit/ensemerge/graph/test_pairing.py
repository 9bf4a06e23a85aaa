import onnx_ir as ir
import pytest
from support.graphs import from_text, linear_text

from ensemerge.errors import StructureMismatch
from ensemerge.graph.pairing import pair_weights


def test_weights_pair_by_structure_whatever_they_are_called() -> None:
    first, second = from_text(linear_text(0)), from_text(linear_text(1, prefix="val_"))
    assert pair_weights(first, second) == {"w": "val_w", "b": "val_b"}


def test_another_operator_is_named() -> None:
    other = from_text(linear_text(1).replace("MatMul(x, w)", "Gemm(x, w)"))
    with pytest.raises(StructureMismatch, match="expected MatMul, got Gemm"):
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
    with pytest.raises(StructureMismatch, match=r"weight 'w' is FLOAT \[4, 3\], its counterpart 'w' FLOAT \[4, 2\]"):
        pair_weights(from_text(linear_text(0)), wide)


def test_other_attributes_are_named() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y) { y = Softmax<axis=-1>(x) }
    """
    with pytest.raises(StructureMismatch, match="attributes differ: axis"):
        pair_weights(from_text(text), from_text(text.replace("axis=-1", "axis=0")))


def test_other_wiring_is_refused() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4] x) => (float[batch, 4] y)
        { a = Relu(x)  b = Neg(x)  y = Sub(a, b) }
    """
    with pytest.raises(StructureMismatch, match="meets 'b' here and 'a' elsewhere"):
        pair_weights(from_text(text), from_text(text.replace("Sub(a, b)", "Sub(b, a)")))


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
