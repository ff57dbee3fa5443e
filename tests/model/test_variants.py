"""The two published networks behind one config, and the ablations."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from model.attention import causal
from model.encoding import age_bucket
from model.hstu import HstuConfig, HstuLayer
from model.ranker import Ranker
from model.settings import ModelConfig, RankerConfig
from model.table import OPTIMIZERS
from model.trainer import Trainer
from tests.model.make import catalogue, user


def test_the_research_variant_is_the_papers_network() -> None:
    c = ModelConfig().hstu()
    assert c.silu_all and c.gate == "product" and c.positions == 128 and c.time_bias and c.out_bias
    assert not (c.scale_scores or c.affine_norm or c.uvqk_bias or c.softmax)
    settings = ModelConfig()
    assert not (settings.encodes_position() or settings.encodes_time() or settings.per_request())


def test_the_production_variant_is_the_published_production_network() -> None:
    settings = ModelConfig(variant="production")
    c = settings.hstu()
    assert not c.silu_all and c.gate == "concat_raw" and c.positions == 0 and not c.time_bias and not c.out_bias
    assert c.scale_scores and c.affine_norm and c.uvqk_bias
    assert settings.encodes_position() and settings.encodes_time() and settings.per_request()


@pytest.mark.parametrize(
    ("switch", "value", "expected"),
    [
        ("silu", "gate", {"silu_all": False}),
        ("gate", "concat", {"gate": "concat_raw"}),
        ("learned_norms", "on", {"affine_norm": True}),
        ("scale_scores", "on", {"scale_scores": True}),
        ("projection_bias", "on", {"uvqk_bias": True}),
        ("relative_bias", "none", {"positions": 0, "time_bias": False}),
        ("relative_bias", "position", {"time_bias": False}),
        ("relative_bias", "time", {"positions": 0}),
        ("softmax", True, {"softmax": True}),
    ],
)
def test_a_switch_changes_its_part_of_the_network_alone(switch: str, value: object, expected: dict) -> None:
    plain = ModelConfig().hstu().model_dump()
    changed = ModelConfig(**{switch: value}).hstu().model_dump()
    assert {key for key in plain if plain[key] != changed[key]} == set(expected)
    assert {key: changed[key] for key in expected} == expected
    Ranker(RankerConfig(dim=8, head_dim=4, **{switch: value}), catalogue())


def test_the_production_layer_is_its_formula() -> None:
    torch.manual_seed(3)
    n, dim, heads, d = 6, 8, 2, 4
    config = HstuConfig(
        dim=dim, layers=1, heads=heads, dqk=d, dv=d, normaliser=10.0, positions=0, time_bias=False, dropout=0.0,
        gate="concat_raw", silu_all=False, scale_scores=True, affine_norm=True, uvqk_bias=True, out_bias=False,
    )  # fmt: skip
    layer = HstuLayer(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    x, times = torch.randn(n, dim, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    normed = F.layer_norm(x, (dim,), layer.norm_in.weight, layer.norm_in.bias, 1e-6)
    assert layer.uvqk_bias is not None
    u, v, q, k = (normed @ layer.uvqk + layer.uvqk_bias).split(heads * d, dim=1)
    split = (part.view(n, heads, d).transpose(0, 1) for part in (q, k, v))
    q, k, v = split
    weight = F.silu(q @ k.transpose(1, 2) / d**0.5) / 10.0 * torch.ones(n, n, dtype=torch.float64).tril()
    a = (weight @ v).transpose(0, 1).reshape(n, heads * d)
    gate = F.silu(u)
    gated = gate * F.layer_norm(a, (heads * d,), layer.norm_attention.weight, layer.norm_attention.bias, 1e-6)
    expected = x + torch.cat([gate, a, gated], 1) @ layer.out.weight.T
    got = layer(x, causal(torch.tensor([n])), (times, times, None))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_softmax_ablation_attends_with_weights_that_sum_to_one() -> None:
    config = HstuConfig(dim=4, layers=1, heads=1, dqk=4, dv=4, positions=0, time_bias=False, softmax=True)
    layer = HstuLayer(config)
    q, k, times = torch.randn(5, 1, 4), torch.randn(5, 1, 4), torch.zeros(5, dtype=torch.int64)
    a = layer.attend(q, k, torch.ones(5, 1, 4), causal(torch.tensor([5])), (times, times, None))
    torch.testing.assert_close(a, torch.ones(5, 4))


@pytest.mark.parametrize("seconds,bucket", [(-5, 0), (0, 0), (59, 0), (60, 1), (239, 1), (240, 2), (10**15, 2048)])
def test_the_age_of_a_token_falls_into_square_root_buckets(seconds: int, bucket: int) -> None:
    assert age_bucket(torch.tensor([seconds])).tolist() == [bucket]


def test_age_buckets_are_exact_at_every_boundary() -> None:
    edges = torch.arange(1, 2049) ** 2 * 60
    assert torch.equal(age_bucket(edges), torch.arange(1, 2049))
    assert torch.equal(age_bucket(edges - 1), torch.arange(0, 2048))


@pytest.mark.parametrize("variant", ["research", "production"])
def test_every_dense_parameter_of_a_variant_is_trained(variant: str) -> None:
    config = RankerConfig(
        variant=variant, heads="click", dim=8, head_dim=4, window=9, dropout=0.0, input_dropout=0.0, context="user",
        positions=10, use_aux=True, regression="watch", task_head="mmoe",
    )  # fmt: skip
    model = Ranker(config, catalogue())
    trainer = Trainer(model)
    from model.dataset import SequenceDataset
    from tests.model.make import table

    data = model.examples(SequenceDataset(table([user(i, 12, 9) for i in range(5)])))
    model.loss(model.tokens(data.users(range(len(data)))))[0].backward()
    for name, parameter in trainer.parameters.items():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stochastic_alpha": 1.5}, "max_interactions"),
        ({"input_time": "on"}, "examples=request"),
        ({"variant": "production", "examples": "sequence"}, "examples=request"),
        ({"generative_sampling": True}, "examples=request"),
        ({"context": "user,colour"}, "unknown context slots colour"),
        ({"context": "page"}, "examples=request"),
        ({"context": "user,user"}, "context names user twice"),
        ({"slots": "item, author,item"}, "slots names item twice"),
        ({"table_optimizer": "adagrd"}, "'sgd', 'adagrad', 'rowwise_adagrad', 'adam' or 'ftrl'"),
        ({"context": "user", "positions": 64, "window": 10}, "positions <= window"),
    ],
)
def test_settings_that_do_not_fit_together_say_what_to_change(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**settings)


def test_every_row_optimiser_of_the_tables_is_a_setting() -> None:
    assert get_args(ModelConfig.model_fields["table_optimizer"].annotation) == OPTIMIZERS
