"""The commands and code of README.md and docs/ run, on a small stand-in for what `make demo` leaves."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_models import VERY_TINY

import unihema
from unihema.processing_unihema.prompts import task_prompt
from unihema.shipped import copy_examples, lay_down_checkpoint
from unihema.training.data.synthetic.fields import SyntheticSmears
from unihema.training.data.synthetic.folder import write_synthetic
from unihema_cli.app import app


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOUR = ROOT / "docs" / "tour.md"
TASKS = ("detection", "segmentation", "single_cell", "question_answering", "cloze")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with `demo/` (an untrained checkpoint and images), `my_smears/` and `my_data/`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("lab")
    smears = SyntheticSmears(seed=2)
    for folder in ("demo/smears", "my_smears", "more"):
        (root / folder).mkdir(parents=True)
    for path in ("demo/smears/field_1.jpg", "my_smears/07.png", "more/1.tif"):
        Image.fromarray(smears[1].image).save(root / path)
    Image.fromarray(smears.single_cell(0, label="neutrophil").image).save(root / "demo/smears/white_cell_1.jpg")
    processor = unihema.UniHemaProcessor.from_default(**{task: {"longest_edge": 64} for task in TASKS})
    config = unihema.UniHemaConfig(**{**VERY_TINY, "fusion_queries": 64})
    config.text_config.vocab_size = len(processor.tokenizer)
    config.trained.detection_thresholds = dict.fromkeys(config.label2id, 0.0)
    config.default_prompt_ids = {
        task: processor.tokenizer(task_prompt(task, names))["input_ids"]
        for task, names in processor.default_prompts.items()
    }
    for folder in ("demo/unihema", "runs/mine"):
        unihema.UniHemaForMultiTask(config).save_pretrained(root / folder)
        processor.save_pretrained(root / folder)
    (mix,) = blocks(ROOT / "docs" / "stages.md", "yaml")
    (root / "mix.yaml").write_text(mix, encoding="utf-8")
    write_synthetic(root / "my_data", 2, 2, crops_per_field=1, width=224, height=168, crop_size=96, progress=False)
    return root


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page != TOUR], ids=lambda page: page.name
)
def test_code_runs(page, lab, monkeypatch):
    monkeypatch.chdir(lab if page.name in ("training.md", "adapters.md") else lab / "demo")
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), {})


def test_tour_says_what_the_shipped_checkpoint_does(tmp_path, monkeypatch):
    lay_down_checkpoint(tmp_path / "unihema", weights="open")
    copy_examples(tmp_path / "smears")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(TOUR, "python"))
    promised = re.findall(r"^print\(.*\)  # (.+)$", code, re.M)
    printed = []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    exec(compile(code, str(TOUR), "exec"), names)
    assert printed == promised


@pytest.mark.parametrize("command", ["predict", "train"])
def test_tour_lists_the_calls_that_run(command):
    script = ROOT / "docs" / "trace_calls.py"
    run = subprocess.run([sys.executable, script, command], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    traced = [tuple(line.split()) for line in run.stdout.splitlines() if re.match(r"\S+\.py +\S+$", line)]
    page = TOUR.read_text(encoding="utf-8")
    told = re.search(rf"<!-- calls: {command} -->\n```text\n(.*?)^```", page, re.M | re.S).group(1)
    told = [tuple(line.split()[:2]) for line in told.splitlines()]
    if command == "predict":
        assert traced == told
    else:
        places = [traced.index(call) for call in told]
        assert places == sorted(places)


@pytest.mark.slow
def test_pictures_of_the_tour_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "make_tour.py"
    run = subprocess.run([sys.executable, script, "--output", tmp_path], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == re.findall(r"\(images/(tour_\w+\.png)\)", TOUR.read_text(encoding="utf-8"))


COMMANDS = [
    (page.name, line.split("#")[0].strip())
    for page in PAGES
    if page.parent.name != "results"
    for block in blocks(page, "bash")
    for line in block.splitlines()
    # Converting needs the authors' weights; tests/api/test_convert.py has these commands on small ones.
    if line.startswith("unihema ") and "my_unihema" not in line
]


@pytest.mark.parametrize(
    ("page", "command"),
    [
        # Exporting takes half a minute, and tests/api/test_onnx.py has it.
        pytest.param(page, command, id=f"{page}-{command.split()[1]}", marks=[pytest.mark.slow] * (".onnx" in command))
        for page, command in COMMANDS
    ],
)
def test_commands_run(page, command, lab, monkeypatch):
    arguments = shlex.split(command)[1:]
    if arguments[0] == "demo":
        # What it lays down is not what lies in `demo/` here.
        arguments += ["elsewhere", "--files-only"]
    # A training without data or settings goes on with those of its folder.
    goes_on = arguments[0] == "train" and "my_data/" not in arguments and "--config" not in arguments
    if "-o" in arguments and not goes_on:
        output = lab / arguments[arguments.index("-o") + 1]
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    if arguments[0] == "train" and not goes_on:
        # The same command on the smallest model that has all parts, for two steps.
        arguments += ["--max-steps", "2", "--set", "data.workers=0"]
        if "--initial-checkpoint" not in arguments:
            small = {**VERY_TINY, "fusion_queries": 64}
            arguments += ["--set", f"model.overrides={json.dumps(small)}"]
    if arguments[0] == "adapt":
        arguments += ["--max-steps", "2"]
    if arguments[0] == "report" and not (lab / "results").is_dir():
        # Another process of the tests has run the command before it.
        unihema.Analyzer.from_pretrained(lab / "demo/unihema").analyze_files([lab / "my_smears"], lab / "results")
    # Forty processes would import PyTorch and Transformers forty times; tests/api/test_cli.py has the command as a process.
    monkeypatch.chdir(lab)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_the_site_has_every_page_and_the_reference_every_public_name():
    nav = re.findall(r"(?:: |- )([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(nav) == pages and len(nav) == len(pages)
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    # Errors stand in the reference as a whole.
    missing = [
        name
        for name in unihema.__all__
        if f"unihema.{name}" not in reference
        and name != "__version__"
        and not (isinstance(getattr(unihema, name), type) and issubclass(getattr(unihema, name), unihema.UniHemaError))
    ]
    assert missing == []


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
