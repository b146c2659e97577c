"""The heuristics, compared with plain definitions of the published rules on the same words."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate import characters, heuristics, words
from pipeline.curate.characters import code_table
from pipeline.curate.heuristics import SETS, Limits, Rule
from tests.support.repo import REPO

FRAGMENTS = (
    *("the ", "of ", "with ", "Word ", "a b c d e ", "x1 ", "don't ", "é ", "日本", "12 ", " "),
    *(". ", "...", "…", "....", "#", "- ", "•", "! ", '?"', ".)'", "。", "—", "‘", "’"),
    *("\n", "\n\n", "\r\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\xa0", "\n \n"),
    *("[1]", "[edit]", "[citation needed]", ".[2]", "]", "JavaScript", "Lorem ipsum", "{"),
    *("Terms of use", "a line of words.\n", "Longwords end here. The next. and so on.\n"),
)
TEXTS = st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join), max_size=4)
SYMBOLS, TERMINAL = (
    tuple(map(chr, np.flatnonzero(code_table() & flag).tolist()))
    for flag in (characters.SYMBOL, characters.TERMINAL)
)
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
POLICY = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)
SMALL = Limits(short_line=12, line_words=4, word_length=7)


def repeats(parts: Sequence[str]) -> tuple[int, int]:
    """Count the parts that are equal to one before, and their characters."""
    times = Counter(parts)
    again = [(len(part), count - 1) for part, count in times.items()]
    return sum(count for _, count in again), sum(size * count for size, count in again)


def gopher_repetition(text: str, split: list[str], limits: Limits) -> dict[str, int]:
    counts = {"chars": len(text)}
    lines, paragraphs = re.split(r"\n+", text), re.split(r"\n{2,}", text.strip())
    for name, parts in (("line", lines), ("paragraph", paragraphs)):
        counts[f"{name}s_split"] = len(parts)
        counts[f"repeated_{name}s"], counts[f"repeated_{name}_chars"] = repeats(parts)
    for n in (2, 3, 4):
        grams = Counter(" ".join(split[i : i + n]) for i in range(len(split) - n + 1))
        gram, times = grams.most_common(1)[0] if grams else ("", 0)
        counts[f"top_{n}_chars"] = len(gram) * times
    for n in (5, 6, 7, 8, 9, 10):
        met, chars, i = set(), 0, 0
        while i + n <= len(split):
            run = tuple(split[i : i + n])
            if run in met:
                chars += sum(map(len, run))
                i += n
            else:
                met.add(run)
                i += 1
        counts[f"repeated_{n}_chars"] = chars
    return counts


def gopher_quality(text: str, split: list[str], limits: Limits) -> dict[str, int]:
    plain, lines = [word for word in split if not set(word).issubset(SYMBOLS)], text.splitlines()
    return {
        "words": len(split),
        "plain_words": len(plain),
        "plain_word_chars": sum(map(len, plain)),
        "alpha_words": sum(any(map(str.isalpha, word)) for word in split),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("…"),
        "lines": len(lines),
        "bullet_lines": sum(line.lstrip().startswith(("•", "-")) for line in lines),
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines),
        "stop_words": len(STOP_WORDS.intersection(split)),
    }


def fineweb(text: str, split: list[str], limits: Limits) -> dict[str, int]:
    lines = [line for line in text.split("\n") if line.strip()]
    return {
        "words": len(split),
        "newlines": text.count("\n"),
        "text_chars": len(text.replace("\n", "")),
        "filled_lines": len(lines),
        "terminal_lines": sum(line.endswith(TERMINAL) for line in lines),
        "short_lines": sum(len(line) <= limits.short_line for line in lines),
        "repeated_chars": repeats(lines)[1],
    }


def c4(text: str, split: list[str], limits: Limits) -> dict[str, int]:
    lorem = braces = sentences = 0
    for line in map(str.strip, text.splitlines()):
        spaced, lower = line.split(), line.lower()
        end = re.sub(r"(\[\d*]|\[edit]|\[citation needed])+$", "", line)
        if max(map(len, spaced), default=0) > limits.word_length or end.endswith("..."):
            continue
        if not end.endswith((".", "?", "!", '"', "'")) or len(spaced) < limits.line_words:
            continue
        lorem += "lorem ipsum" in lower
        if "javascript" in lower:
            continue
        braces += "{" in line
        if any(policy in lower for policy in POLICY):
            continue
        ending = [re.search(r"""[.?!]["')\]]{0,2}$""", word) is not None for word in spaced]
        small = [word[0] in string.ascii_lowercase for word in spaced[1:]] + [False]
        sentences += max(1, sum(a and not b for a, b in zip(ending, small, strict=True)))
    return {"lorem_ipsum": lorem, "curly_brackets": braces, "sentences": sentences}


REFERENCES = {
    "gopher_repetition": gopher_repetition,
    "gopher_quality": gopher_quality,
    "c4": c4,
    "fineweb": fineweb,
}


def check(texts: Sequence[str], limits: Limits = SMALL) -> None:
    batch = words.as_texts(pa.array(texts, pa.large_string()))
    found = words.surface_words(batch)
    data = batch.data.tobytes()
    flat = [data[a:b].decode() for a, b in zip(found.starts, found.ends, strict=True)]
    for name, reference in REFERENCES.items():
        counts = heuristics.measure(batch, [name], limits)
        assert counts.keys() == {"chars", *reference("", [], limits)}
        for row, text in enumerate(texts):
            split = flat[found.firsts[row] : found.firsts[row + 1]]
            expected = {"chars": len(text), **reference(text, split, limits)}
            assert {key: int(counts[key][row]) for key in counts} == expected, (name, text)


@settings(max_examples=40)
@given(TEXTS)
def test_counts_are_those_of_the_published_definitions(texts: list[str]) -> None:
    check(texts)


def test_counts_of_real_texts() -> None:
    """Pages and code of this project, whole and line by line in another order."""
    paths = sorted([*REPO.glob("docs/*.md"), *REPO.glob("pipeline/curate/*.py")])[::6]
    check([path.read_text(encoding="utf-8")[:20_000] for path in paths], Limits())


@pytest.mark.soak
def test_counts_of_many_real_texts() -> None:
    from tests.support.fineweb import corpus  # imports PyTorch

    texts = corpus()["text"].to_pylist()
    for first in range(0, len(texts), 100):
        check([text[:100_000] for text in texts[first : first + 100]], Limits())


def test_symbols_and_ends_of_sentences() -> None:
    assert {*string.punctuation, *"…—’“»。，\a"} <= {*SYMBOLS}
    assert {*string.ascii_letters, *string.digits, *"éß日 \n•"}.isdisjoint(SYMBOLS)
    assert {*".!?。？؟।"} <= {*TERMINAL}
    assert {*",;:…’)"}.isdisjoint(TERMINAL)


@pytest.mark.parametrize("rule", [rule for rules in SETS.values() for rule in rules])
def test_rows_beyond_a_threshold_are_dropped(rule: Rule) -> None:
    """A value that is equal to the threshold is kept; so is a row without text."""
    per = 1 if rule.per is None else 1000
    border = round(rule.threshold * per)
    counts = {"chars": np.array([9, 9, 9, 0, 9]), "words": np.full(5, 1)}
    beyond = border - 1 if rule.limit == "min" else border + 1
    counts[rule.counted] = np.array([border, beyond, 2 * border - beyond, beyond, 0])
    if rule.per is not None:
        counts[rule.per] = np.array([per, per, per, 0 if rule.per == "chars" else per, 0])
        assert np.isnan(heuristics.values(counts, rule)[4])
    else:
        counts[rule.counted][4] = border
    assert heuristics.dropped(counts, rule).tolist() == [False, True, False, False, False]
    other = rule.threshold + (-1 if rule.limit == "min" else 1)  # one that all rows pass
    assert not heuristics.dropped(counts, rule, other).any()


def test_thresholds_are_those_published() -> None:
    """Gopher: table A1 and appendix A.1.1; C4: 2.2; FineWeb: 3.6 and its code in datatrove."""
    found = {rule.name: rule.threshold for rules in SETS.values() for rule in rules}
    assert found == {
        **{"max_repeated_lines": 0.3, "max_repeated_line_chars": 0.2},
        **{"max_repeated_paragraphs": 0.3, "max_repeated_paragraph_chars": 0.2},
        **{"max_top_2_gram": 0.2, "max_top_3_gram": 0.18, "max_top_4_gram": 0.16},
        **{f"max_repeated_{n}_grams": (20 - n) / 100 for n in range(5, 11)},
        **{"min_words": 50, "max_words": 100_000, "min_word_length": 3, "max_word_length": 10},
        **{"max_hashes": 0.1, "max_ellipses": 0.1, "max_bullet_lines": 0.9},
        **{"max_ellipsis_lines": 0.3, "min_alpha_words": 0.8, "min_stop_words": 2},
        **{"max_lorem_ipsum": 0, "max_curly_brackets": 0, "min_sentences": 5},
        **{"min_lines": 1, "min_terminal_lines": 0.12, "max_short_lines": 0.67},
        **{"max_repeated_chars": 0.01, "max_newlines": 0.3},
    }
