"""The symmetry of a network as tables, as data and as a picture."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import onnx_ir as ir
import pytest
from rich.console import Console
from support.graphs import from_text
from support.zoo import exported

from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.symmetry import Axis, Space, Symmetry
from ensemerge.report.drawing import BOX_HEIGHT, BOX_WIDTH, draw_symmetry
from ensemerge.report.symmetry import INK, Colour, colours, orders_log10, symmetry_facts, symmetry_tables

SVG = "{http://www.w3.org/2000/svg}"
ONES = ", ".join("1" for _ in range(12))
# Four hidden units, a shortcut around them, a scalar, and a Reshape whose sizes are computed.
RESIDUAL = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[batch, 2] x) => (float[batch, 2] y)
    <float[2, 3] into = {{{ONES[:16]}}}, float[3, 4] up = {{{ONES}}}, float[4] shift = {{1, 2, 3, 4}},
     float[4, 3] down = {{{ONES}}}, float[3, 2] out = {{{ONES[:16]}}}, float half = {{0.5}}>
    {{
        stream = MatMul(x, into)
        hidden = MatMul(stream, up)
        shifted = Add(hidden, shift)
        active = Relu(shifted)
        halved = Mul(active, half)
        back = MatMul(halved, down)
        joined = Add(back, stream)
        sizes = Shape(joined)
        same = Reshape(joined, sizes)
        y = MatMul(same, out)
    }}
"""


def symmetry_of(
    *spaces: Space, weights: dict[str, tuple[Axis, ...]] | None = None, without_rule: dict[str, int] | None = None
) -> Symmetry:
    """One weight for each space, if none are given."""
    given = {space.name: (((space.name,),),) for space in spaces} if weights is None else weights
    return Symmetry({space.name: space for space in spaces}, given, {}, frozenset(), {}, without_rule or {})


def printed(symmetry: Symmetry, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for table in symmetry_tables(symmetry):
            console.print(table)
    return capture.get()


# Tables and data.


def test_a_row_says_how_many_units_move_where_and_within_what() -> None:
    heads, units = Space("q:0*0", 3), Space("q:0*1", 4, ("q:0*0",))
    shown = printed(symmetry_of(heads, units, weights={"q": ((("q:0*0", "q:0*1"),),)}))
    assert re.search(r"1 +3 +q:0\*0 +q:0", shown)
    assert re.search(r"2 +4 +3 of +1 +q:0\*1 +q:0", shown)
    frozen = printed(symmetry_of(Space("w", 2, frozen="it is read"), Space("v", 4, ("w",))))
    assert "2 in place" in frozen


def test_the_weights_of_a_layer_are_taken_together_and_many_layers_are_counted() -> None:
    names = ["conv.weight", "norm.weight", "norm.bias", "norm.mean", "a.w", "b.w", "c.w"]
    weights: dict[str, tuple[Axis, ...]] = dict.fromkeys(names, ((("u",),),))
    shown = printed(symmetry_of(Space("u", 4), weights=weights))
    assert "conv.weight:0, norm.*:0, a.w:0, b.w:0, +1" in shown
    weights["norm.weight"] = ((("u",),), (("u",),))
    assert "norm.*:0, norm.weight:1" in printed(symmetry_of(Space("u", 4), weights=weights))


def test_long_names_can_be_read_to_their_end_on_a_narrow_terminal() -> None:
    name = "encoder.layers.10.self_attention.query_key_value.weight"
    shown = printed(symmetry_of(Space(f"{name}:0", 8), weights={name: (((f"{name}:0",),),)}), width=60)
    assert "…" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 60


def test_axes_that_stay_are_counted_by_reason_the_most_frequent_one_first() -> None:
    kernel, output = Space("k", 3, frozen="it is a place in a kernel"), Space("o", 2, frozen="it is an output")
    single = Space("s", 1, frozen="it is an output")
    weights: dict[str, tuple[Axis, ...]] = {
        "head": ((("o",),), (("s",),)),
        "conv": ((("k",),), (("k",),), (("u",),)),
        "mixed": ((("k",), ("u",)),),  # its units may move in part
    }
    symmetry = symmetry_of(kernel, output, single, Space("u", 4), weights=weights)
    assert symmetry_facts(symmetry)["frozen"] == [
        {"reason": "it is a place in a kernel", "axes": ["conv:0", "conv:1"]},
        {"reason": "it is an output", "axes": ["head:0"]},
    ]
    assert re.search(r"2 +it is a place in a kernel +conv:0", printed(symmetry))


def test_operators_without_a_rule_are_counted() -> None:
    shown = printed(symmetry_of(without_rule={"Hardmax": 1, "Loop": 3}))
    assert re.search(r"3 +Loop *\n +1 +Hardmax", shown)


@pytest.mark.parametrize(
    ("spaces", "expected"),
    [
        ((), "No units may change places"),
        ((Space("u", 1),), "No units may change places"),
        ((Space("u", 2),), "2 orders of units leave the network as it is"),
        ((Space("h", 3), Space("u", 4, ("h",))), "82,944 orders"),  # 3! · 4!³
        ((Space("u", 100),), "10^158 orders"),
    ],
)
def test_the_number_of_orders(spaces: tuple[Space, ...], expected: str) -> None:
    assert expected in printed(symmetry_of(*spaces))


def test_an_inner_space_has_an_order_for_each_outer_unit() -> None:
    symmetry = symmetry_of(Space("h", 3), Space("u", 4, ("h",)))
    assert orders_log10(symmetry) == pytest.approx(math.log10(math.factorial(3) * math.factorial(4) ** 3))


def test_facts_are_json() -> None:
    facts = symmetry_facts(derive_symmetry(from_text(RESIDUAL)))
    assert json.loads(json.dumps(facts)) == facts
    assert [(space["name"], space["size"], space["axes"]) for space in facts["spaces"]] == [
        ("into:1", 3, ["into:1", "up:0", "down:1", "out:0"]),
        ("up:1", 4, ["up:1", "shift:0", "down:0"]),
    ]
    assert {entry["reason"]: entry["axes"] for entry in facts["frozen"]} == {
        "it is an input": ["into:0"],
        "it is an output": ["out:1"],
    }
    assert facts["without_rule"] == {}
    assert facts["orders_log10"] == pytest.approx(math.log10(6 * 24))


def test_names_from_files_are_no_markup_and_send_nothing_to_the_terminal() -> None:
    name = "[/bold][red]w\x1b[2J\n"
    shown = printed(symmetry_of(Space(name, 3), Space("f", 2, frozen="[/x]\x1b[2J"), without_rule={"[/y]": 1}))
    for part in ("[/bold][red]w", "[/x]", "[/y]"):
        assert part in shown
    assert "\x1b[2J" not in shown


# Colours.


def luminance(colour: Colour) -> float:
    """As in the Web Content Accessibility Guidelines."""
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_differ_are_stable_and_dark_letters_are_read_on_them() -> None:
    spaces = [Space(f"s{number}", 2) for number in range(60)]
    found = colours(symmetry_of(*spaces))
    assert list(found) == [space.name for space in spaces]
    assert len(set(found.values())) == 60
    assert colours(symmetry_of(*spaces[:5])) == dict(itertools.islice(found.items(), 5))
    for colour in found.values():
        assert (luminance(colour) + 0.05) / (luminance(INK) + 0.05) >= 7
    for one, other in itertools.combinations(list(found.values())[:16], 2):
        assert math.dist(one, other) > 20


# The picture.


def drawn(model: ir.Model) -> ElementTree.Element:
    return ElementTree.fromstring(draw_symmetry(model, derive_symmetry(model)))


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def boxes(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The boxes by the value that they show, from their titles; of an output's two the last, which is its own."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        box, title = group.find(f"{SVG}rect"), group.findtext(f"{SVG}title")
        if box is not None and title is not None:
            shown = next(line for line in title.splitlines()[1:] if not line.startswith("holds"))
            found[shown.partition(":")[0]] = box
    return found


def edges(root: ElementTree.Element) -> dict[str, tuple[str, ElementTree.Element]]:
    """What is told of each value, and its path."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        path, title = group.find(f"{SVG}path"), group.findtext(f"{SVG}title")
        if path is not None and title is not None:
            found[title.partition(":")[0]] = (title, path)
    return found


def test_boxes_are_what_depends_on_the_inputs_and_tell_weights_or_shapes() -> None:
    root = drawn(from_text(RESIDUAL))
    shown = words(root)
    assert {name: shown.count(name) for name in ("x", "y", "MatMul", "Add", "Relu", "Mul", "Reshape", "Shape")} == {
        **dict.fromkeys(("x", "y", "Relu", "Mul", "Reshape"), 1),
        **{"MatMul": 4, "Add": 2, "Shape": 0},
    }
    assert {"into", "up", "shift", "batch × 2", "2 × 4, as run"} <= set(shown)
    assert not {"half", "sizes"} & set(shown)


def test_boxes_and_edges_have_the_colours_of_what_they_write() -> None:
    model = from_text(RESIDUAL)
    stream, hidden = (f"#{bytes(colour).hex()}" for colour in colours(derive_symmetry(model)).values())
    root = drawn(model)
    fills = {name: box.get("fill") for name, box in boxes(root).items()}
    assert {fills[name] for name in ("stream", "joined", "same")} == {stream}
    assert {fills[name] for name in ("hidden", "active", "halved")} == {hidden}
    assert fills["x"] == fills["y"] not in (stream, hidden)
    strokes = {name: path.get("stroke") for name, (_, path) in edges(root).items()}
    assert strokes["stream"] == strokes["joined"] != strokes["hidden"] == strokes["active"]
    assert edges(root)["hidden"][0].splitlines()[1:] == ["axis 0: 2 in place (it is an input)", "axis 1: 4 of 2, up:1"]


def test_a_legend_names_every_space() -> None:
    shown = words(drawn(from_text(RESIDUAL)))
    assert shown[shown.index("Units that move together") :] == [
        "Units that move together", "1", "3: into:1", "2", "4: up:1", "", "stays in place",
    ]  # fmt: skip


def numbers(path: ElementTree.Element) -> Iterator[list[tuple[float, float]]]:
    """The ends of each piece of a path: M x y C … x y, then V y where it goes on through a lane."""
    for piece in (path.get("d") or "").split("M")[1:]:
        first, _, rest = piece.partition("C")
        curve, _, lane = rest.partition("V")
        spots = [tuple(map(float, first.split())), tuple(map(float, curve.split()[-2:]))]
        yield [(x, y) for x, y in spots] + ([(spots[1][0], float(lane))] if lane.strip() else [])


def test_a_shortcut_is_one_line_beside_the_boxes() -> None:
    root = drawn(from_text(RESIDUAL))
    placed = {name: (float(box.get("x", 0)), float(box.get("y", 0))) for name, box in boxes(root).items()}
    pieces = list(numbers(edges(root)["stream"][1]))
    assert len(pieces) == 7  # five lanes beside the boxes, and both readers
    lanes = {piece[2][0] for piece in pieces if len(piece) == 3}
    assert len(lanes) == 1  # it is upright
    x = lanes.pop()
    for name in ("hidden", "shifted", "active", "halved", "back"):
        assert not placed[name][0] <= x <= placed[name][0] + BOX_WIDTH
    assert len({placed[name][0] for name in ("stream", "hidden", "active", "back", "joined", "y")}) == 1
    ends = {piece[-1] for piece in pieces if len(piece) == 2}
    assert ends == {(placed[name][0] + BOX_WIDTH / 2, placed[name][1]) for name in ("hidden", "joined")}


def test_a_chain_is_upright_whatever_lies_beside_it() -> None:
    root = drawn(
        from_text("""
            <ir_version: 10, opset_import: ["" : 20]>
            net (float[batch, 2] x) => (float[batch, 2] y)
            { a = Relu(x) b = Neg(a) c = Abs(a) d = Exp(c) e = Tanh(d) y = Add(b, e) }
        """)
    )
    placed = {name: box.get("x") for name, box in boxes(root).items()}
    assert placed["c"] == placed["d"] == placed["e"] != placed["b"]


def test_boxes_lie_below_what_they_read_and_do_not_overlap() -> None:
    root = drawn(exported("vit"))
    spots = sorted((float(box.get("y", 0)), float(box.get("x", 0))) for box in boxes(root).values())
    for (y, x), (other_y, other_x) in itertools.pairwise(spots):
        assert (y == other_y and x + BOX_WIDTH < other_x) or y + BOX_HEIGHT < other_y
    for _, path in edges(root).values():
        assert all(start[1] < end[1] for piece in numbers(path) for start, end in itertools.pairwise(piece))


def test_a_transformer_has_boxes_with_several_colours_and_refers_to_nothing_outside() -> None:
    model = exported("vit")
    root = drawn(model)
    shown = words(root)
    for operator in ("MatMul", "Softmax", "LayerNormalization", "Conv"):
        assert shown.count(operator) == sum(node.op_type == operator for node in model.graph) > 0
    assert not {"Shape", "Constant"} & set(shown)
    gradients = {f"url(#{gradient.get('id')})" for gradient in root.iter(f"{SVG}linearGradient")}
    used = {box.get("fill", "") for box in root.iter(f"{SVG}rect") if box.get("fill", "").startswith("url")}
    assert used == gradients != set()
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "defs", "linearGradient", "stop", "rect", "g", "title", "text", "path",
    }  # fmt: skip
    assert not any("href" in key for element in root.iter() for key in element.attrib)


def test_an_input_is_drawn_where_it_is_wanted() -> None:
    root = drawn(
        from_text("""
            <ir_version: 10, opset_import: ["" : 20]>
            net (float[batch, 2] x, float[batch, 2] mask) => (float[batch, 2] y)
            { a = Relu(x) b = Neg(a) c = Abs(b) m = Neg(mask) y = Mul(c, m) }
        """)
    )
    tops = {name: box.get("y") for name, box in boxes(root).items()}
    assert (tops["m"], tops["mask"]) == (tops["c"], tops["b"])


def test_a_constant_that_is_cast_to_the_type_of_a_value_is_left_out() -> None:
    root = drawn(
        from_text("""
            <ir_version: 10, opset_import: ["" : 20]>
            net (float[batch, 2] x) => (float[batch, 2] y) <float k = {2}>
            { a = Relu(x) scale = CastLike(k, a) y = Mul(a, scale) }
        """)
    )
    assert "Mul" in words(root)
    assert "CastLike" not in words(root)


def test_what_a_subgraph_reads_is_drawn() -> None:
    root = drawn(
        from_text("""
            <ir_version: 10, opset_import: ["" : 20]>
            net (float[batch, 2] x) => (float[batch, 2] y) <bool c = {1}>
            {
                h = Neg(x)
                y = If(c) <then_branch = g () => (float[batch, 2] a) { a = Relu(h) },
                           else_branch = k () => (float[batch, 2] b) { b = Abs(h) }>
            }
        """)
    )
    assert {"Neg", "If"} <= set(words(root))
    assert "h" in edges(root)


def test_names_are_escaped_and_cannot_break_the_file() -> None:
    model = from_text(RESIDUAL)
    model.graph.node(0).name = "<script>\x00\x1b"
    model.graph.node(1).outputs[0].name = ']]>&"\ud800'
    model.graph.inputs[0].shape = ir.Shape(["<i>\x01", 2])
    weight = model.graph.initializers.pop("up")
    weight.name = '<b>&".weight'
    model.graph.initializers.add(weight)
    picture = draw_symmetry(model, symmetry_of(Space('<b>&".weight', 3)))
    ElementTree.fromstring(picture)
    picture.encode()
    assert "<script>" not in picture
    assert not {"<b>", "<i>"} & set(re.findall("<.>", picture))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net () => (float[2] y) <float[2] w = {1, 2}> { y = Relu(w) }", []),
        ("net (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Relu(w) }", ["x", "2"]),
        ("net (float x) => (float y) { y = Relu(x) }", ["x", "a number", "Relu", "a number", "y", "a number"]),
    ],
)
def test_graphs_with_next_to_nothing_to_draw(text: str, expected: list[str]) -> None:
    model = from_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    root = ElementTree.fromstring(draw_symmetry(model, symmetry_of()))
    assert words(root) == [*expected, "Units that move together", "", "stays in place"]
    assert float(root.get("width", 0)) > 0


def test_the_picture_is_the_same_every_time() -> None:
    model = exported("vit")
    symmetry = derive_symmetry(model)
    assert draw_symmetry(model, symmetry) == draw_symmetry(model, symmetry)
