"""What the ranker and the retriever share: features, HSTU stack, tables, and the face that the trainer uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.catalogue import ItemCatalogue
from model.dataset import SequenceDataset
from model.embedding import TokenEmbedding
from model.encoding import RequestEncoding
from model.hstu import Hstu
from model.inputs import Queries, Tokens, UserEvents, build_tokens
from model.requests import RequestDataset
from model.settings import ModelConfig
from model.table import EmbeddingTable

_MODES = Lock()
"""Held while a model changes between training and inference."""


class SequenceModel(nn.Module, ABC):
    """HSTU over a user's tokens. Dense weights are ordinary parameters; rows of ids live in `tables()`.

    `state_dict` has the former alone, `Trainer.export_state` both. In a training loop of one's own each of `tables()`
    takes its `step` beside the optimiser's.

    `catalogue` gives items their side features; it may be replaced at any time. The initial weights are a function of
    the config alone; the caller's random state is left as it was.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, catalogue: ItemCatalogue, outputs: int) -> None:
        super().__init__()
        self.config = config
        self.catalogue = catalogue
        self.precision = torch.float32  # of the HSTU stack; the trainer lowers it while it trains
        self._asking, self._training = 0, list[nn.Module]()  # of `inference`: who is inside, what was in training mode
        self.input_dropout = nn.Dropout(config.input_dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = TokenEmbedding(config)
            self.hstu = Hstu(config.hstu())
            self.norm = nn.LayerNorm(config.dim, eps=1e-6)
            self.head = self.make_head(config, outputs)
            encodes = config.encodes_position() or config.encodes_time()
            self.encoding = RequestEncoding(config) if encodes else None

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

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside: no gradients, no dropout. Afterwards every part is in the mode it was in, so training goes on.

        Any thread, several at once: the last one that leaves ends it.
        """
        with _MODES:
            if not self._asking:
                self._training = [part for part in self.modules() if part.training]
                self.eval()
            self._asking += 1
        try:
            with torch.no_grad():
                yield
        finally:
            with _MODES:
                self._asking -= 1
                for part in [] if self._asking else self._training:
                    part.training = True

    def examples(self, dataset: SequenceDataset) -> SequenceDataset:
        """The rows that are trained on and measured: users, or (setting examples) requests."""
        rows = RequestDataset(dataset, self.config.reach()) if self.config.per_request() else dataset
        return rows.with_context(len(self.config.context_slots()))

    def build(self, users: Sequence[UserEvents], queries: Sequence[Queries] | None, *, cut: bool = False) -> Tokens:
        """Tokens by the model's settings. cut: leave out the history that the layers cannot reach from the queries."""
        c = self.config
        return build_tokens(
            users,
            queries,
            window=c.window,
            catalogue=self.catalogue,
            use_aux=c.use_aux,
            layers=c.layers if cut else None,
            context=len(c.context_slots()),
        )

    def embed(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (T, dim): the input of the HSTU stack, on the host."""
        x = self.embedding(tokens)
        if self.encoding is not None:
            x = self.encoding(x, tokens)
        dropped: Tensor = self.input_dropout(x)
        return dropped

    def encode(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (N, outputs) at the targets, on the host, float32."""
        device = self.norm.weight.device
        x, last = self.embed(tokens).to(device), tokens.targets_at_end()
        if last is not None:
            last = last.to(device)
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            h = self.hstu(
                x, tokens.seen.to(device), tokens.query_time.to(device), tokens.key_time.to(device), last=last
            )
            y: Tensor = self.output(h if last is not None else h[tokens.targets.to(device)])
        return y.float().cpu()

    def output(self, h: Tensor) -> Tensor:
        """Rows of the HSTU stack (N, dim) -> (N, outputs)."""
        y: Tensor = self.head(self.norm(h))
        return y

    @abstractmethod
    def make_head(self, config: ModelConfig, outputs: int) -> nn.Module:
        """(N, dim) -> (N, outputs)."""

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
