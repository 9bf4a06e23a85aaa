"""How a recipe names a model, and where that model lies on this machine. Nothing is ever downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemerge.errors import InvalidSpec, NotFound
from ensemerge.fields import Fields, describe

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class ModelPath:
    """A file or folder, or a repository of the Hugging Face Hub, and there a branch, tag or commit."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it: its weights, and a LoRA adapter that is added to them."""

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: str | None = None  # believed instead of what config.json says

    def __str__(self) -> str:
        return str(self.model) if self.lora is None else f"{self.model}+{self.lora}"


def parse_model(value: object, where: str) -> ModelReference:
    """Read `path_or_repo[@revision][+lora[@revision]]`, or `{model, lora, override_architecture}`. Raises InvalidSpec.

    In the mapping a path may also be `{path, revision}`, which takes any character: a folder called `a+b`.
    """
    if isinstance(value, str):
        return _parse_text(value, where)
    if not isinstance(value, Mapping):
        raise InvalidSpec(f"{where}: expected a path, a repository or a mapping {{model, lora}}, got {describe(value)}")
    fields = Fields(value, where)
    model = _parse_path(fields.take("model", object), f"{where}: 'model'")
    lora = fields.take("lora", object, None)
    architecture = fields.take("override_architecture", str, None)
    fields.finish()
    return ModelReference(model, None if lora is None else _parse_path(lora, f"{where}: 'lora'"), architecture)


def _parse_text(text: str, where: str) -> ModelReference:
    parts = text.split("+")
    if len(parts) > 2:
        raise InvalidSpec(
            f"{where}: '{text}' has more than one '+'; expected model+adapter, or, for a path that holds one, "
            "{model: {path: …}}"
        )
    paths = [_parse_path(part, where) for part in parts]
    return ModelReference(paths[0], paths[1] if len(paths) == 2 else None)


def _parse_path(value: object, where: str) -> ModelPath:
    if isinstance(value, Mapping):
        fields = Fields(value, where)
        path = ModelPath(fields.take("path", str), fields.take("revision", str, None))
        fields.finish()
    elif isinstance(value, str):
        name, at, revision = value.partition("@")
        if "@" in revision or (at and not revision):
            raise InvalidSpec(f"{where}: '{value}' names no revision; expected one '@' and a revision after it")
        path = ModelPath(name, revision or None)
    else:
        raise InvalidSpec(f"{where}: expected a path or a repository, got {describe(value)}")
    if not path.path.strip():
        raise InvalidSpec(f"{where}: an empty name; expected a path or a repository such as org/name")
    return path


def locate(path: ModelPath, folder: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Where a model lies: beside the recipe in `folder`, in the working directory, or in Hugging Face's cache.

    A path with a revision is looked for in the cache alone: folders have no revisions. Raises NotFound.
    """
    tried = [] if path.revision is not None else _local_candidates(path, folder)
    for candidate in tried:
        if candidate.exists():
            return candidate
    if _REPOSITORY.fullmatch(path.path):
        cached = hub_cache(environment) / f"models--{path.path.replace('/', '--')}"
        snapshot = _snapshot(cached, path.revision or "main")
        if snapshot is not None:
            return snapshot
        tried.append(cached)
    raise NotFound(_missing(path, tried))


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder in which Hugging Face's tools keep what they downloaded."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "huggingface" / "hub"


def _local_candidates(path: ModelPath, folder: Path) -> list[Path]:
    local = Path(path.path).expanduser()
    return list(dict.fromkeys([folder / local, Path.cwd() / local]))


def _snapshot(cached: Path, revision: str) -> Path | None:
    """A revision is a commit, or the name of one: a small file under refs holds which."""
    if not _REVISION.fullmatch(revision) or ".." in revision.split("/"):
        return None
    reference = cached / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = cached / "snapshots" / commit
    return snapshot if re.fullmatch(r"[\w-]+", commit) and snapshot.is_dir() else None


def _missing(path: ModelPath, tried: list[Path]) -> str:
    looked = ", ".join(map(str, tried)) or "nowhere: it is no name of a repository"
    message = f"no model '{path}' on this machine; looked for it at: {looked}"
    if not _REPOSITORY.fullmatch(path.path):
        return f"{message}; expected a file or folder, or a repository such as org/name"
    revision = "" if path.revision is None else f" --revision {path.revision}"
    return f"{message}; to fetch it: huggingface-cli download {path.path}{revision}"
