"""The symmetry of a network as tables, as data and as a picture."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import onnx_ir as ir
import pytest
from rich.console import Console
from support.zoo import exported

from ensemerge.graph.derive import derive_symmetry
from ensemerge.report.drawing import draw_symmetry
from ensemerge.report.symmetry import colours, orders_log10, symmetry_facts, symmetry_tables

SVG = "{http://www.w3.org/2000/svg}"


def printed(name: str) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        for table in symmetry_tables(derive_symmetry(exported(name))):
            console.print(table)
    return capture.get()


def test_tables_say_what_moves_and_what_does_not() -> None:
    shown = printed("resnext")
    assert "4   3 of stem.0.weight:0*0" in shown
    assert "it is a place in a kernel" in shown
    assert "orders of units leave the network as it is" in shown


def test_facts() -> None:
    symmetry = derive_symmetry(exported("mlp"))
    facts = symmetry_facts(symmetry)
    assert [space["size"] for space in facts["spaces"]] == [10, 12]
    assert facts["spaces"][0]["axes"] == ["0.weight:0", "0.bias:0", "2.weight:1"]
    assert {entry["reason"] for entry in facts["frozen"]} == {"it is an input", "it is an output"}
    assert facts["without_rule"] == {}


def test_the_number_of_orders_counts_inner_ones_for_each_outer_unit() -> None:
    symmetry = derive_symmetry(exported("attention"))
    expected = math.log10(math.factorial(3) * math.factorial(4) ** 3 * math.factorial(6) ** 3 * math.factorial(12))
    assert orders_log10(symmetry) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["resnet", "vit", "llama", "gru", "unet"])
def test_the_picture_is_one_svg_with_a_box_for_every_operator(name: str) -> None:
    model = exported(name)
    symmetry = derive_symmetry(model)
    root = ElementTree.fromstring(draw_symmetry(model, symmetry))
    words = [text.text for text in root.iter(f"{SVG}text")]
    for operator in ("Conv", "Gemm", "MatMul", "Softmax", "GRU", "ConvTranspose"):
        assert words.count(operator) == sum(node.op_type == operator for node in model.graph)
    assert not any(word in ("Shape", "Constant") for word in words)
    fills = {rect.get("fill") for rect in root.iter(f"{SVG}rect")}
    assert {f"rgb{colour}" for colour in colours(symmetry).values()} <= fills
    assert not any(key.endswith("href") for element in root.iter() for key in element.attrib)


def test_boxes_of_one_layer_do_not_overlap() -> None:
    model = exported("vit")
    root = ElementTree.fromstring(draw_symmetry(model, derive_symmetry(model)))
    frames = [rect for rect in root.iter(f"{SVG}rect") if rect.get("stroke-opacity")]
    spots = sorted((float(f.get("y", 0)), float(f.get("x", 0)), float(f.get("width", 0))) for f in frames)
    for (y, x, width), (other_y, other_x, _) in itertools.pairwise(spots):
        assert y != other_y or x + width < other_x


def test_names_are_escaped() -> None:
    model = exported("mlp").clone()
    model.graph.node(0).name = "<script>"
    weight = model.graph.initializers.pop("0.weight")
    weight.name = '<b>&".weight'
    model.graph.initializers.add(weight)
    drawn = draw_symmetry(model, derive_symmetry(model))
    ElementTree.fromstring(drawn)
    assert "<script>" not in drawn
    assert "<b>" not in drawn


def test_a_network_in_which_nothing_moves(tmp_path: object) -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 3] x) => (float[batch, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}>
        { y = MatMul(x, w) }
        """
    )
    symmetry = derive_symmetry(model)
    assert "10^0 orders" in "".join(str(table) for table in symmetry_tables(symmetry))
    ElementTree.fromstring(draw_symmetry(model, symmetry))
