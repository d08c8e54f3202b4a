"""Draws what stands behind a subject: plain colours, and nine textures that a caption can name.

Everything is drawn by code; phases, tints and details vary from picture to picture. A texture has structure
beyond flat regions, so that neighbouring cells of a latent tell about each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.float32]  # (size, size, 3), 0 to 255


def draw_ground(name: str, size: int, scale: float, rng: np.random.Generator) -> Image.Image:
    """An RGB picture, ``size`` px square, of the ground called ``name``; ``scale`` 1 suits pictures of 256 px."""
    if name in _COLOURS:
        picture = np.full((size, size, 3), _COLOURS[name], np.float32)
    else:
        picture = _TEXTURES[name](size, scale, rng)
    picture += rng.uniform(-6, 6, 3)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _noise(size: int, cell: tuple[float, float], rng: np.random.Generator, octaves: int = 3) -> NDArray[np.float32]:
    """Smooth noise of about unit range; ``cell`` is its coarsest grain (down, across) in px, halved per octave."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        rows, columns = (max(2, round(size * 2**octave / c) + 1) for c in cell)
        coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
        total += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) * 0.5**octave
    return total


def _axes(size: int, scale: float, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Rows and columns in units of ``scale`` px, from a random origin."""
    y, x = rng.uniform(0, 1000, 2)
    steps = np.arange(size, dtype=np.float32) / scale
    return (steps + y)[:, None], (steps + x)[None, :]


def _blend(low: tuple, high: tuple, share: NDArray) -> Picture:
    """Colour ``low`` where ``share`` is 0, ``high`` where it is 1."""
    return _mix(np.asarray(low, np.float32), np.asarray(high, np.float32), np.clip(share, 0, 1).astype(np.float32))


def _mix(low: NDArray, high: NDArray, share: NDArray) -> Picture:
    return (low * (1 - share[..., None]) + high * share[..., None]).astype(np.float32)


def _edge(distance: NDArray) -> NDArray:
    """0 to 1 within a pixel and a half: edges without jags."""
    return np.clip(distance / 1.5 + 0.5, 0, 1)


def _bricks(size: int, scale: float, rng: np.random.Generator) -> Picture:
    y, x = _axes(size, scale, rng)
    row = np.floor(y / 24)
    across = x + 24 * (row % 2)
    inside = np.minimum(np.minimum(y % 24, 24 - y % 24), np.minimum(across % 48, 48 - across % 48))
    tints = rng.uniform(-1, 1, (97, 89))
    tint = tints[(row % 97).astype(int), (np.floor(across / 48) % 89).astype(int)]
    bricks = np.asarray((168, 78, 58), np.float32) + 16 * tint[..., None] * np.asarray((1, 0.8, 0.7))
    return _mix(np.asarray((214, 202, 188), np.float32), bricks, _edge((inside - 2.2) * scale))


def _stripes(size: int, scale: float, rng: np.random.Generator) -> Picture:
    y, x = _axes(size, scale, rng)
    wave = np.minimum(x % 40, 40 - x % 40) - 10 + 0 * y
    return _blend((250, 238, 222), (226, 112, 140), _edge(wave * scale))


def _checks(size: int, scale: float, rng: np.random.Generator) -> Picture:
    y, x = _axes(size, scale, rng)
    down, across = (np.minimum(a % 64, 64 - a % 64) - 16 for a in (y, x))
    a, b = _edge(down * scale), _edge(across * scale)
    return _blend((222, 236, 232), (58, 146, 150), a + b - 2 * a * b)


def _wood(size: int, scale: float, rng: np.random.Generator) -> Picture:
    y, _ = _axes(size, scale, rng)
    grain = _noise(size, (14 * scale, 220 * scale), rng)
    plank = (np.floor(y / 52) % 31).astype(int)
    tint = rng.uniform(-0.35, 0.35, 31)[plank]
    picture = _blend((128, 80, 42), (206, 150, 92), 0.55 + 0.3 * grain + tint)
    gap = np.minimum(y % 52, 52 - y % 52) - 1.2 + 0 * grain
    return _mix(np.asarray((74, 44, 24), np.float32), picture, _edge(gap * scale))


def _grass(size: int, scale: float, rng: np.random.Generator) -> Picture:
    blades = _noise(size, (40 * scale, 9 * scale), rng, octaves=2)
    return _blend((34, 92, 30), (142, 196, 70), 0.5 + 0.4 * blades + 0.12 * _noise(size, (90, 90), rng, 1))


def _sand(size: int, scale: float, rng: np.random.Generator) -> Picture:
    y, x = _axes(size, scale, rng)
    ripples = np.sin((y + 0.25 * x + 9 * _noise(size, (120 * scale, 120 * scale), rng, 2)) * 2 * np.pi / 22)
    return _blend((198, 164, 112), (240, 216, 168), 0.5 + 0.32 * ripples + 0.1 * _noise(size, (9, 9), rng, 1))


def _water(size: int, scale: float, rng: np.random.Generator) -> Picture:
    y, x = _axes(size, scale, rng)
    swell = _noise(size, (36 * scale, 110 * scale), rng, 2)
    waves = np.sin((y + 12 * swell) * 2 * np.pi / 30 + 0 * x)
    return _blend((18, 92, 156), (150, 222, 236), 0.3 + 0.22 * waves + 0.5 * np.clip(waves - 0.6, 0, 1) + 0.1 * swell)


def _night(size: int, scale: float, rng: np.random.Generator) -> Picture:
    picture = _blend((10, 14, 46), (44, 40, 104), 0.4 + 0.5 * _noise(size, (150 * scale, 150 * scale), rng, 2))
    y, x = np.mgrid[:size, :size].astype(np.float32)
    for _ in range(round(34 * (size / scale / 256) ** 2)):
        radius = rng.uniform(1.2, 2.6) * scale
        cy, cx = rng.uniform(0, size, 2)
        top, left = max(0, int(cy) - 6), max(0, int(cx) - 6)
        patch = slice(top, top + 13), slice(left, left + 13)
        light = np.exp(-(((y[patch] - cy) ** 2 + (x[patch] - cx) ** 2) / radius**2))[..., None]
        picture[patch] += light * (np.asarray((255, 250, 220)) - picture[patch])
    return picture


def _clouds(size: int, scale: float, rng: np.random.Generator) -> Picture:
    cover = _noise(size, (80 * scale, 130 * scale), rng, 4)
    return _blend((92, 162, 226), (248, 250, 252), 0.5 + 1.1 * cover)


_COLOURS = {
    "red": (214, 48, 49),
    "orange": (245, 146, 40),
    "yellow": (250, 215, 70),
    "green": (46, 160, 80),
    "blue": (52, 110, 219),
    "purple": (130, 70, 185),
    "gray": (140, 145, 150),
    "black": (28, 28, 32),
}
_TEXTURES = {
    "bricks": _bricks,
    "stripes": _stripes,
    "checks": _checks,
    "wood": _wood,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "night sky": _night,
    "clouds": _clouds,
}
