"""Tokens -> vectors."""

from __future__ import annotations

import pytest
import torch

from model.embedding import TokenEmbedding
from model.inputs import build_tokens
from model.settings import ModelConfig
from tests.model.make import catalogue, user


@pytest.mark.usefixtures("threads")
def test_the_gradients_of_features_are_the_same_to_the_bit_for_any_number_of_threads() -> None:
    """Threads that race for the order of a sum would leave other bits in each run, and a resumed training differ."""
    embedding = TokenEmbedding(ModelConfig(dim=64, slots=""))
    tokens = build_tokens([user(i, 60) for i in range(10)], window=8, catalogue=catalogue())
    upstream, by_name = torch.randn(len(tokens), 64), dict(embedding.named_parameters())
    gradients = []
    for threads in (1, 2, 2, 2, 2):
        torch.set_num_threads(threads)
        looked_up = [by_name[name] for name in ("kind", "value", "hour")]
        gradients.append(torch.cat(torch.autograd.grad(embedding(tokens), looked_up, upstream)))
    assert all(torch.equal(gradients[0], other) for other in gradients)
