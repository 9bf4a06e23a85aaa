import numpy as np
import pytest
from support.graphs import from_text

from ensemerge.graph.run import Runner
from ensemerge.graph.tidy import tidy

CONVOLUTION = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 1, 3, 3] x) => (float[batch, 2, 3, 3] y)
    <float[2, 1, 1, 1] w = {1, 2}, float[2] BIAS = {0, 0}, int64[1] size = {2}>
    {
        zero = ConstantOfShape(size)
        unused = Relu(zero)
        y = Conv(x, w, BIAS)
    }
"""
X = np.random.default_rng(0).standard_normal((2, 1, 3, 3)).astype(np.float32)


@pytest.mark.parametrize(("bias", "left"), [("val_7", 2), ("conv_bias", 3), ("val_conv_bias", 3)])
def test_only_a_bias_that_the_exporter_made_up_is_dropped(bias: str, left: int) -> None:
    model = from_text(CONVOLUTION.replace("BIAS", bias))
    before = Runner(model).run({"x": X})["y"]
    tidy(model)
    (convolution,) = list(model.graph)
    assert (convolution.op_type, len(convolution.inputs)) == ("Conv", left)
    assert np.array_equal(Runner(model).run({"x": X})["y"], before)


def test_traces_are_removed() -> None:
    model = from_text(CONVOLUTION.replace("BIAS", "bias"))
    node = model.graph[-1]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/somebody/net.py"
    model.metadata_props["machine"] = "mine"
    tidy(model)
    assert not model.metadata_props
    assert not model.graph[-1].metadata_props
