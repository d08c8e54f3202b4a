"""The page: the form, what is drawn, and what its buttons do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..compare import Cancelled, Comparison, Picture, Studio
from ..errors import SdHyenaError, UsageError
from ..texts import literal_syntax, one_line, reason
from . import show
from .album import Album
from .form import QUIET, Form, Updates
from .shelf import Shelf
from .steps import seen

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)


class Page:
    """``blocks`` is gradio's page for a studio, the Hyena files of a shelf, and pictures in an album."""

    def __init__(self, studio: Studio, shelf: Shelf, album: Album, uploads: Path) -> None:
        self.studio, self.album = studio, album
        with gr.Blocks(title="sd-hyena", analytics_enabled=False) as self.blocks:
            self.status = gr.HTML("", elem_id="status", render=False, **show.PLAIN)
            gr.HTML(show.heading(studio.model, str(studio.device)), elem_id="heading", **show.PLAIN)
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self.form = Form(studio, shelf, uploads, self.status)
                with gr.Column(scale=6, min_width=320):
                    self._results()
            self._wire()

    def _results(self) -> None:
        with gr.Row(elem_id="acts"):
            self.draw = gr.Button("Draw", variant="primary", scale=3, min_width=120, elem_id="draw")
            self.cancel = gr.Button("Cancel", interactive=False, scale=1, min_width=80, elem_id="cancel")
        self.status.render()
        self.viewer = gr.HTML(
            show.pictures(),
            html_template=(HERE / "viewer.html").read_text(),
            js_on_load=(HERE / "viewer.js").read_text(),
            apply_default_css=False,
            padding=False,
            elem_id="viewer",
        )
        self.links = gr.HTML("", elem_id="links", **show.PLAIN)
        self.figures = gr.HTML("", elem_id="figures", **show.PLAIN)
        strip_js = (HERE / "strip.js").read_text()
        self.strip = gr.HTML("", js_on_load=strip_js, apply_default_css=False, padding=False, elem_id="strip")

    def _wire(self) -> None:
        shown = [self.viewer, self.links, self.figures, self.strip]
        self.form.wire()
        self.blocks.load(self._open, None, [*self.form.shelved, self.strip], **QUIET)
        self.draw.click(
            self._draw,
            self.form.inputs,
            [self.draw, self.cancel, self.form.seed, self.status, *shown],
            show_progress="hidden",
            api_name="draw",
            concurrency_limit=1,
        )
        self.cancel.click(self._cancel, None, self.cancel, **QUIET)
        self.strip.pick(self._pick, None, shown, **QUIET)

    def _open(self) -> Updates:
        return self.form.open() | {self.strip: show.strip(self.album.entries(), None)}

    def _draw(self, *values: Any) -> Iterator[Updates]:
        self.studio.start()
        yield {self.draw: gr.update(interactive=False), self.cancel: gr.update(interactive=True), self.status: ""}
        end: Updates = {self.draw: gr.update(interactive=True), self.cancel: gr.update(interactive=False)}
        try:
            yield from self._drawing(*values)
        except Cancelled as error:
            end[self.status] = show.said(str(error))
        except (UsageError, SdHyenaError) as error:
            end[self.status] = show.failed(error)
        except Exception as error:
            logger.error("%s: %s", type(error).__name__, reason(error))
            end[self.status] = show.failed(error)
        yield end

    def _drawing(self, *values: Any) -> Iterator[Updates]:
        settings, file, layers = self.form.read(*values)
        yield {self.form.seed: str(settings.seed), self.status: show.said("Getting ready")}
        done = one_line(" ".join(["Done.", literal_syntax((settings.prompt, settings.negative_prompt))]))
        for found in seen(lambda progress: self.studio.compare(settings, file, layers, progress)):
            if isinstance(found, Picture):
                teacher = show.pictures(self.album.file(found))
                yield {self.viewer: teacher, self.links: "", self.figures: ""}
            elif isinstance(found, Comparison):
                yield self._shown(self.album.add(found)) | {self.status: show.said(done)}
            else:
                yield {self.status: show.step(*found)}

    def _cancel(self) -> Any:
        self.studio.cancel()
        return gr.update(interactive=False)

    def _pick(self, event: gr.EventData) -> Updates:
        return self._shown(int(event.number))

    def _shown(self, number: int) -> Updates:
        """An earlier comparison, or nothing if it is not kept any more."""
        updates: Updates = {self.strip: show.strip(self.album.entries(), number)}
        found = self.album.get(number)
        if found is None:
            return updates
        teacher, student = self.album.file(found.teacher), self.album.file(found.student)
        return updates | {
            self.viewer: show.pictures(teacher, student),
            self.links: show.downloads(teacher, student),
            self.figures: show.figures(found),
        }
