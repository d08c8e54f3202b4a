"""Mutated pictures and captions, as ``prepare --images`` reads them."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from . import child, hostile
from .report import Report

IMAGES, CAPTIONS = 1500, 200
LIMIT = 4.0  # seconds for one picture
COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}


def run(report: Report, scale: float, seed: int) -> None:
    sound = sound_pictures()
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        images = int(IMAGES * scale)
        for number in report.numbers((IMAGES + CAPTIONS) * scale):
            random = report.random(number)
            folder = Path(place, "images")
            folder.mkdir()
            what, refused, names = (_picture if number < images else _caption)(folder, sound, random)
            if random.random() < 0.1:
                argv = ["prepare", "-m", "demo", "--images", str(folder), "-o", f"{place}/data", "--sizes", "64x64"]
                work = child.command([*argv, "-n", "1", "--n_held_out", "1"], load=False)
                refused, names = False, [*names, "images"]  # one picture is too few, whatever it is
            else:
                work = partial(read_all, folder)
            ending = child.call(work, LIMIT)
            report.verdict(
                (1, 2), what, child.judged(ending, limit=LIMIT, names=names, refused=refused), report.again(number)
            )
            shutil.rmtree(folder)


def read_all(folder: Path) -> int:
    """What ``prepare`` does with a folder of pictures before a model has to do with them."""
    from sd_hyena.distill.images import read_rgb
    from sd_hyena.distill.prompts import list_images
    from sd_hyena.errors import SdHyenaError, UsageError
    from sd_hyena.texts import one_line

    child.say()
    try:
        for each in list_images(folder):
            if read_rgb(each.path).size != (each.width, each.height):
                print(f"{each.path.name}: not the size that it was said to have")
                return 3
    except (SdHyenaError, UsageError) as error:
        print(f"sd-hyena: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def sound_pictures() -> list[tuple[str, bytes]]:
    """Small pictures of every format and mode, by suffix."""
    from PIL import Image

    noise = Image.frombytes("RGB", (48, 40), Random(0).randbytes(48 * 40 * 3))
    ways: list[tuple[str, str, dict[str, Any]]] = [
        *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
        ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
        *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB")],
        *[("TIFF", "RGB", {"compression": way}) for way in COMPRESSIONS],
        ("TIFF", "1", {"compression": "group4"}), ("TIFF", "F", {}), ("TIFF", "I", {}),
        ("GIF", "P", {}), ("GIF", "P", {"save_all": True, "append_images": [noise.convert("P")] * 3}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [noise] * 3}),
    ]  # fmt: skip
    made = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (kind, mode, options) in enumerate(ways):
        file = io.BytesIO()
        image = noise.convert("L").convert("I").convert("I;16") if mode == "I;16" else noise.convert(mode)
        image.save(file, kind, **options, **({"exif": exif} if kind == "JPEG" and number % 2 else {}))
        made.append((SUFFIXES[kind], file.getvalue()))
    return made


def _picture(folder: Path, sound: list[tuple[str, bytes]], random: Random) -> tuple[str, bool, list[str]]:
    """Writes a picture and its caption: what it is, whether it must be refused, what a refusal names."""
    suffix, data = random.choice(sound)
    kind = random.choice(("damaged",) * 16 + ("header",) * 4 + ("other", "other", "bomb", "place"))
    if kind == "place":
        suffix = ".png"
        hostile.put_in_place(folder / "x.png", random.choice(hostile.IN_PLACE))
        (folder / "x.txt").write_text("a cat")
        return "pictures: something else in their place", True, ["x.png", "images"]
    if kind == "other":
        what, data = random.choice(sorted((other_pictures() | hostile.other_formats()).items()))
        suffix, refused = random.choice(sorted(SUFFIXES.values())), True
        kind = "another format"
    elif kind == "bomb":
        what, suffix, data = random.choice(bombs(random))
        refused, kind = False, what
    elif kind == "header":
        at = random.randrange(min(len(data), 128))
        size = random.choice((1, 2, 4, 8))
        data = data[:at] + random.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * size + data[at + size :]
        refused = False
        if suffix == ".png":
            data = _with_checksums(data)
    else:
        kind, data = hostile.damaged(data, random)
        refused = kind in ("another format", "noise")
        if suffix == ".png" and random.random() < 0.5:
            data = _with_checksums(data)
    (folder / f"x{suffix}").write_bytes(data)
    (folder / "x.txt").write_text("a cat")
    return f"pictures: {kind}", refused, [f"x{suffix}"]


def _caption(folder: Path, sound: list[tuple[str, bytes]], random: Random) -> tuple[str, bool, list[str]]:
    """A sound picture with a hostile caption or a hostile name."""
    suffix, data = sound[4]
    kind = random.choice(("text", "bytes", "long", "place", "name", "name", "many"))
    stem, names, refused = "x", ["x.txt"], kind == "place"
    caption = folder / "x.txt"
    if kind == "name":
        stem = random.choice(hostile.TEXTS).replace("/", "_").replace("\0", "")[:60] or "y"
        names, caption = ["images"], folder / f"{stem}.txt"
        data = random.choice((data, data[:-30], b"no picture"))
    if kind == "place":
        hostile.put_in_place(caption, random.choice(hostile.IN_PLACE))
        names = ["x.png", "x.txt"]
    elif kind == "bytes":
        caption.write_bytes(hostile.damaged(b"a photograph of a cat\non a chair\n", random)[1])
    elif kind == "long":
        caption.write_bytes(
            random.choice((b"a", b"a ", b" ", b"\n", b"<a:1> ", b"(a:1.", b"[a:", b"(((("))
            * random.choice((10**6, 5 * 10**7))
        )
    elif kind == "many":
        for number in range(random.choice((50, 3000))):
            (folder / f"{number}.heic").touch()
        caption.write_text("a cat")
    else:
        caption.write_bytes(f"a {hostile.text(random)}".encode("utf-8", "surrogatepass"))
    (folder / f"{stem}{suffix}").write_bytes(data)
    return f"captions: {kind}", refused, names


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out, at = out + data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)), at + 12 + length
    return out + data[at:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, bits: int, colour: int, *chunks: bytes, data: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + b"".join(chunks) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    )


def bombs(random: Random) -> list[tuple[str, str, bytes]]:
    """Small files that ask for much: what, suffix, data."""
    zeros = zlib.compress(bytes(1 << 26), 9)
    big = random.choice((13_000, 9_000, 20_000, 65_535, 1 << 20, (1 << 31) - 1))
    long = zlib.compress(bytes((13_000 // 8 + 1) * 13_000), 9)
    text = b"x\0\0" + zeros
    gif = (
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x80\0\0"
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    )
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, big & 0x7FFFFFFF, -(big & 0x7FFFFFFF), 1, 24, 0, 0, 0, 0, 0, 0)
    )
    tags = struct.pack("<HHII", 256, 4, 1, big) + struct.pack("<HHII", 257, 4, 1, big)
    many = b"".join(struct.pack("<HHII", 40_000 + n % 20_000, 2, 0x7FFFFFFF, 8) for n in range(60_000))
    return [
        ("a bomb of one bit", ".png", _png(13_000, 13_000, 1, 0, data=long)),
        ("a bomb of 16 bits", ".png", _png(13_000, 6_500, 16, 0, data=zlib.compress(bytes(26_001 * 6_500), 9))),
        ("a bomb by its header", ".png", _png(big, big, 8, 2, data=zeros)),
        ("one row", ".png", _png(big, 1, 8, 2, data=zeros)),
        ("no rows", ".png", _png(0, 0, 8, 2)),
        ("a bomb in a text", ".png", _png(8, 8, 8, 0, _chunk(b"zTXt", text), data=zlib.compress(bytes(9 * 8)))),
        ("a bomb in a profile", ".png", _png(8, 8, 8, 0, _chunk(b"iCCP", text), data=zlib.compress(bytes(9 * 8)))),
        ("many chunks", ".png", _png(8, 8, 8, 0, *[_chunk(b"tEXt", b"a\0b")] * 100_000, data=zlib.compress(bytes(72)))),
        ("a bomb by its header", ".gif", gif + b"\x02\x02\x4c\x01\x00;"),
        ("a bomb by its header", ".bmp", bmp + bytes(46)),
        ("a bomb by its header", ".tif", b"II*\0\x08\0\0\0\x02\0" + tags + bytes(4)),
        ("tags without end", ".tif", b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + many + struct.pack("<I", 8)),
        ("a directory within itself", ".tif", b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIII", 256, 4, 1, 8, 8)),
        ("a bomb by its header", ".webp", b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8)),
        ("a bomb by its header", ".jpg", b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\x01\x01\x11\0\xff\xd9"),
    ]  # fmt: skip


def other_pictures() -> dict[str, bytes]:
    """Formats that Pillow would read, and some that it starts programs for."""
    from PIL import Image

    image, found = Image.new("RGB", (8, 8)), {}
    for kind in ("PPM", "TGA", "ICO", "PCX", "DDS", "SGI", "IM", "EPS", "PDF", "JPEG2000", "SPIDER", "XBM", "MSP"):
        file = io.BytesIO()
        mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
        try:
            image.convert(mode).save(file, kind)
            found[kind] = file.getvalue()
        except (OSError, KeyError):  # this Pillow was built without it
            continue
    return found | {
        "PSD": b"8BPS\0\1" + bytes(64),
        "FPX": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512),
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(64),
    }
