"""The retriever: which items will this user act on positively."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from components.errors import BadInput
from components.schemas import action_mask
from model.catalogue import Int64s, ItemCatalogue, int64_ids
from model.dataset import SequenceDataset
from model.embedding import make_table
from model.heads import linear
from model.inputs import Queries, Tokens, UserEvents
from model.losses import sampled_cross_entropy
from model.metrics import hit_rate, ndcg, ranks_of
from model.requests import RequestDataset
from model.sequence_model import SequenceModel
from model.settings import ModelConfig, RetrieverConfig
from model.softmax import catalogue_cross_entropy
from model.table import Events

EPSILON = 1e-6
CUTS = (10, 50, 200)


class Retriever(SequenceModel):
    """HSTU over the history; a REQUEST row per request gives the user vector of that moment.

    Score = cosine(user vector, item vector). `items` is the catalogue that the softmax and retrieval run over.
    """

    config: RetrieverConfig
    items: Int64s

    def __init__(self, config: RetrieverConfig, catalogue: ItemCatalogue) -> None:
        super().__init__(config, catalogue, config.dim)
        self.positive = action_mask(config.positive_actions)
        sides = ("author", "category") if config.item_side else ()
        scale = max(config.init_scale, 1e-3)  # a zero vector has no direction
        self.outputs = nn.ModuleDict(
            {name: make_table(config, f"{name}_output", config.dim, init_scale=scale) for name in ("item", *sides)}
        )
        self.set_items(catalogue.item_id)

    def make_head(self, config: ModelConfig, outputs: int) -> nn.Module:
        """A linear map to the space of the items."""
        return linear(config.dim, outputs)

    def set_items(self, item_ids: Int64s) -> None:
        """Set the catalogue of the softmax and of retrieval, when no `allowed` is given: distinct int64 ids.

        Raises BadInput for ids that are no int64.
        """
        self.items = np.unique(int64_ids(item_ids, "items"))

    def examples(self, dataset: SequenceDataset) -> SequenceDataset:
        """Users, or (setting examples) the requests with a positive."""
        c = self.config
        rows = RequestDataset(dataset, c.reach(), self.positive) if c.per_request() else dataset.asking(self.positive)
        return rows.with_context(len(c.context_slots()))

    def item_vectors(self, item_ids: Int64s, events: Events | None = None) -> Tensor:
        """int64 [n] -> float32 [n, dim], of length one. events: the positives among them; None: there are none."""
        known = {"events": events or Events.none(len(item_ids))} if self.training else {}
        side = self.catalogue.features(item_ids)
        columns = {"item": item_ids, "author": side[:, 0], "category": side[:, 1]}
        parts = [table(torch.from_numpy(columns[name].copy()), **known) for name, table in self.outputs.items()]
        return F.normalize(torch.stack(parts).sum(0), dim=1, eps=EPSILON)

    def tokens(self, users: list[UserEvents]) -> Tokens:
        """One REQUEST row per request with a positive from new_from on; `labels` holds the row's first positive.

        A request with several positives gets one row for each: rows see nothing of each other. Nothing else is a
        target: no impression without a positive action, no action and no auxiliary value.
        """
        queries, positives, asked = [], [], []
        for user in users:
            wanted = np.flatnonzero((user.actions & self.positive) > 0)
            wanted = wanted[wanted >= user.new_from]
            if self.config.per_request() and not len(wanted):
                continue  # a request without a positive has no row, and so no moment to be relative to
            queries.append(Queries.requests(user.timestamp[wanted], user.page[wanted]))
            positives.append(user.item_id[wanted])
            asked.append(user)
        tokens = self.build(asked, queries, cut=self.config.per_request())
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
        vectors, wanted, asked = self(tokens), tokens.labels.numpy(), tokens.event_us[tokens.targets]
        if not len(wanted):
            return vectors.sum() * 0.0, 0
        items = np.union1d(self.items, wanted)
        if len(items) > self.config.full_softmax_limit:
            return self._sampled_loss(vectors, wanted, items, Events.at(asked)), len(wanted)
        place = torch.from_numpy(np.searchsorted(items, wanted))
        rows = self.item_vectors(items, Events.of_items(len(items), place, asked))
        return catalogue_cross_entropy(vectors, rows, place, self.config.temperature), len(wanted)

    def _sampled_loss(self, vectors: Tensor, wanted: Int64s, items: Int64s, events: Events) -> Tensor:
        random = np.random.default_rng(int(torch.randint(2**62, ())))  # seeded by the trainer, step by step
        count = min(self.config.negatives, len(items))
        drawn = random.choice(items, size=count, replace=False)
        hits = torch.from_numpy(drawn[None, :] == wanted[:, None])
        log_q = float(np.log(count / len(items)))
        return sampled_cross_entropy(
            vectors,
            self.item_vectors(wanted, events),
            self.item_vectors(drawn),
            hits,
            log_q,
            self.config.temperature,
        )

    def user_vector(self, history: UserEvents, request_time_us: int, page: int = 0) -> Tensor:
        """float32 [dim] of length one, from what is known before request_time_us."""
        query = Queries.requests(np.array([request_time_us]), np.array([page]))
        tokens = self.build([history], [query], cut=True)
        with self.inference():
            vector: Tensor = self(tokens)[0]
        return vector

    def retrieve(
        self,
        history: UserEvents,
        request_time_us: int,
        page: int = 0,
        k: int = 100,
        allowed: Int64s | None = None,
        exclude: Int64s | None = None,
        vectors: Callable[[Int64s], Tensor] | None = None,
    ) -> tuple[Int64s, NDArray[np.float32]]:
        """The k best items: ids [<= k] and cosines [<= k], best first, equal scores by ascending id.

        allowed: the items to choose from (None = `items`); exclude: ids never returned.
        vectors: `item_vectors` from where they are kept (None: they are made).
        Raises BadInput for k < 1, and for ids that are no int64.
        """
        if k < 1:
            raise BadInput(f"k must be at least 1, got {k}")
        ids = self.items if allowed is None else ascending(int64_ids(allowed, "allowed items"))
        if exclude is not None and len(exclude):
            ids = ids[~np.isin(ids, int64_ids(exclude, "excluded items"))]
        if not len(ids):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        with self.inference():
            scores = ((vectors or self.item_vectors)(ids) @ self.user_vector(history, request_time_us, page)).numpy()
        best = first_k(-scores, k)
        return ids[best], scores[best]

    def evaluate_batch(self, tokens: Tokens) -> dict[str, NDArray]:
        """Per positive: its 1-based rank among `items`, as `ranks_of` counts it."""
        wanted = tokens.labels.numpy()
        items = np.union1d(self.items, wanted)
        scores = self(tokens) @ self.item_vectors(items).T
        own = scores.gather(1, torch.from_numpy(np.searchsorted(items, wanted))[:, None]).squeeze(1)
        return {"rank": ranks_of(scores, own), "user_id": tokens.user[tokens.targets].numpy()}

    def summarise(self, outputs: dict[str, NDArray]) -> dict[str, float]:
        """requests (positives), hr_<k>, ndcg_<k> for k in 10, 50, 200."""
        ranks = outputs["rank"]
        result = {"requests": float(len(ranks))}
        for k in CUTS:
            result[f"hr_{k}"], result[f"ndcg_{k}"] = hit_rate(ranks, k), ndcg(ranks, k)
        return result


def ascending(ids: Int64s) -> Int64s:
    """The distinct ids, ascending; sorting a catalogue takes far longer than seeing that it is in order."""
    return ids if (ids[1:] > ids[:-1]).all() else np.unique(ids)


def first_k(values: NDArray[np.float32], k: int) -> Int64s:
    """np.argsort(values, kind="stable")[:k], without sorting what lies behind."""
    near = np.arange(len(values))
    if k < len(values):
        near = np.flatnonzero(~(values > np.partition(values, k - 1)[k - 1]))  # equal ones, too, and NaN
    return near[np.argsort(values[near], kind="stable")[:k]]
