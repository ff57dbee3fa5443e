"""docs/steps.md is what the configs say."""

from __future__ import annotations

from infra.reference import PAGE, page, steps


def test_the_page_of_steps_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python -m infra.reference"


def test_every_setting_of_every_step_is_explained() -> None:
    for name, config in steps().items():
        for field, info in config.model_fields.items():
            assert info.description, f"{name}.{field} has no description"
