"""What the names of tensors tell: layers, embeddings and heads, and names that differ by a prefix alone.

No list of architectures is needed: a numbered segment of a name is a layer (`model.layers.7.mlp.up_proj.weight`,
`h.7.attn.c_attn.weight`), and numbers after it (experts, blocks) belong to that layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The names that the field gives to the table of token embeddings and to the projection onto the vocabulary.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
HEADS = ("lm_head", "embed_out", "output", "decoder")

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EARLY = re.compile(r"embed(?!_out).*|.*embed|.*embeddings?(_.*)?|wte|wpe|cls_token|class_token|pos_.*|position.*")


@dataclass(frozen=True)
class ModelNames:
    """What the layout must know of a model: its tensors, which of them are others', and its config.json."""

    names: Sequence[str]
    ties: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LayerName:
    """A tensor's name in three: the family of layers, the number, and the rest."""

    family: str
    index: int
    rest: str

    def at(self, index: int) -> str:
        """The same tensor of another layer."""
        return f"{self.family}.{index}.{self.rest}" if self.family else f"{index}.{self.rest}"


def layer_of(name: str) -> LayerName | None:
    """The layer that a tensor belongs to; None for embeddings, final norms and heads."""
    found = _LAYER.search(name)
    return None if found is None else LayerName(name[: found.start()], int(found[1]), name[found.end() :])


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """How many layers each family has."""
    counts: dict[str, int] = {}
    for layer in filter(None, map(layer_of, names)):
        counts[layer.family] = max(counts.get(layer.family, 0), layer.index + 1)
    return counts


def comes_early(name: str) -> bool:
    """Whether a tensor without a layer stands before the layers (embeddings), not after them (final norm, head)."""
    return any(_EARLY.fullmatch(segment) for segment in name.split("."))


def is_embedding(name: str) -> bool:
    """Whether this is the weight of a table of token embeddings."""
    return _owner(name) in EMBEDDINGS and layer_of(name) is None


def is_head(name: str) -> bool:
    """Whether this is the weight of a projection onto the vocabulary."""
    return _owner(name) in HEADS and layer_of(name) is None


def _owner(name: str) -> str:
    segments = name.split(".")
    return segments[-2] if len(segments) > 1 and segments[-1] == "weight" else ""


def config_value(config: Mapping[str, Any] | None, key: str) -> Any:
    """A key of config.json, or of its `text_config` where a model has several parts; None where it says nothing."""
    for part in (config or {}, (config or {}).get("text_config")):
        if isinstance(part, Mapping) and part.get(key) is not None:
            return part[key]
    return None


def tied_embedding(model: ModelNames, head: str) -> str | None:
    """The embedding that a model without `head` uses as its head; None where its config says that it has its own.

    Checkpoints leave a tied head out, and a config that says nothing means tied (transformers' default).
    """
    if config_value(model.config, "tie_word_embeddings") is False or model.config is None or not is_head(head):
        return None
    tables = [name for name in model.names if is_embedding(name)]
    shared = [name for name in tables if name.split(".")[:-2] == head.split(".")[:-2]]
    found = shared if len(tables) > 1 else tables
    return found[0] if len(found) == 1 else None


def prefix_map(names: Sequence[str], reference: Sequence[str]) -> dict[str, str] | None:
    """`{reference's name: own name}` where one leading segment (`model.`) is all that differs; None where it is not."""
    known = set(reference)
    if 2 * len(known.intersection(names)) >= min(len(names), len(reference)):
        return None
    found = []
    for prefix in {name.partition(".")[0] for name in reference if "." in name}:
        found.append({name if name in known else f"{prefix}.{name}": name for name in names})
    for prefix in {name.partition(".")[0] for name in names if "." in name}:
        found.append({name if name in known else name.removeprefix(f"{prefix}."): name for name in names})
    fits = [mapping for mapping in found if len(mapping) == len(names) and _nested(set(mapping), known)]
    return fits[0] if len(fits) == 1 else None


def _nested(one: set[str], other: set[str]) -> bool:
    return one <= other or other <= one
