"""Stage 2: the students in the UNet, the losses they share, what weighs what; and the reuse of teacher passes."""

import pytest
import torch
from conftest import assert_close, run_unet
from torch import nn

from sd_hyena.distill.joint import JointStage, StudentUNet
from sd_hyena.distill.lessons import Reuse
from sd_hyena.distill.optimisation import make_optimizer
from sd_hyena.distill.settings import TrainSettings
from sd_hyena.distill.state import Average
from sd_hyena.distill.students import Students, configure
from sd_hyena.nn import OperatorConfig, build
from sd_hyena.targets import find_targets, select


class Same(nn.Module):
    """An operator that says what the attention says, or a share of it."""

    def __init__(self, attention, dim):
        super().__init__()
        self.config, self.core = OperatorConfig(dim, 16, 16, attention_heads=attention.heads), False
        self.attention, self.scale = (attention,), nn.Parameter(torch.ones(1))

    def forward(self, x, size, projections=None):
        return self.scale * self.attention[0](x)


def students_of(unet, names="IN01,OUT11", form="full"):
    targets = select(find_targets(unet), names)
    torch.manual_seed(1)
    operators = {t.name: build(configure(t, (16, 16), unet, form=form)) for t in targets}
    return targets, Students(operators, {t.name: unet.get_submodule(t.path) for t in targets})


def imitators(unet, names="IN01,OUT11"):
    targets = select(find_targets(unet), names)
    attentions = {t.name: unet.get_submodule(t.path) for t in targets}
    return targets, Students({t.name: Same(attentions[t.name], t.dim) for t in targets}, attentions)


def inputs_of(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(count, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([10, 900])[:count],
        "encoder_hidden_states": torch.randn(count, 7, 8, generator=generator),
    }


class Inputs:
    """Stands in for TeacherInputs: one fixed batch."""

    def batch(self, step, positions):
        return inputs_of(len(positions))


def stage(unet, targets, **choices):
    joint = JointStage.__new__(JointStage)
    joint.settings, joint.teacher, joint.targets = TrainSettings("demo", **choices), unet, targets
    joint.variances = {t.name: 2.0 for t in targets}
    joint.inputs = Inputs()
    return joint


@pytest.mark.parametrize("form", ["full", "core"])
def test_the_student_unet_shares_the_teachers_weights_and_leaves_it_alone(unet, form):
    before = run_unet(unet)
    targets, students = students_of(unet, form=form)
    model = StudentUNet(students, unet, targets, checkpointing=False)
    clone = model._unet[0]
    assert {id(p) for p in unet.parameters()} < {id(p) for p in clone.parameters()}
    assert [n for n, _ in model.named_parameters()] == [f"students.{n}" for n, _ in students.named_parameters()]
    prediction, records = model(inputs_of())
    prediction.square().sum().backward()
    assert set(records) == {"IN01", "OUT11"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in students.operators[0].near.parameters())
    assert not any(p.grad is not None for p in unet.parameters())
    assert torch.equal(run_unet(unet), before)


def test_gradient_checkpointing_changes_no_gradient(unet):
    gradients = []
    for checkpointing in (False, True):
        targets, students = students_of(unet, "all")
        model = StudentUNet(students, unet, targets, checkpointing)
        prediction, records = model(inputs_of())
        (prediction.square().mean() + sum(r.y.square().mean() for r in records.values())).backward()
        gradients.append([p.grad for p in students.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close("gradient", a, b, 1e-4)


def test_a_student_that_says_what_the_teacher_says_has_nothing_to_lose(unet):
    targets, students = imitators(unet)
    losses = stage(unet, targets).losses(StudentUNet(students, unet, targets, False), 0, range(2))
    assert losses.total < 1e-10
    assert set(losses.parts) == {"prediction", "feature"}


def test_each_term_is_what_it_says(unet):
    targets, students = imitators(unet)
    with torch.no_grad():
        for operator in students.operators:
            operator.scale.fill_(0.7)
    model = StudentUNet(students, unet, targets, False)
    joint = stage(unet, targets, feature_weight=0.3, prediction_weight=0.4)
    losses = joint.losses(model, 0, range(2))
    with torch.no_grad():
        prediction = (model(inputs_of())[0] - unet(**inputs_of()).sample).square().mean()
    assert_close("prediction", prediction, losses.parts["prediction"], 1e-4)
    assert_close("feature", torch.stack(list(losses.errors.values())).mean(), losses.parts["feature"], 1e-6)
    assert_close("error", losses.mse["IN01"] / 2, losses.errors["IN01"], 1e-6)
    assert_close("total", 0.4 * prediction + 0.3 * losses.parts["feature"], losses.total, 1e-4)


def rates(operator, lr=0.0):
    """Learning rate and weight decay of each parameter by name, at half the usual rate."""
    names = {id(p): name for name, p in operator.named_parameters()}
    groups = make_optimizer([operator], lr, 0.5, 0.1).param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    return found


def test_filters_learn_at_their_own_rates_and_projections_alone_decay():
    base = 0.5 * 0.64 / 8
    states = rates(build(OperatorConfig(8, 4, 8, attention_heads=2)))
    assert states["in_proj.weight"] == states["out_proj.weight"] == pytest.approx((base, 0.1))
    assert states["in_proj.bias"] == pytest.approx((base, 0.0))
    assert states["near.weight"] == states["blocks.weight"] == pytest.approx((30 * base, 0.0))
    long = rates(build(OperatorConfig(8, 4, 8, attention_heads=2, operator="long")))
    assert long["filter.head.weight"] == pytest.approx((base / 32, 0.0))
    assert long["filter.mlp.0.weight"] == pytest.approx((base / 100, 0.0))
    assert rates(build(OperatorConfig(8, 4, 8, attention_heads=2)), 1e-3)["in_proj.weight"] == (1e-3, 0.1)


def test_the_average_is_in_place_only_where_asked():
    layer = nn.Linear(2, 2)
    average = Average(layer, 0.5)
    start = layer.weight.detach().clone()
    for _ in range(8):
        with torch.no_grad():
            layer.weight += 1
        average.update()
    now = layer.weight.detach().clone()
    with average.in_place():
        inside = layer.weight.detach().clone()
    assert torch.equal(layer.weight, now)
    assert ((inside > start) & (inside < now)).all()
    nothing = Average(layer, 0)
    nothing.update()
    with nothing.in_place():
        assert torch.equal(layer.weight, now)


def test_a_teacher_pass_is_used_as_often_as_asked():
    made = []

    class Counting:
        def training(self, number, positions):
            made.append(number)
            return {"number": number, "positions": positions}

    lessons = Reuse(Counting(), 3)
    used = [lessons.training(step, range(4))["number"] for step in range(15)]
    assert made == [0, -1, -2, 1, 2, 3, 4]  # one pass for three steps, after the first three
    assert used == [0, -1, -2, 1, 0, -1, 2, 1, 0, 3, 2, 1, 4, 3, 2]
    assert len(lessons._kept) <= 3
    # A run that goes on in the middle makes anew what it needs, and learns from the same.
    assert [Reuse(Counting(), 3).training(step, range(4))["number"] for step in range(15)] == used
    assert [Reuse(Counting(), 1).training(step, range(4))["number"] for step in range(4)] == [0, 1, 2, 3]
    # Another share of the same pass is another record.
    assert lessons.training(14, range(4, 8))["positions"] == tuple(range(4, 8))
    lessons.forget()
    assert not lessons._kept
