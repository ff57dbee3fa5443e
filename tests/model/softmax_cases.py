"""How near a fused softmax has to come to the exact one."""

from __future__ import annotations

from torch import Tensor

LossAndGradients = tuple[Tensor, Tensor, Tensor]
"""The loss, and the gradients of three times the loss (so that the one from above counts) by vectors and items."""


def assert_near(got: LossAndGradients, exact: LossAndGradients, temperature: float) -> None:
    """Within 1e-5 of the largest number there is, or of the largest gradient that one score can have.

    An item of few gets a gradient from many positions, which cancel; what they round to adds up like a random walk.
    """
    positions, items = len(exact[1]), len(exact[2])
    one_position = 3 / temperature / positions
    for mine, want, summed in zip(got, exact, (1.0, 1.0, max(1.0, positions / items)), strict=True):
        scale = max(float(want.abs().max()), one_position * summed**0.5)
        assert float((mine.double() - want).abs().max()) < 1e-5 * scale
