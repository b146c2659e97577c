"""What the KV cache saves: `python -m tests.benchmarks.generation`.

Greedy tokens one by one, with the cache (`GPT.generate`) and without: the whole window again for
each token, but only its last logits. Both ways make every token, and the tokens are compared.
"""

import argparse
import sys
import time

import torch

from model import GPT, GPTConfig

CLOSE = 1e-3
"""Logits nearer than this may change places by rounding."""


def uncached(gpt: GPT, row: list[int], n: int) -> tuple[list[int], list[float]]:
    """The row with n more tokens, and for each the distance of the two highest logits."""
    row, margins = list(row), []
    with torch.no_grad():
        for _ in range(n):
            logits = gpt.head(gpt.hidden(torch.tensor([row]))[0, -1])
            first, second = logits.topk(2).values.tolist()
            row.append(int(logits.argmax()))
            margins.append(first - second)
    return row, margins


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
    (fast,) = gpt.generate([prompt], args.tokens, temperature=0, stop=None)
    cached = time.perf_counter() - began
    began = time.perf_counter()
    slow, margins = uncached(gpt, prompt, args.tokens)
    plain = time.perf_counter() - began

    print(f"{args.size}, {args.tokens} new tokens, float32, {torch.get_num_threads()} threads")
    print(f"with the cache     {cached:7.1f} s  {args.tokens / cached:7.1f} tokens/s")
    print(f"without            {plain:7.1f} s  {args.tokens / plain:7.1f} tokens/s")
    print(f"times as fast      {plain / cached:7.1f}    (at least 5)")
    differ = [i for i, (a, b) in enumerate(zip(fast, slow, strict=True)) if a != b]
    if differ:
        margin = margins[differ[0] - args.prompt]
        print(f"token {differ[0]} differs: the two highest logits lie {margin:.1e} apart")
    else:
        print(f"all tokens equal ({len(set(fast))} different ones)")
    sys.exit(int(plain < 5 * cached or (bool(differ) and margin > CLOSE)))


if __name__ == "__main__":
    main()
