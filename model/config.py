"""Sizes and options of a GPT-2, validated and immutable."""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from model.errors import ConfigError

EOT = 50256
"""Id of `<|endoftext|>`, the last of GPT-2's 50257 tokens; every document starts with it."""

PAD_MULTIPLE = 128
"""The table of tokens is padded to a multiple of this for fast kernels (50257 -> 50304)."""

LARGEST = 2**31 - 1
"""Of each size: larger ones are mistakes, and overflow in products and other programs."""

COLDEST, HOTTEST = 2.0**-126, 2.0**127
"""Temperatures that float32 can divide by."""

Positions = Literal["learned", "rotary"]
Activation = Literal["gelu", "relu_squared"]

VARIANTS = ("positions", "qk_norm", "activation")
"""Fields whose default is GPT-2 as published, and other values another model (`variants.py`)."""

_SIZES = {
    # Radford et al. 2019, table 2: n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT-2, with the letters of the shape comments.

    Attributes:
        n_layer: Number of transformer blocks (L).
        n_head: Attention heads per block (H); divides `n_embd`.
        n_embd: Width of the residual stream (C).
        block_size: Longest sequence in tokens (largest T); the number of learned positions.
        vocab_size: Number of tokens in the vocabulary (V), and width of the logits.
        document_positions: Restart positions at 0 for each document, if `documents` are given.
        loss_chunk: Tokens per chunk of the loss (R). None chooses, and so does 0 (`loss.py`).
            Changes rounding only.
        checkpoint_activations: Keep only the input of each block for the backward pass, and
            recompute the rest: a third more FLOPs for far less memory. Changes no result.
        positions: "learned", or "rotary" without a table (Su et al. 2021); see `variants.py`.
        qk_norm: Normalise queries and keys (Henry et al. 2020); see `variants.py`.
        activation: Of the MLP: "gelu", or "relu_squared" (So et al. 2021).
        zero_init: Maps that end in the residual stream start at zero (`init.py`).

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024
    vocab_size: int = 50257
    document_positions: bool = True
    loss_chunk: int | None = None
    checkpoint_activations: bool = False
    positions: Positions = "learned"
    qk_norm: bool = False
    activation: Activation = "gelu"
    zero_init: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            _require_count(name, getattr(self, name))
        if self.loss_chunk == 0:
            object.__setattr__(self, "loss_chunk", None)
        if self.loss_chunk is not None:
            _require_count("loss_chunk", self.loss_chunk, alternative=", or null to choose")
        for name in ("document_positions", "checkpoint_activations", "qk_norm", "zero_init"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be true or false, not {reprlib.repr(getattr(self, name))}"
                )
        _require_choice("positions", self.positions, get_args(Positions))
        _require_choice("activation", self.activation, get_args(Activation))
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}): "
                f"try n_embd={self.n_head * max(1, round(self.n_embd / self.n_head))}"
            )
        if self.positions == "rotary" and self.n_embd // self.n_head % 2:
            raise ConfigError(
                f"n_embd ({self.n_embd}) over n_head ({self.n_head}) must be even for positions "
                f"'rotary', which rotates pairs of channels: try n_embd={self.n_embd + self.n_head}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table (P): `vocab_size` rounded up to a multiple of 128, for speed."""
        return -(-self.vocab_size // PAD_MULTIPLE) * PAD_MULTIPLE

    @property
    def variants(self) -> dict[str, Any]:
        """The `VARIANTS` that differ from GPT-2 as published, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in VARIANTS and getattr(self, field.name) != field.default
        }

    @classmethod
    def named(cls, name: str, **overrides: Any) -> GPTConfig:
        """Return a published size: `gpt2` (124M), `-medium` (355M), `-large` (774M), `-xl` (1.6B).

        `overrides` change fields, e.g. `block_size=256`.

        Raises:
            ConfigError: The name or a field is unknown.
        """
        if name not in _SIZES:
            raise ConfigError(f"unknown model size {name!r}: choose one of {', '.join(_SIZES)}")
        n_layer, n_head, n_embd = _SIZES[name]
        return cls.from_dict({"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """Build a config from `to_dict`; fields with defaults may be absent.

        Raises:
            ConfigError: A key is missing or unknown; for an unknown one the nearest is suggested.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = (
                    f": did you mean {near[0]!r}?"
                    if near
                    else f": the keys are {', '.join(fields)}"
                )
                raise ConfigError(f"unknown model key {reprlib.repr(key)}{hint}")
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise ConfigError(f"model key {name!r} is missing")
        return cls(**values)


def _require_count(name: str, value: object, alternative: str = "") -> None:
    # bool is a subclass of int, but n_layer=True is a mistake
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise ConfigError(
            f"{name} must be an integer of at least 1 and at most {LARGEST:,}{alternative}, "
            f"not {reprlib.repr(value)}"
        )


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, not {reprlib.repr(value)}")


def require_gpt2(config: GPTConfig, layout: str, but: Sequence[str] = ()) -> None:
    """Check that a layout of GPT-2 can hold a model.

    Args:
        config: The model.
        layout: Name of the layout, for the message.
        but: Variants that the layout can hold.

    Raises:
        ConfigError: It cannot; the message names the option.
    """
    for name, value in config.variants.items():
        if name not in but:
            raise ConfigError(
                f"model.{name} is {json.dumps(value)}, which {layout} cannot hold: only models "
                "with the default can be exported to it"
            )


def check_temperature(value: float) -> float:
    """Return a sampling temperature.

    Raises:
        ConfigError: It is neither 0 nor a number that float32 can divide by.
    """
    if value != 0 and not COLDEST <= value <= HOTTEST:
        raise ConfigError(
            f"temperature must be 0 (greedy) or from {COLDEST:.3g} to {HOTTEST:.3g}, not {value}"
        )
    return value
