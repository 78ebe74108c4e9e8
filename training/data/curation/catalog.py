"""The data sets of the Uni-Hema paper: task, disease, licence, links and notes.

`catalog.json` holds them: the 45 rows of the official README's table, and the two text sets of the paper that it does not
list. A field that is missing is one that nobody has stated; nothing in it is a guess. A disease is given where the name or a
link of the set names it. `python -m unihema.training.data.curation.catalog` prints the table of docs/datasets.md.
"""

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from unihema.errors import DatasetError
from unihema.training.data.rows import TASKS


@dataclass(frozen=True)
class CatalogEntry:
    """A data set of the paper. An empty field is one that nobody has stated.

    Args:
        key (`str`): `task/name`, as the commands take it.
        name (`str`): As the official table has it.
        task (`str`): One of the five tasks.
        disease (`str`): What its smears show.
        licence (`str`): SPDX name, several that apply together joined by `AND`; `notes` says who states it.
        data_link (`str`): As the official table has it.
        paper_link (`str`): As the official table has it.
        notes (`str`): What else is known: source of the licence, layout of the archive, which sets share photographs.
    """

    key: str
    name: str
    task: str
    disease: str = ""
    licence: str = ""
    data_link: str = ""
    paper_link: str = ""
    notes: str = ""


@cache
def catalog() -> tuple[CatalogEntry, ...]:
    """All entries, in the order of the official table."""
    content = json.loads(Path(__file__).with_name("catalog.json").read_text(encoding="utf-8"))
    return tuple(CatalogEntry(**entry) for entry in content)


def find_entries(task: str | None = None, disease: str | None = None) -> list[CatalogEntry]:
    """Entries of a task and of a disease (a part of its name is enough).

    Raises:
        DatasetError: Unknown task.
    """
    if task is not None and task not in TASKS:
        raise DatasetError(f"Unknown task '{task}'; tasks are {', '.join(TASKS)}.")
    return [
        entry
        for entry in catalog()
        if (task is None or entry.task == task) and (disease is None or disease.lower() in entry.disease.lower())
    ]


def find_entry(name: str) -> CatalogEntry:
    """The entry of a key, or of a name that only one entry has.

    Raises:
        DatasetError: None, with the closest keys, or several, with their keys.
    """
    wanted = name.lower()
    for entry in catalog():
        if entry.key == wanted:
            return entry
    named = [entry for entry in catalog() if wanted in (entry.name.lower(), entry.key.partition("/")[2])]
    if len(named) == 1:
        return named[0]
    if named:
        raise DatasetError(f"Several data sets are called '{name}': {', '.join(entry.key for entry in named)}.")
    keys = [entry.key for entry in catalog()]
    parts = {key.partition("/")[2]: key for key in keys} | {key: key for key in keys}
    close = [parts[match] for match in difflib.get_close_matches(wanted, parts, n=3, cutoff=0.5)]
    hint = f" Did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
    raise DatasetError(f"No data set '{name}' in the catalog.{hint} `unihema data list` shows all.")


def catalog_table() -> str:
    """All entries as the Markdown table of docs/datasets.md."""
    lines = ["| data set | disease | licence | links | notes |", "|---|---|---|---|---|"]
    for entry in catalog():
        links = {"data": entry.data_link, "paper": entry.paper_link}
        linked = ", ".join(f"[{name}]({link})" for name, link in links.items() if link)
        notes = re.sub(r"https?://\S*[\w/]", r"<\g<0>>", entry.notes)
        lines.append(f"| `{entry.key}` | {entry.disease} | {entry.licence} | {linked} | {notes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(catalog_table(), end="")
