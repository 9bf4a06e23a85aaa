"""Whether `--memory` is a bound: three models of 2 GiB under 512 MiB, and the same bytes as with 4 GiB.

python benchmarks/merging_memory.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from checkpoints import Llama, make_family
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

# 1.07 billion parameters; the embedding and the head are 200 MB each.
TWO_GIB = Llama(hidden=2048, intermediate=5632, layers=18, heads=16, vocabulary=49152)
TIGHT, WIDE = "512MiB", "4GiB"
ALLOWED_BYTES = (512 + 150) << 20
METHODS = ("linear", "ties", "dare_linear", "model_stock")


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge with both bounds; assert the peak and that the hashes agree."""
    options = _parser().parse_args(arguments)
    data: Path = options.data
    if not (data / "base").exists():
        make_family(data, TWO_GIB, tuned=2)
    table = Table("method", "peak under 512 MiB", "peak under 4 GiB", "seconds", "SHA-256", box=SIMPLE_HEAD)
    with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
        for method in options.methods:
            tight, digest = _merged(method, TIGHT, data, Path(scratch))
            wide, other = _merged(method, WIDE, data, Path(scratch))
            assert digest == other, f"{method}: the bytes depend on the memory"
            assert tight["peak_bytes"] <= ALLOWED_BYTES, f"{method}: a peak of {tight['peak_bytes'] >> 20} MiB"
            peaks = [f"{facts['peak_bytes'] >> 20} MiB" for facts in (tight, wide)]
            seconds = f"{tight['merge_seconds']:.0f} and {wide['merge_seconds']:.0f}"
            table.add_row(method, *peaks, seconds, digest[:16])
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def _merged(method: str, memory: str, data: Path, scratch: Path) -> tuple[dict[str, Any], str]:
    """What the command says of itself, and the hash of what it wrote."""
    recipe, out = scratch / "recipe.yaml", scratch / "out"
    recipe.write_text(yaml.safe_dump(_recipe(method, data)))
    command = [sys.executable, "-m", "ensemerge.cli", "merge", str(recipe), "--out", str(out)]
    done = subprocess.run([*command, "--memory", memory, "--json"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    return json.loads(done.stdout), digest.hexdigest()


def _recipe(method: str, data: Path) -> dict[str, Any]:
    parameters = {"linear": {"weight": 1.0}, "model_stock": {}}.get(method, {"weight": 1.0, "density": 0.5})
    names = ["base", "tuned-1", "tuned-2"] if method == "linear" else ["tuned-1", "tuned-2"]
    models = [{"model": str(data / name), "parameters": parameters} for name in names]
    return {"merge_method": method, "base_model": str(data / "base"), "models": models}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/merging_memory.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "memory-benchmark", help="checkpoints"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
