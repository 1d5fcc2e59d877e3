from __future__ import annotations

import math

import pytest
import torch

from prefopt.engine.head import token_entropy, token_logps


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_probabilities_and_entropy_follow_their_definition(temperature):
    logits = [0.5, -1.0, 2.0]
    weights = [math.exp(z / temperature) for z in logits]
    p = [w / sum(weights) for w in weights]
    x = torch.tensor([logits] * 3)
    assert token_logps(x, torch.tensor([0, 1, 2]), temperature).tolist() == pytest.approx(
        [math.log(q) for q in p], 1e-6
    )
    assert float(token_entropy(x, temperature)[0]) == pytest.approx(-sum(q * math.log(q) for q in p), 1e-6)


def test_low_precision_logits_are_scored_in_float32():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 5
    target = torch.arange(4)
    half = token_logps(logits.bfloat16(), target)
    assert half.dtype == torch.float32
    exact = token_logps(logits.bfloat16().double().float(), target)
    assert torch.equal(half, exact)
