"""Results, figures and runs that were damaged: what goes on from them gives what it would have given, or says why not."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from microscope_files import field
from PIL import Image
from robustness.confined import attack, command, confined
from robustness.good_folders import files_of, good_folders
from robustness.strategies import Change, changed_folder, changed_json, is_json, lay_down
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import run_config

from unihema import SmearResult
from unihema.errors import OutputError
from unihema.results.export import label_studio_config
from unihema.results.smear_result import Cell
from unihema.training.run.config import RunConfig
from unihema.training.run.loop import train


KINDS = ("gone", "folder", "pipe", "broken link", "link to itself", "device", "no permission", "large")


def stored_result() -> bytes:
    """A result with everything in it that a result may have."""
    cells = [
        Cell(1, (2, 3, 10, 9), "neutrophil", 0.9, {"shape": {"value": "round", "score": 0.7}}, np.ones((6, 8), bool)),
        Cell(2, (8.5, 2, 16, 9.5), "platelet", 0.4),
    ]
    mask = np.zeros((18, 24), np.uint8)
    mask[3:9, 2:10] = 1
    found = SmearResult(24, 18, cells, ["neutrophil", "platelet"], {"neutrophil": "WBC"}, "a.png", mask, "nucleus")
    found.single_cell = {"label": "neutrophil", "score": 0.8}
    found.answers = [{"question": "Which?", "answer": "A cell."}]
    found.out_of_distribution = {"distance": 1.5, "limit": 2.0, "nearest": "smears"}
    found.changes = [{"cell": 2, "what": "class", "before": "RBC", "after": "platelet"}]
    found.warnings, found.provenance = ["It is blurred."], {"unihema": "1", "tasks": ["detection"]}
    return json.dumps(found.to_dict()).encode()


def use(content: bytes) -> None:
    """Everything that is made of a stored result."""
    result = SmearResult.from_dict(json.loads(content))
    again = SmearResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.to_dict() == result.to_dict()
    json.dumps([result.to_coco(), result.to_geojson(), result.to_label_studio()])
    label_studio_config(result.classes)
    assert result.with_geojson(result.to_geojson()).changes == result.changes
    if result.width * result.height < 1 << 20:
        result.to_labels()
    result.to_dataframe()
    result.overlay(Image.new("RGB", (48, 36))).tobytes()
    assert sum(result.counts.values()) == len(result.cells)
    assert not result.differential or sum(result.differential.values()) == pytest.approx(100)


@attack(inputs=25, share=0.05, each=5)
@given(st.lists(changed_json(stored_result()).filter(is_json), min_size=5, max_size=5))
def test_stored_results(changed):
    confined("stored results", *[lambda given, out, content=content: use(content) for _, content in changed])


def test_an_undamaged_result_is_read():
    use(stored_result())


class Made:
    """What commands wrote, and what they need to go on from it."""

    def __init__(self, place: Path):
        self.checkpoint, self.images = save_tiny_checkpoint(place / "unihema"), place / "images"
        self.images.mkdir()
        for number in range(3):
            Image.fromarray(field((40, 32), number)).save(self.images / f"{number}.png")
        good_folders(place / "data")
        self.data = place / "data" / "by_split"
        self.predict(place / "results")
        self.evaluate(place / "figures")
        self.results, self.figures = files_of(place / "results"), files_of(place / "figures")

    def predict(self, out: Path) -> None:
        command("predict", self.checkpoint, self.images, "-o", out, "--format", "geojson", "--device", "cpu")

    def evaluate(self, out: Path) -> None:
        command("evaluate", self.checkpoint, self.data, "-o", out, "--task", "detection", "--bootstrap", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


def same_files(out: Path, files: dict[str, bytes], changes: tuple[Change, ...] = ()) -> None:
    """Tables and pictures are as those of the undisturbed run; of pictures that were damaged, those of another size are."""
    kept = {
        change.name
        for change in changes
        if change.content is not None and len(change.content) == len(files[change.name])
    }
    there = files_of(out)
    for name, content in files.items():
        if name not in kept and not name.startswith((".", "records/")):
            assert there.get(name) == content, name


@attack(inputs=6, share=0.03)
@given(st.data())
def test_results_folders(made, data):
    weights = {name: 3 if name.endswith(".json") else 1 for name in made.results}
    changes = data.draw(changed_folder(made.results, weights, KINDS))

    def attempt(given, out):
        lay_down(out / "results", made.results, changes)
        made.predict(out / "results")
        same_files(out / "results", made.results, changes)

    confined("results folders", attempt)


@attack(inputs=4, share=0.01)
@given(st.data())
def test_figures(made, data):
    changes = data.draw(changed_folder(made.figures, {"metrics.json": 3, "settings.json": 1}, KINDS))

    def attempt(given, out):
        lay_down(out / "figures", made.figures, changes)
        made.evaluate(out / "figures")
        found = json.loads((out / "figures" / "metrics.json").read_text())
        assert found.keys() == {"detection"} and found["detection"]["rows"]

    confined("figures", attempt)


def test_undamaged_ones_go_on(made, tmp_path):
    for name, files, go_on in (("a", made.results, made.predict), ("b", made.figures, made.evaluate)):
        lay_down(tmp_path / name, files)
        go_on(tmp_path / name)
        same_files(tmp_path / name, files)


class Run:
    """A training run of two steps, and what its weights are after two more, or after four where no checkpoint is whole."""

    def __init__(self, place: Path):
        good_folders(place / "data")
        self.data = place / "data" / "own"
        train(self.config(place / "run", 2))
        self.files = files_of(place / "run")
        train(self.config(place / "run", 4), resume=True)
        train(self.config(place / "anew", 4))
        self.resumed, self.weights = digest(place / "run"), {digest(place / "run"), digest(place / "anew")}

    def config(self, out: Path, steps: int) -> RunConfig:
        settings = {"optimisation.max_steps": steps, "logging.checkpoint_steps": 2, "data.val_split": ""}
        return run_config(self.data, out, **settings)


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("trained"))


def test_an_undamaged_run_goes_on(run, tmp_path):
    lay_down(tmp_path, run.files)
    train(run.config(tmp_path, 4), resume=True)
    assert digest(tmp_path) == run.resumed


def test_a_file_of_a_run_that_is_a_folder_is_named(run, tmp_path):
    lay_down(tmp_path, run.files)
    (tmp_path / "data.json").unlink()
    (tmp_path / "data.json").mkdir()
    with pytest.raises(OutputError, match=r"data\.json: cannot be written \(Is a directory\)"):
        train(run.config(tmp_path, 4), resume=True)


@attack(inputs=3, share=0.02)
@given(st.data())
def test_runs(run, data):
    # Other bytes of the same number, in a file of weights, are not told from those that were written.
    texts = {name: 3 if "/" in name else 1 for name in run.files if name.endswith((".json", ".jsonl"))}
    changes = data.draw(changed_folder(run.files, texts, KINDS))

    def attempt(given, out):
        lay_down(out / "run", run.files, changes)
        train(run.config(out / "run", 4), resume=True)
        assert digest(out / "run") in run.weights

    confined("runs", attempt)
