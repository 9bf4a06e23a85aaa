"""The plan of a merge as a table in the terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ensemerge.merge.plan import MergePlan, Output
from ensemerge.merge.sizes import show_size


def show_plan(plan: MergePlan, seconds: float, console: Console) -> None:
    """Print what a merge would do."""
    table = Table("output", "tensors", "merged", "read", "written", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for output in plan.outputs:
        read = sum(source.reader.info(source.name).nbytes for job in output.jobs for source in job.inputs)
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in _kinds(plan, output).items())
        row = (output.folder or "the model", f"{len(output.jobs):,}", kinds, show_size(read), show_size(output.nbytes))
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(
        f"\n{show_size(plan.read_bytes)} pass through in all, {show_size(plan.write_bytes)} are written; about "
        f"{seconds:.1f} s on {plan.machine.threads} threads ({plan.machine.device}) if the disk keeps up; "
        f"at most {show_size(plan.memory_bytes)} of memory",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def plan_facts(plan: MergePlan, seconds: float) -> dict[str, Any]:
    """The same for a script."""
    return {
        "outputs": {output.folder: {"tensors": len(output.jobs), "bytes": output.nbytes} for output in plan.outputs},
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "memory_bytes": plan.memory_bytes,
        "threads": plan.machine.threads,
        "device": str(plan.machine.device),
        "seconds": seconds,
        "notes": list(plan.notes),
    }


def _kinds(plan: MergePlan, output: Output) -> Counter[str]:
    return Counter("copied" if job.method is None else plan.method for job in output.jobs)
