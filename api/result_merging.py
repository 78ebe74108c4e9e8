"""One results folder of the shards that several machines have analysed."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unihema.errors import OutputError
from unihema.files import SETTINGS_FILE, claim_folder, exclusive, read_json_object, real_path
from unihema.result_folder import BatchReport, ResultFolder
from unihema.result_shards import MOST_SHARDS, SHARD_FILE
from unihema.results.cell import has, is_list, is_mapping, is_number, is_side, is_text, or_none


# Images that a message names.
SHOWN = 5


@dataclass
class MergeReport:
    """What became of the images of all shards.

    Args:
        images (`int`): Images in the tables.
        totals (`dict[str, int]`): Cells of each class.
        failed (`dict[str, str]`): Image or input -> what was wrong with it.
        repeated (`int`): Results of images that another shard's folder has as well: counted once.
        missing (`list[int]`): Numbers of the shards of which there is no folder.
        waiting (`list[str]`): Images of the shards that are neither analysed nor failed.
        unlike (`dict[str, int]`): Where shards were not given the same images, the folder of each and the number that it saw.
    """

    images: int = 0
    totals: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    missing: list[int] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    unlike: dict[str, int] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """A sentence for each reason why the tables are not those of all images."""
        said = [f"Shard {number} is missing." for number in self.missing[:SHOWN]]
        if len(self.missing) > SHOWN:
            said.append(f"{len(self.missing) - SHOWN} more shards are missing.")
        if self.unlike:
            named = ", ".join(f"{folder} of {number}" for folder, number in list(self.unlike.items())[:SHOWN])
            said.append(
                f"The shards are not of the same images, so that some may be in none of them: {named}. Repeat those that were "
                "not given all."
            )
        if self.waiting:
            named = ", ".join(self.waiting[:SHOWN])
            said.append(
                f"{len(self.waiting)} images are not analysed yet, such as {named}: repeat the commands of their shards."
            )
        return said


def merge_results(output: str | Path, on_image: Callable[[int, int], None] | None = None) -> MergeReport:
    """Makes one results folder of the shards in it, as if one run had analysed all images.

    Shards may have been stopped, repeated, or copied here from other machines: an image counts once. Files are linked where the
    file system can, and copied elsewhere.

    Args:
        output (`str` or `Path`): The folder given to the shards.
        on_image (`Callable`, *optional*): Called with the number of images that are done, and of all.

    Returns:
        [`MergeReport`]: What is in the tables, and what is missing.

    Raises:
        OutputError: There are no shards, they are not of one division or have other settings, or a file of them is damaged.
    """
    output = Path(output)
    shards = _shards_in(output)
    first = next(iter(shards))
    settings = read_json_object(first / SETTINGS_FILE, OutputError, "Repeat the command of this shard.")
    for folder in shards:
        claim_folder(folder, settings)
    of, tables = (shards[first][key] for key in ("of", "tables"))
    found, report = _newest_records(shards, settings)
    there = {shard["number"] for shard in shards.values()}
    report.missing = [number for number in range(1, of + 1) if number not in there]
    given = {folder.name: shard["given"] for folder, shard in shards.items() if shard["given"]}
    if len({each["sha256"] for each in given.values()}) > 1:
        report.unlike = {name: each["images"] for name, each in given.items()}
    with exclusive(output, ["records"]):
        claim_folder(output, settings)
        whole = ResultFolder(output, settings)
        images = found.values()
        whole.forget_moved({one.source for one in images}, {one.image_sha256 for one in images})
        # In the order in which one run would have met them.
        order = sorted(found, key=_place)
        names = whole.names([Path(found[name].source) for name in order], resolve=False)
        for number, name in enumerate(order, 1):
            whole.adopt(names[Path(found[name].source)], found[name].record)
            if on_image:
                on_image(number, len(order))
        batch = BatchReport(failed=report.failed)
        whole.write_tables(tables["attributes"], batch, tables["groups"])
    report.images, report.totals = batch.images, batch.totals
    return report


def _shards_in(output: Path) -> dict[Path, dict[str, Any]]:
    """The folders of shards, each with what its file says."""
    shards = {}
    for path in sorted(output.glob(f"*/{SHARD_FILE}")):
        said = read_json_object(path, OutputError, "Repeat the command of this shard.")
        said.setdefault("given", None)
        if not _SHARD(said) or not 1 <= said["number"] <= said["of"] <= MOST_SHARDS:
            raise OutputError(f"{path}: not what `unihema predict --shard` writes. Repeat the command of this shard.")
        shards[path.parent] = said
    if not shards:
        raise OutputError(f"{output}: no shards. `unihema predict ... -o {output} --shard 1/8` writes one.")
    divisions = {said["of"]: folder for folder, said in shards.items()}
    if len(divisions) > 1:
        named = ", ".join(f"{folder.name} is one of {of}" for of, folder in divisions.items())
        raise OutputError(f"{output}: shards of several divisions: {named}. Move those of one of them away.")
    return shards


def _is_path(value: Any) -> bool:
    return is_text(value) and "\0" not in value


def _are_images(value: Any) -> bool:
    """Images as [`names_within`] calls them -> where they lie."""
    return is_mapping(_is_path)(value) and all(re.match(r"[0-9]{1,9}/", name) for name in value)


_SHARD = has(
    number=is_side,
    of=is_side,
    images=_are_images,
    failed=lambda value: is_mapping(is_text)(value) and all(map(_is_path, value)),
    # Older ones do not say it.
    given=or_none(has(images=is_number, sha256=is_text)),
    tables=has(attributes=is_list(is_text), groups=is_list(lambda each: isinstance(each, bool), 3)),
)


class _Found(NamedTuple):
    source: str
    image_sha256: str
    record: Path
    written: float


def _newest_records(
    shards: Mapping[Path, Mapping[str, Any]], settings: dict[str, Any]
) -> tuple[dict[str, _Found], MergeReport]:
    """Name of each image that was analysed -> its latest result."""
    found: dict[str, _Found] = {}
    report, listed = MergeReport(), {}
    for folder, shard in shards.items():
        records = ResultFolder(folder, settings).current()
        listed |= shard["images"]
        report.failed |= shard["failed"]
        for name, source in shard["images"].items():
            if source not in records:
                continue
            path, digest = records[source]
            one = _Found(source, digest, path, path.stat().st_mtime)
            report.repeated += name in found
            if name not in found or one.written >= found[name].written:
                found[name] = one
    # What failed in one place may have been analysed in another.
    done = {source for name in found for source in (found[name].source, listed[name])}
    report.failed = {item: text for item, text in report.failed.items() if str(real_path(item)) not in done}
    bad = {str(real_path(item)) for item in report.failed}
    report.waiting = [source for name, source in sorted(listed.items()) if name not in found and source not in bad]
    return found, report


def _place(name: str) -> tuple[int, Path]:
    number, _, within = name.partition("/")
    return int(number), Path(within)


__all__ = ["MergeReport", "merge_results"]
