"""The steps from a dataset to a published version, in small."""

from __future__ import annotations

from typing import Any

from components.pretrain.config import PretrainConfig
from components.pretrain.run import PretrainResult
from components.pretrain.run import run as pretrain
from components.publish.config import PublishConfig
from components.publish.run import run as publish
from components.register.config import RegisterConfig
from components.register.run import run as register
from tests.components.sequence_world import SMALL, write_history


def pretrain_config(where: dict[str, Any], model: Any = "ranker", **settings: Any) -> PretrainConfig:
    chosen = {"epochs": 2, "batch_tokens": 512, "threads": 1, **SMALL, **settings}
    return PretrainConfig(model=model, dataset=write_history(where["root"]), **chosen, **where)


def published_version(where: dict[str, Any], model: Any = "ranker", **settings: Any) -> tuple[PretrainResult, int]:
    """Pretrain, register and publish; returns the checkpoint's result and the version."""
    made = pretrain(pretrain_config(where, model, **settings))
    version = register(RegisterConfig(model=model, checkpoint=made.checkpoint, **where)).version
    publish(PublishConfig(model=model, version=version, **where))
    return made, version
