"""Things on the table: nouns, the solids that they are drawn as, and the scenes."""

from dataclasses import dataclass

from ..graph import COLORS


@dataclass(frozen=True)
class Solid:
    """
    The shape of a thing, in units of the table, which is 1 wide and 1 deep.

    Args:
        form (`str`):
            `"box"`, `"cylinder"`, `"sphere"`, `"cone"`, `"tray"` or `"bowl"`; the last two are open at the top.
        radius (`tuple[float, float]`):
            Smallest and largest half width.
        height (`float`):
            Height, in radii.
    """

    form: str
    radius: tuple[float, float]
    height: float

    @property
    def is_flat(self) -> bool:
        """Whether something can stand on it, and it on something."""
        return self.form in ("box", "cylinder") and self.height < 3

    @property
    def is_container(self) -> bool:
        """Whether something can lie in it."""
        return self.form in ("tray", "bowl")


SOLIDS = {
    "cube": Solid("box", (0.069, 0.083), 2.0),
    "slab": Solid("box", (0.081, 0.094), 0.55),
    "can": Solid("cylinder", (0.057, 0.069), 2.5),
    "rod": Solid("cylinder", (0.034, 0.041), 6.0),
    "disc": Solid("cylinder", (0.086, 0.101), 0.4),
    "sphere": Solid("sphere", (0.064, 0.081), 2.0),
    "cone": Solid("cone", (0.069, 0.083), 2.8),
    "tray": Solid("tray", (0.144, 0.161), 0.45),
    "bowl": Solid("bowl", (0.138, 0.155), 0.6),
}
# Noun → solid. Any two things of a scene differ in color or solid, so that each can be identified in the picture.
NOUNS = {
    "box": "cube", "toy block": "cube", "book": "slab", "can": "can", "jar": "can", "candle": "rod", "bottle": "rod",
    "plate": "disc", "coaster": "disc", "ball": "sphere", "globe": "sphere", "party hat": "cone", "funnel": "cone",
    "tray": "tray", "basket": "tray", "bowl": "bowl",
}  # fmt: skip
# Scene → the surface that the things stand on.
SCENES = {
    "kitchen": "kitchen table",
    "living room": "low table in a living room",
    "classroom": "desk in a classroom",
    "study": "desk in a study",
    "bedroom": "bedroom floor",
    "garage": "workbench in a garage",
    "patio": "patio floor",
    "bathroom": "bathroom floor",
    "dining room": "dining table",
    "greenhouse": "bench in a greenhouse",
}


@dataclass(frozen=True, order=True)
class Item:
    """
    A thing on the table.

    Args:
        color (`str`):
            A key of `COLORS`.
        noun (`str`):
            A key of `NOUNS`.
    """

    color: str
    noun: str

    def __post_init__(self):
        for field, value, allowed in (("color", self.color, COLORS), ("noun", self.noun, NOUNS)):
            if value not in allowed:
                raise ValueError(f"Item has {field}={value!r}; choose one of {list(allowed)}.")

    @property
    def solid(self) -> Solid:
        """Its shape."""
        return SOLIDS[NOUNS[self.noun]]

    @property
    def look(self) -> str:
        """What can be seen of it: no two things of a scene look the same."""
        return f"{self.color} {NOUNS[self.noun]}"

    def __str__(self) -> str:
        return f"{self.color} {self.noun}"
