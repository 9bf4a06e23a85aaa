"""The model repository: a folder of models, each with numbered versions. All that passes from workshop to server.

    digits-a/                   a model's name
        model.yaml              optional for a plain ONNX model: kind, task, and what that kind wants to know
        1/                      a version
            model.onnx
            manifest.json       what it was made from, by which recipe, and what was checked

This file knows names, versions, manifests and the envelope of model.yaml (`kind`, `task`). The rest of model.yaml
belongs to the kind's owner. A version appears under its final name only when it is complete: it is written aside and
renamed. The server only reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ensemerge.errors import CheckFailed, InvalidModel, InvalidSpec, NotFound
from ensemerge.fields import Fields, suggest

MODEL_FILE = "model.onnx"
SPEC_FILE = "model.yaml"
MANIFEST_FILE = "manifest.json"
TASK_KINDS = ("classification", "regression", "embedding", "tokens", "detection")
SCALES = ("logits", "probabilities")
SPEC_BYTES_LIMIT = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Task:
    """What a model's answer means: which output holds it, on which scale, and what its classes are called."""

    kind: str
    output: str
    scale: str = "logits"
    classes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: object, where: str) -> Task:
        """Read `task:` of a model.yaml or a manifest. Raises InvalidSpec."""
        fields = Fields(value, where)
        task = cls(
            kind=fields.choose("kind", TASK_KINDS, "classification"),
            output=fields.take("output", str),
            scale=fields.choose("scale", SCALES, "logits"),
            classes=tuple(str(name) for name in fields.take("classes", list, [])),
        )
        fields.finish()
        if len(set(task.classes)) != len(task.classes):
            raise InvalidSpec(f"{where}: 'classes' names a class twice; expected each name once")
        return task

    def check(self, shapes: Mapping[str, Sequence[int | None]], where: str) -> None:
        """Compare with a model's outputs: their shapes by name, None where a size varies. Raises InvalidSpec."""
        if self.output not in shapes:
            raise InvalidSpec(f"{where}: output '{self.output}' is unknown; {suggest(self.output, list(shapes))}")
        if self.kind != "classification":
            return
        shape = list(shapes[self.output])
        if len(shape) != 2:
            raise InvalidSpec(f"{where}: a classification needs an output (batch, classes); '{self.output}' is {shape}")
        if self.classes and shape[1] not in (None, len(self.classes)):
            named = f"{len(self.classes)} classes are named"
            raise InvalidSpec(f"{where}: {named}, but '{self.output}' has {shape[1]} columns")


@dataclass(frozen=True)
class Check:
    """One promise that was tested while a version was built: what was measured, and what would have been too much."""

    name: str
    difference: float
    bound: float
    detail: str = ""

    @classmethod
    def measured(cls, name: str, difference: float, bound: float, detail: str) -> Check:
        """A promise that was kept. Raises CheckFailed when `difference` lies above `bound`, or is NaN."""
        if not difference <= bound:
            raise CheckFailed(
                f"{name}: {detail} is {difference:.2e}; expected at most {bound:.0e}",
                difference=difference,
                bound=bound,
            )
        return cls(name, difference, bound, detail)


@dataclass(frozen=True)
class Manifest:
    """Where a version comes from. `inputs` and `files` map a name to the SHA-256 of its bytes.

    `checks` are promises that were kept; `figures` what was measured without a promise.
    """

    kind: str
    task: Task | None
    inputs: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    checks: tuple[Check, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    made_by: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.json. Raises InvalidSpec."""
        fields = Fields(_parsed(path, json.loads), str(path))
        task = fields.take("task", dict, None)
        checks = fields.take("checks", list, [])
        manifest = cls(
            kind=fields.take("kind", str),
            task=None if task is None else Task.parse(task, f"{path}: task"),
            inputs=fields.take("inputs", dict, {}),
            recipe=fields.take("recipe", dict, {}),
            seed=fields.take("seed", int, None),
            checks=tuple(_check(check, f"{path}: checks") for check in checks),
            files=fields.take("files", dict, {}),
            members=tuple(str(name) for name in fields.take("members", list, [])),
            figures=fields.take("figures", dict, {}),
            made_by=fields.take("made_by", str, ""),
        )
        fields.finish()
        return manifest


@dataclass(frozen=True)
class Spec:
    """The envelope of a model.yaml. `body` is what remains for the kind's owner to read."""

    name: str
    kind: str
    task: Task | None
    body: Mapping[str, Any]
    where: str

    def fields(self) -> Fields:
        return Fields(self.body, self.where, taken=("kind", "task"))


@dataclass(frozen=True)
class Version:
    """One complete version of a model. `manifest` is None for a folder that somebody made by hand."""

    name: str
    number: int
    folder: Path
    manifest: Manifest | None

    @property
    def label(self) -> str:
        return f"{self.name}:{self.number}"

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL_FILE

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each file of the version but its manifest, by `name:version/file`."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
        return {f"{self.label}/{path.name}": sha256(path) for path in files}

    def verify(self) -> None:
        """Compare the files with the hashes of the manifest. Raises InvalidModel."""
        for name, expected in (self.manifest.files if self.manifest else {}).items():
            path = self.folder / name
            got = sha256(path) if path.is_file() else "no file"
            if got != expected:
                raise InvalidModel(
                    f"{path} is not the file that its manifest describes: expected SHA-256 {expected}, "
                    f"got {got}; build the version again"
                )


class Repository:
    """A folder of models.

    Raises NotFound when the folder is missing, InvalidSpec for names that are not usable.
    """

    def __init__(self, root: Path | str, *, create: bool = False) -> None:
        self.root = Path(root).resolve()
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        if not self.root.is_dir():
            raise NotFound(f"no model repository at {self.root}; expected a folder of <name>/<version>/{MODEL_FILE}")

    def names(self) -> list[str]:
        """Every folder with a usable name, sorted. Others are no models (`.git`, `__pycache__`, …)."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and is_name(path.name))

    def folder(self, name: str) -> Path:
        """Where the model `name` lives, or would. Raises InvalidSpec for a name that could leave the repository."""
        if not is_name(name):
            raise InvalidSpec(
                f"'{name[:80]}' is no model name: expected letters, digits, '.', '_' and '-', at most 128, "
                "beginning with a letter or a digit"
            )
        return self.root / name

    def spec(self, name: str) -> Spec:
        """What `name`/model.yaml says; a folder without one is a plain ONNX model. Raises NotFound, InvalidSpec."""
        path = self._existing(name) / SPEC_FILE
        fields = Fields(_parsed(path, yaml.safe_load) or {} if path.exists() else {}, f"{name}/{SPEC_FILE}")
        kind = fields.take("kind", str, "onnx")
        task = fields.take("task", dict, None)
        where = fields.where
        parsed_task = None if task is None else Task.parse(task, f"{where}: task")
        return Spec(name, kind, parsed_task, fields.rest(), where)

    def versions(self, name: str) -> list[int]:
        """The numbers of `name`'s versions, ascending. Raises NotFound."""
        folder = self._existing(name)
        return sorted(int(path.name) for path in folder.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir())

    def version(self, name: str, number: int | None = None) -> Version:
        """One version of `name`, by default the newest. Raises NotFound, InvalidSpec (its manifest)."""
        numbers = self.versions(name)
        if not numbers:
            raise NotFound(
                f"model '{name}' has no version: expected {name}/1/{MODEL_FILE}; `ensemerge build` makes one"
            )
        number = numbers[-1] if number is None else number
        if number not in numbers:
            raise NotFound(f"model '{name}' has no version {number}; it has {', '.join(map(str, numbers))}")
        folder = self.folder(name) / str(number)
        manifest = folder / MANIFEST_FILE
        return Version(name, number, folder, Manifest.read(manifest) if manifest.exists() else None)

    def write_spec(self, name: str, spec: Mapping[str, Any]) -> None:
        """Write `name`/model.yaml, whole or not at all."""
        folder = self.folder(name)
        folder.mkdir(exist_ok=True)
        aside = folder / f".{SPEC_FILE}"
        with aside.open("w") as file:
            yaml.safe_dump(dict(spec), file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / SPEC_FILE)

    def publish(self, name: str, fill: Callable[[Path], Manifest]) -> Version:
        """Add a version: `fill` writes its files into an empty folder and returns the manifest.

        The folder gets its number only when everything in it is on disk. Whatever `fill` raises leaves no trace.
        """
        folder = self.folder(name)
        new = not folder.exists()
        folder.mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        try:
            manifest = fill(aside)
            hashes = {path.name: sha256(path) for path in sorted(aside.iterdir())}
            (aside / MANIFEST_FILE).write_text(_with_files(manifest, hashes).to_json())
            _flush(aside)
            number = self._claim(name, aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        return self.version(name, number)

    def _claim(self, name: str, aside: Path) -> int:
        """Rename a finished folder to the next free number; somebody else may be building the same model."""
        aside.chmod(0o755)
        number = (self.versions(name) or [0])[-1] + 1
        while True:
            try:
                aside.rename(aside.parent / str(number))
            except OSError:
                if not (aside.parent / str(number)).exists():
                    raise
                number += 1
            else:
                _flush_folder(aside.parent)
                return number

    def _existing(self, name: str) -> Path:
        folder = self.folder(name)
        if not folder.is_dir():
            raise NotFound(f"no model '{name}' in {self.root}; it has: {', '.join(self.names()) or 'none'}")
        return folder


def is_name(text: str) -> bool:
    """Whether `text` can name a model: nothing that could lead out of the repository or hide in it."""
    return _NAME.fullmatch(text) is not None


def parse_version(text: str) -> int | None:
    """The version that a client named: None for the newest. Raises ValueError for anything else."""
    if not text:
        return None
    if not _VERSION.fullmatch(text):
        raise ValueError(text)
    return int(text)


def parse_reference(text: str) -> tuple[str, int | None]:
    """`name` or `name:version`, as a model.yaml names another model. Raises InvalidSpec."""
    name, _, version = text.partition(":")
    if not is_name(name) or (version and not _VERSION.fullmatch(version)) or text.endswith(":"):
        raise InvalidSpec(f"'{text[:80]}' names no model; expected name or name:version, such as digits-a:2")
    return name, int(version) if version else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    if path.stat().st_size > SPEC_BYTES_LIMIT:
        raise InvalidSpec(f"{path} is {path.stat().st_size} bytes; expected at most {SPEC_BYTES_LIMIT}")
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InvalidSpec(f"{path} cannot be read: {error}") from error


def _check(value: object, where: str) -> Check:
    fields = Fields(value, where)
    check = Check(
        fields.take("name", str),
        fields.take("difference", float),
        fields.take("bound", float),
        fields.take("detail", str, ""),
    )
    fields.finish()
    return check


def _with_files(manifest: Manifest, hashes: Mapping[str, str]) -> Manifest:
    return replace(manifest, files=hashes)


def _flush(folder: Path) -> None:
    """Bring a folder and its files to disk: a version that a crash emptied must not carry its final name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
