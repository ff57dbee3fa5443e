"""The retriever: which items will this user act on positively."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from components.errors import BadInput
from components.schemas import action_mask
from model.catalogue import Int64s, ItemCatalogue
from model.embedding import make_table
from model.inputs import Queries, Tokens, UserEvents, build_tokens
from model.metrics import hit_rate, ndcg
from model.sequence_model import SequenceModel
from model.settings import ModelConfig

EPSILON = 1e-6
CUTS = (10, 50, 200)


class RetrieverConfig(ModelConfig):
    """Settings of the retriever."""

    positive_actions: str = Field(
        default="click,long_view,like,rating", description="An item with any of these is a positive"
    )
    temperature: float = Field(default=0.07, gt=0, le=10, description="Divides the cosine in the softmax")
    item_side: bool = Field(default=True, description="Add author and category to the item's output embedding")
    full_softmax_limit: int = Field(default=20_000, ge=1, description="Largest catalogue with an exact softmax")
    negatives: int = Field(default=2_048, ge=1, description="Sampled items per batch beyond that, corrected by log q")


class Retriever(SequenceModel):
    """HSTU over the history; a REQUEST row per request gives the user vector of that moment.

    Score = cosine(user vector, item vector). `items` is the catalogue that the softmax and retrieval run over.
    """

    config: RetrieverConfig
    items: Int64s

    def __init__(self, config: RetrieverConfig, catalogue: ItemCatalogue) -> None:
        super().__init__(config, catalogue, config.dim)
        self.config = config
        self.positive = action_mask(config.positive_actions)
        sides = ("author", "category") if config.item_side else ()
        scale = max(config.init_scale, 1e-3)  # a zero vector has no direction
        self.outputs = nn.ModuleDict(
            {name: make_table(config, f"{name}_output", config.dim, init_scale=scale) for name in ("item", *sides)}
        )
        self.set_items(catalogue.item_id)

    def set_items(self, item_ids: Int64s) -> None:
        """Set the catalogue of the softmax and of retrieval, when no `allowed` is given: distinct int64 ids."""
        self.items = np.unique(np.asarray(item_ids, dtype=np.int64))

    def item_vectors(self, item_ids: Int64s) -> Tensor:
        """int64 [n] -> float32 [n, dim], of length one."""
        side = self.catalogue.features(item_ids)
        columns = {"item": item_ids, "author": side[:, 0], "category": side[:, 1]}
        parts = [table(torch.from_numpy(columns[name].copy())) for name, table in self.outputs.items()]
        return F.normalize(torch.stack(parts).sum(0), dim=1, eps=EPSILON)

    def tokens(self, users: list[UserEvents]) -> Tokens:
        """One REQUEST row per request with a positive from new_from on; `labels` holds the row's first positive.

        A request with several positives gets one row for each: rows see nothing of each other.
        """
        queries, positives = [], []
        for user in users:
            wanted = np.flatnonzero((user.actions & self.positive) > 0)
            wanted = wanted[wanted >= user.new_from]
            queries.append(Queries.requests(user.timestamp[wanted], user.page[wanted]))
            positives.append(user.item_id[wanted])
        c = self.config
        tokens = build_tokens(users, queries, window=c.window, catalogue=self.catalogue, use_aux=c.use_aux)
        tokens.labels = torch.from_numpy(np.concatenate(positives) if positives else np.zeros(0, np.int64))
        return tokens

    def forward(self, tokens: Tokens) -> Tensor:
        """(T,) tokens -> (N, dim) user vectors of length one, at the REQUEST rows."""
        return F.normalize(self.encode(tokens), dim=1, eps=EPSILON)

    def loss(self, tokens: Tokens) -> tuple[Tensor, int]:
        """Mean cross-entropy of the positive item, and the number of positives.

        Full softmax up to `full_softmax_limit` items. Beyond it the positive and uniformly sampled other items, each of
        their logits minus the log of its chance to be drawn, so that the denominator estimates the full one.
        """
        vectors, wanted = self(tokens), tokens.labels.numpy()
        if not len(wanted):
            return vectors.sum() * 0.0, 0
        items = np.union1d(self.items, wanted)
        if len(items) <= self.config.full_softmax_limit:
            logits = vectors @ self.item_vectors(items).T / self.config.temperature
            return F.cross_entropy(logits, torch.from_numpy(np.searchsorted(items, wanted))), len(wanted)
        return self._sampled_loss(vectors, wanted, items), len(wanted)

    def _sampled_loss(self, vectors: Tensor, wanted: Int64s, items: Int64s) -> Tensor:
        random = np.random.default_rng([self.config.seed, len(wanted), int(wanted[0] & 0xFFFFFFFF)])
        count = min(self.config.negatives, len(items))
        drawn = random.choice(items, size=count, replace=False)
        temperature = self.config.temperature
        positive = (vectors * self.item_vectors(wanted)).sum(1, keepdim=True) / temperature
        negative = vectors @ self.item_vectors(drawn).T / temperature - float(np.log(count / len(items)))
        same = torch.from_numpy(drawn[None, :] == wanted[:, None])
        logits = torch.cat([positive, negative.masked_fill(same, float("-inf"))], dim=1)
        return F.cross_entropy(logits, torch.zeros(len(wanted), dtype=torch.int64))

    @torch.no_grad()
    def user_vector(self, history: UserEvents, request_time_us: int, page: int = 0) -> Tensor:
        """float32 [dim] of length one, from what is known before request_time_us."""
        self.eval()
        c = self.config
        query = Queries.requests(np.array([request_time_us]), np.array([page]))
        tokens = build_tokens(
            [history], [query], window=c.window, catalogue=self.catalogue, use_aux=c.use_aux, layers=c.layers
        )
        return self(tokens)[0]

    @torch.no_grad()
    def retrieve(
        self,
        history: UserEvents,
        request_time_us: int,
        page: int = 0,
        k: int = 100,
        allowed: Int64s | None = None,
        exclude: Int64s | None = None,
    ) -> tuple[Int64s, NDArray[np.float32]]:
        """The k best items: ids [<= k] and cosines [<= k], best first, equal scores by ascending id.

        allowed: the items to choose from (None = `items`); exclude: ids never returned. Raises BadInput for k < 1.
        """
        if k < 1:
            raise BadInput(f"k must be at least 1, got {k}")
        ids = self.items if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
        if exclude is not None and len(exclude):
            ids = np.setdiff1d(ids, np.asarray(exclude, dtype=np.int64), assume_unique=False)
        if not len(ids):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        vector = self.user_vector(history, request_time_us, page)
        scores = (self.item_vectors(ids) @ vector).numpy()
        best = np.argsort(-scores, kind="stable")[:k]
        return ids[best], scores[best]

    def evaluate_batch(self, tokens: Tokens) -> dict[str, NDArray]:
        """Per positive: its 1-based rank among `items`, equal scores counting against it."""
        wanted = tokens.labels.numpy()
        items = np.union1d(self.items, wanted)
        scores = self(tokens) @ self.item_vectors(items).T
        own = scores.gather(1, torch.from_numpy(np.searchsorted(items, wanted))[:, None])
        return {"rank": (scores >= own).sum(1).numpy(), "user_id": tokens.user[tokens.targets].numpy()}

    def summarise(self, outputs: dict[str, NDArray]) -> dict[str, float]:
        """requests (positives), hr@k, ndcg@k for k in 10, 50, 200."""
        ranks = outputs["rank"]
        result = {"requests": float(len(ranks))}
        for k in CUTS:
            result[f"hr@{k}"], result[f"ndcg@{k}"] = hit_rate(ranks, k), ndcg(ranks, k)
        return result
