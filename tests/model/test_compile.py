"""torch.compile: one graph for training, one for evaluation, none broken."""

import dataclasses

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300, loss_chunk=24)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def train_and_evaluate(gpt, steps, autocast, documents=None):
    """Losses of some steps of SGD, each followed by an evaluation, and both ways' graphs."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        tokens, targets = torch.randint(300, (2, 2, 32), generator=generator).unbind()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = gpt(tokens, targets, "sum", documents) / 64
            loss.backward()
            with torch.no_grad():
                evaluated = gpt(tokens, targets, "sum", documents) / 64
        assert abs(loss - evaluated) < 1e-4
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_exactly_two_graphs(autocast):
    """Tracing alone decides how many graphs there are; the backend that makes code is slow."""
    compiled = torch.compile(GPT(CONFIG), fullgraph=True, backend="aot_eager")
    losses = train_and_evaluate(compiled, 20, autocast)
    assert graphs() == 2
    expected = train_and_evaluate(GPT(CONFIG), 20, autocast)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_documents_and_checkpointing_trace(checkpointed):
    config = dataclasses.replace(CONFIG, checkpoint_activations=checkpointed)
    compiled = torch.compile(GPT(config), fullgraph=True, backend="aot_eager")
    documents = torch.arange(32).expand(2, 32) // 10
    losses = train_and_evaluate(compiled, 3, False, documents)
    assert graphs() == 2
    expected = train_and_evaluate(GPT(config), 3, False, documents)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_code_equals_eager(autocast):
    compiled = torch.compile(GPT(CONFIG), fullgraph=True)
    losses = train_and_evaluate(compiled, 20, autocast)
    assert graphs() == 2
    expected = train_and_evaluate(GPT(CONFIG), 20, autocast)
    torch.testing.assert_close(losses, expected, atol=2e-2 if autocast else 1e-4, rtol=0)


@pytest.mark.slow
def test_compiled_under_ddp(tmp_path):
    """As the training wraps it: DDP of the compiled model, called through forward alone."""
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
            assert graphs() == 2
    finally:
        dist.destroy_process_group()
    expected = train_and_evaluate(GPT(CONFIG), 20, False)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_equals_the_boolean_mask():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=256, vocab_size=300)
    gpt = GPT.initialised(config, device="cuda")
    tokens, targets = torch.randint(300, (2, 2, 256), device="cuda").unbind()
    documents = torch.arange(256, device="cuda").expand(2, 256) // 100
    compiled = torch.compile(gpt, fullgraph=True)
    results = []
    for run in (gpt, compiled):
        loss = run(tokens, targets, documents=documents)
        loss.backward()
        results.append(
            (loss.detach(), [p.grad.clone() for p in gpt.parameters() if p.grad is not None])
        )
        gpt.zero_grad()
    assert abs(results[0][0] - results[1][0]) < 1e-4
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a - b).norm() < 1e-2 * b.norm() + 1e-6
