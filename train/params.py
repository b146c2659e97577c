"""Sections `model`, `train` and `evaluate` of `params.yaml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from model.config import Activation, GPTConfig, Positions, check_temperature
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import Section
from train.checkpoint.start import Start
from train.data import phases
from train.optim.schedule import BatchSchedule, Schedule

if TYPE_CHECKING:
    from train.numerics import Dtype


class ModelParams(Section):
    """`model`: the size of the GPT-2 that is trained."""

    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """Name of a published size (gpt2 is 124M), or null and the three numbers below."""

    n_layer: int | None = Field(default=None, ge=1)
    """Transformer blocks; null where `size` is given."""

    n_head: int | None = Field(default=None, ge=1)
    """Attention heads per block, a divisor of `n_embd`; null where `size` is given."""

    n_embd: int | None = Field(default=None, ge=1)
    """Width of the residual stream (C); null where `size` is given."""

    block_size: int = Field(default=1024, ge=1)
    """Context length in tokens (T, at least 1; published: 1024)."""

    positions: Positions = "learned"
    """`learned`: a table of positions, as GPT-2; or `rotary`: RoFormer (Su et al. 2021)."""

    qk_norm: bool = False
    """RMSNorm without gain of queries and keys (after Henry et al. 2020). GPT-2: false."""

    activation: Activation = "gelu"
    """Of the MLP: `gelu`, as GPT-2; or `relu_squared`: Primer (So et al. 2021)."""

    zero_init: bool = False
    """Whether the maps that end in the residual stream start at zero. GPT-2: false."""

    @model_validator(mode="after")
    def _either_a_size_or_three_numbers(self) -> ModelParams:
        numbers = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}
        if self.size is not None:
            if given := [name for name, value in numbers.items() if value is not None]:
                raise ValueError(
                    f"size {self.size} already sets {', '.join(given)}; set one side to null"
                )
            return self
        missing = [name for name, value in numbers.items() if value is None]
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing; set them, or set size")
        self.config()  # raises on sizes that no GPT-2 can have
        return self

    def config(self) -> GPTConfig:
        """The model's configuration."""
        values = self.model_dump(exclude={"size"}, exclude_none=True)
        return GPTConfig.named(self.size, **values) if self.size else GPTConfig.from_dict(values)


class ObservingParams(Section):
    """The keys of `train` that only observe a run: no weight depends on them.

    They are no part of a run's key. Changing one continues an unfinished run under the new value,
    and retrains no finished one.
    """

    val_every: int = Field(default=250, ge=1)
    """Steps between validations (at least 1); the last step is always validated."""

    val_tokens: int = Field(ge=1)
    """Tokens per validation, spread evenly over the validation split (published: 10485760)."""

    hellaswag: str | None = Field(default=None, min_length=1)
    """HellaSwag tasks to score during training: `hub`, the path of a .jsonl file, or null."""

    hellaswag_every: int | None = Field(default=None, ge=1)
    """Steps between scores, a multiple of `val_every`; the last step is scored; null: never."""

    checkpoint_every: int = Field(default=250, ge=1)
    """Steps between checkpoints (at least 1); the last step is always saved."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept in the store (at least 1; with 2, one may be damaged)."""

    keep_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that are kept for good; null: none. The best is always kept."""

    non_finite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient (NaN or Inf): `stop` the run, or `skip` the step's update.
    It decides nothing while all steps are finite; a skipped step stays in the log."""

    sample_tokens: int = Field(default=48, ge=0)
    """New tokens of the sample at each validation (0: no sample)."""

    log_every: int = Field(default=10, ge=1)
    """Steps between log lines and points of the curves (at least 1)."""

    @model_validator(mode="after")
    def _kept_checkpoints_are_saved(self) -> ObservingParams:
        _check_multiple(self, "keep_every", "checkpoint_every")
        return self

    @model_validator(mode="after")
    def _hellaswag_goes_with_a_validation(self) -> ObservingParams:
        if (self.hellaswag is None) != (self.hellaswag_every is None):
            raise ValueError(
                f"hellaswag {self.hellaswag or 'null'} and hellaswag_every "
                f"{self.hellaswag_every or 'null'} go together; set both, or both to null"
            )
        _check_multiple(self, "hellaswag_every", "val_every")
        return self


def _check_multiple(params: Section, name: str, of: str) -> None:
    value, unit = getattr(params, name), getattr(params, of)
    if value is not None and value % unit:
        raise ValueError(
            f"{name} {value} is no multiple of {of} {unit}; set {-(-value // unit) * unit}"
        )


class TrainParams(ObservingParams):
    """`train`: how the model is trained. All keys decide the weights but those that observe."""

    seed: int = Field(default=1337, ge=0, lt=2**32)
    """Decides the initial weights and the sampling order (0 to 2^32 - 1)."""

    init: str = "scratch"
    """Initial weights: `scratch` (drawn from the seed), `checkpoint DIR`, or `hf DIR`."""

    init_with: Literal["weights", "all"] = "weights"
    """Of a checkpoint: only its `weights`, or `all`: its optimizer state and step as well."""

    steps: int = Field(ge=1)
    """Optimizer steps (at least 1)."""

    batch_tokens: int = Field(ge=1)
    """Tokens per step over all processes, a multiple of `model.block_size` (124M: 524288)."""

    batch_doublings: int = Field(default=0, ge=0, le=16)
    """Times the batch doubles until it is `batch_tokens` (0 to 16; 0: full from the start)."""

    batch_ramp_steps: int = Field(default=0, ge=0)
    """Steps before the batch is full, shared evenly by the smaller sizes (0 to below `steps`)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the blocks, AdamW for all other parameters."""

    learning_rate: float = Field(gt=0, lt=1)
    """Peak learning rate (above 0, below 1; 124M: 6e-4)."""

    embeddings_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the embeddings, as a multiple of `learning_rate` (above 0)."""

    vectors_lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of vectors (biases and LayerNorms), likewise (above 0)."""

    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a fraction of `learning_rate` (0 to 1)."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: `cosine`; `wsd`, stable, then linear decay; or `constant`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up (0 to below `steps`)."""

    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """`wsd` only: fraction of the steps over which the rate decays at the end (above 0, to 1)."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, of matrices only (0 or more)."""

    embeddings_decay: bool = True
    """Whether token and position embeddings decay with the matrices."""

    weight_decay_schedule: Literal["constant", "linear"] = "constant"
    """`constant`; or `linear`: from `weight_decay` at step 0 to 0 at the last (nanochat)."""

    cautious_decay: bool = False
    """Decay a weight only where its update has the same sign (Chen et al. 2025); copies weights."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the first moment (0 to below 1)."""

    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the second moment (0 to below 1)."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the denominator (above 0)."""

    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters (above 0); null: no clipping."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the matrix products (autocast); weights and optimizer are float32 in any case.
    float16 scales the loss. `auto`: bfloat16 where the device computes it natively, else float16 on
    a GPU with tensor cores, else float32; recorded as that."""

    order: Literal["shuffled", "sequential"] = "shuffled"
    """Sampling order: a new permutation of the windows per epoch, or their order on disk."""

    mixture: Annotated[Any, BeforeValidator(phases.parse)] = None
    """Weights of the sources, such as {web: 7, code: 3}, or phases with weights; null: all tokens
    of all sources as one stream (docs/mixtures.md)."""

    document_masking: bool = False
    """Whether attention and positions stay within a document: a window's documents are independent
    of each other, in training and in validation (docs/documents.md)."""

    deterministic: bool = False
    """On CUDA: only algorithms whose results repeat bit for bit, slower. A CPU always repeats."""

    invariant: int | None = Field(default=None, ge=1)
    """Sequences per forward pass, summed in an order that no number of processes changes: the
    weights are the same bits for any (docs/invariant.md). null: rounding depends on it."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainParams:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves nothing of {self.steps} steps; "
                f"set at most {self.steps - 1}"
            )
        return self

    @model_validator(mode="after")
    def _start_parses(self) -> TrainParams:
        self.start()
        return self

    @model_validator(mode="after")
    def _batch_ramp_ends(self) -> TrainParams:
        if self.batch_ramp_steps >= self.steps:
            raise ValueError(
                f"batch_ramp_steps {self.batch_ramp_steps} leaves nothing of {self.steps} steps; "
                f"set at most {self.steps - 1}"
            )
        if bool(self.batch_doublings) != bool(self.batch_ramp_steps):
            raise ValueError(
                f"batch_doublings {self.batch_doublings} and batch_ramp_steps "
                f"{self.batch_ramp_steps} go together; set both, or both to 0"
            )
        return self

    def deciding(self) -> dict[str, Any]:
        """The keys that decide the weights, as JSON values: part of a run's key."""
        values = self.model_dump(mode="json", exclude=set(ObservingParams.model_fields))
        if values["invariant"] is None:  # runs without it keep the keys that they had before it
            del values["invariant"]
        return values

    def resolved(self, native: Dtype) -> TrainParams:
        """These parameters with ``native`` in the place of `dtype: auto`."""
        return self.model_copy(update={"dtype": native}) if self.dtype == "auto" else self

    def matmul_dtype(self) -> Dtype:
        """Type of the matrix products, of parameters that are `resolved`."""
        assert self.dtype != "auto", "resolved() first"
        return self.dtype

    def observing(self) -> dict[str, Any]:
        """The keys that only observe, as JSON values."""
        return self.model_dump(mode="json", include=set(ObservingParams.model_fields))

    def start(self) -> Start | None:
        """The weights that the run starts from; None: drawn from the seed."""
        return Start.parse(self.init, self.init_with)

    def kept(self) -> int:
        """Most checkpoints that a finished run holds: the newest, the best, and each n-th."""
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

    def lr_ratios(self) -> dict[str, float]:
        """Learning rate of the parameter groups that have their own, as multiples."""
        return {"embeddings": self.embeddings_lr_ratio, "vectors": self.vectors_lr_ratio}

    def decay_fraction(self, step: int) -> float:
        """Fraction of `weight_decay` that applies at a step, counted from 0."""
        if self.weight_decay_schedule == "constant":
            return 1.0
        return 1.0 - step / max(1, self.steps - 1)

    def batches(self, block_size: int) -> BatchSchedule:
        """The samples (windows of `block_size` tokens) of each step.

        Raises:
            UserError: `batch_tokens` is no multiple of the block size times 2^doublings.
        """
        unit = block_size << self.batch_doublings
        windows, rest = divmod(self.batch_tokens, unit)
        if rest:
            nearest = [n * unit for n in (windows, windows + 1) if n]
            ramp = f" times 2^{self.batch_doublings} (batch_doublings)" if unit > block_size else ""
            raise UserError(
                f"params.yaml: train.batch_tokens: {self.batch_tokens} is no multiple of "
                f"model.block_size {block_size}{ramp}; set {' or '.join(map(str, nearest))}"
            )
        return BatchSchedule(
            full=self.batch_tokens // block_size,
            doublings=self.batch_doublings,
            ramp_steps=self.batch_ramp_steps,
        )


class EvaluateParams(Section):
    """`evaluate`: how the trained model is measured and sampled."""

    val_tokens: int = Field(ge=1)
    """Tokens to measure the loss on, spread evenly over the validation split."""

    val_shards: str | None = Field(default=None, min_length=1)
    """A token file in llm.c's format, such as the FineWeb validation tokens of published runs: the
    loss of its first `val_tokens` tokens is measured as well. Null: none."""

    held_out: str | None = Field(default=None, min_length=1)
    """A file of text (.txt, .jsonl, .parquet) that no training data contains: bits per byte over
    all of it, which compare models of any data. Null: none."""

    hellaswag: str | None = Field(default=None, min_length=1)
    """HellaSwag tasks: `hub` (all 10,042, downloaded), the path of a .jsonl file, or null."""

    lambada: str | None = Field(default=None, min_length=1)
    """LAMBADA tasks: `hub` (all 5,153), a .jsonl file with a `text` per line, or null."""

    prompts: tuple[str, ...] = Field(default=("",), strict=False)  # YAML has lists only
    """Texts to continue; the empty text is the beginning of a document."""

    samples: int = Field(default=2, ge=0)
    """Samples per prompt (0 or more)."""

    sample_tokens: int = Field(default=128, ge=1)
    """New tokens per sample (at least 1)."""

    temperature: Annotated[float, AfterValidator(check_temperature)] = 0.8
    """0: always the likeliest token; 1: the model's own distribution; above: flatter."""

    top_k: int | None = Field(default=50, ge=1)
    """Sample among the k likeliest tokens (at least 1); null: among all."""

    seed: int = Field(default=1337, ge=0, lt=2**32)
    """Seed of the samples (0 to 2^32 - 1)."""
