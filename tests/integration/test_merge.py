"""`ensemerge merge` as people run it: on files, killed and starved."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.checkpoints import contents, llama, read_checkpoint, write_checkpoint

from ensemerge.cli.merge import main

TIES = """
merge_method: ties
base_model: base
models:
  - {model: one, parameters: {weight: 1, density: 0.4}}
  - {model: two, parameters: {weight: 0.7, density: 0.6}}
"""
LINEAR = """
merge_method: linear
models:
  - {model: one, parameters: {weight: 1}}
  - {model: two, parameters: {weight: 3}}
"""
COMMAND = (sys.executable, "-m", "ensemerge.cli", "merge")


@dataclass(frozen=True)
class Done:
    """What a command said, and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, recipe: str, *options: str, expect: int = 0) -> Done:
    """The command in this process: most tests need no process of their own, and starting one takes seconds."""
    (folder / "recipe.yaml").write_text(recipe)
    out, err = StringIO(), StringIO()
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        status = main(["recipe.yaml", *options])
    assert status == expect, err.getvalue()
    return Done(status, out.getvalue(), err.getvalue())


def run_apart(folder: Path, recipe: str, *options: str, expect: int = 0) -> Done:
    """The command in a process of its own."""
    (folder / "recipe.yaml").write_text(recipe)
    done = subprocess.run([*COMMAND, "recipe.yaml", *options], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def refused(folder: Path, recipe: str, *options: str) -> str:
    """The message of a merge that cannot be: inputs as they were, nothing under the final name or beside it."""
    before = contents(folder)
    error = run(folder, recipe, "--out", "out", *options, expect=1).stderr
    after = contents(folder)
    del after["recipe.yaml"]
    before.pop("recipe.yaml", None)
    assert after == before
    return error


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for step, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, llama(step, dtype=torch.bfloat16), shards=step + 1)
    return tmp_path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of 30 MB, whose embedding is a third of it."""
    folder = tmp_path_factory.mktemp("large")
    for step, name in enumerate(("base", "one", "two")):
        tensors = llama(step, hidden=256, layers=8, vocabulary=20_000, dtype=torch.bfloat16)
        write_checkpoint(folder / name, tensors, shards=2)
    return folder


def test_a_recipe_becomes_a_checkpoint(family: Path) -> None:
    run(family, LINEAR, "--out", "out")
    merged, one, two = (read_checkpoint(family / name) for name in ("out", "one", "two"))
    assert list(merged) and merged.keys() == one.keys()
    for name, tensor in merged.items():
        expected = ((one[name].float() + 3 * two[name].float()) / 4).bfloat16()
        torch.testing.assert_close(tensor, expected, rtol=2**-8, atol=0)
    assert json.loads((family / "out/config.json").read_text())["num_hidden_layers"] == 2
    assert "linear" in (family / "out/README.md").read_text()
    assert (family / "out/ensemerge_recipe.yaml").read_text() == LINEAR


@pytest.mark.parametrize("method", ["ties", "dare_ties", "model_stock", "della"])
def test_the_bytes_depend_on_neither_threads_nor_memory_nor_shards(large: Path, method: str, tmp_path: Path) -> None:
    recipe = TIES.replace("ties", method)
    if method == "model_stock":
        recipe = recipe.replace(", parameters: {weight: 1, density: 0.4}", "").replace(
            ", parameters: {weight: 0.7, density: 0.6}", ""
        )
    digests = set()
    for number, options in enumerate((["--threads", "1"], ["--threads", "3"], ["--memory", "4GiB"])):
        run(large, recipe, "--out", str(tmp_path / f"out-{number}"), *options)
        digests.add(digest(tmp_path / f"out-{number}"))
    assert len(digests) == 1
    run(large, recipe, "--out", str(tmp_path / "sharded"), "--shard-size", "9MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = read_checkpoint(tmp_path / "out-0"), read_checkpoint(tmp_path / "sharded")
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize("recipe", [LINEAR, TIES])
def test_memory_is_a_bound(large: Path, tmp_path: Path, recipe: str) -> None:
    done = run_apart(large, recipe, "--out", str(tmp_path / "out"), "--memory", "400MiB", "--json")
    assert json.loads(done.stdout)["peak_bytes"] <= 400 << 20


def test_too_little_memory_is_told_with_what_is_needed(family: Path) -> None:
    assert "give at least" in refused(family, TIES, "--memory", "64MiB")


def killed_in_the_middle(folder: Path, recipe: str, out: Path) -> None:
    (folder / "recipe.yaml").write_text(recipe)
    process = subprocess.Popen([*COMMAND, "recipe.yaml", "--out", str(out), "--threads", "1"], cwd=folder)
    journal = out.parent / f".{out.name}.merging" / "merge.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and len(journal.read_text().splitlines()) > 3):
        assert process.poll() is None, "the merge was over before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_merge_leaves_nothing_and_goes_on(large: Path, tmp_path: Path) -> None:
    before = {name: digest(large / name) for name in ("base", "one", "two")}
    out = tmp_path / "out"
    killed_in_the_middle(large, TIES, out)
    assert not out.exists()
    run(large, TIES, "--out", str(tmp_path / "whole"))
    done = run(large, TIES, "--out", str(out), "--json")
    assert json.loads(done.stdout)["resumed_tensors"] >= 3
    assert digest(out) == digest(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]
    assert {name: digest(large / name) for name in before} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_told_before_the_work(large: Path, small_disk: Path) -> None:
    done = run(large, LINEAR, "--out", str(small_disk / "out"), expect=1)
    assert "the merged model takes" in done.stderr
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_in_between_is_told(family: Path, small_disk: Path) -> None:
    size = sum(file.stat().st_size for file in (family / "one").iterdir())
    available = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    # Room for the weights, so that the plan is content, and none for what goes beside them.
    (small_disk / "ballast").write_bytes(bytes(available - size - 4096))
    error = run(family, LINEAR, "--out", str(small_disk / "out"), expect=1).stderr
    assert "disk full" in error or "No space left" in error
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]


class Attack:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._target}",)


def test_a_pickle_that_executes_code_is_refused_and_does_not_run(family: Path, tmp_path: Path) -> None:
    evil = family / "evil"
    evil.mkdir()
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Attack(tmp_path / "owned")}))
    assert "evil" in refused(family, LINEAR.replace("model: two", "model: evil"))
    assert not (tmp_path / "owned").exists()


def test_a_truncated_shard_is_refused(family: Path) -> None:
    shard = sorted((family / "two").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in refused(family, LINEAR)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"shape":[48,32]', b'"shape":[48,99]'),
        (b'"data_offsets":[0,', b'"data_offsets":[9,'),
        (b'"dtype":"BF16"', b'"dtype":"BF61"'),
    ],
)
def test_a_header_that_lies_is_refused(family: Path, before: bytes, after: bytes) -> None:
    file = family / "base" / "model.safetensors"
    lying = file.read_bytes().replace(before, after, 1)
    assert lying != file.read_bytes()
    file.write_bytes(lying)
    assert "base" in refused(family, TIES)


def test_all_problems_of_a_plan_are_told_at_once(family: Path) -> None:
    tensors = llama(3, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = torch.zeros(48, 31, dtype=torch.bfloat16)
    write_checkpoint(family / "odd", tensors)
    error = refused(family, LINEAR.replace("model: two", "model: odd"))
    assert "'model.norm.weight'" in error
    assert "'lm_head.weight'" in error
    assert "[7]" in error


def test_nan_is_refused_by_tensor_and_model(family: Path) -> None:
    tensors = llama(3, dtype=torch.bfloat16)
    tensors["model.norm.weight"][3] = float("nan")
    write_checkpoint(family / "sick", tensors)
    error = refused(family, LINEAR.replace("model: two", "model: sick"))
    assert "'model.norm.weight' of sick holds NaN or infinity" in error


def test_what_exists_is_not_overwritten(family: Path) -> None:
    (family / "out").mkdir()
    assert "out exists" in run(family, LINEAR, "--out", "out", expect=1).stderr


def test_unknown_keys_and_methods_get_suggestions(family: Path) -> None:
    error = refused(family, "merge_metod: linear\nmodels: [{model: one, parameters: {weight: 1}}]\n")
    assert "did you mean 'merge_method'" in error
    assert "did you mean 'ties'" in refused(family, TIES.replace("merge_method: ties", "merge_method: tie"))


def test_a_dry_run_tells_the_plan_and_does_nothing(family: Path) -> None:
    before = contents(family)
    done = run(family, TIES, "--out", "out", "--dry-run", "--memory", "2GiB")
    assert "unlike mergekit" in done.stdout
    (facts,) = json.loads(run(family, TIES, "--out", "out", "--dry-run", "--json").stdout)
    assert facts["outputs"][""]["tensors"] == len(read_checkpoint(family / "one"))
    assert facts["seconds"] > 0
    after = contents(family)
    del after["recipe.yaml"]
    assert after == before


def test_a_method_for_each_task_makes_a_model_for_each(family: Path) -> None:
    recipe = "merge_method: emr\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    run(family, recipe, "--out", "out")
    assert sorted(entry.name for entry in (family / "out").iterdir()) == ["one", "two"]
    base, one, first = (read_checkpoint(family / name) for name in ("base", "one", "out/one"))
    for name in base:
        # An elected, masked and rescaled task vector points where the task's own does.
        own, made = (one[name].float() - base[name].float()), (first[name].float() - base[name].float())
        assert float((own * made).sum()) > 0


CHAIN = (
    "name: inner\nmerge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}, {model: two, parameters: "
    "{weight: 1}}]\n---\nmerge_method: linear\nmodels: [{model: inner, parameters: {weight: 1}}, {model: base, "
    "parameters: {weight: 1}}]\n"
)


def test_merges_of_one_file_use_each_other(family: Path) -> None:
    run(family, CHAIN, "--out", "out")
    inner, base, merged = (read_checkpoint(family / name) for name in ("out-parts/inner", "base", "out"))
    for name, tensor in merged.items():
        expected = (inner[name].float() + base[name].float()) / 2
        torch.testing.assert_close(tensor.float(), expected, rtol=2**-7, atol=1e-6)


def test_what_stops_the_last_merge_of_a_file_is_told_before_the_first(family: Path) -> None:
    assert "no model 'absent'" in refused(family, CHAIN.replace("model: base", "model: absent"))
    (family / "out").mkdir()
    assert "out exists" in run(family, CHAIN, "--out", "out", expect=1).stderr
    assert not (family / "out-parts").exists()


def test_a_part_that_another_recipe_made_is_not_used(family: Path) -> None:
    run(family, CHAIN, "--out", "out")
    error = run(
        family, CHAIN.replace("model: two", "model: base"), "--out", "again", "--intermediate", "out-parts", expect=1
    )
    assert "made by another recipe" in error.stderr


def test_a_dry_run_plans_what_can_be_planned(family: Path) -> None:
    done = run(family, CHAIN, "--out", "out", "--dry-run", "--json")
    assert len(json.loads(done.stdout)) == 1
    assert "is planned when" in done.stderr


@pytest.mark.parametrize("change", ["seed", "shards", "input"])
def test_another_merge_does_not_go_on_from_a_killed_one(large: Path, tmp_path: Path, change: str) -> None:
    inputs = tmp_path / "inputs"
    shutil.copytree(large, inputs)
    recipe = TIES.replace("ties", "dare_ties")
    killed_in_the_middle(inputs, recipe, tmp_path / "out")
    options = {"seed": ["--seed", "9"], "shards": ["--shard-size", "9MB"], "input": []}[change]
    if change == "input":
        file = next((inputs / "one").glob("*.safetensors"))
        file.write_bytes(next((inputs / "two").glob(file.name)).read_bytes())
    done = run(inputs, recipe, "--out", str(tmp_path / "out"), "--json", *options)
    assert json.loads(done.stdout)["resumed_tensors"] == 0
    run(inputs, recipe, "--out", str(tmp_path / "fresh"), *options)
    fresh, out = contents(tmp_path / "fresh"), contents(tmp_path / "out")
    assert {name for name in fresh if "safetensors" in name} == {name for name in out if "safetensors" in name}
    assert all(fresh[name] == out[name] for name in fresh if "safetensors" in name)


def test_a_merge_killed_among_several_outputs_goes_on(family: Path) -> None:
    recipe = "merge_method: emr\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    run(family, recipe, "--out", "whole")
    # As it is left where the first model is done, with all that goes beside it, and the second is not.
    (family / "out").mkdir(parents=True)
    (family / "out").rmdir()
    with (
        patch("ensemerge.merge.checkpoint.write_companions", side_effect=[(), KeyboardInterrupt]),
        pytest.raises(AssertionError, match="interrupted"),
    ):
        run(family, recipe, "--out", "out")
    (family / ".out.merging" / "one" / "README.md").write_text("half of")
    run(family, recipe, "--out", "out")
    whole, out = contents(family / "whole"), contents(family / "out")
    assert whole == out


@pytest.mark.parametrize(("place", "names"), [("one/deep", ("..", ".")), ("", ("base/../one", "./two/"))])
def test_outputs_for_tasks_stay_in_the_folder(family: Path, place: str, names: tuple[str, str]) -> None:
    write_checkpoint(family / "one" / "deep", llama(3, dtype=torch.bfloat16))
    models = ", ".join(f"{{model: {name}}}" for name in names)
    recipe = f"merge_method: emr\nbase_model: {family / 'base'}\nmodels: [{models}]\n"
    before = contents(family)
    run(family / place, recipe, "--out", str(family / "made"))
    fresh = {name for name in contents(family) if name not in before and not name.endswith("/recipe.yaml")}
    assert all(name.startswith("made/") for name in fresh - {"recipe.yaml"})
    assert len(list((family / "made").iterdir())) == 2


def test_a_folder_of_somebody_elses_is_not_emptied(family: Path) -> None:
    (family / "precious").mkdir()
    (family / "precious" / "thesis.txt").write_text("years")
    (family / ".out.merging").symlink_to(family / "precious")
    assert "no interrupted merge" in run(family, LINEAR, "--out", "out", expect=1).stderr
    (family / ".out.merging").unlink()
    (family / "precious").rename(family / ".out.merging")
    assert "no interrupted merge" in run(family, LINEAR, "--out", "out", expect=1).stderr
    assert (family / ".out.merging" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65530.0), ("bfloat16", 3.4e38), ("float32", 1e300)])
def test_a_number_beyond_the_output_is_refused(tmp_path: Path, dtype: str, value: float) -> None:
    wide = torch.float64 if dtype == "float32" else torch.float32
    write_checkpoint(tmp_path / "one", {"w": torch.tensor([1.0, value], dtype=wide)})
    recipe = f"merge_method: linear\nmodels: [{{model: one, parameters: {{weight: 1}}}}]\nout_dtype: {dtype}\n"
    assert "expected finite" in refused(tmp_path, recipe)
    smaller = recipe.replace("weight: 1", "weight: 0.5")
    write_checkpoint(tmp_path / "two", {"w": torch.tensor([1.0, 65510.0])})
    run(tmp_path, smaller.replace("one", "two").replace(dtype, "float16"), "--out", "fits")
    assert read_checkpoint(tmp_path / "fits")["w"].tolist() == [1.0, 65504.0]


def test_tied_tensors_stay_tied_or_are_written_out(tmp_path: Path) -> None:
    recipe = (
        "merge_method: dare_linear\nbase_model: a.pt\nmodels: [{model: b.pt, parameters: {weight: 1, density: 0.5}}]\n"
    )
    for name in ("a", "b"):
        table = torch.randn(40, 8)
        torch.save({"embed.weight": table, "head.weight": table, "w": torch.randn(8)}, tmp_path / f"{name}.pt")
    run(tmp_path, recipe, "--out", "out")
    merged = read_checkpoint(tmp_path / "out")
    assert sorted(merged) == ["embed.weight", "head.weight", "w"]
    assert torch.equal(merged["embed.weight"], merged["head.weight"])


def test_slices_stack_layers(family: Path) -> None:
    recipe = (
        "merge_method: passthrough\nslices:\n  - sources: [{model: one, layer_range: [0, 2]}]\n"
        "  - sources: [{model: two, layer_range: [1, 2]}]\n"
    )
    run(family, recipe, "--out", "out")
    one, two, merged = (read_checkpoint(family / name) for name in ("one", "two", "out"))
    name = "self_attn.q_proj.weight"
    assert torch.equal(merged[f"model.layers.2.{name}"], two[f"model.layers.1.{name}"])
    assert torch.equal(merged[f"model.layers.1.{name}"], one[f"model.layers.1.{name}"])
    assert json.loads((family / "out/config.json").read_text())["num_hidden_layers"] == 3
