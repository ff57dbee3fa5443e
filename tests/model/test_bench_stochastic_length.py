"""The stochastic length benchmark: what a pass reads, and the command on a small synthetic log, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.errors import BadInput
from model.experiments import ml1m, stochastic_length_bench
from model.experiments.ml1m_data import read_histories
from model.experiments.run_configs import read_config
from model.stochastic_length import StochasticLength
from tests.model.test_ml1m import write_log


def test_stochastic_length_leaves_the_held_out_items_and_the_order_alone(tmp_path: Path) -> None:
    data = read_histories(write_log(tmp_path))
    rule = StochasticLength(20, 1.6)
    part = stochastic_length_bench.shortened(data, rule, 0)
    whole = stochastic_length_bench.shortened(data, StochasticLength(200, 2.0), 0)
    lengths = {len(items) - 2 for items in part.items}
    assert max(lengths) <= 20 and rule.short in lengths
    for short, full, untouched in zip(part.items, data.items, whole.items, strict=True):
        assert short[-2:].tolist() == full[-2:].tolist() and untouched.tolist() == full.tolist()
        places = [full.tolist().index(item) for item in short]
        assert places == sorted(places)


def test_the_stochastic_length_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_log(tmp_path)
    plot = tmp_path / "plot.png"
    stochastic_length_bench.main([f"--data={data}", "--epochs=1", "--alphas=1.6,2", "--threads=1", f"--plot={plot}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert set(result) == {"1.6/weighted", "2.0/weighted", "1.6/greedy", "1.6/uniform", "epochs"}
    assert result["2.0/weighted"]["unread"] == 0 and plot.stat().st_size > 1000


def test_what_a_loss_is_measured_against_has_been_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_log(tmp_path)
    for alphas, rows, differences in (("1.6,1.8", 4, 0), ("1.6,2", 4, 4), ("2", 1, 1)):
        stochastic_length_bench.main([f"--data={data}", "--epochs=1", f"--alphas={alphas}", "--threads=1"])
        table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
        assert len(table) == rows and sum(row[6].endswith("%") for row in table) == differences


def test_settings_that_cannot_be_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stochastic_length_bench, "measure", lambda *_: pytest.fail("trained"))
    data = write_log(tmp_path)
    with pytest.raises(BadInput, match="alpha above 1 and at most 2"):
        stochastic_length_bench.main([f"--data={data}", "--alphas=1.6,3"])
    with pytest.raises(SystemExit):
        stochastic_length_bench.main([f"--data={data}", "--epochs=0"])


def test_stochastic_length_trains_the_base_model_of_the_other_benchmark() -> None:
    """With the passes that the documented figures had, unless the command says otherwise."""
    entry = read_config(stochastic_length_bench.CONFIG, stochastic_length_bench.Entry)
    base = ml1m.read_entry(ml1m.CONFIGS / "hstu.toml")
    assert entry.run.network(100) == base.run.network(100)
    assert (entry.run.batch_users, entry.run.lr) == (base.run.batch_users, base.run.lr)
    assert (entry.limit, entry.run.epochs, entry.run.seed) == (200, 30, 0)
