"""With `compat: mergekit` every method that mergekit 0.1.5 has too gives its numbers.

`generate.py` made the golden files. Where our own default differs, `DEVIATIONS` says how and why.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.merging import Given, Run, merge, settings

from ensemerge.errors import InvalidData
from ensemerge.merge.methods.mergekit import DEVIATIONS, MERGEKIT
from ensemerge.merge.methods.table import METHODS, Base

HERE = Path(__file__).parent
CASES: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text())
INPUTS = load_file(HERE / "inputs.safetensors")
OUTPUTS = load_file(HERE / "outputs.safetensors")


def _tensors(member: str, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: INPUTS[f"{member}/{name}"] for name in names}


def _names(case: dict[str, Any]) -> list[str]:
    return [key.split("/")[1] for key in OUTPUTS if key.count("/") == 1 and key.split("/")[0] == case["name"]]


def _run(case: dict[str, Any], table: Any) -> dict[str, torch.Tensor]:
    entry = table[case["method"]]
    masks = {(key.split("/")[1], int(key.split("/")[2])): mask for key, mask in OUTPUTS.items() if _is_mask(case, key)}
    chosen = settings(entry, case["models"], Given(masks), case.get("each"), **case.get("shared", {}))
    models = [_tensors(f"model{k}", _names(case)) for k in range(case["models"])]
    base = _tensors("base", _names(case)) if case.get("base") else None
    return Run(entry.make(chosen), models, base).merged()


def _is_mask(case: dict[str, Any], key: str) -> bool:
    return key.startswith(f"{case['name']}/") and key.count("/") == 2


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_numbers_are_mergekits(case: dict[str, Any]) -> None:
    merged = _run(case, MERGEKIT)
    assert len(merged) >= 5
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, OUTPUTS[f"{case['name']}/{name}"], rtol=0, atol=1e-6, msg=partial("{}: {}".format, name)
        )


def test_every_method_that_both_have_is_covered() -> None:
    assert {case["method"] for case in CASES} == set(MERGEKIT)
    assert all(MERGEKIT[name].parameters is METHODS[name].parameters for name in MERGEKIT)


def _differs(case: dict[str, Any]) -> bool:
    merged = _run(case, METHODS)
    return any((tensor - OUTPUTS[f"{case['name']}/{name}"]).abs().max() > 1e-6 for name, tensor in merged.items())


# Those whose default visibly differs on these inputs; the others differ only in the cases that their notes name.
VISIBLE = [
    "multislerp", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs_ties", "sce", "model_stock",
]  # fmt: skip


@pytest.mark.parametrize("method", VISIBLE)
def test_a_deviation_that_is_listed_is_there(method: str) -> None:
    assert method in DEVIATIONS
    assert any(_differs(case) for case in CASES if case["method"] == method)


@pytest.mark.parametrize("case", [c for c in CASES if c["method"] not in DEVIATIONS], ids=lambda case: case["name"])
def test_a_method_without_listed_deviations_is_the_same_by_default(case: dict[str, Any]) -> None:
    assert not _differs(case)


def test_deviations_concern_methods_that_both_have() -> None:
    assert set(DEVIATIONS) <= set(MERGEKIT)
    assert MERGEKIT["slerp"].base is Base.FIRST


def test_a_zero_tensor_is_at_a_right_angle_for_mergekit() -> None:
    models = [torch.zeros(2), torch.tensor([2.0, 0.0])]
    torch.testing.assert_close(merge("slerp", models, t=0.5), torch.tensor([1.0, 0.0]))
    half = torch.tensor([2**0.5, 0.0])
    torch.testing.assert_close(merge("slerp", models, table=MERGEKIT, t=0.5), half)
    torch.testing.assert_close(merge("nuslerp", models, table=MERGEKIT, weight=1.0), half)


def test_a_sum_of_zero_elects_plus_for_mergekit() -> None:
    deltas, base = [torch.tensor([1.0]), torch.tensor([-1.0])], torch.zeros(1)
    assert merge("ties", deltas, base, weight=1.0).item() == 0
    assert merge("ties", deltas, base, table=MERGEKIT, weight=1.0).item() == 1


def test_opposite_models_have_no_mean_direction_for_mergekit() -> None:
    models = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.zeros(2)]
    with pytest.raises(InvalidData, match="directions of the models cancel"):
        merge("multislerp", models, table=MERGEKIT, weight=1.0)
    assert merge("multislerp", models, weight=1.0).tolist() == [0, 0]
    # The Karcher mean starts at the first model and finds no way from there.
    assert merge("karcher", models, table=MERGEKIT).tolist() != [0, 0]
    assert merge("karcher", models).tolist() == [0, 0]
    assert merge("karcher", [torch.full((2,), 1e-7)] * 2, table=MERGEKIT).tolist() == [0, 0]
