"""Causal self-attention (Vaswani et al. 2017, section 3.2), document masks, and the KV cache.

Every token emits a query, a key and a value. A token's output is a weighted mean of the values up
to its own position; a weight is large where the key matches the token's query. H heads of D
channels each do this in parallel. Nowhere else in the model do tokens exchange information.

A `mask` says which keys a query may see:

    None                 all keys up to its own position: training without documents
    bool (B, 1, T, S)    true where query t may see key s: documents; generation with a cache
    BlockMask            the same rule for FlexAttention: documents, compiled, on CUDA
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.config import EOT, GPTConfig
from model.layers import Implementation, Linear, upcast
from model.variants import RMSNorm, Rotation, rotate

Mask = Tensor | BlockMask | None
CacheUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stores keys and values of new tokens; returns those of all tokens so far (`KVCache.update`)."""


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(Q Kᵀ / sqrt(D)) V over the keys that `mask` allows (Vaswani et al., eq. 1).

    Args:
        q: Queries (B, H, T, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, D).
        mask: Bool (B, 1, T, S), or None for causal attention (then S = T).

    Returns:
        (B, H, T, D) in the dtype of `v`; the softmax is computed in float32.
    """
    # a dot product of D terms grows as sqrt(D): unscaled, the softmax would pick a single key
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:  # (T, S), true on and below the diagonal
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = upcast(scores).masked_fill(~mask, -torch.inf)
    # subtract the maximum of each row: exp cannot overflow, and the softmax is unchanged
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)  # (B, H, T, S), each row sums to 1
    return weights.to(v.dtype) @ v  # (B, H, T, D)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Compute the same without storing the (T, S) scores (FlashAttention, Dao et al. 2022)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class CausalSelfAttention(Module):
    """Multi-head causal self-attention. Output: the dtype of `Linear`.

    One linear map computes queries, keys and values of all heads (`c_attn`); another mixes the
    outputs of the heads (`c_proj`).
    """

    def __init__(self, config: GPTConfig, implementation: Implementation = "fused") -> None:
        super().__init__()
        self.n_head = config.n_head
        self.fused = implementation == "fused"
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, implementation)
        self.c_proj = Linear(config.n_embd, config.n_embd, implementation)
        self.qk_norm = RMSNorm(implementation) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        rotation: Rotation | None = None,
        update_cache: CacheUpdate | None = None,
    ) -> Tensor:
        """Attend from each token to the tokens it may see.

        Args:
            x: (B, T, C).
            mask: Which keys each query may see (module docstring).
            rotation: Of the T positions, if they are rotary.
            update_cache: In generation, adds the keys and values of earlier tokens.

        Returns:
            (B, T, C).
        """
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head)  # (B, T, H, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if update_cache is not None:
            k, v = update_cache(k, v)  # (B, H, S, D)
        if self.fused:
            y = fused_attention(q, k, v, mask)
        else:
            assert not isinstance(mask, BlockMask)
            y = explicit_attention(q, k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        output: Tensor = self.c_proj(y)
        return output


# -- documents -------------------------------------------------------------------------------------


def document_ids(tokens: Tensor) -> Tensor:
    """Number the documents of each row: every `<|endoftext|>` begins one.

    Args:
        tokens: (B, T) int64.

    Returns:
        (B, T) int64, not decreasing; 0 is the document that began before the row.
    """
    return (tokens == EOT).cumsum(dim=1)


def document_mask(documents: Tensor, implementation: Implementation = "fused") -> Mask:
    """Return the mask of causal attention within each document.

    FlexAttention (Dong et al. 2024) skips 128 x 128 blocks that are masked out, but it is only fast
    when compiled and has no backward pass on the CPU: elsewhere the mask is a bool tensor.

    Args:
        documents: (B, T) ids; tokens of a row belong to one document if they share an id.
        implementation: FlexAttention counts as fused.

    Returns:
        Bool (B, 1, T, T) for all heads; or a BlockMask when compiling for CUDA.
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
    """Return the position of each token in its document, from 0 at its first token in the window.

    Args:
        documents: (B, T) ids; a run of equal ids is a document.

    Returns:
        (B, T) int64.
    """
    time = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = torch.where(begins, time, 0).cummax(dim=1).values  # (B, T) start of each document
    return time - start


# -- KV cache --------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of earlier tokens, so that generation computes each token only once.

    Rows of a batch may hold different numbers of tokens. New tokens come as a (B, T) tensor, padded
    on the right in rows with fewer. Padding lies in the future of every real token, so it is never
    seen, and the row's next token overwrites it.
    """

    def __init__(self, config: GPTConfig, batch: int, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.lengths = [0] * batch  # tokens in each row
        # of the tokens being added (see `prepare`): positions (B, T), and the number of keys (S)
        self.positions, self.n_keys = torch.empty(batch, 0, dtype=torch.int64), 0
        # keys and values of each layer (B, H, block_size, D), allocated at its first update
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * config.n_layer

    def prepare(self, T: int) -> tuple[Tensor, Tensor]:
        """Make room for T more tokens per row.

        Returns:
            Their positions (B, T) int64, and the causal mask (B, 1, T, S) over each row's tokens.
        """
        lengths = torch.tensor(self.lengths, device=self.device)
        self.positions = lengths[:, None] + torch.arange(T, device=self.device)
        self.n_keys = max(self.lengths) + T  # S, of the longest row
        assert self.n_keys <= self.config.block_size, "the cache is full: truncate the window first"
        slots = torch.arange(self.n_keys, device=self.device)  # (S,)
        return self.positions, (slots <= self.positions[:, :, None])[:, None]  # (B, 1, T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D) of the prepared tokens; return all (B, H, S, D)."""
        B, H, _, D = k.shape
        stored = self.layers[layer]
        if stored is None:
            shape = B, H, self.config.block_size, D
            stored = self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        rows = torch.arange(B, device=self.device)[:, None]  # (B, 1), broadcast with positions
        for store, new in zip(stored, (k, v), strict=True):
            store[rows, :, self.positions] = new.transpose(1, 2)  # (B, T, H, D)
        return stored[0][:, :, : self.n_keys], stored[1][:, :, : self.n_keys]

    def select(self, rows: list[int]) -> KVCache:
        """Return a new cache with a copy of `rows`."""
        part = KVCache(self.config, len(rows), self.device)
        part.lengths = [self.lengths[row] for row in rows]
        part.layers = [layer and (layer[0][rows], layer[1][rows]) for layer in self.layers]
        return part

    def replace(self, rows: list[int], other: KVCache) -> None:
        """Overwrite `rows` of this cache with the rows of `other`, in order."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            assert mine is not None
            assert theirs is not None
            for store, new in zip(mine, theirs, strict=True):
                store[rows] = new
        for row, length in zip(rows, other.lengths, strict=True):
            self.lengths[row] = length
