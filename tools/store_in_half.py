"""A checkpoint with its weights stored in half precision: half the size on disk, loaded in float32 as before.

`python -m tools.store_in_half CHECKPOINT FOLDER` writes the checkpoint that comes with the package.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from unihema.checkpoint_files import REFERENCE_FILE
from unihema.errors import InputError
from unihema.files import scratch_folder, write_json


def store_in_half(checkpoint: str | Path, folder: str | Path) -> int:
    """Copies a checkpoint, without its code, with float16 weights; its configuration goes on saying float32, so that is what
    is computed in.

    Args:
        checkpoint (`str` or `Path`): A checkpoint folder of one weight file.
        folder (`str` or `Path`): Where; made if missing.

    Returns:
        `int`: Size of the new weight file in bytes.

    Raises:
        ValueError: A weight that float16 cannot hold; nothing is written then.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    weights = load_file(checkpoint / "model.safetensors")
    halves = {}
    for name, value in weights.items():
        # What an average or a count needs all its digits for stays as it is.
        keep = not value.is_floating_point() or name.endswith("running_var")
        halves[name] = value if keep else value.half()
        if not bool(torch.isfinite(halves[name]).all()):
            raise InputError(f"{checkpoint}: {name} has values that float16 cannot hold.")
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        told = path.suffix in (".json", ".md", ".jinja") and path.name not in ("stages.json", "mix.json")
        if told or path.name == REFERENCE_FILE:
            shutil.copyfile(path, folder / path.name)
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        # The code for machines without this package does not come along; saving the loaded model writes it again.
        settings.pop("auto_map", None)
        if path.name == "config.json":
            settings["dtype"] = "float32"
        write_json(path, settings)
    with scratch_folder(folder) as scratch:
        partial = scratch / "model.safetensors"
        save_file(halves, partial, metadata={"format": "pt"})
        partial.chmod(folder.stat().st_mode & 0o666)
        os.replace(partial, folder / partial.name)
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    """Stores a checkpoint's weights in half precision."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="Checkpoint folder of one weight file.")
    parser.add_argument("folder", type=Path, help="Where; made if missing.")
    given = parser.parse_args()
    size = store_in_half(given.checkpoint, given.folder)
    print(f"{given.folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
