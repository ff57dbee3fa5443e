"""One config model per step: the form, the command line and what MLflow logs must agree, for every step."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from components.config import WHERE_THINGS_ARE, StepConfig, _parser, form_fields, to_arguments

ROOT = Path(__file__).resolve().parents[2]
STEPS = sorted(path.parent.name for path in (ROOT / "components").glob("*/__main__.py") if path.parent.name != "world")
"""All steps; `world` is no step but a tool of ingest and traffic, which carry its settings."""


def config_of(step: str) -> type[StepConfig]:
    """The step's config class: the one that is called like the step."""
    module = importlib.import_module(f"components.{step}.config")
    config = getattr(module, f"{step.title()}Config")
    assert issubclass(config, StepConfig)
    return config


def example(config: type[StepConfig]) -> dict[str, Any]:
    """A value for every field, other than the default where the type allows one."""
    values: dict[str, Any] = {}
    for name, schema in form_fields(config).items():
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        default = schema.get("default")
        if "boolean" in kinds:
            values[name] = not default
        elif "enum" in schema:
            values[name] = schema["enum"][-1]
        elif default is not None:
            values[name] = default
        elif "string" not in kinds:
            values[name] = schema.get("minimum", 1) or 1
        else:
            values[name] = "20220501T000000Z-20220502T000000Z"
    return values


def test_every_step_has_the_same_files() -> None:
    assert {"ingest", "join", "sequences", "pretrain", "evaluate", "register", "publish", "finetune"} <= set(STEPS)
    assert {"compact", "rollout", "serve", "traffic"} <= set(STEPS)
    for step in STEPS:
        assert (ROOT / "components" / step / "run.py").is_file(), f"{step} has no run.py"


@pytest.mark.parametrize("step", STEPS)
def test_form_command_line_and_logged_parameters_have_the_same_fields(step: str) -> None:
    config = config_of(step)
    parser = _parser(config, importlib.import_module(f"components.{step}.run").run)
    flags = {action.dest for action in parser._actions} - {"help"}
    logged = set(config.model_construct().model_dump())
    required = {name for name, field in config.model_fields.items() if field.is_required()}
    assert flags == set(config.model_fields) == logged | required
    assert set(form_fields(config)) == set(config.model_fields) - WHERE_THINGS_ARE


@pytest.mark.parametrize("step", STEPS)
def test_every_field_is_a_described_scalar_that_a_form_can_show(step: str) -> None:
    for name, schema in form_fields(config_of(step)).items():
        assert len(schema["description"]) >= 8, f"{step}.{name} is not described"
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert set(kinds) <= {"string", "integer", "number", "boolean", "null"}, f"{step}.{name} is {kinds}"
        assert "$ref" not in json.dumps(schema), f"{step}.{name} is nested"


@pytest.mark.parametrize("step", STEPS)
def test_every_number_is_bounded_below(step: str) -> None:
    for name, schema in form_fields(config_of(step)).items():
        if {"integer", "number"} & set(schema["type"] if isinstance(schema["type"], list) else [schema["type"]]):
            assert {"minimum", "exclusiveMinimum"} & set(schema), f"{step}.{name} has no lower bound"


@pytest.mark.parametrize("step", STEPS)
def test_the_command_line_sets_what_the_form_sends(step: str) -> None:
    config = config_of(step)
    parser = _parser(config, importlib.import_module(f"components.{step}.run").run)
    values = example(config)
    parsed = vars(parser.parse_args(to_arguments(values)))
    for name, value in values.items():
        kind: Any = config.model_fields[name].annotation
        arrived = TypeAdapter(kind).validate_python(parsed[name])
        assert arrived == value, f"--{name} arrived as {arrived!r}"


def test_equal_settings_have_equal_digests_wherever_they_run() -> None:
    from components.pretrain.config import PretrainConfig

    here = PretrainConfig(root="file:///a", tracking_uri="http://a", dataset="x")
    there = PretrainConfig(root="s3://b", tracking_uri="http://b", dataset="x")
    assert here.digest() == there.digest() != PretrainConfig(dataset="x", dim=64).digest()


def test_how_often_work_is_saved_is_asked_in_the_form_but_names_no_other_result() -> None:
    from components.pretrain.config import PretrainConfig

    assert "save_every_s" in form_fields(PretrainConfig)
    assert PretrainConfig(dataset="x").digest() == PretrainConfig(dataset="x", save_every_s=0).digest()
