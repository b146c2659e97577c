"""A study: the file `train/studies/NAME.yaml`, and the runs that it stands for.

```yaml
# What this study asks, in one line.
base: mini                          # a preset, merged over `mini`; or a list of them
params: {train.batch_tokens: 2048}  # keys for all variants
variants:                           # name -> the keys in which it differs, of any section
  raw: {}
  dedup: {curate.exact_duplicates: true}
seeds: 5
budget: {tokens: 1_000_000}
held_out: data/held-out.jsonl
```

A study depends neither on the working `params.yaml` nor on other studies: `mini` has every key.
The key of a run is the hash of its complete parameters, of the held-out text, and of the code of
the stages. A run of another definition has another key, so an edited study mixes nothing.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import Section, nearest, read_yaml, validate
from pipeline.store import atomic
from pipeline.store.code_key import modules_key, stage_modules
from train.params import ModelParams, TrainParams
from train.preset import SECTIONS, read_preset
from train.study.metrics import METRICS, Metric

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}")
STAGES = ("download", "curate", "tokenize", "verify", "train", "evaluate")
"""The stages that a run needs, in order."""
OF_THE_MODEL = ("model", "train", "evaluate")
"""Sections on which no data depends."""
MOST_VARIANTS = 12
_MANY_STEPS = 10**9

Overlay = dict[str, dict[str, Any]]


class Budget(Section):
    """`budget`: what each run may spend, the same for all."""

    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on, rounded down to whole steps of each variant."""

    seconds: float | None = Field(default=None, gt=0)
    """Seconds of training on this machine: the steps follow from a measured speed, which is
    recorded once."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Budget:
        if (self.tokens is None) == (self.seconds is None):
            raise ValueError("set either tokens or seconds")
        return self


class StudyParams(Section):
    """The keys of a study's file."""

    base: str | list[str] = "mini"
    """A preset, or several, merged in this order over `mini`."""

    params: dict[str, Any] = Field(default={})
    """Keys of all variants, merged over the base; written as those of a variant."""

    variants: dict[str, dict[str, Any]] = Field(min_length=2, max_length=MOST_VARIANTS)
    """Name -> keys, as `section.key: value` or `section: {key: value}`; the first is the one that
    the others are compared with."""

    seeds: int | list[int] = Field(default=5)
    """How many seeds (1, 2, ...), or their list; the runs of a seed are a pair."""

    pair_seeds: bool = True
    """Whether each variant has the same seeds. False: each its own, so that variants may be equal
    (an A/A study, which measures how often noise passes for a result)."""

    metric: str = "bits_per_byte"
    """What decides: a result of the evaluation."""

    budget: Budget
    """What each run may spend."""

    held_out: str | None = Field(default=None, min_length=1)
    """A file of text within the project that no variant trains on; needed where the variants differ
    in data."""

    compare: Literal["first", "all"] | list[list[str]] = "first"
    """The comparisons: each variant with the `first`, `all` pairs, or a list of pairs."""

    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    """Highest corrected p of a claim."""

    resolve: float | None = Field(default=None, gt=0)
    """The difference that matters, in the metric's unit, for the number of further seeds; null: the
    one that was measured."""

    @field_validator("seeds")
    @classmethod
    def _seeds_are_some(cls, value: int | list[int]) -> int | list[int]:
        seeds = list(range(1, value + 1)) if isinstance(value, int) else value
        if not 1 <= len(seeds) <= 1000:
            raise ValueError("set 1 to 1000 seeds")
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
            raise ValueError("list each seed once, from 0 to 2^31 - 1")
        return value

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"{value!r}: unknown; {nearest(value, list(METRICS))}")
        return value

    @field_validator("variants")
    @classmethod
    def _names_are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not NAME.fullmatch(name) or ".." in name or name.endswith((".", ".lock")):
                raise ValueError(f"{name[:80]!r}: use lower case letters, digits, - and _ as name")
        return value


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    study: str
    variant: str
    seed: int
    """The seed's name in the study: equal for the runs of a pair."""
    params: Overlay
    """All sections, complete."""
    key: str

    @property
    def experiment(self) -> str:
        """Name of the DVC experiment."""
        return f"{self.study}-{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study that has been read and checked."""

    name: str
    title: str
    """First line of the file, a comment."""
    file: StudyParams
    variants: dict[str, Overlay]
    """Complete sections of each variant; `train.seed` and `train.steps` are those of a run."""

    @property
    def seeds(self) -> list[int]:
        """The seeds' names."""
        seeds = self.file.seeds
        return list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds

    @property
    def metric(self) -> Metric:
        """What decides."""
        return METRICS[self.file.metric]

    @cached_property
    def comparisons(self) -> list[tuple[str, str]]:
        """The pairs of variants that are compared."""
        names, asked = list(self.variants), self.file.compare
        if asked == "first":
            return [(names[0], name) for name in names[1:]]
        if asked == "all":
            return list(itertools.combinations(names, 2))
        return [(pair[0], pair[1]) for pair in asked]

    @property
    def same_data(self) -> bool:
        """Whether all variants have the same parameters of data."""
        return len({self.data_key(name) for name in self.variants}) == 1

    def data_key(self, variant: str) -> str:
        """Hash of the parameters on which a variant's data depends."""
        params = self.variants[variant]
        return atomic.sha256_json({s: v for s, v in params.items() if s not in OF_THE_MODEL})

    @cached_property
    def code_key(self) -> str:
        """Hash of the code of all stages of a run."""
        return modules_key(sorted({path for stage in STAGES for path in stage_modules(stage)}))

    @cached_property
    def held_out_sha256(self) -> str | None:
        """Hash of the held-out text."""
        return atomic.sha256_file(Path(self.file.held_out)) if self.file.held_out else None

    def key(self, params: Overlay) -> str:
        """Address of a run's result: the hash of all that decides it."""
        text = {"held_out": self.held_out_sha256, "code": self.code_key}
        return atomic.sha256_json({"params": params, **text})

    def speed_key(self, variant: str) -> str:
        """Address of a variant's measured speed."""
        return self.key({**self.variants[variant], "pilot": {}})

    def run(self, variant: str, seed: int, seconds_per_step: float | None = None) -> Planned:
        """Return the run of a variant and a seed; the speed for a budget of seconds."""
        params = self.parameters(variant, seed, seconds_per_step)
        return Planned(self.name, variant, seed, params, self.key(params))

    def parameters(self, variant: str, seed: int, seconds_per_step: float | None = None) -> Overlay:
        """Return the complete parameters of a run.

        Raises:
            UserError: The budget is less than a step, or impossible.
        """
        number = 0 if self.file.pair_seeds else 1 + list(self.variants).index(variant)
        params = {section: dict(values) for section, values in self.variants[variant].items()}
        params["train"]["seed"] = seed + number * 1_000_003
        params["train"]["steps"] = self._steps(variant, seconds_per_step)
        where = f"{path_of(self.name)}: variants.{variant}: train"
        validate(TrainParams, params["train"], where)
        return params

    def _steps(self, variant: str, seconds_per_step: float | None) -> int:
        budget, params = self.file.budget, self.variants[variant]
        if budget.seconds is not None:
            assert seconds_per_step is not None, "measured before"
            steps = int(budget.seconds / seconds_per_step)
        else:
            assert budget.tokens is not None
            size = ModelParams.model_validate(params["model"]).block_size
            train = {**params["train"], "steps": _MANY_STEPS}  # it has been validated with them
            batches = TrainParams.model_validate(train).batches(size)
            low, high = 0, budget.tokens // (batches.smallest * size) + 1
            while low + 1 < high:
                middle = (low + high) // 2
                inside = batches(middle)[0] * size <= budget.tokens
                low, high = (middle, high) if inside else (low, middle)
            steps = low  # the most whose tokens are within the budget
        if steps < 1:
            raise UserError(
                f"{path_of(self.name)}: budget: less than one step of variant {variant}; raise it"
            )
        return steps


def study_files() -> dict[str, Path]:
    """Return the study files by name."""
    folder = Path(str(resources.files("train"))) / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def path_of(name: str) -> str:
    """Return the path of a study's file, for messages."""
    return f"train/studies/{name}.yaml"


def load(name: str) -> Study:
    """Read a study and check all that can be checked before anything runs.

    Raises:
        UserError: The study is unknown, a key or value is invalid, two variants are equal, or the
            held-out text is missing.
    """
    files = study_files()
    if not NAME.fullmatch(name) or name not in files:
        raise UserError(f"study {name[:80]}: unknown; {nearest(name, list(files))}")
    where = path_of(name)
    _refuse_repeated_names(files[name], where)
    file = validate(StudyParams, read_yaml(files[name]), where)
    base = _merge({}, read_preset("mini"), where)
    for preset in [file.base] if isinstance(file.base, str) else file.base:
        base = _merge(base, read_preset(preset), f"{where}: base")
    base = _merge(base, _overlay(file.params, f"{where}: params"), where)
    # Part of the parameters: the stage finds the file there, and DVC shows the result.
    base["evaluate"]["held_out"] = _inside(file.held_out, where) if file.held_out else None
    variants = {
        variant: _variant(base, values, f"{where}: variants.{variant}")
        for variant, values in file.variants.items()
    }
    lines = files[name].read_text(encoding="utf-8").splitlines() or [""]
    title = lines[0].lstrip("# ") if lines[0].startswith("#") else ""
    study = Study(name, title, file, variants)
    _check(study, where)
    return study


def _overlay(values: dict[str, Any], where: str) -> Overlay:
    """Sort `section.key: value` and `section: {key: value}` by section."""
    overlay: Overlay = {}
    for key, value in values.items():
        section, dot, rest = key.partition(".")
        if not dot and not isinstance(value, dict):
            raise UserError(f"{where}.{key}: not a section; write section.key: value")
        for inner, one in ({rest: value} if dot else value).items():
            if inner in overlay.setdefault(section, {}):
                raise UserError(f"{where}: {section}.{inner}: set twice; remove one")
            overlay[section][inner] = one
    for fixed, by in (("seed", "seeds"), ("steps", "budget")):
        if fixed in overlay.get("train", {}):
            raise UserError(f"{where}: train.{fixed}: decided by {by} of the study; remove it")
    if "held_out" in overlay.get("evaluate", {}):
        raise UserError(f"{where}: evaluate.held_out: decided by held_out of the study; remove it")
    return overlay


def _variant(base: Overlay, values: dict[str, Any], where: str) -> Overlay:
    params = _merge(base, _overlay(values, where), where)
    params["train"] |= {"seed": 0, "steps": _MANY_STEPS}  # those of a run: `Study.run`
    for section, cls in SECTIONS.items():
        validate(cls, params[section], f"{where}: {section}")
    return params


def _merge(base: Overlay, overlay: Overlay, where: str) -> Overlay:
    for section, values in overlay.items():
        if section not in SECTIONS:
            raise UserError(
                f"{where}: {section}: unknown section; {nearest(section, list(SECTIONS))}"
            )
        if not isinstance(values, dict):
            raise UserError(f"{where}: {section}: not a mapping; write key: value")
    return {section: {**base.get(section, {}), **overlay.get(section, {})} for section in SECTIONS}


def _check(study: Study, where: str) -> None:
    names, file = list(study.variants), study.file
    decide = {
        name: atomic.sha256_json({**params, "train": _deciding(params["train"])})
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
    metric = study.metric
    if file.metric == "val_loss" and not study.same_data:
        raise UserError(f"{where}: metric: val_loss is of each variant's own data; bits_per_byte")
    for name, params in study.variants.items():
        if metric.task and not params["evaluate"].get(metric.task):
            raise UserError(
                f"{where}: metric: {file.metric} needs evaluate.{metric.task}; set it in {name}"
            )
        if file.budget.tokens is not None:
            study.parameters(name, study.seeds[0])


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
    if not path.is_file():
        raise UserError(f"{where}: held_out: {name}: no such file; name a file of text")
    return path.as_posix()
