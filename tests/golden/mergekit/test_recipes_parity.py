"""Whole recipes give mergekit's numbers: `benchmarks/merging_parity.py`, for a handful of its recipes.

Set ENSEMERGE_MERGEKIT to a Python that can import mergekit 0.1.5; the other tests here need none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.merging import merge

from ensemerge.merge.methods.mergekit import MERGEKIT, importance
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.recipe import parse_recipe

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MERGEKIT_PYTHON = os.environ.get("ENSEMERGE_MERGEKIT", "")
# Each by what else may go wrong: levels of settings, filters and gradients, layers, vocabularies, chance, rounding.
HANDFUL = {
    "linear-tokens-rules": 30,
    "slerp-llama-t-by-part": 30,
    "nuslerp-gpt2-last-axis,-task-vectors": 40,
    "ties-llama-all-levels-of-settings": 21,
    "dare_ties-gpt2-weights-and-densities": 40,
    "della-bf16-dtype-float32": 30,
    "passthrough-gpt2-stacked-layers": 52,
    "arcee_fusion-quiet-all": 30,
    "model_stock-wide-tensors": 12,
}


@pytest.mark.skipif(
    not MERGEKIT_PYTHON, reason="set ENSEMERGE_MERGEKIT to the Python of an environment with mergekit 0.1.5"
)
def test_a_handful_of_recipes_gives_mergekits_numbers(tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    command = [sys.executable, str(BENCHMARKS / "merging_parity.py"), "--mergekit", MERGEKIT_PYTHON, "--out", str(out)]
    done = subprocess.run([*command, "--only", *HANDFUL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())["comparisons"]
    assert {one["method"] for one in found} == {name.split("-")[0] for name in HANDFUL}
    assert sorted(one["tensors"] for one in found) == sorted(HANDFUL.values())
    assert not [one for one in found if one["broken"] or one["differs"] or one["largest_difference"] > 1e-6]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmarks")
def test_its_recipes_are_understood_and_cover_every_method() -> None:
    from parity_recipes import cases

    found = cases()
    for case in found:
        assert parse_recipe(dict(case.recipe), case.file, METHODS).method == case.method
    assert {case.method for case in found if not case.known} == set(MERGEKIT)
    assert len({case.file for case in found}) == len(found)
    assert {case.file for case in found} >= set(HANDFUL)


@pytest.mark.usefixtures("benchmarks")
def test_its_comparison_sees_what_differs() -> None:
    from merging_parity import numbers_differ, shapes_differ

    theirs = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(3, dtype=torch.bfloat16)}
    assert (shapes_differ(theirs, theirs), numbers_differ(theirs, theirs)) == ([], (0, []))
    largest, differs = numbers_differ({**theirs, "a": torch.tensor([1.0, 2.00001])}, theirs)
    assert largest == pytest.approx(1e-5, rel=0.1)
    assert "1 of 2 elements differ" in differs[0]
    assert numbers_differ({**theirs, "a": torch.tensor([1.0, 2.0000005])}, theirs)[1] == []
    # One step of bf16 is rounding, two are not.
    assert numbers_differ({**theirs, "b": theirs["b"] + 2**-7}, theirs)[1] == []
    assert numbers_differ({**theirs, "b": theirs["b"] + 2**-6}, theirs)[1] != []
    assert numbers_differ({**theirs, "a": torch.tensor([1.0, float("nan")])}, theirs)[1] != []
    assert "mergekit torch.bfloat16" in numbers_differ({**theirs, "b": torch.ones(3)}, theirs)[1][0]
    assert "only mergekit has it" in shapes_differ({"a": theirs["a"]}, theirs)[0]
    assert "only ensemerge has it" in shapes_differ({**theirs, "c": theirs["a"]}, theirs)[0]
    assert "[2, 1], mergekit [2]" in shapes_differ({**theirs, "a": torch.ones(2, 1)}, theirs)[0]


@pytest.mark.parametrize("block", [8, 1 << 17])
def test_a_divergence_that_rounds_below_zero_counts_for_mergekit(block: int) -> None:
    random = torch.Generator().manual_seed(5)
    base = torch.randn((64, 32), generator=random) * 0.02
    model = base + torch.randn((64, 32), generator=random) * 2e-5
    scores = importance(model.clone(), base)
    assert float((scores < 0).float().mean()) > 0.2
    ordered = scores.reshape(-1).sort().values
    low, median, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    expected = base + (model - base) * (scores >= median + 1.5 * (high - low))
    torch.testing.assert_close(merge("arcee_fusion", [model], base, table=MERGEKIT, block_elements=block), expected)
