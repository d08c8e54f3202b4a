"""Settings that would change nothing say so in one line; those that cannot work are refused."""

import logging

import pytest

from sd_hyena.distill.settings import TrainSettings
from sd_hyena.errors import UsageError


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"feature_weight": 1.0, "ema_decay": 0.5}, "--feature_weight, --ema_decay: ignored, being of stage 2"),
        ({"operator": "causal", "near": 5, "block": 4}, "--near, --block: ignored, being not for the causal operator"),
        ({"hyena_filter_order": 32}, "--hyena_filter_order: ignored, being not for the states operator"),
        ({"operator": "linear", "hyena_order": 3}, "--hyena_order: ignored, being not for the linear operator"),
        ({"data_dir": "x", "n_images": 3}, "--n_images: ignored, being of pictures that a run draws itself"),
    ],
)
def test_what_changes_nothing_is_named(caplog, choices, named):
    with caplog.at_level(logging.WARNING):
        TrainSettings("demo", **choices).validate()
    assert [r.message.startswith(named) for r in caplog.records] == [True]


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"finetune_steps": 3, "feature_weight": 1.0, "ema_decay": 0.5},
        {"near": 5, "block": 4, "scaling": "extend", "feature_map": "exp", "form": "core"},
        {"operator": "causal", "hyena_order": 3, "hyena_num_heads": 2},
        {"operator": "near", "near": 7},
    ],
)
def test_nothing_is_said_of_what_counts(caplog, choices):
    TrainSettings("demo", **choices).validate()
    assert not caplog.records


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"finetune_steps": 3, "feature_weight": float("inf")}, "--feature_weight is inf"),
        ({"n_steps": 0}, "--n_steps is 0"),
        ({"weight_decay": 1e38}, r"--weight_decay is 1e\+38, but must be from 0 to 100"),
        ({"finetune_steps": 3, "prediction_weight": 1e38}, r"--prediction_weight is 1e\+38"),
        ({"operator": "hyena9"}, "operator must be one of states, near"),
        ({"near": 4}, "near must be odd"),
        ({"operator": "long", "form": "core"}, "form must be full"),
    ],
)
def test_what_cannot_work_is_refused(choices, message):
    with pytest.raises(UsageError, match=message):
        TrainSettings("demo", **choices).validate()


def test_files_are_saved_at_the_end_of_each_stage():
    assert TrainSettings("demo", n_steps=5, finetune_steps=4, save_every_n_steps=3).saved_steps() == [3, 5, 6, 9]
    assert TrainSettings("demo", n_steps=0, finetune_steps=4, save_every_n_steps=0).saved_steps() == [4]
