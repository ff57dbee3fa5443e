"""Users of a sequence table, and their batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.errors import BadInput
from model.dataset import SequenceDataset
from tests.model.make import table, user


def test_an_epoch_has_every_user_once_within_the_token_budget() -> None:
    dataset = SequenceDataset(table([user(i, i % 30 + 1, 3) for i in range(100)]))
    tokens = dataset.tokens()
    for batches in (dataset.shuffled(150, 1, 0), dataset.in_event_order(150)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(100))
        assert all(tokens[b].sum() <= 150 or len(b) == 1 for b in batches)
    one, same_again, other = (dataset.shuffled(150, 1, e) for e in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same_again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=False))
    lengths = [tokens[b].mean() for b in dataset.shuffled(300, 1, 0)]
    assert lengths != sorted(lengths), "a pool is sorted by length, its batches come in any order"
    firsts = [dataset.first_new()[b] for b in dataset.in_event_order(150)]
    assert (np.diff(np.concatenate(firsts)) >= 0).all()


def test_a_batch_may_fill_its_budget_to_the_last_token() -> None:
    dataset = SequenceDataset(table([user(i, 1, 3).take(np.arange(1), 0) for i in range(10)]))
    full = int(dataset.tokens()[:4].sum())
    assert dataset.in_event_order(full)[0].tolist() == [0, 1, 2, 3]


def test_sequences_come_back_from_parquet_as_they_were(tmp_path: Path) -> None:
    users = [user(1, 5, 1, new_from=2), user(2, 0, 1), user(3, 7, 1)]
    pq.write_table(table(users[:2]), tmp_path / "part-0.parquet")
    pq.write_table(table(users[2:]), tmp_path / "part-1.parquet")
    dataset = SequenceDataset(pa.concat_tables(pq.read_table(tmp_path / f"part-{n}.parquet") for n in (0, 1)))
    assert len(dataset) == 3 and dataset.targets() == 10 and len(dataset.is_new()) == 12
    for index, events in enumerate(users):
        for name, value in vars(events).items():
            np.testing.assert_array_equal(getattr(dataset[index], name), value, err_msg=name)


def test_sequences_with_missing_columns_are_refused() -> None:
    with pytest.raises(BadInput, match=r"lack the columns action_mask; build them with components\.sequences"):
        SequenceDataset(table([user(1, 2)]).drop_columns(["action_mask"]))
