"""Operators in odd places: whatever a rule calls free may move, and the network does not change."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ensemerge.align.proof import prove_symmetry
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.run import Arrays
from ensemerge.graph.symmetry import Symmetry
from ensemerge.graph.trace import inputs_that_run

Weights = Mapping[str, tuple[int, ...] | np.ndarray]
AXIS_0, AXIS_1, AXIS_2 = (np.array([axis]) for axis in range(3))


def graph(inputs: str, outputs: str, weights: Weights, body: str, opset: int = 20) -> ir.Model:
    """A network from ONNX's textual form; shapes become random weights."""
    generator = np.random.default_rng(0)
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> net ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, given in weights.items():
        array = generator.standard_normal(given).astype(np.float32) if isinstance(given, tuple) else given
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def free_sizes(symmetry: Symmetry) -> list[tuple[int, ...]]:
    """Each free space's size after the sizes of those it lies within."""
    return sorted((*(symmetry.spaces[outer].size for outer in s.within), s.size) for s in symmetry.free)


def proved(model: ir.Model, feeds: Arrays | None = None, traced: Arrays | None = None) -> list[tuple[int, ...]]:
    """What is free in a network, once it is proved that all of it may move."""
    symmetry = derive_symmetry(model, traced)
    for seed in range(3):
        prove_symmetry(model, symmetry, [feeds or inputs_that_run(model)], seed)
    return free_sizes(symmetry)


Case = tuple[str, Weights, list[tuple[int, ...]]]

# Between two matrices: `h` and `z` are `(batch, 4)`.
STEPS: dict[str, Case] = {
    "a mask of truth values": (
        "z = Where(m, h, zero)",
        {"m": np.array([1, 0, 0, 1], bool), "zero": np.array(0, np.float32)},
        [],
    ),
    "whole numbers as factors": ("f = Cast<to=1>(m) z = Mul(h, f)", {"m": np.arange(4)}, []),
    "whole numbers as a matrix": (
        "i = Cast<to=6>(h) j = MatMul(i, m) z = Cast<to=1>(j)",
        {"m": np.arange(16, dtype=np.int32).reshape(4, 4)},
        [],
    ),
    "whole numbers as divisors": (
        "i = Cast<to=7>(h) j = Mod(i, m) f = Cast<to=1>(j) z = Add(h, f)",
        {"m": np.array([2, 3, 4, 5])},
        [],
    ),
    "columns in a given order": ("z = Gather<axis=1>(h, m)", {"m": np.array([3, 1, 0, 2])}, []),
    "one column": ("p = Gather<axis=-1>(h, m) z = Mul(h, p)", {"m": np.array([-2])}, [(2,)]),
    "the last two columns": (
        "p = Slice(h, start, end, axis) z = Concat<axis=-1>(p, p)",
        {"start": np.array([-2]), "end": np.array([99]), "axis": np.array([-1])},
        [(2,), (2,)],
    ),
    "halves exchanged": ("p, q = Split<axis=-1, num_outputs=2>(h) r = Concat<axis=-1>(q, p) z = Add(r, h)", {}, [(2,)]),
    "padded and cut": ("z = Pad(h, pads)", {"pads": np.array([0, 1, 0, -1])}, []),
    "padded and cut along named axes": (
        "z = Pad(h, pads, zero, axes)",
        {"pads": np.array([1, -1]), "zero": np.array(0, np.float32), "axes": np.array([-1])},
        [],
    ),
    "padded by reflection": ('z = Pad<mode="reflect">(h, pads)', {"pads": np.array([0, 1, 0, -1])}, []),
    "padded along named axes": (
        "p = Pad(h, pads, zero, axes) z = MatMul(p, w)",
        {"pads": np.array([2, 1]), "zero": np.array(0, np.float32), "axes": np.array([1]), "w": (7, 4)},
        [(2,), (4,), (4,)],
    ),
    "repeated": ("t = Tile(h, times) z = MatMul(t, w)", {"times": np.array([1, 2]), "w": (8, 4)}, [(4,), (4,), (4, 2)]),
    "a random mask that is looked at": ("d, m = Dropout(h) f = Cast<to=1>(m) z = Add(d, f)", {}, []),
    "a diagonal": ('d = Einsum<equation="ii->i">(w) z = Mul(h, d)', {"w": (4, 4)}, [(4,)]),
    "a flattened weight": (
        "f = Flatten<axis=0>(w) v = Reshape(f, shape) r = MatMul(h, v) z = Add(r, h)",
        {"w": (4, 4), "shape": np.array([4, 4])},
        [(4,)],
    ),
    "an empty part": (
        "e = Slice(h, zero, zero, one) r = Reshape<allowzero=1>(e, shape) s = Concat<axis=1>(r, r) z = Relu(h)",
        {"zero": AXIS_0, "one": AXIS_1, "shape": np.array([0, 2])},
        [(4,)],
    ),
    "a sequence": (
        "q = SplitToSequence<axis=1>(h, one) s = Identity(q) z = ConcatFromSequence<axis=1>(s)",
        {"one": np.array(1)},
        [],
    ),
}


def between(step: str, weights: Weights, opset: int = 20) -> ir.Model:
    body = f"h = MatMul(x, a) {step} y = MatMul(z, c)"
    return graph("float[batch, 3] x", "float[batch, 2] y", {"a": (3, 4), "c": (4, 2), **weights}, body, opset)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_between_two_matrices(name: str) -> None:
    step, weights, expected = STEPS[name]
    assert proved(between(step, weights)) == expected


@pytest.mark.parametrize(
    ("step", "weights", "opset", "expected"),
    [
        ("p = Slice<axes=[1], starts=[0], ends=[2]>(h) z = Concat<axis=1>(p, p)", {}, 9, [(2,), (2,)]),
        ("p, q = Split<axis=1, split=[1, 3]>(h) z = Concat<axis=1>(q, p)", {}, 11, [(3,)]),
        ("p = Pad<pads=[0, 0, 0, 1]>(h) z = MatMul(p, w)", {"w": (5, 4)}, 10, [(4,), (4,)]),
        ("z = Pad<pads=[0, 1, 0, -1]>(h)", {}, 10, []),
    ],
)
def test_operators_of_older_opsets(step: str, weights: Weights, opset: int, expected: list[tuple[int, ...]]) -> None:
    assert proved(between(step, weights, opset)) == expected


# Between a matrix of its own for each of five tokens and another: `h` and `z` are `(batch, 5, 4)`. As long as tokens
# do not go into one another, the units may have an order of their own for each of them.
TOKENS: dict[str, Case] = {
    "nothing": ("z = Relu(h)", {}, [(5, 4)]),
    "sums so far": ("z = CumSum(h, axis)", {"axis": np.array(1)}, [(4,)]),
    "a matrix on tokens, and a shortcut": ("m = MatMul(w, h) z = Add(h, m)", {"w": (5, 5)}, [(4,)]),
    "the same from the other side": (
        "t = Transpose<perm=[0, 2, 1]>(h) m = MatMul(t, w) n = Transpose<perm=[0, 2, 1]>(m) z = Add(h, n)",
        {"w": (5, 5)},
        [(4,)],
    ),
    "the same as a sum over letters": (
        'm = Einsum<equation="ts,bsu->btu">(w, h) z = Add(h, m)',
        {"w": (5, 5)},
        [(4,)],
    ),
    "products of all tokens": (
        "t = Transpose<perm=[0, 2, 1]>(h) g = MatMul(h, t) m = MatMul(g, h) z = Add(h, m)",
        {},
        [(4,)],
    ),
    "pairs of tokens": (
        "p = Unsqueeze(h, one) q = Unsqueeze(h, two) m = Mul(p, q) z = ReduceSum<keepdims=0>(m, one)",
        {"one": AXIS_1, "two": AXIS_2},
        [(4,)],
    ),
    "tokens in another order, and a shortcut": (
        "m = Gather<axis=1>(h, order) z = Add(h, m)",
        {"order": np.array([1, 2, 3, 4, 0])},
        [(4,)],
    ),
    "tokens moved by one, and a shortcut": (
        "m = Pad(h, pads) z = Add(h, m)",
        {"pads": np.array([0, 1, 0, 0, -1, 0])},
        [(4,)],
    ),
    "neighbouring channels": (
        "t = Unsqueeze(h, three) n = LRN<size=3, alpha=0.5>(t) z = Squeeze(n, three)",
        {"three": np.array([3])},
        [(4,)],
    ),
    "the largest of neighbours, and a shortcut": (
        "t = Transpose<perm=[0, 2, 1]>(h) m = MaxPool<kernel_shape=[3], pads=[1, 1]>(t) "
        "n = Transpose<perm=[0, 2, 1]>(m) z = Add(h, n)",
        {},
        [(4,)],
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_units_have_an_order_for_each_token_where_tokens_do_not_mix(name: str) -> None:
    step, weights, expected = TOKENS[name]
    body = f'h = Einsum<equation="btf,tfu->btu">(x, first) {step} y = Einsum<equation="btu,tuk->btk">(z, last)'
    own: Weights = {"first": (5, 3, 4), "last": (5, 4, 2), **weights}
    assert proved(graph("float[batch, 5, 3] x", "float[batch, 5, 2] y", own, body)) == expected


# Between two matrices, in three groups of four: `h` and `z` are `(batch, 3, 4)`.
GROUPS: dict[str, Case] = {
    "a matrix on groups, and a shortcut": ("m = MatMul(w, h) z = Add(h, m)", {"w": (3, 3)}, [(3,), (4,)]),
    "products of groups": ('g = Einsum<equation="bau,bcu->bac">(h, h) z = MatMul(g, h)', {}, [(3,), (4,)]),
    "normalised by themselves": (
        "z = InstanceNormalization(h, scale, bias)",
        {"scale": (3,), "bias": (3,)},
        [(3,), (3, 4)],
    ),
    "pairs of units of two groups": (
        "n = InstanceNormalization(h, scale, bias) "
        'p = Einsum<equation="bau,bcv->baucv">(n, n) q = Mul(p, w) z = ReduceSum<keepdims=0>(q, axes)',
        {"scale": (3,), "bias": (3,), "w": (3, 4, 3, 4), "axes": np.array([1, 2])},
        [(3,), (4,)],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_units_have_an_order_for_each_group_where_it_is_clear_which(name: str) -> None:
    step, weights, expected = GROUPS[name]
    own: Weights = {"a": (3, 12), "c": (12, 2), "split": np.array([0, 3, 4]), "flat": np.array([0, 12]), **weights}
    body = f"l = MatMul(x, a) h = Reshape(l, split) {step} f = Reshape(z, flat) y = MatMul(f, c)"
    assert proved(graph("float[batch, 3] x", "float[batch, 2] y", own, body)) == expected


def test_a_group_whose_other_axis_is_cut_is_no_group() -> None:
    """Pairs of units `(12, 12)`, the second axis taken apart to `(3, 4)` and the 4 rotated."""
    weights: Weights = {
        "a": (3, 12),
        "c": (144, 2),
        "one": AXIS_1,
        "two": AXIS_2,
        "three": np.array([3]),
        "zero": AXIS_0,
        "four": np.array([4]),
        "split": np.array([0, 12, 3, 4]),
        "flat": np.array([0, 144]),
    }
    body = (
        "l = MatMul(x, a) h = Tanh(l) p = Unsqueeze(h, one) q = Unsqueeze(h, two) m = Mul(p, q) r = Reshape(m, split) "
        "s = Slice(r, zero, one, three) t = Slice(r, one, four, three) u = Concat<axis=3>(t, s) "
        "f = Reshape(u, flat) y = MatMul(f, c)"
    )
    assert proved(graph("float[batch, 3] x", "float[batch, 2] y", weights, body)) == [(3,)]


IMAGES: dict[str, Case] = {
    "channels padded with zeros on a shortcut": (
        "h = Conv(x, a) p = Pad(h, pads) q = Conv(h, w) z = Add(p, q)",
        {"a": (4, 4, 3, 3), "w": (6, 4, 1, 1), "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0])},
        [(4,)],
    ),
    "places of the largest": (
        "h = Conv(x, a) m, i = MaxPool<kernel_shape=[2, 2]>(h) f = Cast<to=1>(i) z = Mul(f, w)",
        {"a": (6, 4, 3, 3), "w": (6, 1, 1)},
        [],
    ),
    "a scale that is a bias as well": (
        'h = Conv(x, a, size) r = Resize<mode="nearest">(h, , size) z = Conv(r, w)',
        {"a": (4, 4, 3, 3), "w": (6, 4, 1, 1), "size": np.array([1, 1, 2, 3], np.float32)},
        [(6,)],
    ),
    "groups in two sizes": (
        "h = Conv<group=2>(x, a) z = Conv<group=3>(h, w)",
        {"a": (6, 2, 3, 3), "w": (6, 2, 1, 1)},
        [(3, 2)],
    ),
    "groups, and a shortcut": (
        "h = Conv(x, a) m = ConvTranspose<group=2>(h, w) n = Add(h, m) z = Conv<group=2>(n, v)",
        {"a": (6, 4, 3, 3), "w": (6, 3, 1, 1), "v": (6, 3, 1, 1)},
        [(2,), (2, 3), (2, 3)],
    ),
    "groups of which a half is exchanged": (
        "h = Conv(x, a) p, q = Split<axis=1, num_outputs=2>(h) r = Concat<axis=1>(q, p) m = Conv<group=4>(r, w) "
        "n = Add(r, m) z = Conv(n, v)",
        {"a": (8, 4, 3, 3), "w": (8, 2, 1, 1), "v": (6, 8, 1, 1)},
        [(2,), (2,), (2,), (6,)],
    ),
    "channels of places": (
        "h = Conv(x, a) s = SpaceToDepth<blocksize=2>(h) z = Conv(s, w)",
        {"a": (3, 4, 3, 3), "w": (6, 12, 1, 1)},
        [(3,), (6,)],
    ),
    "a kernel that is computed": (
        "w = ReduceL2<keepdims=1>(a, axes) k = Div(a, w) z = Conv(x, k)",
        {"a": (6, 4, 3, 3), "axes": np.array([1, 2, 3])},
        [(6,)],
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    step, weights, expected = IMAGES[name]
    body = f"{step} m1 = ReduceMean<keepdims=0>(z, places) y = MatMul(m1, c)"
    own: Weights = {"c": (6, 2), "places": np.array([2, 3]), **weights}
    assert proved(graph("float[batch, 4, 8, 8] x", "float[batch, 2] y", own, body)) == expected


ATTENTION: dict[str, Case] = {
    "a mask for each head": ("o = Attention<H>(q, k, v, m)", {"m": (3, 5, 5)}, [(3,), (3, 4), (3, 4)]),
    "truth values for each head": (
        "o = Attention<H>(q, k, v, m)",
        {"m": np.random.default_rng(0).random((1, 3, 5, 5)) > 0.3},
        [(3, 4), (3, 4)],
    ),
    "keys and values of earlier tokens": (
        "o, pk, pv = Attention<H>(q, k, v, , ck, cv)",
        {"ck": (2, 3, 2, 4), "cv": (2, 3, 2, 4)},
        [(3,), (3, 2), (3, 4), (3, 4)],
    ),
    "values of each token": (
        'w = Einsum<equation="btf,tfu->btu">(x, own) n = Attention<H>(q, k, w) o = Add(n, w)',
        {"own": (5, 6, 12)},
        [(3,), (3, 4), (3, 4), (12,)],
    ),
    "tokens mixed before": (
        "t = MatMul(w, q) u = MatMul(w, k) r = MatMul(w, v) o = Attention<H>(t, u, r, m)",
        {"w": (5, 5), "m": (5, 5)},
        [(3,), (3, 4), (3, 4), (5,)],
    ),
    "tokens mixed before, each sees those before it": (
        "t = MatMul(w, q) u = MatMul(w, k) r = MatMul(w, v) o = Attention<is_causal=1, H>(t, u, r)",
        {"w": (5, 5)},
        [(3,), (3, 4), (3, 4)],
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    step, weights, expected = ATTENTION[name]
    own: Weights = {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "c": (12, 2), "axis": AXIS_1, **weights}
    body = (
        "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
        f"{step.replace('H', 'q_num_heads=3, kv_num_heads=3')} s = ReduceSum<keepdims=0>(o, axis) y = MatMul(s, c)"
    )
    assert proved(graph("float[2, 5, 6] x", "float[2, 2] y", own, body, opset=23)) == expected


def test_caches_that_are_given_and_answered_keep_all_units_in_place() -> None:
    weights: Weights = {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "c": (12, 2)}
    body = (
        "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
        "o, nk, nv = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v, , ck, cv) y = MatMul(o, c)"
    )
    cache = "float[batch, 3, 2, 4]"
    model = graph(f"float[batch, 5, 6] x, {cache} ck, {cache} cv", "float[batch, 5, 2] y", weights, body, opset=23)
    assert proved(model) == []


RECURRENT: dict[str, Case] = {
    "states and peepholes": (
        "r = LSTM<hidden_size=4>(x, w, v, b, , h, c0, p) z = Squeeze(r, one)",
        {"w": (1, 16, 3), "v": (1, 16, 4), "b": (1, 32), "h": (1, 2, 4), "c0": (1, 2, 4), "p": (1, 12)},
        [(4,)],
    ),
    "directions exchanged, and a shortcut": (
        'r = GRU<hidden_size=4, direction="bidirectional">(x, w, v, b) s = Gather<axis=1>(r, turned) t = Add(r, s) '
        "u = Transpose<perm=[0, 2, 1, 3]>(t) f = Reshape(u, flat) z = MatMul(f, m)",
        {
            "w": (2, 12, 3),
            "v": (2, 12, 4),
            "b": (2, 24),
            "turned": np.array([1, 0]),
            "flat": np.array([0, 0, 8]),
            "m": (8, 4),
        },
        [(4,), (4,)],
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    step, weights, expected = RECURRENT[name]
    own: Weights = {"c": (4, 2), "one": AXIS_1, **weights}
    model = graph("float[time, 2, 3] x", "float[time, 2, 2] y", own, f"{step} y = MatMul(z, c)")
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)}
    assert proved(model, feeds, feeds) == expected


# `h` is `(batch, tokens, 4)` and meets a part of a table of 16 positions, which is longer for more tokens.
LENGTHS = ["p = Slice(table, zero, n, zero)", "p = Gather<axis=0>(table, n)"]


@pytest.mark.parametrize("part", LENGTHS)
def test_rows_that_only_longer_inputs_read_stay_in_place(part: str) -> None:
    weights: Weights = {"a": (3, 4), "c": (4, 2), "table": (16, 4), "zero": AXIS_0, "one": AXIS_1}
    body = f"h = MatMul(x, a) s = Shape(x) n = Gather<axis=0>(s, one) {part} z = Add(h, p) y = MatMul(z, c)"
    model = graph("float[batch, tokens, 3] x", "float[batch, tokens, 2] y", weights, body)
    longer = {"x": np.random.default_rng(0).standard_normal((2, 12, 3)).astype(np.float32)}
    assert proved(model, longer) == [(4,)]


def test_a_part_that_is_computed_from_the_units_themselves_is_a_part() -> None:
    """Exporters write half of the channels as `shape(h)[1] / 2`."""
    weights: Weights = {"a": (3, 4), "c": (2, 2), "zero": AXIS_0, "one": AXIS_1, "two": AXIS_2}
    body = (
        "h = MatMul(x, a) s = Shape(h) n = Gather<axis=0>(s, one) e = Div(n, two) z = Slice(h, zero, e, one) "
        "y = MatMul(z, c)"
    )
    assert proved(graph("float[batch, 3] x", "float[batch, 2] y", weights, body)) == [(2,), (2,)]


def test_a_part_that_the_input_chooses_stays_in_place() -> None:
    weights: Weights = {"a": (3, 4), "c": (2, 2), "one": AXIS_1, "two": AXIS_2}
    body = "h = MatMul(x, a) e = Add(n, two) z = Slice(h, n, e, one) y = MatMul(z, c)"
    model = graph("float[batch, 3] x, int64[1] n", "float[batch, 2] y", weights, body)
    traced, other = ({"x": np.ones((1, 3), np.float32), "n": np.array([at])} for at in (1, 0))
    assert proved(model, other, traced) == []


def test_statistics_that_are_answered_keep_channels_in_place() -> None:
    weights: Weights = {"a": (6, 4, 3, 3), "w": (6,), "one": np.ones(6, np.float32), "c": (6, 2)}
    body = (
        "h = Conv(x, a) b, mean, deviation = BatchNormalization<training_mode=1>(h, w, w, w, one) "
        "p = GlobalAveragePool(b) f = Flatten(p) y = MatMul(f, c)"
    )
    assert proved(graph("float[batch, 4, 8, 8] x", "float[batch, 2] y, float[6] mean", weights, body)) == []


def test_what_a_branch_within_a_branch_reads_stays_in_place() -> None:
    body = """
        h = MatMul(x, a) b = Add(h, bias)
        r = If(yes) <
            then_branch = outer () => (float o) {
                o = If(yes) <
                    then_branch = inner () => (float p) { i = Constant<value_int = 2>() p = Gather<axis=0>(bias, i) },
                    else_branch = other () => (float q) { q = Constant<value_float = 1.0>() }
                >
            },
            else_branch = none () => (float s) { s = Constant<value_float = 2.0>() }
        >
        z = Add(b, r) y = MatMul(z, c)
    """
    weights: Weights = {"a": (3, 4), "c": (4, 2), "bias": (4,), "yes": np.array(True)}
    assert proved(graph("float[batch, 3] x", "float[batch, 2] y", weights, body)) == []
