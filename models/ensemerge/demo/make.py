"""Make the demo's models: train, export, merge, ensemble, and declare the experiment."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from ensemerge.build import build
from ensemerge.demo.digits import CLASSES, TRAFFIC, Images
from ensemerge.demo.networks import REQUIRED_ACCURACY, TRAININGS, DigitNet, Training, held_out_accuracy, train
from ensemerge.export import InputSpec, Provenance, publish_module
from ensemerge.progress import Notify
from ensemerge.repository import Check, Repository, Task, sha256
from ensemerge.threads import one_thread

MEMBERS = ("digits-a", "digits-b", "digits-c")
STRANGERS = ("digits-x", "digits-y")
ENSEMBLE, MERGED, EXPERIMENT = "digits-ensemble", "digits-merged", "digits"
COLLAPSED, ALIGNED = "digits-collapsed", "digits-aligned"
CALIBRATION = "calibration.npz"
CALIBRATION_SEED = 31
UNIT = "user_id"

SPECS: dict[str, dict[str, object]] = {
    ENSEMBLE: {"kind": "ensemble", "members": list(MEMBERS), "combine": "mean_probability"},
    MERGED: {
        "kind": "merge",
        "merge_method": "linear",
        "models": [{"model": name} for name in MEMBERS],
        "calibration": {"data": CALIBRATION, "restore": "batch_norm"},
    },
    COLLAPSED: {"kind": "merge", "merge_method": "linear", "models": [{"model": name} for name in STRANGERS]},
    ALIGNED: {
        "kind": "merge",
        "merge_method": "mudsc",
        "models": [{"model": name} for name in STRANGERS],
        "parameters": {"alpha": 0.5},
        "calibration": {"data": CALIBRATION, "restore": "batch_norm"},
    },
}
CALIBRATED = (MERGED, ALIGNED)
EXPERIMENT_SPEC: dict[str, object] = {
    "kind": "experiment",
    "arms": {"ensemble": {"model": ENSEMBLE, "weight": 50}, "merged": {"model": MERGED, "weight": 50}},
    "unit": UNIT,
    "mode": "split",
}


def make_models(repository: Repository, train_images: Images, held_out: Images, notify: Notify) -> None:
    """Fill the repository. What it holds already, made in the same way, is kept. Raises CheckFailed."""
    _train_and_export(repository, train_images, held_out, notify)
    for name, spec in SPECS.items():
        repository.write_spec(name, spec)
    _write_calibration(repository, train_images)
    for name in SPECS:
        if not _is_built(repository, name):
            build(repository, name, _prefixed(notify, name))
    repository.write_spec(EXPERIMENT, EXPERIMENT_SPEC)


def _prefixed(notify: Notify, name: str) -> Notify:
    return lambda stage, done, total: notify(f"{name}: {stage}", done, total)


def _train_and_export(repository: Repository, train_images: Images, held_out: Images, notify: Notify) -> None:
    if all(_is_made(repository, name) for name in TRAININGS):
        notify("networks are there from an earlier run", 1, 1)
        return
    networks: dict[str, DigitNet] = {}
    for name, training in TRAININGS.items():
        start = networks[training.start] if training.start else None
        with one_thread():
            networks[name] = train(name, train_images, start, notify)
        check = _check_accuracy(name, held_out_accuracy(networks[name], held_out))
        _export(repository, name, networks[name], training, check)


def _check_accuracy(name: str, accuracy: float) -> Check:
    detail = f"share of held-out digits that {name} names wrongly"
    return Check.measured("held_out_error", 1 - accuracy, 1 - REQUIRED_ACCURACY, detail)


def _export(repository: Repository, name: str, network: DigitNet, training: Training, check: Check) -> None:
    publish_module(
        repository,
        name,
        network,
        [InputSpec("image", (1, 8, 8))],
        task=Task("classification", "logits", "logits", CLASSES),
        provenance=Provenance(recipe={"training": _recipe(training)}, seed=training.seed, checks=(check,)),
    )


def _recipe(training: Training) -> dict[str, object]:
    return {**asdict(training), "torch": torch.__version__}


def _is_made(repository: Repository, name: str) -> bool:
    """Whether the newest version of `name` came from the same training."""
    if name not in repository.names() or not repository.versions(name):
        return False
    manifest = repository.version(name).manifest
    return manifest is not None and manifest.recipe.get("training") == _recipe(TRAININGS[name])


def _is_built(repository: Repository, name: str) -> bool:
    """Whether the newest version of `name` is what a build would make now: the same recipe from the same files."""
    spec = repository.spec(name)
    if not repository.versions(name):
        return False
    manifest = repository.version(name).manifest
    hashes = {CALIBRATION: sha256(repository.folder(name) / CALIBRATION)} if name in CALIBRATED else {}
    inputs = {f"{name}/{file}": digest for file, digest in hashes.items()}
    for source in STRANGERS if name in (COLLAPSED, ALIGNED) else MEMBERS:
        inputs |= repository.version(source).hashes()
    return manifest is not None and (manifest.recipe, manifest.inputs) == (spec.body, inputs)


def _write_calibration(repository: Repository, images: Images) -> None:
    """Unlabelled inputs like those the merged models will see: training images, distorted as traffic is."""
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    pixels = TRAFFIC(images.pixels, generator).numpy()
    for name in CALIBRATED:
        np.savez(repository.folder(name) / CALIBRATION, image=pixels)
