"""A baseline repeats the student's run with another operator, whatever operator the student has."""

import dataclasses

import pytest

from sd_hyena import checkpoint
from sd_hyena.distill.settings import TrainSettings
from sd_hyena.errors import UsageError
from sd_hyena.evaluate.baseline import Baseline
from sd_hyena.nn import OperatorConfig


def student(folder, config, training):
    path = folder / "student.safetensors"
    checkpoint.save(path, {"IN01": (config, config.build())}, training=training)
    return path


@pytest.mark.parametrize(
    ("choices", "config"),
    [
        ({"form": "core", "global_branch": "mean"}, {"form": "core", "global_branch": "mean"}),
        ({"operator": "causal", "hyena_num_blocks": 2}, {"operator": "causal", "num_blocks": 2}),
        ({"hyena_order": 3, "hyena_num_heads": 2, "scaling": "extend"}, {"order": 3, "num_heads": 2}),
    ],
)
def test_any_student_can_be_compared_with_linear_attention(tmp_path, caplog, choices, config):
    run = TrainSettings("demo", n_steps=7, finetune_steps=2, seed=5, width=64, height=64, **choices)
    path = student(tmp_path, OperatorConfig(16, 8, 8, **config), dataclasses.asdict(run))
    settings = Baseline(path, "linear", tmp_path / "b", "cpu").settings
    assert (settings.operator, settings.feature_map, settings.form) == ("linear", "elu", "full")
    assert (settings.n_steps, settings.finetune_steps, settings.seed, settings.width) == (7, 2, 5, 64)
    assert "ignored" not in caplog.text  # nobody asked for what does not apply


def test_a_file_without_a_record_cannot_be_repeated(tmp_path):
    path = student(tmp_path, OperatorConfig(16, 8, 8), {})
    with pytest.raises(UsageError, match="does not record how it was trained"):
        Baseline(path, "linear", tmp_path / "b", "cpu")
