"""Writes docs/steps.md from the config of every step: `python -m infra.reference`. A test holds the two together."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from components.config import StepConfig, form_fields

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "steps.md"
HEADER = """# Steps

Every step is `python -m components.<step>`; its settings are the same on the command line (`--kebab-case`), in the
Airflow trigger form and in MLflow. All steps also take `--root` (storage root URL; default `$FRESHET_ROOT`, else
`.freshet/local/store` under the present folder, as `make up` has it); those that talk to MLflow take `--tracking-uri`,
those that run on Spark `--spark`. This page is written by `python -m infra.reference`.
"""


def steps() -> dict[str, type[StepConfig]]:
    """Name -> config of every step that has a command line."""
    folders = (path.parent.name for path in (ROOT / "components").glob("*/__main__.py"))
    names = sorted(name for name in folders if name != "world")  # a tool; ingest carries its settings
    return {name: _config(name) for name in names}


def page() -> str:
    """The whole page as Markdown."""
    return HEADER + "".join(_section(name, config) for name, config in steps().items())


def _config(step: str) -> type[StepConfig]:
    config: type[StepConfig] = getattr(importlib.import_module(f"components.{step}.config"), f"{step.title()}Config")
    return config


def _section(name: str, config: type[StepConfig]) -> str:
    summary = (inspect.getdoc(importlib.import_module(f"components.{name}.run")) or "").split("\n\n")[0]
    rows = "".join(_row(field, schema) for field, schema in form_fields(config).items())
    return f"\n## {name}\n\n{summary}\n\n| setting | type | default | bounds | meaning |\n|---|---|---|---|---|\n{rows}"


def _row(name: str, schema: dict[str, Any]) -> str:
    kinds = schema.get("type", "string")
    kind = " or ".join(kinds) if isinstance(kinds, list) else kinds
    default = "required" if "default" not in schema else f"`{schema['default']}`" if schema["default"] != "" else ""
    text = " ".join(schema.get("description", "").split()).replace("|", "\\|")
    return f"| `{name}` | {kind} | {default} | {_bounds(schema)} | {text} |\n"


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return ", ".join(limits) or ", ".join(schema.get("enum", []))


if __name__ == "__main__":
    PAGE.write_text(page())
