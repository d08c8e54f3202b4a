"""The form: what to draw, and which layers of which file are Hyena."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..compare import Offer, Studio
from ..errors import SdHyenaError, UsageError
from ..generate.draw import file_hash
from ..generate.samplers import SCHEDULERS
from ..generate.settings import GenerateSettings
from ..models import DEMO
from ..picture_settings import PictureSettings, read_settings, sampler_named
from ..targets import select
from ..texts import one_line
from . import show
from .shelf import ENDING, Shelf

# On the bundled model: a prompt that it knows, and a size at which its Hyena layers pay, drawn in seconds.
DEMO_PROMPT, DEMO_SIDE, DEMO_STEPS = "a fox on the left, brick wall", 512, 8
SIDE, STEPS, GUIDANCE = 512, 20, 7.0
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
Updates = dict[Any, Any]


class Form:
    """Its components, made where it is made, and what they do. ``uploads``: where gradio puts what is dropped;
    ``status``: where lines go."""

    def __init__(self, studio: Studio, shelf: Shelf, uploads: Path, status: gr.HTML) -> None:
        self.studio, self.shelf, self.uploads, self.status = studio, shelf, uploads, status
        self.levels = sorted({target.downscale for target in studio.targets.values()})
        bundled = studio.model == DEMO
        self.prompt = gr.Textbox(DEMO_PROMPT if bundled else "", label="Prompt", lines=2, elem_id="prompt")
        self.negative = gr.Textbox("", label="Negative prompt", lines=1)
        with gr.Row():
            self.seed = gr.Textbox("1", label="Seed", min_width=110, scale=3, elem_id="seed")
            self.dice = gr.Button("Roll", min_width=56, scale=0, elem_id="dice")
            self.steps = gr.Number(
                DEMO_STEPS if bundled else STEPS, label="Steps", precision=0, min_width=80, scale=2, elem_id="steps"
            )
            self.guidance = gr.Number(GUIDANCE, label="Guidance", step=0.5, min_width=80, scale=2)
        with gr.Row():
            side = DEMO_SIDE if bundled else SIDE
            self.width = gr.Number(side, label="Width", precision=0, step=8, min_width=90, scale=2, elem_id="width")
            self.height = gr.Number(side, label="Height", precision=0, step=8, min_width=90, scale=2, elem_id="height")
            names = [(f"model: {studio.sampler}", "model"), *((name, name) for name in SCHEDULERS)]
            self.sampler = gr.Dropdown(names, value="model", label="Sampler", min_width=180, scale=4)
        self.hyena = gr.Dropdown(list(shelf.files()), label="Hyena file", elem_id="hyena")
        self.origin = gr.HTML("", elem_id="origin", **show.PLAIN)
        with gr.Row(elem_id="words"):
            self.words = [gr.Button(word, size="sm", min_width=60) for word in ("All", "High", "None")]
        self.chips = [
            gr.CheckboxGroup(self._at(level), label=self._level(level), elem_classes="chips", visible=False)
            for level in self.levels
        ]
        self.names = gr.State([])  # of the file's layers
        gr.HTML(show.DROP, elem_id="drop-what", **show.PLAIN)
        self.dropped = gr.File(
            label="Drop",
            show_label=False,
            file_types=[ENDING, ".png"],
            height=110,
            elem_id="drop",
        )

    @property
    def fields(self) -> dict[str, Any]:
        """Components by the names of settings."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "cfg_scale": self.guidance,
            "width": self.width,
            "height": self.height,
            "scheduler": self.sampler,
        }

    @property
    def shelved(self) -> list[Any]:
        """What changes with the Hyena file."""
        return [self.hyena, self.origin, self.names, *self.chips, self.status]

    @property
    def inputs(self) -> list[Any]:
        """What :meth:`read` takes the values of."""
        return [*self.fields.values(), self.hyena, *self.chips]

    def wire(self) -> None:
        """Has the form's own controls do what they do."""
        self.dice.click(lambda: str(random.SystemRandom().randrange(2**31)), None, self.seed, **QUIET)
        self.hyena.input(self._choose, self.hyena, self.shelved, **QUIET)
        for button in self.words:
            button.click(self._select, [button, self.names], self.chips, **QUIET)
        outputs = [*self.shelved, *self.fields.values(), self.dropped]
        self.dropped.upload(self._drop, self.dropped, outputs, **QUIET)

    def open(self) -> Updates:
        """The form as it is when the page opens."""
        names = list(self.shelf.files())
        if names:
            return self._choose(names[0])
        return {self.hyena: gr.update(choices=[]), self.status: show.said("Drop a Hyena file to begin.")}

    def read(self, *values: Any) -> tuple[GenerateSettings, str, list[str]]:
        """Settings, Hyena file and layers. Raises UsageError for the first value that cannot be."""
        count = len(self.fields)
        settings = self.studio.settings(**dict(zip(self.fields, values[:count], strict=True)))
        ticked = {name for chosen in values[count + 1 :] for name in chosen}
        return settings, self.shelf.file(values[count]), [name for name in self.studio.targets if name in ticked]

    def _at(self, level: int) -> list[str]:
        return [name for name, target in self.studio.targets.items() if target.downscale == level]

    def _level(self, level: int) -> str:
        finest = " (finest: High)" if level == self.levels[0] else ""
        return f"Layers with a cell every {level * self.studio.cell} px{finest}"

    def _choose(self, name: str | None) -> Updates:
        try:
            return {self.status: ""} | self._chosen(name)
        except (UsageError, SdHyenaError) as error:
            return {self.origin: "", self.names: [], self.status: show.failed(error)} | self._offered(Offer({}, ""))

    def _chosen(self, name: str | None, ticked: set[str] | None = None) -> Updates:
        offer = self.studio.offer(self.shelf.file(name))
        hyena = gr.update(choices=list(self.shelf.files()), value=name)
        shown = {self.hyena: hyena, self.origin: show.origin(offer), self.names: list(offer.errors)}
        return shown | self._offered(offer, ticked)

    def _offered(self, offer: Offer, ticked: set[str] | None = None) -> Updates:
        updates = {}
        for level, chips in zip(self.levels, self.chips, strict=True):
            here = {name: offer.errors[name] for name in self._at(level) if name in offer.errors}
            labels = [(name if error is None else f"{name} {error:.3f}", name) for name, error in here.items()]
            value = [name for name in here if ticked is None or name in ticked]
            updates[chips] = gr.update(choices=labels, value=value, visible=bool(here))
        return updates

    def _select(self, word: str, names: Sequence[str]) -> Updates:
        wanted = [] if word == "None" else [target.name for target in select(self.studio.targets, word.lower())]
        ticked, groups = set(wanted) & set(names), zip(self.levels, self.chips, strict=True)
        return {chips: [name for name in self._at(level) if name in ticked] for level, chips in groups}

    def _drop(self, dropped: str | None) -> Updates:
        try:
            path = self._uploaded(dropped)
            took = self._take_file(path) if path.suffix.lower() == ENDING else self._fill(read_settings(path))
        except (UsageError, SdHyenaError) as error:
            took = {self.status: show.failed(error)}
        return {self.dropped: None} | took

    def _uploaded(self, dropped: str | None) -> Path:
        """What gradio has put into its folder, and nothing else."""
        path = Path(dropped or "").resolve()
        if not path.is_relative_to(self.uploads) or not path.is_file():
            raise UsageError("that file was not dropped here")
        return path

    def _take_file(self, path: Path) -> Updates:
        name = self.shelf.add(path)
        try:
            return self._chosen(name) | {self.status: show.said(f"{path.name} is chosen.")}
        except (UsageError, SdHyenaError):
            self.shelf.remove(name)
            raise

    def _fill(self, found: PictureSettings) -> Updates:
        updates = {self.fields[name]: value for name, value in found.values.items()}
        if "seed" in found.values:
            updates[self.seed] = str(found.values["seed"])  # more digits than a browser's numbers have
        if found.values.get("scheduler") == sampler_named(self.studio.sampler):
            updates[self.sampler] = "model"
        notes = list(found.notes)
        file = next((name for name, f in self.shelf.files().items() if Path(f).name == found.hyena), None)
        if file is not None:
            updates |= self._chosen(file, set(found.layers))
            if file_hash(self.shelf.file(file)) != found.hyena_hash:
                notes.append(f"its Hyena file {found.hyena} is another one here")
        elif found.hyena:
            notes.append(f"its Hyena file {found.hyena} is not here, the form's stays")
        said = "; ".join(["The picture's settings are in the form", *notes])
        return updates | {self.status: show.said(one_line(f"{said}."))}
