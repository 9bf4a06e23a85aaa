from pathlib import Path

import pytest

from ensemerge.errors import InvalidModel, NotFound
from ensemerge.repository import Repository, Spec
from ensemerge_server.catalogue import Catalogue, Deployed, Resolve
from ensemerge_server.servable import Done, Reply, Request, Signature


class Silent:
    signature = Signature((), (), False)

    def submit(self, request: Request, done: Done) -> None:
        done(Reply({}, "1"))


class Loads:
    """A builder that notes what it loads; models named `broken…` fail, `leaning` ones resolve what they name."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.closed: list[str] = []

    def __call__(self, spec: Spec, resolve: Resolve) -> Deployed:
        if spec.name.startswith("broken"):
            raise InvalidModel("the file is damaged")
        for name in spec.body.get("on", ()):
            resolve(name, None)
        self.loaded.append(spec.name)
        return Deployed(spec.name, 2, spec.kind, None, Silent(), lambda: self.closed.append(spec.name))


def catalogue(root: Path, **models: object) -> tuple[Catalogue, Loads]:
    repository = Repository(root, create=True)
    for name, on in models.items():
        repository.write_spec(name, {"kind": "leaning", "on": on} if on else {})
    loads = Loads()
    loaded = Catalogue(repository, {"onnx": loads, "leaning": loads})
    loaded.load_all()
    return loaded, loads


def test_what_others_lean_on_is_loaded_first_and_closed_last(tmp_path: Path) -> None:
    loaded, loads = catalogue(tmp_path, a=["c"], b=["a"], c=None)
    assert loads.loaded == ["c", "a", "b"]
    assert loaded.ready
    loaded.close()
    assert loads.closed == ["b", "a", "c"]


def test_one_broken_model_stops_only_those_that_lean_on_it(tmp_path: Path) -> None:
    loaded, _ = catalogue(tmp_path, broken=None, good=None, leaning=["broken"])
    states = {entry.name: (entry.state, entry.reason) for entry in loaded.index()}
    assert states == {
        "broken": ("UNAVAILABLE", "the file is damaged"),
        "good": ("READY", ""),
        "leaning": ("UNAVAILABLE", "'broken' cannot be loaded: the file is damaged"),
    }
    assert not loaded.ready
    assert loaded.get("good").name == "good"
    with pytest.raises(NotFound, match="'broken' has no available versions: the file is damaged"):
        loaded.get("broken")


def test_a_circle_is_named(tmp_path: Path) -> None:
    loaded, _ = catalogue(tmp_path, a=["b"], b=["a"])
    assert "a → b → a" in loaded.index()[0].reason


def test_an_unknown_kind_gets_a_suggestion(tmp_path: Path) -> None:
    Repository(tmp_path).write_spec("odd", {"kind": "leening"})
    loaded, _ = catalogue(tmp_path)
    assert "unknown kind 'leening'; did you mean 'leaning'?" in loaded.index()[0].reason


def test_unknown_names_and_versions(tmp_path: Path) -> None:
    loaded, _ = catalogue(tmp_path, good=None)
    assert loaded.get("good", "2").version == 2
    with pytest.raises(NotFound, match="'good' version 99 is not found; 2 is loaded"):
        loaded.get("good", "99")
    with pytest.raises(NotFound, match=r"unknown model: 'x{77}…' is not found"):
        loaded.get("x" * 5_000_000)
    with pytest.raises(ValueError, match="latest"):
        loaded.get("good", "latest")
