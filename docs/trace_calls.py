"""Which of our own functions run, found by running them under Python's profiler; docs/tour.md has the result.

`python docs/trace_calls.py predict` prints the calls from the command to the first convolution that sees the image, and
`python docs/trace_calls.py train` the functions that a training run calls, in the order of their first call.
"""

import argparse
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from unihema.shipped import copy_examples, lay_down_checkpoint
from unihema.training.data.synthetic.folder import write_synthetic


ROOT = Path(__file__).parents[1]
Call = tuple[str, str]


def file_of(frame: FrameType) -> str | None:
    """The file of a frame's function, relative to the repository; `None` where it is not ours."""
    package, *rest = frame.f_globals.get("__name__", "").split(".")
    if package == "unihema_cli":
        rest = ["api", "cli", *rest]
    elif package != "unihema":
        return None
    elif not rest or not (ROOT / rest[0]).is_dir():
        rest = ["api", *rest]
    path = Path(*rest)
    path = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
    return path.as_posix()


def own_calls(frame: FrameType | None) -> Iterator[Call]:
    """File and name of our functions on the stack, innermost first."""
    while frame is not None:
        file, name = file_of(frame), frame.f_code.co_qualname
        if file is not None and not name.startswith("<"):
            yield file, name
        frame = frame.f_back


def run_command(arguments: list[str], watch: Callable) -> None:
    """Runs `unihema ARGUMENTS` in this process, `watch` being Python's profile function.

    Raises:
        SystemExit: The command failed.
    """
    kept = sys.argv
    sys.argv = ["unihema", *arguments]
    sys.setprofile(watch)
    try:
        runpy.run_module("unihema", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        sys.argv = kept


def calls_to_first_convolution(folder: Path) -> list[Call]:
    """Our own calls that are open when the first convolution sees the image of `unihema predict`, outermost first.

    Args:
        folder (`Path`): An empty folder to work in.
    """
    checkpoint = lay_down_checkpoint(folder / "unihema", weights="open")
    image = next(path for path in copy_examples(folder / "smears") if path.name == "white_cell_1.jpg")
    found: list[Call] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" and argument is torch.nn.functional.conv2d and not found:
            calls = list(own_calls(frame))[::-1]
            # Preparing a model for inference tries the backbone on noise; that is no image of the user's.
            if not any(name == "prepare_for_inference" for _, name in calls):
                # A convolution with its norm fused is a convolution.
                found.extend(call for call in calls if call[0] != "api/inference/prepare.py")

    run_command(["predict", str(checkpoint), str(image), "-o", str(folder / "results")], watch)
    return found


def calls_of_training(folder: Path) -> list[Call]:
    """Our own functions that one step of training on painted smears calls, in the order of their first call.

    Args:
        folder (`Path`): An empty folder to work in.
    """
    data = folder / "my_data"
    write_synthetic(data, 2, 2, crops_per_field=1, width=224, height=168, crop_size=96, progress=False)
    found: dict[Call, None] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (file := file_of(frame)) is not None:
            found.setdefault((file, frame.f_code.co_qualname))

    options = ["--task", "detection", "--image-size", "96", "--max-steps", "1", "--set", "data.workers=0"]
    run_command(["train", str(data), "-o", str(folder / "run"), *options], watch)
    return list(found)


TRACES = {"predict": calls_to_first_convolution, "train": calls_of_training}


def main() -> None:
    """Prints a line for each call: file and name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=TRACES)
    with tempfile.TemporaryDirectory() as folder:
        calls = TRACES[parser.parse_args().command](Path(folder))
    print(f"{len(calls)} calls, {len({file for file, _ in calls})} files:")
    for file, name in calls:
        print(f"{file:50} {name}")


if __name__ == "__main__":
    main()
