"""Heuristic filters: published rules about counts of words, lines and characters.

`measure` reads the text and counts; a rule compares a count, or the quotient of two, with a
threshold. The counts are stored, so a changed threshold reads no text.

Sources: Gopher (Rae et al., 2021, appendix A), C4 (Raffel et al., 2020, 2.2), FineWeb (Penedo et
al., 2024, 3.6). Where a paper leaves a choice, it is datatrove's, which FineWeb was made with.
"""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import numpy as np

from pipeline.curate import quality
from pipeline.curate.quality import Counts, Limits
from pipeline.curate.repetition import GREEDY, TOP, gopher_repetition
from pipeline.curate.surface import Surface
from pipeline.curate.words import Texts, pieces

__all__ = ["SETS", "Counts", "Limits", "Rule", "dropped", "measure", "values"]


class Rule(NamedTuple):
    """A comparison that drops a row."""

    name: str
    counted: str
    """Name of a count."""
    per: str | None
    """Name of the count that it is divided by, or None."""
    limit: Literal["min", "max"]
    """Whether a row is dropped below or above the threshold."""
    threshold: float
    """As published."""


_TOP = dict(zip(TOP, (0.20, 0.18, 0.16), strict=True))
_GREEDY = dict(zip(GREEDY, (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True))

SETS: Mapping[str, tuple[Rule, ...]] = {
    "gopher_repetition": (
        Rule("max_repeated_paragraphs", "repeated_paragraphs", "paragraphs_split", "max", 0.30),
        Rule("max_repeated_paragraph_chars", "repeated_paragraph_chars", "chars", "max", 0.20),
        Rule("max_repeated_lines", "repeated_lines", "lines_split", "max", 0.30),
        Rule("max_repeated_line_chars", "repeated_line_chars", "chars", "max", 0.20),
        *(Rule(f"max_top_{n}_gram", f"top_{n}_chars", "chars", "max", t) for n, t in _TOP.items()),
        *(
            Rule(f"max_repeated_{n}_grams", f"repeated_{n}_chars", "chars", "max", t)
            for n, t in _GREEDY.items()
        ),
    ),
    "gopher_quality": (
        Rule("min_words", "plain_words", None, "min", 50),
        Rule("max_words", "plain_words", None, "max", 100_000),
        Rule("min_word_length", "plain_word_chars", "plain_words", "min", 3),
        Rule("max_word_length", "plain_word_chars", "plain_words", "max", 10),
        Rule("max_hashes", "hashes", "words", "max", 0.1),
        Rule("max_ellipses", "ellipses", "words", "max", 0.1),
        Rule("max_bullet_lines", "bullet_lines", "lines", "max", 0.9),
        Rule("max_ellipsis_lines", "ellipsis_lines", "lines", "max", 0.3),
        Rule("min_alpha_words", "alpha_words", "words", "min", 0.8),
        Rule("min_stop_words", "stop_words", None, "min", 2),
    ),
    "c4": (
        Rule("max_lorem_ipsum", "lorem_ipsum", None, "max", 0),
        Rule("max_curly_brackets", "curly_brackets", None, "max", 0),
        Rule("min_sentences", "sentences", None, "min", 5),
    ),
    "fineweb": (
        Rule("min_lines", "filled_lines", None, "min", 1),
        Rule("min_terminal_lines", "terminal_lines", "filled_lines", "min", 0.12),
        Rule("max_short_lines", "short_lines", "filled_lines", "max", 0.67),
        Rule("max_repeated_chars", "repeated_chars", "text_chars", "max", 0.01),
        Rule("max_newlines", "newlines", "words", "max", 0.3),
    ),
}
"""The published rules, in the order in which they are asked."""


def measure(texts: Texts, sets: Collection[str], limits: Limits = Limits()) -> Counts:  # noqa: B008
    """Count what the rules of some sets compare.

    Args:
        texts: A batch of documents.
        sets: Names of `SETS`.
        limits: Limits inside the counts.

    Returns:
        (d,) int64 of each name, ``chars`` (the length in characters) always among them.
    """
    parts: list[Counts] = []
    for piece in pieces(texts):
        surface = Surface(piece.texts)
        counts: Counts = {"chars": surface.length}
        if "gopher_repetition" in sets:
            counts |= gopher_repetition(surface)
        if "gopher_quality" in sets:
            counts |= quality.gopher_quality(surface)
        if "c4" in sets:
            counts |= quality.c4(surface, limits)
        if "fineweb" in sets:
            counts |= quality.fineweb(surface, limits)
        parts.append(counts)
    if not parts:
        return {name: np.zeros(0, dtype=np.int64) for name in count_names(sets)}
    return {
        name: np.concatenate([part[name] for part in parts]).astype(np.int64) for name in parts[0]
    }


def count_names(sets: Collection[str]) -> list[str]:
    """Return the names that `measure` counts for some sets, sorted."""
    used = {name for kind in sets for rule in SETS[kind] for name in (rule.counted, rule.per)}
    return sorted({"chars"} | {name for name in used if name})


def values(counts: Mapping[str, np.ndarray], rule: Rule) -> np.ndarray:
    """Return what a rule compares: (d,) float64, NaN for 0/0."""
    if rule.per is None:
        return counts[rule.counted].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: np.ndarray = counts[rule.counted] / counts[rule.per]
    return quotient


def dropped(
    counts: Mapping[str, np.ndarray], rule: Rule, threshold: float | None = None
) -> np.ndarray:
    """Tell which rows a rule drops: (d,) bool. A row without text is never among them.

    Args:
        counts: From `measure`.
        rule: A rule of `SETS`.
        threshold: In place of the published one.
    """
    limit = rule.threshold if threshold is None else threshold
    found = values(counts, rule)
    beyond = found < limit if rule.limit == "min" else found > limit
    return beyond & (counts["chars"] > 0)
