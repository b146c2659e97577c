"""Causal self-attention (Vaswani et al. 2017, section 3.2), its masks, its memory in generation.

Each token asks (query), offers (key) and tells (value). It takes the mean of the values of the
tokens up to itself, weighted by how well their keys answer its query; several heads do so side by
side on D channels each. It is the one place of the model where tokens learn of each other.

What a token may see is a `mask`:

    None                 itself and all before it: the training case, which kernels know unmasked
    bool (B, 1, T, S)    true where query t sees key s: document borders; a cache, in generation
    BlockMask            the same as a rule, for FlexAttention: document borders, compiled, on CUDA
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.config import GPTConfig
from model.layers import Implementation, Linear, widened

Mask = Tensor | BlockMask | None
Recall = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the keys and values of the new tokens; gives those of all tokens so far (KVCache)."""


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Computes softmax(Q Kᵀ / sqrt(D)) V over the keys that `mask` allows (ibid., eq. 1).

    Args:
        q: Queries (B, H, T, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, D).
        mask: Bool (B, 1, T, S), or None for "every token up to itself" (then S = T).

    Returns:
        (B, H, T, D) in the type of `v`; the softmax is computed in float32.
    """
    # a product of D terms grows as sqrt(D), which would leave the softmax to one key alone
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:  # (T, S), true on and below the diagonal
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = widened(scores).masked_fill(~mask, -torch.inf)
    # exp of large scores overflows: shifting a row by its maximum changes nothing but that
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)  # (B, H, T, S), each row sums to 1
    return weights.to(v.dtype) @ v  # (B, H, T, D)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The same without ever holding the (T, S) scores (Dao et al. 2022)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class CausalSelfAttention(Module):
    """Multi-head attention of a sequence to its own past. Output: that of `Linear`.

    One product makes queries, keys and values of all heads (`c_attn`), another mixes the heads
    (`c_proj`).
    """

    def __init__(self, config: GPTConfig, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.n_head = config.n_head
        self.fused = implementation == "fused"
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, implementation)
        self.c_proj = Linear(config.n_embd, config.n_embd, implementation)

    def forward(self, x: Tensor, mask: Mask = None, recall: Recall | None = None) -> Tensor:
        """Mixes each token with its past.

        Args:
            x: (B, T, C).
            mask: What each token may see, see the module.
            recall: Memory of earlier tokens, for generation.

        Returns:
            (B, T, C).
        """
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if recall is not None:
            k, v = recall(k, v)  # (B, H, S, D), S = T and all earlier tokens
        if self.fused:
            y = fused_attention(q, k, v, mask)
        else:
            assert not isinstance(mask, BlockMask)
            y = explicit_attention(q, k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads of a token side by side again
        return self.c_proj(y)


# -- documents -------------------------------------------------------------------------------------


def document_mask(documents: Tensor, implementation: Implementation = "fused") -> Mask:
    """Attention to the past of the same document only.

    FlexAttention (Dong et al. 2024) skips blocks of 128 x 128 that lie outside, but pays in
    compiled code only (and has no backward on the CPU): elsewhere the mask is written out.

    Args:
        documents: (B, T) ids; tokens of one document, and of no other in their row, share an id.
        implementation: FlexAttention is a fused kernel.

    Returns:
        Bool (B, 1, T, T), the same for all heads; or a BlockMask, where it pays.
    """
    B, T = documents.shape
    if implementation == "fused" and documents.is_cuda and torch.compiler.is_compiling():

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (documents[b, q] == documents[b, k])

        return create_block_mask(sees, B, None, T, T, device=documents.device)
    time = torch.arange(T, device=documents.device)
    past = time[:, None] >= time  # (T, T)
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return (past & same)[:, None]  # (B, 1, T, T)


def document_positions(documents: Tensor) -> Tensor:
    """Position of each token in its document, counted from its first token in the window.

    Args:
        documents: (B, T) ids, a run of equal ids being a document.

    Returns:
        (B, T) int64.
    """
    time = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(begins, time, 0).cummax(dim=1).values  # of the document that t lies in
    return time - start


# -- memory ----------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, so that generation computes each token only once.

    The rows of a batch may hold different numbers of tokens. Tokens of one call stand side by side
    in a (B, T) tensor, filled up on the right where a row has fewer; what is filled up is never
    seen (it lies in a token's future) and is overwritten by the row's next token.

    Args:
        config: Sizes.
        batch: Rows (B).
        device: Where the keys live.
    """

    def __init__(self, config: GPTConfig, batch: int, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.lengths = [0] * batch  # tokens in each row
        # of the tokens that `expect` was told of: their positions (B, T), and S
        self.positions, self.stop = torch.empty(batch, 0, dtype=torch.int64), 0
        # a layer's keys and values (B, H, block_size, D), once it has any
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * config.n_layer

    def expect(self, T: int) -> tuple[Tensor, Tensor]:
        """Prepares for T more tokens a row, put right after those already there.

        Returns:
            Their positions (B, T) int64, and the mask (B, 1, T, S) that lets each see its own past.
        """
        lengths = torch.tensor(self.lengths, device=self.device)
        self.positions = lengths[:, None] + torch.arange(T, device=self.device)
        self.stop = max(self.lengths) + T  # S: longer than this is no row
        assert self.stop <= self.config.block_size, "the cache is full: cut the window first"
        slots = torch.arange(self.stop, device=self.device)  # (S,)
        return self.positions, (slots <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)

    def recall(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, H, T, D) of the expected tokens; returns all (B, H, S, D)."""
        B, H, _, D = k.shape
        stored = self.layers[layer]
        if stored is None:
            shape = B, H, self.config.block_size, D
            stored = self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        rows = torch.arange(B, device=self.device)[:, None]  # (B, 1), beside positions (B, T)
        for store, new in zip(stored, (k, v), strict=True):
            store[rows, :, self.positions] = new.transpose(1, 2)  # (B, T, H, D)
        return stored[0][:, :, : self.stop], stored[1][:, :, : self.stop]

    def take(self, rows: list[int]) -> KVCache:
        """A cache of its own that holds a copy of `rows`."""
        part = KVCache(self.config, len(rows), self.device)
        part.lengths = [self.lengths[row] for row in rows]
        part.layers = [layer and (layer[0][rows], layer[1][rows]) for layer in self.layers]
        return part

    def replace(self, rows: list[int], other: KVCache) -> None:
        """Puts the rows of `other`, in order, in the place of `rows` of this cache."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            assert mine is not None
            assert theirs is not None
            for store, new in zip(mine, theirs, strict=True):
                store[rows] = new
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length
