"""What is said of an attention layer, against attention whose character is known, and by definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sd_hyena.anatomy import heads
from sd_hyena.anatomy.heads import ORACLES, WINDOWS, Layer


class Attention(nn.Module):
    """diffusers' names, two heads of 6 channels."""

    def __init__(self, dim=12):
        super().__init__()
        self.heads, self.scale = 2, (dim // 2) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def matrices(self, x):
        """(B, heads, L, L), and the values (B, heads, L, d)."""
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        return (q @ k.transpose(-1, -2) * self.scale).softmax(-1), v


def examined(attention, x, size, rank=16):
    layer = Layer(attention.heads, size, rank)
    layer.add(attention, x)
    return layer, layer.figures()


@pytest.mark.parametrize("size", [(7, 9), (4, 13), (5, 5)])
def test_uniform_attention_is_flat(size):
    torch.manual_seed(0)
    attention = Attention()
    nn.init.zeros_(attention.to_q.weight)
    _, found = examined(attention, torch.randn(2, size[0] * size[1], 12), size)
    for head in found["heads"]:
        assert head["entropy"] == pytest.approx(1)
        assert head["stable_rank"] == pytest.approx(1, abs=1e-4)
        for window in WINDOWS:
            assert head[f"mass_{window}"] == pytest.approx(head[f"uniform_{window}"])
    assert found["heads"][0]["uniform_13"] == 1 if max(size) <= 7 else found["heads"][0]["uniform_13"] < 1


def positions(size, sharpness):
    """Tokens whose products q . k fall off with distance: attention within a few cells of each."""
    h, w = size
    y, x = (a.flatten() for a in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    waves = [f(a * math.pi / 16) for a in (y, x) for f in (torch.cos, torch.sin)]
    return torch.stack(waves, -1) * sharpness


def local_attention(size):
    """A layer whose first head looks around itself, the second everywhere, and tokens for it."""
    torch.manual_seed(1)
    attention, cells = Attention(), size[0] * size[1]
    x = torch.cat([positions(size, 8.0).expand(3, -1, -1), torch.randn(3, cells, 8)], -1)
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data.zero_()
        layer.weight.data[:4, :4] = torch.eye(4)
    attention.to_v.weight.data[:, :4] = 0  # what is gathered does not depend on the place
    return attention, x


def test_local_attention_needs_its_window_and_displacement_explains_it():
    attention, x = local_attention((16, 16))
    _, found = examined(attention, x, (16, 16), rank=4)
    near, far = found["heads"]
    assert near["mass_7"] > 0.95 > 0.2 > far["mass_7"]
    assert near["entropy"] < 0.6 < 0.99 < far["entropy"]
    assert near["stable_rank"] > 10 > 1.01 > far["stable_rank"]
    assert near["errors"]["rank"] > 0.3
    assert near["errors"]["window+rank"] < 0.01
    assert near["errors"]["displacement"] < 0.01


@pytest.mark.parametrize("size", [(5, 7), (8, 3), (11, 11)])
def test_every_figure_by_its_definition(size):
    torch.manual_seed(2)
    h, w = size
    attention, x, rank = Attention(), 3 * torch.randn(2, h * w, 12), 3
    layer, found = examined(attention, x, size, rank)
    a, v = (t.double() for t in attention.matrices(x))
    y, c = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    inside = torch.maximum((y[:, None] - y).abs(), (c[:, None] - c).abs()) <= 3
    displacement = torch.zeros_like(a[0])
    for dy in range(-h + 1, h):
        for dx in range(-w + 1, w):
            pairs = (y - y[:, None] == dy) & (c - c[:, None] == dx)
            mean = a[:, :, pairs].mean((0, 2))
            displacement[:, pairs] = mean[:, None]
            picture = layer.displacement[:, dy + h - 1, dx + w - 1]
            assert torch.allclose(picture.double(), mean, rtol=1e-5, atol=1e-9)
    near = a * inside

    def best(matrix):
        u, s, vh = torch.linalg.svd(matrix)
        return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]

    kept = {
        "window": near / near.sum(-1, keepdim=True),
        "rank": best(a),
        "window+rank": near + best(a - near),
        "displacement": (displacement / displacement.sum(-1, keepdim=True)).expand_as(a),
    }
    weight = attention.to_out[0].weight.double().unflatten(1, (2, -1)).permute(1, 2, 0)
    true = a @ v @ weight
    for name in ORACLES:
        got = kept[name] @ v @ weight
        for output, target, measured in [
            (got.sum(1), true.sum(1), found["errors"][name]),
            *((got[:, i], true[:, i], found["heads"][i]["errors"][name]) for i in range(2)),
        ]:
            expected = (output - target).square().sum() / (target - target.mean((0, 1))).square().sum()
            assert measured == pytest.approx(expected.item(), rel=0.02, abs=1e-6), name
    for i in range(2):
        head = found["heads"][i]
        entropy = -(a[:, i] * a[:, i].log()).sum(-1).mean() / math.log(h * w)
        assert head["entropy"] == pytest.approx(entropy.item(), rel=1e-4)
        assert head["mass_7"] == pytest.approx(near[:, i].sum(-1).mean().item(), rel=1e-4)
        stable = a[:, i].square().sum((1, 2)) / torch.linalg.matrix_norm(a[:, i], 2).square()
        assert head["stable_rank"] == pytest.approx(stable.mean().item(), rel=0.03)


def test_large_grids_are_looked_at_from_some_queries(monkeypatch):
    attention, x = local_attention((16, 16))
    _, whole = examined(attention, x, (16, 16), rank=4)
    monkeypatch.setattr(heads, "ENTRIES", 256 * 96)
    layer, part = examined(attention, x, (16, 16), rank=4)
    assert len(layer.queries) == 96
    for i in range(2):
        for name in ("entropy", "mass_7", "uniform_7"):
            assert part["heads"][i][name] == pytest.approx(whole["heads"][i][name], rel=0.1)
    assert part["heads"][0]["errors"]["rank"] > 0.1 > part["heads"][0]["errors"]["window+rank"]


def test_a_lora_on_its_projections_counts():
    class Lora(nn.Linear):
        def forward(self, x):
            return super().forward(x) + F.linear(F.linear(x, self.down), self.up)

    attention, x = local_attention((6, 7))
    _, before = examined(attention, x, (6, 7))
    merged = {}
    for name in ("to_q", "to_k", "to_v"):
        base = getattr(attention, name)
        wrapped = Lora(12, 12, bias=False)
        wrapped.weight, wrapped.down, wrapped.up = base.weight, torch.randn(2, 12) / 3, torch.randn(12, 2) / 3
        merged[name] = wrapped
        setattr(attention, name, wrapped)
    out = attention.to_out[0]
    wrapped = Lora(12, 12)
    wrapped.weight, wrapped.bias, wrapped.down, wrapped.up = (
        out.weight,
        out.bias,
        torch.randn(2, 12),
        torch.randn(12, 2),
    )
    attention.to_out[0] = wrapped
    _, live = examined(attention, x, (6, 7))
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight = nn.Parameter(layer.weight + layer.up @ layer.down)
        layer.up.zero_()
    _, folded = examined(attention, x, (6, 7))
    assert live["errors"]["window"] == pytest.approx(folded["errors"]["window"], rel=1e-4)
    assert live["errors"]["window"] != pytest.approx(before["errors"]["window"], rel=0.05)
