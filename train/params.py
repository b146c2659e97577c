"""Sections `model`, `train` and `evaluate` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from model.config import GPTConfig
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import Section
from train.optim.schedule import BatchSchedule, Schedule


@dataclass(frozen=True)
class Start:
    """A folder of weights, and how much of it is taken.

    Attributes:
        kind: "checkpoint" or "hf".
        folder: Where it is.
        whole: Whether a checkpoint's optimizer and step are taken as well.
    """

    kind: str
    folder: Path
    whole: bool

    @classmethod
    def parse(cls, init: str, init_with: str) -> Start | None:
        """What `train.init` and `train.init_with` say; None for `scratch`.

        Raises:
            ValueError: They say nothing that can be done.
        """
        kind, _, folder = init.partition(" ")
        whole = init_with == "all"
        if kind not in ("scratch", "checkpoint", "hf") or bool(folder.strip()) != (
            kind != "scratch"
        ):
            raise ValueError(f"init {init!r}: write scratch, checkpoint DIR, or hf DIR")
        if whole and kind != "checkpoint":
            raise ValueError(f"init_with all needs a checkpoint to start from; init is {init}")
        return None if kind == "scratch" else cls(kind, Path(folder.strip()).expanduser(), whole)


class ModelParams(Section):
    """`model`: the size of the GPT-2 that is trained."""

    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """A published size by its name (gpt2 is 124M), or null and the three numbers below."""

    n_layer: int | None = Field(default=None, ge=1)
    """Transformer blocks; null where `size` is given."""

    n_head: int | None = Field(default=None, ge=1)
    """Attention heads a block, a divisor of `n_embd`; null where `size` is given."""

    n_embd: int | None = Field(default=None, ge=1)
    """Width of the residual stream (C); null where `size` is given."""

    block_size: int = Field(default=1024, ge=1)
    """Context, tokens a sequence (T, at least 1; published: 1024)."""

    @model_validator(mode="after")
    def _one_way_of_saying_it(self) -> ModelParams:
        numbers = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}
        if self.size is not None:
            given = [name for name, value in numbers.items() if value is not None]
            if given:
                raise ValueError(
                    f"size {self.size} says what {', '.join(given)} say; set one side to null"
                )
            return self
        missing = [name for name, value in numbers.items() if value is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; give a number, or size a name")
        self.config()  # refuses what no GPT-2 can be, and names the mend
        return self

    def config(self) -> GPTConfig:
        """The model's own configuration."""
        if self.size is not None:
            return GPTConfig.named(self.size, block_size=self.block_size)
        assert self.n_layer is not None
        assert self.n_head is not None
        assert self.n_embd is not None
        return GPTConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
        )


class TrainParams(Section):
    """`train`: everything that decides the weights that come out."""

    seed: int = Field(default=1337, ge=0, lt=2**32)
    """Decides initial weights and order of data (0 to 2^32 - 1)."""

    init: str = "scratch"
    """What the run starts from: `scratch` (the seed), `checkpoint DIR`, `hf DIR` (see start.py)."""

    init_with: Literal["weights", "all"] = "weights"
    """What is taken of a checkpoint: its `weights`; or `all`, its optimizer and its step too."""

    steps: int = Field(ge=1)
    """Optimizer steps (at least 1)."""

    batch_tokens: int = Field(ge=1)
    """Tokens a step over all processes, a multiple of `model.block_size` (124M: 524288)."""

    batch_doublings: int = Field(default=0, ge=0, le=16)
    """How often the batch doubles until it is `batch_tokens` (0 to 16; 0: whole from the start)."""

    batch_ramp_steps: int = Field(default=0, ge=0)
    """Steps before the batch is whole, shared evenly by the smaller sizes (0 to below `steps`)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the blocks, AdamW for the rest."""

    learning_rate: float = Field(gt=0, lt=1)
    """Highest learning rate (above 0, below 1; 124M: 6e-4)."""

    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a part of `learning_rate` (0 to 1)."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: `cosine`; `wsd`, stable, then linear decay; or `constant`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise (0 to below `steps`)."""

    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """`wsd` only: part of the steps over which the rate falls at the end (above 0, to 1)."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay, of matrices only (0 or more)."""

    embeddings_decay: bool = True
    """Whether token and position embeddings decay with the matrices."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: memory of the mean of gradients (0 to below 1)."""

    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: memory of the mean of squared gradients (0 to below 1)."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the denominator (above 0)."""

    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient (above 0); null: not clipped."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the matrix products (autocast); weights and optimizer are float32 in any case."""

    order: Literal["shuffled", "sequential"] = "shuffled"
    """Order of the windows: a new permutation each epoch, or as the tokens lie on the disk."""

    deterministic: bool = False
    """On CUDA: only algorithms whose results repeat bit for bit, slower. A CPU always repeats."""

    val_every: int = Field(default=250, ge=1)
    """Steps between validations (at least 1); the last step is always validated."""

    val_tokens: int = Field(ge=1)
    """Tokens of a validation: the first so many of the validation split (published: 10485760)."""

    hellaswag: str | None = Field(default=None, min_length=1)
    """Tasks of HellaSwag, asked while it trains: `hub`, the path of a .jsonl file, or null."""

    hellaswag_every: int | None = Field(default=None, ge=1)
    """Steps between these, a multiple of `val_every` (the last step, too); null: never."""

    checkpoint_every: int = Field(default=250, ge=1)
    """Steps between checkpoints (at least 1); the last step is always saved."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept in the store (at least 1; with 2, one may break)."""

    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of each so many steps are kept for good; null: none. The best is kept always."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: the run stops, or the step is skipped."""

    sample_tokens: int = Field(default=48, ge=0)
    """New tokens of the sample at each validation (0: none): one text, seen to get better."""

    log_every: int = Field(default=10, ge=1)
    """Steps between lines of the log and points of the curves (at least 1)."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainParams:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves nothing of {self.steps} steps; "
                f"at most {self.steps - 1}"
            )
        return self

    @model_validator(mode="after")
    def _starts_from_something(self) -> TrainParams:
        self.start()
        return self

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> TrainParams:
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            near = -(-self.keep_every // self.checkpoint_every) * self.checkpoint_every
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every "
                f"{self.checkpoint_every}; take {near}"
            )
        return self

    @model_validator(mode="after")
    def _hellaswag_with_a_validation(self) -> TrainParams:
        if (self.hellaswag is None) != (self.hellaswag_every is None):
            raise ValueError(
                f"hellaswag {self.hellaswag or 'null'} and hellaswag_every "
                f"{self.hellaswag_every or 'null'} go together; set both, or both to null"
            )
        if self.hellaswag_every is not None and self.hellaswag_every % self.val_every:
            near = -(-self.hellaswag_every // self.val_every) * self.val_every
            raise ValueError(
                f"hellaswag_every {self.hellaswag_every} is no multiple of val_every "
                f"{self.val_every}; take {near}"
            )
        return self

    @model_validator(mode="after")
    def _ramp_is_whole(self) -> TrainParams:
        if self.batch_ramp_steps >= self.steps:
            raise ValueError(
                f"batch_ramp_steps {self.batch_ramp_steps} leaves nothing of {self.steps} steps; "
                f"at most {self.steps - 1}"
            )
        if bool(self.batch_doublings) != bool(self.batch_ramp_steps):
            raise ValueError(
                f"batch_doublings {self.batch_doublings} and batch_ramp_steps "
                f"{self.batch_ramp_steps} go together; set both, or both to 0"
            )
        return self

    def start(self) -> Start | None:
        """What the run starts from; None: from nothing."""
        return Start.parse(self.init, self.init_with)

    def kept(self) -> int:
        """Checkpoints that a finished run holds at most: the newest, the best, and each n-th."""
        return self.keep_checkpoints + 1 + (self.steps // self.keep_every if self.keep_every else 0)

    def lr_schedule(self) -> Schedule:
        """The learning rate as a function of the step."""
        return Schedule(
            kind=self.schedule,
            peak=self.learning_rate,
            minimum=self.learning_rate * self.min_lr_ratio,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            decay_steps=max(1, round(self.steps * self.decay_ratio)),
        )

    def batches(self, block_size: int) -> BatchSchedule:
        """Which samples (windows of `block_size` tokens) each step takes.

        Raises:
            UserError: `batch_tokens` is no multiple of the block size, or not so often halved.
        """
        unit = block_size << self.batch_doublings
        windows, rest = divmod(self.batch_tokens, unit)
        if rest:
            near = [n * unit for n in (windows, windows + 1) if n]
            ramp = f" times 2^{self.batch_doublings} (batch_doublings)" if unit > block_size else ""
            raise UserError(
                f"params.yaml: train.batch_tokens: {self.batch_tokens} is no multiple of "
                f"model.block_size {block_size}{ramp}; nearest: {' and '.join(map(str, near))}"
            )
        return BatchSchedule(
            full=self.batch_tokens // block_size,
            doublings=self.batch_doublings,
            ramp_steps=self.batch_ramp_steps,
        )


class EvaluateParams(Section):
    """`evaluate`: how a trained model is measured and shown."""

    val_tokens: int = Field(ge=1)
    """Tokens measured: the first so many of the validation split."""

    val_shards: str | None = Field(default=None, min_length=1)
    """A token file in llm.c's format, such as the FineWeb validation tokens of published runs:
    its first `val_tokens` are measured as well. Null: none."""

    hellaswag: str | None = Field(default=None, min_length=1)
    """Tasks of HellaSwag: `hub`, all 10,042 of them, downloaded; the path of a .jsonl file; or
    null, not measured."""

    lambada: str | None = Field(default=None, min_length=1)
    """The same of LAMBADA: `hub`, all 5,153; a .jsonl file, each line with a `text`; or null."""

    prompts: tuple[str, ...] = Field(default=("",), strict=False)  # YAML has lists only
    """Text to continue; the empty text is the beginning of a document."""

    samples: int = Field(default=2, ge=0)
    """Samples a prompt (0 or more)."""

    sample_tokens: int = Field(default=128, ge=1)
    """New tokens a sample (at least 1)."""

    temperature: float = Field(default=0.8, ge=0)
    """0: always the likeliest token; 1: the model's own distribution; above: flatter."""

    top_k: int | None = Field(default=50, ge=1)
    """Sample among the so many likeliest tokens (at least 1); null: among all."""

    seed: int = Field(default=1337, ge=0, lt=2**32)
    """Of the samples (0 to 2^32 - 1)."""
