"""What the KV cache saves: `python -m tests.benchmarks.generation`.

Greedy tokens one by one, with the cache (as `GPT.generate` makes them) and without: the whole
window again for each token, but only its last logits. Both ways make every token, and tokens and
logits are compared.
"""

import argparse
import sys
import time

import torch
from torch import Tensor

from model import GPT, GPTConfig
from model.generation import stream

CLOSE = 1e-3
"""Logits nearer than this may change places by rounding."""


def cached(gpt: GPT, prompt: list[int], n: int) -> tuple[list[int], list[Tensor]]:
    """n new tokens, and the logits (V,) from which each was chosen."""
    logits: list[Tensor] = []
    steps = stream(
        gpt, [prompt], n, temperature=0, stop=None, watch=lambda seen: logits.append(seen[0])
    )
    return [token for (token,) in steps if token is not None], logits


def uncached(gpt: GPT, prompt: list[int], n: int) -> tuple[list[int], list[Tensor]]:
    """The same the slow way."""
    row, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(n):
            logits.append(gpt.head(gpt.hidden(torch.tensor([row]))[0, -1]))
            row.append(int(logits[-1].argmax()))
    return row[len(prompt) :], logits


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.generation")
    parser.add_argument("--size", default="gpt2", help="a published size (gpt2)")
    parser.add_argument("--tokens", type=int, default=512, help="new tokens (512)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt (8)")
    args = parser.parse_args()
    gpt = GPT.initialised(GPTConfig.named(args.size))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from the start, where all tokens are alike
        for p in gpt.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    prompt = torch.randint(50257, (args.prompt,), generator=generator).tolist()

    began = time.perf_counter()
    fast, fast_logits = cached(gpt, prompt, args.tokens)
    quick = time.perf_counter() - began
    began = time.perf_counter()
    slow, slow_logits = uncached(gpt, prompt, args.tokens)
    plain = time.perf_counter() - began

    print(f"{args.size}, {args.tokens} new tokens, float32, {torch.get_num_threads()} threads")
    print(f"with the cache     {quick:7.1f} s  {args.tokens / quick:7.1f} tokens/s")
    print(f"without            {plain:7.1f} s  {args.tokens / plain:7.1f} tokens/s")
    print(f"times as fast      {plain / quick:7.1f}    (at least 5)")
    # after a token that differs the two continue different texts
    differs = next((i for i in range(args.tokens) if fast[i] != slow[i]), None)
    same = args.tokens if differs is None else differs + 1
    pairs = zip(fast_logits[:same], slow_logits[:same], strict=True)
    far = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"logits             {far:7.1e} apart at most  (at most 1e-4)")
    margin = 0.0
    if differs is None:
        print(f"all tokens equal ({len(set(fast))} different ones)")
    else:
        first, second = slow_logits[differs].topk(2).values.tolist()
        margin = first - second
        print(f"new token {differs} differs: the two highest logits lie {margin:.1e} apart")
    sys.exit(int(plain < 5 * quick or far > 1e-4 or margin > CLOSE))


if __name__ == "__main__":
    main()
