"""Networks brought into one order: what is asked of the models and the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text

from ensemerge.errors import InvalidSpec
from ensemerge.graph.run import Arrays
from ensemerge.merge.alignment import Aligned, align_models
from ensemerge.merge.alignment_spec import Alignment
from ensemerge.merge.onnx_forms import pair_models
from ensemerge.merge.opened import Library, open_models
from ensemerge.merge.recipe import Recipe, Source
from ensemerge.merge.references import parse_model


def network(seed: int, rows: str = "batch") -> ir.Model:
    """`(rows, 3)` to two classes by four units."""
    drawn = np.random.default_rng(seed).standard_normal(20)
    first, last = (", ".join(f"{value:.3f}" for value in part) for part in (drawn[:12], drawn[12:]))
    return from_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[{rows}, 3] x) => (float[{rows}, 2] y) <float[3, 4] a = {{{first}}}, float[4, 2] c = {{{last}}}>
        {{ h = MatMul(x, a) r = Tanh(h) y = MatMul(r, c) }}
        """
    )


def aligned(folder: Path, models: list[ir.Model], alignment: Alignment, feeds: Arrays | None = None) -> Aligned:
    names = [f"{number}.onnx" for number in range(len(models))]
    for name, model in zip(names, models, strict=True):
        ir.save(model, folder / name)
    recipe = Recipe("linear", tuple(Source(parse_model(name, "models")) for name in names))
    return align_models(pair_models(recipe, open_models(recipe, Library(folder))), alignment, feeds)


def test_one_model_is_nothing_to_align(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="expected at least two models"):
        aligned(tmp_path, [network(0)], Alignment())


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_zip_needs_data(tmp_path: Path, by: str) -> None:
    with pytest.raises(InvalidSpec, match="a zip needs data"):
        aligned(tmp_path, [network(0), network(1)], Alignment(by, matching="zip"))


@pytest.mark.parametrize("matching", ["align", "zip"])
def test_networks_that_are_equal_have_nothing_to_move(tmp_path: Path, matching: str) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)}
    found = aligned(tmp_path, [network(0), network(0)], Alignment("activations", matching=matching), feeds)
    assert [check.difference for check in found.checks] == [0.0] * len(found.checks)
    assert found.similarity == 0


def test_networks_for_a_fixed_number_of_rows(tmp_path: Path) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((96, 3)).astype(np.float32)}
    models = [network(seed, rows="32") for seed in range(2)]
    found = aligned(tmp_path, models, Alignment("both"), feeds)
    (check,) = found.checks
    assert check.difference <= 1e-5


def test_networks_that_need_larger_inputs_than_the_smallest_made_up(tmp_path: Path) -> None:
    models = []
    for seed in range(2):
        kernel = ", ".join(f"{value:.3f}" for value in np.random.default_rng(seed).standard_normal(4))
        models.append(
            from_text(
                f"""
                <ir_version: 10, opset_import: ["" : 20]>
                net (float[batch, 1, height, width] x) => (float[batch, 1, h, w] y)
                <float[4, 1, 1, 1] a = {{{kernel}}}, float[1, 4, 1, 1] c = {{1, 2, 3, 4}}>
                {{ p = AveragePool<kernel_shape=[20, 20]>(x) q = Conv(p, a) r = Tanh(q) y = Conv(r, c) }}
                """
            )
        )
    found = aligned(tmp_path, models, Alignment())
    assert len(found.checks) == 1
