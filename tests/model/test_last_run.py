"""A benchmark's last run stands between its markers; what people wrote around them stays."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from components.errors import BadInput
from model.experiments import ml1m, stochastic_length_bench, streaming
from model.experiments.last_run import DOCS, Benchmark, Record, markers, replace_block
from tests.model.test_ml1m import write_log

BENCHMARK = Benchmark("bench-x", "model.experiments.x", "x.png", ("records", "seeds"))
BEGIN, END = markers("bench-x")
TEXT = f"# Kept by hand\n\n| .1981 ± .0021 |\n\n{BEGIN}\nNot run.\n{END}\n\n## The next section\n"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "experiments.md"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def record(docs: Path, *argv: str) -> Record:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    BENCHMARK.add_options(parser)
    return BENCHMARK.record(parser, parser.parse_args(argv), argv, docs)


def test_a_run_with_the_default_settings_writes_table_and_picture(docs: Path) -> None:
    run = record(docs, "--threads=1", "--seeds=3")
    assert (run.docs, run.plot, run.notice) == (docs, docs.parent / "images" / "x.png", "")
    run.write("| a |\n|---|\n| 1 |", "7 users")
    before, block, after = re.split(f"{BEGIN}|{END}", docs.read_text())
    assert (before, after) == tuple(TEXT.split(f"{BEGIN}\nNot run.\n{END}"))
    assert re.match(r"\n\*\*Last run\.\*\* \d{4}-\d\d-\d\d \(UTC\), 7 users\.\n", block)
    assert "\n\n    python -m model.experiments.x --threads=1 --seeds=3\n\n| a |\n|---|\n| 1 |\n" in block
    assert block.endswith("\n\n![bench-x](images/x.png)\n")


def test_the_next_run_replaces_the_last_one_alone(docs: Path) -> None:
    for table in ("| first |", "| second |"):
        record(docs).write(table, "7 users")
    text = docs.read_text()
    assert "| second |" in text and "| first |" not in text and "| .1981 ± .0021 |" in text
    assert [path.name for path in docs.parent.iterdir()] == ["experiments.md"]  # nothing half-written is left


def test_a_picture_that_the_section_shows_already_is_not_shown_twice(docs: Path) -> None:
    docs.write_text("![by hand](images/x.png)\n" + TEXT)
    for _ in range(2):
        record(docs).write("| a |", "7 users")
    assert docs.read_text().count("images/x.png") == 1


@pytest.mark.parametrize("argv", [["--records=10"], ["--seeds=1"], ["--seeds=5"]])
def test_a_run_with_other_settings_writes_nothing_and_says_so(docs: Path, argv: list[str]) -> None:
    run = record(docs, *argv)
    run.write("| quick |", "7 users")
    assert run.docs is None and run.plot is None and docs.read_text() == TEXT
    assert run.notice == f"Nothing written for --docs and --plot: not the default {argv[0].split('=')[0]}."


def test_a_run_with_other_settings_writes_what_it_is_told_to(docs: Path, tmp_path: Path) -> None:
    run = record(docs, "--records=10", f"--docs={docs}", f"--plot={tmp_path / 'own.png'}")
    run.write("| quick |", "7 users")
    assert "| quick |" in docs.read_text() and "![bench-x](../own.png)" in docs.read_text() and not run.notice
    run = record(docs, "--records=10", f"--docs={docs}")
    assert run.docs == docs and run.plot is None and "--plot" in run.notice and "--docs" not in run.notice


def test_an_empty_option_is_none(docs: Path) -> None:
    run = record(docs, "--docs=", "--plot=")
    run.write("| a |", "7 users")
    assert (run.docs, run.plot, run.notice) == (None, None, "") and docs.read_text() == TEXT
    assert record(docs, "--docs=").plot and record(docs, "--plot=").docs


def test_without_the_documentation_tables_are_printed_only(tmp_path: Path) -> None:
    run = record(tmp_path / "absent.md")
    assert (run.docs, run.plot) == (None, None) and "absent.md" in run.notice
    with pytest.raises(BadInput, match="no document"):
        record(tmp_path / "absent.md", f"--docs={tmp_path / 'absent.md'}")


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}", f"- {BEGIN}\n{END}"]
)
def test_a_document_without_the_block_is_refused_before_anything_runs(docs: Path, text: str) -> None:
    docs.write_text(text)
    with pytest.raises(BadInput, match=f"needs the lines {BEGIN} and {END}.*add them"):
        record(docs)
    assert docs.read_text() == text


def test_a_block_that_vanished_during_the_run_leaves_the_document_as_it_is(docs: Path) -> None:
    run = record(docs)
    docs.write_text("rewritten\n")
    with pytest.raises(BadInput, match="add them"):
        run.write("| a |", "7 users")
    assert docs.read_text() == "rewritten\n"


@pytest.mark.parametrize(
    "benchmark", [ml1m.BENCHMARK, streaming.BENCHMARK, stochastic_length_bench.BENCHMARK], ids=lambda one: one.target
)
def test_the_documentation_has_a_block_for_each_command(benchmark: Benchmark) -> None:
    replace_block(DOCS.read_text(), benchmark.target, "", DOCS)
    makefile = (DOCS.parents[1] / "Makefile").read_text()
    assert re.search(rf"^{benchmark.target}: .*\n\t.* -m {re.escape(benchmark.module)}( |$)", makefile, re.MULTILINE)


def test_a_command_leaves_its_table_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "experiments.md"
    docs.write_text("\n".join(markers("bench-streaming") + markers("bench-stochastic-length") + markers("bench-ml1m")))
    to, data = [f"--docs={docs}", f"--plot={tmp_path / 'x.png'}", "--threads=1"], f"--data={write_log(tmp_path / 'd')}"
    streaming.main(["--records=100", "--items=50", "--categories=5", "--length=8", "--seeds=1", "--only=hstu", *to])
    stochastic_length_bench.main([data, "--epochs=1", "--alphas=2", *to])
    (tmp_path / "tiny.toml").write_text('title = "tiny"\n[run]\nepochs = 1\n[run.model]\ndim = 8\nhead_dim = 8\n')
    ml1m.main([data, f"--configs={tmp_path}", "--only=tiny", f"--logs={tmp_path / 'logs'}", *to])
    printed, written = capsys.readouterr().out, docs.read_text()
    assert "Nothing written" not in printed and written.count("**Last run.**") == 3
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(tables) > 10 and [line for line in written.splitlines() if line.startswith("|")] == tables
    assert "20 users, --threads 1." in written and "Best possible: hr@10" in written
