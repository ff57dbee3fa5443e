"""Training learns, is deterministic, and resumes exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from components.errors import BadInput, FreshetError
from components.schemas import action_bit
from model.attention import attention
from model.dataset import SequenceDataset
from model.inputs import EVENT_DTYPES, UserEvents
from model.ranker import Ranker, RankerConfig
from model.retriever import Retriever, RetrieverConfig
from model.table import EmbeddingTable
from model.trainer import Step, Trainer
from tests.model.make import catalogue, table, user

SMALL = {"dim": 8, "head_dim": 4, "window": 16, "batch_tokens": 200, "continual_batch_tokens": 100, "epochs": 2}
Make = Callable[..., Ranker | Retriever]
CLICK = action_bit("click")


def liking(count: int = 60) -> SequenceDataset:
    """Users who click exactly the items of category 1 (category 0 .. 3 follows from the item)."""

    def likes(u: UserEvents) -> UserEvents:
        liked = u.item_id % 4 == 0
        return dataclasses.replace(u, actions=np.where(liked, CLICK, 0).astype(np.int32))

    return SequenceDataset(table([likes(user(i, 10, 1)) for i in range(count)]))


def ranker(**settings: object) -> Ranker:
    return Ranker(RankerConfig(heads="click", **(SMALL | settings)), catalogue())


def retriever(**settings: object) -> Retriever:
    return Retriever(RetrieverConfig(positive_actions="click", **(SMALL | settings)), catalogue())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_ranker_learns_what_users_like() -> None:
    trainer = Trainer(ranker(epochs=12, dense_lr=0.01))
    losses: list[float] = []
    trainer.fit(liking(), on_step=lambda step: losses.append(step.loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    metrics = trainer.evaluate(liking(80))
    assert metrics["auc_click"] > 0.95 and metrics["ne_click"] < 0.6 and metrics["impressions"] == 800


def test_the_retriever_learns_what_users_like() -> None:
    trainer = Trainer(retriever(epochs=15, dense_lr=0.01, table_lr=0.1))
    before = trainer.evaluate(liking())["hr_10"]
    trainer.fit(liking())
    assert trainer.evaluate(liking())["hr_10"] > max(0.9, before + 0.3)  # 10 of 40 items are liked


@pytest.mark.parametrize("make", [ranker, retriever])
@pytest.mark.parametrize("continual", [False, True])
def test_training_twice_gives_the_same_bits(make: Make, continual: bool) -> None:
    states = []
    for _ in range(2):
        trainer = Trainer(make())
        trainer.fit(liking(), continual=continual)
        states.append(trainer.export_state())
    assert same(*states)


SHORT = {"max_interactions": 9, "stochastic_alpha": 1.4}


@pytest.mark.parametrize("make", [ranker, retriever])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        SHORT,
        {"variant": "production", "generative_sampling": True, "epochs": 6},
        {"precision": "bfloat16"},
        {"table_admission": "item=5,author=30"},
        {"table_ttl_days": "item=1,page=1", "table_max_rows": "author=3"},
    ],
    ids=["default", "stochastic length", "generative sampling", "bfloat16", "admission", "expiry and eviction"],
)
def test_stopping_anywhere_and_resuming_gives_the_same_bits(make: Make, settings: dict[str, object]) -> None:
    whole = Trainer(make(**settings))
    saved: dict[str, torch.Tensor] = {}

    def save_third(step: Step) -> None:
        if step.done == 3:
            assert step.done < step.total
            saved.update(load(save(whole.export_state())))  # through bytes: plain tensors, nothing pickled

    whole.fit(liking(), on_step=save_third)
    resumed = Trainer(make(**settings))
    resumed.load_state(saved)
    resumed.fit(liking(), start=3)
    assert same(whole.export_state(), resumed.export_state())


def test_stochastic_length_reads_fewer_tokens_and_other_ones_in_each_epoch() -> None:
    read: dict[bool, list[int]] = {True: [], False: []}
    data = SequenceDataset(table([user(i, 40, 1) for i in range(20)]))
    for short in (False, True):
        settings = {"max_interactions": 40, "stochastic_alpha": 1.2} if short else {}
        Trainer(ranker(**settings, epochs=3)).fit(data, on_step=lambda s, k=short: read[k].append(s.tokens))  # type: ignore[misc]
    assert sum(read[True]) < 0.5 * sum(read[False])
    assert max(read[True]) > 100, "batches are filled with what is left, up to the token budget"


def test_a_continual_pass_learns_every_new_interaction_whatever_the_stochastic_length() -> None:
    window = SequenceDataset(table([user(i, 30, 2, new_from=i) for i in range(30)]))
    read: list[int] = []
    trainer = Trainer(ranker(**SHORT))
    result = trainer.fit(window, continual=True, on_step=lambda step: read.append(step.tokens))
    assert result["targets"] == window.targets() and sum(read) < 0.9 * int(window.tokens().sum())


@pytest.mark.parametrize("make", [ranker, retriever])
@pytest.mark.parametrize("variant", ["research", "production"])
@pytest.mark.parametrize(
    "short", [{}, {"max_interactions": 60, "stochastic_alpha": 1.2}], ids=["whole", "stochastic length"]
)
@pytest.mark.parametrize("continual", [False, True])
def test_no_batch_is_larger_than_the_token_budget(
    make: Make, variant: str, short: dict[str, object], continual: bool
) -> None:
    """Stochastic length is counted as if all interactions had equally many actions, hence the tenth more."""
    people = [user(i, 60, 1, new_from=10 if continual else 0) for i in range(30)]
    liked = [dataclasses.replace(u, actions=np.full(60, CLICK, dtype=np.int32)) for u in people]
    settings = {"variant": variant, "batch_tokens": 400, "continual_batch_tokens": 400, "epochs": 1} | short
    read: list[int] = []
    Trainer(make(**settings)).fit(
        SequenceDataset(table(liked)), continual=continual, on_step=lambda step: read.append(step.tokens)
    )
    assert 200 < np.mean(read) < max(read) <= 440


@pytest.mark.parametrize("make", [ranker, retriever])
@pytest.mark.parametrize("variant", ["research", "production"])
def test_context_tokens_count_towards_the_token_budget(make: Make, variant: str) -> None:
    """They are half of the tokens where each user has a single interaction and no other event."""
    liked = [dataclasses.replace(user(i, 1, 1), actions=np.array([CLICK], np.int32)) for i in range(60)]
    events = [name for name in EVENT_DTYPES if name.startswith(("action_", "aux_"))]
    bare = [dataclasses.replace(u, **{name: getattr(u, name)[:0] for name in events}) for u in liked]
    read: list[int] = []
    trainer = Trainer(make(variant=variant, context="user", positions=9, batch_tokens=40, epochs=1))
    trainer.fit(SequenceDataset(table(bare)), on_step=lambda step: read.append(step.tokens))
    assert 35 < max(read) <= 40


def test_a_step_tells_its_speed() -> None:
    steps: list[Step] = []
    trainer = Trainer(ranker())
    trainer.fit(liking(10), on_step=steps.append)
    read = len(trainer.model.tokens(liking(10).users(range(10))))
    assert sum(step.tokens for step in steps if step.epoch == 0) == read
    assert all(step.tokens_per_second == pytest.approx(step.tokens / step.seconds) for step in steps)


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("variant", ["research", "production"])
def test_mixed_precision_is_for_training_alone_and_where_the_hardware_has_it(
    variant: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.precision.has_bfloat16", lambda device: has)
    seen: list[torch.dtype] = []

    def watched(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(q.dtype)
        return attention(q, *rest, **options)

    monkeypatch.setattr("model.hstu.attention", watched)
    model = ranker(variant=variant, precision="bfloat16", dropout=0.0, input_dropout=0.0)
    trainer = Trainer(model)
    trainer.fit(liking(20), epochs=1)
    assert set(seen) == {torch.bfloat16 if has else torch.float32}
    seen.clear()
    trainer.evaluate(liking(20))
    assert set(seen) == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())


def test_mixed_precision_learns_what_float32_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.precision.has_bfloat16", lambda device: True)
    results = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(ranker(precision=precision, epochs=8, dense_lr=0.01))
        trainer.fit(liking())
        results.append(trainer.evaluate(liking(80))["ne_click"])
    assert results[0] != results[1] and results[1] == pytest.approx(results[0], abs=0.05)


def test_continual_training_goes_on_from_a_restored_state() -> None:
    first = Trainer(ranker())
    first.fit(liking())
    restored = Trainer(ranker(seed=0))
    restored.load_state(first.export_state())
    window = SequenceDataset(table([user(i, 6, 2, new_from=3) for i in range(40)]))
    assert first.evaluate(window) == restored.evaluate(window)
    for trainer in (first, restored):
        trainer.fit(window, continual=True)
    assert same(first.export_state(), restored.export_state())


def test_a_state_stays_as_it_was_while_training_goes_on() -> None:
    trainer, other = Trainer(ranker()), Trainer(ranker())
    trainer.fit(liking(10))
    state = trainer.export_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    other.load_state(state)
    for each in (trainer, other):
        each.fit(liking(10))
    assert same(state, before)


def test_a_trainer_whose_tables_are_empty_can_be_set_back() -> None:
    trainer = Trainer(ranker(slots="", bias_slots=""))
    start = trainer.export_state()
    trainer.fit(liking())
    once = trainer.export_state()
    trainer.load_state(start)
    trainer.fit(liking())
    assert same(trainer.export_state(), once)


def test_continual_training_is_one_pass_over_every_new_interaction() -> None:
    window = SequenceDataset(table([user(i, 6, 2, new_from=i % 7) for i in range(40)]))
    assert Trainer(ranker(epochs=5)).fit(window, continual=True)["targets"] == window.targets() < 240


@pytest.mark.parametrize("continual", [False, True])
def test_learning_rates_rise_then_fall_to_their_last_share_and_are_constant_in_a_continual_pass(
    continual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pace for dense parameters and tables; `bias` has a rate of its own."""
    rates: list[tuple[float, float, float]] = []
    of_tables: dict[str, float] = {}
    monkeypatch.setattr(EmbeddingTable, "step", lambda table, lr, _: of_tables.update({table.slot: lr}) or 0)
    first = {"dense_lr": 0.01, "table_lr": 0.2, "bias_lr": 0.3}
    later = {"continual_dense_lr": 0.02, "continual_table_lr": 0.4, "continual_bias_lr": 0.5}
    trainer = Trainer(ranker(**first, **later, warmup=0.25, final_lr=0.2, bias_slots="item"))

    def note(_: Step) -> None:
        rates.append((trainer.optimizer.param_groups[0]["lr"], of_tables["item"], of_tables["item_bias"]))

    trainer.fit(liking(), continual=continual, on_step=note)
    done = np.arange(len(rates))
    rise, fall = (done + 1) / (0.25 * len(rates)), 1 - 0.8 * done / len(rates)
    pace = np.ones(len(rates)) if continual else np.minimum(rise, fall)
    assert len(rates) > 8 and np.argmax(rise >= fall) > 1
    np.testing.assert_allclose(rates, pace[:, None] * list((later if continual else first).values()))


def test_evaluation_learns_nothing() -> None:
    trainer = Trainer(ranker())
    trainer.fit(liking(20))
    before = trainer.export_state()
    trainer.evaluate(SequenceDataset(table([user(i + 500, 9, 4, items=90) for i in range(9)])))
    assert same(before, trainer.export_state())


@pytest.mark.parametrize("make", [ranker, retriever])
def test_measuring_between_steps_changes_nothing_of_what_is_learned(make: Make) -> None:
    undisturbed, measured = Trainer(make()), Trainer(make())

    def measure(step: Step) -> None:
        measured.evaluate(liking(5))

    undisturbed.fit(liking())
    measured.fit(liking(), on_step=measure)
    assert same(undisturbed.export_state(), measured.export_state())


def test_what_a_step_left_in_the_mode_of_inference_is_trained_all_the_same() -> None:
    undisturbed, asked = Trainer(ranker()), Trainer(ranker())

    def ask(_: Step) -> None:
        asked.model.eval()

    undisturbed.fit(liking())
    asked.fit(liking(), on_step=ask)
    assert same(undisturbed.export_state(), asked.export_state())


def without_positives(users: list[UserEvents]) -> list[UserEvents]:
    return [dataclasses.replace(u, actions=np.zeros_like(u.actions)) for u in users]


def test_a_batch_without_a_target_moves_no_parameter_and_no_row_and_has_no_loss() -> None:
    trainer, steps = Trainer(retriever(epochs=1, table_optimizer="adam")), list[Step]()
    trainer.fit(liking(20))
    before, item = trainer.dense(), trainer.model.tables()["item"]
    ids = item.export_all().keys
    rows = item.lookup(ids)
    window = SequenceDataset(table(without_positives(liking(20).users(range(20)))))
    result = trainer.fit(window, continual=True, on_step=steps.append)
    assert same(before, trainer.dense()) and trainer.step > len(steps) > 1
    assert len(ids) and torch.equal(item.lookup(ids), rows)
    assert np.isnan([step.loss for step in steps]).all() and np.isnan(result["loss"]) and result["targets"] == 0


def test_the_mean_loss_is_that_of_the_targets_whatever_other_batches_there_are() -> None:
    users, steps = liking(40).users(range(40)), list[Step]()
    mixed = SequenceDataset(table(users[:20] + without_positives(users[20:])))  # in event order: the latter come last
    result = Trainer(retriever()).fit(mixed, continual=True, on_step=steps.append)
    learned = [(step.loss, step.targets) for step in steps if step.targets]
    assert 0 < len(learned) < len(steps)
    assert result["loss"] == pytest.approx(sum(loss * n for loss, n in learned) / result["targets"])


def test_the_mean_loss_is_that_of_the_last_epoch() -> None:
    steps = list[Step]()
    result = Trainer(ranker(epochs=3)).fit(liking(), on_step=steps.append)
    last = [step for step in steps if step.epoch == 2]
    assert 1 < len(last) < len(steps)
    assert result["loss"] == pytest.approx(sum(s.loss * s.targets for s in last) / sum(s.targets for s in last))


def test_weight_decay_draws_dense_parameters_towards_zero_and_no_row() -> None:
    one_step = {"epochs": 1, "batch_tokens": 10_000, "warmup": 0.0, "dense_lr": 0.01}
    plain, decayed = Trainer(ranker(**one_step)), Trainer(ranker(**one_step, weight_decay=0.5))
    start = plain.dense()
    for trainer in (plain, decayed):
        assert trainer.fit(liking(10))["steps"] == 1
    for name, value in decayed.dense().items():
        torch.testing.assert_close(value, plain.dense()[name] - 0.01 * 0.5 * start[name], msg=name)
    states = [{n: v for n, v in t.export_state().items() if n.startswith("tables/")} for t in (plain, decayed)]
    assert same(*states)


def test_a_seed_that_training_cannot_take_is_refused_before_it() -> None:
    Trainer(ranker(seed=2**32 - 1, epochs=1)).fit(liking(5))
    with pytest.raises(ValueError, match="seed"):
        ranker(seed=2**32)


def test_a_step_is_limited_by_the_norm_of_all_gradients_together() -> None:
    trainer = Trainer(ranker(clip_norm=1e-3))
    tokens = trainer.model.tokens(liking().users(range(5)))
    trainer.model.loss(tokens)[0].backward()
    assert trainer._clip(trainer.model.tables()) > 1e-3
    squares = sum(t.gradient_squared_norm() for t in trainer.model.tables().values())
    squares += sum(float(p.grad.square().sum()) for p in trainer.parameters.values() if p.grad is not None)
    assert squares**0.5 == pytest.approx(1e-3, rel=1e-4)


def test_a_gradient_that_is_not_finite_stops_training_and_changes_nothing() -> None:
    trainer = Trainer(ranker())
    trainer.fit(liking(10))
    with torch.no_grad():
        trainer.parameters["head.bias"][0] = float("nan")
    before = trainer.export_state()
    with pytest.raises(FreshetError, match="diverged"):
        trainer.fit(liking(10))
    after = trainer.export_state()
    assert all(torch.equal(before[n], after[n]) for n in before if not n.endswith("head.bias"))


@pytest.mark.parametrize("make", [ranker, retriever])
def test_a_step_that_was_interrupted_leaves_nothing_for_the_next_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had its gradients, dense and of tables, and had moved nothing yet."""
    trainer, whole = Trainer(make(epochs=1)), Trainer(make(epochs=1))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.optimizer, "step", interrupted)
        trainer.fit(liking())
    for each in (trainer, whole):
        each.fit(liking())
    assert same(trainer.export_state(), whole.export_state())


def test_a_state_of_another_shape_is_refused() -> None:
    state = Trainer(ranker()).export_state()
    with pytest.raises(BadInput, match="config"):
        Trainer(ranker(dim=12)).load_state(state)
    for slots in ("item", "item,author,category,page,duration,user"):
        with pytest.raises(BadInput, match=r"tables .*use the config it was made with"):
            Trainer(ranker(slots=slots)).load_state(state)
    trained = Trainer(ranker())
    trained.fit(liking(10))
    with pytest.raises(BadInput, match="new model"):
        trained.load_state(state)


def test_nothing_to_evaluate_is_said() -> None:
    with pytest.raises(BadInput, match="nothing to evaluate"):
        Trainer(ranker()).evaluate(SequenceDataset(table([user(1, 4, new_from=4)])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [ranker, retriever])
def test_training_on_a_gpu_follows_training_on_the_cpu(make: Make) -> None:
    states = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(make(dropout=0.0, input_dropout=0.0))
        trainer.model.place(torch.device(device))
        trainer.fit(liking())
        states.append(trainer.export_state())
    assert states[0].keys() == states[1].keys()
    assert all(tensor.device.type == "cpu" for tensor in states[1].values())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=1e-3, msg=name)
