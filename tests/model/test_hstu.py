"""HSTU layers and the encoder against the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from components.errors import BadInput
from model.attention import causal
from model.hstu import Hstu, HstuConfig, HstuLayer
from tests.model.golden import assert_near, load

LAYERS = ["hstu_layer_one_head", "hstu_layer_two_heads", "hstu_layer_concat_ua"]


def next_times(timestamps: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published code compares the time of the next row with the time of each seen row; rows are jagged here."""
    shifted = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], dim=1)
    inside = torch.arange(timestamps.shape[1]) < lengths[:, None]
    return shifted[inside], timestamps[inside]


def set_weights(layer: HstuLayer, uvqk, out, out_bias, time, position) -> None:  # type: ignore[no-untyped-def]
    count = (len(position) + 1) // 2
    assert layer.time_weights is not None and layer.position_weights is not None
    with torch.no_grad():
        layer.uvqk.copy_(torch.from_numpy(uvqk))
        layer.out.weight.copy_(torch.from_numpy(out))
        layer.out.bias.copy_(torch.from_numpy(out_bias))
        layer.time_weights.copy_(torch.from_numpy(time))
        layer.position_weights.copy_(torch.from_numpy(position).flip(0)[count - 1 :])  # index j - i + N - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_all_its_gradients_equal_the_published_code(name: str, dtype: torch.dtype) -> None:
    data = load(name)
    length = int(data["max_length"])
    config = HstuConfig(
        dim=data["x"].shape[1], layers=1, heads=int(data["num_heads"]), dqk=int(data["dqk"]), dv=int(data["dv"]),
        normaliser=length, positions=length, dropout=0.0, gate="concat" if data["concat_ua"] else "product",
    )  # fmt: skip
    layer = HstuLayer(config).to(dtype)
    set_weights(layer, *(data[key] for key in ("w_uvqk", "w_out", "b_out", "w_time", "w_pos")))
    lengths = torch.from_numpy(data["lengths"]).long()
    query, key = next_times(torch.from_numpy(data["timestamps"]), lengths)
    x = torch.from_numpy(data["x"]).to(dtype).requires_grad_()
    y = layer(x, causal(lengths), (query, key, query - key))
    y.backward(torch.from_numpy(data["grad_y"]).to(dtype))
    assert_near(y, data["y"], "y")
    assert layer.time_weights is not None and layer.position_weights is not None
    assert_near(x.grad, data["grad_x"], "grad_x")
    for parameter, golden in (
        (layer.uvqk, "grad_w_uvqk"), (layer.out.weight, "grad_w_out"), (layer.out.bias, "grad_b_out"),
        (layer.time_weights, "grad_w_time"),
    ):  # fmt: skip
        assert_near(parameter.grad, data[golden], golden)
    visible = torch.from_numpy(data["grad_w_pos"]).flip(0)[length - 1 :]
    assert_near(layer.position_weights.grad, visible.numpy(), "grad_w_pos")
    assert (data["grad_w_pos"][length:] == 0).all()  # the other half of the published table is never seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_layers_equal_the_published_retrieval_encoder(dtype: torch.dtype) -> None:
    data = load("hstu_encoder_retrieval")
    items, times = torch.from_numpy(data["item_ids"]), torch.from_numpy(data["timestamps"])
    count, dim = times.shape[1], data["outputs"].shape[2]
    config = HstuConfig(
        dim=dim, layers=int(data["num_blocks"]), heads=int(data["num_heads"]), dqk=int(data["dqk"]),
        dv=int(data["dqk"]), normaliser=count, positions=count, dropout=0.0,
    )  # fmt: skip
    stack = Hstu(config).to(dtype)
    for index, layer in enumerate(stack.layers):
        assert isinstance(layer, HstuLayer)
        prefix = f"param:_hstu._attention_layers.{index}."
        names = ("_uvqk", "_o.weight", "_o.bias", "_rel_attn_bias._ts_w", "_rel_attn_bias._pos_w")
        set_weights(layer, *(data[prefix + name] for name in names))
    table = torch.from_numpy(data["param:_embedding_module._item_emb.weight"]).to(dtype)
    position = torch.from_numpy(data["param:_input_features_preproc._pos_emb.weight"]).to(dtype)
    lengths = torch.from_numpy(data["lengths"]).long()
    inside = torch.arange(count) < lengths[:, None]
    x = (table[items] * dim**0.5 + position)[inside]
    query, key = next_times(times, lengths)
    y = stack(x, causal(lengths), query, key, query - key)
    user = F.normalize(y[lengths.cumsum(0) - 1], dim=1, eps=1e-6)
    assert_near(user, data["user_embedding"], "user embedding")


def test_the_production_flavour_trains_every_parameter() -> None:
    torch.manual_seed(0)
    config = HstuConfig(
        dim=8, layers=2, heads=2, dqk=4, dv=4, silu_all=False, scale_scores=True, affine_norm=True, uvqk_bias=True,
        gate="concat_raw", dropout=0.0, out_bias=False,
    )  # fmt: skip
    stack = Hstu(config)
    times = torch.arange(9) * 60
    stack(torch.randn(9, 8), causal(torch.tensor([4, 5])), times, times).square().sum().backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("gaps", [False, True], ids=["no gap to itself", "gaps to themselves"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_rows_alone_are_those_of_the_whole_and_so_are_the_gradients(layers: int, gaps: bool) -> None:
    torch.manual_seed(0)
    stack = Hstu(HstuConfig(dim=6, layers=layers, heads=2, dqk=3, dv=5, positions=4, dropout=0.0)).double()
    lengths, counts = torch.tensor([4, 0, 7, 2]), torch.tensor([1, 0, 3, 2])
    seen, times = causal(lengths, num_targets=counts), torch.arange(13) * 50
    keep = torch.tensor([3, 8, 9, 10, 11, 12])
    results = []
    for last in (None, counts):
        x = torch.linspace(-1, 1, 13 * 6, dtype=torch.float64).view(13, 6).sin().requires_grad_()
        stack.zero_grad()
        y = stack(x, seen, times, times, 70 * torch.arange(13) if gaps else None, last=last)
        y = y[keep] if last is None else y
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in stack.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_padded_sequences_are_refused_by_their_shape() -> None:
    times = torch.arange(6)
    with pytest.raises(BadInput, match=r"got \(2, 3, 8\) and \(8, 128\); sequences are jagged"):
        Hstu(HstuConfig(dim=8))(torch.zeros(2, 3, 8), causal(torch.tensor([3, 3])), times, times)
