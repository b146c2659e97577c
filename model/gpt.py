"""GPT-2 (Radford et al. 2019): a decoder-only transformer.

    tokens -> wte + wpe -> [ x + attn(ln_1(x)),  x + mlp(ln_2(x)) ] x L -> ln_f -> wteᵀ -> logits

Notable features:

- LayerNorm before attention and MLP, not after, and once more before the head (arXiv 2002.04745)
- learned absolute positions; biases in all linear maps; no dropout
- tanh approximation of GELU (arXiv 1606.08415)
- tied weights: the output head is the token embedding table (arXiv 1608.05859)
- token table padded from 50,257 to 50,304 rows for fast products; logits exclude the padding
- loss in chunks of tokens: the B*T*V logits are never in memory at once (`loss.py`)
- optional: attention within documents only, FlexAttention when compiled for CUDA (arXiv 2412.05496)
- optional: activation checkpointing per block (arXiv 1604.06174)
- optional, and not in GPT-2: rotary positions, QK-norm, ReLU squared (`variants.py`)
- `implementation="explicit"` runs the mathematics of every layer instead of PyTorch's kernels
- initial weights depend on the seed and the parameter's name alone (`init.py`)

Parameters have their usual names (`h.0.attn.c_attn.weight`); `Linear` weights are [out, in].
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
    CacheUpdate,
    CausalSelfAttention,
    KVCache,
    Mask,
    document_ids,
    document_mask,
    document_positions,
)
from model.config import EOT, GPTConfig
from model.errors import ConfigError
from model.init import initialise
from model.layers import GELU, Embedding, Implementation, LayerNorm, Linear, explicit_linear
from model.loss import Reduction, cross_entropy, linear_cross_entropy
from model.variants import ReLUSquared, Rotation, rotation_of


class MLP(Module):
    """Two linear maps with GELU between, 4 C wide, on each token alone. Output: as `Linear`."""

    def __init__(self, config: GPTConfig, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, implementation)
        activation = GELU if config.activation == "gelu" else ReLUSquared
        self.activation = activation(implementation)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, implementation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.activation(self.c_fc(x))  # (B, T, 4 C)
        x = self.c_proj(x)  # (B, T, C)
        return x


class Block(Module):
    """Attention, then MLP, each added to the residual stream. Output: float32.

    LayerNorm comes before each (Radford et al. 2019), not after as in Vaswani et al.: the path from
    the embeddings to the head consists of additions only, so gradients pass through it unchanged.
    """

    def __init__(self, config: GPTConfig, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, implementation)
        self.attn = CausalSelfAttention(config, implementation)
        self.ln_2 = LayerNorm(config.n_embd, implementation)
        self.mlp = MLP(config, implementation)

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        rotation: Rotation | None = None,
        update_cache: CacheUpdate | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, rotation, update_cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(Module):
    """The language model.

    `GPT(config)` draws the initial weights, except on the meta device. `GPT.initialised`,
    `from_checkpoint` and `from_hf` never hold a second copy of the weights.

    Args:
        config: Sizes and options.
        implementation: "fused" kernels, or the "explicit" mathematics for reading and testing. They
            differ by rounding only, but explicit stores all attention scores and all logits.
        seed: Seed of the initial weights.

    Attributes:
        checkpoint_activations: As in the config; may be changed at any time.
        loss_chunk: Likewise.
        document_masking: Whether a loss without `documents` finds them in the tokens, by their
            `<|endoftext|>`. False at first; may be changed at any time.
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
        self.document_masking = False
        self.wte = Embedding(config.padded_vocab_size, config.n_embd, implementation)
        if config.positions == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd, implementation)
        self.h = ModuleList(Block(config, implementation) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, implementation)
        if not self.wte.weight.is_meta:
            initialise(self, config, seed)

    # -- forward -----------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: Reduction = "mean",
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the next token, or the loss if `targets` are given.

        Args:
            tokens: (B, T) int64, T up to `block_size`.
            targets: (B, T) int64, the token after each; -100 is ignored.
            reduction: "mean" over targets that are not ignored (0 if all are), "sum", or "none".
            documents: (B, T) int64 document ids. If given, attention stays within a document, and
                positions restart at each (unless `config.document_positions` is false). If not, see
                `document_masking`.

        Returns:
            Without targets: logits (B, T, V) in the dtype of `Linear`, without the padding.
            With targets: the loss in nats, float32; a scalar, or (B, T) for "none", 0 where
            ignored.

        Raises:
            ConfigError: A sequence longer than `block_size`, mismatched shapes, or an unknown
                reduction.
        """
        if self.document_masking and targets is not None and documents is None:
            documents = document_ids(tokens)
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
        """Return the head's input: (B, T) int64 -> (B, T, C) float32. `cache`: earlier tokens."""
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
            assert documents is None, "with a cache, a row is one document"
            positions, mask = cache.prepare(T)  # (B, T), (B, 1, T, S)

        x: Tensor = self.wte(tokens)  # (B, T, C)
        rotation = None
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rotation = rotation_of(positions, self.config.n_embd // self.config.n_head)
        for layer, block in enumerate(self.h):
            update_cache = None if cache is None else partial(cache.update, layer)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(  # a block draws no random numbers: no generator state to restore
                    block, x, mask, rotation, update_cache,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                x = block(x, mask, rotation, update_cache)
        x = self.ln_f(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., C); padded rows are cut afterwards."""
        linear = F.linear if self.implementation == "fused" else explicit_linear
        return linear(x, self.wte.weight)[..., : self.config.vocab_size]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: Reduction = "mean",
        documents: Tensor | None = None,
    ) -> Tensor:
        """Call `forward` with targets. Not for wrapped models: DDP and compile hook `forward`."""
        loss: Tensor = self(tokens, targets, reduction, documents)
        return loss

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
        """Extend prompts by sampling (`generation.py`).

        Args:
            tokens: (B, T) int64, or a list of lists of any lengths.
            max_new_tokens: Most tokens added to each row.
            temperature: Divisor of the logits; 0 always takes the most likely token.
            top_k: Sample from the k most likely tokens only.
            top_p: Sample from the smallest set of most likely tokens with this total probability.
            seed: Makes the result reproducible, on any device up to rounding of the logits.
            stop: Token that ends a row; None ends no row early.

        Returns:
            Prompts and new tokens, `stop` included. For a tensor (B, T + new) int64, in which rows
            that ended early are filled with `stop`; for lists a list of lists.
        """
        return generation.generate(
            self, tokens, max_new_tokens, temperature, top_k, top_p, seed, stop
        )

    # -- construction and files --------------------------------------------------------------------

    @classmethod
    def initialised(
        cls,
        config: GPTConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        implementation: Implementation = "fused",
    ) -> GPT:
        """Build a model with initial weights on `device`, without a second copy of the weights."""
        gpt = cls._unallocated(config, implementation)
        gpt.to_empty(device=device)
        initialise(gpt, config, seed)
        return gpt

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, implementation: Implementation = "fused"
    ) -> GPT:
        """Load a training checkpoint (`model.safetensors`, `state.json`) onto the CPU.

        Raises:
            FormatError: A file is missing, or does not hold this model in finite numbers.
        """
        config, state = checkpoint_format.read(Path(folder))
        return cls._unallocated(config, implementation)._assign(state)

    @classmethod
    def from_hf(cls, folder: str | Path, *, implementation: Implementation = "fused") -> GPT:
        """Load a folder in the Hugging Face GPT-2 layout (safetensors only) onto the CPU.

        Raises:
            FormatError: A file or tensor is missing, unknown, not finite, or of another
                architecture.
        """
        config, state = hf.read(Path(folder))
        return cls._unallocated(config, implementation)._assign(state)

    def to_hf(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and generation_config.json for `transformers`."""
        hf.write(Path(folder), self.config, self.state_dict())

    @classmethod
    def _unallocated(cls, config: GPTConfig, implementation: Implementation) -> GPT:
        with torch.device("meta"):
            return cls(config, implementation=implementation)

    def _assign(self, state: dict[str, Tensor]) -> GPT:
        """Use the tensors of `state` as parameters, uncopied; their shapes have been checked."""
        self.load_state_dict(state, assign=True)
        return self
