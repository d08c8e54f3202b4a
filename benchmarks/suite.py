"""Several benchmarks in one run, written as one Markdown page with figures, and one JSON file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sd_hyena.benchmark import figures, report
from sd_hyena.benchmark.image import ImageRow
from sd_hyena.benchmark.kinds import KINDS, Kind, Shape, latent_cells
from sd_hyena.benchmark.measure import Limits, Row, check, measure, measure_sizes
from sd_hyena.benchmark.memory import CALL_METHOD, RUN_METHOD
from sd_hyena.figures import rendered
from sd_hyena.files import make_folder, write_file
from sd_hyena.machine import describe, machine, settle


class Suite:
    """Collects sections; :meth:`write` puts them under ``stem``: STEM.md, STEM.json, STEM-*.png and .svg.

    A section that fails is reported in its place and in ``failures``; the others still run.
    """

    def __init__(
        self, stem: str, title: str, command: str, device: str, dtype: torch.dtype, say: Callable[[str], None]
    ):
        self.stem, self.title, self.command, self.say = stem, title, command, say
        self.device, self.dtype = torch.device(device), dtype
        settle(device)
        self.facts = machine(device)
        self.rows: list[Row] = []
        self.records: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._pages: list[str] = []
        self._started = time.perf_counter()
        make_folder(Path(stem).parent)

    def shape(self, width: int, batch: int) -> Shape:
        """IN01 of Stable Diffusion 1.x for square pictures, its Hyena layers made for 512 px; tiny ones, for trying a
        script, for their own size."""
        cells = latent_cells(width)
        extent = 64 if cells >= 32 else cells
        return Shape(320, 8, cells, cells, batch, self.dtype, self.device, (extent, extent))

    def section(self, heading: str, run: Callable[[], str], *, first: bool = False) -> None:
        """Adds ``run()``'s Markdown under ``heading``, at the end or, with ``first``, before all others."""
        self.say(f"{heading} ({time.perf_counter() - self._started:.0f} s so far)")
        try:
            text = run()
        except Exception as error:  # whatever it is, the other sections are worth having
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.failures.append(f"{heading}: {reason}")
            self.say(f"FAILED: {reason}")
            text = f"**Failed**: {reason}\n"
        self._pages.insert(0 if first else len(self._pages), f"## {heading}\n\n{text}")
        self.write()

    def correctness(self, kinds: Sequence[str], grids: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> str:
        """Holds every kind to its definition at odd and non-square grids, as inference and with gradients."""
        lines = []
        for name in kinds:
            cells, note = [], ""
            for dtype in dtypes:
                shapes = [Shape(80, 2, h, w, 2, dtype, self.device, (8, 8)) for h, w in grids]
                if missing := KINDS[name].missing(shapes[0], backward=True):
                    cells.append("-")
                    note = note or f"{str(dtype).removeprefix('torch.')}: {missing}"
                else:
                    try:
                        errors = [check(name, shape, backward=way) for shape in shapes for way in (False, True)]
                        cells.append(f"{max(errors):.0e}")
                    except Exception as error:  # the other kinds are worth knowing of
                        cells.append("**failed**")
                        self.failures.append(f"{name}, {dtype}: {' '.join(str(error).split())}")
            lines.append([name, *cells, note])
        headings = ["kind", *(str(d).removeprefix("torch.") for d in dtypes), ""]
        sizes = ", ".join(f"{h}x{w}" for h, w in grids)
        intro = f"Largest relative RMS error of output and input gradient over grids of {sizes} cells.\n\n"
        return intro + report.markdown_table(headings, lines)

    def layer(
        self,
        width: int,
        batch: int,
        kinds: Sequence[str | Kind],
        limits: Limits,
        *,
        backward: bool = False,
        name: str = "layer",
    ) -> str:
        """All ``kinds`` at one size, with a figure."""
        shape = self.shape(width, batch)
        rows = measure(shape, (width, width), kinds, limits, backward=backward, failures=self.failures)
        self._keep(rows)
        what = "forward + backward" if backward else "forward"
        name = f"{name}{'-backward' if backward else ''}-{width}-b{batch}"
        title = f"one layer, {width}x{width} px, 320 channels, batch {batch}, {self._dtype_name}, {what}"
        table = report.markdown_table(*report.layer_lines(rows))
        return f"{self._figure(name, title, figures.plot_layer, rows)}{table}\n{self._foot(rows)}"

    def sizes(self, widths: Sequence[int], kinds: Sequence[str | Kind], limits: Limits, *, figure: bool = True) -> str:
        """All ``kinds`` by image width, batch 1, with a figure and the crossovers."""
        rows = measure_sizes(
            lambda width: self.shape(width, 1),
            widths,
            kinds,
            limits,
            report=self._keep,
            failures=self.failures,
        )
        title = f"one layer by image size, 320 channels, batch 1, {self._dtype_name}, forward"
        crossovers = report.crossover_lines(rows)
        return (
            (self._figure("sizes", title, figures.plot_sizes, rows) if figure else "")
            + "Milliseconds, and the best attention's time over this one's:\n\n"
            + report.markdown_table(*report.size_lines(rows))
            + "\nPeak memory beyond input and weights, MiB:\n\n"
            + report.markdown_table(*report.memory_lines(rows))
            + "".join(["\n", *(f"- {line}\n" for line in crossovers)])
            + f"\n{self._foot(rows)}"
        )

    def image(self, name: str, title: str, rows: Sequence[ImageRow]) -> str:
        """A whole generation, with a figure."""
        self.records += [{"section": name} | row.record() for row in rows]
        return (
            self._figure(name, title, figures.plot_image, rows)
            + report.markdown_table(*report.image_lines(rows))
            + "\nSelf-attention layers, ms per step (*: Hyena):\n\n"
            + report.markdown_table(*report.image_layer_lines(rows))
            + f"\n{report.checked(rows)} Memory: {RUN_METHOD[self.device.type]}.\n"
        )

    def write(self) -> None:
        """Writes what there is so far, so that an interruption loses little."""
        seconds = time.perf_counter() - self._started
        head = (
            f"# {self.title}\n\n{describe(self.facts)}, {self.facts['date']}; {seconds:.0f} s.\n\n`{self.command}`\n\n"
        )
        head += (
            "Whole layers with their projections, medians of interleaved calls. Ratio: the best attention's median "
            f"over this one's. Memory: {CALL_METHOD[self.device.type]}.\n\n"
        )
        write_file(self.stem + ".md", head + "\n".join(self._pages))
        document = {"title": self.title, "machine": self.facts, "command": self.command, "rows": self.records}
        write_file(self.stem + ".json", report.to_json(document))

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _keep(self, rows: Sequence[Row]) -> None:
        self.say(f"  {rows[0].width} px done")
        self.rows += rows
        self.records += [row.record() for row in rows]

    def _figure(self, name: str, title: str, plot: Callable[..., Any], rows: Sequence[Any]) -> str:
        if all(row.record()["ms"] is None for row in rows):
            return ""
        try:
            for form in ("png", "svg"):
                figure = plot(rows, f"{title}\n{describe(self.facts)}, {self.facts['date']}")
                write_file(f"{self.stem}-{name}.{form}", rendered(figure, form, dpi=150))
        except ImportError as error:
            self.say(f"no figure: {error.name} is not installed")
            return ""
        return f"![{title}]({Path(self.stem).name}-{name}.png)\n\n"

    @staticmethod
    def _foot(rows: Sequence[Row]) -> str:
        lines = [report.checked(rows), *(f"- {line}" for line in report.skipped(rows))]
        return "\n".join([lines[0], "", *lines[1:]]).rstrip() + "\n"
