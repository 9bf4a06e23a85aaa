from pathlib import Path

import pytest

from ensemerge.errors import InvalidSpec, NotFound
from ensemerge.merge.references import ModelPath, ModelReference, hub_cache, locate, parse_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ("org/a", ModelReference(ModelPath("org/a"))),
        ("org/a@main", ModelReference(ModelPath("org/a", "main"))),
        ("./a+lora@v1", ModelReference(ModelPath("./a"), ModelPath("lora", "v1"))),
        ({"model": "a@r", "lora": "b"}, ModelReference(ModelPath("a", "r"), ModelPath("b"))),
        ({"model": {"path": "a+b@c"}}, ModelReference(ModelPath("a+b@c"))),
        (
            {"model": {"path": "a", "revision": "r"}, "override_architecture": "X"},
            ModelReference(ModelPath("a", "r"), None, "X"),
        ),
    ],
)
def test_references(value: object, reference: ModelReference) -> None:
    assert parse_model(value, "here") == reference


@pytest.mark.parametrize("text", ["org/a", "org/a@v1", "a+b", "org/a@v1+org/b@v2"])
def test_a_reference_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_model(text, "here")) == text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "an empty name"),
        ("a+", "an empty name"),
        ("a@b@c", "expected one '@'"),
        (3, "expected a path, a repository or a mapping"),
        ({"modl": "a"}, "'model' is missing"),
        ({"model": "a", "lra": "b"}, "did you mean 'lora'"),
        ({"model": 3}, "expected a path or a repository"),
    ],
)
def test_a_name_that_is_none(value: object, problem: str) -> None:
    with pytest.raises(InvalidSpec, match=f"here.*{problem}"):
        parse_model(value, "here")


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    """A Hugging Face cache with one snapshot of org/a, known as main and as refs/pr/1."""
    repository = tmp_path / "hub" / "models--org--a"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs" / "refs" / "pr").mkdir(parents=True)
    for name in ("main", "refs/pr/1"):
        (repository / "refs" / name).write_text(COMMIT)
    return {"HF_HUB_CACHE": str(tmp_path / "hub")}


def test_a_path_beside_the_recipe_comes_first(tmp_path: Path, cache: dict[str, str]) -> None:
    (tmp_path / "recipes" / "org" / "a").mkdir(parents=True)
    assert locate(ModelPath("org/a"), tmp_path / "recipes", cache) == tmp_path / "recipes" / "org" / "a"


def test_then_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate(ModelPath("a"), tmp_path / "elsewhere", {}) == tmp_path / "a"


@pytest.mark.parametrize("revision", [None, "main", COMMIT, "refs/pr/1"])
def test_then_the_cache(tmp_path: Path, cache: dict[str, str], revision: str | None) -> None:
    found = locate(ModelPath("org/a", revision), tmp_path, cache)
    assert found == tmp_path / "hub" / "models--org--a" / "snapshots" / COMMIT


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(NotFound, match="huggingface-cli download a --revision v1"):
        locate(ModelPath("a", "v1"), tmp_path, {"HF_HOME": str(tmp_path)})


def test_what_is_not_there_is_not_fetched(tmp_path: Path, cache: dict[str, str]) -> None:
    with pytest.raises(NotFound) as caught:
        locate(ModelPath("org/b"), tmp_path, cache)
    message = str(caught.value)
    assert str(tmp_path / "org" / "b") in message
    assert str(tmp_path / "hub" / "models--org--b") in message
    assert message.endswith("to fetch it: huggingface-cli download org/b")


@pytest.mark.parametrize("path", ["../../x", "a/b/c", "/nowhere"])
def test_a_path_is_no_repository(tmp_path: Path, path: str) -> None:
    with pytest.raises(NotFound, match="expected a file or folder"):
        locate(ModelPath(path), tmp_path, {"HF_HOME": str(tmp_path)})


@pytest.mark.parametrize("revision", ["../main", "x/../../main", "/etc/passwd"])
def test_a_revision_cannot_lead_out_of_the_cache(tmp_path: Path, cache: dict[str, str], revision: str) -> None:
    with pytest.raises(NotFound):
        locate(ModelPath("org/a", revision), tmp_path, cache)


def test_where_the_cache_lies() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")
    assert hub_cache({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache" / "huggingface" / "hub"
