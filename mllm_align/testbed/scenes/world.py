"""The world of the testbed: scenes sampled from a known distribution.

A picture is divided into regions of 2x2 cells; a region contains a pair of adjacent things, a single thing
or nothing. Sixteen kinds of things form eight couples of partners. In training, the second thing of a pair
is usually the partner of the first, so a model can guess it from the text alone; the `broken` split has no
partner pairs, so there every mentioned partner is a hallucination. Pictures of the lessons repeat things,
so that vision is learnt in steps: the meaning of words, then places, then relations.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np

from mllm_align.errors import InputError, quoted

COUPLES = (
    ("moon", "star"),
    ("house", "tree"),
    ("cup", "spoon"),
    ("key", "lock"),
    ("fish", "boat"),
    ("hat", "boot"),
    ("bell", "candle"),
    ("heart", "arrow"),
)
KINDS = tuple(kind for couple in COUPLES for kind in couple)
COLOURS = {
    "red": (220, 35, 35),
    "green": (30, 150, 55),
    "blue": (35, 80, 225),
    "yellow": (240, 190, 0),
    "purple": (165, 55, 190),
    "black": (30, 30, 30),
}
SIZES = ("small", "large")
# One thing in every cell; one in all cells of a region; pairs of things.
LESSONS = ("everywhere", "regions", "pairs")
SPLITS = ("train", "held_out", "unbiased", "broken", *LESSONS)  # the index seeds a split's pictures
GRIDS = ((1, 2), (2, 1), (2, 2))  # rows and columns of regions
SIDE = 2  # cells along a region

_PARTNERS = {a: b for one, other in COUPLES for a, b in ((one, other), (other, one))}
_PAIR = 0.75  # probability that a group is a pair, not a single thing


@dataclass(frozen=True)
class Settings:
    """Settings that determine a whole data set.

    bias: probability that the second thing of a training pair is the partner of the first.
    grain: standard deviation of the pixel noise, on a scale of 0 to 255.
    fog: maximum transparency of a thing (each has its own).
    train, held_out, unbiased, broken: number of pictures in each split. lessons: in each lesson.
    Raises InputError for a value outside its range.
    """

    bias: float = 0.8
    grain: float = 40.0
    fog: float = 0.5
    train: int = 6000
    held_out: int = 300
    unbiased: int = 300
    broken: int = 300
    lessons: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bias <= 1:
            raise InputError(f"scenes, bias: found {self.bias}; give a probability from 0 to 1")
        if not 0 <= self.grain <= 255:
            raise InputError(f"scenes, grain: found {self.grain}; give a deviation from 0 to 255")
        if not 0 <= self.fog < 1:
            raise InputError(f"scenes, fog: found {self.fog}; give a share from 0 to below 1")
        for name in ("train", "held_out", "unbiased", "broken", "lessons", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"scenes, {name}: found {getattr(self, name)}; give 0 or more")

    def size(self, split: str) -> int:
        """Return the number of pictures in a split."""
        return self.lessons if split in LESSONS else getattr(self, _known(split))


@dataclass(frozen=True)
class Thing:
    """One thing in one cell; row and column: of the cell in the whole picture, from the top left."""

    kind: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """The contents of a picture: `rows` x `columns` regions and the groups in them, in raster order.

    Captions name the first thing of a group first.
    """

    id: str
    rows: int
    columns: int
    groups: tuple[tuple[Thing, ...], ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(thing for group in self.groups for thing in group)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(thing.kind for thing in self.things)

    @property
    def repeats(self) -> bool:
        """Whether the same thing is in every cell of the picture."""
        return len(self.things) == self.rows * self.columns * SIDE**2 and len(self.groups) == 1

    def find(self, kind: str) -> Thing | None:
        """Return the first thing of this kind; None if there is none."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    def region_of(self, thing: Thing) -> tuple[int, int]:
        """Return row and column of the thing's region."""
        return thing.row // SIDE, thing.column // SIDE

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Return the scene that `to_json` wrote; raise InputError for any other text."""
        try:
            fields = json.loads(text)
            fields["groups"] = tuple(tuple(Thing(**thing) for thing in group) for group in fields["groups"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"scene {quoted(text)}: is not a scene's JSON; prepare the data again"
            ) from error


def partner(kind: str) -> str:
    """Return the other kind of the couple."""
    return _PARTNERS[kind]


def make_scene(split: str, index: int, settings: Settings) -> Scene:
    """Return picture `index` of a split: a pure function of its arguments.

    Layouts, kinds, colours and sizes have the same marginal distributions in every split; only the pairing
    of kinds differs. The lessons have their own distributions. Raises InputError for an unknown split.
    """
    rng = np.random.default_rng([settings.seed, SPLITS.index(_known(split)), index])
    rows, columns = GRIDS[rng.integers(len(GRIDS))]
    name = f"{split}-{index:06d}"
    if split == "everywhere":
        thing = _thing(rng, str(rng.choice(KINDS)), (0, 0))
        return Scene(name, rows, columns, (_repeated(thing, rows * SIDE, columns * SIDE),))
    count = int(rng.integers(1, min(3, rows * columns) + 1))
    regions = sorted(rng.permutation(rows * columns)[:count].tolist())
    if split == "regions":
        kinds = iter(rng.permutation(KINDS).tolist())
        corners = [(region // columns * SIDE, region % columns * SIDE) for region in regions]
        things = [_thing(rng, next(kinds), corner) for corner in corners]
        return Scene(name, rows, columns, tuple(_repeated(thing, SIDE, SIDE) for thing in things))
    sizes = [2 if split == "pairs" or rng.random() < _PAIR else 1 for _ in regions]
    groups = []
    for region, kinds in zip(regions, _kinds(rng, split, sizes, settings.bias), strict=True):
        cells = sorted(_cells(rng, region // columns, region % columns)[: len(kinds)])
        groups.append(tuple(_thing(rng, *pair) for pair in zip(kinds, cells, strict=True)))
    return Scene(name, rows, columns, tuple(groups))


def _known(split: str) -> str:
    if split not in SPLITS:
        raise InputError(f"scenes, split: found {quoted(split)}; give one of {', '.join(SPLITS)}")
    return split


def _kinds(rng: np.random.Generator, split: str, sizes: list[int], bias: float) -> list[list[str]]:
    """Sample the kinds of each group, all different in a picture.

    First things come from different couples, so that the partner of each is available as its second.
    """
    couples = [COUPLES[i][rng.integers(2)] for i in rng.permutation(len(COUPLES))]
    groups = [[couples.pop()] for _ in sizes]
    pairs = [group for group, size in zip(groups, sizes, strict=True) if size == 2]
    if split == "broken":
        for group in pairs:
            group.append(couples.pop())
        return groups
    # Partner pairs are completed first, so that no other pair uses up a partner.
    unbiased = split in ("unbiased", "pairs")
    loyal = [not unbiased and rng.random() < bias for _ in pairs]
    for group, keep in zip(pairs, loyal, strict=True):
        if keep:
            group.append(partner(group[0]))
    for group in pairs:
        if len(group) == 1:
            used = {kind for other in groups for kind in other}
            used |= set() if unbiased else {partner(group[0])}
            group.append(str(rng.choice([kind for kind in KINDS if kind not in used])))
    return groups


def _cells(rng: np.random.Generator, row: int, column: int) -> list[tuple[int, int]]:
    """Sample two adjacent cells of a region."""
    y, x = (int(value) for value in rng.integers(SIDE, size=2))
    other = (y, 1 - x) if rng.random() < 0.5 else (1 - y, x)
    return [(row * SIDE + down, column * SIDE + across) for down, across in ((y, x), other)]


def _repeated(thing: Thing, height: int, width: int) -> tuple[Thing, ...]:
    """Copies of the thing in height x width cells, starting at its own."""
    cells = product(range(height), range(width))
    return tuple(
        replace(thing, row=thing.row + down, column=thing.column + across) for down, across in cells
    )


def _thing(rng: np.random.Generator, kind: str, cell: tuple[int, int]) -> Thing:
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    return Thing(kind, colour, SIZES[rng.integers(len(SIZES))], *cell)
