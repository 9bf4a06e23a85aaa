"""Which restoration a merged network needs: its graph tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ensemerge.graph.run import Arrays
from ensemerge.progress import Notify, silent
from ensemerge.repository import Check
from ensemerge.restore.batch_norm import restore_batch_norm
from ensemerge.restore.repair import repair


@dataclass(frozen=True)
class Restoration:
    """The restored network, what was done to it, in words, and what was measured afterwards."""

    model: ir.Model
    done: str
    check: Check


def restore(
    merged: ir.Model,
    parents: Sequence[ir.Model],
    feeds: Arrays,
    notify: Notify = silent,
    *,
    shares: Sequence[float] | None = None,
) -> Restoration:
    """Re-estimate statistics where the network has batch normalisation, else REPAIR it.

    `feeds` is unlabelled data, arrays `(rows, …)` by input name; `shares` says how much each parent counts. Raises
    what `restore_batch_norm` and `repair` raise.
    """
    if any(node.op_type == "BatchNormalization" for node in merged.graph):
        restored = restore_batch_norm(merged, feeds, notify)
        done = f"statistics estimated anew (BatchNormalization layers: {restored.layers})"
        return Restoration(restored.model, done, restored.check)
    repaired = repair(merged, parents, feeds, notify, shares=shares)
    done = f"REPAIR (layers: {repaired.layers}, dead channels: {repaired.dead_channels})"
    return Restoration(repaired.model, done, repaired.check)
