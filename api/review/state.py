"""What a review holds: the predictions of a results folder with the log's entries laid over them."""

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unihema.errors import InputError, OutputError, RequestError, UniHemaError
from unihema.files import exclusive, shortened
from unihema.report.samples import check_samples, read_samples, sample_of
from unihema.result_folder import StoredResult, read_results
from unihema.results.calibration import TypeLevel, certainty, left_open
from unihema.results.cell import Cell

from .log import BEGINNING, Change, Entry, Log


logger = logging.getLogger(__name__)
LOG_FILE = "review.sqlite"
# Of the only cell in an image of a single cell, which has no number of its own.
WHOLE_IMAGE = 0
# Of the entry that begins an image: how images are shared among samples.
SAMPLE_BY = "sample_by"
LONGEST_LABEL, LONGEST_NAME, LONGEST_REASON = 200, 200, 2000
# Cells that are changed at once, and that a person may draw in one image.
MOST_AT_ONCE, MOST_DRAWN = 20_000, 10_000
# A drawn cell is at least so many pixels wide and high.
SMALLEST_BOX = 2.0
PRELIMINARY, FINAL, AMENDING, AMENDED = "preliminary", "final", "amendment open", "amended"
SIGNED = (FINAL, AMENDED)


class StaleError(UniHemaError):
    """Somebody else has changed the same thing meanwhile; what is there now is in `cells`."""

    def __init__(self, message: str, cells: "Sequence[ReviewedCell]" = ()):
        super().__init__(message)
        self.cells = list(cells)


class SignedError(UniHemaError):
    """The sample is signed: without an amendment nothing of it is changed."""


@dataclass
class ReviewedCell:
    """A cell as it stands.

    Args:
        image (`str`): Name of its image.
        original ([`Cell`]): As predicted, or as drawn.
        drawn (`bool`): A person drew it.
        label (`str`): Its class now.
        present (`bool`): False when it was deleted.
        looked_at (`bool`): A person has confirmed or changed it.
        revision (`int`): Number of the last entry about it, 0 without one.
    """

    image: str
    original: Cell
    drawn: bool
    label: str
    present: bool = True
    looked_at: bool = False
    revision: int = 0

    @property
    def value(self) -> dict[str, Any]:
        """What entries of the log say of it."""
        return {"label": self.label, "present": self.present, "looked_at": self.looked_at}


@dataclass
class ReviewedImage:
    """An image as it stands.

    Args:
        stored ([`StoredResult`]): The predictions.
        sample (`str`): The sample that it belongs to.
        cells (`dict[int, ReviewedCell]`): Number -> cell.
        looked_through (`bool`): A person has said that its cells are all there, and right.
        revision (`int`): Number of the last entry about it or one of its cells.
    """

    stored: StoredResult
    sample: str
    cells: dict[int, ReviewedCell] = field(default_factory=dict)
    looked_through: bool = False
    revision: int = 0

    @property
    def name(self) -> str:
        """Of its files in the results folder."""
        return self.stored.name

    @property
    def shows_one_cell(self) -> bool:
        """Whether it was classified as a whole, instead of looked through for cells."""
        return WHOLE_IMAGE in self.cells

    @property
    def type_level(self) -> TypeLevel | None:
        """From which certainty on its white cells are counted by their types."""
        return TypeLevel.of(self.stored.result, self.shows_one_cell)

    def is_certain(self, cell: "ReviewedCell") -> bool:
        """Whether a person has looked at one of its cells."""
        return cell.looked_at or self.looked_through


@dataclass
class ReviewedSample:
    """A sample as it stands.

    Args:
        name (`str`): Its name.
        images (`list[ReviewedImage]`): Its images.
        classes (`list[str]`): Classes that were looked for in its images, and those that its cells got since, as they came.
        class_parents (`dict[str, str]`): Class -> coarser class, as the checkpoint has it.
        status (`str`): `preliminary`, `final`, `amendment open` or `amended`.
        revision (`int`): Number of the last entry about it.
        signatures (`list[dict]`): Of each `who`, `time`, `status`, `number`, `head` (hash of the last entry that it covers),
            `counts` and `why`.
    """

    name: str
    images: list[ReviewedImage] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    class_parents: dict[str, str] = field(default_factory=dict)
    status: str = PRELIMINARY
    revision: int = 0
    signatures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cells(self) -> Iterator[ReviewedCell]:
        """Its cells, deleted ones too."""
        return (cell for image in self.images for cell in image.cells.values())

    @property
    def counts(self) -> dict[str, int]:
        """Cells of each class, zero included."""
        counts = dict.fromkeys(self.classes, 0)
        for cell in self.cells:
            if cell.present:
                counts[cell.label] += 1
        return counts

    def reported(self, counts: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
        """Cells of each class as its report counts them, and a sentence where types of white cells are left open there.

        Args:
            counts (`Mapping[str, int]`): All of its cells, see `counts`.
        """
        reported, opened, typed, levels = dict(counts), 0, 0, []
        for image in self.images:
            if (level := image.type_level) is None:
                continue
            levels.append(level)
            present = [cell for cell in image.cells.values() if cell.present]
            types = level.types(cell.label for cell in present)
            for cell in present:
                if cell.label not in types:
                    continue
                typed += 1
                if not image.is_certain(cell) and level.leaves_open(certainty(cell.original)):
                    opened += 1
                    reported[cell.label] -= 1
                    reported[level.untyped] = reported.get(level.untyped, 0) + 1
        return reported, left_open(opened, typed, levels)

    def add(self, image: ReviewedImage) -> None:
        """Takes an image in."""
        self.images.append(image)
        labels = [cell.label for cell in image.cells.values()]
        self.classes = list(dict.fromkeys((*self.classes, *image.stored.result.classes, *labels)))
        self.class_parents |= image.stored.result.class_parents


class Target(NamedTuple):
    """A cell that is to be changed, and what was seen of it.

    Args:
        image (`str`): Name of its image.
        cell (`int`): Its number there.
        revision (`int`): Of the cell, when it was seen.
    """

    image: str
    cell: int
    revision: int


class Review:
    """The review of one results folder. Its methods may be called from several threads; one process at a time has it for writing.

    Args:
        folder (`str` or `Path`): The results folder.
        sample_by (`str`, *optional*): How images are shared among samples, see [`sample_of`]; as when the review began when
            missing.
        read_only (`bool`): Only read what is there.

    Attributes:
        sample_by (`str`, *optional*): As they are shared.
        late (`dict[str, list[str]]`): Signed sample -> images that were analysed since. They are no part of it until an amendment
            is open and the review begins again.

    Raises:
        InputError: No results folder, nothing in it, or other results than those that the log is about.
        OutputError: The log is damaged, or another process is reviewing.
    """

    def __init__(self, folder: str | Path, sample_by: str | None = None, read_only: bool = False):
        self.folder = Path(folder)
        self.images: dict[str, ReviewedImage] = {}
        self.samples: dict[str, ReviewedSample] = {}
        self.late: dict[str, list[str]] = {}
        self.closing = ExitStack()
        # Actions that can be taken back, and done again, of each person and sample.
        self._done: dict[tuple[str, str | None], list[int]] = defaultdict(list)
        self._undone: dict[tuple[str, str | None], list[int]] = defaultdict(list)
        self._actions: dict[int, list[Entry]] = {}
        self._lock = threading.RLock()
        stored = list(read_results(self.folder))
        if not stored:
            raise InputError(f"{self.folder}: no results of its settings. Run `unihema predict` again.")
        path = self.folder / LOG_FILE
        try:
            if not read_only:
                self.closing.enter_context(exclusive(self.folder))
            self.log = self.closing.enter_context(Log(path, read_only))
            damage = self.log.verify()
            if damage is not None:
                raise OutputError(
                    f"{path}: {damage.what} The log was changed by hand, or by a fault of the disk. Put back a copy of it."
                )
            self._begin(stored, sample_by, read_only)
            for entry in self.log.entries():
                try:
                    self._apply(entry)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise OutputError(
                        f"{path}: entry {entry.number} is none of a review of this folder ({shortened(repr(error))}). Put back a "
                        "copy of the log, or move it away and begin anew."
                    ) from error
        except BaseException:
            self.closing.close()
            raise

    def _begin(self, stored: Sequence[StoredResult], sample_by: str | None, read_only: bool) -> None:
        """Lays out images and samples, and notes in the log which predictions it is about."""
        known, status = {}, {}
        for entry in self.log.entries():
            if entry.kind == "begin":
                known |= {entry.image: entry}
            elif entry.kind in ("sign", "amend") and isinstance(entry.new, dict):
                status[entry.sample] = entry.new.get("status")
        rule = self._rule(known, stored) if sample_by is None else sample_by
        # Where nothing is to be shared out, a table of then need not be there.
        needed = sample_by is not None or any(each.name not in known for each in stored)
        table = read_samples(rule) if needed else None
        check_samples(stored, rule, table)
        self.sample_by = rule if table is None else str(Path(rule).absolute())  # type: ignore[arg-type]
        # A folder may have another name now than when the review began.
        alone = {entry.sample for entry in known.values()} if rule is None else set()
        fresh = []
        for each in stored:
            begun = known.get(each.name)
            if begun is not None and sample_by is None:
                sample = begun.sample
            elif len(alone) == 1:
                (sample,) = alone
            else:
                sample = sample_of(each, self.folder, rule, table)
            if begun is None and status.get(sample) in SIGNED:
                self.late.setdefault(sample, []).append(each.name)
                continue
            if begun is None:
                predicted = _predicted(each) | {SAMPLE_BY: self.sample_by}
                fresh.append(Change("begin", sample, each.name, None, None, predicted))
            elif {key: value for key, value in begun.new.items() if key != SAMPLE_BY} != _predicted(each):
                raise InputError(
                    f"{self.folder / LOG_FILE}: {each.name} was analysed again since it was reviewed, with other results. Put "
                    "the results back, or move the log away and begin anew."
                )
            elif begun.sample != sample:
                raise InputError(
                    f"{self.folder / LOG_FILE}: {each.name} belongs to the sample {begun.sample!r} there, not to {sample!r}. "
                    "Leave --sample-by out, or move the log away and begin anew."
                )
            image = ReviewedImage(each, sample, _cells(each))
            self.images[each.name] = image
            self.samples.setdefault(sample, ReviewedSample(sample)).add(image)
        gone = next((name for name in known if name not in self.images), None)
        if gone is not None:
            raise InputError(
                f"{self.folder}: the results of {shortened(gone)}, which was reviewed, are gone. Put them back."
            )
        for sample, names in self.late.items():
            logger.warning(
                "%s was signed before these were analysed, which are no part of it until an amendment is open and the review "
                "begins again: %s",
                shortened(sample, 60),
                shortened(", ".join(names), 300),
            )
        if fresh and not read_only:
            self.log.append("unihema", fresh)

    def _rule(self, known: dict[str | None, Entry], stored: Sequence[StoredResult]) -> str | None:
        """How images were shared among samples when the review began.

        Raises:
            InputError: There are new images, and a log of an earlier version does not say it.
        """
        stated = [entry.new[SAMPLE_BY] for entry in known.values() if SAMPLE_BY in entry.new]
        if stated:
            return stated[-1]
        alike = all(
            known[each.name].sample == sample_of(each, self.folder, None) for each in stored if each.name in known
        )
        if not alike and any(each.name not in known for each in stored):
            raise InputError(
                f"{self.folder / LOG_FILE}: it does not say how images are shared among samples, and there are new ones. Give "
                "--sample-by as when the review began."
            )
        return None

    def close(self) -> None:
        """Gives log and folder back."""
        with self._lock:
            self.closing.close()

    def __enter__(self) -> "Review":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing is changed meanwhile, but by the same thread."""
        with self._lock:
            yield

    def sample(self, name: str) -> ReviewedSample:
        """A sample by its name.

        Raises:
            RequestError: There is none.
        """
        found = self.samples.get(name)
        if found is None:
            raise RequestError(f"There is no sample {shortened(name, 60)!r}.")
        return found

    def change(
        self, who: str, targets: Sequence[Target], kind: str, label: str | None = None, why: str = ""
    ) -> list[Entry]:
        """Changes cells of one sample, all or none.

        Args:
            who (`str`): Name of the person.
            targets (`Sequence[Target]`): The cells.
            kind (`str`): `class` (they are of another one), `confirm` (they are right), `delete` or `restore`.
            label (`str`, *optional*): The class, for `class`.
            why (`str`): Reason.

        Returns:
            `list[Entry]`: What was written; nothing about cells that are so already.

        Raises:
            RequestError: A cell, or a kind of change, that there is not; a name that is none.
            SignedError: The sample is signed.
            StaleError: One of the cells was changed since it was seen.
            OutputError: It cannot be written.
        """
        if not 0 < len(targets) <= MOST_AT_ONCE:
            raise RequestError(f"{len(targets)} cells at once; 1 to {MOST_AT_ONCE} are changed.")
        if kind not in ("class", "confirm", "delete", "restore"):
            raise RequestError(f"{shortened(kind, 60)!r} is no change of cells.")
        if kind == "class":
            label = checked_text(label, "a class", LONGEST_LABEL)
        with self._lock:
            cells = {(each.image, each.cell): self._cell(each.image, each.cell) for each in targets}
            sample = self._open_sample({cell.image for cell in cells.values()})
            stale = [
                cells[each.image, each.cell]
                for each in targets
                if cells[each.image, each.cell].revision != each.revision
            ]
            if stale:
                raise StaleError(f"{len(stale)} of the cells were changed by somebody else meanwhile.", stale)
            changes = []
            for cell in cells.values():
                now = cell.value | {"looked_at": True}
                if kind == "class":
                    now["label"] = label
                elif kind != "confirm":
                    now["present"] = kind == "restore"
                if now != cell.value:
                    changes.append(Change(kind, sample.name, cell.image, cell.original.id, cell.value, now))
            return self._written(who, changes, why)

    def draw(self, who: str, image: str, box: Sequence[float], label: str, why: str = "") -> list[Entry]:
        """Adds a cell that was missed.

        Args:
            who (`str`): Name of the person.
            image (`str`): Name of the image.
            box (`Sequence[float]`): x_min, y_min, x_max, y_max in pixels of the image; what lies outside is cut off.
            label (`str`): Its class.
            why (`str`): Reason.

        Raises:
            RequestError: An image that there is not, a box too small, or an image that shows one cell.
            SignedError: The sample is signed.
            OutputError: It cannot be written.
        """
        label = checked_text(label, "a class", LONGEST_LABEL)
        with self._lock:
            of = self._image(image)
            sample = self._open_sample({image})
            if of.shows_one_cell:
                raise RequestError("This image shows one cell and was classified as a whole; no cell is drawn in it.")
            if sum(cell.drawn for cell in of.cells.values()) >= MOST_DRAWN:
                raise RequestError(f"{MOST_DRAWN:,} cells are drawn in this image already.")
            if len(box) != 4 or not all(math.isfinite(value) for value in box):
                raise RequestError("A box has four numbers: left, top, right and bottom.")
            result = of.stored.result
            left, right = (min(max(box[place], 0.0), float(result.width)) for place in (0, 2))
            top, bottom = (min(max(box[place], 0.0), float(result.height)) for place in (1, 3))
            if right - left < SMALLEST_BOX or bottom - top < SMALLEST_BOX:
                raise RequestError(f"The box is smaller than {SMALLEST_BOX:g} pixels, or outside the image.")
            number = max((*of.cells, WHOLE_IMAGE)) + 1
            now = {"label": label, "present": True, "looked_at": True, "box": [left, top, right, bottom]}
            return self._written(who, [Change("draw", sample.name, image, number, None, now)], why)

    def look_through(self, who: str, image: str, revision: int, through: bool = True, why: str = "") -> list[Entry]:
        """Says that a person has looked through an image: all its cells are there and right as they stand now.

        Args:
            who (`str`): Name of the person.
            image (`str`): Name of the image.
            revision (`int`): Of the image when it was seen.
            through (`bool`): False takes that back.
            why (`str`): Reason.

        Raises:
            RequestError: An image that there is not.
            SignedError: The sample is signed.
            StaleError: Something in the image was changed since it was seen.
            OutputError: It cannot be written.
        """
        with self._lock:
            of = self._image(image)
            sample = self._open_sample({image})
            if of.revision != revision:
                raise StaleError("Something in this image was changed by somebody else meanwhile.")
            if of.looked_through == through:
                return []
            values = ({"looked_through": value} for value in (of.looked_through, through))
            return self._written(who, [Change("look through", sample.name, image, None, *values)], why)

    def undo(self, who: str, sample: str) -> list[Entry]:
        """Takes back the last action of a person in a sample, by an entry of its own.

        Raises:
            RequestError: There is none.
            SignedError: The sample is signed.
            StaleError: What it changed was changed again by somebody else.
            OutputError: It cannot be written.
        """
        return self._back_or_forth(who, sample, "undo", self._done)

    def redo(self, who: str, sample: str) -> list[Entry]:
        """Does again what a person has taken back last. See [`Review.undo`]."""
        return self._back_or_forth(who, sample, "redo", self._undone)

    def _back_or_forth(
        self, who: str, sample: str, kind: str, actions: dict[tuple[str, str | None], list[int]]
    ) -> list[Entry]:
        who = checked_text(who, "the name of a reviewer", LONGEST_NAME)
        with self._lock:
            of = self.sample(sample)
            if of.status in SIGNED:
                raise _signed(of)
            stack = actions.get((who, sample))
            if not stack:
                raise RequestError(f"There is nothing of {shortened(who, 60)} to {kind}.")
            changes, stale = [], []
            for entry in self._actions[stack[-1]]:
                before, after = (entry.new, entry.old) if kind == "undo" else (entry.old, entry.new)
                if entry.kind == "draw":
                    there = {**entry.new, "present": kind == "undo"}
                    before, after = there, {**there, "present": kind == "redo"}
                now = self._value(entry)
                if now != {name: before[name] for name in now}:
                    stale.append(entry)
                changes.append(Change(kind, entry.sample, entry.image, entry.cell, before, after))
            if stale:
                cells = [self._cell(entry.image, entry.cell) for entry in stale if entry.cell is not None]
                raise StaleError(f"What is to be {kind}ne was changed by somebody else meanwhile.", cells)
            return self._written(who, changes, undoes=stack[-1])

    def sign(self, who: str, sample: str, revision: int, why: str = "") -> list[Entry]:
        """Signs a sample as it stands: it becomes final, or amended where an amendment is open.

        Args:
            who (`str`): Name of the person.
            sample (`str`): The sample.
            revision (`int`): Of the sample when it was seen.
            why (`str`): A remark.

        Raises:
            RequestError: A sample that there is not.
            SignedError: It is signed already.
            StaleError: Something of it was changed since it was seen.
            OutputError: It cannot be written.
        """
        with self._lock:
            of = self.sample(sample)
            if of.status in SIGNED:
                raise _signed(of)
            if of.revision != revision:
                raise StaleError("Something in this sample was changed by somebody else meanwhile.")
            status = FINAL if of.status == PRELIMINARY else AMENDED
            new = {"status": status, "head": self.log.head[1], "counts": of.counts}
            return self._written(who, [Change("sign", sample, None, None, {"status": of.status}, new)], why)

    def amend(self, who: str, sample: str, why: str) -> list[Entry]:
        """Opens an amendment of a signed sample. What was signed stays in the log.

        Raises:
            RequestError: A sample that there is not, one that is not signed, or no reason.
            OutputError: It cannot be written.
        """
        why = checked_text(why, "a reason for the amendment", LONGEST_REASON)
        with self._lock:
            of = self.sample(sample)
            if of.status not in SIGNED:
                raise RequestError("This sample is not signed: it can be changed without an amendment.")
            change = Change("amend", sample, None, None, {"status": of.status}, {"status": AMENDING})
            return self._written(who, [change], why)

    def changed(self, sample: str, after: int) -> tuple[list[ReviewedCell], list[ReviewedImage]]:
        """Cells and images of a sample with entries after a number."""
        with self._lock:
            images = [image for image in self.sample(sample).images if image.revision > after]
            return [cell for image in images for cell in image.cells.values() if cell.revision > after], images

    def can_undo(self, who: str, sample: str) -> tuple[bool, bool]:
        """Whether a person has something to undo, and to redo."""
        return bool(self._done.get((who, sample))), bool(self._undone.get((who, sample)))

    def _written(self, who: str, changes: list[Change], why: str = "", undoes: int | None = None) -> list[Entry]:
        who = checked_text(who, "the name of a reviewer", LONGEST_NAME)
        why = "" if not why else checked_text(why, "a reason", LONGEST_REASON)
        entries = self.log.append(who, changes, why, undoes) if changes else []
        for entry in entries:
            self._apply(entry)
        return entries

    def _apply(self, entry: Entry) -> None:
        """Lays an entry over what is there: right after it was written, and again at the next start."""
        sample = self.samples[entry.sample]  # type: ignore[index]
        if entry.kind == "begin":
            return
        sample.revision = entry.number
        if entry.image is not None:
            self.images[entry.image].revision = entry.number
        if entry.kind in ("sign", "amend"):
            if entry.new["status"] not in (*SIGNED, AMENDING):
                raise ValueError("an unknown status")
            sample.status = entry.new["status"]
            if entry.kind == "sign":
                told = {"who": entry.who, "time": entry.time, "number": entry.number, "why": entry.why}
                sample.signatures.append(entry.new | told)
            return
        image = self.images[entry.image]
        if entry.cell is None:
            image.looked_through = entry.new["looked_through"]
        else:
            if entry.kind == "draw":
                drawn = Cell(entry.cell, entry.new["box"], entry.new["label"], 1.0)
                image.cells[entry.cell] = ReviewedCell(image.name, drawn, True, drawn.label)
            cell = image.cells[entry.cell]
            if not isinstance(entry.new["label"], str):
                raise TypeError("a class that is no text")
            cell.label, cell.present = entry.new["label"], entry.new["present"]
            cell.looked_at, cell.revision = entry.new["looked_at"], entry.number
            if cell.label not in sample.classes:
                sample.classes.append(cell.label)
        self._note_action(entry)

    def _note_action(self, entry: Entry) -> None:
        key = entry.who, entry.sample
        if entry.undoes is None:
            self._actions.setdefault(entry.action, []).append(entry)
            self._undone[key].clear()
        if entry.number == entry.action:
            gives, takes = (self._undone, self._done) if entry.kind == "undo" else (self._done, self._undone)
            gives[key].append(entry.action if entry.undoes is None else entry.undoes)
            if entry.undoes is not None:
                takes[key].remove(entry.undoes)

    def _value(self, entry: Entry) -> dict[str, Any]:
        image = self.images[entry.image]
        return {"looked_through": image.looked_through} if entry.cell is None else image.cells[entry.cell].value

    def _image(self, name: str) -> ReviewedImage:
        found = self.images.get(name)
        if found is None:
            raise RequestError(f"There is no image {shortened(name, 60)!r}.")
        return found

    def _cell(self, image: str | None, cell: int | None) -> ReviewedCell:
        found = self._image(image).cells.get(cell)
        if found is None:
            raise RequestError(f"There is no cell {cell} in this image.")
        return found

    def _open_sample(self, images: set[str]) -> ReviewedSample:
        names = {self.images[image].sample for image in images}
        if len(names) != 1:
            raise RequestError("Cells of several samples are not changed at once.")
        sample = self.samples[names.pop()]
        if sample.status in SIGNED:
            raise _signed(sample)
        return sample


def _signed(sample: ReviewedSample) -> SignedError:
    last = sample.signatures[-1]
    return SignedError(f"This sample is {sample.status}, signed by {last['who']}. Open an amendment to change it.")


def _predicted(stored: StoredResult) -> dict[str, Any]:
    return {"image_sha256": stored.image_sha256, "record_sha256": stored.record_sha256}


def _cells(stored: StoredResult) -> dict[int, ReviewedCell]:
    result = stored.result
    cells = list(result.cells)
    if not cells and result.single_cell is not None:
        cells = [result.whole_image_cell(WHOLE_IMAGE)]
    return {cell.id: ReviewedCell(stored.name, cell, False, cell.label) for cell in cells}


def checked_text(value: object, what: str, most: int) -> str:
    """A text that a person typed.

    Raises:
        RequestError: It is empty, longer than `most` characters, or no text that can be stored.
    """
    if not isinstance(value, str) or not value.strip() or len(value) > most:
        raise RequestError(f"{what[0].upper()}{what[1:]} is missing, or longer than {most} characters.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what[0].upper()}{what[1:]} holds what is no character.") from None
    return value.strip()


__all__ = [
    "AMENDED",
    "AMENDING",
    "BEGINNING",
    "FINAL",
    "LOG_FILE",
    "PRELIMINARY",
    "Review",
    "ReviewedCell",
    "ReviewedImage",
    "ReviewedSample",
    "SignedError",
    "StaleError",
    "Target",
    "WHOLE_IMAGE",
    "checked_text",
    "sample_of",
]
