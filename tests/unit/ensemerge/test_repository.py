import threading
from pathlib import Path

import pytest

from ensemerge.errors import InvalidModel, InvalidSpec, NotFound
from ensemerge.repository import Check, Manifest, Repository, Task, parse_reference, parse_version


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models", create=True)


def fill(folder: Path) -> Manifest:
    (folder / "model.onnx").write_bytes(b"weights")
    task = Task("classification", "logits", "logits", ("cat", "dog"))
    return Manifest("onnx", task, {"net.pt": "ab" * 32}, {"epochs": 3}, 7, (Check("parity", 1e-7, 1e-5, "of logits"),))


def test_a_published_version_reads_back_as_it_was_written(repository: Repository) -> None:
    version = repository.publish("pets", fill)
    assert (version.number, version.folder) == (1, repository.root / "pets" / "1")
    manifest = version.manifest
    assert manifest is not None
    assert manifest.task == Task("classification", "logits", "logits", ("cat", "dog"))
    assert manifest.checks == (Check("parity", 1e-7, 1e-5, "of logits"),)
    assert (manifest.seed, manifest.recipe) == (7, {"epochs": 3})
    version.verify()


def test_versions_count_up_and_the_newest_is_served(repository: Repository) -> None:
    repository.publish("pets", fill)
    repository.publish("pets", fill)
    assert repository.versions("pets") == [1, 2]
    assert repository.version("pets").number == 2
    assert repository.version("pets", 1).number == 1


def test_a_failed_build_leaves_no_trace(repository: Repository) -> None:
    def fail(folder: Path) -> Manifest:
        (folder / "model.onnx").write_bytes(b"half of the wei")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        repository.publish("pets", fail)
    assert list(repository.root.iterdir()) == []


def test_builders_at_the_same_time_get_different_numbers(repository: Repository) -> None:
    threads = [threading.Thread(target=repository.publish, args=("pets", fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert repository.versions("pets") == list(range(1, 9))


def test_a_file_that_changed_since_it_was_built_is_refused(repository: Repository) -> None:
    version = repository.publish("pets", fill)
    version.model_path.write_bytes(b"weighty")
    with pytest.raises(InvalidModel, match="is not the file that its manifest describes"):
        version.verify()


@pytest.mark.parametrize("name", ["../secrets", "a/b", "", ".hidden", "a" * 129, "-dash", "a\nb"])
def test_a_name_that_could_leave_the_repository_is_refused(repository: Repository, name: str) -> None:
    with pytest.raises(InvalidSpec, match="is no model name"):
        repository.folder(name)


def test_unknown_models_and_versions_are_told_with_what_there_is(repository: Repository) -> None:
    repository.publish("pets", fill)
    with pytest.raises(NotFound, match=r"no model 'cars'.*it has: pets"):
        repository.version("cars")
    with pytest.raises(NotFound, match="model 'pets' has no version 4; it has 1"):
        repository.version("pets", 4)


def test_a_model_without_model_yaml_is_plain_onnx(repository: Repository) -> None:
    repository.publish("pets", fill)
    spec = repository.spec("pets")
    assert (spec.kind, spec.task, spec.body) == ("onnx", None, {})


def test_the_envelope_leaves_the_body_to_its_owner(repository: Repository) -> None:
    repository.write_spec("both", {"kind": "ensemble", "members": ["a", "b"]})
    spec = repository.spec("both")
    assert (spec.kind, spec.body) == ("ensemble", {"members": ["a", "b"]})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kind: [", "cannot be read"),
        ("- a\n- b", "expected a mapping"),
        ("task: {kind: classificaton, output: y}", "did you mean 'classification'"),
        ("task: {output: y, scal: logits}", "unknown key 'scal'; did you mean 'scale'"),
        ("task: {output: y, classes: [a, a]}", "names a class twice"),
        ("a: " + "[" * 5000, "cannot be read"),
    ],
)
def test_a_model_yaml_that_cannot_be_understood_says_where(repository: Repository, text: str, problem: str) -> None:
    folder = repository.root / "odd"
    folder.mkdir()
    (folder / "model.yaml").write_text(text)
    with pytest.raises(InvalidSpec, match=problem):
        repository.spec("odd")


def test_a_missing_repository_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model repository at"):
        Repository(tmp_path / "nowhere")


def test_references_and_versions() -> None:
    assert parse_reference("digits-a:2") == ("digits-a", 2)
    assert parse_reference("digits-a") == ("digits-a", None)
    assert (parse_version(""), parse_version("3")) == (None, 3)
    for text in ("a:", "a:x", "../a", ":1", "a:1:2"):
        with pytest.raises(InvalidSpec, match="names no model"):
            parse_reference(text)
    for text in ("x", "-1", "0", "1.0", "٣"):
        with pytest.raises(ValueError, match=text):
            parse_version(text)
