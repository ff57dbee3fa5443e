"""bfloat16 where the hardware has it: while training only; measuring and serving stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.sequence_model import SequenceModel


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself, rather than by conversion."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def training_precision(model: SequenceModel) -> Iterator[torch.dtype]:
    """The precision of the HSTU stack inside a training step: the setting's, where the model's device has it."""
    wanted = getattr(torch, model.config.precision)
    device = model.norm.weight.device
    model.precision = wanted if wanted == torch.float32 or has_bfloat16(device) else torch.float32
    try:
        yield model.precision
    finally:
        model.precision = torch.float32
