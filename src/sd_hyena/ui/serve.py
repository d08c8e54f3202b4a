"""Serving the page to a browser on this machine, and to nothing else."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compare import Studio
from ..models import DEMO
from .settings import HOST, UiSettings
from .shelf import MAX_UPLOAD, Shelf

HERE = Path(__file__).parent


@contextlib.contextmanager
def serving(studio: Studio, settings: UiSettings) -> Iterator[str]:
    """Within, the page is there, at the address that is yielded. Its files lie in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="sd-hyena-ui-") as folder:
        pictures, uploads = Path(folder).resolve() / "pictures", Path(folder).resolve() / "uploads"
        pictures.mkdir()
        uploads.mkdir()
        # gradio reads these when it is imported, and asks the network for news and its users' habits otherwise.
        os.environ["GRADIO_ANALYTICS_ENABLED"], os.environ["GRADIO_TEMP_DIR"] = "False", str(uploads)
        from .album import Album
        from .page import Page

        shelf = Shelf(settings.hyena_dir, settings.model == DEMO)
        blocks = Page(studio, shelf, Album(pictures), uploads).blocks
        try:
            yield _launch(blocks, settings, pictures)
        finally:
            studio.cancel()
            blocks.close(verbose=False)


def _launch(blocks: Any, settings: UiSettings, pictures: Path) -> str:
    import gradio as gr
    from starlette.middleware import Middleware

    from .guard import Guard

    port = settings.free_port()
    # The theme's own fonts come from the network.
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    blocks.queue(max_size=16).launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        inbrowser=not settings.no_browser,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        allowed_paths=[str(pictures)],
        max_file_size=MAX_UPLOAD,
        theme=gr.themes.Default(primary_hue="teal", neutral_hue="slate", spacing_size="sm", **fonts),
        css_paths=[HERE / "page.css"],
        app_kwargs={"middleware": [Middleware(Guard, port=port)]},
    )
    return f"http://{HOST}:{port}/"
