"""A folder of fields through `predict_files`, beside the same work done one step after the other."""

import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

from unihema.batch import Records, predict_files
from unihema.checkpoint import load_checkpoint
from unihema.files import sha256
from unihema.predict import analyze_opened, check_request, open_image
from unihema.shipped import copy_examples, lay_down_checkpoint


def measure(images: int, rounds: int) -> list[dict]:
    """Rows of the table: fields a second, by the clock, with the checkpoint that ships and the fields shipped with it.

    Args:
        images (`int`): Fields in the folder.
        rounds (`int`): Timed rounds; the fastest of each case counts, as other work only ever slows one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint = lay_down_checkpoint(work / "checkpoint")
        fields = _folder_of_fields(work / "fields", images)
        cases = {
            "one step after the other": lambda output: _in_turn(checkpoint, fields, output),
            "read ahead, written behind": lambda output: predict_files(checkpoint, [fields], output),
            "the same, 4 of a size together": lambda output: predict_files(checkpoint, [fields], output, batch_size=4),
        }
        seconds: dict[str, float] = {}
        for number in tqdm(range(rounds + 1), desc="throughput", unit="round"):
            for name, run in cases.items():
                start = time.perf_counter()
                run(work / f"{name}-{number}")
                if number:
                    seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    base = seconds["one step after the other"]
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


def _in_turn(checkpoint: Path, fields: Path, output: Path) -> None:
    """What `predict_files` does, without any of it at the same time as another."""
    model, processor = load_checkpoint(checkpoint)
    tasks = check_request(model, processor, None, None, (), None)
    records = Records(output, {"tasks": list(tasks), "geojson": False})
    for path in sorted(fields.iterdir()):
        digest, opened = sha256(path), open_image(path)
        [result] = analyze_opened(model, processor, [opened], tasks)
        records.write(path.stem, path, digest, result, opened.pixels)
