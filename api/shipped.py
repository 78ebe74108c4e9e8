"""The checkpoints and the example smears that come with the package: from installation to results without any download."""

import shutil
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from unihema.errors import CheckpointError, FileThereError, OutputError, RequestError

from .checkpoint_files import fingerprint, read_json
from .files import contents, remove_whole, sha256, shortened, whole_folder
from .modeling_unihema.configuration_unihema import UniHemaConfig


EXAMPLES = "examples"
# What each set of weights may be used for -> its folder.
WEIGHTS = {"research": "checkpoint", "open": "checkpoint-open"}


def lay_down_checkpoint(folder: str | Path = "unihema", replace: bool = False, weights: str = "research") -> Path:
    """Copies a shipped checkpoint, so that `AutoModel.from_pretrained("unihema")` finds it.

    Args:
        folder (`str` or `Path`): Where; a folder that holds the same checkpoint already is left as it is.
        replace (`bool`): Delete the checkpoint that is there.
        weights (`str`): `"research"` was trained on everything that could be read; some of that states no licence, so it is for
            research only. `"open"` was trained on data sets under MIT and CC BY 4.0. Each one's `NOTICE.md` has the words.

    Returns:
        `Path`: The checkpoint folder, whole.

    Raises:
        FileExistsError: Something else is there; what is no checkpoint is not deleted either.
        RequestError: There are no such weights.
    """
    if weights not in WEIGHTS:
        raise RequestError(f"Weights {shortened(repr(weights), 60)}: there are {' and '.join(WEIGHTS)}.")
    source, folder = _shipped(WEIGHTS[weights]), Path(folder)
    if folder.exists() and not _holds_checkpoint(folder):
        raise FileThereError(
            f"{folder} is there already and holds something else than a checkpoint, which is not deleted. Name another folder."
        )
    if folder.exists() and contents(folder) and not replace:
        if not _holds(folder, source):
            raise FileThereError(
                f"{folder} is there already and holds another checkpoint. Name another folder, or replace it (--overwrite, or "
                "replace=True)."
            )
        # What a killed call has left; not where nothing can be written, or another call is at it.
        with suppress(OutputError), whole_folder(folder) as whole:
            whole.rmdir()
        return folder
    with whole_folder(folder) as whole:
        shutil.copytree(source, whole, dirs_exist_ok=True)
        if folder.exists():
            remove_whole(folder)
    return folder


def copy_examples(folder: str | Path) -> list[Path]:
    """Copies the example smears with their credits; files of the same name are overwritten.

    Args:
        folder (`str` or `Path`): Where.

    Returns:
        `list[Path]`: The images, sorted: fields of view first, then crops of single cells.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copied = [Path(shutil.copyfile(path, folder / path.name)) for path in sorted(_shipped(EXAMPLES).iterdir())]
    images = [path for path in copied if path.suffix == ".jpg"]
    return sorted(images, key=lambda path: (not path.name.startswith("field"), path.name))


def _shipped(what: str) -> Path:
    return Path(str(files("unihema"))) / "shipped_files" / what


def _holds_checkpoint(folder: Path) -> bool:
    """Whether a folder is empty, or holds a checkpoint, even one of which a part is missing."""
    if not folder.is_dir():
        return False
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return not contents(folder)
    return config.get("model_type") == UniHemaConfig.model_type


def _holds(folder: Path, source: Path) -> bool:
    wanted = fingerprint(source)
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in wanted.items())


__all__ = ["WEIGHTS", "copy_examples", "lay_down_checkpoint"]
