"""Starting from the teacher: what is fitted to its attention; branches left out in training; the losses."""

import math

import pytest
import torch
from conftest import assert_close, run_unet
from torch import nn

from sd_hyena.config import OPERATORS
from sd_hyena.distill.capture import capture
from sd_hyena.distill.losses import Distance, variance
from sd_hyena.distill.students import Students, configure
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.nn.states import REACH, fit_weights, residual_products
from sd_hyena.targets import find_targets


def relative_error(student, teacher):
    """The definition, on one batch."""
    return (student - teacher).square().sum() / (teacher - teacher.mean((0, 1), keepdim=True)).square().sum()


@pytest.fixture
def captured(unet):
    targets = find_targets(unet)
    with capture(unet, list(targets.values())) as records:
        run_unet(unet, 12, 8)
    return unet, targets, dict(records)


def test_capture_sees_each_layers_input_output_and_grid(captured):
    unet, targets, records = captured
    assert sorted(records) == sorted(targets)
    for name, record in records.items():
        assert record.size == targets[name].grid((12, 8))
        assert record.x.shape == (2, record.size[0] * record.size[1], targets[name].dim)
        with torch.no_grad():
            assert_close(name, record.y, unet.get_submodule(targets[name].path)(record.x), 1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "causal"])
def test_start_is_near_the_teacher(captured, name):
    """With nearly flat attention, as random weights give, the start already does what the layer does."""
    unet, targets, records = captured
    target = targets["IN04"]
    attention, record = unet.get_submodule(target.path), records["IN04"]
    torch.manual_seed(0)
    operator = build(configure(target, (12, 8), unet, operator=name))
    random_error = relative_error(_run(operator, attention, record), record.y)
    operator.start_from(attention, [(record.x, record.size)])
    error = relative_error(_run(operator, attention, record), record.y)
    assert error < 0.2 * random_error


def _run(operator, attention, record):
    with torch.no_grad():
        return Students({"x": operator}, {"x": attention})({"x": record})["x"]


@pytest.mark.parametrize("name", ["states", "near", "linear"])
def test_a_core_operator_starts_where_the_full_one_does(captured, name):
    unet, targets, records = captured
    attention, record = unet.get_submodule(targets["IN04"].path), records["IN04"]
    outputs = []
    for form in ("full", "core"):
        operator = build(configure(targets["IN04"], (12, 8), unet, operator=name, form=form))
        operator.start_from(attention, [(record.x, record.size)])
        outputs.append(_run(operator, attention, record))
    assert_close("start", *outputs, 1e-4)


@pytest.fixture
def planted():
    """A layer of two heads whose softmax attention looks at its neighbours, and two batches that it saw: channels 0
    to 6 of a head make queries and keys alike that tell where a cell is, the values are noise."""
    torch.manual_seed(0)
    h = w = 16
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    waves = [f(a * 2 * math.pi / 16 * k) for a in (y, x) for k in (1, 2) for f in (torch.sin, torch.cos)]
    place = torch.stack(waves, -1).flatten(0, 1)  # L 8
    attention = nn.Module()
    attention.heads = 2
    attention.to_q, attention.to_k, attention.to_v = (nn.Linear(24, 16, bias=False) for _ in range(3))
    attention.to_out = nn.ModuleList([nn.Linear(16, 24), nn.Dropout(0.0)])
    attention.requires_grad_(False)
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.weight.zero_()
    for head in range(2):
        for layer in (attention.to_q, attention.to_k):
            layer.weight[8 * head : 8 * head + 8, :8] = (2.0 - 0.4 * head) * torch.eye(8)
    attention.to_v.weight[:, 8:] = torch.eye(16)
    batches = [torch.cat([place.expand(2, -1, -1), torch.randn(2, h * w, 16)], -1) for _ in range(3)]
    return attention, [(x, (h, w)) for x in batches]


def answer(attention, x):
    q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v))
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return attention.to_out[0](y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["full", "core"])
@pytest.mark.parametrize(
    ("choices", "ratio"),
    [
        ({}, 0.6),
        ({"operator": "near"}, 0.6),
        ({"block": 0}, 0.6),
        ({"near": 0}, 0.7),
        ({"near": 0, "block": 2}, 0.5),
    ],
    ids=str,
)
def test_records_bring_the_start_much_closer_to_local_attention(planted, choices, ratio, form):
    """On inputs that the start was not fitted to."""
    attention, records = planted
    x, size = records.pop()
    wanted, errors = answer(attention, x), []
    config = OperatorConfig(24, *size, inner_dim=16, attention_heads=2, form=form, **({"block": 4} | choices))
    for given in ([], records):
        torch.manual_seed(0)
        operator = build(config)
        operator.start_from(attention, given)
        with torch.no_grad():
            y = operator(x, size, operator.teacher_projections(attention))
        errors.append(relative_error(y, wanted).item())
    assert errors[1] < ratio * errors[0]


@pytest.mark.parametrize("form", ["full", "core"])
def test_a_start_from_a_teacher_in_half_precision(planted, form):
    attention, records = planted
    config = OperatorConfig(24, 16, 16, inner_dim=16, attention_heads=2, form=form, block=4)
    exact, rough = build(config), build(config)
    exact.start_from(attention, records)
    rough.start_from(attention.bfloat16(), [(x.bfloat16(), size) for x, size in records])
    assert {p.dtype for p in rough.parameters()} == {torch.float32}
    assert_close("near", exact.near.weight, rough.near.weight, 0.1)
    assert_close("blocks", exact.blocks.weight, rough.blocks.weight, 0.1)


def test_a_start_uses_no_more_than_the_teachers_projections_without_records(planted):
    attention, records = planted
    states, linear = (
        build(OperatorConfig(24, 16, 16, inner_dim=16, attention_heads=2, operator=name))
        for name in ("states", "linear")
    )
    for operator in (states, linear):
        operator.start_from(attention, [])
    with torch.no_grad():
        assert_close("start", linear(*records[0]), states(*records[0]), 1e-5)


def fitted(operator, x, size, ridge=1e-2):
    """The weights that fit what the operator's own heads say."""
    parts, _ = operator.project(x, None)
    said = operator.attend(parts, size)
    return fit_weights(*residual_products(parts, said, size, operator.block(size), "cubed_relu"), ridge)


@pytest.mark.parametrize("grid", [(16, 16), (40, 20)], ids=str)  # on the larger one, some blocks are far apart
@torch.no_grad()
def test_weights_stay_at_one_where_equal_weights_explain_everything(grid):
    torch.manual_seed(0)
    operator = build(OperatorConfig(24, *grid, attention_heads=2, near=0, block=4))
    weights = fitted(operator, torch.randn(4, grid[0] * grid[1], 24), grid)
    assert weights.shape == (2, (2 * REACH + 1) ** 2)
    assert weights.abs().max() < 0.02


@torch.no_grad()
def test_weights_are_fitted_to_what_they_made():
    """The answer of states that were mixed with known weights gives these weights back, up to their scale."""
    torch.manual_seed(0)
    size, heads = (16, 16), 2
    operator = build(OperatorConfig(24, *size, attention_heads=heads, near=0, block=4))
    wanted = 0.7 * torch.randn(heads, 2 * REACH + 1, 2 * REACH + 1)
    operator.blocks.weight.copy_(wanted)
    found = fitted(operator, torch.randn(8, 256, 24), size, 1e-6).view_as(wanted)
    wanted, found = (t - t[:, REACH, REACH][:, None, None] for t in (wanted, found))
    centre = slice(REACH - 1, REACH + 2)
    assert_close("weights", wanted[:, centre, centre], found[:, centre, centre], 0.1)


def test_branches_are_left_out_the_same_in_every_run_of_a_seed():
    operators = {name: build(OperatorConfig(8, 4, 4, attention_heads=2)) for name in ("IN01", "IN02")}
    operators["OUT03"] = build(OperatorConfig(8, 4, 4, attention_heads=2, operator="linear"))
    students = Students(operators, {})

    def left_out(share, seed, steps=range(200)):
        found = []
        for step in steps:
            students.leave_out(share, seed, step)
            found.append(tuple(operator.off for operator in operators.values()))
        return found

    drawn = left_out(0.5, 3)
    assert drawn == left_out(0.5, 3)
    assert drawn[70:] == left_out(0.5, 3, range(70, 200))  # a resumed run goes on with the same
    assert drawn != left_out(0.5, 4)
    first, second, linear = zip(*drawn, strict=True)
    assert first != second
    assert set(first) == {"", "near", "states", "global"}
    assert set(linear) == {""}  # it has no branch to be without
    assert 60 < sum(name != "" for name in first) < 140
    assert set(left_out(0.0, 3)) == {("", "", "")}


def test_relative_error_is_one_for_the_mean_and_scale_free():
    teacher = torch.randn(2, 9, 4) * 3 + 5
    mean = teacher.mean((0, 1), keepdim=True).expand_as(teacher)
    assert relative_error(teacher, teacher) == 0
    assert abs(relative_error(mean, teacher).item() - 1) < 1e-5
    student = teacher + torch.randn_like(teacher)
    torch.testing.assert_close(relative_error(student, teacher), relative_error(student * 100, teacher * 100))
    torch.testing.assert_close(relative_error(student, teacher).item(), 1 / variance(teacher), rtol=0.5, atol=0)


def test_distance_over_batches_equals_one_batch():
    teacher = torch.randn(6, 9, 4) * 3 + 5
    student = teacher + torch.randn_like(teacher)
    distance = Distance()
    for part in (slice(0, 1), slice(1, 6)):
        distance.add(student[part], teacher[part])
    figures = distance.figures()
    assert figures["relative_error"] == pytest.approx(relative_error(student, teacher).item(), rel=1e-4)
    expected = torch.nn.functional.cosine_similarity(student.flatten(), teacher.flatten(), dim=0).item()
    assert figures["cosine"] == pytest.approx(expected, rel=1e-4)
