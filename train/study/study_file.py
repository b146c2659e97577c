"""Read a study, `train/studies/NAME.yaml`, and check all that can be checked before it runs.

```yaml
# What this study asks, in one line.
base: mini                          # a preset, merged over `mini`; or a list of them
params: {train.batch_tokens: 2048}  # keys for all variants
variants:                           # name -> the keys in which it differs
  raw: {}
  dedup: {curate.exact_duplicates: true}
seeds: 5
budget: {tokens: 1_000_000}
held_out: data/held-out.jsonl
```

Sources are `sources.NAME.key` or `sources: {NAME: {key: value}}`. As in a preset, those with a
`kind` replace all sources of the base; without it, keys change a source of the base.

A study depends neither on the working `params.yaml` nor on other studies: `mini` has every key.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import nearest, read_yaml, validate
from pipeline.store import atomic
from train.evals.held_out import read_documents
from train.params import ModelParams, TrainParams
from train.preset import apply, read_preset, shipped_files, validated
from train.study.definition import MANY_STEPS, Overlay, Study, path_of
from train.study.study_params import NAME, StudyParams

_MOST_CHARS = 1000  # of a message


def study_files() -> dict[str, Path]:
    """Return the study files by name."""
    return shipped_files("studies")


def load(name: str) -> Study:
    """Read a study and check all that can be checked before anything runs.

    Raises:
        UserError: The study is unknown, a key or value is invalid, two variants are equal, or the
            held-out text is missing.
    """
    try:
        return _load(name)
    except UserError as error:  # one line, whatever names the file has
        raise UserError(printable(str(error))[:_MOST_CHARS]) from None


def _load(name: str) -> Study:
    files = study_files()
    if name not in files:
        raise UserError(f"study {name[:80]}: unknown; {nearest(name, list(files))}")
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"study {name[:80]}: not a name of an experiment; rename the file: lower case letters, "
            "digits, - and _, up to 40"
        )
    where = path_of(name)
    _refuse_repeated_names(files[name], where)
    file = validate(StudyParams, read_yaml(files[name]), where)
    base: Overlay = read_preset("mini")
    for preset in [file.base] if isinstance(file.base, str) else file.base:
        try:
            values = read_preset(preset)
        except UserError as error:
            raise UserError(f"{where}: base: {error}") from None
        apply(base, values, f"{where}: base")
    apply(base, _overlay(file.params, f"{where}: params"), f"{where}: params")
    # Part of the parameters: the stage finds the file there, and DVC shows the result.
    base["evaluate"]["held_out"] = _inside(file.held_out, where) if file.held_out else None
    changes = {
        variant: _overlay(values, f"{where}: variants.{variant}")
        for variant, values in file.variants.items()
    }
    for variant, overlay in changes.items():
        if "evaluate" in overlay:
            raise UserError(
                f"{where}: variants.{variant}: evaluate.{next(iter(overlay['evaluate']), '')}: all "
                "variants are measured alike; set it in params"
            )
    variants = {
        variant: _variant(base, overlay, f"{where}: variants.{variant}")
        for variant, overlay in changes.items()
    }
    lines = files[name].read_text(encoding="utf-8").splitlines() or [""]
    title = lines[0].lstrip("# ") if lines[0].startswith("#") else ""
    study = Study(name, title, file, changes, variants)
    _check(study, where)
    return study


def _overlay(values: dict[str, Any], where: str) -> Overlay:
    """Sort `section.key: value` and `section: {key: value}` by section, and sources by name."""
    overlay: Overlay = {}
    for section, key, value in _keys(values, where):
        if section != "sources":
            _set(overlay.setdefault(section, {}), key, value, f"{where}: {section}")
            continue
        for name, inner, one in _keys({key: value}, f"{where}: sources"):
            of_source = overlay.setdefault("sources", {}).setdefault(name, {})
            _set(of_source, inner, one, f"{where}: sources.{name}")
    for fixed, by in (("seed", "seeds"), ("steps", "budget")):
        if fixed in overlay.get("train", {}):
            raise UserError(f"{where}: train.{fixed}: decided by {by} of the study; remove it")
    if "held_out" in overlay.get("evaluate", {}):
        raise UserError(f"{where}: evaluate.held_out: decided by held_out of the study; remove it")
    return overlay


def _keys(values: dict[str, Any], where: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (first, rest, value) of `first.rest: value` and of `first: {rest: value}`."""
    for key, value in values.items():
        first, dot, rest = str(key).partition(".")
        if dot:
            yield first, rest, value
        elif isinstance(value, dict):
            yield from ((first, str(inner), one) for inner, one in value.items())
        else:
            raise UserError(f"{where}: {first}: not a mapping; write {first}.key: value")


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    if key in values:
        raise UserError(f"{where}.{key}: set twice; remove one")
    values[key] = value


def _variant(base: Overlay, overlay: Overlay, where: str) -> Overlay:
    """Return the complete parameters of a variant; those of a source with all its keys."""
    params = copy.deepcopy(base)
    apply(params, overlay, where)
    params["train"] |= {"seed": 0, "steps": MANY_STEPS}  # those of a run: `Study.run`
    sources = validated(params, where).sources
    params["sources"] = {name: one.model_dump(mode="json") for name, one in sources.items()}
    return params


def _check(study: Study, where: str) -> None:
    names, file = list(study.variants), study.file
    decide = {
        name: atomic.sha256_json({**params, "train": _deciding(params["train"]), "evaluate": {}})
        for name, params in study.variants.items()
    }
    if file.pair_seeds:
        for a, b in itertools.combinations(names, 2):
            if decide[a] == decide[b]:
                raise UserError(
                    f"{where}: variants.{b}: equal to {a} in all that decides a result; change a "
                    "key, or set pair_seeds: false to compare seeds only"
                )
    pairs = [] if isinstance(file.compare, str) else file.compare
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"{where}: compare: {pair}: not a pair; write [first, second]")
        for name in pair:
            if name not in names:
                raise UserError(f"{where}: compare: {name}: unknown; {nearest(name, names)}")
    if len({frozenset(pair) for pair in pairs}) < len(pairs) or (pairs == [] == file.compare):
        raise UserError(f"{where}: compare: list each pair once, at least one")
    if not file.held_out and not study.same_data:
        raise UserError(
            f"{where}: held_out: missing, but the variants differ in data, and so in what they are "
            "measured on; name a file of text"
        )
    if file.held_out:
        read_documents(Path(file.held_out), f"{where}: held_out: {file.held_out}")
        if file.held_out.endswith(".txt") and not study.same_data:
            raise UserError(
                f"{where}: held_out: {file.held_out}: a .txt is one document, which cannot be "
                "looked for in the data of variants; write .jsonl"
            )
    windows = len({p["model"]["block_size"] for p in study.variants.values()})
    if windows > 1 and (not file.held_out or file.metric == "val_loss"):
        raise UserError(
            f"{where}: held_out: the variants differ in model.block_size, and so in the windows of "
            "the validation split; name a file of text in held_out, with metric: bits_per_byte"
        )
    if len({p["train"].get("document_masking") for p in study.variants.values()}) > 1:
        raise UserError(
            f"{where}: variants: train.document_masking differs, and the evaluation masks "
            "documents as training does: the losses do not compare; set it in params"
        )
    metric = study.metric
    if file.metric == "val_loss" and not study.same_data:
        raise UserError(f"{where}: metric: val_loss is of each variant's own data; bits_per_byte")
    for name, params in study.variants.items():
        if metric.task and not params["evaluate"].get(metric.task):
            raise UserError(
                f"{where}: metric: {file.metric} needs evaluate.{metric.task}; set it in params"
            )
        with _errors_at(f"{where}: variants.{name}"):
            size = ModelParams.model_validate(params["model"]).block_size
            TrainParams.model_validate(params["train"]).batches(size)
        if file.budget.tokens is not None:
            study.parameters(name, study.seeds[0])
    with _errors_at(where):
        study.files  # noqa: B018


@contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Name the place in the study, where an error names `params.yaml`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("params.yaml", where, 1)) from None


def _deciding(train: dict[str, Any]) -> dict[str, Any]:
    """The keys of `train` that decide weights; all others only observe."""
    return TrainParams.model_validate(train).deciding()


def _refuse_repeated_names(path: Path, where: str) -> None:
    """Refuse a key that is there twice: of two variants of one name, YAML would keep one."""
    # The parser refuses it, in its own words and on several lines; `read_yaml` makes one of them.
    try:
        read_yaml(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), where, 1)) from None


def _inside(name: str, where: str) -> str:
    """Return the path of the held-out text, which is a file within the project.

    Raises:
        UserError: It is absolute, leads out of the project, or is no file.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{where}: held_out: {name!r}: not within the project; use a path in it")
    root = Path().resolve()
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise UserError(f"{where}: held_out: {name}: a link out of the project; copy the file")
    try:
        atomic.check_regular(path)
    except OSError as error:
        raise UserError(
            f"{where}: held_out: {name[:200]}: {error.strerror}; name a file of text"
        ) from None
    return path.as_posix()
