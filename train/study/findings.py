"""What a study has found: results by variant, comparisons, verdicts, and what would say more."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.runtime.errors import UserError
from train.params import ModelParams, TrainParams
from train.report.html import number
from train.study import statistics
from train.study.definition import Planned, Study, path_of
from train.study.results import Results, planned
from train.study.statistics import Comparison


@dataclass(frozen=True)
class Finished:
    """A planned run, and its record: None if it has not run."""

    run: Planned
    record: dict[str, Any] | None
    value: float
    """Of the metric; NaN if it has none."""

    @property
    def failed(self) -> str | None:
        """Why it has no result, if it diverged."""
        return self.record.get("failed") if self.record else None

    @property
    def diverged(self) -> bool:
        """Whether it has run, and its result is not finite."""
        return self.record is not None and not math.isfinite(self.value)

    @property
    def training(self) -> dict[str, Any] | None:
        """Its summary of training."""
        return self.record.get("training") if self.record else None

    @property
    def environments(self) -> list[dict[str, str]]:
        """Its device, versions, and settings of rounding."""
        return self.record.get("environments", []) if self.record else []


@dataclass(frozen=True)
class Found:
    """A comparison of a study.

    Attributes:
        p: Corrected for the number of comparisons; None where there is none.
        better: The variant that is better, if that can be claimed: all runs of the study are
            finished, and none of the variant diverged.
        preliminary: Whether runs of the study are not finished.
        more_seeds: Further seeds that would resolve `resolves`; None: unknown or more than 1,000.
        resolves: A difference in the metric's unit.
        more_seconds: Training time of these seeds, from the measured ones.
        sentence: The verdict.
    """

    first: str
    second: str
    result: Comparison
    p: float | None
    better: str | None
    preliminary: bool
    more_seeds: int | None
    resolves: float | None
    more_seconds: float | None
    sentence: str


@dataclass(frozen=True)
class Findings:
    """A study with its results."""

    study: Study
    runs: dict[str, list[Finished]]
    """By variant, in the order of the seeds."""
    comparisons: list[Found]
    """Those of the study: their p is corrected for their number."""
    all_pairs: list[Found]
    """All pairs of variants: their p is corrected for the number of all."""

    @property
    def unfinished(self) -> int:
        """Runs without a record."""
        return sum(one.record is None for runs in self.runs.values() for one in runs)

    @property
    def diverged(self) -> list[Finished]:
        """Runs that stopped at a non-finite loss or gradient, or whose result is not finite."""
        return [one for runs in self.runs.values() for one in runs if one.diverged]

    @property
    def seconds(self) -> float:
        """Training time of all finished runs."""
        return sum(training_seconds(runs) for runs in self.runs.values())

    def verdicts(self) -> list[str]:
        """One sentence per comparison, and one per run without a result."""
        all_ = self.environments
        return [
            *(found.sentence for found in self.comparisons),
            *(
                f"{one.run.experiment} has no result: {one.failed or 'not finite'}"
                for one in self.diverged
            ),
            *([f"{self.unfinished} runs are not finished"] if self.unfinished else []),
            *([f"the runs are of several machines: {'; '.join(all_)}"] if len(all_) > 1 else []),
        ]

    @property
    def environments(self) -> list[str]:
        """The devices and versions of the finished runs."""
        runs = (one for runs in self.runs.values() for one in runs)
        return _described([environment for one in runs for environment in one.environments])

    def as_json(self) -> dict[str, Any]:
        """Return the page as data: NaN is null."""
        study = self.study
        value = {
            "study": study.name,
            "metric": study.file.metric,
            "unit": study.metric.unit,
            "lower_is_better": study.metric.lower_is_better,
            "alpha": study.file.alpha,
            "held_out": study.file.held_out,
            "held_out_sha256": study.held_out_sha256,
            "seeds": study.seeds,
            "unfinished": self.unfinished,
            "environments": self.environments,
            "training_seconds": self.seconds,
            "variants": {
                name: {
                    "results": [one.value for one in runs],
                    "diverged": {str(one.run.seed): one.failed for one in runs if one.failed},
                    **dict(
                        zip(
                            ("n", "mean", "std"),
                            statistics.seed_noise([one.value for one in runs]),
                            strict=True,
                        )
                    ),
                    "steps": runs[0].run.params["train"]["steps"],
                    "tokens": tokens_of(runs[0].run, runs[0].run.params["train"]["steps"]),
                    "training_seconds": training_seconds(runs),
                }
                for name, runs in self.runs.items()
            },
            "comparisons": [_as_json(found) for found in self.comparisons],
            "all_pairs": [_as_json(found) for found in self.all_pairs],
        }
        return dict(_without_nan(value))


def find(study: Study, results: Results) -> Findings:
    """Compare the variants over what is finished.

    Raises:
        UserError: Nothing is finished, or the data of a variant has changed between seeds.
    """
    runs = planned(study, results)
    if runs is None:
        raise UserError(
            f"study {study.name}: no speed is measured on this machine with these settings "
            f"(machine.yaml, GPT2_*); python -m train.study {study.name}"
        )
    by_variant = _read(study, results, runs)
    if all(one.record is None for found in by_variant.values() for one in found):
        raise UserError(
            f"study {study.name}: no run is finished; python -m train.study {study.name}"
        )
    data: dict[str, str] = {}
    for name, found in by_variant.items():
        for one in found:
            if one.record is None or one.failed:
                continue
            key = one.record["dataset_key"]
            if data.setdefault(study.data_key(name), key) != key:
                raise UserError(
                    f"{path_of(study.name)}: variants.{name}: its data has changed between two "
                    f"runs; remove {results.folder / 'results'} to run the study again"
                )
    compared = _compare(study, by_variant, study.comparisons)
    pairs = list(itertools.combinations(study.variants, 2))
    return Findings(study, by_variant, compared, _compare(study, by_variant, pairs))


def _read(study: Study, results: Results, runs: list[Planned]) -> dict[str, list[Finished]]:
    """Read the records of all runs, by variant, in the order of the seeds."""
    found: dict[str, list[Finished]] = {name: [] for name in study.variants}
    for run in runs:
        record, value = results.read("results", run.key), math.nan
        if record is not None and "evaluation" in record:
            value = study.metric.value(record["evaluation"], bool(study.file.held_out))
        found[run.variant].append(Finished(run, record, value))
    return found


def _compare(
    study: Study, runs: dict[str, list[Finished]], pairs: list[tuple[str, str]]
) -> list[Found]:
    compared = [statistics.compare(*_values(runs[a], runs[b])) for a, b in pairs]
    corrected = statistics.holm([one.p for one in compared])
    return [
        _found(study, runs, a, b, result, p, len(pairs))
        for (a, b), result, p in zip(pairs, compared, corrected, strict=True)
    ]


def _values(first: list[Finished], second: list[Finished]) -> tuple[list[float], list[float]]:
    """Return the values by seed; NaN for a pair of runs on different machines."""
    pairs = [
        (math.nan, math.nan) if _on_two_machines(a, b) else (a.value, b.value)
        for a, b in zip(first, second, strict=True)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _on_two_machines(a: Finished, b: Finished) -> bool:
    return bool(a.environments and b.environments) and a.environments != b.environments


def _described(environments: list[dict[str, str]]) -> list[str]:
    """Name each environment by its device and version, and by all in which it differs."""
    names = {name for one in environments for name in one}
    differ = {name for name in names if len({one.get(name) for one in environments}) > 1}
    differ -= {"gpu", "cpu", "torch"}
    return sorted(
        {
            ", ".join(
                [
                    f"{one.get('gpu', one.get('cpu'))}, torch {one['torch']}",
                    *(f"{name} {one.get(name, 'none')}" for name in sorted(differ)),
                ]
            )
            for one in environments
        }
    )


def _found(
    study: Study,
    runs: dict[str, list[Finished]],
    first: str,
    second: str,
    result: Comparison,
    p: float | None,
    n_comparisons: int,
) -> Found:
    unit, better, more, resolves, seconds = study.metric.unit, None, None, None, None
    size = f"{_amount(result.mean)} ± {_amount(result.half_width)} {unit}"
    missing = _missing(runs, first, second, result)
    preliminary = any(one.record is None for found in runs.values() for one in found)
    if p is not None and p < study.file.alpha:
        second_wins = (result.mean < 0) == study.metric.lower_is_better
        best, worse = (second, first) if second_wins else (first, second)
        size = f"{_amount(abs(result.mean))} ± {_amount(result.half_width)} {unit}"
        sentence = f"{best} is better than {worse} by {size} ({_p(p)}, {_seeds(result.n)})"
        if failed := sum(one.diverged for one in runs[best]):
            sentence = (
                f"no claim for {best}, which diverged in {failed} of {_seeds(len(runs[best]))}; in "
                f"the others {sentence}"
            )
        elif not preliminary:
            better = best
        sentence += missing
    elif p is None:
        sentence = (
            f"no difference between {first} and {second} can be claimed: {result.reason} "
            f"({_seeds(result.n)}){missing}"
        )
    else:
        resolves = study.file.resolve or abs(result.mean)
        # As if this were the smallest p: the level of Holm's first step.
        needed = statistics.seeds_needed(result.std, resolves, study.file.alpha / n_comparisons)
        what = f"over {statistics.MOST_SEEDS:,} seeds"
        if needed is not None:
            more = max(0, needed - result.n)
            what = f"{more} more seed{'s' * (more != 1)}" if more else f"{needed} seeds"
            each = [
                one.training["seconds"]
                for name in (first, second)
                for one in runs[name]
                if one.training
            ]
            seconds = 2 * more * sum(each) / len(each) if each else None
        hint = f"{what} would resolve {_amount(resolves)}"
        if needed is None and study.file.resolve is None:
            hint = "set resolve in the study to learn how many seeds would show a difference"
        sentence = (
            f"no difference between {first} and {second} can be claimed ({size}, {_p(p)}, "
            f"{_seeds(result.n)}); {hint}{missing}"
        )
    if preliminary:
        sentence = f"preliminary: {sentence}"
    return Found(first, second, result, p, better, preliminary, more, resolves, seconds, sentence)


def _missing(runs: dict[str, list[Finished]], first: str, second: str, result: Comparison) -> str:
    if not result.missing:
        return ""
    both = [*runs[first], *runs[second]]
    failed = [one.run.experiment for one in both if one.diverged]
    diverged = f": {', '.join(failed)} diverged" if failed else ""
    apart = [
        a.run.seed for a, b in zip(runs[first], runs[second], strict=True) if _on_two_machines(a, b)
    ]
    if apart:
        diverged += f": {_seeds(len(apart))} ran on two machines ({', '.join(map(str, apart))})"
    are = "is" if result.missing == 1 else "are"
    return f"; {result.missing} of {result.n + result.missing} seeds {are} missing{diverged}"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def _amount(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "?"


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-6 else "p < 0.000001"


def tokens_of(run: Planned, step: int) -> int:
    """Return the tokens that a run has trained on after so many steps."""
    size = ModelParams.model_validate(run.params["model"]).block_size
    return TrainParams.model_validate(run.params["train"]).batches(size)(step)[0] * size


def training_seconds(runs: list[Finished]) -> float:
    """Return the training time of the finished ones among these runs."""
    return float(sum(one.training["seconds"] for one in runs if one.training))


def status(study: Study, results: Results) -> str:
    """Return what is finished, for the terminal; writes nothing."""
    runs = planned(study, results)
    if runs is None:
        return (
            f"{study.name}: no speed is measured on this machine with these settings "
            "(machine.yaml, GPT2_*); it is measured before the first run"
        )
    lines, by_variant = [], _read(study, results, runs)
    for variant, found in by_variant.items():
        states = "  ".join(f"{one.run.seed}: {_state(one)}" for one in found)
        lines.append(f"{variant:24} {states}")
    finished = sum(one.record is not None for found in by_variant.values() for one in found)
    summary = f"{finished} of {len(runs)} runs are finished; {study.file.metric} by seed"
    return "\n".join([f"{study.name}: {summary}", *lines])


def _state(one: Finished) -> str:
    if one.record is None:
        return "missing"
    return "diverged" if one.failed else number(one.value)


def _as_json(found: Found) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        **asdict(found.result),
        "p_corrected": found.p,
        "better": found.better,
        "preliminary": found.preliminary,
        "more_seeds": found.more_seeds,
        "resolves": found.resolves,
        "verdict": found.sentence,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
