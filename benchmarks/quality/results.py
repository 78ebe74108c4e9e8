"""The folder of a comparison: a result for each finished model, and what it was made with."""

import json
from pathlib import Path
from typing import Any

from unihema.errors import RunConfigError
from unihema.training.files import write_json
from unihema.training.run.config import flat


UNIHEMA = "unihema"
RESULT = "result.json"


def unihema_item(task: str) -> str:
    """What UniHema doing one task is called among the models."""
    return f"{UNIHEMA}/{task}"


class Results:
    """Results in the folders of their models: `NAME/result.json`, written last, so that a folder with one is finished.

    Args:
        folder (`str` or `Path`): Of the comparison.
        resume (`bool`): Go on with what is there.

    Raises:
        RunConfigError: Without `resume`, a folder that has results.
    """

    def __init__(self, folder: str | Path, resume: bool = False):
        self.folder = Path(folder)
        found = sorted(self.folder.rglob(RESULT))
        if found and not resume:
            raise RunConfigError(
                f"{self.folder} has {found[0].relative_to(self.folder)} of an earlier comparison. Go on with it (--resume), "
                "delete the folder, or name another (--output)."
            )

    def finished(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a finished model.

        Args:
            name (`str`): The peer, or UniHema doing a task (see [`unihema_item`]).
            settings (`dict[str, Any]`): What it is to be made with.

        Raises:
            RunConfigError: It was made with others, or its file cannot be read.
        """
        path = self.folder / name / RESULT
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            before = result["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunConfigError(f"{path}: cannot be read ({error!r}). Delete it; the model is made anew.") from error
        now = flat(json.loads(json.dumps(settings)))
        then = flat(before)
        changed = [key for key in now | then if now.get(key) != then.get(key)]
        if changed:
            key = changed[0]
            raise RunConfigError(
                f"{path} was made with {key}={then.get(key)!r}, now it is {now.get(key)!r}. Compare models of the same "
                f"settings: name another --output, or delete {path.parent} to make this one anew."
            )
        return result

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Takes in a finished model."""
        write_json(self.folder / name / RESULT, result)
