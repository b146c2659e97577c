"""GPT-2 (Radford et al. 2019): a stack of pre-LayerNorm transformer blocks over learned positions.

    tokens -> wte + wpe -> [ x + attn(ln_1(x)),  x + mlp(ln_2(x)) ] x L -> ln_f -> wteᵀ -> logits

The output head is the embedding table again (tied weights). Parameters carry the names of the field
(`h.0.attn.c_attn.weight`); `Linear` weights are [out, in].
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.utils.checkpoint import checkpoint

from model import checkpoint as checkpoint_format
from model import generation, hf
from model.attention import (
    CausalSelfAttention,
    KVCache,
    Mask,
    Recall,
    document_mask,
    document_positions,
)
from model.config import EOT, GPTConfig
from model.errors import ConfigError, FormatError
from model.init import initialise
from model.layers import GELU, Embedding, Implementation, LayerNorm, Linear, explicit_linear
from model.loss import Reduction, cross_entropy, linear_cross_entropy


class MLP(Module):
    """Two linear maps with a GELU between, four times as wide inside. Output: that of `Linear`.

    Each token by itself: what attention has gathered is worked on here.
    """

    def __init__(self, config: GPTConfig, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, implementation)
        self.gelu = GELU(implementation)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, implementation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.gelu(self.c_fc(x))  # (B, T, 4 C)
        return self.c_proj(x)


class Block(Module):
    """Communication, then computation, each added to the residual stream. Output: float32.

    LayerNorm stands before each (Radford et al. 2019), not after it as in Vaswani et al.: from the
    embeddings to the head runs a path of additions alone, on which gradients pass unchanged.
    """

    def __init__(self, config: GPTConfig, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, implementation)
        self.attn = CausalSelfAttention(config, implementation)
        self.ln_2 = LayerNorm(config.n_embd, implementation)
        self.mlp = MLP(config, implementation)

    def forward(self, x: Tensor, mask: Mask = None, recall: Recall | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, recall)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(Module):
    """The language model.

    `GPT(config)` has the weights of `init.py`, unless it is built on the meta device; use
    `GPT.initialised`, `from_checkpoint` or `from_hf` where a second copy of the weights would not
    fit.

    Args:
        config: Sizes and options.
        implementation: "fused" kernels, or the "explicit" mathematics. The results differ by
            rounding only; explicit holds all attention scores and all logits, and is meant for
            reading and tests.
        seed: Decides the initial weights.

    Attributes:
        checkpoint_activations: As in the config, and may be set at any time.
        loss_chunk: Likewise.
    """

    def __init__(
        self, config: GPTConfig, *, implementation: Implementation = "fused", seed: int = 0
    ) -> None:
        super().__init__()
        if implementation not in ("fused", "explicit"):
            raise ConfigError(
                f"implementation must be 'fused' or 'explicit', not {implementation!r}"
            )
        self.config = config
        self.implementation: Implementation = implementation
        self.checkpoint_activations = config.checkpoint_activations
        self.loss_chunk = config.loss_chunk
        self.wte = Embedding(config.padded_vocab_size, config.n_embd, implementation)
        self.wpe = Embedding(config.block_size, config.n_embd, implementation)
        self.h = ModuleList(Block(config, implementation) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, implementation)
        if not self.wte.weight.is_meta:
            initialise(self, config, seed)

    # -- the model itself --------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: Reduction = "mean",
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, or, given the next tokens, the loss.

        Args:
            tokens: (B, T) int64, T up to `block_size`.
            targets: (B, T) int64, the token after each; -100 where it does not count.
            reduction: "mean" over the targets that count (0 if none does), "sum", or "none".
            documents: (B, T) int64 document ids. Given, no token sees another document's, and
                positions restart with each (unless `config.document_positions` is false).

        Returns:
            Without targets: logits (B, T, V), of `Linear`'s type, V = `vocab_size` (never padded).
            With: the loss, float32, a scalar in nats, or (B, T) for "none" with 0 where ignored.
            The B*T*V logits are never held (see `loss.py`).

        Raises:
            ConfigError: A sequence longer than `block_size`, shapes that differ, an unknown
                reduction.
        """
        x = self.hidden(tokens, documents)  # (B, T, C)
        if targets is None:
            return self.head(x)
        if targets.shape != tokens.shape:
            raise ConfigError(f"targets are {tuple(targets.shape)}, tokens {tuple(tokens.shape)}")
        if self.implementation == "explicit":
            return cross_entropy(self.head(x), targets, reduction)
        weight, V = self.wte.weight, self.config.vocab_size
        return linear_cross_entropy(x, weight, targets, V, reduction, self.loss_chunk)

    def hidden(
        self, tokens: Tensor, documents: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the head reads: (B, T) int64 -> (B, T, C) float32. `cache` holds earlier tokens."""
        T = tokens.shape[1]
        if self.config.block_size < T:
            raise ConfigError(f"a sequence of {T} tokens: block_size is {self.config.block_size}")
        mask: Mask = None
        positions = torch.arange(T, device=tokens.device)  # (T,)
        if documents is not None:
            if documents.shape != tokens.shape:
                raise ConfigError(
                    f"documents are {tuple(documents.shape)}, tokens {tuple(tokens.shape)}"
                )
            mask = document_mask(documents, self.implementation)
            if self.config.document_positions:
                positions = document_positions(documents)  # (B, T)
        if cache is not None:
            assert documents is None, "generation continues one document a row"
            positions, mask = cache.expect(T)  # (B, T), (B, 1, T, S)

        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.h):
            recall = None if cache is None else partial(cache.recall, layer)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(  # nothing in a block is random: there is no such state to keep
                    block, x, mask, recall, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, mask, recall)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C): all padded rows are multiplied, then cut."""
        linear = F.linear if self.implementation == "fused" else explicit_linear
        return linear(x, self.wte.weight)[..., : self.config.vocab_size]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: Reduction = "mean",
        documents: Tensor | None = None,
    ) -> Tensor:
        """`forward` with targets. For unwrapped models: DDP and compile hook `forward` alone."""
        return self(tokens, targets, reduction, documents)

    # -- text --------------------------------------------------------------------------------------

    def generate(
        self,
        tokens: generation.Prompts,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | None = EOT,
    ) -> generation.Prompts:
        """Prompts and what the model adds to them; see `generation.py` for the arguments.

        Args:
            tokens: (B, T) int64, or a list of lists of any lengths.
            max_new_tokens: At most so many are added to each row.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Sample from the k likeliest tokens only.
            top_p: Sample from the fewest likeliest tokens that have this much probability together.
            seed: Makes the result repeatable, on any device up to rounding of the logits.
            stop: A row ends after this token; None never ends early.

        Returns:
            A tensor for a tensor: (B, T + new) int64, rows that ended sooner filled up with `stop`.
            For lists a list of lists, prompt and `stop` included.
        """
        return generation.generate(
            self, tokens, max_new_tokens, temperature, top_k, top_p, seed, stop
        )

    # -- making and keeping ------------------------------------------------------------------------

    @classmethod
    def initialised(
        cls,
        config: GPTConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        implementation: Implementation = "fused",
    ) -> GPT:
        """A model with the weights of `init.py`, on `device`, without a second copy anywhere."""
        gpt = cls._unallocated(config, implementation)
        gpt.to_empty(device=device)
        initialise(gpt, config, seed)
        return gpt

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, implementation: Implementation = "fused"
    ) -> GPT:
        """The model of a training checkpoint (`model.safetensors`, `state.json`), on the CPU.

        Raises:
            FormatError: A file is missing or does not hold this model.
        """
        config, state = checkpoint_format.read(Path(folder))
        return cls._unallocated(config, implementation)._with(state, Path(folder))

    @classmethod
    def from_hf(cls, folder: str | Path, *, implementation: Implementation = "fused") -> GPT:
        """The model of a folder in the Hugging Face GPT-2 layout (safetensors only), on the CPU.

        Raises:
            FormatError: A file or tensor is missing, unknown, or of another architecture.
        """
        config, state = hf.read(Path(folder))
        return cls._unallocated(config, implementation)._with(state, Path(folder))

    def to_hf(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors, generation_config.json for `transformers`."""
        hf.write(Path(folder), self.config, self.state_dict())

    @classmethod
    def _unallocated(cls, config: GPTConfig, implementation: Implementation) -> GPT:
        with torch.device("meta"):
            return cls(config, implementation=implementation)

    def _with(self, state: dict[str, Tensor], source: Path) -> GPT:
        """Takes the tensors of `state` (no copy) as parameters, after checking names and shapes."""
        expected = self.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            if name not in state:
                raise FormatError(f"{source}: tensor {name!r} is missing")
            if name not in expected:
                raise FormatError(f"{source}: tensor {name!r} is no part of this model")
            if state[name].shape != expected[name].shape:
                raise FormatError(
                    f"{source}: tensor {name!r} is {tuple(state[name].shape)}, "
                    f"but its config asks for {tuple(expected[name].shape)}"
                )
        self.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        return self
