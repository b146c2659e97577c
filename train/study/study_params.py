"""The keys of a study's file."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.runtime.errors import printable
from pipeline.runtime.params_file import Section, nearest
from train.study.metrics import METRICS

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}")
"""Of a study, and of a variant: both are part of the name of an experiment."""
MOST_VARIANTS = 12
MOST_SEEDS = 1000
SEED_STEP = 1_000_003
"""Between the seeds of two variants where these are not paired; a seed is below it."""


class Budget(Section):
    """`budget`: what each run may spend, the same for all."""

    tokens: int | None = Field(default=None, ge=1, le=10**15)
    """Tokens to train on, rounded down to whole steps of each variant."""

    seconds: float | None = Field(default=None, gt=0, le=1e9)
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

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_some(cls, value: Any) -> Any:
        seeds = value if isinstance(value, list) else [value]
        if not all(type(seed) is int for seed in seeds):
            raise ValueError("not whole numbers; write how many seeds, or a list of them")
        if not 1 <= (len(seeds) if isinstance(value, list) else value) <= MOST_SEEDS:
            raise ValueError(f"set 1 to {MOST_SEEDS} seeds")
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < SEED_STEP for seed in seeds):
            raise ValueError(f"list each seed once, from 0 to {SEED_STEP - 1:,}")
        return value

    @field_validator("compare", mode="before")
    @classmethod
    def _compare_is_known(cls, value: Any) -> Any:
        is_list = isinstance(value, list) and all(isinstance(pair, list) for pair in value)
        if value not in ("first", "all") and not is_list:
            raise ValueError("write first, all, or a list of pairs: [[a, b], [a, c]]")
        return value

    @field_validator("variants", mode="before")
    @classmethod
    def _variants_are_mappings(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("not a mapping; write a name and its keys: a: {train.beta2: 0.9}")
        found = {name: {} if keys is None else keys for name, keys in value.items()}
        for name, keys in found.items():
            shown = printable(str(name))[:80]
            if not isinstance(name, str):
                raise ValueError(f"{shown}: not text; write the name in quotes")
            if not isinstance(keys, dict):
                raise ValueError(f"{shown}: not a mapping; write {shown}: {{section.key: value}}")
        return found

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
