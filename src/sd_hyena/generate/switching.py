"""Hyena in some of the steps, attention in the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..patch import attached, get_unet, set_enabled


@contextlib.contextmanager
def hyena_range(pipe: Any, start: float = 0.0, end: float = 1.0) -> Iterator[None]:
    """Within the block, every picture that ``pipe`` draws has its Hyena layers on from ``start`` to ``end``, shares of
    its steps, and off in the other steps. Layers that are switched off before stay off.

    A step may call the UNet more than once; of img2img, the steps are those that it runs. Equal shares: off.
    """
    model = get_unet(pipe)
    names = [name for name, layer in attached(model).items() if layer.enabled]
    call, total, on, timesteps = 0, 0, True, None

    def switch(unet: Any, inputs: Any) -> None:
        nonlocal call, total, on, timesteps
        if timesteps is not pipe.scheduler.timesteps or call == total:
            # The next picture, or batch of pictures, whether or not the one before came to its end.
            call, total, timesteps = 0, pipe.num_timesteps, pipe.scheduler.timesteps
        order = pipe.scheduler.order
        wanted = start <= call // order / -(-total // order) < end
        call += 1
        if wanted != on:
            set_enabled(model, wanted, names)
            on = wanted

    handle = model.register_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        set_enabled(model, True, names)
