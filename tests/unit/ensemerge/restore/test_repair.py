"""REPAIR on graphs written as text: moments before and after, and what the layers look like."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import from_text, linear_text

from ensemerge.errors import InvalidData, InvalidModel, StructureMismatch
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import with_weights
from ensemerge.restore.choose import restore
from ensemerge.restore.moments import Moments, gap, measure
from ensemerge.restore.repair import repair

FEATURES, HIDDEN = 8, 32
FEEDS = {"x": np.random.default_rng(9).standard_normal((300, FEATURES)).astype(np.float32)}


def mlp_text(prefix: str = "", dtype: str = "float") -> str:
    """Two hidden layers, one written as Gemm, one as MatMul and Add, and a head without bias. Names have a prefix."""
    body = """
        <ir_version: 10, opset_import: ["" : 20]>
        mlp (dtype[batch, 8] .x) => (dtype[batch, 3] .logits)
        <dtype[32, 8] .w1, dtype[32] .b1, dtype[32, 32] .w2, dtype[1, 32] .b2, dtype[32, 3] .w3>
        {
            .h1 = Gemm<transB=1>(.x, .w1, .b1)
            .r1 = Relu(.h1)
            .m2 = MatMul(.r1, .w2)
            .h2 = Add(.b2, .m2)
            .r2 = Relu(.h2)
            .logits = MatMul(.r2, .w3)
        }
    """
    return body.replace(".", prefix).replace("dtype", dtype)


def weights_of(seed: int, dtype: type[np.floating] = np.float32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {"w1": (HIDDEN, FEATURES), "b1": (HIDDEN,), "w2": (HIDDEN, HIDDEN), "b2": (1, HIDDEN), "w3": (HIDDEN, 3)}
    return {name: (generator.standard_normal(shape) / 3).astype(dtype) for name, shape in shapes.items()}


def filled(text: str, weights: Arrays) -> ir.Model:
    """A graph whose weights are only declared, with these as their values."""
    proto = onnx.parser.parse_model(text)
    declared = [value.name for value in proto.graph.value_info]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(weights[name], name) for name in declared)
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def drawn(text: str, seed: int) -> ir.Model:
    """A graph whose weights are only declared, with random ones."""
    generator = np.random.default_rng(seed)
    declared = onnx.parser.parse_model(text).graph.value_info
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in declared}
    return filled(
        text, {name: np.asarray(generator.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    )


def mlp(seed: int) -> ir.Model:
    return filled(mlp_text(), weights_of(seed))


def mean_of(*networks: Arrays) -> dict[str, np.ndarray]:
    return {name: np.mean([network[name] for network in networks], axis=0) for name in networks[0]}


def averaged_mlp() -> ir.Model:
    return filled(mlp_text(), mean_of(weights_of(0), weights_of(1)))


def moments(model: ir.Model, names: Sequence[str] = ("h1", "h2"), feeds: Arrays = FEEDS) -> dict[str, Moments]:
    return measure(model, dict.fromkeys(names, -1), feeds)


def mean_moments(models: Sequence[ir.Model], name: str) -> Moments:
    found = [moments(model)[name] for model in models]
    deviation = np.mean([one.deviation for one in found], axis=0)
    return Moments(np.mean([one.mean for one in found], axis=0), deviation**2)


def array(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def test_an_averaged_pair_gets_the_mean_moments_of_its_parents() -> None:
    parents, merged = [mlp(0), mlp(1)], averaged_mlp()
    wanted = {name: mean_moments(parents, name) for name in ("h1", "h2")}
    before = moments(merged)
    # The average of two independent networks has lost variance in the second layer, and this is what REPAIR is for.
    assert before["h2"].deviation.mean() < 0.7 * wanted["h2"].deviation.mean()
    repaired = repair(merged, parents, FEEDS)
    after = moments(repaired.model)
    assert max(gap(wanted[name], after[name]) for name in wanted) < 1e-3
    assert (repaired.layers, repaired.dead_channels) == (2, 0)
    assert repaired.check.difference < 1e-5
    # The head writes the output: it is as it was, and the merged model too.
    assert array(repaired.model, "w3") == pytest.approx(array(merged, "w3"), abs=0)
    assert moments(merged)["h2"].deviation == pytest.approx(before["h2"].deviation, abs=0)


def test_a_parent_is_its_own_repair() -> None:
    network = mlp(0)
    repaired = repair(network, [network], FEEDS).model
    assert Runner(repaired).run(FEEDS)["logits"] == pytest.approx(Runner(network).run(FEEDS)["logits"], abs=1e-4)


def test_shares_weigh_the_parents() -> None:
    parents, merged = [mlp(0), mlp(1)], averaged_mlp()
    repaired = repair(merged, parents, FEEDS, shares=[3, 1]).model
    first, second = (moments(parent)["h2"] for parent in parents)
    found = moments(repaired)["h2"]
    assert found.deviation == pytest.approx(0.75 * first.deviation + 0.25 * second.deviation, rel=1e-4)
    assert found.mean == pytest.approx(0.75 * first.mean + 0.25 * second.mean, abs=1e-4)


@pytest.mark.parametrize("shares", [[1], [0, 0], [1, -1], [1, np.nan]])
def test_shares_that_do_not_fit_are_refused(shares: list[float]) -> None:
    with pytest.raises(InvalidData, match="shares"):
        repair(averaged_mlp(), [mlp(0), mlp(1)], FEEDS, shares=shares)


def test_no_parents_are_refused() -> None:
    with pytest.raises(InvalidData, match="expected at least one parent"):
        repair(mlp(0), [], FEEDS)


def test_parents_may_have_names_of_their_own() -> None:
    named = {f"other_{name}": array for name, array in weights_of(1).items()}
    parents = [mlp(0), filled(mlp_text("other_"), named)]
    repaired = repair(averaged_mlp(), parents, FEEDS).model
    expected = repair(averaged_mlp(), [mlp(0), mlp(1)], FEEDS).model
    assert Runner(repaired).run(FEEDS)["logits"] == pytest.approx(Runner(expected).run(FEEDS)["logits"], abs=1e-6)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(StructureMismatch):
        repair(mlp(0), [from_text(linear_text())], FEEDS)


def test_waves_are_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    repair(mlp(0), [mlp(0)], FEEDS, lambda *told: seen.append(told))
    assert seen == [("repair", 1, 2), ("repair", 2, 2)]


FIRST_LAYERS = {
    "a product without bias": "MatMul(x, w)",
    "a Gemm without bias": "Gemm(x, w)",
    "a Gemm with factors": "Gemm<alpha=0.5, beta=3.0>(x, w, b)",
    "one number as bias": "Gemm(x, w, one)",
    "a bias in a Constant node": "Gemm(x, w, fixed)",
}


@pytest.mark.parametrize("first", FIRST_LAYERS.values(), ids=FIRST_LAYERS)
def test_every_form_of_a_layer_can_be_repaired(first: str) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 8] x) => (float[batch, 5] y)
        <float[8, 5] w, float[5] b, float one>
        {{ fixed = Constant<value = float[5] {{1, 2, 3, 4, 5}}>() h = {first} y = Tanh(h) }}
    """
    merged, parent = drawn(text, 3), drawn(text, 4)
    repaired = repair(merged, [parent], FEEDS)
    assert gap(moments(parent, ["h"])["h"], moments(repaired.model, ["h"])["h"]) < 1e-5
    onnx.checker.check_model(ir.to_proto(repaired.model), full_check=True)


CONVOLUTIONS = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[batch, 4, 6, 6] x) => (float[batch, 4, 6, 6] y)
    <float[4, 1, 3, 3] depthwise, float[4, 2, 1, 1] grouped, float[4] b>
    {
        h1 = Conv<group=4, pads=[1, 1, 1, 1]>(x, depthwise)
        r1 = Relu(h1)
        h2 = Conv<group=2>(r1, grouped, b)
        y = Relu(h2)
    }
"""


def test_grouped_convolutions_are_repaired_by_output_channel() -> None:
    feeds = {"x": np.random.default_rng(4).standard_normal((40, 4, 6, 6)).astype(np.float32)}
    merged, parent = drawn(CONVOLUTIONS, 3), drawn(CONVOLUTIONS, 4)
    repaired = repair(merged, [parent], feeds)
    wanted, found = (measure(model, {"h1": 1, "h2": 1}, feeds) for model in (parent, repaired.model))
    assert max(gap(wanted[name], found[name]) for name in wanted) < 1e-5
    onnx.checker.check_model(ir.to_proto(repaired.model), full_check=True)


def test_products_of_sequences_have_their_channels_last() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 5, 8] x) => (float[batch, 5, 6] y)
        <float[8, 6] w, float[6] b>
        { m = MatMul(x, w) h = Add(m, b) y = Relu(h) }
    """
    feeds = {"x": np.random.default_rng(5).standard_normal((50, 5, 8)).astype(np.float32)}
    merged, parent = drawn(text, 3), drawn(text, 4)
    repaired = repair(merged, [parent], feeds).model
    assert gap(moments(parent, ["h"], feeds)["h"], moments(repaired, ["h"], feeds)["h"]) < 1e-5


@pytest.mark.parametrize("shape", ["5, 5", "5, 1"])
def test_what_differs_by_place_is_no_bias(shape: str) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 5, 8] x) => (float[batch, 5, 5] y)
        <float[8, 5] w, float[{shape}] table>
        {{ h = MatMul(x, w) placed = Add(h, table) y = Relu(placed) }}
    """
    feeds = {"x": np.random.default_rng(5).standard_normal((50, 5, 8)).astype(np.float32)}
    merged, parent = drawn(text, 3), drawn(text, 4)
    repaired = repair(merged, [parent], feeds).model
    assert gap(moments(parent, ["h"], feeds)["h"], moments(repaired, ["h"], feeds)["h"]) < 1e-5
    assert array(repaired, "table") == pytest.approx(array(merged, "table"), abs=0)


SHARED = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[batch, 8] x) => (float[batch, 8] y)
    <float[8, 8] w, float[8] b>
    { h1 = Gemm(x, w, b) r = Relu(h1) h2 = Gemm(r, w, b) y = Relu(h2) }
"""


def test_layers_that_share_weights_get_their_own() -> None:
    merged, parent = drawn(SHARED, 3), drawn(SHARED, 4)
    repaired = repair(merged, [parent], FEEDS)
    wanted, found = moments(parent), moments(repaired.model)
    assert max(gap(wanted[name], found[name]) for name in wanted) < 1e-5
    assert set(repaired.model.graph.initializers) == {"h1.weight", "h1.bias", "w", "b"}  # the last reader keeps them


def changed(name: str, change: Callable[[np.ndarray], None]) -> ir.Model:
    weights = mean_of(weights_of(0), weights_of(1))
    change(weights[name])
    return filled(mlp_text(), weights)


def test_a_dead_channel_is_shifted_and_counted() -> None:
    def kill(weight: np.ndarray) -> None:
        weight[5] = 0

    parents = [mlp(0), mlp(1)]
    repaired = repair(changed("w1", kill), parents, FEEDS)
    found, wanted = moments(repaired.model)["h1"], mean_moments(parents, "h1")
    assert repaired.dead_channels == 1
    assert found.deviation[5] == 0
    assert found.mean == pytest.approx(wanted.mean, abs=1e-5)
    assert np.delete(found.deviation, 5) == pytest.approx(np.delete(wanted.deviation, 5), rel=1e-4)


def test_rounding_is_not_taken_for_variance() -> None:
    # Two copies of a feature with opposite weights: what is left of them in float32 is noise.
    feeds = {"x": np.repeat(FEEDS["x"][:, :4], 2, axis=1) * np.float32(1.1)}

    def cancel(weight: np.ndarray) -> None:
        weight[7, 0::2] = [1 / 3, 1 / 7, 1 / 11, 1 / 13]
        weight[7, 1::2] = -weight[7, 0::2]

    repaired = repair(changed("w1", cancel), [mlp(0), mlp(1)], feeds)
    assert repaired.dead_channels == 1
    assert moments(repaired.model, feeds=feeds)["h1"].deviation[7] < 1e-6


def test_a_channel_that_is_dead_in_the_parents_dies() -> None:
    weights = weights_of(0)
    weights["w1"][3] = 0
    parent = filled(mlp_text(), weights)
    repaired = repair(averaged_mlp(), [parent], FEEDS)
    found = moments(repaired.model)["h1"]
    assert (found.deviation[3], repaired.dead_channels) == (0, 0)
    assert found.mean[3] == pytest.approx(weights["b1"][3], abs=1e-6)


def test_rows_that_are_all_alike_only_shift() -> None:
    feeds = {"x": np.repeat(FEEDS["x"][:1], 10, axis=0)}
    parents = [mlp(0), mlp(1)]
    repaired = repair(averaged_mlp(), parents, feeds)
    assert repaired.dead_channels == 2 * HIDDEN
    wanted = np.mean([moments(parent, feeds=feeds)["h2"].mean for parent in parents], axis=0)
    assert moments(repaired.model, feeds=feeds)["h2"].mean == pytest.approx(wanted, abs=1e-5)


def test_one_row_is_refused() -> None:
    with pytest.raises(InvalidData, match="one calibration row shows no deviation; expected at least 2"):
        repair(mlp(0), [mlp(0)], {"x": FEEDS["x"][:1]})


def test_unusable_data_is_refused() -> None:
    spoilt = FEEDS["x"].copy()
    spoilt[3] = np.nan
    with pytest.raises(InvalidData, match="not finite"):
        repair(mlp(0), [mlp(0)], {"x": spoilt})
    with pytest.raises(InvalidData, match="at least 1"):
        repair(mlp(0), [mlp(0)], {"x": FEEDS["x"][:0]})
    with pytest.raises(InvalidData, match=r"expected arrays for \['x'\]"):
        repair(mlp(0), [mlp(0)], {"z": FEEDS["x"]})


def test_weights_that_are_not_finite_are_refused() -> None:
    def spoil(weight: np.ndarray) -> None:
        weight[0, 0] = np.nan

    with pytest.raises(InvalidData, match="check the data and the weights"):
        repair(changed("w2", spoil), [mlp(0)], FEEDS)


def test_half_precision_is_repaired_within_its_own_bound() -> None:
    first, second = weights_of(0, np.float16), weights_of(1, np.float16)
    text = mlp_text(dtype="float16")
    feeds = {"x": FEEDS["x"].astype(np.float16)}
    repaired = repair(filled(text, mean_of(first, second)), [filled(text, first), filled(text, second)], feeds)
    assert repaired.check.bound == 1e-2
    assert array(repaired.model, "w1").dtype == np.float16


NORMALISED = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[batch, 8] x) => (float[batch, 3] y)
    <float[8, 4] w1, float[4] b1, float[4] scale, float[4] shift, float[4] mean, float[4] var,
     float[4, 3] w2, float[3] b2>
    {
        h1 = Gemm(x, w1, b1)
        n1 = BatchNormalization(h1, scale, shift, mean, var)
        h2 = Gemm(n1, w2, b2)
        f2 = Flatten(h2)
        y = Softmax(f2)
    }
"""


def normalised() -> ir.Model:
    sizes: dict[str, tuple[int, ...]] = {"w1": (8, 4), "w2": (4, 3), "b2": (3,)}
    weights = {name: np.random.default_rng(7).standard_normal(s).astype(np.float32) for name, s in sizes.items()}
    ones = dict.fromkeys(("b1", "scale", "shift", "mean", "var"), np.ones(4, np.float32))
    return filled(NORMALISED, weights | ones)


@pytest.mark.parametrize("model", [normalised(), from_text(linear_text()), from_text(linear_text(softmax=True))])
def test_layers_before_normalisation_a_softmax_or_the_output_are_left_alone(model: ir.Model) -> None:
    with pytest.raises(InvalidModel, match="no layer to repair"):
        repair(model, [model], FEEDS)


def test_restore_estimates_statistics_where_there_are_any() -> None:
    restored = restore(normalised(), [normalised()], FEEDS)
    assert restored.done == "statistics estimated anew (BatchNormalization layers: 1)"
    assert array(restored.model, "mean") == pytest.approx(moments(normalised(), ["h1"])["h1"].mean, abs=1e-5)


def test_restore_repairs_where_there_are_none() -> None:
    parents, merged = [mlp(0), mlp(1)], averaged_mlp()
    restored = restore(merged, parents, FEEDS, shares=[1, 3])
    assert restored.done == "REPAIR (layers: 2, dead channels: 0)"
    assert restored.check.name == "repaired"
    expected = repair(merged, parents, FEEDS, shares=[1, 3]).model
    assert array(restored.model, "w2") == pytest.approx(array(expected, "w2"), abs=0)


def test_unused_layers_do_not_count() -> None:
    model = mlp(0)
    spare = ir.node("MatMul", [model.graph.inputs[0], with_extra_weight(model)])
    model.graph.append(spare)
    assert repair(model, [mlp(0)], FEEDS).layers == 2


def with_extra_weight(model: ir.Model) -> ir.Value:
    value = ir.Value(name="extra", const_value=ir.tensor(np.ones((FEATURES, 2), np.float32), name="extra"))
    model.graph.register_initializer(value)
    return value


def test_a_repaired_network_can_be_repaired_again() -> None:
    parents = [mlp(0), mlp(1)]
    once = repair(averaged_mlp(), parents, FEEDS).model
    spoilt = with_weights(once, {"w1": array(once, "w1") * 2})
    again = repair(spoilt, parents, FEEDS).model
    assert Runner(again).run(FEEDS)["logits"] == pytest.approx(Runner(once).run(FEEDS)["logits"], abs=1e-4)
