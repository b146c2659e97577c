"""Tasks of an evaluation are found in rows, whole or in part, and nowhere else."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate import decontaminate, words
from pipeline.curate.decontaminate import LEAST, NGRAM, Item, index, read_items
from pipeline.curate.stage import facts_for
from pipeline.params import CurateParams
from pipeline.runtime.errors import UserError

TEXT = [f"word{i}" for i in range(400)]
SEPARATORS = [" ", "\n", ", ", " -- ", "... ", " (", "!\r\n", "\u2028", "_"]

chosen_words = st.lists(st.sampled_from(["a", "B", "c", "7"]), max_size=14)


def found_in(rows, index):
    """Return (row, item, n-grams) of everything found."""
    batch = words.as_texts(pa.array(rows, pa.large_string()))
    found = decontaminate.find(batch, index)
    return list(zip(*(column.tolist() for column in found), strict=True))


def items_of(*texts):
    return [Item(f"t/{number}", text) for number, text in enumerate(texts)]


def grams(text, n):
    found = re.findall(r"[^\W_]+", text.lower())
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def naive(rows, texts, ngram, least):
    """Return what `found_in` does: every n-gram of every row is looked for in every item."""
    checked = [text for text in texts if len(grams(text, 1)) >= least]
    found = []
    for row, text in enumerate(rows):
        for item, task in enumerate(checked):
            n = min(len(grams(task, 1)), ngram)
            of_item = set(grams(task, n))
            if count := sum(gram in of_item for gram in grams(text, n)):
                found.append((row, item, count))
    return found


@settings(max_examples=50, deadline=None)
@given(
    st.lists(chosen_words, min_size=1, max_size=8),
    st.lists(chosen_words, min_size=1, max_size=5),
    st.sampled_from(SEPARATORS),
    st.integers(1, 40),
)
def test_all_that_a_plain_search_finds(rows, tasks, separator, piece):
    """Few different words, so that n-grams repeat within and between rows, items and pieces."""
    texts = [separator.join(row) for row in rows]
    asked = [" ".join(task) for task in tasks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "PIECE", piece)
        patch.setattr(words, "LONG", max(8, piece))
        found = found_in(texts, index(items_of(*asked), ngram=4, least=2))
    assert found == naive(texts, asked, 4, 2)


@pytest.mark.parametrize("size", [LEAST, LEAST + 1, NGRAM - 1, NGRAM, NGRAM + 1, 40])
@pytest.mark.parametrize("before", [0, 1, 100])
@pytest.mark.parametrize("after", [0, 1, 100])
def test_a_planted_item_is_found_whatever_surrounds_and_separates_its_words(size, before, after):
    task = TEXT[200 : 200 + size]
    tasks = index(items_of(" ".join(task)))
    grams_in_common = max(size - NGRAM + 1, 1)
    n = min(size, NGRAM)
    others = [" ".join(part) for part in (TEXT[:200], task[: n - 1], task[1:n])]
    for number, separator in enumerate(SEPARATORS):
        text = separator.join([*TEXT[:before], *task, *TEXT[100 : 100 + after]])
        planted = (text, text.upper(), text.title())[number % 3]
        assert found_in([*others, planted, *others], tasks) == [(3, 0, grams_in_common)]


@pytest.mark.parametrize("size", [LEAST, NGRAM - 1, NGRAM, 2 * NGRAM - 2])
def test_a_changed_word_hides_a_task_of_which_no_n_gram_is_left(size):
    task = TEXT[200 : 200 + size]
    changed = [*task[: size // 2], "other", *task[size // 2 + 1 :]]
    assert found_in([" ".join(changed)], index(items_of(" ".join(task)))) == []


def test_words_of_two_rows_are_no_n_gram_though_the_rows_are_neighbours():
    task = " ".join(TEXT[:NGRAM])
    for cut in range(1, NGRAM):
        rows = [" ".join(TEXT[:cut]), " ".join(TEXT[cut:NGRAM])]
        assert found_in(rows, index(items_of(task))) == []


def test_too_short_items_are_reported_and_not_looked_for():
    sizes = [0, 1, LEAST - 1, LEAST, NGRAM]
    tasks = index(items_of(*(" ".join(TEXT[:size]) for size in sizes)))
    assert tasks.short == ["t/0", "t/1", "t/2"]
    assert tasks.items == ["t/3", "t/4"]
    assert found_in([" ".join(TEXT[: LEAST - 1])], tasks) == []
    assert found_in([" ".join(TEXT[:LEAST])], tasks) == [(0, 0, 1)]
    assert found_in(["anything"], index(items_of("too short"))) == []


def test_many_items_are_found_each_in_its_row_and_in_no_other():
    """1,000 tasks of 13 words, so that hashes share the first bits that are looked at."""
    source = np.random.default_rng(5)
    tasks = [" ".join(row) for row in source.choice(TEXT, (1000, NGRAM)).tolist()]
    clean = [" ".join(row) for row in source.choice(TEXT, (300, 100)).tolist()]
    planted = source.choice(1000, 300, replace=False)
    rows = [f"{text} {tasks[item]}" for text, item in zip(clean, planted, strict=True)]
    looked_for = pickle.loads(pickle.dumps(index(items_of(*tasks))))
    expected = [(row, item, 1) for row, item in enumerate(planted.tolist())]
    assert found_in(rows, looked_for) == expected
    assert found_in(clean, looked_for) == []


def test_tasks_of_each_format_are_read(tmp_path: Path):
    path = tmp_path / "tasks.jsonl"
    ctx = "[header] How to whistle [title] Wet your lips. [step] Then"
    rows = [
        {"ctx": ctx, "endings": ["no.", "blow [substeps] gently.", "x", "y"], "label": "1"},
        {"text": "A passage and its last word."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = read_items("hellaswag", path)
    assert [item.name for item in items] == ["hellaswag/0", "hellaswag/1"]
    assert [" ".join(item.text.split()) for item in items] == [
        "How to whistle Wet your lips. Then blow gently.",
        "A passage and its last word.",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}\n",
        b"3\n",
        b'{"text": 3}\n',
        b"no JSON\n",
        b'{"text": "\xff"}\n',
        b'{"ctx": "a", "endings": ["b"], "label": 1}\n',
        b'{"ctx": "a", "endings": ["b"], "label": -1}\n',
        b'{"ctx": "a", "endings": ["b"], "label": 1e999}\n',
        b'{"text": "half of a pair: \\ud83d"}\n',
    ],
)
def test_files_that_hold_no_tasks_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_items("tasks", path)
    with pytest.raises(UserError, match="missing"):
        read_items("tasks", tmp_path / "missing")


@pytest.mark.parametrize("path", ["~nouser/tasks.jsonl", "a\0.jsonl", "pipe", "."])
def test_paths_that_are_no_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError):
        facts_for(CurateParams(decontaminate=[path]))
