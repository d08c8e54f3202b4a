"""The page in a real browser: Debian's Chromium, driven by playwright."""

import io
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from sd_hyena.cli import main

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'sd-hyena[ui]'")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by playwright: pip install playwright"
)
CHROMIUM = os.environ.get("SD_HYENA_CHROMIUM") or shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("there is no Chromium (apt-get install chromium), or SD_HYENA_CHROMIUM", allow_module_level=True)
SECONDS = 1000  # ms
expect = sync_api.expect
expect.set_options(timeout=20 * SECONDS)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page at a width; in the end nothing has gone wrong in it, and nothing elsewhere was asked for."""
    contexts, errors, asked = [], [], []

    def open_page(width=1200, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page.locator(".chips:visible")).to_have_count(4)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert len(asked) > 10
    ours = {urlsplit(address).netloc}
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == ours


@pytest.fixture
def page(opened):
    return opened()


def fill(page, steps=2, side=128, **more):
    for name, value in ({"steps": steps, "width": side, "height": side} | more).items():
        page.locator(f"#{name} input, #{name} textarea").fill(str(value))


def ticked(page):
    return page.locator(".chips input:checked").count()


def draw(page):
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text("Done.", timeout=60 * SECONDS)


def seen(page):
    """What is on the canvas."""
    return page.evaluate("document.querySelector('#viewer canvas').toDataURL()")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_drawing(page, tmp_path):
    fill(page, seed=7, prompt="a (fox:1.2)")
    draw(page)
    expect(page.locator("#status")).to_have_text(
        "Done. (fox:1.2): drawn literally, as words: A1111's signs are not read"
    )
    expect(page.locator(".figures tbody tr")).to_have_count(4)
    expect(page.locator(".verdict")).to_contain_text("128 x 128 px")
    expect(page.locator(".alike")).to_contain_text("dB PSNR")
    views = {}
    for name in ("Slider", "Side by side", "Difference", "Blink"):
        press(page, name)
        views[name] = seen(page)
    page.locator("#heading").click()
    page.keyboard.press("Space")  # the other one
    views["attention"] = seen(page)
    assert len(set(views.values())) == 5
    press(page, "Difference")
    page.locator(".dial input").fill("16")
    assert seen(page) != views["Difference"]
    for name in ("attention", "Hyena"):
        with page.expect_download() as found:
            page.get_by_role("link", name=f"{name}.png").click()
        picture = Image.open(io.BytesIO(found.value.path().read_bytes()))
        assert picture.size == (128, 128)
        assert "Steps: 2, Sampler: DDIM, CFG scale: 7, Seed: 7, Size: 128x128" in picture.text["parameters"]
        assert ("Hyena layers: IN01" in picture.text["parameters"]) == (name == "Hyena")
        assert found.value.suggested_filename.startswith(f"{name.lower()}-128x128-seed-7-")


def test_layers_and_a_teacher_that_is_kept(page):
    fill(page, seed=8)
    assert ticked(page) == 16
    press(page, "High")
    expect(page.locator(".chips input:checked")).to_have_count(5)
    page.locator(".chips label", has_text="OUT11").click()
    expect(page.locator(".chips input:checked")).to_have_count(4)
    draw(page)
    first = page.locator(".figures tbody tr").first.locator("td").first.inner_text()
    press(page, "None")
    expect(page.locator(".chips input:checked")).to_have_count(0)
    page.locator("#draw").click()
    expect(page.locator("#status [role=alert]")).to_have_text("no layer is chosen: choose at least one for Hyena")
    page.locator(".chips label", has_text="M00").click()
    draw(page)
    assert page.locator(".figures tbody tr").first.locator("td").first.inner_text() == first
    expect(page.locator(".verdict")).to_contain_text("1 Hyena layer,")


def test_cancelling(page):
    fill(page, steps=400)
    page.locator("#draw").click()
    expect(page.locator("#status progress")).to_be_visible()
    expect(page.locator("#draw")).to_be_disabled()
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("cancelled: attention, step")
    expect(page.locator("#draw")).to_be_enabled()
    expect(page.locator("#cancel")).to_be_disabled()
    fill(page)
    draw(page)


def test_a_page_does_not_wait_for_one_that_is_gone(opened):
    gone = opened()
    fill(gone, steps=1000)
    gone.locator("#draw").click()
    expect(gone.locator("#status progress")).to_be_visible()
    gone.close()
    page = opened()
    fill(page)
    draw(page)


def drop(page, path):
    page.locator("#drop input[type=file]").set_input_files(str(path))


def test_a_dropped_picture_fills_the_form(page, tmp_path):
    words = [
        "-p",
        "a <b>bird</b>, grass",
        "-q",
        "red",
        "-W",
        "72",
        "-H",
        "64",
        "-s",
        "3",
        "-c",
        "4.5",
        "-k",
        "2147483650",
    ]
    assert (
        main(["generate", "-m", "demo", *words, "-n", "1", "-y", "demo", "-t", "M00,OUT11", "-o", str(tmp_path)]) == 0
    )
    drop(page, tmp_path / "image_000.png")
    expect(page.locator("#status")).to_contain_text("The picture's settings are in the form.")
    expect(page.locator("#prompt textarea")).to_have_value("a <b>bird</b>, grass")
    for name, value in (("seed", "2147483650"), ("steps", "3"), ("width", "72"), ("height", "64")):
        expect(page.locator(f"#{name} input, #{name} textarea")).to_have_value(value)
    expect(page.locator(".chips input:checked")).to_have_count(2)
    draw(page)
    with page.expect_download() as found:
        page.get_by_role("link", name="Hyena.png").click()
    again, before = Image.open(found.value.path()), Image.open(tmp_path / "image_000.png")
    assert again.text == before.text
    assert list(again.getdata()) == list(before.getdata())


def test_files_from_the_folder_and_dropped_ones(page, hyena_dir, tmp_path):
    page.locator("#hyena input").click()
    page.get_by_role("option", name="two.safetensors").click()
    expect(page.locator(".chips:visible label")).to_have_count(2)
    page.locator("#hyena input").click()
    page.get_by_role("option", name="broken.safetensors").click()
    expect(page.locator("#status [role=alert]")).to_contain_text("broken.safetensors: ")
    expect(page.locator(".chips:visible")).to_have_count(0)
    own = shutil.copy(hyena_dir / "two.safetensors", tmp_path / "own.safetensors")
    drop(page, own)
    expect(page.locator("#status")).to_contain_text("own.safetensors is chosen.")
    expect(page.locator("#hyena input")).to_have_value("own.safetensors (dropped)")
    fill(page, side=64)
    draw(page)
    expect(page.locator(".verdict")).to_contain_text("2 Hyena layers,")
    drop(page, hyena_dir / "broken.safetensors")
    expect(page.locator("#status [role=alert]")).to_contain_text("broken.safetensors: ")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    drop(page, tmp_path / "plain.png")
    expect(page.locator("#status [role=alert]")).to_contain_text("plain.png: says nothing of how it was drawn")


def test_history(page):
    for seed in (21, 22):
        fill(page, side=64, seed=seed)
        draw(page)
    latest = page.locator(".strip button").first
    expect(latest).to_have_attribute("aria-current", "true")
    expect(latest).to_have_attribute("title", "a fox on the left, brick wall, seed 22")
    page.locator(".strip button").nth(1).click()
    expect(page.locator(".downloads a").first).to_have_attribute("href", re.compile("/attention-64x64-seed-21-"))
    expect(page.locator(".strip button").nth(1)).to_have_attribute("aria-current", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_it_fits(opened, tmp_path, width, scheme):
    """SD_HYENA_SCREENSHOTS names a folder where pictures of the page go."""
    page = opened(width, color_scheme=scheme)
    fill(page, side=128)
    draw(page)
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [b.bounding_box() for b in page.locator(".chips label:visible, #draw, #cancel, .modes button").all()]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a["x"] + a["width"] <= b["x"] + 1 or b["x"] + b["width"] <= a["x"] + 1
            assert apart or a["y"] + a["height"] <= b["y"] + 1 or b["y"] + b["height"] <= a["y"] + 1
    folder = Path(os.environ.get("SD_HYENA_SCREENSHOTS") or tmp_path)
    page.screenshot(path=folder / f"{width}-{scheme}.png", full_page=True)
