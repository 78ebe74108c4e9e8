"""A folder for a Gradio Space of the Hub: the app, what it needs, and a checkpoint."""

from importlib import resources
from pathlib import Path

import jinja2
from huggingface_hub import SpaceCardData

from unihema.errors import CheckpointError, FileThereError
from unihema.files import remove_whole, whole_folder
from unihema.version import __version__

from .card import CARD_FILE, TEMPLATES
from .check import check_card
from .push import plan_push


APP, CHECKPOINT = "app.py", "checkpoint"
# Of Gradio: the release that the tests run.
GRADIO = "6.31.0"


def write_space(checkpoint: str | Path, output: str | Path, name: str | None = None, overwrite: bool = False) -> Path:
    """Makes a folder that runs as a Gradio Space, and here with `python app.py` (the extra `space`).

    In it are `app.py`, `requirements.txt`, `README.md`, and in `checkpoint/` what a push of the checkpoint takes, with its card.

    Args:
        checkpoint (`str` or `Path`): Folder of a checkpoint, with its card.
        output (`str` or `Path`): The new folder. It appears when it is complete.
        name (`str`, *optional*): Title; the checkpoint's folder by default.
        overwrite (`bool`): Replace a Space that is there already.

    Returns:
        `Path`: The folder.

    Raises:
        CardError: No card, or one that may not be published.
        CheckpointError: An adapter; or a checkpoint that is not whole, see [`plan_push`].
        FileThereError: Something is there already.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    plan = plan_push(checkpoint)
    if plan.kind != "checkpoint":
        raise CheckpointError(f"{checkpoint}: an adapter is no Space. Take a checkpoint, such as its merged base.")
    if output.exists() and not (overwrite and (output / APP).is_file()):
        raise FileThereError(
            f"{output} is there already. Name another folder, or replace an earlier Space (--overwrite, or overwrite=True)."
        )
    data = check_card(plan.files[CARD_FILE].decode("utf-8"), source=CARD_FILE).data
    card_data = SpaceCardData(
        title=name or checkpoint.resolve().name,
        sdk="gradio",
        sdk_version=GRADIO,
        app_file=APP,
        license=data.license,
        tags=["unihema", "blood-smear"],
    )
    template = jinja2.Template((TEMPLATES / "space" / f"{CARD_FILE}.jinja").read_text(encoding="utf-8"))
    with whole_folder(output) as whole:
        (whole / CHECKPOINT).mkdir()
        for file, content in plan.files.items():
            # The package brings the code.
            if not file.endswith(".py"):
                (whole / CHECKPOINT / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        app = resources.files("unihema.hub_cards") / "templates" / "space" / APP
        (whole / APP).write_bytes(app.read_bytes())
        (whole / "requirements.txt").write_text(f"unihema[shapes]=={__version__}\n", encoding="utf-8")
        (whole / CARD_FILE).write_text(template.render(card_data=card_data) + "\n", encoding="utf-8")
        if output.exists():
            remove_whole(output)
    return output


__all__ = ["write_space"]
