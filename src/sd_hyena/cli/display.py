"""What the commands print: phases, the training progress bar, tables. Whatever they print passes ``console``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..texts import printable

WIDTH_OF_FILES = 160  # columns


class PlainConsole(Console):
    """Prints what it is given as it is, and nothing that a terminal would obey."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):  # of texts that were made elsewhere too
            yield segment if segment.control else Segment(printable(segment.text, lines=True), segment.style)


console = PlainConsole()


def phase(text: str) -> None:
    """One dim line: what happens now."""
    console.print(text, style="dim", soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} steps/s" if task.speed else "- steps/s")


@contextlib.contextmanager
def training_progress(total: int, show: bool = True) -> Iterator[Callable[[Any], None]]:
    """A bar with loss, relative error, steps/s and time left; without a terminal, a line now and then.

    It appears with the first update.
    """
    lively = show and console.is_terminal
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("relative error{task.fields[where]} {task.fields[worst]}"),
        _Rate(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, disable=not lively)
    task = bar.add_task("training", total=total, loss=float("nan"), where="", worst="-", start=False)
    every = max(1, total // 20)

    def advance(progress: Any) -> None:
        name, value = max(progress.relative_error.items(), key=lambda item: item[1])
        where = " on noise" if progress.on_noise else ""
        if not bar.tasks[0].started:
            bar.start()
            bar.start_task(task)
        worst = f"up to {value:.3f} ({name})"
        bar.update(task, completed=progress.step, loss=progress.loss, where=where, worst=worst)
        if show and not lively and (progress.step % every == 0 or progress.step in (1, total)):
            done = f"step {progress.step}/{total} loss {progress.loss:.4f}"
            console.print(f"{done} relative error{where} up to {value:.4f} ({name})", soft_wrap=True)

    try:
        yield advance
    finally:
        bar.stop()


@contextlib.contextmanager
def preparing_progress(show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar of pictures done and time left; without a terminal, a line now and then. It appears with the first
    call and goes with the last, so that another may follow."""
    lively = show and console.is_terminal
    columns = (TextColumn("preparing pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not lively)
    printed = 0

    def advance(done: int, total: int) -> None:
        nonlocal printed
        if not bar.tasks:
            bar.start()
            bar.add_task("preparing", completed=done, total=total)
        bar.update(bar.tasks[0].id, completed=done)
        if done == total:
            bar.stop()
        if show and not lively and done > printed and (done == total or done * 20 // total > printed * 20 // total):
            console.print(f"picture {done}/{total}", soft_wrap=True)
            printed = done

    try:
        yield advance
    finally:
        bar.stop()


def layer_table(result: Any) -> None:
    """Per-layer results on held-out batches, and their mean."""
    held_out = "results on held-out noise" if result.measured_on == "noise" else "held-out results"
    table = Table(title=f"{held_out} after {result.step} steps, {result.seconds:.0f} s")
    table.add_column("layer")
    table.add_column("operator")
    for heading in ("channels", "grid", "relative error", "cosine"):
        table.add_column(heading, justify="right")
    for name, figures in result.figures.items():
        config = result.configs[name]
        table.add_row(
            name,
            config.label,
            str(config.dim),
            f"{config.height}x{config.width}",
            f"{figures['relative_error']:.4f}",
            f"{figures['cosine']:.4f}",
        )
    count = len(result.figures)
    means = [sum(f[key] for f in result.figures.values()) / count for key in ("relative_error", "cosine")]
    table.add_section()
    table.add_row("mean", "", "", "", *(f"{m:.4f}" for m in means))
    console.print(table)


@contextlib.contextmanager
def counting_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar for pictures or passes done; nothing without a terminal."""
    columns = (BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_tables(tables: Sequence[Any], left: Collection[str] = ()) -> None:
    """Tables with their titles; where the output is no terminal, as wide as they need to be. Figures are on the
    right, the first column, advice and what is under the headings ``left`` on the left."""
    wide = console if console.is_terminal else PlainConsole(width=WIDTH_OF_FILES)
    for content in tables:
        table = Table(title=content.title)
        for position, heading in enumerate(content.headings):
            words = not position or heading == "advice"
            table.add_column(heading, justify="left" if words or heading in left else "right", no_wrap=words)
        for line in content.lines:
            table.add_row(*line)
        wide.print(table)
