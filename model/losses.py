"""Losses. Each is a mean or a sum over the predictions given; none depends on how they were batched."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_cross_entropy(
    vectors: Tensor, wanted: Tensor, drawn: Tensor, hits: Tensor, log_q: float, temperature: float
) -> Tensor:
    """Mean cross-entropy of the wanted item among itself and items drawn with probability q each (logQ correction).

    vectors, wanted (N, d): the users and their wanted items; drawn (S, d): shared by all; hits (N, S) bool: this drawn
    item is the wanted one. Log q is taken off the drawn logits, so that they estimate the sum over all other items;
    the wanted item is there with probability one and needs no correction.
    """
    positive = (vectors * wanted).sum(1, keepdim=True) / temperature
    negative = vectors @ drawn.T / temperature - log_q
    logits = torch.cat([positive, negative.masked_fill(hits, float("-inf"))], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device))


def sampled_binary_cross_entropy(logits: Tensor, labels: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Summed binary cross-entropy where negatives are kept with probability `rate` and positives always.

    logits, labels, kept (N, K). Such a sample has log-odds that are log(1 / rate) too high. Training on
    z - log rate, for positives and negatives alike, leaves the true log-odds in z: serve sigmoid(z).
    """
    corrected = logits - math.log(rate)
    return (F.binary_cross_entropy_with_logits(corrected, labels, reduction="none") * kept).sum()


def log_seconds_error(predicted: Tensor, seconds: Tensor) -> Tensor:
    """Summed squared error against log(1 + seconds); values that are not finite and not >= 0 count nothing. (N,)"""
    known = torch.isfinite(seconds) & (seconds >= 0)
    error = predicted - torch.log1p(torch.where(known, seconds, torch.zeros_like(seconds)))
    return (error.square() * known).sum()
