"""Hyena in some of the steps, attention in the others."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from ..api import set_hyena_enabled
from ..patch import get_unet


@contextlib.contextmanager
def hyena_range(pipe: Any, start: float = 0.0, end: float = 1.0) -> Iterator[None]:
    """Within the block, every picture that ``pipe`` draws has its Hyena layers on from ``start`` to ``end``, shares of
    its steps, and off in the other steps. Afterwards all are on.

    A step may call the UNet more than once; of img2img, the steps are those that it runs. Equal shares: off.
    """
    calls, before = itertools.count(), None

    def switch(unet: Any, inputs: Any) -> None:
        nonlocal before
        order = pipe.scheduler.order
        steps = -(-pipe.num_timesteps // order)
        share = next(calls) % pipe.num_timesteps // order / steps
        wanted = start <= share < end
        if wanted != before:
            set_hyena_enabled(pipe, wanted)
            before = wanted

    handle = get_unet(pipe).register_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        set_hyena_enabled(pipe, True)
