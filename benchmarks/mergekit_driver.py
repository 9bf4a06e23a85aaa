"""Run recipes with mergekit, in mergekit's own environment: nothing here imports ensemerge.

    python benchmarks/mergekit_driver.py FOLDER

FOLDER holds the checkpoints and `NAME.yaml` for each recipe, whose models are paths in FOLDER. Each merge goes to
FOLDER/mergekit/NAME; FOLDER/mergekit.json says which version ran, and why a recipe failed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch


def uniforms(count: int) -> np.ndarray:
    """`(count,) float32` in [0, 1), from `count` alone: who knows a tensor's size draws the same numbers."""
    return np.random.Generator(np.random.PCG64(count)).random(count, np.float32)


def _bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
    """What stands in for `torch.bernoulli`: each element is 1 where its uniform number lies below its probability."""
    drawn = torch.from_numpy(uniforms(probabilities.numel())).reshape(probabilities.shape)
    return (drawn < probabilities).to(probabilities.dtype)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Without chance: numbers that the other side has too, and equal magnitudes sorted by their place.

    torch's own sort leaves equals in an order that depends on the processor.
    """
    argsort, sort = torch.argsort, torch.sort
    with (
        mock.patch.object(torch, "bernoulli", _bernoulli),
        mock.patch.object(torch, "argsort", partial(argsort, stable=True)),
        mock.patch.object(torch, "sort", partial(sort, stable=True)),
    ):
        yield


def _merge(recipe: Path, out: Path) -> str | None:
    """Run one recipe; returns what was wrong with it."""
    import yaml
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
    from mergekit.merge import run_merge  # type: ignore[import-not-found]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found]

    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    try:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text())), str(out), options)
    except Exception as error:  # a recipe that it refuses is a finding too, whatever the exception
        return f"{type(error).__name__}: {error}"
    return None


def main(folder: Path) -> None:
    """Run all recipes, on one thread."""
    logging.disable(logging.CRITICAL)  # what failed is reported
    torch.set_num_threads(1)
    os.chdir(folder)  # a relative path is what mergekit calls a local model
    recipes = sorted(Path().glob("*.yaml"))
    with _repeatable():
        failed = {recipe.stem: _merge(recipe, Path("mergekit") / recipe.stem) for recipe in recipes}
    Path("mergekit.json").write_text(json.dumps({"version": version("mergekit"), "failed": failed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
