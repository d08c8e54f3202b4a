"""What the bundled teacher can draw: subjects, grounds and places, and the captions that ask for them.

A *scene* is one caption-picture pair. One combination of subject and ground in six is never shown in
training; prompts made from those combinations are the held-out prompts every figure is measured on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SUBJECTS: dict[str, str] = {
    # name: plural
    "penguin": "penguins",
    "pig": "pigs",
    "frog": "frogs",
    "fox": "foxes",
    "panda": "pandas",
    "chick": "chicks",
    "octopus": "octopuses",
    "cactus": "cacti",
    "mushroom": "mushrooms",
    "apple": "apples",
    "sunflower": "sunflowers",
    "strawberry": "strawberries",
}

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "gray", "black")

TEXTURES: dict[str, str] = {
    # name: what a caption calls it
    "bricks": "brick wall",
    "stripes": "striped wall",
    "checks": "checkered floor",
    "wood": "wooden planks",
    "grass": "grass",
    "sand": "sand",
    "water": "water",
    "night sky": "night sky",
    "clouds": "cloudy sky",
}

GROUNDS: dict[str, str] = {colour: f"{colour} background" for colour in COLOURS} | TEXTURES

PLACES: dict[str, str] = {
    "left": "{one} on the left, {ground}",
    "right": "{one} on the right, {ground}",
    "top": "{one} at the top, {ground}",
    "bottom": "{one} at the bottom, {ground}",
    "centre": "{one} in the center, {ground}",
    "two": "two {many}, {ground}",
}


@dataclass(frozen=True)
class Scene:
    """One thing to draw: a subject, the ground behind it, and where (or how many times) it stands."""

    subject: str
    ground: str
    place: str

    @property
    def caption(self) -> str:
        return PLACES[self.place].format(one=self.one, many=SUBJECTS[self.subject], ground=GROUNDS[self.ground])

    @property
    def one(self) -> str:
        """The subject with its article."""
        return f"{'an' if self.subject[0] in 'aeiou' else 'a'} {self.subject}"

    @property
    def held_out(self) -> bool:
        """True for the one combination of subject and ground in six that training never shows."""
        s, g = list(SUBJECTS).index(self.subject), list(GROUNDS).index(self.ground)
        return (s * 5 + g) % 6 == 0


def all_scenes() -> list[Scene]:
    return [Scene(s, g, place) for s in SUBJECTS for g in GROUNDS for place in PLACES]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """``count`` scenes whose subject and ground were never shown together in training, in a fixed shuffled order.

    Neighbours in the list differ in subject, ground and place as far as possible.
    """
    scenes = [scene for scene in all_scenes() if scene.held_out]
    random.Random(seed).shuffle(scenes)
    chosen: list[Scene] = []
    while scenes and len(chosen) < count:
        used = chosen[-6:]
        best = min(
            scenes,
            key=lambda s: sum(
                (s.subject == u.subject) * 2 + (s.ground == u.ground) + (s.place == u.place) for u in used
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
