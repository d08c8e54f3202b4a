"""What the page shows of a comparison, as HTML. Whatever comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..compare import EVEN, STUDENT, TEACHER, Comparison, Offer
from ..errors import SdHyenaError, UsageError
from ..models import DEMO
from ..texts import one_line, reason

_MIB = 1 << 20
PLAIN: dict[str, Any] = {"js_on_load": None, "apply_default_css": False, "padding": False}  # of gradio's boxes of HTML
DROP = "Drop a Hyena file, or a picture of yours, A1111's or ComfyUI's whose settings to take:"
_EMPTY: dict[str, Any] = {"teacher": "", "student": ""}


def heading(model: str, device: str) -> str:
    """The page's title, and what is drawn with."""
    own = " It was taught at 256 px; larger, where Hyena pays, it repeats what it draws." if model == DEMO else ""
    return (
        "<h1>Attention and Hyena, side by side</h1>"
        f"<p>The same prompt and the same noise, drawn twice by <b>{escape(model)}</b> on {escape(device)}.{own}</p>"
    )


def url(path: Path) -> str:
    """Where the browser finds a file of the page's own."""
    return f"/gradio_api/file={quote(str(path))}"


def pictures(teacher: Path | None = None, student: Path | None = None) -> dict[str, Any]:
    """The viewer's value."""
    return _EMPTY | {name: url(p) for name, p in (("teacher", teacher), ("student", student)) if p is not None}


def step(who: str, done: int, total: int) -> str:
    """How far a drawing is."""
    return f'<div class="status">{who}: step {done} of {total}<progress value="{done}" max="{total}"></progress></div>'


def said(text: str, kind: str = "") -> str:
    """One line: ``kind`` is "error" where something went wrong."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="status {kind}" role="{role}">{escape(text)}</div>' if text else ""


def origin(offer: Offer) -> str:
    """Where the layers are from, and what their numbers are."""
    numbers = any(error is not None for error in offer.errors.values())
    return said(f"{offer.origin}." + " Numbers: relative error on held-out latents." * numbers)


def figures(found: Comparison) -> str:
    """Verdict and table."""
    pays = "good" if found.step_ratio > 1 + EVEN else "bad" if found.step_ratio < 1 - EVEN else "even"
    a, b = found.teacher, found.student
    rows = (
        ("seconds a picture", a.seconds, b.seconds, ".2f"),
        ("ms a step", a.step_ms, b.step_ms, ".4g"),
        ("peak MiB", a.peak_bytes / _MIB, b.peak_bytes / _MIB, ".0f"),
    )
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td>{one:{form}}</td><td>{other:{form}}</td><td>{one / other:.2f}x</td></tr>'
        for name, one, other, form in rows
    )
    alike = f"{found.psnr:.1f} dB PSNR, {found.ssim:.3f} SSIM"
    cells += f'<tr class="alike"><th scope="row">likeness</th><td colspan="3">{alike}</td></tr>'
    return (
        f'<p class="verdict {pays}">{escape(found.verdict())}</p>'
        f'<table class="figures"><thead><tr><th scope="col"></th><th scope="col">{TEACHER}</th>'
        f'<th scope="col">{STUDENT}</th><th scope="col">ratio</th></tr></thead><tbody>{cells}</tbody></table>'
        '<p class="note">A ratio above 1 is in Hyena\'s favour. One picture each, beside whatever else runs here: '
        "sd-hyena benchmark image measures.</p>"
    )


def downloads(teacher: Path, student: Path) -> str:
    """Links to both files, which hold their ``parameters``."""
    links = "".join(
        f'<a href="{url(path)}" download>{who}.png</a>' for who, path in ((TEACHER, teacher), (STUDENT, student))
    )
    return f'<p class="downloads">Download with settings: {links}</p>'


def strip(entries: Sequence[tuple[int, Comparison, Path]], chosen: int | None) -> str:
    """Earlier comparisons, newest first: number, comparison and the student's picture."""
    if not entries:
        return ""
    thumbs = []
    for number, found, path in entries:
        label = f"{found.settings.width} px, {len(found.layers)} Hyena, {found.step_ratio:.2f}x, {found.psnr:.1f} dB"
        title = f"{found.settings.prompt}, seed {found.settings.seed}"
        current = ' aria-current="true"' if number == chosen else ""
        thumbs.append(
            f'<button type="button" data-number="{number}" title="{escape(title, quote=True)}"{current}>'
            f'<img src="{url(path)}" alt=""><span>{label}</span></button>'
        )
    return f'<div class="strip">{"".join(thumbs)}</div>'


def failed(error: Exception) -> str:
    """What went wrong, in one line."""
    known = isinstance(error, SdHyenaError | UsageError)
    return said(one_line(str(error) if known else f"{type(error).__name__}: {reason(error)}"), "error")
