"""`unihema card`: the card of a checkpoint, an adapter or a data folder."""

from pathlib import Path

import typer

from .options import pairs


def card(
    folder: Path = typer.Argument(..., help="Checkpoint, adapter or data folder."),
    license: str = typer.Option(None, help="Of weights or data, as the Hub calls it: cc-by-4.0, mit, other, ..."),
    license_name: str = typer.Option(None, help="Name of a licence that the Hub calls other."),
    license_link: str = typer.Option(None, help="Where that is to be read."),
    name: str = typer.Option(None, help="Title; the folder's name by default."),
    data_license: list[str] = typer.Option([], help="Licence of a training data set, NAME=LICENCE; may be repeated."),
    data_source: list[str] = typer.Option([], help="Where it is from, NAME=ADDRESS or NAME=owner/dataset."),
    base: str = typer.Option(None, help="Repository of the base model."),
    task: str = typer.Option(None, "--task", "-t", help="What an adapter was trained for."),
    source: str = typer.Option(None, help="Where a data folder is from: an address, or owner/dataset."),
    description: str = typer.Option(None, help="What a data folder shows, and who annotated it."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a README.md that somebody else wrote."),
) -> None:
    """Write README.md of a checkpoint, an adapter or a data folder from what lies in it."""
    from unihema.files import write_text
    from unihema.hub_cards import folder_card
    from unihema.hub_cards.card import CARD_FILE, check_replaceable

    path = folder / CARD_FILE
    if not overwrite:
        check_replaceable(path)
    terms = {"licence": license, "licence_name": license_name, "licence_link": license_link, "name": name}
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        text = folder_card(
            folder,
            data_licences=pairs(data_license, "--data-license", "cbc=mit"),
            data_sources=pairs(data_source, "--data-source", "cbc=https://..."),
            base_model=base,
            task=task,
            **terms,
        )
    else:
        from unihema.training.data.data_record import data_folder_card

        text = data_folder_card(folder, source=source, description=description, **terms)
    write_text(path, [text])
    typer.echo(f"{path} written. Read it before others do.")
