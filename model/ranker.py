"""The ranker: how likely is each action on each candidate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from components.errors import BadInput
from components.schemas import action_bit
from model.catalogue import Int64s, ItemCatalogue
from model.embedding import SLOTS
from model.inputs import Queries, Tokens, UserEvents, build_tokens
from model.metrics import auc, calibration, normalised_entropy
from model.sequence_model import SequenceModel
from model.settings import ModelConfig
from model.table import EmbeddingTable

CANDIDATE_BLOCK = 4096


class RankerConfig(ModelConfig):
    """Settings of the ranker; the defaults are measured (docs/experiments.md)."""

    heads: str = Field(default="click,long_view,like", description="Actions predicted, one output each")
    bias_slots: str = Field(
        default="item,user,page", description="Features with an additive logit per action of their own"
    )
    bias_lr: float = Field(default=0.2, gt=0, description="Learning rate of the additive logits, pretraining")
    continual_bias_lr: float = Field(default=0.1, gt=0, description="Learning rate of the additive logits, continual")
    bias_accumulator: float = Field(default=0.1, ge=0, description="Start of the Adagrad sums of the additive logits")

    def head_names(self) -> list[str]:
        """Names of the predicted actions."""
        return [name.strip() for name in self.heads.split(",") if name.strip()]

    def bias_names(self) -> list[str]:
        """Slots with additive logits."""
        return [name.strip() for name in self.bias_slots.split(",") if name.strip()]


class Ranker(SequenceModel):
    """HSTU over impressions and actions; at impressions one logit per action."""

    config: RankerConfig

    def __init__(self, config: RankerConfig, catalogue: ItemCatalogue) -> None:
        self.head_names = config.head_names()
        if not self.head_names:
            raise BadInput("a ranker needs at least one head; set heads, e.g. click,long_view")
        if unknown := sorted(set(config.bias_names()) - set(SLOTS)):
            raise BadInput(f"unknown bias slots {', '.join(unknown)}; known are {', '.join(SLOTS)}")
        super().__init__(config, catalogue, len(self.head_names))
        self.config = config
        self.bits = torch.tensor([action_bit(name) for name in self.head_names])
        self.biases = nn.ModuleDict({name: self._bias_table(name) for name in config.bias_names()})

    def _bias_table(self, slot: str) -> EmbeddingTable:
        return EmbeddingTable(
            f"{slot}_bias",
            len(self.head_names),
            optimizer=self.config.table_optimizer,
            learning_rate=self.config.bias_lr,
            init_scale=0.0,
            seed=self.config.seed,
            initial_accumulator=self.config.bias_accumulator,
        )

    def table_lr(self, slot: str, continual: bool) -> float:
        """Learning rate of a slot's rows in a phase."""
        if not slot.endswith("_bias"):
            return super().table_lr(slot, continual)
        return self.config.continual_bias_lr if continual else self.config.bias_lr

    def tokens(self, users: list[UserEvents]) -> Tokens:
        """Training and evaluation input: every impression from new_from on is a target."""
        return build_tokens(users, window=self.config.window, catalogue=self.catalogue, use_aux=self.config.use_aux)

    def forward(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (N, heads) logits at the targets."""
        logits = self.encode(tokens)
        for name, table in self.biases.items():
            logits = logits + table(getattr(tokens, name)[tokens.targets])
        return logits

    def labels(self, tokens: Tokens) -> Tensor:
        """(N, heads) float32 in {0, 1}."""
        return ((tokens.labels[:, None] & self.bits) > 0).float()

    def loss(self, tokens: Tokens) -> tuple[Tensor, int]:
        """Mean over the targets of the summed binary cross-entropies, and the number of targets."""
        logits = self(tokens)
        loss = F.binary_cross_entropy_with_logits(logits, self.labels(tokens), reduction="sum")
        return loss / max(len(logits), 1), len(logits)

    @torch.no_grad()
    def score(
        self, history: UserEvents, candidates: Int64s, request_time_us: int, page: int = 0
    ) -> NDArray[np.float32]:
        """Probability of each action: int64 item ids [C] -> float32 [C, heads].

        Depends on the history known before request_time_us and on the candidate itself, not on the other candidates.
        """
        ids = np.asarray(candidates, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise BadInput("no candidates to score; give a one-dimensional list of item ids")
        self.eval()
        return np.concatenate(list(self._score_blocks(history, ids, request_time_us, page)))

    def _score_blocks(
        self, history: UserEvents, ids: Int64s, request_time_us: int, page: int
    ) -> Iterator[NDArray[np.float32]]:
        c = self.config
        for first in range(0, len(ids), CANDIDATE_BLOCK):
            queries = Queries.candidates(ids[first : first + CANDIDATE_BLOCK], request_time_us, page)
            tokens = build_tokens(
                [history], [queries], window=c.window, catalogue=self.catalogue, use_aux=c.use_aux, layers=c.layers
            )
            yield torch.sigmoid(self(tokens)).numpy()

    def evaluate_batch(self, tokens: Tokens) -> dict[str, NDArray]:
        """Per target: probability [N, heads], label [N, heads], user id and index of the interaction."""
        return {
            "probability": torch.sigmoid(self(tokens)).numpy(),
            "label": self.labels(tokens).numpy(),
            "user_id": tokens.user[tokens.targets].numpy(),
            "interaction": tokens.source.numpy(),
        }

    def summarise(self, outputs: dict[str, NDArray]) -> dict[str, float]:
        """auc, ne, calibration and rate of every head ('<head>/auc', ...), and the number of impressions."""
        result = {"impressions": float(len(outputs["label"]))}
        for column, name in enumerate(self.head_names):
            label, probability = outputs["label"][:, column], outputs["probability"][:, column]
            result[f"{name}/auc"] = auc(label, probability)
            result[f"{name}/ne"] = normalised_entropy(label, probability)
            result[f"{name}/calibration"] = calibration(label, probability)
            result[f"{name}/rate"] = float(label.mean())
        return result
