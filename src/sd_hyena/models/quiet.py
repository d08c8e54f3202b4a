"""What diffusers and transformers say on their own."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Stops diffusers' and transformers' own progress bars and advice; errors still reach the user."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
