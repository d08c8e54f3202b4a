"""What the bundled teacher can draw: subjects, grounds and layouts, and the captions that ask for them.

A *scene* is one caption-picture pair. One combination of subject and ground in six is never shown in
training; prompts made from those combinations are the held-out prompts every figure is measured on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SUBJECTS: dict[str, tuple[str, str]] = {
    # name: (plural, the character drawn)
    "penguin": ("penguins", "\N{PENGUIN}"),
    "pig": ("pigs", "\N{PIG FACE}"),
    "frog": ("frogs", "\N{FROG FACE}"),
    "fox": ("foxes", "\N{FOX FACE}"),
    "panda": ("pandas", "\N{PANDA FACE}"),
    "chick": ("chicks", "\N{FRONT-FACING BABY CHICK}"),
    "octopus": ("octopuses", "\N{OCTOPUS}"),
    "cactus": ("cacti", "\N{CACTUS}"),
    "mushroom": ("mushrooms", "\N{MUSHROOM}"),
    "apple": ("apples", "\N{RED APPLE}"),
    "sunflower": ("sunflowers", "\N{SUNFLOWER}"),
    "strawberry": ("strawberries", "\N{STRAWBERRY}"),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (245, 146, 40),
    "yellow": (250, 215, 70),
    "green": (46, 160, 80),
    "blue": (52, 110, 219),
    "purple": (130, 70, 185),
    "gray": (140, 145, 150),
    "black": (28, 28, 32),
}

LAYOUTS: dict[str, str] = {
    "left": "{one} on the left, {colour} background",
    "right": "{one} on the right, {colour} background",
    "top": "{one} at the top, {colour} background",
    "bottom": "{one} at the bottom, {colour} background",
    "centre": "{one} in the center, {colour} background",
    "two": "two {many}, {colour} background",
}


@dataclass(frozen=True)
class Scene:
    """One thing to draw: a subject, the colour behind it, and where (or how many times) it stands."""

    subject: str
    colour: str
    layout: str

    @property
    def caption(self) -> str:
        many, _ = SUBJECTS[self.subject]
        one = f"{'an' if self.subject[0] in 'aeiou' else 'a'} {self.subject}"
        return LAYOUTS[self.layout].format(one=one, many=many, colour=self.colour)

    @property
    def held_out(self) -> bool:
        """True for the sixteen subject/colour combinations that training never shows."""
        s, c = list(SUBJECTS).index(self.subject), list(COLOURS).index(self.colour)
        return (s * 5 + c) % 6 == 0


def all_scenes() -> list[Scene]:
    return [Scene(s, c, place) for s in SUBJECTS for c in COLOURS for place in LAYOUTS]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """``count`` scenes whose subject/colour combination was never trained on, in a fixed shuffled order.

    Neighbours in the list differ in subject, colour and layout as far as possible.
    """
    scenes = [scene for scene in all_scenes() if scene.held_out]
    random.Random(seed).shuffle(scenes)
    chosen: list[Scene] = []
    while scenes and len(chosen) < count:
        used = chosen[-6:]
        best = min(
            scenes,
            key=lambda s: sum(
                (s.subject == u.subject) * 2 + (s.colour == u.colour) + (s.layout == u.layout) for u in used
            ),
        )
        scenes.remove(best)
        chosen.append(best)
    return chosen


def training_prompts() -> list[str]:
    """Every caption the teacher was trained on; students learn from pictures it draws for these."""
    return [scene.caption for scene in all_scenes() if not scene.held_out]


def parse_caption(caption: str) -> Scene:
    """The scene a caption asks for. Raises ValueError if it is not one of the captions above."""
    for scene in all_scenes():
        if scene.caption == caption:
            return scene
    raise ValueError(f"not a caption of the bundled model: {caption!r}")
