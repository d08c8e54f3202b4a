"""The planted bed: what it teaches from is what it says, its own operators keep to their definition, and it runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import planted

    return planted


@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (1, 5)])
@pytest.mark.parametrize("choices", [{"block": 4}, {"block": 4, "near": 3}, {"near": 5}, {"block": 3, "reach": 1}])
def test_near_and_states_by_definition(planted, grid, choices):
    torch.manual_seed(0)
    operator = planted.NearAndStates(12, 2, **choices).double()
    for parameter in operator.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    h, w = grid
    cells = torch.arange(h * w)
    y, x = cells // w, cells % w
    tokens = torch.randn(2, h * w, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in operator.in_proj(tokens).chunk(3, -1))
    fq, fk = (
        (t @ f.weight.transpose(1, 2) + f.bias.transpose(1, 2)).exp()
        for t, f in ((q, operator.query), (k, operator.key))
    )
    weights = fq @ fk.transpose(-1, -2)
    if operator.block:
        reach = operator.reach
        down, across = (a // operator.block for a in (y, x))
        down, across = down[:, None] - down, across[:, None] - across
        near = (down.abs() <= reach) & (across.abs() <= reach)
        learned = operator.block_weight[:, down.clamp(-reach, reach) + reach, across.clamp(-reach, reach) + reach]
        weights = weights * torch.where(near, learned.exp(), 1.0)
    mixed = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    if hasattr(operator, "near"):
        edge = operator.near.shape[-1] // 2
        values = v.transpose(1, 2).flatten(2)
        down, across = y[None] - y[:, None], x[None] - x[:, None]
        inside = (down.abs() <= edge) & (across.abs() <= edge)
        taps = operator.near[:, 0, down.clamp(-edge, edge) + edge, across.clamp(-edge, edge) + edge] * inside
        mixed = mixed + torch.einsum("dij,bjd->bid", taps, values)
    expected, got = operator.out_proj(mixed), operator(tokens, grid)
    assert_close("forward", expected, got, 1e-10)
    cotangent = torch.randn_like(got)
    wanted = [p for name, p in operator.named_parameters()] + [tokens]
    gradients = [torch.autograd.grad(value, wanted, cotangent, retain_graph=True) for value in (expected, got)]
    for one, other in zip(*gradients, strict=True):
        if one.abs().max() > 1e-9:  # of a bias that cancels nothing is left but rounding
            assert_close("gradient", one, other, 1e-8)


def test_without_a_branch_it_is_the_rest(planted):
    torch.manual_seed(0)
    full, linear = planted.NearAndStates(8, 2, near=3, block=4), planted.NearAndStates(8, 2)
    full.near.data.normal_()
    full.block_weight.data.normal_()
    linear.load_state_dict({name: full.state_dict()[name] for name in linear.state_dict()})
    x = torch.randn(1, 35, 8)
    full.off = "near"
    without_near = full(x, (5, 7))
    full.block_weight.data.zero_()
    assert_close("no weights", linear(x, (5, 7)), full(x, (5, 7)), 1e-5)
    assert (without_near - linear(x, (5, 7))).abs().max() > 1e-3
    rival = planted.SoftmaxInBlocks(8, 2)
    x = torch.randn(1, 16 * 8, 8)
    alone = rival(x.view(1, 16, 8, 8)[:, 8:].reshape(1, 64, 8), (8, 8))
    rival.off = "global"
    blocks = rival(x, (16, 8))[:, 64:]
    assert_close("a block", rival(x[:, 64:], (8, 8)), blocks, 1e-5)  # nothing of the other block
    assert (alone - blocks).abs().max() > 1e-3


def test_branches_of_hyena2d(planted):
    torch.manual_seed(0)
    make = {student.name: student.make for student in planted.STUDENTS}
    operator, x = make["hyena2d (default)"](), torch.randn(1, 1024, 64)
    operator.bias.weight.data.fill_(0.5)
    rest = dict(planted.without_each_branch(operator))
    with torch.no_grad():
        outputs = [rest[name](x, (32, 32)) for name in ("global", "long")]
        whole, none = operator(x, (32, 32)), operator.out_proj.bias
        assert_close("sum of the branches", whole, outputs[0] + outputs[1] - none, 1e-4)
    assert (outputs[0] - whole).abs().max() > 1e-3 < (outputs[1] - whole).abs().max()
    assert not list(planted.without_each_branch(make["linear"]()))


def test_the_teacher_is_softmax_attention_with_its_bias(planted):
    bed = planted.Bed("mixed", 0)
    a, x = bed.attention, bed.x[:1]
    q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (a.to_q, a.to_k, a.to_v))
    cells = torch.arange(32 * 32)
    squared = (cells // 32 - (cells // 32)[:, None]) ** 2 + (cells % 32 - (cells % 32)[:, None]) ** 2
    for head, sigma in enumerate((2, 5, math.inf, math.inf)):
        weights = (q[:, head] @ k[:, head].transpose(1, 2) / 4 - squared / (2 * sigma**2)).softmax(-1)
        expected = a.to_out[0].weight[:, 16 * head : 16 * head + 16] @ (weights @ v[:, head]).transpose(1, 2)
        bed.y[:1] -= expected.transpose(1, 2)
    assert bed.y[0].abs().max() < 1e-4
    facts = bed.facts()
    assert 0.3 < facts["mass_7"] < 0.6  # half of the heads look everywhere
    assert 0.5 < facts["entropy"] < 0.95


def test_it_runs_goes_on_and_refuses_unknown_students(tmp_path):
    stem = tmp_path / "p"
    command = [sys.executable, str(BENCHMARKS / "planted.py"), "--out", str(stem), "--teachers", "mixed"]
    command += ["--seeds", "1", "--steps", "12", "--seconds", "0.2", "--students"]
    subprocess.run([*command, "linear"], check=True, capture_output=True)
    first = json.loads(stem.with_suffix(".json").read_text())["rows"]
    done = subprocess.run([*command, "linear;near 3 + states 4"], check=True, capture_output=True, text=True)
    assert done.stdout.count("mixed/0/") == 1  # what was there is not measured again
    rows = json.loads(stem.with_suffix(".json").read_text())["rows"]
    assert rows["mixed/0/linear"] == first["mixed/0/linear"]
    hybrid = rows["mixed/0/near 3 + states 4"]
    assert set(hybrid["without"]) == {"near", "states", "global"}
    assert hybrid["steps"] < rows["mixed/0/linear"]["steps"] < hybrid["start"]
    assert "| near 3 + states 4 |" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").stat().st_size > 10_000
    failed = subprocess.run([*command, "flash"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "no student 'flash'" in failed.stderr
