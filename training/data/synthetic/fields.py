"""Seeded synthetic blood smears with exact truth: the default data of the demo and the tests.

They have what the real task has (classes, overlap, stain, focus), but replace no real data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from unihema.errors import InputError
from unihema.training.data.synthetic.cells import (
    CLASSES,
    WHITE_CELL_SHARES,
    WHITE_CELLS,
    CellPlan,
    Patch,
    cell_patch,
    noise_window,
    paint_cell,
    plan_cell,
)


# A cell is in the truth, and painted at all, if this part of it is visible.
MIN_VISIBLE = 0.25
MIN_PIXELS = 12


@dataclass
class SmearSample:
    """A field and its truth. Lists have one entry a visible cell.

    Args:
        image (`np.ndarray`): uint8 `[H, W, 3]`.
        instance_map (`np.ndarray`): int16 `[H, W]`: 0 background, i + 1 where cell i is on top.
        boxes (`np.ndarray`): float32 `[n, 4]` xyxy pixels, tight on what is visible of the cell.
        labels (`list[str]`): Classes.
        attributes (`list[dict[str, str]]`): Morphology; empty for cells that are not white.
        questions (`list[dict[str, str]]`): `question`, `answer`.
        cloze (`list[dict[str, str]]`): `masked`, `completed`.
    """

    image: np.ndarray
    instance_map: np.ndarray
    boxes: np.ndarray
    labels: list[str]
    attributes: list[dict[str, str]]
    questions: list[dict[str, str]]
    cloze: list[dict[str, str]]

    @cached_property
    def instance_masks(self) -> np.ndarray:
        """bool `[n, H, W]`: what is visible of each cell."""
        return self.instance_map[None] == np.arange(1, len(self.labels) + 1, dtype=np.int16)[:, None, None]

    def semantic_mask(self, labels: Sequence[str] = WHITE_CELLS) -> np.ndarray:
        """bool `[H, W]`: pixels of cells of the given classes."""
        chosen = np.array([False] + [label in labels for label in self.labels])
        return chosen[self.instance_map]


@dataclass
class SingleCell:
    """A crop about one cell.

    Args:
        image (`np.ndarray`): uint8 `[side, side, 3]`.
        label (`str`): Class of the cell in the middle.
        attributes (`dict[str, str]`): Its morphology; empty unless it is white.
        questions (`list[dict[str, str]]`): `question`, `answer`.
        cloze (`list[dict[str, str]]`): `masked`, `completed`; empty unless it is white.
    """

    image: np.ndarray
    label: str
    attributes: dict[str, str]
    questions: list[dict[str, str]]
    cloze: list[dict[str, str]]

    def __iter__(self):
        return iter((self.image, self.label, self.attributes))


class SyntheticSmears:
    """Synthetic fields and single-cell crops; item `index` depends on seed and index only, whatever the order.

    Args:
        seed (`int`): 0 or more.
        width (`int`): Of a field, pixels.
        height (`int`): Of a field, pixels.
        crop_size (`int`): Side of a single-cell crop, pixels.
        red_radius (`tuple[float, float]`): Range of a field's typical red-cell radius, relative to its shorter side.
        coverage (`tuple[float, float]`): Range of the part of a field that red cells are placed on.
        white_cells (`tuple[float, ...]`): Probabilities that a field has 0, 1, 2, ... white cells.
        length (`int`): Number of fields when used as a sequence.

    Raises:
        ValueError: A field too small for its cells, a negative seed, or probabilities that do not add up to 1.

    Example:

    ```python
    >>> from unihema.training.data.synthetic.fields import SyntheticSmears

    >>> smears = SyntheticSmears(seed=0)
    >>> sample = smears[3]
    >>> sample.image.shape
    (336, 448, 3)
    ```
    """

    def __init__(
        self,
        seed: int = 0,
        width: int = 448,
        height: int = 336,
        crop_size: int = 160,
        red_radius: tuple[float, float] = (0.058, 0.075),
        coverage: tuple[float, float] = (0.2, 0.45),
        white_cells: tuple[float, ...] = (0.08, 0.57, 0.27, 0.08),
        length: int = 1000,
    ):
        if min(width, height, crop_size) < 64:
            raise InputError(
                f"A field of {width}x{height} (crop {crop_size}) is too small for cells: 64 pixels or more."
            )
        if seed < 0:
            raise InputError(f"seed={seed} must be 0 or more.")
        if min(white_cells, default=-1) < 0 or abs(sum(white_cells) - 1) > 1e-6:
            raise InputError(f"white_cells={white_cells} must be probabilities that add up to 1.")
        self.seed = seed
        self.width = width
        self.height = height
        self.crop_size = crop_size
        self.red_radius = red_radius
        self.coverage = coverage
        self.white_cells = white_cells
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> SmearSample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.generate(index)

    def generate(self, index: int) -> SmearSample:
        """A field.

        Args:
            index (`int`): 0 or more.
        """
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, index]))
        red_radius = min(self.height, self.width) * rng.uniform(*self.red_radius)
        coverage = rng.uniform(*self.coverage)
        plans = _place_cells(self.width, self.height, red_radius, coverage, self.white_cells, rng)
        plans, instance_map = _visible(plans, self.height, self.width)
        image = _paint(plans, self.height, self.width, red_radius, rng)
        labels = [plan.label for plan, _ in plans]
        attributes = [plan.attributes for plan, _ in plans]
        extents = ndimage.find_objects(instance_map, max_label=len(plans))
        boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in extents]
        return SmearSample(
            image=image,
            instance_map=instance_map,
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=labels,
            attributes=attributes,
            questions=field_questions(labels),
            cloze=field_cloze(labels, rng),
        )

    def single_cell(self, index: int, label: str | None = None) -> SingleCell:
        """A crop with one cell in the middle, as cell analysers give it.

        Args:
            index (`int`): 0 or more.
            label (`str`, *optional*): Class; drawn evenly from all when not given.

        Raises:
            ValueError: Unknown class.
        """
        if label is not None and label not in CLASSES:
            raise InputError(f"Unknown class '{label}'; known: {', '.join(CLASSES)}.")
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, index, 1]))
        drawn = CLASSES[int(rng.integers(len(CLASSES)))]
        label = label or drawn
        side = self.crop_size
        red_radius = side * rng.uniform(0.16, 0.2)
        centre = side / 2 + rng.uniform(-0.04, 0.04, 2) * side
        middle = plan_cell(label, *centre, red_radius, rng)
        plans = _place_cells(side, side, red_radius, rng.uniform(0.15, 0.4), (), rng, middle)
        plans, _ = _visible(plans, side, side)
        image = _paint(plans, side, side, red_radius, rng)
        cloze = [cell_cloze(label, middle.attributes, rng)] if label in WHITE_CELLS else []
        return SingleCell(image, label, middle.attributes, cell_questions(label, middle.attributes), cloze)


def _place_cells(
    width: int,
    height: int,
    red_radius: float,
    coverage: float,
    white_cells: tuple[float, ...],
    rng: np.random.Generator,
    middle: CellPlan | None = None,
) -> list[CellPlan]:
    """Cells in the order of painting: red, platelets, white; `middle` last, and no other white cell then."""
    white: list[CellPlan] = [middle] if middle is not None else []
    if middle is None:
        wanted = rng.choice(len(white_cells), p=white_cells)
        for label in rng.choice(WHITE_CELLS, size=wanted, p=WHITE_CELL_SHARES):
            for _ in range(30):
                cell = plan_cell(str(label), rng.uniform(0, width), rng.uniform(0, height), red_radius, rng)
                # The greater part of a white cell lies in the field: a sliver could not be told apart.
                part = 0.35 * cell.radius
                inside = part < cell.x < width - part and part < cell.y < height - part
                if inside and _free(cell, white, 0.95):
                    white.append(cell)
                    break

    red: list[CellPlan] = []
    target = coverage * width * height / (np.pi * red_radius**2)
    reach = red_radius
    for _ in range(int(6 * target)):
        if len(red) >= target:
            break
        x, y = rng.uniform(-reach, width + reach), rng.uniform(-reach, height + reach)
        cell = plan_cell("red blood cell", x, y, red_radius, rng)
        # Most red cells lie apart or touch; some overlap. White cells push them aside.
        nearness = 0.72 if rng.random() < 0.12 else 0.98
        if _free(cell, red, nearness) and _free(cell, white, 0.92 if middle is None else 0.97):
            red.append(cell)

    platelets: list[CellPlan] = []
    for _ in range(int(rng.poisson(5.0 if middle is None else 1.0))):
        cell = plan_cell("platelet", rng.uniform(0, width), rng.uniform(0, height), red_radius, rng)
        if _free(cell, white, 1.05) and _free(cell, platelets, 1.0) and (rng.random() < 0.15 or _free(cell, red, 1.0)):
            platelets.append(cell)
    return red + platelets + white


def _free(cell: CellPlan, others: list[CellPlan], nearness: float) -> bool:
    return all(
        (cell.x - other.x) ** 2 + (cell.y - other.y) ** 2 > (nearness * (cell.radius + other.radius)) ** 2
        for other in others
    )


def _visible(plans: list[CellPlan], height: int, width: int) -> tuple[list[tuple[CellPlan, Patch]], np.ndarray]:
    """Cells that can be seen, and the map of which is on top.

    Cells that are mostly covered are removed, so that every painted cell is in the truth. A removal only uncovers other cells,
    so one pass is enough; then the map is drawn again.
    """
    patched = [(plan, cell_patch(plan, height, width)) for plan in plans]
    patched = [(plan, patch) for plan, patch in patched if patch is not None]
    pixels = np.bincount(_on_top(patched, height, width).ravel(), minlength=len(patched) + 1)[1:]
    whole = [float((plan.outline.astype(np.float64) ** 2).mean() * np.pi) for plan, _ in patched]
    kept = [cell for cell, seen, area in zip(patched, pixels, whole) if seen >= max(MIN_VISIBLE * area, MIN_PIXELS)]
    return kept, _on_top(kept, height, width)


def _on_top(patched: list[tuple[CellPlan, Patch]], height: int, width: int) -> np.ndarray:
    top = np.zeros((height, width), np.int16)
    for number, (_, patch) in enumerate(patched, start=1):
        top[patch.window][patch.inside] = number
    return top


def _paint(
    plans: list[tuple[CellPlan, Patch]], height: int, width: int, red_radius: float, rng: np.random.Generator
) -> np.ndarray:
    """The picture, uint8 `[H, W, 3]`: optical density of plasma and cells, then stain, light, focus and camera."""
    across = np.linspace(-1, 1, width, dtype=np.float32)[None]
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    slope = rng.normal(0, 0.02, 2)
    plasma = 0.05 + slope[0] * across + slope[1] * down + rng.uniform(0, 0.05) * (across**2 + down**2)
    plasma = plasma + 0.012 * noise_window(12.0, (height, width), rng)
    tint = np.array([0.8, 1.0, 1.1], np.float32) + rng.normal(0, 0.12, 3).astype(np.float32)
    density = plasma.astype(np.float32)[..., None] * tint
    for plan, patch in plans:
        paint_cell(density, plan, patch)

    # Stain: overall strength, the strength of each channel, and some leakage between them.
    matrix = np.eye(3) * rng.uniform(0.85, 1.15, 3) * rng.uniform(0.85, 1.15) + rng.normal(0, 0.025, (3, 3))
    light = rng.uniform(228, 250) * (1 + rng.normal(0, 0.012, 3))
    picture = np.exp(-(density.reshape(-1, 3) @ matrix.astype(np.float32))).reshape(density.shape)
    picture *= light.astype(np.float32)
    # Of the smallest fields the pixels are as sharp as it gets.
    focus = rng.uniform(0.35, max(0.35, 0.055 * red_radius))
    for axis in (0, 1):
        picture = ndimage.gaussian_filter1d(picture, focus, axis=axis, mode="nearest", truncate=3)
    picture += rng.uniform(0.8, 2.4) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


_CELL_QUESTIONS = {
    "nuclear_chromatin": ("Is the nuclear chromatin open or coarse?", {"open": "open", "coarse": "coarse"}),
    "nuclear_shape": ("Is the outline of the nucleus regular or irregular?", {}),
    "nucleolus": ("Is a prominent nucleolus seen?", {"inconspicuous": "no", "prominent": "yes"}),
    "cytoplasm": ("Is the cytoplasm scanty or abundant?", {}),
    "basophilia": ("How basophilic is the cytoplasm?", {}),
    "vacuoles": ("Are there vacuoles in the cytoplasm?", {"absent": "no", "prominent": "yes"}),
}

_BLANK_SLOTS = ("label", "nuclear_shape", "nuclear_chromatin", "cytoplasm", "basophilia", "vacuoles")
_SENTENCE = (
    "{label} with {nuclear_shape} nucleus, {nuclear_chromatin} chromatin, {nucleolus} nucleolus, {cytoplasm} cytoplasm "
    "of {basophilia} basophilia, vacuoles {vacuoles}."
)


def cell_questions(label: str, attributes: Mapping[str, str]) -> list[dict[str, str]]:
    """Questions about the cell of a crop.

    Args:
        label (`str`): Its class.
        attributes (`Mapping[str, str]`): Its morphology; empty unless it is a white cell.

    Returns:
        `list[dict[str, str]]`: `question` and `answer`.
    """
    if label not in WHITE_CELLS:
        return [{"question": "Which cell is this?", "answer": label}]
    pairs = [("Which cell is this?", label), ("What type of white blood cell is this?", label)]
    for name, value in attributes.items():
        question, answers = _CELL_QUESTIONS[name]
        pairs.append((question, answers.get(value, value)))
    return [{"question": question, "answer": answer} for question, answer in pairs]


def field_questions(labels: Sequence[str]) -> list[dict[str, str]]:
    """Questions about a whole field whose answers still show at the size of a crop.

    Red cells are too many to count in words, which detection does. Attributes of a white cell are asked of its crop.

    Args:
        labels (`Sequence[str]`): Class of each visible cell.
    """
    white = [index for index, label in enumerate(labels) if label in WHITE_CELLS]
    pairs = [
        ("How many white blood cells are in the field?", str(len(white))),
        ("How many platelets are in the field?", str(sum(label == "platelet" for label in labels))),
        ("Are platelets seen in the field?", "yes" if "platelet" in labels else "no"),
    ]
    pairs += [(f"Is there a {name} in the field?", "yes" if name in labels else "no") for name in WHITE_CELLS]
    questions = [{"question": question.replace(" a eos", " an eos"), "answer": answer} for question, answer in pairs]
    if len(white) == 1:
        questions.append({"question": "What type of white blood cell is this?", "answer": labels[white[0]]})
    return questions


def cell_cloze(label: str, attributes: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """A sentence about a white cell with one to three words left out.

    Returns:
        `dict[str, str]`: `masked` with sentinels in T5's order, `completed` the whole sentence.
    """
    words = {"label": label.capitalize(), **attributes}
    count = int(rng.integers(1, 4))
    blanks = set(rng.choice(_BLANK_SLOTS, size=count, replace=False).tolist())
    order = sorted(blanks, key=lambda name: _SENTENCE.index(f"{{{name}}}"))
    sentinels = {name: f"<extra_id_{number}>" for number, name in enumerate(order)}
    return {"masked": _SENTENCE.format(**(words | sentinels)), "completed": _SENTENCE.format(**words)}


def field_cloze(labels: Sequence[str], rng: np.random.Generator) -> list[dict[str, str]]:
    """Sentences about a field: one on its counts, and one on its white cell where there is only one."""
    white = [index for index, label in enumerate(labels) if label in WHITE_CELLS]
    words = [str(len(white)), str(sum(label == "platelet" for label in labels))]
    template = "The field shows {} white blood cells and {} platelets among the red blood cells."
    hidden = int(rng.integers(len(words)))
    masked = ["<extra_id_0>" if slot == hidden else word for slot, word in enumerate(words)]
    sentences = [{"masked": template.format(*masked), "completed": template.format(*words)}]
    if len(white) == 1:
        template = "The only white blood cell in the field is of the type {}."
        completed = template.format(labels[white[0]])
        sentences.append({"masked": template.format("<extra_id_0>"), "completed": completed})
    return sentences
