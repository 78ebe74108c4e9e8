"""Synthetic blood cells: class, size, outline and attributes of each, and its painting.

Cells are painted as optical density, so that overlaps darken and stain varies as in a real smear.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy import ndimage


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


# Optical density (natural log) in red, green and blue of what a Romanowsky stain colours.
RED_CELL = np.array([0.13, 0.40, 0.36], np.float32)
CHROMATIN = np.array([0.98, 1.55, 0.52], np.float32)
AZURE_GRANULES = np.array([0.42, 0.80, 0.26], np.float32)
EOSIN_GRANULES = np.array([0.10, 0.78, 0.92], np.float32)
BASOPHIL_GRANULES = np.array([1.40, 2.00, 0.72], np.float32)
NUCLEOLUS = np.array([0.62, 0.62, 0.14], np.float32)
CLEAR = np.array([0.05, 0.06, 0.04], np.float32)

# Cytoplasm with slight and with moderate basophilia.
CYTOPLASM = {
    "neutrophil": ([0.12, 0.26, 0.14], [0.38, 0.36, 0.11]),
    "lymphocyte": ([0.26, 0.19, 0.05], [0.66, 0.44, 0.10]),
    "monocyte": ([0.30, 0.32, 0.18], [0.62, 0.52, 0.18]),
    "eosinophil": ([0.12, 0.26, 0.16], [0.42, 0.36, 0.12]),
    "basophil": ([0.16, 0.26, 0.12], [0.46, 0.42, 0.10]),
}

NOISE_SIDE = 512


@lru_cache(maxsize=16)
def noise(sigma: float) -> np.ndarray:
    """Seamless Gaussian noise float32 `[NOISE_SIDE, NOISE_SIDE]` of unit deviation, blurred by `sigma` pixels.

    The same for every field; cells take windows of it at random places.
    """
    white = np.random.default_rng(20251113).standard_normal((NOISE_SIDE, NOISE_SIDE), dtype=np.float32)
    blurred = ndimage.gaussian_filter(white, sigma, mode="wrap")
    return blurred / blurred.std()


def noise_window(sigma: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A window of `noise`, at a random place."""
    top, left = rng.integers(0, NOISE_SIDE, 2)
    rows = np.arange(top, top + shape[0]) % NOISE_SIDE
    columns = np.arange(left, left + shape[1]) % NOISE_SIDE
    return noise(sigma)[rows[:, None], columns]


def paint_cell(density: np.ndarray, plan: CellPlan, patch: Patch) -> None:
    """Paints a cell over what is there.

    Args:
        density (`np.ndarray`): float32 `[H, W, 3]`, changed in place.
        plan (`CellPlan`): What to paint.
        patch (`Patch`): Its window.
    """
    rng = np.random.default_rng(plan.seed)
    under = density[patch.window]
    cover = np.clip(patch.edge - patch.distance + 0.5, 0, 1)[..., None]
    if plan.label == "red blood cell":
        # Thin and translucent: where two overlap, both show.
        under += cover * (_red_cell(plan, patch, rng) - 0.4 * under)
    elif plan.label == "platelet":
        under += cover * (_platelet(plan, patch, rng) - 0.85 * under)
    else:
        under += cover * (_white_cell(plan, patch, rng) - 0.96 * under)


def _red_cell(plan: CellPlan, patch: Patch, rng: np.random.Generator) -> np.ndarray:
    relative = patch.distance / patch.edge
    pallor, breadth = rng.uniform(0.45, 0.8), rng.uniform(0.42, 0.6)
    kind = rng.random()
    if kind < 0.06:
        pallor = 0.05
    depth = 1 - pallor * np.exp(-((relative / breadth) ** 2.4)) + 0.14 * np.exp(-(((relative - 0.85) / 0.11) ** 2))
    if kind > 0.96:
        # A target cell: a stained centre within the pallor.
        depth += 0.75 * pallor * np.exp(-((relative / 0.2) ** 2))
    depth *= 1 + 0.03 * noise_window(1.5, depth.shape, rng)
    return (rng.uniform(0.85, 1.15) * depth)[..., None] * RED_CELL


def _platelet(plan: CellPlan, patch: Patch, rng: np.random.Generator) -> np.ndarray:
    relative = patch.distance / patch.edge
    middle = np.exp(-((relative / 0.75) ** 4))
    grains = np.clip(0.55 + 0.5 * noise_window(0.8, relative.shape, rng), 0.1, 1.6)
    body = np.array([0.26, 0.34, 0.12], np.float32)
    return body + (rng.uniform(0.6, 0.9) * middle * grains)[..., None] * np.array([0.62, 1.15, 0.36], np.float32)


def _white_cell(plan: CellPlan, patch: Patch, rng: np.random.Generator) -> np.ndarray:
    attributes, shape = plan.attributes, patch.distance.shape
    moderate = attributes["basophilia"] == "moderate"
    colour = np.array(CYTOPLASM[plan.label][int(moderate)], np.float32)
    texture = noise_window(1.5, shape, rng) * (0.11 if plan.label == "monocyte" else 0.06)
    texture += noise_window(6.0, shape, rng) * 0.08
    membrane = 0.25 * np.exp(-(((patch.edge - patch.distance - 1) / 1.8) ** 2))
    cell = (1 + texture + membrane)[..., None] * colour
    depth = nucleus_depth(plan, patch, rng)
    in_nucleus = np.clip(depth + 0.5, 0, 1)

    if plan.label == "eosinophil":
        grains = _grains(patch, rng, spacing=0.135, size=0.056)
        cell += grains[..., None] * (EOSIN_GRANULES - 0.7 * cell)
    elif plan.label == "neutrophil":
        grains = np.clip(noise_window(0.8, shape, rng) - 0.7, 0, 1)
        cell += grains[..., None] * (0.30 * AZURE_GRANULES)
    elif plan.label == "monocyte":
        grains = np.clip(noise_window(0.8, shape, rng) - 1.0, 0, 1)
        cell += grains[..., None] * (0.22 * AZURE_GRANULES)

    cell += in_nucleus[..., None] * (_chromatin(plan, depth, rng)[..., None] * CHROMATIN - cell)
    spots = _nucleoli(plan, patch, depth, rng) if attributes["nucleolus"] == "prominent" else None
    if plan.label == "basophil":
        grains = _grains(patch, rng, spacing=0.17, size=0.07, share=0.6, disorder=0.45)
        if spots is not None:
            grains *= 1 - np.clip(spots, 0, 1)
        cell += (0.92 * grains)[..., None] * (BASOPHIL_GRANULES - cell)
    if spots is not None:
        cell += (0.9 * np.clip(spots, 0, 1))[..., None] * (NUCLEOLUS - cell)
        rim = np.clip(spots + 0.9, 0, 1) - np.clip(spots, 0, 1)
        cell += (0.25 * rim * in_nucleus)[..., None] * CHROMATIN
    if attributes["vacuoles"] == "prominent":
        holes = _vacuoles(plan, patch, depth, rng)
        cell += (0.93 * holes)[..., None] * (CLEAR - cell)
    return cell


def nucleus_depth(plan: CellPlan, patch: Patch, rng: np.random.Generator) -> np.ndarray:
    """How far inside the nucleus each pixel is, in pixels; negative outside. float32 `[h, w]`."""
    turn = rng.uniform(0, 2 * np.pi)
    cosine, sine = np.float32(np.cos(turn) / plan.radius), np.float32(np.sin(turn) / plan.radius)
    # Coordinates in cell radii, turned at random.
    u, v = patch.dx * cosine + patch.dy * sine, patch.dy * cosine - patch.dx * sine
    scanty = plan.attributes["cytoplasm"] == "scanty"
    irregular = plan.attributes["nuclear_shape"] == "irregular"
    lobes = _LOBES[plan.label](scanty, rng)
    depth = np.full(patch.distance.shape, -9, np.float32)
    for x, y, radius in lobes:
        outline = wavy_outline(rng, 0.17, 3, 6) if irregular else wavy_outline(rng, 0.035, 2, 4)
        du, dv = u - np.float32(x), v - np.float32(y)
        np.maximum(depth, at_angles((radius * outline).astype(np.float32), du, dv) - np.hypot(du, dv), out=depth)
    if len(lobes) > 1:
        for (x, y, _), (x2, y2, _) in zip(lobes, lobes[1:]):
            np.maximum(depth, _strand(u, v, x, y, x2, y2, 0.05 if plan.label == "eosinophil" else 0.07), out=depth)
    if plan.label == "monocyte":
        bay = np.float32(rng.uniform(0.30, 0.38))
        centre = np.float32(lobes[0][2] + 0.05 - (0.1 if scanty else 0))
        depth = np.minimum(depth, np.hypot(u - lobes[0][0] - centre, v - lobes[0][1]) - bay)
    if irregular and len(lobes) == 1:
        # A cleft, as folded nuclei have it.
        angle = rng.uniform(1.2, 5.0)
        x, y = np.cos(angle), np.sin(angle)
        cleft = _strand(u, v, 0.35 * x, 0.35 * y, 1.2 * x, 1.2 * y, rng.uniform(0.03, 0.05))
        depth = np.minimum(depth, -cleft)
    depth *= np.float32(plan.radius)
    # The cytoplasm's rim is never quite nothing.
    return np.minimum(depth, patch.edge - patch.distance - np.float32(0.035 * plan.radius))


def _strand(u, v, x, y, x2, y2, breadth: float) -> np.ndarray:
    """Depth inside a rounded segment."""
    length = max((x2 - x) ** 2 + (y2 - y) ** 2, 1e-6)
    along = np.clip(((u - x) * (x2 - x) + (v - y) * (y2 - y)) / length, 0, 1)
    return (breadth - np.hypot(u - x - along * (x2 - x), v - y - along * (y2 - y))).astype(np.float32)


def _neutrophil_lobes(scanty: bool, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    count = int(rng.integers(3, 6))
    reach, size = (0.50, 0.36) if scanty else (0.40, 0.235)
    # On a bent chain: a horseshoe that may close on itself.
    step = rng.uniform(0.9, 1.15) * (4.6 / count)
    angles = np.arange(count) * step + rng.normal(0, 0.12, count)
    radii = reach * rng.uniform(0.8, 1.12, count)
    sizes = size * rng.uniform(0.85, 1.2, count)
    return [(r * np.cos(a), r * np.sin(a), s) for a, r, s in zip(angles, radii, sizes)]


def _eosinophil_lobes(scanty: bool, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    apart, size = (0.46, 0.47) if scanty else (0.40, 0.31)
    off = rng.uniform(0.05, 0.18) * (0.5 if scanty else 1)
    return [(-apart, off, size * rng.uniform(0.95, 1.1)), (apart, off, size * rng.uniform(0.9, 1.05))]


def _basophil_lobes(scanty: bool, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    size = 0.58 if scanty else 0.38
    centres = [(-0.24, 0.08), (0.2, -0.12)] + ([(0.1, 0.25)] if rng.random() < 0.5 else [])
    return [(x + rng.normal(0, 0.03), y + rng.normal(0, 0.03), size * rng.uniform(0.9, 1.05)) for x, y in centres]


def _round_lobe(scanty: bool, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    size = rng.uniform(0.84, 0.90) if scanty else rng.uniform(0.60, 0.68)
    off = (0.95 - size) * rng.uniform(0.2, 0.8)
    return [(off, 0.0, size)]


def _kidney_lobe(scanty: bool, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    size = rng.uniform(0.82, 0.88) if scanty else rng.uniform(0.60, 0.68)
    return [(-(0.95 - size) * rng.uniform(0.2, 0.7), 0.0, size)]


_LOBES = {
    "neutrophil": _neutrophil_lobes,
    "lymphocyte": _round_lobe,
    "monocyte": _kidney_lobe,
    "eosinophil": _eosinophil_lobes,
    "basophil": _basophil_lobes,
}


def _chromatin(plan: CellPlan, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Relative density of the nucleus: dark clumps with gaps, or pale and finely laced."""
    # Clump size in steps, since each is another map of noise.
    clump = min(max(round(0.055 * plan.radius / 0.6) * 0.6, 1.2), 4.2)
    if plan.attributes["nuclear_chromatin"] == "coarse":
        clumps = np.tanh(1.6 * noise_window(round(clump, 1), depth.shape, rng))
        strength = 1.02 + 0.26 * clumps
    else:
        strength = 0.66 + 0.05 * noise_window(0.8, depth.shape, rng)
    return strength + 0.16 * np.exp(-((np.maximum(depth, 0) / 1.6) ** 2))


def _grains(
    patch: Patch, rng: np.random.Generator, spacing: float, size: float, share: float = 1.0, disorder: float = 0.25
) -> np.ndarray:
    """Round granules all over the cell, 0..1 `[h, w]`. Spacing and size in cell radii, disorder in spacings."""
    shape = patch.distance.shape
    mean = float(patch.edge.mean())
    step, radius = max(spacing * mean, 2.2), max(size * mean, 1.0)
    top, left = float(patch.dy[0, 0]), float(patch.dx[0, 0])
    rows = np.arange(-mean, mean, step)
    grid = np.stack(np.meshgrid(rows, rows, indexing="ij"), -1).reshape(-1, 2)
    grid[:, 1] += (np.round(grid[:, 0] / step) % 2) * step / 2
    grid += rng.normal(0, disorder * step, grid.shape)
    strength = rng.uniform(0.55, 1.2, len(grid)) * (rng.random(len(grid)) < share)
    at = np.round(grid - (top, left)).astype(int)
    kept = (at >= 0).all(1) & (at[:, 0] < shape[0]) & (at[:, 1] < shape[1]) & (strength > 0)
    dots = np.zeros(shape, np.float32)
    dots[at[kept, 0], at[kept, 1]] = strength[kept]
    spread = ndimage.gaussian_filter(dots, 0.62 * radius, mode="constant")
    return np.clip(spread * (2 * np.pi * (0.62 * radius) ** 2) * 2.2 - 0.35, 0, 1)


def _nucleoli(plan: CellPlan, patch: Patch, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depth inside one or two pale round spots in the nucleus, in pixels and cut off at 1; negative outside."""
    radius = max(0.125 * plan.radius, 2.0)
    spots = np.full(depth.shape, -9, np.float32)
    free = depth.copy()
    for _ in range(int(rng.integers(1, 3))):
        rows, columns = np.nonzero(free > min(1.05 * radius, 0.9 * free.max()))
        if free.max() <= 0 or not len(rows):
            break
        chosen = int(rng.integers(len(rows)))
        row, column = rows[chosen], columns[chosen]
        distance = np.hypot(patch.dx - patch.dx[0, column], patch.dy - patch.dy[row, 0])
        np.maximum(spots, radius * rng.uniform(0.9, 1.15) - distance, out=spots)
        free = np.where(distance < 2.6 * radius, -9, free)
    return np.minimum(spots, 1)


def _vacuoles(plan: CellPlan, patch: Patch, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clear round holes, 0..1 `[h, w]`, in the cytoplasm and, where that is narrow, over the nucleus's border."""
    holes = np.zeros(depth.shape, np.float32)
    size = 0.105 * plan.radius
    margin = patch.edge - patch.distance - size
    free = np.where((margin > 0) & (depth < 0.25 * size), 1, 0)
    if free.sum() < 12:
        free = np.where((margin > 0) & (depth < 1.5 * size), 1, 0)
    rows, columns = np.nonzero(free)
    if not len(rows):
        return holes
    for chosen in rng.integers(0, len(rows), int(rng.integers(5, 10))):
        distance = np.hypot(patch.dx - patch.dx[0, columns[chosen]], patch.dy - patch.dy[rows[chosen], 0])
        np.maximum(holes, np.clip(size * rng.uniform(0.75, 1.2) - distance + 0.5, 0, 1), out=holes)
    return holes
