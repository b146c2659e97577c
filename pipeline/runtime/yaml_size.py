"""The size of a YAML document with its aliases expanded.

Loaders keep aliases as references, so a document of a few hundred bytes may hold 10^30 values: what
copies, compares or prints it never ends. Parsers yield events without that risk.
"""

from collections.abc import Iterable
from typing import Any

_MAX_SIZE = 1 << 24  # values and characters; the largest cards of the hub have 2 million
_MAX_DEPTH = 64  # loaders recurse


def check_size(events: Iterable[Any]) -> None:
    """Check a document before it is loaded.

    Args:
        events: From `parse` of PyYAML or ruamel.yaml.

    Raises:
        ValueError: The document is nested too deeply, or too large with its aliases expanded.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, size so far
    for event in events:
        kind, anchor = type(event).__name__, getattr(event, "anchor", None)
        if kind in ("MappingStartEvent", "SequenceStartEvent"):
            open_nodes.append((anchor, 1))
            if len(open_nodes) > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
            continue
        if kind == "AliasEvent":
            size = sizes.get(anchor or "", _MAX_SIZE)  # an alias within its own node is endless
        elif kind == "ScalarEvent":
            size = 1 + len(event.value)
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            anchor, size = open_nodes.pop()
        else:
            continue
        if anchor and kind != "AliasEvent":
            sizes[anchor] = size
        outer, total = open_nodes[-1]
        if total + size >= _MAX_SIZE:
            raise ValueError("its aliases make it too large; write the values out")
        open_nodes[-1] = (outer, total + size)
