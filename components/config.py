"""One pydantic model per step is the step's whole interface.

From its fields come the command line (`cli`), the Airflow trigger form (`form_fields`), the parameters logged to
MLflow (`model_dump`) and the reference docs; `tests/components/test_config.py` holds the four together.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from components.errors import BadInput, FreshetError
from components.windows import parse_time

WHERE_THINGS_ARE = frozenset({"root", "tracking_uri", "spark"})
"""Fields that say where things are kept, not what is computed: they never enter a config hash or a form."""

CHANGES_NO_RESULT = frozenset({"save_every_s"})
"""Fields that say how the work is done, whatever comes of it: in the form, but not in a config hash."""


def home() -> Path:
    """$FRESHET_HOME, or .freshet here: where things are kept on this machine."""
    return Path(os.environ.get("FRESHET_HOME") or ".freshet").absolute()


def default_root() -> str:
    """$FRESHET_ROOT, or the root of `make up`, to which the other defaults belong too: MLflow and the server."""
    return os.environ.get("FRESHET_ROOT") or f"file://{home()}/local/store"


def _readable_time(text: str) -> str:
    try:
        return text and parse_time(text).isoformat()
    except BadInput as error:
        raise ValueError(str(error)) from error


TimeText = Annotated[str, AfterValidator(_readable_time)]
"""A field that holds an ISO 8601 time, or '' where none is given; kept in UTC."""


class StepConfig(BaseModel):
    """Base of every step's config: flat scalar fields, each with a description and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str = Field(
        default_factory=default_root,
        description="storage root URL, file:///folder or s3://bucket/prefix "
        "(default: $FRESHET_ROOT, else .freshet/local/store here, as `make up` has it)",
    )

    def digest(self) -> str:
        """12 hex digits that name what this config computes, whatever machine it runs on."""
        content = self.model_dump(mode="json", exclude=set(WHERE_THINGS_ARE | CHANGES_NO_RESULT))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class TrackedConfig(StepConfig):
    """A step that talks to MLflow."""

    tracking_uri: str = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or "http://127.0.0.1:5000",
        description="MLflow tracking server (default: $MLFLOW_TRACKING_URI, else http://127.0.0.1:5000)",
    )


Config = TypeVar("Config", bound=StepConfig)


def form_fields(config: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Field name -> JSON schema with default, type, bounds and description: one entry of a trigger form each."""
    properties = config.model_json_schema()["properties"]
    return {name: _flat(schema) for name, schema in properties.items() if name not in WHERE_THINGS_ARE}


def cli(config: type[Config], run: Callable[[Config], BaseModel], argv: Sequence[str] | None = None) -> int:
    """Run a step from the command line; the result is the last line of stdout, as JSON.

    Returns the exit code: 0 done, 2 wrong input, 1 what may succeed later (the message says what to do).
    """
    parser = _parser(config, run)
    values = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    try:
        with _sigterm_unwinds():
            result = run(_settings(config, values)).model_dump_json()
    except FreshetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if (remedy := _remedy(error)) is None:
            raise
        print(f"error: {error}; {remedy}", file=sys.stderr)
        return FreshetError.exit_code
    if path := os.environ.get("FRESHET_RESULT_PATH"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(result)
    print(result, flush=True)
    return 0


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end a step as Ctrl-C does, so that it closes what it has open, its MLflow run for one."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # a step in a thread of another program; signals are that program's
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _remedy(error: Exception) -> str | None:
    """What to do about an error of the place where things are kept; None of others, which need their traceback."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS):
        return "name a place that this user may read and write"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room there, then run this again: what is finished stays, and what is not is not seen by anybody"
    if type(error).__module__.startswith("botocore."):
        return "check the bucket in the root, AWS_ENDPOINT_URL, the region and the credentials, then run this again"
    return None


def to_arguments(values: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that set these fields; the inverse of what `cli` parses."""
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    return arguments


def _parser(config: type[BaseModel], run: Callable[..., Any]) -> argparse.ArgumentParser:
    package = run.__module__.rsplit(".", 1)[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description=sys.modules[run.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, field in config.model_fields.items():
        _add_argument(parser, name, field)
    return parser


def _add_argument(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=_help(field))
        return
    parser.add_argument(flag, required=field.is_required(), default=None, help=_help(field), metavar="VALUE")


def _help(field: FieldInfo) -> str:
    notes = []
    if get_origin(field.annotation) is Literal:
        notes.append("one of " + ", ".join(get_args(field.annotation)))
    if not field.is_required() and field.default not in (None, "", PydanticUndefined):
        notes.append(f"default {field.default}")
    for constraint in field.metadata:
        notes += [f"{sign} {getattr(constraint, key)}" for key, sign in _BOUNDS if hasattr(constraint, key)]
    text = f"{field.description or ''} [{', '.join(notes)}]" if notes else field.description or ""
    return text.replace("%", "%%")


_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def _flat(schema: dict[str, Any]) -> dict[str, Any]:
    """Turn pydantic's `anyOf: [X, null]` into `type: [X, null]`, the form Airflow's params understand.

    A text that may be empty becomes nullable too: Airflow's form demands a value for a plain string.
    """
    if schema.get("type") == "string" and schema.get("default") == "":
        return {**schema, "type": ["string", "null"]}
    if "anyOf" not in schema:
        return schema
    rest = {k: v for k, v in schema.items() if k != "anyOf"}
    merged: dict[str, Any] = {}
    for option in schema["anyOf"]:
        merged |= {k: v for k, v in option.items() if k != "type"}
    return {**merged, **rest, "type": [option["type"] for option in schema["anyOf"]]}


def _settings(config: type[Config], values: Mapping[str, Any]) -> Config:
    """The config with these values; BadInput names the flags that are wrong."""
    try:
        return config(**values)
    except ValidationError as error:
        lines = [
            f"--{'.'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise BadInput("wrong settings; " + "; ".join(lines)) from error
