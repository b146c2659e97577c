"""`train.mixture`: the weight of each source in a run, and in its phases.

mixture: null                              all tokens of all sources, as one stream
mixture: {web: 7, code: 2, books: 1}       the same weights for the whole run
mixture:                                   phases, each until a part of the run's samples
  - {until: 0.8, weights: {web: 7, code: 2, books: 1}}
  - {until: 1.0, weights: {web: 1, code: 1, books: 2}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import nearest

Value = dict[str, float] | list[dict[str, Any]] | None
"""A valid `train.mixture`, as JSON; all weights are floats."""

MOST_PHASES = 100
_KEYS = ("until", "weights")
_MAX_WEIGHT = 1e12


def parse(value: Any) -> Value:
    """Validate `train.mixture`, without the names of the sources.

    Raises:
        ValueError: What is wrong with it, and where.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        if set(value) <= set(_KEYS) and isinstance(value.get("weights"), Mapping):
            raise ValueError("one phase: write its weights alone, or a list of phases")
        return _weights(value, "")
    if not isinstance(value, list):
        raise ValueError(f"{_shown(value)} is neither null, nor weights by source, nor phases")
    if not 1 <= len(value) <= MOST_PHASES:
        raise ValueError(f"{len(value)} phases: give 1 to {MOST_PHASES}, or null")
    phases: list[dict[str, Any]] = []
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping) or set(entry) != set(_KEYS):
            raise ValueError(f"{number}: not a phase; write {{until: 0.8, weights: {{web: 7}}}}")
        before = phases[-1]["until"] if phases else 0.0
        until = _number(entry["until"], f"{number}.until")
        if not before < until <= 1:
            raise ValueError(
                f"{number}.until: {until:g} is not above {before:g} (where the phase begins) and "
                "at most 1"
            )
        weights = _weights(entry["weights"], f"{number}.weights")
        phases.append({"until": until, "weights": weights})
    if phases[-1]["until"] != 1:
        last = phases[-1]["until"]
        raise ValueError(f"{len(phases) - 1}.until: {last:g}, but the last phase must end at 1.0")
    return phases


def _weights(weights: Any, where: str) -> dict[str, float]:
    of = f"{where}: " if where else ""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{of}{_shown(weights)} is no weight per source, such as {{web: 7}}")
    found = {}
    for name, weight in weights.items():
        key = f"{where}.{_shown(name)}" if where else _shown(name)
        if not isinstance(name, str):
            raise ValueError(f'{key}: not the name of a source; a name is text: "{_shown(name)}"')
        found[name] = _number(weight, key)
        if not 0 <= found[name] <= _MAX_WEIGHT:
            raise ValueError(f"{key}: {found[name]:g} is no weight; give a number from 0 to 1e12")
    if not any(found.values()):
        raise ValueError(f"{of}all weights are 0; give a source a positive one")
    return dict(sorted(found.items()))


def _number(value: Any, key: str) -> float:
    """Return a number as a plain float; that of a YAML parser may be of a class of its own."""
    if isinstance(value, str):
        raise ValueError(f"{key}: {_shown(value)!r} is text; write a number, without quotes")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{key}: {_shown(value)} is not a number; write one")
    try:
        return float(value) + 0.0  # -0.0 is 0
    except OverflowError:
        raise ValueError(f"{key}: larger than any float; write a smaller number") from None


def _shown(value: Any) -> str:
    return printable(str(value))[:40]


def phases_of(mixture: Value) -> list[tuple[float, dict[str, float]]]:
    """Return (until, weights) of each phase of a mixture."""
    assert mixture is not None
    if isinstance(mixture, dict):
        return [(1.0, mixture)]
    return [(phase["until"], phase["weights"]) for phase in mixture]


def check_names(mixture: Value, sources: Sequence[str], where: str = "params.yaml") -> None:
    """Refuse a mixture that does not weigh exactly the sources that there are.

    Args:
        where: Names the parameters in messages.

    Raises:
        UserError: Names the source.
    """
    if mixture is None:
        return
    is_list = isinstance(mixture, list)
    for number, (_, weights) in enumerate(phases_of(mixture)):
        key = f"{where}: train.mixture" + (f".{number}.weights" if is_list else "")
        for name in weights:
            if name not in sources:
                raise UserError(f"{key}.{name}: no such source; {nearest(name, [*sources])}")
        if missing := sorted(set(sources) - set(weights)):
            raise UserError(
                f"{key}.{missing[0]}: missing; add it, with weight 0 to leave the source out"
            )
