"""What is loaded: every model of the repository by name and version, or the reason why it cannot answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ensemerge.errors import EnsemergeError, InvalidSpec, NotFound
from ensemerge.fields import suggest
from ensemerge.repository import Repository, Spec, Task, parse_version
from ensemerge_server.servable import Servable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployed:
    """A model that answers. `close` frees what it holds, after its last request."""

    name: str
    version: int
    kind: str
    task: Task | None
    servable: Servable
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Entry:
    """One line of the repository's index: a model, its version (empty where none is known), and its state."""

    name: str
    version: str
    state: str
    reason: str = ""


Resolve = Callable[[str, int | None], Deployed]
Builder = Callable[[Spec, Resolve], Deployed]


class Catalogue:
    """Loads models with the builder of their kind, members and arms first. One broken model never stops the others."""

    def __init__(self, repository: Repository, builders: Mapping[str, Builder]) -> None:
        self._repository = repository
        self._builders = builders
        self._deployed: dict[str, Deployed] = {}
        self._failed: dict[str, str] = {}
        self._loading: list[str] = []

    @property
    def ready(self) -> bool:
        """Whether every model of the repository can answer."""
        return not self._failed

    @property
    def deployed(self) -> list[Deployed]:
        return list(self._deployed.values())

    def load_all(self) -> None:
        """Load what the repository holds."""
        for name in self._repository.names():
            if name not in self._failed:
                self._try_load(name)

    def _try_load(self, name: str) -> None:
        try:
            self._load(name)
        except (EnsemergeError, OSError) as error:
            log.error("model '%s' cannot be loaded: %s", name, error)

    def get(self, name: str, version: str = "") -> Deployed:
        """The model to answer a request for `name` and `version` (empty: the newest). Raises NotFound, ValueError."""
        number = parse_version(version)
        deployed = self._deployed.get(name)
        if deployed is None:
            self._refuse(name)
        if number is not None and number != deployed.version:
            raise NotFound(
                f"Request for unknown model: '{name}' version {number} is not found; {deployed.version} is loaded"
            )
        return deployed

    def index(self) -> list[Entry]:
        """Every model of the repository, sorted by name."""
        ready = [Entry(model.name, str(model.version), "READY") for model in self._deployed.values()]
        failed = [Entry(name, "", "UNAVAILABLE", reason) for name, reason in self._failed.items()]
        return sorted(ready + failed, key=lambda entry: entry.name)

    def close(self) -> None:
        """Free every model, those that lean on others first."""
        for deployed in reversed(self._deployed.values()):
            deployed.close()

    def _refuse(self, name: str) -> NoReturn:
        if name in self._failed:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions: {self._failed[name]}")
        shown = name if len(name) <= 80 else name[:77] + "…"
        raise NotFound(f"Request for unknown model: '{shown}' is not found")

    def _load(self, name: str) -> Deployed:
        if name in self._deployed:
            return self._deployed[name]
        if name in self._failed:
            raise InvalidSpec(f"'{name}' cannot be loaded: {self._failed[name]}")
        if name in self._loading:
            raise InvalidSpec(f"models lean on each other in a circle: {' → '.join([*self._loading, name])}")
        self._loading.append(name)
        try:
            self._deployed[name] = self._built(name)
        except (EnsemergeError, OSError) as error:
            self._failed[name] = str(error)
            raise
        finally:
            self._loading.pop()
        return self._deployed[name]

    def _built(self, name: str) -> Deployed:
        spec = self._repository.spec(name)
        builder = self._builders.get(spec.kind)
        if builder is None:
            raise InvalidSpec(f"{spec.where}: unknown kind '{spec.kind}'; {suggest(spec.kind, list(self._builders))}")
        return builder(spec, self._resolve)

    def _resolve(self, name: str, version: int | None) -> Deployed:
        deployed = self._load(name)
        if version is not None and version != deployed.version:
            raise NotFound(f"'{name}' version {version} is not loaded; version {deployed.version} is")
        return deployed
