"""The next-item models: what a score depends on, and the two softmaxes against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from model.sampled_softmax import per_position_cross_entropy
from model.sequential import ItemHistories, NextItem, SequentialConfig

ITEMS = 30
ENCODERS = ("hstu", "sasrec")


def model(encoder: str = "hstu", **settings: str | float) -> NextItem:
    fields = {"encoder": encoder, "items": ITEMS, "max_length": 12, "dim": 8, "heads": 2, "head_dim": 4} | settings
    built = NextItem(SequentialConfig.model_validate({"normaliser": 4.0} | fields))
    with torch.no_grad():  # weights large enough for every part to matter
        for parameter in built.parameters():
            parameter.mul_(4)
    return built.eval()


def histories(lengths: list[int], seed: int = 0) -> ItemHistories:
    random = np.random.default_rng(seed)
    items = [random.integers(0, ITEMS, n) for n in lengths]
    times = [np.sort(random.integers(0, 10**6, n + 1)) for n in lengths]
    return ItemHistories.of(items, [t[:-1] for t in times], [t[1:] for t in times])


def part(batch: ItemHistories, user: int, length: int | None = None) -> ItemHistories:
    """One user of a batch alone, with the oldest items only where a length is given."""
    start = int(batch.lengths[:user].sum())
    stop = start + (int(batch.lengths[user]) if length is None else length)
    item, time, next_time = (column[start:stop] for column in (batch.item, batch.time, batch.next_time))
    return ItemHistories(item, time, next_time, torch.tensor([stop - start]))


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 99))
def test_scores_do_not_depend_on_the_rest_of_the_batch(encoder: str, lengths: list[int], seed: int) -> None:
    net, batch = model(encoder), histories(lengths, seed)
    together = net.scores(batch)
    for user in range(len(lengths)):
        torch.testing.assert_close(net.scores(part(batch, user))[0], together[user], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("position_from", ["start", "end"])
def test_no_position_reads_what_comes_after_it(encoder: str, position_from: str) -> None:
    """From the end, the distance to the newest item is itself read: then only the newest row must agree."""
    net, batch = model(encoder, position_from=position_from), histories([12])
    whole, prefix = net(batch), net(part(batch, 0, 7))
    same = torch.allclose(whole[:7], prefix, atol=1e-5)
    assert same == (position_from == "start")


def test_hstu_knows_when_the_next_item_comes_and_sasrec_does_not() -> None:
    batch = histories([9])
    later = ItemHistories(batch.item, batch.time, batch.next_time + 50_000, batch.lengths)
    for encoder, changes in (("hstu", True), ("sasrec", False)):
        net = model(encoder)
        assert torch.equal(net.scores(batch), net.scores(later)) != changes
    without = model("hstu", bias="position")
    assert torch.equal(without.scores(batch), without.scores(later))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_loss_is_the_cross_entropy_of_the_scores(encoder: str) -> None:
    net, batch = model(encoder), histories([5, 8])
    wanted = torch.randint(ITEMS, (13,), generator=torch.Generator().manual_seed(1))
    logits = net(batch) @ net.item_vectors().T / net.config.temperature
    torch.testing.assert_close(net.loss(batch, wanted), torch.nn.functional.cross_entropy(logits, wanted))


def test_sampled_softmax_over_every_other_item_once_is_the_full_softmax() -> None:
    net, batch = model(), histories([5, 8])
    wanted = torch.arange(13) % ITEMS
    every = torch.arange(ITEMS).expand(13, ITEMS)  # the wanted one among them is left out
    vectors, items = net(batch), net.item_vectors()
    got = per_position_cross_entropy(vectors, items, wanted, every, net.config.temperature)
    torch.testing.assert_close(got, net.loss(batch, wanted))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("negatives", [0, 4])
def test_every_parameter_learns(encoder: str, negatives: int) -> None:
    net, batch = model(encoder, negatives=negatives).train(), histories([12, 6])
    net.loss(batch, torch.arange(18) % ITEMS).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights_are_a_function_of_the_config_and_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    one, other, third = model(), model(), model(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.items, other.items) and not torch.equal(one.items, third.items)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: model()(histories([13])), "newest items"),
        (lambda: ItemHistories.of([np.zeros(0)], [np.zeros(0)], [np.zeros(0)]), "at least one item"),
        (lambda: ItemHistories.of([np.zeros(2)], [np.zeros(1)], [np.zeros(2)]), "a time and a next time"),
        (lambda: model("sasrec", heads=3), "do not divide"),
    ],
)
def test_what_cannot_be_read_is_refused(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(BadInput, match=message):
        build()
