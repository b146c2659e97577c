"""A study and its runs: complete parameters, and the keys by which results are found.

The key of a run is the hash of its complete parameters, of the files of text and tasks that they
name, and of the code of the stages. A run of another definition has another key, so an edited study
mixes nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import find_file
from pipeline.runtime.params_file import validate
from pipeline.store import atomic
from pipeline.store.code_key import modules_key, stage_modules
from train.checkpoint.start import Start
from train.params import ModelParams, TrainParams
from train.study.metrics import METRICS, Metric
from train.study.study_params import SEED_STEP, StudyParams

STAGES = ("download", "curate", "tokenize", "verify", "train", "evaluate")
"""The stages that a run needs, in order."""
OF_THE_MODEL = ("model", "train", "evaluate")
"""Sections on which no data depends: `train.mixture` weighs the sources of the same data."""
MANY_STEPS = 10**9
"""In the place of the steps of a run, where the budget has not decided them."""

Overlay = dict[str, dict[str, Any]]
"""Section -> key -> value, and of `sources`: name -> key -> value."""


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

    @property
    def message(self) -> str:
        """Message of its commit, which tells the experiments of two studies apart."""
        return _message(self.study, self.variant, self.seed)


@dataclass(frozen=True)
class Study:
    """A study that has been read and checked."""

    name: str
    title: str
    """First line of the file, a comment."""
    file: StudyParams
    changes: dict[str, Overlay]
    """The keys in which each variant differs."""
    variants: dict[str, Overlay]
    """Complete sections of each variant; `train.seed` and `train.steps` are those of a run."""

    @property
    def seeds(self) -> list[int]:
        """The seeds' names."""
        seeds = self.file.seeds
        return list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds

    @property
    def messages(self) -> dict[str, str]:
        """Name of each experiment -> message of its commit."""
        return {
            f"{self.name}-{variant}-{seed}": _message(self.name, variant, seed)
            for variant in self.variants
            for seed in self.seeds
        }

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

    @cached_property
    def files(self) -> dict[str, str]:
        """Hashes of the files and weights that parameters name; DVC pins those of sources."""
        return {k: v for params in self.variants.values() for k, v in _files(params).items()}

    def key(self, params: Overlay) -> str:
        """Address of a run's result: the hash of all that decides it."""
        return atomic.sha256_json(
            {"params": params, "files": _files(params), "code": self.code_key}
        )

    def speed_key(self, variant: str, settings: dict[str, Any]) -> str:
        """Address of a variant's measured speed on a machine with these settings."""
        return self.key({**self.variants[variant], "pilot": settings})

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
        params["train"]["seed"] = seed + number * SEED_STEP
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
            train = {**params["train"], "steps": MANY_STEPS}  # it has been validated with them
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


def _message(study: str, variant: str, seed: int) -> str:
    return f"Study {study}, variant {variant}, seed {seed}"


def _files(params: Overlay) -> dict[str, str]:
    evaluate, train = params.get("evaluate", {}), params.get("train", {})
    named = [("curate.decontaminate", name) for name in params["curate"]["decontaminate"]]
    named += [
        (f"evaluate.{key}", evaluate[key])
        for key in ("held_out", "hellaswag", "lambada", "val_shards")
        if evaluate.get(key) not in (None, "hub")
    ]
    hashes = {}
    for key, name in named:
        try:
            hashes[name] = _hash(find_file(name))
        except OSError as error:
            raise UserError(
                f"params.yaml: {key}: {printable(name)[:200]}: {error.strerror}; name a file"
            ) from None
    if start := Start.parse(train.get("init", "scratch"), train.get("init_with", "weights")):
        changed = [path.stat().st_mtime_ns for path in sorted(start.folder.glob("*"))]
        hashes[str(start.folder)] = _hash_of_start(start, tuple(changed))
    return hashes


def _hash(path: Path) -> str:
    atomic.check_regular(path)
    return _hash_of_file(path, path.stat().st_mtime_ns)


@lru_cache
def _hash_of_file(path: Path, changed: int) -> str:
    return atomic.sha256_file(path)


@lru_cache
def _hash_of_start(start: Start, changed: tuple[int, ...]) -> str:
    from train.checkpoint import init_from  # here: it imports torch

    return init_from.content_key(start)


def path_of(name: str) -> str:
    """Return the path of a study's file, for messages."""
    return f"train/studies/{name}.yaml"
