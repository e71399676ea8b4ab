"""What the small model is trained with, against what it stands in for: transformers' modules and MLX's quantization."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints_hf import QWEN3_5
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from examples.small_moe import forward
from examples.small_moe.quantize import affine, fake_quantized

BASE = QWEN3_5.base


@pytest.fixture(scope="module")
def model() -> Qwen3_5MoeForCausalLM:
    torch.manual_seed(3)
    config = Qwen3_5MoeTextConfig(**{**BASE, "tie_word_embeddings": True})
    model = Qwen3_5MoeForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.add_(0.2 * torch.randn_like(p))  # transformers begins with neutral ones
    return model


@torch.no_grad()
def test_logits_are_those_of_transformers(model: Qwen3_5MoeForCausalLM) -> None:
    tokens = torch.randint(0, BASE["vocab_size"], (2, 100))  # more than a chunk of the delta rule
    weights = dict(model.named_parameters())
    ours, routing = forward.logits(model.config, weights, tokens, torch.zeros_like(tokens))
    theirs = model(tokens).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert len(routing) == BASE["num_hidden_layers"]


@torch.no_grad()
def test_dialogues_in_a_row_do_not_see_each_other(model: Qwen3_5MoeForCausalLM) -> None:
    lengths = (37, 2, 70)
    tokens = torch.randint(0, BASE["vocab_size"], (1, sum(lengths)))
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    ours, _ = forward.logits(model.config, dict(model.named_parameters()), tokens, segments)
    alone = torch.cat([model(part).logits for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(ours, alone, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_fake_quantization_is_mlx_quantization(bits: int, group_size: int) -> None:
    random = np.random.default_rng(0)
    w = random.standard_normal((64, 256)).astype(np.float32)
    w[0], w[1], w[2] = 0, np.abs(w[1]), -np.abs(w[2])  # all zero, and of one sign
    w[3] *= 1e-6
    stored = mx.array(w).astype(mx.bfloat16)
    packed = mx.quantize(stored, group_size=group_size, bits=bits)
    scales, biases = (p.astype(mx.float32) for p in packed[1:])
    theirs = mx.dequantize(packed[0], scales, biases, group_size=group_size, bits=bits)
    np.testing.assert_array_equal(affine(torch.from_numpy(w), bits, group_size).numpy(), np.array(theirs))


def test_the_gradient_goes_straight_through() -> None:
    w = torch.randn(8, 64, requires_grad=True)
    y = fake_quantized("model.layers.0.mlp.shared_expert.up_proj.weight", w)
    assert not torch.equal(y, w)
    (3 * y).sum().backward()
    assert torch.equal(w.grad, torch.full_like(w, 3))
