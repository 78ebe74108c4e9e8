"""The schema row: one dictionary a sample. Every reader returns such rows, and `SmearDataset` takes them.

Common keys: `image` (path or PIL image), `file_name`, `dataset`, `task`. Task keys:

- detection: `objects` (`bbox` xywh pixels, `category` names, `morphology` {attribute: value}; `iscrowd` where present, and
  `segmentation`, the mask of each cell as in COCO, or None)
  and `annotated_classes` (names, or None when all are); `size` (width, height) of the image that the boxes refer to,
  where known; `from_attributes` marks a crop of one cell that is there for its attributes: its box is the whole image,
  and box losses ignore it; `exact_classes` are coarser classes whose cells are of no finer class that is annotated;
- segmentation: `mask` (path or array, nonzero = cell), `prompt` (what the mask shows);
- single_cell: `label`; `box` (xywh pixels, of the image of `size`) where the cell is one of a field, cut out when it is read;
- question_answering: `question`, `answer`;
- cloze: `masked` (sentinels in T5's order), `completed` (the whole sentence).

Rows of any task may state where an image comes from: its `patient`, `slide` or `source_image` (the field that a crop was cut
from). Images that share one of these belong into one split. `origin` is the microscope, or the data set that first had it.
"""

import difflib
import logging
import math
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np

from unihema.errors import DatasetError, InputError
from unihema.modeling_unihema.tasks import TASKS
from unihema.processing_unihema.class_names import RED_CELL, cell_kind


logger = logging.getLogger(__name__)

Row = dict[str, Any]
# What a reader does with bad rows.
OnInvalid = Literal["error", "skip"]
# Bad rows that a message lists.
SHOWN = 50
REQUIRED_KEYS = {
    "detection": ("objects",),
    "segmentation": ("mask",),
    "single_cell": ("label",),
    "question_answering": ("question", "answer"),
    "cloze": ("masked", "completed"),
}
# Where an image comes from -> the names that data sets give it. Images that share one of these belong into one split.
GROUP_KEYS = {
    "patient": ("patient", "patient_id"),
    "slide": ("slide", "slide_id"),
    "source_image": ("source_image",),
}
# The same, and the microscope or the data set that first had the image.
PROVENANCE_KEYS = GROUP_KEYS | {"origin": ("origin", "microscope", "scanner")}
# Columns of tables and keys of records that readers know.
IMAGE_COLUMNS = ("file_name", "img_name", "filename", "image", "path")
LABEL_COLUMNS = ("label", "class")
KNOWN_COLUMNS = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *(key for keys in PROVENANCE_KEYS.values() for key in keys)}
# Warnings that were given within [`said_once`].
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def image_key(row: Row) -> Hashable:
    """What the rows of one image have in common."""
    return row["image"] if isinstance(row["image"], str) else id(row["image"])


def shown(value: Any) -> str:
    """A value of a file for a message, shortened: what others wrote may be long, or nested without end."""
    return _SHORT.repr(value)


def column_name(name: str) -> str:
    """The usual spelling of a column's name: lower case, with underscores."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def same_shape(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two sizes (width, height) are those of one picture, reduced or not: their sides are in proportion."""
    return abs(first[0] * second[1] - first[1] * second[0]) <= 0.01 * first[0] * second[1]


def group_ids(record: Mapping[str, Any], source: str = "") -> dict[str, str]:
    """The patient, slide, source image and origin that a record states.

    Args:
        record (`Mapping[str, Any]`): The record; keys in any case.
        source (`str`): Where it stands, for messages.

    Raises:
        DatasetError: One of them is neither text nor number.
    """
    named = {column_name(key): value for key, value in record.items() if value not in (None, "")}
    found = {}
    for group, keys in PROVENANCE_KEYS.items():
        value = next((named[key] for key in keys if key in named), None)
        if value is None:
            continue
        if not isinstance(value, (str, int, float)):
            raise DatasetError(f"{source}: {group} must be a text or a number, got {shown(value)}.")
        found[group] = str(value)
    return found


def witnesses(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows among which every name occurs: all of them, or, of rows that are not in memory, those that their index lists."""
    return getattr(rows, "witnesses", rows)


def class_names(rows: Iterable[Row]) -> list[str]:
    """Detection classes of the rows, in the order in which the data sets list them."""
    names: dict[str, None] = {}
    used: dict[str, None] = {}
    for row in rows:
        if row.get("task") == "detection":
            names.update(dict.fromkeys(row.get("annotated_classes") or ()))
            used.update(dict.fromkeys(row["objects"]["category"]))
    return list(names | used)


def single_cell_names(rows: Iterable[Row]) -> list[str]:
    """Labels of the single-cell rows, sorted."""
    return sorted({row["label"] for row in rows if row.get("task") == "single_cell"})


def morphology_schema(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Attributes of the detection rows with their sorted values, as `UniHemaConfig.morphology` takes them.

    An attribute with one value only is left out: there is nothing to tell apart.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        if row.get("task") == "detection":
            for attributes in row["objects"].get("morphology", ()):
                for name, value in attributes.items():
                    values.setdefault(name, set()).add(value)
    return {name: sorted(found) for name, found in values.items() if len(found) > 1}


def check_rows(
    rows: Sequence[Row],
    class_names: Sequence[str] | None = None,
    single_cell_labels: Sequence[str] | None = None,
    morphology: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Checks rows against the names a model knows.

    Args:
        rows (`Sequence[Row]`): Rows of any task.
        class_names (`Sequence[str]`, *optional*): Detection classes.
        single_cell_labels (`Sequence[str]`, *optional*): Single-cell classes.
        morphology (`Mapping[str, Sequence[str]]`, *optional*): Attribute -> values. An attribute that is not listed
            is ignored; an unlisted value of a listed attribute is an error.

    Raises:
        BadRowsError: Unknown task, missing key, or a class, label or value that is not listed; the message names every
            such row and lists what is known.
    """
    bad = BadRows()
    for row in rows:
        with bad.collecting():
            _check_row(row, class_names, single_cell_labels, morphology)
    if bad.messages:
        raise BadRowsError(bad.messages)


def _check_row(
    row: Row,
    class_names: Sequence[str] | None,
    single_cell_labels: Sequence[str] | None,
    morphology: Mapping[str, Sequence[str]] | None,
) -> None:
    where = f"{row.get('dataset', 'data')}: {row.get('file_name', '(no file_name)')}"
    task = row.get("task")
    if task not in TASKS:
        raise DatasetError(f"{where}: unknown task {task!r}; tasks are {', '.join(TASKS)}.")
    missing = [key for key in ("image", *REQUIRED_KEYS[task]) if row.get(key) is None]
    if missing:
        raise DatasetError(f"{where}: a {task} row needs {', '.join(missing)}.")
    check_types(row, where)
    if task == "detection":
        objects = row["objects"]
        lengths = {
            key: len(objects[key]) for key in ("bbox", "category", "morphology", "segmentation") if key in objects
        }
        if len(set(lengths.values())) > 1:
            raise DatasetError(f"{where}: lists of different lengths in objects: {lengths}. One entry a cell.")
        if class_names is not None:
            for name in dict.fromkeys(objects["category"]):
                _check_known(name, class_names, where, "class")
        for attributes in objects.get("morphology", ()) if morphology else ():
            for name, value in attributes.items():
                if name in morphology:
                    _check_known(value, morphology[name], where, f"value of {name}")
    elif task == "single_cell" and single_cell_labels is not None:
        _check_known(row["label"], single_cell_labels, where, "single-cell label")


def check_types(row: Row, where: str) -> None:
    """Checks that the values of a row have the types that rows.py says.

    Raises:
        DatasetError: One has not; `where` says of which row.
    """
    texts = [key for key in ("file_name", "label", "question", "answer", "masked", "completed", "prompt") if key in row]
    for key in (*texts, *(key for key in PROVENANCE_KEYS if key in row)):
        if not isinstance(row[key], str) and not (key == "prompt" and row[key] is None):
            raise DatasetError(f"{where}: {key} must be a text, got {shown(row[key])}.")
    size = row.get("size")
    if size is not None and not (
        isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise DatasetError(f"{where}: size must be width and height in pixels, got {shown(size)}.")
    names = row.get("annotated_classes")
    if names is not None and not _all_of(names, str):
        raise DatasetError(f"{where}: annotated_classes must be a list of names, got {shown(names)}.")
    if row.get("task") != "detection":
        return
    objects = row.get("objects")
    if not isinstance(objects, Mapping):
        raise DatasetError(f"{where}: objects must hold bbox and category, got {shown(objects)}.")
    if not _all_of(objects.get("category"), str):
        raise DatasetError(f"{where}: objects.category must be a list of names, got {shown(objects.get('category'))}.")
    for box in _sequence(objects.get("bbox"), f"{where}: objects.bbox"):
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_is_finite, box)):
            raise DatasetError(f"{where}: objects.bbox: {shown(box)} must be four numbers [x, y, width, height].")
    for attributes in _sequence(objects.get("morphology", []), f"{where}: objects.morphology"):
        if not isinstance(attributes, Mapping) or not all(isinstance(value, str) for value in attributes.values()):
            raise DatasetError(f"{where}: objects.morphology: {shown(attributes)} must be names and values.")
    for crowd in _sequence(objects.get("iscrowd", []), f"{where}: objects.iscrowd"):
        if not isinstance(crowd, int):
            raise DatasetError(f"{where}: objects.iscrowd: {shown(crowd)} must be 0 or 1.")


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise DatasetError(f"{where} must be a list, got {shown(value)}.")
    return value


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _check_known(name: str, known: Sequence[str], where: str, what: str) -> None:
    if name in known:
        return
    lowered = {str(other).lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1)
    hint = f" Did you mean '{lowered[close[0]]}'?" if close else ""
    raise DatasetError(
        f"{where}: unknown {what} '{name}'; known: {', '.join(map(str, known))}.{hint} "
        "Rename it (`rename`) or add it to the model's list."
    )


def first_lines(messages: Sequence[str]) -> str:
    """The first `SHOWN` messages, a line each, and how many more there are."""
    more = [f"... and {len(messages) - SHOWN} more"] if len(messages) > SHOWN else []
    return "\n".join([*messages[:SHOWN], *more])


def red_cell_diameter(rows: Sequence[Row], edge: int | None) -> list[float] | None:
    """How large red cells are in the fields of a training run, see `TrainingResults.red_cell_diameter`.

    Args:
        rows (`Sequence[Row]`): Of detection.
        edge (`int`, *optional*): Longest edge of the model's input in pixels.

    Returns:
        `list[float]` or `None`: 5 %, 50 % and 95 % of the medians of the fields; `None` with fewer than ten fields of five red
        cells.
    """
    medians = []
    for row in witnesses(rows) if edge else ():
        size, objects = row.get("size"), row["objects"]
        boxes = [box for box, name in zip(objects["bbox"], objects["category"]) if cell_kind(name) == RED_CELL]
        if size and len(boxes) >= 5:
            medians.append(np.median([math.sqrt(w * h) for _, _, w, h in boxes]) * edge / max(size))
    if len(medians) < 10:
        return None
    return [round(float(value), 2) for value in np.percentile(medians, (5, 50, 95))]


def cell_mask_sides(rows: Sequence[Row]) -> list[float] | None:
    """How large the cells with masks are, see `TrainingResults.cell_mask_sides`; `None` without any.

    Args:
        rows (`Sequence[Row]`): Of detection.
    """
    sides = [
        max(box[2:]) / max(row["size"])
        for row in witnesses(rows)
        if row.get("size")
        for box, mask in zip(row["objects"]["bbox"], row["objects"].get("segmentation") or ())
        if mask
    ]
    return [round(float(value), 4) for value in np.percentile(sides, (1, 99))] if sides else None


def have_cell_masks(rows: Iterable[Row]) -> bool:
    """Whether some row of detection states the mask of a cell."""
    return any(any(row["objects"].get("segmentation") or ()) for row in witnesses(rows))


# Characters of what is said of one row.
LONGEST_MESSAGE = 1200


class BadRowsError(DatasetError):
    """Rows that cannot be used.

    Attributes:
        messages (`list[str]`): One for each bad row, with its file and its line or entry.
    """

    def __init__(self, messages: list[str], remedy: str = ""):
        self.messages = list(messages)
        text = first_lines(messages)
        if len(messages) > 1:
            text = f"{len(messages)} bad rows:\n{text}"
        super().__init__(f"{text}\n{remedy}" if remedy else text)


@contextmanager
def said_once() -> Iterator[None]:
    """Within it a warning about data is given once, however often they are read."""
    if _said.get() is not None:
        yield
        return
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def warn(message: str) -> None:
    """Logs a warning about data; see [`said_once`]."""
    said = _said.get()
    if said is None or message not in said:
        logger.warning("%s", message)
    if said is not None:
        said.add(message)


def _both_ends(message: str) -> str:
    """A message without its middle where it quotes a name of thousands of characters: file and remedy stand at its ends."""
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


class BadRows:
    """Collects bad rows while a reader goes on with the next one.

    Attributes:
        messages (`list[str]`): One for each bad row, with its file and its line or entry.
        notes (`list[str]`): What a reader did that nobody asked for, such as merging two entries of one image.
    """

    def __init__(self):
        self.messages: list[str] = []
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        """Notes what was read otherwise than it stands, or not at all, without being wrong."""
        message = _both_ends(message)
        if message not in self.notes:
            self.notes.append(message)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Notes a [`DatasetError`] of one row instead of letting it end the reading."""
        try:
            yield
        except DatasetError as error:
            self.messages.append(_both_ends(str(error)))

    def tell_notes(self) -> None:
        """Logs the notes as warnings."""
        for note in self.notes:
            warn(note)

    def settle(self, on_invalid: OnInvalid) -> None:
        """Stops, or warns of each bad row and goes on. Notes are warnings.

        Args:
            on_invalid (`"error"` or `"skip"`): Which of the two.

        Raises:
            BadRowsError: There are bad rows, with `"error"`.
            ValueError: `on_invalid` is neither.
        """
        if on_invalid not in ("error", "skip"):
            raise InputError(f"on_invalid={on_invalid!r} must be 'error' or 'skip'.")
        self.tell_notes()
        if self.messages and on_invalid == "error":
            raise BadRowsError(self.messages, 'Correct this, or leave bad rows out (on_invalid="skip").')
        for message in self.messages:
            warn(f"{message} Left out.")
