"""``sd-hyena benchmark layer | sizes | image``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..benchmark.settings import ImageSettings, LayerSettings, SizesSettings
from ..errors import SdHyenaError, UsageError
from ..files import Claim, make_folder
from ..models import check_size, locate, size_defaults
from ..settings import add_arguments as add_settings
from ..settings import resolve, to_flags
from .device import choose_device
from .generate import check_files

COMMANDS: dict[str, tuple[Any, str]] = {
    "layer": (LayerSettings, "parameters, time and memory of one layer, every kind"),
    "sizes": (SizesSettings, "the same by image size, and where Hyena overtakes attention"),
    "image": (ImageSettings, "a whole generation with a real pipeline, layer by layer"),
}

# Settings in which two runs may differ and still be compared row by row.
UNCOMPARED = (
    "out", "compare", "overwrite", "kinds", "widths", "width", "height", "batch_size", "repeats", "budget",
    "variant", "prediction_type", "zero_snr",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parsers = parser.add_subparsers(dest="what", required=True, metavar="what")
    for name, (settings, summary) in COMMANDS.items():
        sub = parsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        add_settings(sub, settings)


def run(args: dict[str, Any]) -> int:
    what = args.pop("what")
    kind, _ = COMMANDS[what]
    settings = resolve(kind, args, defaults=lambda given: size_defaults(given.get("model", "")))
    settings.validate()
    settings.device = choose_device(settings.device)
    claim, old = Claim(settings.outputs()), None
    if settings.compare:
        from ..benchmark.report import read_document

        old = read_document(settings.compare)
    if what == "image" and settings.model:
        source = locate(settings.model, settings.variant)
        check_size(source.name, settings.width, settings.height)
        check_files(settings, source)
    import torch

    from ..machine import settle

    settle(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.dtype == "auto":
        settings.dtype = "float32" if settings.device == "cpu" else "float16"
    run_it: dict[str, Any] = {"layer": _run_layer, "sizes": _run_sizes, "image": _run_image}
    flags = to_flags(settings, omit=("out", "compare", "overwrite"), always=("device", "dtype"))
    command = f"sd-hyena benchmark {what} {flags}".strip()
    run_it[what](settings, partial(_finish, settings, command, old, claim))
    return 0


def _limits(settings: Any) -> Any:
    from ..benchmark.measure import Limits

    return Limits(settings.repeats, settings.budget, settings.max_seconds)


def _shape(settings: Any, height: int, width: int) -> Any:
    import torch

    from ..benchmark.kinds import Shape, latent_cells

    return Shape(
        settings.dim,
        settings.heads,
        latent_cells(height),
        latent_cells(width),
        settings.batch_size,
        getattr(torch, settings.dtype),
        torch.device(settings.device),
        (latent_cells(settings.extent),) * 2,
    )


def _run_layer(settings: LayerSettings, finish: Callable[..., None]) -> None:
    from ..benchmark import figures, report
    from ..benchmark.measure import measure

    facts = _announce(settings)
    rows = measure(
        _shape(settings, settings.height, settings.width),
        (settings.height, settings.width),
        settings.chosen_kinds(),
        _limits(settings),
        backward=settings.backward,
        on_kind=_on_kind(),
    )
    title = f"one layer, {settings.width}x{settings.height} px, {_about(settings)}"
    headings, lines = report.layer_lines(rows)
    _print_table(title, headings, lines)
    _print_skipped(rows)
    text = report.markdown_table(headings, lines) + "\nRatio: the best attention's median over this one's.\n"
    finish(facts, title, text, rows, figures.plot_layer)


def _run_sizes(settings: SizesSettings, finish: Callable[..., None]) -> None:
    from ..benchmark import figures, report
    from ..benchmark.measure import measure_sizes
    from .display import console, phase

    facts = _announce(settings)

    def tell(rows: Any) -> None:
        for row in rows:
            ratio = f", {row.ratio:.2f}x" if row.ratio else ""
            phase(f"{row.width} px {row.kind}: {f'{row.timing.median:.1f} ms{ratio}' if row.timing else row.note}")

    rows = measure_sizes(
        lambda width: _shape(settings, width, width),
        settings.chosen_widths(),
        settings.chosen_kinds(),
        _limits(settings),
        backward=settings.backward,
        report=tell,
    )
    title = f"one layer by image size, {_about(settings)}"
    times, memory = report.size_lines(rows), report.memory_lines(rows)
    _print_table(f"{title}: ms (x the best attention)", *times)
    _print_table("peak memory beyond input and weights, MiB", *memory)
    notes = report.crossover_lines(rows)
    for note in notes:
        console.print(note)
    _print_skipped(rows)
    text = f"ms, and the best attention's over it:\n\n{report.markdown_table(*times)}\n"
    text += f"Peak memory beyond input and weights, MiB:\n\n{report.markdown_table(*memory)}\n"
    text += "\n".join(f"- {note}" for note in notes) + "\n"
    finish(facts, title, text, rows, figures.plot_sizes)


def _run_image(settings: ImageSettings, finish: Callable[..., None]) -> None:
    from ..benchmark import figures, report
    from ..benchmark.image import measure_image
    from ..benchmark.pipelines import prepare
    from .display import phase

    facts = _announce(settings)
    name = settings.model or f"{settings.random_weights} (random weights)"
    phase(f"loading {name}")
    pipe, entries, generate = prepare(settings)
    rows = measure_image(
        pipe,
        entries,
        generate,
        (settings.height, settings.width),
        settings.steps,
        settings.repeats,
        settings.num_images,
        phase,
    )
    title = f"{name}, {settings.width}x{settings.height} px, {settings.steps} steps, {settings.dtype}"
    headings, lines = report.image_lines(rows)
    _print_table(title, headings, lines)
    layers = report.image_layer_lines(rows)
    _print_table("self-attention layers, ms per step (*: Hyena)", *layers)
    _print_skipped(rows)
    text = report.markdown_table(headings, lines) + "\nSelf-attention layers, ms per step (*: Hyena):\n\n"
    text += report.markdown_table(*layers)
    finish(facts, title, text, rows, figures.plot_image)


def _announce(settings: Any) -> dict[str, Any]:
    from ..machine import describe, machine
    from .display import phase

    facts = machine(settings.device)
    phase(f"{describe(facts)}; {settings.dtype}")
    return facts


def _about(settings: Any) -> str:
    what = "forward + backward" if settings.backward else "forward"
    return f"{settings.dim} channels, {settings.heads} heads, batch {settings.batch_size}, {settings.dtype}, {what}"


def _on_kind() -> Any:
    from .display import phase

    return lambda kind: phase(f"checking {kind}")


def _print_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    from .display import console

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _print_skipped(rows: Any) -> None:
    from ..benchmark.report import skipped
    from .display import console

    for line in skipped(rows):
        console.print(line, style="dim")


def _finish(
    settings: Any,
    command: str,
    old: dict[str, Any] | None,
    claim: Claim,
    facts: dict[str, Any],
    title: str,
    text: str,
    rows: Any,
    plot: Any,
) -> None:
    """Compares with an earlier run and writes what was asked for. Raises SdHyenaError if nothing was measured."""
    from ..benchmark import report
    from ..benchmark.memory import CALL_METHOD, RUN_METHOD
    from ..figures import rendered
    from ..machine import describe
    from .display import console, phase

    records = [row.record() for row in rows]
    if all(record["ms"] is None for record in records):
        why = report.skipped(rows)[0]
        raise SdHyenaError(f"nothing was measured, so nothing is written: {why}; ask for a smaller size or other kinds")
    console.print(report.checked(rows))
    chosen = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in UNCOMPARED}
    methods = RUN_METHOD if isinstance(settings, ImageSettings) else CALL_METHOD
    method = methods["cpu" if settings.device == "cpu" else "cuda"]
    document = {"title": title, "machine": facts, "command": command, "settings": chosen, "memory": method}
    document["rows"] = records
    if settings.out:
        where = describe(facts)
        notes = "".join(f"- {line}\n" for line in report.skipped(rows))
        head = f"{title}\n\n{where}, {facts['date']}\n\n`{command}`\n\n"
        foot = f"\nMedians. {report.checked(rows)} Memory: {method}.\n" + (
            f"\nNot measured:\n\n{notes}" if notes else ""
        )
        files: dict[str, Any] = dict(report.records(document, head + text + foot))
        for form in ("png", "svg"):
            figure = plot(rows, f"{title}\n{where}, {facts['date']}")
            files |= {f".{form}": rendered(figure, form, dpi=150)} if figure else {}
        make_folder(Path(settings.out).parent)
        written = [claim.write(Path(settings.out + suffix), data).name for suffix, data in files.items()]
        phase(f"wrote {', '.join(written)} in {Path(settings.out).parent}")
    if old is not None:
        lines = report.compare_records(old["rows"], records)
        if not lines:
            raise UsageError(f"--compare {settings.compare}: nothing in it was measured in this run too")
        _print_table(f"compared with {settings.compare} ({describe(old['machine'])})", report.COMPARED, lines)
        for line in report.differing_settings(old, document):
            console.print(f"not the same in both: {line}")
