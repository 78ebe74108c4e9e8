"""The checkpoint that comes with the package: what it is, where it is laid down, what it sees."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from command import run_command
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline

import unihema
from unihema import Analyzer
from unihema.checkpoint_files import REFERENCE_FILE
from unihema.errors import RequestError
from unihema.loading import load_model
from unihema.shipped import WEIGHTS, copy_examples, lay_down_checkpoint
from unihema_cli import analyse
from unihema_cli.app import app


SHIPPED = Path(str(files("unihema"))) / "shipped_files"
TASKS = ["detection", "segmentation", "single_cell", "question_answering", "cloze"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return copy_examples(tmp_path_factory.mktemp("smears"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_shipped_is_small_whole_and_says_what_it_is(weights):
    checkpoint = SHIPPED / WEIGHTS[weights]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 25_000_000
    assert {value.dtype for value in load_file(checkpoint / "model.safetensors").values()} >= {torch.float16}
    config = unihema.UniHemaConfig.from_pretrained(checkpoint)
    assert config.trained.tasks == TASKS
    # Classes without a field to calibrate on have none.
    found = {"RBC", "WBC", "Platelets", "neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte"}
    assert set(config.trained.detection_thresholds) == found
    # The research weights say how probable each class is, and look again at white cells.
    assert bool(config.trained.calibration) == (config.trained.second_look is not None) == (weights == "research")
    # By these an image from elsewhere is seen at the scale of the training, and told to be from elsewhere.
    assert config.trained.red_cell_diameter and (checkpoint / REFERENCE_FILE).is_file()
    metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == set(TASKS) and all(figures["intervals"] for figures in metrics.values())
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "not a medical device" in card.lower()
    notice = (checkpoint / "NOTICE.md").read_text(encoding="utf-8")
    assert "MIT" in notice and ("research only" in notice) == (weights == "research")
    assert {path.name for path in (SHIPPED / "examples").glob("*.jpg")} == {
        word.strip(" ,|")
        for line in (SHIPPED / "examples" / "CREDITS.md").read_text().splitlines()
        for word in line.split()
        if word.strip(" ,|").endswith(".jpg")
    }


def test_the_demo_lays_it_down_for_auto_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", ".", "--files-only"])
    assert result.exit_code == 0 and "6 example smears in smears" in result.output
    model = AutoModel.from_pretrained("unihema")
    assert isinstance(model, unihema.UniHemaModel) and model.dtype == torch.float32
    assert isinstance(AutoProcessor.from_pretrained("unihema"), unihema.UniHemaProcessor)
    # Again: it is there.
    times = {path: path.stat().st_mtime_ns for path in Path("unihema").iterdir()}
    assert CliRunner().invoke(app, ["demo", ".", "--files-only"]).exit_code == 0
    assert times == {path: path.stat().st_mtime_ns for path in Path("unihema").iterdir()}


def test_a_set_of_weights_is_laid_down_by_name(tmp_path, monkeypatch):
    assert tuple(WEIGHTS) == analyse.WEIGHTS
    monkeypatch.chdir(tmp_path)
    for weights, folder in (("research", "unihema"), ("open", "mine")):
        result = CliRunner().invoke(app, ["init", folder, "--weights", weights] if folder == "mine" else ["init"])
        assert result.exit_code == 0 and f"Checkpoint in {folder}; its terms are in {folder}/NOTICE.md" in result.output
        for name in ("model.safetensors", "config.json", "NOTICE.md"):
            assert Path(folder, name).read_bytes() == (SHIPPED / WEIGHTS[weights] / name).read_bytes()
    # The other set is something else.
    again = run_command("init", "mine")
    assert again.returncode == 2 and "mine is there already and holds another checkpoint" in again.stderr
    with pytest.raises(RequestError, match="Weights 'best': there are research and open"):
        lay_down_checkpoint("other", weights="best")
    assert not Path("other").exists()


def test_nothing_is_deleted_unasked(tmp_path):
    folder = tmp_path / "unihema"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for replace in (False, True):
        with pytest.raises(FileExistsError, match="holds something else than a checkpoint, which is not deleted"):
            lay_down_checkpoint(folder, replace=replace)
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    lay_down_checkpoint(folder, weights="open")
    opened = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is there already and holds another checkpoint.*--overwrite"):
        lay_down_checkpoint(folder)
    assert (folder / "model.safetensors").read_bytes() == opened
    lay_down_checkpoint(folder, replace=True)
    assert (folder / "model.safetensors").read_bytes() != opened


def test_it_sees_what_is_on_the_examples(examples):
    """Cells of every kind on a field of CBC, a white cell and no red one where a data set boxes white cells only, and the class
    of crops: what a person sees on these files."""
    analyzer = Analyzer.from_pretrained(SHIPPED / "checkpoint")
    by_name = {path.name: path for path in examples}
    counts = analyzer(by_name["field_1.jpg"]).counts
    assert counts["RBC"] >= 8
    for name, label in (("white_cell_1.jpg", "neutrophil"), ("white_cell_2.jpg", "eosinophil")):
        assert analyzer(by_name[name], tasks=("single_cell",)).single_cell["label"] == label


def test_what_it_cannot_find_it_does_not_deny(examples):
    """Stages of malaria were never found in val: results name them only where they are asked for."""
    analyzer = Analyzer.from_pretrained(SHIPPED / "checkpoint")
    field = next(path for path in examples if path.name == "field_1.jpg")
    result = analyzer(field, ["detection"])
    assert "ring" in analyzer.model.config.trained.unfound_classes and "ring" not in result.classes
    assert not analyzer.report([field]).to_dict()["parasites"]["known"]
    assert analyzer(field, ["detection"], prompt="RBC, ring").classes == ["RBC", "ring"]


def test_an_image_that_is_known_is_scored_again(examples):
    analyzer = Analyzer.from_pretrained(SHIPPED / "checkpoint")
    first, again = (analyzer(examples[0], tasks=("detection",)) for _ in range(2))
    assert first.out_of_distribution is not None and again.out_of_distribution == first.out_of_distribution


def test_without_a_prompt_the_model_reads_what_the_processor_would_ask():
    model, processor = load_model(SHIPPED / "checkpoint")
    for task in ("detection", "segmentation"):
        asked = processor(images=Image.open(SHIPPED / "examples" / "field_1.jpg"), task=task)
        assert model.config.default_prompt_ids[task] == asked["input_ids"][0].tolist()


def test_a_pipeline_answers_with_it(examples):
    ask = pipeline("visual-question-answering", model=str(SHIPPED / "checkpoint"))
    (answer,) = ask(
        image=str(next(path for path in examples if path.name == "white_cell_2.jpg")),
        question="What type of white blood cell is this?",
    )
    assert "eosinophil" in answer["answer"].lower()


def test_the_demo_runs(tmp_path):
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert "white_cell_2.jpg: eosinophil" in result.output
    overlays = list((tmp_path / "demo" / "results").rglob("*.png"))
    assert len(overlays) >= 3 and (tmp_path / "demo" / "results" / "counts.csv").is_file()
