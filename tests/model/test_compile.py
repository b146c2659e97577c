"""Tests for `torch.compile` of the model: one graph for training, one for evaluation."""

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300, loss_chunk=24)


@pytest.fixture(autouse=True)
def reset_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graph_count():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def train_and_evaluate(gpt, steps, autocast):
    """Return the losses of SGD steps, each followed by an evaluation on the same batch."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        tokens, targets = torch.randint(300, (2, 2, 32), generator=generator).unbind()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = gpt(tokens, targets, "sum") / 64
            loss.backward()
            with torch.no_grad():
                evaluated = gpt(tokens, targets, "sum") / 64
        assert abs(loss - evaluated) < 1e-4
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("steps", "autocast", "masking", "checkpointed"),
    [
        (3, False, False, False),
        (3, False, True, True),
        pytest.param(20, True, False, False, marks=pytest.mark.soak),
        pytest.param(3, False, True, False, marks=pytest.mark.soak),
    ],
)
def test_training_and_evaluation_compile_to_two_graphs(
    steps, autocast, masking, checkpointed, monkeypatch
):
    """The number of graphs depends on tracing only, so a backend without code generation does."""
    config = dataclasses.replace(
        CONFIG,
        checkpoint_activations=checkpointed,
        positions="rotary" if checkpointed else "learned",
        qk_norm=checkpointed,
        activation="relu_squared" if checkpointed else "gelu",
    )
    monkeypatch.setattr("model.attention.EOT", 119)  # in each of three batches
    model, eager = GPT(config), GPT(config)
    model.document_masking = eager.document_masking = masking
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = train_and_evaluate(compiled, steps, autocast)
    assert graph_count() == 2
    expected = train_and_evaluate(eager, steps, autocast)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)


@pytest.mark.soak
def test_compiled_code_equals_eager_in_bfloat16():
    """In float32, the next test compiles it."""
    losses = train_and_evaluate(torch.compile(GPT(CONFIG), fullgraph=True), 20, autocast=True)
    assert graph_count() == 2
    expected = train_and_evaluate(GPT(CONFIG), 20, autocast=True)
    torch.testing.assert_close(losses, expected, atol=2e-2, rtol=0)


@pytest.mark.soak
def test_compiled_under_ddp(tmp_path):
    """Wrap as training does: DDP around the compiled model, called through `forward` only."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        with torch._dynamo.config.patch(optimize_ddp=False):
            gpt = GPT(CONFIG)
            wrapped = DistributedDataParallel(
                torch.compile(gpt, fullgraph=True), gradient_as_bucket_view=True
            )
            losses = train_and_evaluate(wrapped, 20, False)
            assert graph_count() == 2
    finally:
        dist.destroy_process_group()
    expected = train_and_evaluate(GPT(CONFIG), 20, False)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_flex_attention_equals_the_boolean_mask(autocast, checkpointed, monkeypatch):
    monkeypatch.setattr("model.attention.EOT", 7)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=300)
    gpt = GPT.initialised(config, device="cuda")
    gpt.checkpoint_activations, gpt.document_masking = checkpointed, True
    # 200 tokens: the last block of 128 is partly filled
    tokens, targets = torch.randint(300, (2, 2, 200), device="cuda").unbind()
    tokens[:, ::90] = 7
    losses: list[float] = []
    gradients: list[dict[str, Any]] = []
    for run in (gpt, torch.compile(gpt, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = run(tokens, targets)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in gpt.named_parameters()})
        gpt.zero_grad(set_to_none=True)
    assert abs(losses[0] - losses[1]) < (5e-3 if autocast else 1e-4)
    for name, expected in gradients[0].items():
        if name.endswith("c_attn.bias"):  # the keys' third is rounding error
            continue
        distance = (gradients[1][name] - expected).norm() / expected.norm()
        assert distance < (0.05 if autocast else 1e-3), name
