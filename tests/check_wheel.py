"""Says what a wheel lacks of the repository's packages, or holds beside them. `make dist` runs it."""

import re
import sys
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Folder of the repository -> folder in the wheel; the longest that fits counts.
PLACES = {
    "api": "unihema",
    "api/cli": "unihema_cli",
    "modeling_unihema": "unihema/modeling_unihema",
    "processing_unihema": "unihema/processing_unihema",
    "training": "unihema/training",
    "hub_cards": "unihema/hub_cards",
}
SUFFIXES = {".py", ".json", ".jinja", ".typed", ".safetensors", ".md", ".jpg", ".html", ".css", ".js"}


def expected() -> set[str]:
    """Names in the wheel of every source and data file of the packages."""
    names = set()
    for top in {place.split("/")[0] for place in PLACES}:
        for path in (ROOT / top).rglob("*"):
            own = path.relative_to(ROOT).as_posix()
            if path.suffix in SUFFIXES and "__pycache__" not in own:
                place = max((place for place in PLACES if own.startswith(f"{place}/")), key=len)
                names.add(PLACES[place] + own.removeprefix(place))
    return names


def main(folder: str) -> None:
    """Checks the only wheel in a folder."""
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    wrong = [f"lacks {name}" for name in sorted(expected() - held)]
    wrong += [f"holds {name}" for name in sorted(held - expected())]
    if wrong:
        sys.exit(f"{wheel}:\n" + "\n".join(wrong))
    print(f"{wheel}: {len(held)} files, as they should be")


if __name__ == "__main__":
    main(sys.argv[1])
