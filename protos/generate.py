"""Generate the Python of every .proto beside it: `make protos`, or `--check` to see that nothing changed.

The messages go into a descriptor pool of our own. protobuf's default pool is one name space per process, and
`inference.*` also belongs to tritonclient, KServe and MLServer: with two definitions in it, whichever package
is imported second fails. With `POOL` an application can import ours beside any of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOM = Path(__file__).parent
PACKAGE = "ensemerge_protos"
DEFAULT_POOL = "_descriptor_pool.Default()"
POOL_IMPORT = "from google.protobuf import descriptor_pool as _descriptor_pool\n"


def generate(target: Path) -> None:
    """Write `<name>_pb2.py` and `<name>_pb2.pyi` for every proto of the package under `target`."""
    sources = sorted(str(path) for path in (ROOM / PACKAGE).glob("*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    status = protoc.main(
        ["protoc", f"-I{ROOM}", f"-I{well_known}", f"--python_out={target}", f"--pyi_out={target}", *sources]
    )
    if status != 0:
        raise SystemExit(status)
    for module in sorted((target / PACKAGE).glob("*_pb2.py")):
        module.write_text(into_own_pool(module.read_text()))


def into_own_pool(code: str) -> str:
    """Redirect one generated module from protobuf's default pool to `ensemerge_protos.POOL`."""
    if code.count(DEFAULT_POOL) != 1 or POOL_IMPORT not in code:
        raise SystemExit("the generator's output has changed: expected one use of the default descriptor pool")
    return code.replace(POOL_IMPORT, f"from {PACKAGE} import POOL as _POOL\n").replace(DEFAULT_POOL, "_POOL")


def stale(fresh: Path) -> list[str]:
    """Names of generated files that differ from those in the repository."""
    generated = sorted((fresh / PACKAGE).iterdir())
    return [path.name for path in generated if path.read_bytes() != _committed(path.name)]


def _committed(name: str) -> bytes:
    path = ROOM / PACKAGE / name
    return path.read_bytes() if path.exists() else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    if not parser.parse_args().check:
        generate(ROOM)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if names := stale(Path(folder)):
            sys.exit(f"out of date: {', '.join(names)}; run `make protos` and commit the result")


if __name__ == "__main__":
    main()
