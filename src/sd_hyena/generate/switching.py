"""Hyena in some of the steps, attention in the others."""

from __future__ import annotations

import contextlib
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
    call, total, on = 0, 0, None

    def switch(unet: Any, inputs: Any) -> None:
        nonlocal call, total, on
        if call == total:  # the next picture, or batch of pictures
            call, total = 0, pipe.num_timesteps
        order = pipe.scheduler.order
        wanted = start <= call // order / -(-total // order) < end
        call += 1
        if wanted != on:
            set_hyena_enabled(pipe, wanted)
            on = wanted

    handle = get_unet(pipe).register_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        set_hyena_enabled(pipe, True)
