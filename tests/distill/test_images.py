"""Pictures of every mode teach what they show: each is held to the 8-bit version of itself."""

import contextlib
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile
from safetensors.torch import load_file

from sd_hyena.cli import main
from sd_hyena.distill.images import read_rgb, seen_size
from sd_hyena.distill.prompts import list_images, read_prompts
from sd_hyena.errors import SdHyenaError, UsageError

VALUES = np.linspace(0, 255, 16 * 24).reshape(16, 24).astype(np.uint8)
GREY = Image.fromarray(VALUES)
COLOUR = Image.merge("RGB", (GREY, GREY.rotate(180), Image.new("L", GREY.size, 90)))
MASK = GREY.point(lambda v: 255 if v > 127 else 0)


def over_white(image):
    return np.asarray(Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), MASK))


def shown(path):
    image = read_rgb(path)
    assert image.mode == "RGB"
    assert image.size == seen_size(path)
    return np.asarray(image)


def array(values, kind):
    return Image.fromarray(values.astype(kind))


CASES = {
    "16-bit grey, PNG": (array(VALUES * 257.0, "uint16"), "png", {}),
    "16-bit grey, TIFF": (array(VALUES * 257.0, "uint16"), "tif", {}),
    "16-bit grey, high byte first": (array(VALUES * 257.0, ">u2"), "tif", {}),
    "32-bit integers of 16 bits": (array(VALUES * 257.0, "int32"), "tif", {}),
    "32-bit integers of 8 bits": (array(VALUES, "int32"), "tif", {}),
    "floats to 1": (array(VALUES / 255.0, "float32"), "tif", {}),
    "floats to 255": (array(VALUES, "float32"), "tif", {}),
    "8-bit grey": (GREY, "png", {}),
    "BMP": (GREY, "bmp", {}),
    "GIF": (GREY, "gif", {}),
    "WebP": (GREY.convert("RGB"), "webp", {"lossless": True}),
    "several frames, GIF": (GREY, "gif", {"save_all": True, "append_images": [GREY.rotate(180)] * 2}),
    "several frames, PNG": (GREY, "png", {"save_all": True, "append_images": [GREY.rotate(180)] * 2}),
    "several pages, TIFF": (GREY, "tiff", {"save_all": True, "append_images": [GREY.rotate(180)] * 2}),
}  # fmt: skip


@pytest.mark.compatibility("Prompts and paths", "pictures in greys of 16 and 32 bits, several frames", "works")
@pytest.mark.parametrize("name", CASES)
def test_greys(tmp_path, name):
    image, suffix, options = CASES[name]
    image.save(path := tmp_path / f"x.{suffix}", **options)
    assert (shown(path) == VALUES[..., None]).all()


def test_the_range_that_was_assumed_is_said(tmp_path, caplog):
    array(VALUES / 255.0, "float32").save(tmp_path / "x.tif")
    with caplog.at_level("INFO"):
        read_rgb(tmp_path / "x.tif")
    assert "32-bit greys up to 1: 1 is taken for white" in caplog.text


@pytest.mark.parametrize("values", [VALUES * 1000.0, VALUES * np.nan])
def test_greys_without_a_range_are_refused(tmp_path, values):
    array(values, "float32").save(tmp_path / "x.tif")
    with pytest.raises(SdHyenaError, match=r"x\.tif: cannot be read: its greys go up to (255000|nan)"):
        read_rgb(tmp_path / "x.tif")


@pytest.mark.compatibility("Prompts and paths", "transparent, CMYK, palette and 1-bit pictures", "works; over white")
def test_transparency_becomes_white(tmp_path):
    colour, grey = COLOUR.copy(), GREY.copy()
    colour.putalpha(MASK)
    grey.putalpha(MASK)
    for name, image in (("rgba.png", colour), ("la.png", grey), ("la.tif", grey)):
        image.save(tmp_path / name)
        assert (shown(tmp_path / name) == over_white(image)).all()
    palette = GREY.quantize(16)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255] * 8))
    clear = np.asarray(palette) % 2 == 0
    expected = np.where(clear[..., None], 255, np.asarray(palette.convert("RGB")))
    assert (shown(tmp_path / "p.png") == expected).all()
    key = int(VALUES[3, 5])
    expected = np.where(key == VALUES, 255, VALUES)[..., None]
    GREY.save(tmp_path / "key.png", transparency=key)
    array(VALUES * 257.0, "uint16").save(tmp_path / "key16.png", transparency=key * 257)
    for name in ("key.png", "key16.png"):
        with Image.open(tmp_path / name) as image:
            assert "transparency" in image.info
        assert (shown(tmp_path / name) == expected).all()


def test_other_colours(tmp_path):
    one_bit = GREY.convert("1")
    for suffix in ("png", "tif", "bmp"):
        one_bit.save(path := tmp_path / f"x.{suffix}")
        assert (shown(path) == np.asarray(one_bit.convert("RGB"))).all()
    cmyk = COLOUR.convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    assert (shown(tmp_path / "cmyk.tif") == np.asarray(COLOUR)).all()
    cmyk.save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(shown(tmp_path / "cmyk.jpg").astype(int) - np.asarray(COLOUR)).mean() < 6


def test_a_turned_picture_is_seen_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    array(VALUES * 257.0, "uint16").save(tmp_path / "x.png", exif=exif)
    assert (shown(tmp_path / "x.png") == np.rot90(VALUES, -1)[..., None]).all()


@pytest.mark.compatibility("Prompts and paths", "other kinds of file under a picture's name", "refused in one line")
def test_other_formats_are_refused_whatever_their_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sd_hyena.models.load_pipeline", None)
    for kind in ("EPS", "ICO", "PPM", "TGA", "PDF"):
        COLOUR.save(tmp_path / "x.png", format=kind)
        (tmp_path / "x.txt").write_text("a caption")
        with pytest.raises(UsageError):
            seen_size(tmp_path / "x.png")
        assert main(["prepare", "-m", "demo", "--images", str(tmp_path), "-o", str(tmp_path / "data")]) == 2
        error = capsys.readouterr().err
        assert "x.png: cannot be read as an image (PNG, JPEG, WEBP, BMP, TIFF or GIF)" in error
        assert error.count("\n") == 1


def test_a_folder_of_16_bits_is_prepared_as_one_of_8(tmp_path):
    for bits, kind in ((8, "uint8"), (16, "uint16")):
        folder = tmp_path / f"{bits}"
        folder.mkdir()
        for number in range(2):
            values = np.rot90(VALUES, 2 * number) * (257.0 if bits == 16 else 1.0)
            # One of the names is not UTF-8.
            name = os.fsencode(folder) + (b"/%d" % number if number else b"/caf\xe9")
            array(values, kind).resize((64, 64), Image.Resampling.NEAREST).save(os.fsdecode(name + b".png"))
            with open(name + b".txt", "wb") as caption:
                caption.write(b"\xef\xbb\xbfa gradient")
        small = ["-m", "demo", "--sizes", "64x64", "-n", "1", "--n_held_out", "1"]
        assert main(["prepare", *small, "--images", str(folder), "-o", str(tmp_path / f"data{bits}")]) == 0
    one, other = (load_file(tmp_path / f"data{bits}" / "shards" / "00000.safetensors") for bits in (8, 16))
    assert all((one[name] == other[name]).all() for name in one)


def captioned(folder, *names, caption=".txt"):
    folder.mkdir(exist_ok=True)
    for name in names:
        GREY.save(folder / name, "PNG")
        (folder / name).with_suffix(caption).write_text(f"caption of {name}")
    return folder


@pytest.mark.compatibility("Prompts and paths", "`._a.png` and other dot files in a folder of pictures", "left out")
def test_dot_files_are_nobodys(tmp_path, caplog):
    folder = captioned(tmp_path / "i", "a.png")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")
    (folder / "._a.txt").write_bytes(b"\0")
    (folder / ".DS_Store").write_bytes(b"\0")
    assert [image.path.name for image in list_images(folder)] == ["a.png"]
    assert not caplog.messages


@pytest.mark.compatibility(
    "Prompts and paths", "`.heic`, `.avif`, `.jfif`, subfolders in a folder of pictures", "left out; named in one line"
)
def test_what_else_is_there_is_named(tmp_path, caplog):
    folder = captioned(tmp_path / "i", "a.png")
    for name in ("x.heic", "y.HEIC", "z.avif", "w.jfif", "x.txt", "w.txt"):
        (folder / name).write_bytes(b"?")
    (folder / "10_fox").mkdir()
    assert [image.path.name for image in list_images(folder)] == ["a.png"]
    (line,) = caplog.messages
    for part in ("1 folder (10_fox)", "2 .heic (x.heic)", "1 .avif (z.avif)", "1 .jfif (w.jfif)"):
        assert part in line
    (folder / "a.png").unlink()
    with pytest.raises(UsageError, match=r"holds no png.* file, but 1 folder \(10_fox\)"):
        list_images(folder)


@pytest.mark.reliability(1)
@pytest.mark.parametrize("name", ["b.png", "b.txt"])
def test_a_link_that_leads_to_itself_is_named(tmp_path, name):
    folder = captioned(tmp_path / "i", "b.png")
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(UsageError, match=r"holds no png.* file, but .*b\.(png|txt)|b\.png has no caption in b\.txt"):
        list_images(folder)


@pytest.mark.compatibility("Prompts and paths", "`A.PNG` with `A.TXT` or `a.txt`", "works")
def test_captions_in_any_case(tmp_path):
    folder = captioned(tmp_path / "i", "A.PNG", "b.png", caption=".TXT")
    GREY.save(folder / "C.png")
    (folder / "c.txt").write_text("small")
    (folder / "C.txt").write_text("large")
    found = {image.path.name: image.caption for image in list_images(folder)}
    assert found == {"A.PNG": "caption of A.PNG", "b.png": "caption of b.png", "C.png": "large"}


@pytest.mark.reliability(17)
def test_pictures_too_large_to_read_say_so_by_their_header(tmp_path, monkeypatch):
    header = b"IHDR" + struct.pack(">IIBBBBB", 13000, 13000, 1, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(13000))]
    data = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("was decoded"))
    for read, kind in ((seen_size, UsageError), (read_rgb, SdHyenaError)):
        with pytest.raises(kind, match=r"x\.png: has more pixels than the 67108864 \(8192x8192\) that are read"):
            read(tmp_path / "x.png")


@pytest.mark.reliability(3)
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif", "x.gif", "x.bmp"])
def test_what_is_named_a_picture_starts_no_program(tmp_path, monkeypatch, name):
    """Pillow has Ghostscript draw an EPS, whatever it is called; and reads many formats that nobody means."""
    from sd_hyena.share.samples import read_sheet

    started = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *args, **options: started.append(args))
    monkeypatch.setattr(os, "system", started.append)
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n")
    for read in (seen_size, read_rgb, read_sheet):
        with pytest.raises((UsageError, SdHyenaError), match="cannot be read as an image"):
            read(tmp_path / name)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    with contextlib.suppress(Exception):  # Pillow as it is
        Image.open(tmp_path / name).load()
    assert len(started) == 1


@pytest.mark.reliability(16, 17)
def test_captions_and_prompts_that_nobody_means_are_refused(tmp_path, capsys):
    folder = captioned(tmp_path / "i", "a.png")
    (folder / "a.txt").write_text("word " * 2500)
    with pytest.raises(UsageError, match=r"a\.txt: is 12,499 characters long, but a prompt may have 10,000"):
        list_images(folder)
    with open(folder / "a.txt", "wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(UsageError, match=r"a\.txt: is larger than 1 MiB, which is no caption"):
        list_images(folder)
    (tmp_path / "p.txt").write_text("a fox\n\n" + "x" * 10_001)
    with pytest.raises(UsageError, match=r"p\.txt: line 3: is 10,001 characters long"):
        read_prompts(str(tmp_path / "p.txt"))
    assert main(["generate", "-m", "demo", "-p", "x" * 10_001]) == 2
    assert "--prompt: is 10,001 characters long" in capsys.readouterr().err


def test_what_only_decoding_shows_is_seen_at_once(tmp_path):
    Image.effect_noise((256, 256), 60).convert("RGB").save(path := tmp_path / "torn.jpg")
    path.write_bytes(path.read_bytes()[:3000])
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    for name, problem in (("torn.jpg", "truncated"), ("nan.tif", "greys go up to nan")):
        with pytest.raises(UsageError, match=f"image .*{name}: cannot be read: .*{problem}"):
            seen_size(tmp_path / name)
