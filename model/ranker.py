"""The ranker: how likely is each action on each candidate, and how long will it be watched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from components.errors import BadInput
from components.schemas import action_bit
from model.catalogue import Int64s, ItemCatalogue, int64_ids
from model.embedding import look_up
from model.hashing import uniform
from model.heads import make_head
from model.inputs import Queries, Tokens, UserEvents
from model.losses import log_seconds_error, sampled_binary_cross_entropy
from model.metrics import auc, calibration, normalised_entropy
from model.policies import FEATURES, policies
from model.scoring import ScoreCache, score_tokens
from model.sequence_model import SequenceModel
from model.settings import ModelConfig, RankerConfig
from model.table import EmbeddingTable

__all__ = ["Ranker", "RankerConfig", "ScoreCache"]

CANDIDATE_BLOCK = 4096
REGRESSIONS = ("watch",)


class Ranker(SequenceModel):
    """HSTU over impressions and actions; at impressions one logit per action, then one output per regression."""

    config: RankerConfig

    def __init__(self, config: RankerConfig, catalogue: ItemCatalogue) -> None:
        self.head_names = config.head_names()
        if not self.head_names:
            raise BadInput("a ranker needs at least one head; set heads, e.g. click,long_view")
        if unknown := sorted(set(config.bias_names()) - set(FEATURES)):
            raise BadInput(f"unknown bias slots {', '.join(unknown)}; known are {', '.join(FEATURES)}")
        self.regression_names = config.regression_names()
        if unknown := sorted(set(self.regression_names) - set(REGRESSIONS)):
            raise BadInput(f"unknown regression {', '.join(unknown)}; known is {', '.join(REGRESSIONS)}")
        super().__init__(config, catalogue, len(self.head_names) + len(self.regression_names))
        self.bits = torch.tensor([action_bit(name) for name in self.head_names])
        self.biases = nn.ModuleDict({name: self._bias_table(name) for name in config.bias_names()})

    def make_head(self, config: ModelConfig, outputs: int) -> nn.Module:
        """Shared bottom or MMoE."""
        assert isinstance(config, RankerConfig)
        return make_head(config, outputs)

    def _bias_table(self, slot: str) -> EmbeddingTable:
        return EmbeddingTable(
            f"{slot}_bias",
            len(self.head_names),
            optimizer=self.config.table_optimizer,
            learning_rate=self.config.bias_lr,
            init_scale=0.0,
            seed=self.config.seed,
            initial_accumulator=self.config.bias_accumulator,
            **policies(self.config, slot),
        )

    def table_lr(self, slot: str, continual: bool) -> float:
        """Learning rate of a slot's rows in a phase."""
        if not slot.endswith("_bias"):
            return super().table_lr(slot, continual)
        return self.config.continual_bias_lr if continual else self.config.bias_lr

    def tokens(self, users: list[UserEvents]) -> Tokens:
        """Training and evaluation input: every impression from new_from on is a target.

        With request examples they are put as candidates at the end of what came before, as in serving.
        """
        if not self.config.per_request():
            return self.build(users, None)
        new = [slice(user.new_from, len(user)) for user in users]
        queries = [
            Queries.impressions(user.item_id[of], user.timestamp[of], user.page[of])
            for user, of in zip(users, new, strict=True)
        ]
        tokens = self.build(users, queries, cut=True)
        if users:
            tokens.labels = torch.from_numpy(
                np.concatenate([user.actions[of] for user, of in zip(users, new, strict=True)]).astype(np.int64)
            )
            tokens.watch = torch.from_numpy(
                np.concatenate([user.watch_s[of] for user, of in zip(users, new, strict=True)])
            )
            tokens.source += torch.tensor([user.new_from for user in users]).repeat_interleave(
                torch.tensor([of.stop - of.start for of in new])
            )
        return tokens

    def forward(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (N, heads + regressions) at the targets: logits, then log(1 + seconds)."""
        return self._with_biases(self.encode(tokens), tokens)

    def _with_biases(self, outputs: Tensor, tokens: Tokens) -> Tensor:
        logits, values = outputs.split([len(self.head_names), len(self.regression_names)], dim=1)
        for name, table in self.biases.items():
            at = tokens.targets
            logits = logits + look_up(table, getattr(tokens, name)[at], tokens.event_us[at])
        return torch.cat([logits, values], dim=1) if self.regression_names else logits

    def labels(self, tokens: Tokens) -> Tensor:
        """(N, heads) float32 in {0, 1}."""
        return ((tokens.labels[:, None] & self.bits) > 0).float()

    def loss(self, tokens: Tokens) -> tuple[Tensor, int]:
        """Mean over the targets of the summed losses of all outputs, and the number of targets.

        With negative_rate below 1 an action's negatives are a sample, the same in every pass and batch, and targets
        that no output learns from do not count. Regressions learn from the sample alone, whatever the labels: all
        positives beside a few negatives would promise too many seconds.
        """
        outputs, labels, rate = self(tokens), self.labels(tokens), self.config.negative_rate
        drawn = self._drawn(tokens)
        kept = (labels > 0) | drawn[:, None]
        used = kept.any(1)
        heads = len(self.head_names)
        loss = sampled_binary_cross_entropy(outputs[:, :heads], labels, kept, rate)
        if self.regression_names:
            seconds = tokens.watch.masked_fill(~drawn, float("nan"))
            loss = loss + self.config.regression_weight * log_seconds_error(outputs[:, heads], seconds)
        count = int(used.sum())
        return loss / max(count, 1), count

    def _drawn(self, tokens: Tokens) -> Tensor:
        """(N,) bool: impressions whose negatives and values are trained on."""
        if self.config.negative_rate >= 1:
            return torch.ones(len(tokens.targets), dtype=torch.bool)
        key = (column[tokens.targets].numpy() for column in (tokens.user, tokens.item, tokens.query_time))
        return torch.from_numpy(uniform(self.config.seed, *key) < self.config.negative_rate)

    def score(
        self,
        history: UserEvents,
        candidates: Int64s,
        request_time_us: int,
        page: int = 0,
        cache: ScoreCache | None = None,
    ) -> NDArray[np.float32]:
        """Probability of each action: int64 item ids [C] -> float32 [C, heads].

        Depends on the history known before request_time_us and on the candidate itself, not on the other candidates.
        The history is encoded once (M-FALCON); with a cache kept from an earlier request, only what is new of it. A
        model that encodes position or age at the input reads its history anew: they are relative to the request.
        """
        outputs = self.outputs(history, candidates, request_time_us, page, cache)
        return torch.sigmoid(outputs[:, : len(self.head_names)]).numpy()

    def watch_seconds(
        self, history: UserEvents, candidates: Int64s, request_time_us: int, page: int = 0
    ) -> NDArray[np.float32]:
        """Predicted seconds watched: int64 item ids [C] -> float32 [C]. BadInput without the regression `watch`."""
        if "watch" not in self.regression_names:
            raise BadInput("this ranker predicts no watch time; train one with regression=watch")
        outputs = self.outputs(history, candidates, request_time_us, page)
        return torch.expm1(outputs[:, len(self.head_names)]).clamp(min=0).numpy()

    def outputs(
        self,
        history: UserEvents,
        candidates: Int64s,
        request_time_us: int,
        page: int = 0,
        cache: ScoreCache | None = None,
    ) -> Tensor:
        """(C, heads + regressions): `forward` at candidates of one request."""
        query = Queries.candidates(_candidate_ids(candidates), request_time_us, page)
        tokens = self.build([history], [query], cut=True)
        with self.inference():
            return self._with_biases(score_tokens(self, tokens, cache), tokens)

    def score_plain(
        self, history: UserEvents, candidates: Int64s, request_time_us: int, page: int = 0
    ) -> NDArray[np.float32]:
        """What `score` must give, by forwards over history and candidates together: the reference, slow."""
        with self.inference():
            parts = list(self._plain_blocks(history, _candidate_ids(candidates), request_time_us, page))
        return np.concatenate(parts)[:, : len(self.head_names)]

    def _plain_blocks(
        self, history: UserEvents, ids: Int64s, request_time_us: int, page: int
    ) -> Iterator[NDArray[np.float32]]:
        for first in range(0, len(ids), CANDIDATE_BLOCK):
            query = Queries.candidates(ids[first : first + CANDIDATE_BLOCK], request_time_us, page)
            yield torch.sigmoid(self(self.build([history], [query], cut=True))).numpy()

    def evaluate_batch(self, tokens: Tokens) -> dict[str, NDArray]:
        """Per target: probability and label [N, heads], log(1 + seconds) predicted [N, regressions], seconds watched,
        user id and index of the interaction."""
        outputs, heads = self(tokens), len(self.head_names)
        return {
            "probability": torch.sigmoid(outputs[:, :heads]).numpy(),
            "label": self.labels(tokens).numpy(),
            "value": outputs[:, heads:].numpy(),
            "seconds": tokens.watch.numpy(),
            "user_id": tokens.user[tokens.targets].numpy(),
            "interaction": tokens.source.numpy(),
        }

    def summarise(self, outputs: dict[str, NDArray]) -> dict[str, float]:
        """auc, ne, calibration and rate of every head ('auc_<head>', ...), rmse_log of watch time, and
        the number of impressions."""
        result = {"impressions": float(len(outputs["label"]))}
        for column, name in enumerate(self.head_names):
            label, probability = outputs["label"][:, column], outputs["probability"][:, column]
            result[f"auc_{name}"] = auc(label, probability)
            result[f"ne_{name}"] = normalised_entropy(label, probability)
            result[f"calibration_{name}"] = calibration(label, probability)
            result[f"rate_{name}"] = float(label.mean())
        for column, name in enumerate(self.regression_names):
            result |= _fit_of(name, outputs["value"][:, column], outputs["seconds"])
        return result


def _fit_of(name: str, predicted: NDArray[np.float32], seconds: NDArray[np.float32]) -> dict[str, float]:
    known = np.isfinite(seconds) & (seconds >= 0)
    difference = predicted[known] - np.log1p(seconds[known])
    error = float(np.sqrt(np.mean(difference**2))) if known.any() else float("nan")
    return {f"rmse_log_{name}": error}


def _candidate_ids(candidates: Int64s) -> Int64s:
    if np.ndim(candidates) != 1 or not len(candidates):
        raise BadInput("no candidates to score; give a one-dimensional list of item ids")
    return int64_ids(candidates, "candidates")
