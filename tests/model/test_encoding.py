"""Position and age at the input, relative to a sequence's request."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.encoding import RequestEncoding
from model.inputs import ACTION, Queries, build_tokens
from model.settings import ModelConfig
from tests.model.make import SECOND, START, catalogue, user


@pytest.mark.parametrize(("window", "last"), [(40, 99), (5, 10)])
def test_positions_are_those_of_the_context_then_distances_from_the_end_up_to_the_reach(window: int, last: int) -> None:
    config = ModelConfig(variant="production", dim=4, window=window, layers=2, context="user,page", input_time="off")
    encoding = RequestEncoding(config)
    assert encoding.position is not None
    with torch.no_grad():
        encoding.position[:] = torch.arange(float(len(encoding.position)))[:, None]
    ask = Queries.candidates(np.arange(1, 4), START + 10**13, 2)
    people = [user(1, 9), user(2, 0)]
    tokens = build_tokens(people, [ask] * 2, window=window, catalogue=catalogue(), context=2)
    place = encoding(torch.zeros(len(tokens), 4), tokens)[:, 0].tolist()
    history = 9 + int((tokens.kind == ACTION).sum())
    assert history > 10
    distances = [min(distance, last) for distance in range(history, 0, -1)]
    assert place == [0, 1, *(2 + distance for distance in distances), 2, 2, 2, 0, 1, 2, 2, 2]


def test_the_age_is_that_at_the_request() -> None:
    encoding = RequestEncoding(ModelConfig(variant="production", dim=4, input_position="off"))
    assert encoding.age is not None
    with torch.no_grad():
        encoding.age[:] = torch.arange(float(len(encoding.age)))[:, None]
    events = user(1, 2).take(np.arange(2), 0)
    events.timestamp = events.known_at = START - np.array([400, 100]) * 60 * SECOND
    ask = Queries.candidates(np.array([1]), START, 0)
    tokens = build_tokens([events], [ask], window=9, catalogue=catalogue())
    age = encoding(torch.zeros(len(tokens), 4), tokens)[:, 0]
    assert age[(tokens.kind != ACTION)].tolist() == [20, 10, 0]
