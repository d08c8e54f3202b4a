"""Starting from the teacher: mean attention, the kernel fitted to it, the losses."""

import pytest
import torch
from conftest import assert_close, run_unet

from sd_hyena.distill.capture import Captured, capture
from sd_hyena.distill.losses import Distance, variance
from sd_hyena.distill.students import Students, configure, mean_attention, start_from_teacher
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


def test_mean_attention_by_brute_force(captured):
    unet, targets, records = captured
    attention, record = unet.get_submodule(targets["IN04"].path), records["IN04"]
    h, w = record.size
    with torch.no_grad():
        q, k = (
            layer(record.x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer in (attention.to_q, attention.to_k)
        )
        maps = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1)
    kernel, flat = mean_attention(attention, [record], (h, w))
    whole = kernel + flat[:, None, None] / (h * w)
    for dy, dx in ((0, 0), (2, -1), (-h + 1, w - 1), (1, 0)):
        pairs = [
            maps[:, :, y * w + x, (y - dy) * w + x - dx]
            for y in range(h)
            for x in range(w)
            if 0 <= y - dy < h and 0 <= x - dx < w
        ]
        expected = torch.stack(pairs).mean((0, 1))
        assert_close(f"offset {dy},{dx}", expected, whole[:, dy + h - 1, dx + w - 1], 1e-5)


def test_mean_attention_on_a_large_grid_is_pooled_and_keeps_its_mass(unet):
    attention = unet.get_submodule(find_targets(unet)["IN01"].path)
    x = torch.randn(1, 48 * 48, 8)
    kernel, flat = mean_attention(attention, [Captured(x, x, (48, 48))], (48, 48))
    assert kernel.shape == (2, 95, 95)
    assert ((kernel.abs().sum((1, 2)) + flat) < 4).all()
    assert (flat > 0.3).all()


@pytest.mark.parametrize("form", ["full", "core"])
@pytest.mark.parametrize("branch", ["none", "mean", "linear"])
def test_start_is_near_the_teacher(captured, form, branch):
    """With nearly flat attention, as random weights give, the start already does what the layer does."""
    unet, targets, records = captured
    target = targets["IN04"]
    attention, record = unet.get_submodule(target.path), records["IN04"]
    torch.manual_seed(0)
    operator = configure(target, (12, 8), unet, form=form, global_branch=branch).build()
    random_error = relative_error(_run(operator, attention, record), record.y)
    start_from_teacher(operator, attention, [record])
    error = relative_error(_run(operator, attention, record), record.y)
    assert error < 0.2 * random_error


def _run(operator, attention, record):
    with torch.no_grad():
        return Students({"x": operator}, {"x": attention})({"x": record})["x"]


def test_filter_fit_reproduces_a_smooth_kernel():
    from sd_hyena.nn.filter2d import ImplicitFilter2d

    torch.manual_seed(0)
    filter2d = ImplicitFilter2d(6, 64, (16, 12))
    dy, dx = torch.arange(-15, 16)[:, None] / 16, torch.arange(-11, 12)[None] / 12
    distance = torch.sqrt(dy**2 + dx**2)
    target = torch.stack([torch.exp(-rate * distance**2) for rate in (1, 3, 8, 15, 20, 30)])
    filter2d.fit_(target)
    with torch.no_grad():
        assert_close("kernel", target, filter2d((16, 12)), 0.1)


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
