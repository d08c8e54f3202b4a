"""What diffusers and transformers say on their own."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Stops diffusers' and transformers' own progress bars and advice, also on errors, which are raised too."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
