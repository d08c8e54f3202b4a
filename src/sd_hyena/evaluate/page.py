"""Parts of a report that is one HTML file and opens by itself, pictures included."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 } th, td { padding: .25rem .6rem; text-align: right }
td { white-space: nowrap }
th { border-bottom: 1px solid #999; font-weight: 600 } td:first-child, th:first-child { text-align: left }
.pairs { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(calc(var(--abreast) * 7.5rem), 1fr)) }
.pair div { display: flex; gap: 3px } .pair img { flex: 1; min-width: 0 }
.pair p { margin: .2rem 0; font-size: .85rem; color: #444 }
.key { display: flex; gap: 1rem 2rem; flex-wrap: wrap } .key div { font-size: .9rem; color: #555 }
.key b { display: block; font-size: 1.7rem; color: #222 } img.plot { max-width: 100% } code { background: #f2f2f2 }
.note { color: #555; font-size: .9rem; margin: .2rem 0 } .wide { overflow-x: auto }
"""


def page(title: str, *parts: str) -> str:
    """A whole document; ``parts`` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def keys(figures: Iterable[tuple[str, str]]) -> str:
    """Large figures side by side, each with what it is."""
    each = (f"<div><b>{html.escape(value)}</b>{html.escape(what)}</div>" for value, what in figures)
    return f'<div class="key">{"".join(each)}</div>'


def pairs(items: Iterable[tuple[Sequence[Image.Image], str]]) -> str:
    """Groups of pictures side by side, each group over its caption; all groups have as many."""
    groups, abreast = [], 2
    for images, caption in items:
        abreast = len(images)
        shown = "".join(f'<img alt="" src="{png(image)}">' for image in images)
        groups.append(f'<div class="pair"><div>{shown}</div><p>{html.escape(caption)}</p></div>')
    return f'<div class="pairs" style="--abreast: {abreast}">{"".join(groups)}</div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def png(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return inline(buffer.getvalue(), "image/png")


def inline(data: bytes, kind: str) -> str:
    """A file's contents, of MIME type ``kind``, as an address that holds it."""
    return f"data:{kind};base64," + base64.b64encode(data).decode()
