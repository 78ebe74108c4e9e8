"""Images that several machines share: which are of a shard, and what its results folder says of them."""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unihema.errors import RequestError
from unihema.files import real_path, shortened, write_json


SHARD_FILE = "shard.json"
MOST_SHARDS = 100_000


class Shard(NamedTuple):
    """A part of the images.

    Args:
        number (`int`): Which, from 1.
        of (`int`): How many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> "Shard":
        """A shard as `3/8`, or of the task of a Slurm array as `slurm`.

        Args:
            text (`str`): Either.
            environment (`Mapping[str, str]`): Where Slurm says which task this is.

        Raises:
            RequestError: It is neither, or there is no array.
        """
        try:
            if text == "slurm":
                task, least, count, step = (
                    int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
                    for name, default in (("ID", ""), ("MIN", "0"), ("COUNT", ""), ("STEP", "1"))
                )
                number, of = (task - least) // step + 1, count
            else:
                number, of = (int(part) for part in text.split("/"))
        except (ValueError, ZeroDivisionError):
            said = "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT are not set" if text == "slurm" else repr(text)
            raise RequestError(
                f"A shard is written as 3/8, or slurm within a Slurm array: {shortened(said)}."
            ) from None
        if not 1 <= number <= of <= MOST_SHARDS:
            raise RequestError(f"A shard is one of 1/{of} to {of}/{of}, of {MOST_SHARDS} at most; got {number}/{of}.")
        return cls(number, of)

    @property
    def folder(self) -> str:
        """Name of its results folder."""
        return f"shard_{self.number}_of_{self.of}"

    def holds(self, name: str) -> bool:
        """Whether an image is of this shard: a function of its name within what was given, on every machine the same."""
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1


def names_within(images: Sequence[Path], inputs: Sequence[str | Path]) -> dict[str, Path]:
    """Images by the number of the input that gave them and their path within it, which other machines know them by as well.

    Args:
        images (`Sequence[Path]`): What [`find_images`] found.
        inputs (`Sequence[str | Path]`): Where.
    """
    folders = [(number, Path(item)) for number, item in enumerate(inputs) if os.path.isdir(item)]
    named = {}
    for image in images:
        within = next(
            (f"{number}/{image.relative_to(at).as_posix()}" for number, at in folders if at in image.parents), None
        )
        if within is None:
            within = f"{len(inputs)}/{image.as_posix()}"
        named[within] = image
    return named


def write_shard(
    folder: Path,
    shard: Shard,
    images: Mapping[str, Path],
    failed: Mapping[str, str],
    tables: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Says in its results folder which images a shard has, and what of them failed.

    Args:
        folder (`Path`): The results folder of the shard.
        shard ([`Shard`]): Which it is.
        images (`Mapping[str, Path]`): Its images, see [`names_within`].
        failed (`Mapping[str, str]`): Image or input -> what was wrong with it.
        tables (`Mapping[str, Any]`): What the columns of its tables follow from.
        given (`Mapping[str, Any]`): How many images all shards together have, as this machine sees them, and the SHA-256 of their
            names.
    """
    listed = {name: str(real_path(path)) for name, path in images.items()}
    said = {"number": shard.number, "of": shard.of, "images": listed, "failed": dict(failed), "tables": dict(tables)}
    write_json(folder / SHARD_FILE, said | {"given": dict(given)})


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a file at another place, without taking room where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


__all__ = ["MOST_SHARDS", "SHARD_FILE", "Shard", "link_or_copy", "names_within", "write_shard"]
