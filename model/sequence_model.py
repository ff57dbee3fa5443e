"""What the ranker and the retriever share: features, HSTU stack, tables, and the face that the trainer uses."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.catalogue import ItemCatalogue
from model.embedding import TokenEmbedding
from model.hstu import Hstu
from model.inputs import Tokens, UserEvents
from model.settings import ModelConfig
from model.table import EmbeddingTable


class SequenceModel(nn.Module, ABC):
    """HSTU over a user's tokens. Dense weights are ordinary parameters; rows of ids live in `tables()`.

    `catalogue` gives items their side features; it may be replaced at any time. The initial weights are a function of
    the config alone; the caller's random state is left as it was.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, catalogue: ItemCatalogue, outputs: int) -> None:
        super().__init__()
        self.catalogue = catalogue
        self.input_dropout = nn.Dropout(config.input_dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = TokenEmbedding(config)
            self.hstu = Hstu(config.hstu())
            self.norm = nn.LayerNorm(config.dim, eps=1e-6)
            self.head = nn.Linear(config.dim, outputs)
        nn.init.zeros_(self.head.bias)

    def tables(self) -> dict[str, EmbeddingTable]:
        """Slot name -> EmbeddingTable, in a fixed order."""
        return {module.slot: module for module in self.modules() if isinstance(module, EmbeddingTable)}

    def table_lr(self, slot: str, continual: bool) -> float:
        """Learning rate of a slot's rows in a phase."""
        return self.config.continual_table_lr if continual else self.config.table_lr

    def place(self, device: torch.device) -> None:
        """Move the HSTU stack to a device. Tables and token features stay on the host, as do inputs and outputs."""
        for part in (self.hstu, self.norm, self.head):
            part.to(device)

    def encode(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (N, outputs) at the targets, on the host."""
        device = self.head.weight.device
        x = self.input_dropout(self.embedding(tokens)).to(device)
        h = self.hstu(x, tokens.seen.to(device), tokens.query_time.to(device), tokens.key_time.to(device))
        y: Tensor = self.head(self.norm(h[tokens.targets.to(device)])).cpu()
        return y

    @abstractmethod
    def tokens(self, users: list[UserEvents]) -> Tokens:
        """Input of training and evaluation, with its targets."""

    @abstractmethod
    def loss(self, tokens: Tokens) -> tuple[Tensor, int]:
        """Mean loss over the targets, and their number."""

    @abstractmethod
    def evaluate_batch(self, tokens: Tokens) -> dict[str, NDArray]:
        """What `summarise` needs of each target, as arrays of equal length."""

    @abstractmethod
    def summarise(self, outputs: dict[str, NDArray]) -> dict[str, float]:
        """Metrics from the concatenated arrays of evaluate_batch."""
