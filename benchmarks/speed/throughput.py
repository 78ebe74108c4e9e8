"""A folder of fields through `Analyzer`: one at a time, several together, and without files."""

import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

from unihema import Analyzer
from unihema.shipped import copy_examples, lay_down_checkpoint


ONE_AT_A_TIME = "files, one at a time"
TASKS = ("detection", "segmentation")


def measure(images: int, rounds: int) -> list[dict]:
    """Rows of the table: fields a second, by the clock, with the checkpoint that ships and the fields shipped with it.

    Args:
        images (`int`): Fields in the folder.
        rounds (`int`): Timed rounds; the fastest of each case counts, as other work only ever slows one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        analyzer = Analyzer.from_pretrained(lay_down_checkpoint(work / "checkpoint"), device="cpu")
        fields = _folder_of_fields(work / "fields", images)
        cases = {
            ONE_AT_A_TIME: lambda output: analyzer.analyze_files([fields], output, TASKS),
            "files, 4 of a size together": lambda output: analyzer.analyze_files([fields], output, TASKS, batch_size=4),
            "a field with detection and segmentation by Analyzer, no files written": lambda output: [
                analyzer(path, TASKS) for path in sorted(fields.iterdir())
            ],
        }
        seconds: dict[str, float] = {}
        for number in tqdm(range(rounds + 1), desc="throughput", unit="round"):
            for name, run in cases.items():
                start = time.perf_counter()
                run(work / f"{name}-{number}")
                if number:
                    seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    base = seconds[ONE_AT_A_TIME]
    return [
        {"case": name, "fields": images, "fields a second": images / value, "times faster": base / value}
        for name, value in seconds.items()
    ]


def _folder_of_fields(folder: Path, images: int) -> Path:
    """The shipped fields, over and over, in files of their own."""
    examples = [path for path in copy_examples(folder.with_name("examples")) if path.name.startswith("field")]
    folder.mkdir()
    for number in range(images):
        source = examples[number % len(examples)]
        (folder / f"{number:04d}{source.suffix}").write_bytes(source.read_bytes())
    return folder
