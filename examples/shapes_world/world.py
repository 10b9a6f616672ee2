"""The shapes world: small images with exact captions, and everything that may be asked of them.

An `Ask` is what a caption says (so many objects of this colour and shape, in this relation), in one of several
phrasings. `Ask.scene` draws a scene in which it is true, `Ask.negatives` lists captions that differ in one thing and
are false there. Seven skills, the six of GenEval's table (arXiv 2310.11513) and longer sentences:

    single_object  "a circle"                      counting   "three red squares"
    colors         "a red circle"                  position   "a circle left of a blue square"
    two_object     "a circle and a square"         color_attr "a red circle and a blue square"
    long           "two red circles and a blue square", "a red circle above a blue square and a cross"

Images are 32 x 32 RGB. Coordinates are pixels, x to the right and y downwards.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

SIZE = 32
COLORS = {
    "red": (217, 38, 38),
    "green": (38, 160, 64),
    "blue": (38, 76, 217),
    "yellow": (240, 200, 20),
    "purple": (150, 50, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}  # each with its opposite
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "long")
CELLS = 3  # things stand in the cells of a 3 x 3 grid, a little off the middle
_RADII, _JITTER = (4.0, 4.4), 0.3
_FREE_RADII = (3.8, 5.2)
RELATION_MARGIN = 2.0  # pixels by which a drawn relation holds more along its axis than across it
_GAP, _FREE_GAP = 0.8, 2.0  # pixels between the circles around any two objects
_OVERSAMPLING = 8

_FRAMES = ("{}", "drawing of {}", "there is {}")
_PLURAL_FRAMES = ("{}", "drawing of {}", "there are {}")
EVERYDAY, EXACT = (0, 1), (2,)  # frames: as people ask, and as the captions that are always true are written
_RELATION_WORDS = {
    "left": ("left of", "west of"),
    "right": ("right of", "east of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Thing:
    """One object of an image.

    Attributes:
        color: A key of `COLORS`.
        shape: One of `SHAPES`.
        x: Its centre.
        y: Its centre.
        radius: Of the circle around it.
    """

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Want:
    """So many objects of one kind; None leaves the colour open."""

    count: int
    color: str | None
    shape: str

    def fits(self, thing: Thing) -> bool:
        """Returns whether a thing is of this kind."""
        return thing.shape == self.shape and self.color in (None, thing.color)

    def words(self) -> str:
        """Returns it as words, such as "two red circles"."""
        plural = "" if self.count == 1 else "es" if self.shape.endswith("ss") else "s"
        return " ".join(filter(None, (NUMBERS[self.count], self.color, self.shape + plural)))


@dataclass(frozen=True)
class Ask:
    """What a caption says.

    Attributes:
        skill: One of `SKILLS`.
        wants: What must be there, and nothing else.
        relation: The first want's object is so to the second's; a key of `RELATIONS`.
        phrasing: Which of the ways to say it: twice the frame, plus which words stand for the relation.
    """

    skill: str
    wants: tuple[Want, ...]
    relation: str | None = None
    phrasing: int = 0

    @property
    def caption(self) -> str:
        """The sentence."""
        words = [want.words() for want in self.wants]
        if self.relation is not None:
            phrases = _RELATION_WORDS[self.relation]
            words = [f"{words[0]} {phrases[self.phrasing % len(phrases)]} {words[1]}", *words[2:]]
        said = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
        frames = _FRAMES if self.wants[0].count == 1 else _PLURAL_FRAMES
        return frames[self.phrasing // 2 % len(frames)].format(said)

    def rephrased(self, rng: np.random.Generator, frames: Sequence[int] = EVERYDAY) -> "Ask":
        """Returns the same, said in a random way: in one of the frames, with either words for the relation."""
        return replace(self, phrasing=2 * int(rng.choice(frames)) + int(rng.integers(2)))

    def exactly(self) -> "Ask":
        """Returns the same in the exact phrasing, with the same words for the relation."""
        return replace(self, phrasing=2 * EXACT[0] + self.phrasing % 2)

    def true_of(self, things: Sequence[Thing]) -> bool:
        """Returns whether the caption is exactly true: all that it says and nothing beside it."""
        if len(things) != sum(want.count for want in self.wants):
            return False
        # Which want each thing answers; at most 4! orders of at most 4 things.
        slots = [index for index, want in enumerate(self.wants) for _ in range(want.count)]
        for order in set(itertools.permutations(slots)):
            if all(self.wants[slot].fits(thing) for slot, thing in zip(order, things, strict=True)):
                if self.relation is None:
                    return True
                first, second = (things[order.index(index)] for index in (0, 1))
                if related(first, second, self.relation):
                    return True
        return False

    def scene(self, rng: np.random.Generator, *, free: bool = False) -> list[Thing]:
        """Draws things of which the caption is true; what it leaves open is random.

        Args:
            rng: Random numbers.
            free: Things are larger and stand anywhere instead of in the cells of the grid.
        """
        while True:
            things = _placed([want for want in self.wants for _ in range(want.count)], rng, free)
            if things is not None and self.true_of(things) and self._clearly_related(things):
                return things

    def _clearly_related(self, things: Sequence[Thing]) -> bool:
        return self.relation is None or related(things[0], things[1], self.relation, margin=RELATION_MARGIN)

    def false_of(self, things: Sequence[Thing], rng: np.random.Generator) -> "Ask | None":
        """Draws an ask that differs from this one in one thing and is false of a scene; None where there is none."""
        others = [other for asks in self.negatives().values() for other in asks]
        return next((others[i] for i in rng.permutation(len(others)) if not others[i].true_of(things)), None)

    def negatives(self) -> dict[str, list["Ask"]]:
        """Returns every ask that differs in one thing, by what differs.

        `attribute`: a colour or shape is another; `number`: one more or one less; `relation`: another one; `swap`: two
        of the wants exchange number, colour or shape. Some may be true of an image all the same, where the ask leaves
        things open; `true_of` tells.
        """
        wants, pairs = self.wants, itertools.combinations(range(len(self.wants)), 2)
        found = {
            "attribute": [self._with({i: new}) for i, want in enumerate(wants) for new in _other_kinds(want)],
            "number": [self._with({i: new}) for i, want in enumerate(wants) for new in _other_numbers(want)],
            "relation": [replace(self, relation=other) for other in RELATIONS if self.relation not in (None, other)],
            "swap": [
                self._with({i: replace(wants[i], **{name: there}), j: replace(wants[j], **{name: here})})
                for i, j in pairs
                for name in ("count", "color", "shape")
                if (here := getattr(wants[i], name)) != (there := getattr(wants[j], name))
            ],
        }
        return {
            kind: [ask for ask in asks if sum(want.count for want in ask.wants) <= 4] for kind, asks in found.items()
        }

    def _with(self, wants: dict[int, Want]) -> "Ask":
        return replace(self, wants=tuple(wants.get(index, want) for index, want in enumerate(self.wants)))


def related(first: Thing, second: Thing, relation: str, margin: float = 0.0) -> bool:
    """Returns whether `first` is so to `second`: along its axis more than across it, by a margin in pixels."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > abs(across) + margin


def random_ask(rng: np.random.Generator, skill: str | None = None) -> Ask:
    """Draws an ask, of any skill unless told."""
    skill = skill or SKILLS[rng.integers(len(SKILLS))]
    color = [str(c) for c in rng.choice(list(COLORS), size=3)]
    shape = [str(s) for s in rng.choice(SHAPES, size=3)]
    distinct = [str(s) for s in rng.permutation(SHAPES)]
    relation = None
    if skill == "single_object":
        wants = (Want(1, None, shape[0]),)
    elif skill == "colors":
        wants = (Want(1, color[0], shape[0]),)
    elif skill == "two_object":
        wants = (Want(1, None, distinct[0]), Want(1, None, distinct[1]))
    elif skill == "counting":
        wants = (Want(int(rng.integers(2, 5)), color[0] if rng.random() < 0.5 else None, shape[0]),)
    elif skill == "position":
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        colors = color if rng.random() < 0.5 else [None, None]
        wants = (Want(1, colors[0], distinct[0]), Want(1, colors[1], distinct[1]))
    elif skill == "color_attr":
        wants = _two_kinds(rng)
    elif skill == "long" and rng.random() < 0.5:
        first, second = _two_kinds(rng)
        wants = (replace(first, count=2), second) if rng.random() < 0.5 else (first, replace(second, count=2))
    elif skill == "long":
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        wants = (Want(1, color[0], distinct[0]), Want(1, color[1], distinct[1]), Want(1, None, distinct[2]))
    else:
        raise ValueError(f"skill must be one of {', '.join(SKILLS)}, but is {skill!r}")
    return Ask(skill, wants, relation).rephrased(rng)


def ask_of(caption: str) -> Ask | None:
    """Returns what a caption says, the inverse of `Ask.caption`; None where it says something else.

    Case and spaces do not matter. More than four things are something else: captions name at most four.
    """
    text = " ".join(caption.lower().replace(",", " , ").rstrip(" .").split())
    for number, frames in enumerate(zip(_FRAMES, _PLURAL_FRAMES, strict=True)):
        start = next((frame.replace("{}", "") for frame in frames if text.startswith(frame.replace("{}", ""))), None)
        if start is not None and (ask := _ask_of(text.removeprefix(start), number)) is not None:
            return ask
    return None


def _ask_of(said: str, frame: int) -> Ask | None:
    first, *others = said.replace(" and ", " , ").split(" , ")
    relation, wording = None, 0
    for name, phrases in _RELATION_WORDS.items():
        for place, phrase in enumerate(phrases):
            if f" {phrase} " in first:
                relation, wording = name, place
                first, second = first.split(f" {phrase} ", 1)
                others.insert(0, second)
    found = [_want_of(words) for words in (first, *others)]
    wants = [want for want in found if want is not None]
    if len(wants) < len(found) or sum(want.count for want in wants) > max(NUMBERS):
        return None
    if relation is not None and wants[0].count + wants[1].count > 2:
        return None
    return Ask(_skill_of(wants, relation), tuple(wants), relation, 2 * frame + wording)


def _want_of(words: str) -> Want | None:
    kinds = (Want(count, color, shape) for count in NUMBERS for color in (None, *COLORS) for shape in SHAPES)
    return next((want for want in kinds if want.words() == words), None)


def _skill_of(wants: Sequence[Want], relation: str | None) -> str:
    things = sum(want.count for want in wants)
    if len(wants) == 1:
        return "counting" if things > 1 else "single_object" if wants[0].color is None else "colors"
    if len(wants) > 2 or things > 2:
        return "long"
    return "position" if relation else "color_attr" if all(want.color for want in wants) else "two_object"


def prompts(per_skill: int, seed: int) -> list[Ask]:
    """Returns `per_skill` asks of every skill, skill by skill."""
    rng = np.random.default_rng(seed)
    return [random_ask(rng, skill) for skill in SKILLS for _ in range(per_skill)]


def render(things: Sequence[Thing], background: float = 0.95) -> Image.Image:
    """Draws things on light grey, smoothly."""
    image = np.full((SIZE, SIZE, 3), 255 * background)
    for thing in things:
        alpha = coverage(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        image = (1 - alpha) * image + alpha * np.asarray(COLORS[thing.color])
    return Image.fromarray(image.round().astype(np.uint8))


def random_background(rng: np.random.Generator) -> float:
    """Draws a shade of light grey."""
    return float(rng.uniform(0.88, 1.0))


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Returns how much of each pixel a shape covers, (32, 32) in 0..1."""
    fine = (np.arange(SIZE * _OVERSAMPLING) + 0.5) / _OVERSAMPLING
    low, high = max(0, int(x - radius) - 1), min(SIZE, int(x + radius) + 2)
    top, bottom = max(0, int(y - radius) - 1), min(SIZE, int(y + radius) + 2)
    dx = (fine[low * _OVERSAMPLING : high * _OVERSAMPLING] - x)[None, :] / radius
    dy = (fine[top * _OVERSAMPLING : bottom * _OVERSAMPLING] - y)[:, None] / radius
    if shape == "circle":
        inside = dx**2 + dy**2 <= 0.92**2
    elif shape == "square":
        inside = np.maximum(abs(dx), abs(dy)) <= 0.82
    elif shape == "triangle":
        inside = (dy <= 0.8) & (dy >= -1.0 + 1.8 * abs(dx))
    else:
        inside = (np.minimum(abs(dx), abs(dy)) <= 0.3) & (np.maximum(abs(dx), abs(dy)) <= 0.92)
    blocks = inside.reshape(bottom - top, _OVERSAMPLING, high - low, _OVERSAMPLING)
    covered = np.zeros((SIZE, SIZE))
    covered[top:bottom, low:high] = blocks.mean(axis=(1, 3))
    return covered


def vocabulary() -> list[str]:
    """Returns every word that a caption can hold, sorted."""
    words = {",", "and", *COLORS, *NUMBERS.values(), *SHAPES}
    words |= {Want(2, None, shape).words().split()[-1] for shape in SHAPES}
    for phrases in (_FRAMES, _PLURAL_FRAMES, *_RELATION_WORDS.values()):
        words |= {word for phrase in phrases for word in phrase.replace("{}", "").split()}
    return sorted(words)


def _two_kinds(rng: np.random.Generator) -> tuple[Want, Want]:
    """Two kinds of thing that differ in colour and in shape, so that swapping an attribute changes the sentence."""
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    shapes = [str(s) for s in rng.permutation(SHAPES)]
    return Want(1, colors[0], shapes[0]), Want(1, colors[1], shapes[1])


def _other_kinds(want: Want) -> list[Want]:
    shapes = [replace(want, shape=shape) for shape in SHAPES if shape != want.shape]
    return shapes + [replace(want, color=color) for color in COLORS if want.color not in (None, color)]


def _other_numbers(want: Want) -> list[Want]:
    return [replace(want, count=count) for count in (want.count - 1, want.count + 1) if count in NUMBERS]


def _placed(kinds: Sequence[Want], rng: np.random.Generator, free: bool) -> list[Thing] | None:
    """Draws one thing of each kind, none near another; None when there was no room."""
    things: list[Thing] = []
    for kind in kinds:
        color = kind.color or str(rng.choice(list(COLORS)))
        for _ in range(40):
            if free:
                radius = float(rng.uniform(*_FREE_RADII))
                x, y = rng.uniform(radius + 0.5, SIZE - radius - 0.5, size=2)
            else:
                radius = float(rng.uniform(*_RADII))
                x, y = (rng.integers(CELLS, size=2) + 0.5) * SIZE / CELLS + rng.uniform(-_JITTER, _JITTER, size=2)
            if all(np.hypot(x - t.x, y - t.y) >= radius + t.radius + (_FREE_GAP if free else _GAP) for t in things):
                things.append(Thing(color, kind.shape, float(x), float(y), radius))
                break
        else:
            return None
    return things
