"""Tests for documents in packed windows, and for activation checkpointing."""

import dataclasses

import pytest
import torch

from model import GPT, GPTConfig
from tests.support.metering import Meter

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=300)


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_document_in_a_packed_window_equals_the_document_alone(implementation):
    gpt = GPT(CONFIG, implementation=implementation, seed=1)
    with torch.no_grad():
        for p in gpt.parameters():
            p[:300].mul_(3)  # initial weights give nearly uniform attention
    tokens = torch.randint(300, (2, 60))
    spans = [(0, 17), (17, 18), (18, 60)]
    documents = torch.empty_like(tokens)
    for i, (a, b) in enumerate(spans):
        documents[:, a:b] = i
    packed = gpt(tokens, documents=documents)
    losses = gpt(tokens, tokens, "none", documents)
    for a, b in spans:
        torch.testing.assert_close(packed[:, a:b], gpt(tokens[:, a:b]), atol=1e-5, rtol=0)
        alone = gpt(tokens[:, a:b], tokens[:, a:b], "none")
        torch.testing.assert_close(losses[:, a:b], alone, atol=1e-5, rtol=0)
    assert (packed - gpt(tokens))[:, 20:].abs().max() > 1e-2  # differs without documents


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_document_masking_finds_the_documents_in_the_tokens(implementation, monkeypatch):
    monkeypatch.setattr("model.attention.EOT", 7)
    gpt = GPT(CONFIG, implementation=implementation)
    tokens, targets = torch.randint(8, 300, (2, 3, 60)).unbind()
    tokens[0, [0, 17, 18]] = 7  # the third row is within one document
    tokens[1, 59] = 7
    logits, packed = gpt(tokens), gpt(tokens, targets, "none")
    gpt.document_masking = True
    masked = gpt(tokens, targets, "none")
    assert torch.equal(gpt(tokens), logits)  # generation is not masked
    spans = [[(0, 17), (17, 18), (18, 60)], [(0, 59), (59, 60)], [(0, 60)]]
    for row, documents in enumerate(spans):
        for a, b in documents:
            alone = gpt(tokens[row : row + 1, a:b], targets[row : row + 1, a:b], "none")
            torch.testing.assert_close(masked[row, a:b], alone[0], atol=1e-5, rtol=0)
    differs = (masked - packed).abs() > 1e-4
    assert differs.any(1).tolist() == [True, True, False]


def test_document_positions_false_does_not_restart_positions():
    gpt = GPT(dataclasses.replace(CONFIG, document_positions=False))
    tokens = torch.randint(300, (1, 20))
    documents = torch.tensor([[0] * 8 + [1] * 12])
    packed = gpt(tokens, documents=documents)
    torch.testing.assert_close(packed[:, :8], gpt(tokens[:, :8]), atol=1e-5, rtol=0)
    assert (packed[:, 8:] - gpt(tokens[:, 8:])).abs().max() > 1e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_bit(autocast):
    tokens, targets = torch.randint(300, (2, 2, 40)).unbind()
    documents = torch.arange(40).expand(2, 40) // 15
    runs = []
    for checkpointed in (False, True):
        gpt = GPT(dataclasses.replace(CONFIG, checkpoint_activations=checkpointed))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = gpt(tokens, targets, documents=documents)
        loss.backward()
        runs.append((loss, *(p.grad for p in gpt.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_activation_checkpointing_needs_a_third_of_the_memory():
    """gpt2-xl at 4 x 1024 tokens, forward and backward, on the meta device."""
    peaks = {}
    for checkpointed in (False, True):
        with torch.device("meta"):
            gpt = GPT(GPTConfig.named("gpt2-xl", checkpoint_activations=checkpointed))
            tokens, targets = torch.zeros(2, 4, 1024, dtype=torch.int64).unbind()
        with Meter("meta") as meter:
            gpt(tokens, targets).backward()
        peaks[checkpointed] = meter.peak
    print({key: f"{peak / 1e9:.1f} GB" for key, peak in peaks.items()})
    assert peaks[True] * 3 < peaks[False]
