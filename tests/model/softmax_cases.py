"""How near a fused softmax has to come to the exact one."""

from __future__ import annotations

from torch import Tensor

LossAndGradients = tuple[Tensor, Tensor, Tensor]
"""The loss, and the gradients of three times the loss (so that the one from above counts) by vectors and items."""


def assert_near(got: LossAndGradients, exact: LossAndGradients, temperature: float) -> None:
    """Within 1e-5 of the largest number there is, or of the largest gradient that one score can have."""
    one_position = 3 / temperature / len(exact[1])
    for mine, want in zip(got, exact, strict=True):
        scale = max(float(want.abs().max()), one_position)
        assert float((mine.double() - want).abs().max()) < 1e-5 * scale
