"""Plans of synthetic blood cells: class, size, outline, attributes. Painting is in synthetic_painting.py."""

from dataclasses import dataclass, field

import numpy as np


CLASSES = ("red blood cell", "platelet", "neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")
WHITE_CELLS = CLASSES[2:]

MORPHOLOGY = {
    "nuclear_chromatin": ("open", "coarse"),
    "nuclear_shape": ("regular", "irregular"),
    "nucleolus": ("inconspicuous", "prominent"),
    "cytoplasm": ("scanty", "abundant"),
    "basophilia": ("slight", "moderate"),
    "vacuoles": ("absent", "prominent"),
}

# Share of each white cell in a field. The differential of healthy blood would leave a basophil in one of two hundred
# fields, too few to learn from.
WHITE_CELL_SHARES = (0.32, 0.24, 0.16, 0.15, 0.13)

# Radius relative to a red cell's (7.5 um across): smallest, largest.
_RADII = {
    "red blood cell": (0.88, 1.1),
    "platelet": (0.24, 0.42),
    "neutrophil": (1.6, 1.85),
    "lymphocyte": (1.2, 1.5),
    "monocyte": (1.9, 2.15),
    "eosinophil": (1.65, 1.9),
    "basophil": (1.5, 1.75),
}

# Probability of the second value of each attribute, in the order of MORPHOLOGY. Typical of the class, yet never so
# certain that the class alone would answer.
_SECOND_VALUE = {
    "neutrophil": (0.70, 0.40, 0.20, 0.80, 0.25, 0.35),
    "lymphocyte": (0.65, 0.30, 0.35, 0.25, 0.60, 0.25),
    "monocyte": (0.25, 0.60, 0.35, 0.75, 0.45, 0.60),
    "eosinophil": (0.65, 0.35, 0.20, 0.75, 0.25, 0.30),
    "basophil": (0.50, 0.50, 0.25, 0.65, 0.40, 0.30),
}

ANGLES = 512


@dataclass
class CellPlan:
    """One cell before it is painted.

    Args:
        label (`str`): One of `CLASSES`.
        x (`float`): Centre, pixels; may lie outside the field.
        y (`float`): Centre, pixels.
        radius (`float`): Mean radius, pixels.
        outline (`np.ndarray`): float32 `[ANGLES]`, radius in pixels at each angle from -pi.
        attributes (`dict[str, str]`): Morphology of a white cell; empty for others.
        seed (`int`): Of all randomness in the painting.
    """

    label: str
    x: float
    y: float
    radius: float
    outline: np.ndarray
    attributes: dict[str, str] = field(default_factory=dict)
    seed: int = 0


def plan_cell(label: str, x: float, y: float, red_radius: float, rng: np.random.Generator) -> CellPlan:
    """A cell of a class with its random size, outline and attributes.

    Args:
        label (`str`): One of `CLASSES`.
        x (`float`): Centre, pixels.
        y (`float`): Centre, pixels.
        red_radius (`float`): Radius of a typical red cell of this field, pixels.
        rng (`np.random.Generator`): Source of randomness.
    """
    radius = red_radius * rng.uniform(*_RADII[label])
    if label == "red blood cell":
        outline = _red_outline(rng)
    elif label == "platelet":
        outline = wavy_outline(rng, 0.14, 2, 4) * ellipse(rng, 0.7)
    else:
        outline = wavy_outline(rng, 0.035 if label == "lymphocyte" else 0.05, 2, 5) * ellipse(rng, 0.9)
    attributes = {}
    if label in WHITE_CELLS:
        draws = rng.random(len(MORPHOLOGY))
        attributes = {
            name: values[int(draw < probability)]
            for (name, values), draw, probability in zip(MORPHOLOGY.items(), draws, _SECOND_VALUE[label])
        }
    seed = int(rng.integers(2**31))
    return CellPlan(label, x, y, radius, (radius * outline).astype(np.float32), attributes, seed)


def wavy_outline(rng: np.random.Generator, amount: float, first: int, last: int) -> np.ndarray:
    """Relative radii `[ANGLES]` of a circle with waves of `first`..`last` periods, the slow ones largest."""
    angle = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False)
    periods = np.arange(first, last + 1)
    sizes = amount * rng.normal(size=len(periods)) * np.sqrt(first / periods) / np.sqrt(len(periods))
    phases = rng.uniform(0, 2 * np.pi, len(periods))
    return np.clip(1 + sizes @ np.cos(periods[:, None] * angle + phases[:, None]), 0.55, 1.45)


def ellipse(rng: np.random.Generator, roundest: float) -> np.ndarray:
    """Relative radii `[ANGLES]` of an ellipse of mean radius about 1, minor to major axis between `roundest` and 1."""
    angle = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False) - rng.uniform(0, np.pi)
    ratio = rng.uniform(roundest, 1)
    return np.sqrt(ratio) / np.sqrt((ratio * np.cos(angle)) ** 2 + np.sin(angle) ** 2)


def _red_outline(rng: np.random.Generator) -> np.ndarray:
    kind = rng.random()
    if kind < 0.87:
        return wavy_outline(rng, 0.03, 2, 5) * ellipse(rng, 0.86)
    if kind < 0.96:
        return wavy_outline(rng, 0.03, 2, 4) * ellipse(rng, 0.62)
    if kind < 0.985:
        # A teardrop: one drawn-out end.
        angle = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False)
        tail = np.angle(np.exp(1j * (angle - rng.uniform(0, 2 * np.pi))))
        return 0.9 * wavy_outline(rng, 0.02, 2, 4) * (1 + rng.uniform(0.4, 0.7) * np.exp(-((tail / 0.35) ** 2)))
    # A burr cell: a scalloped edge.
    return wavy_outline(rng, 0.02, 2, 3) * (
        1 + 0.045 * np.cos(rng.integers(9, 14) * np.linspace(-np.pi, np.pi, ANGLES))
    )


@dataclass
class Patch:
    """The window of a field that a cell lies in, with polar coordinates about its centre.

    Args:
        window (`tuple[slice, slice]`): Rows and columns in the field.
        dx (`np.ndarray`): float32 `[1, w]`, pixels from the centre.
        dy (`np.ndarray`): float32 `[h, 1]`.
        distance (`np.ndarray`): float32 `[h, w]` from the centre.
        edge (`np.ndarray`): float32 `[h, w]`, the outline's radius in the direction of each pixel.
    """

    window: tuple[slice, slice]
    dx: np.ndarray
    dy: np.ndarray
    distance: np.ndarray
    edge: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """bool `[h, w]`: pixels of the cell."""
        return self.distance < self.edge


def cell_patch(plan: CellPlan, height: int, width: int) -> Patch | None:
    """The cell's window in a field; None if it lies outside."""
    reach = float(plan.outline.max()) + 2
    left, right = max(int(plan.x - reach), 0), min(int(plan.x + reach) + 1, width)
    top, bottom = max(int(plan.y - reach), 0), min(int(plan.y + reach) + 1, height)
    if left >= right or top >= bottom:
        return None
    dx = (np.arange(left, right, dtype=np.float32) - np.float32(plan.x))[None]
    dy = (np.arange(top, bottom, dtype=np.float32) - np.float32(plan.y))[:, None]
    return Patch((slice(top, bottom), slice(left, right)), dx, dy, np.hypot(dx, dy), at_angles(plan.outline, dx, dy))


def at_angles(outline: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The outline's radius in the direction of each pixel."""
    turn = (np.arctan2(dy, dx) * np.float32(ANGLES / (2 * np.pi)) + np.float32(ANGLES / 2)).astype(np.int32)
    return outline[turn % ANGLES]
