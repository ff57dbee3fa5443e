"""Tokens -> vectors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from model.embedding import TokenEmbedding
from model.inputs import ACTION, AUX, CONTEXT, IMPRESSION, REQUEST, Queries, build_tokens
from model.settings import ModelConfig
from tests.model.make import START, catalogue, user

ITEM = {IMPRESSION, ACTION}
FEATURES = {
    "item": ITEM, "author": ITEM, "category": ITEM, "duration": ITEM, "page": {IMPRESSION, AUX, REQUEST, CONTEXT},
    "user": {IMPRESSION, REQUEST, CONTEXT}, "action": {ACTION}, "value": {ACTION}, "query_time": {IMPRESSION, REQUEST},
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_each_kind_of_token_has_its_features(feature: str) -> None:
    config = ModelConfig(
        dim=8, slots="item,author,category,duration,page,user", context="user,page", examples="request", positions=8
    )
    embedding = TokenEmbedding(config)
    ask = Queries.requests(np.array([START + 10**13]), np.array([2]))
    tokens = build_tokens([user(1, 9)], [ask], window=8, catalogue=catalogue(), use_aux=True, context=2)
    value, hours = getattr(tokens, feature), 12 * 3600
    change = hours if feature == "query_time" else 1
    other = dataclasses.replace(tokens, **{feature: value ^ 1 if feature == "action" else value + change})
    with torch.no_grad():
        changed = (embedding(tokens) != embedding(other)).any(1)
    if feature in ("user", "page"):  # of the context, each has a token of its own
        assert int(changed[tokens.kind == CONTEXT].sum()) == 1
        changed[tokens.kind == CONTEXT] = True
    assert set(tokens.kind[changed].tolist()) == FEATURES[feature]
    assert not set(tokens.kind[~changed].tolist()) & FEATURES[feature]


def test_simultaneous_actions_add_up() -> None:
    embedding = TokenEmbedding(ModelConfig(dim=8, slots=""))
    tokens = build_tokens([user(1, 9)], window=8, catalogue=catalogue())
    both, none = (dataclasses.replace(tokens, action=torch.full_like(tokens.action, bits)) for bits in (0b1010, 0))
    with torch.no_grad():
        added = (embedding(both) - embedding(none))[tokens.kind == ACTION]
    torch.testing.assert_close(added, (embedding.action[1] + embedding.action[3]).detach().expand_as(added))


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
