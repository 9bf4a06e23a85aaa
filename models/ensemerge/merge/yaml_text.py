"""YAML that a person wrote, read safely: no objects, no key twice, no few lines that unfold into millions."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ensemerge.errors import InvalidSpec

BYTES_LIMIT = 1 << 20
NODES_LIMIT = 100_000


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; the first was meant as well, so it is an error here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_documents(text: str, where: str) -> list[Any]:
    """All documents of a YAML text, empty ones left out. Raises InvalidSpec."""
    if len(text) > BYTES_LIMIT:
        raise InvalidSpec(f"{where} has {len(text)} characters; expected at most {BYTES_LIMIT}")
    try:
        for node in yaml.compose_all(text, yaml.SafeLoader):
            _unfolded(node, {}, where)
        documents = list(yaml.load_all(text, _StrictLoader))
    except (ValueError, yaml.YAMLError, RecursionError, TypeError) as error:
        raise InvalidSpec(f"{where} cannot be read as YAML: {error}") from error
    return [document for document in documents if document is not None]


def _unfolded(node: yaml.Node, sizes: dict[int, int | None], where: str) -> int:
    """How many nodes there are when every alias is written out. Raises InvalidSpec for too many, or for a circle."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise InvalidSpec(f"{where}: an alias leads to itself; write out what is meant")
    if known:
        return known
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    size = 1 + sum(_unfolded(child, sizes, where) for child in children)
    if size > NODES_LIMIT:
        raise InvalidSpec(f"{where}: its aliases unfold into more than {NODES_LIMIT} entries; write it out plainly")
    sizes[id(node)] = size
    return size
