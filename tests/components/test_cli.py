"""The command line that every step gets from its config."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from components.config import StepConfig, TimeText, cli, form_fields, to_arguments
from components.errors import AlreadyExists, BadInput, FreshetError


class PourConfig(StepConfig):
    cups: int = Field(2, ge=1, le=9, description="how many cups, 100 % full")
    rate: float = Field(0.5, gt=0, description="litres a second")
    name: str = Field("tea", description="what is poured")
    hot: bool = Field(True, description="heat it first")
    size: Literal["small", "large"] = Field("small", description="of a cup")
    since: TimeText = Field("", description="when it was made")
    note: str | None = Field(None, description="anything else")


class Poured(BaseModel):
    config: PourConfig


def run(config: PourConfig) -> Poured:
    if config.name == "oil":
        raise BadInput("oil is not poured; choose tea")
    return Poured(config=config)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["config"]
    return result


def test_the_last_line_of_stdout_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(PourConfig, run, ["--cups=3", "--no-hot", "--root=file:///x"]) == 0
    expected = PourConfig(cups=3, hot=False, root="file:///x")
    assert last_line(capsys) == expected.model_dump()


def test_the_result_is_written_where_a_pod_expects_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHET_RESULT_PATH", str(tmp_path / "xcom" / "return.json"))
    assert cli(PourConfig, run, []) == 0
    assert json.loads((tmp_path / "xcom" / "return.json").read_text())["config"]["cups"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cups=0"], "--cups: Input should be greater than or equal to 1"),
        (["--rate=fast"], "--rate: Input should be a valid number"),
        (["--size=huge"], "--size: Input should be 'small' or 'large'"),
        (["--since=noon"], "--since: 'noon' is not a time; write it like"),
        (["--name=oil"], "oil is not poured; choose tea"),
    ],
)
def test_wrong_input_exits_2_with_a_message(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(PourConfig, run, argv) == 2
    assert message in capsys.readouterr().err


def test_only_wrong_input_exits_2_what_may_succeed_later_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Airflow gives up at once on 2; a lost race or a server that is away is worth another try."""
    for error in (FreshetError("no server answers"), AlreadyExists("delta 1 is published")):
        assert cli(PourConfig, failing(error), []) == 1
        assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/store/a"), "/store/a'; make room there"),
        (OSError(errno.EROFS, "Read-only file system", "/store"), "/store'; name a place that this user may"),
        (PermissionError(errno.EACCES, "Permission denied", "/store"), "/store'; name a place that this user may"),
        (NoCredentialsError(), "Unable to locate credentials; check the bucket in the root"),
        (EndpointConnectionError(endpoint_url="http://s3"), 'http://s3"; check the bucket in the root'),
        (ClientError({"Error": {"Code": "NoSuchBucket"}}, "PutObject"), "(NoSuchBucket)"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_with_the_remedy_and_may_be_tried_again(
    error: Exception, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(PourConfig, failing(error), []) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and remedy in told


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        cli(PourConfig, failing(FileNotFoundError(errno.ENOENT, "No such file", "a")), [])


def test_sigterm_lets_a_step_close_what_it_has_open(tmp_path: Path) -> None:
    """As Airflow stops a task, and `make down` a service."""
    before = signal.getsignal(signal.SIGTERM)

    def stopped(config: PourConfig) -> Poured:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # the signal comes before this has ended
        finally:
            (tmp_path / "closed").touch()
        return Poured(config=config)

    with pytest.raises(SystemExit) as left:
        cli(PourConfig, stopped, [])
    assert left.value.code == 128 + signal.SIGTERM and (tmp_path / "closed").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_step_may_run_in_a_thread_of_another_program() -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(cli, PourConfig, run, ["--cups=3"]).result() == 0


def test_damaged_data_is_not_called_wrong_settings() -> None:
    with pytest.raises(ValidationError) as damaged:
        Poured.model_validate_json('{"config": ')
    with pytest.raises(ValidationError):  # a traceback and exit code 1
        cli(PourConfig, failing(damaged.value), [])


def failing(error: Exception) -> Callable[[PourConfig], Poured]:
    """A step that ends with this error."""

    def fail(_: PourConfig) -> Poured:
        raise error

    fail.__module__ = run.__module__
    return fail


def test_help_shows_choices_defaults_bounds_and_what_the_step_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli(PourConfig, run, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "how many cups, 100 % full [default 2, >= 1, <= 9]" in shown
    assert "of a cup [one of small, large, default small]" in shown
    assert "when it was made" in shown and "anything else" in shown
    assert "[default ]" not in shown and "[default None" not in shown
    assert "The command line that every step gets" in shown


TEXT = st.text(min_size=1).filter(lambda text: text != "--")
"""Python 3.11 takes the text "--" for the end of the options, even in --name=--, and the step refuses it."""


@given(st.integers(1, 9), st.floats(0.001, 1e6), TEXT, st.booleans(), st.none() | st.just("") | TEXT)
def test_arguments_made_from_a_config_parse_back_to_it(
    cups: int, rate: float, name: str, hot: bool, note: str | None
) -> None:
    seen: list[PourConfig] = []

    def keep(config: PourConfig) -> Poured:
        seen.append(config)
        return Poured(config=config)

    keep.__module__ = run.__module__
    config = PourConfig(cups=cups, rate=rate, name=name, hot=hot, note=note)
    assert cli(PourConfig, keep, to_arguments(config.model_dump())) == 0
    assert seen == [config]


def test_form_fields_carry_type_default_bounds_and_description() -> None:
    fields = form_fields(PourConfig)
    assert "root" not in fields
    assert fields["cups"]["minimum"] == 1 and fields["cups"]["maximum"] == 9 and fields["cups"]["default"] == 2
    assert fields["note"]["type"] == ["string", "null"]


def test_a_digest_names_what_is_computed_not_where() -> None:
    assert PourConfig(root="file:///a").digest() == PourConfig(root="file:///b").digest()
    assert PourConfig(cups=1).digest() != PourConfig(cups=2).digest()
