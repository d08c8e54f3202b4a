"""Harmless changes change a little, and leave nothing behind."""

import pytest
import torch
from conftest import run_unet

from sd_hyena.evaluate.yardstick import BACKEND, HALF, yardsticks


def state(unet):
    return dict(unet.attn_processors), dict(unet.__dict__), set(unet.state_dict())


@pytest.mark.parametrize(("name", "low", "high"), [(BACKEND, 0, 1e-4), (HALF, 1e-4, 0.1)])
def test_a_yardstick_changes_a_little_and_leaves_no_trace(unet, name, low, high):
    before, plain = state(unet), run_unet(unet)
    with yardsticks(unet)[name]:
        changed = run_unet(unet)
        assert state(unet)[:2] != before[:2]
    assert changed.dtype == plain.dtype
    error = ((changed - plain).norm() / plain.norm()).item()
    assert low <= error < high
    after = state(unet)
    assert after == before
    assert all(after[0][key] is processor for key, processor in before[0].items())
    assert torch.equal(run_unet(unet), plain)


@pytest.mark.parametrize("name", [BACKEND, HALF])
def test_nothing_is_left_behind_by_an_error(unet, name):
    before = state(unet)
    with pytest.raises(RuntimeError), yardsticks(unet)[name]:
        raise RuntimeError
    assert state(unet) == before


def test_processors_of_somebody_elses_are_left_alone(unet):
    class Custom:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    path, custom = next(iter(unet.attn_processors)), Custom()
    unet.set_attn_processor({n: custom if n == path else p for n, p in unet.attn_processors.items()})
    with yardsticks(unet)[BACKEND]:
        assert unet.attn_processors[path] is custom


def test_a_unet_in_bfloat16_is_no_yardstick_for_itself(unet):
    assert set(yardsticks(unet.to(torch.bfloat16))) == {BACKEND}
