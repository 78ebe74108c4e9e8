"""Each command that writes, killed at any moment and repeated, ends as if nothing had happened, and leaves nothing behind.

`UNIHEMA_KILLS` is how often each is killed in the slow tests, `UNIHEMA_KILLS_SEED` the seed of when.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import run_command
from data_folders import write_photograph
from killing import is_killed, killed_and_resumed, moment, undisturbed
from local_hub import TOKEN, LocalHub
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import run_config

import unihema
from unihema import files
from unihema.hub_cards import folder_card
from unihema.training.data.synthetic.cells import CLASSES
from unihema.training.data.synthetic.folder import write_synthetic
from unihema.training.run import loop


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is copied")
FEW, MANY = 2, int(os.environ.get("UNIHEMA_KILLS", "100"))
# What says when, how fast and how often.
CLOCKS = ("seconds", "images_per_second", "timing", "since", "waited", "peak_gigabytes")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder of what the commands read: a checkpoint with its card, images, data, an archive of them, settings of a run."""
    root = tmp_path_factory.mktemp("given")
    checkpoint = save_tiny_checkpoint(
        root / "checkpoint", num_queries=12, id2label=dict(enumerate(CLASSES)), trained_tasks=["detection"]
    )
    card = folder_card(checkpoint, licence="cc-by-4.0", data_licences={"smears": "cc-by-4.0"}, name="Smears")
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    for number in range(4):
        write_photograph(root / "images" / f"{number}.png", number, (96 + 32 * (number % 2), 72))
    write_photograph(root / "slide.png", 0, (480, 360))
    write_synthetic(root / "smears", 2, 1, crops_per_field=2, width=224, height=168, crop_size=96, progress=False)
    shutil.make_archive(str(root / "smears"), "zip", root / "smears")
    run_config(
        root / "smears",
        root / "nowhere",
        **{
            "data.tasks": ["segmentation", "single_cell"],
            "optimisation.max_steps": 3,
            "optimisation.device": "cpu",
            "logging.checkpoint_steps": 1,
            "logging.evaluate_every": 1,
        },
    ).save(root / "run")
    return root


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, which huggingface_hub asks; each of its requests is a moment before and after."""
    from huggingface_hub import constants, get_session

    hub = LocalHub()
    # A request that was cut off is none of the server's faults.
    monkeypatch.setattr(hub.server, "handle_error", lambda *arguments: None)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    client = type(get_session())
    send = client.send

    def ticking_send(*arguments, **options):
        moment()
        answer = send(*arguments, **options)
        moment()
        return answer

    monkeypatch.setattr(client, "send", ticking_send)
    yield hub
    hub.close()


def command(*arguments: object) -> None:
    ended = run_command(*arguments)
    assert ended.returncode == 0, ended.stderr + ended.stdout


def predict(given: Path, folder: Path) -> None:
    command("predict", given / "checkpoint", given / "images", "-o", folder, "--format", "geojson")


def slide(given: Path, folder: Path) -> None:
    """One image of more than a hundred tiles, each of which a run that was killed has, or has not, seen."""
    command("predict", given / "checkpoint", given / "slide.png", "-o", folder, "--format", "geojson", "--tiles", 64)


def train(given: Path, folder: Path) -> None:
    command("train", "--config", given / "run" / "run_config.json", "-o", folder)


def adapt(given: Path, folder: Path) -> None:
    small = ["logging.checkpoint_steps=1", "data.workers=0", "logging.evaluate_every=1", "optimisation.device=cpu"]
    sets = [word for setting in small for word in ("--set", setting)]
    sizes = ["--image-size", "32", "--batch-size", "2", "--max-steps", "2"]
    command(
        "adapt",
        given / "checkpoint",
        given / "smears",
        "-o",
        folder,
        "--task",
        "single_cell",
        "--folds",
        2,
        *sizes,
        *sets,
    )


def evaluate(given: Path, folder: Path) -> None:
    command("evaluate", given / "checkpoint", given / "smears", "-o", folder, "--bootstrap", 20)


def prepare(given: Path, folder: Path) -> None:
    ended = run_command("data", "prepare", given / "smears.zip", "-o", folder)
    # One that was killed when all was done is not done again.
    assert ended.returncode == 0 or f"{folder}: is there already" in ended.stderr.replace("\n", ""), ended.stderr


def shard(given: Path, folder: Path) -> None:
    command("data", "shard", given / "smears", "-o", folder, "--shard-samples", 2)


def demo(given: Path, folder: Path) -> None:
    command("demo", folder, "--files-only")


def synthesise(given: Path, folder: Path) -> None:
    write_synthetic(folder, 2, 1, crops_per_field=2, width=224, height=168, crop_size=96, progress=False)


COMMANDS = {each.__name__: each for each in (predict, slide, train, adapt, evaluate, prepare, shard, demo, synthesise)}
kills = pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow, id="many")])


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files of everything that is started."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def as_a_new_process(work: Callable[[], None], monkeypatch) -> None:
    """Does work that knows nothing of what this process has written before."""
    monkeypatch.setattr(files, "_cleaned", set())
    work()


@kills
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_if_it_had_not_been(given, temporary, tmp_path, monkeypatch, name, kills):
    def work(folder: Path) -> None:
        as_a_new_process(lambda: COMMANDS[name](given, folder), monkeypatch)

    outputs = tmp_path / "outputs"
    outputs.mkdir()
    whole = undisturbed(lambda: work(outputs / "undisturbed"))
    expected = written(outputs / "undisturbed")
    start = time.monotonic()
    ended = [folder for folder, _ in killed_and_resumed(work, outputs, kills, whole, seed())]
    told = {"kills": kills, "runs": len(ended), "moments": whole.moments, "seconds": round(time.monotonic() - start, 1)}
    print(f"{name}: {told}, seed {seed()}")
    for folder in ended:
        found = written(folder)
        assert found.keys() == expected.keys()
        assert {path: (found[path], expected[path]) for path in expected if found[path] != expected[path]} == {}
    assert sorted(os.listdir(outputs)) == sorted(["undisturbed", *(folder.name for folder in ended)])
    assert os.listdir(temporary) == []


@kills
def test_a_killed_push_is_one_commit_of_all_files(given, hub, temporary, tmp_path, monkeypatch, kills):
    def work(folder: Path) -> None:
        as_a_new_process(lambda: command("push", given / "checkpoint", f"lab/{folder.name}"), monkeypatch)

    whole = undisturbed(lambda: work(Path("undisturbed")))
    start = time.monotonic()
    ended = [folder for folder, _ in killed_and_resumed(work, tmp_path, kills, whole, seed())]
    told = {"kills": kills, "runs": len(ended), "moments": whole.moments, "seconds": round(time.monotonic() - start, 1)}
    print(f"push: {told}, seed {seed()}")
    expected = hub.files("lab/undisturbed")
    assert {"config.json", "model.safetensors", "README.md"} <= expected.keys()
    for folder in ended:
        found = hub.files(f"lab/{folder.name}")
        # The card names its repository.
        assert {name: of for name, of in found.items() if name != "README.md"} == {
            name: of for name, of in expected.items() if name != "README.md"
        }
        assert found["README.md"] == expected["README.md"].replace(b"lab/undisturbed", f"lab/{folder.name}".encode())
        assert hub.titles(f"lab/{folder.name}") == ["initial commit", "Upload checkpoint"]
    assert os.listdir(temporary) == [] and sorted(os.listdir(given / "checkpoint")) == sorted(
        path.name for path in (given / "checkpoint").iterdir() if not path.name.startswith(".")
    )


def test_a_killed_overwriting_can_be_repeated(given, tmp_path, monkeypatch):
    """Whatever is left of an earlier run is known for one until nothing is left."""
    begun = tmp_path / "begun"
    for name in ("best/model.safetensors", "run_config.json", "zz"):
        (begun / name).parent.mkdir(parents=True, exist_ok=True)
        (begun / name).write_text("{}")
    monkeypatch.setattr(loop, "train", lambda *arguments, **options: {})

    def anew(folder: Path) -> None:
        as_a_new_process(
            lambda: command("train", "--config", given / "run" / "run_config.json", "-o", folder, "--overwrite"),
            monkeypatch,
        )

    shutil.copytree(begun, tmp_path / "whole")
    whole = undisturbed(lambda: anew(tmp_path / "whole"))
    left = set()
    for number in range(1, whole.moments + 1):
        folder = Path(shutil.copytree(begun, tmp_path / str(number)))
        assert is_killed(lambda folder=folder: anew(folder), number, 0.0)
        left.add(tuple(sorted(path.name for path in files.contents(folder))))
        anew(folder)
        assert os.listdir(folder) == os.listdir(tmp_path / "whole") == [".unihema.lock"]
    assert left == {("best", "run_config.json", "zz"), ("run_config.json", "zz"), ("run_config.json",), ()}


def seed() -> int:
    return int(os.environ.get("UNIHEMA_KILLS_SEED", "0"))


def written(folder: Path) -> dict[str, object]:
    """Path -> what a file holds, of all that was written but the states a run goes on from: without the folder's name and
    without times. What is there beside the results is named as well."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "checkpoints/step-" in name:
            found[name] = None
        elif path.is_file():
            found[name] = without_clocks(path, folder)
    return found


def without_clocks(path: Path, folder: Path) -> object:
    content = path.read_bytes().replace(str(folder).encode(), b"FOLDER").replace(folder.name.encode(), b"NAME")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        # The last line of a run is of the time since it was begun or resumed.
        return [timeless(line) for line in lines if line.get("event") != "end"]
    return timeless(json.loads(content)) if path.suffix == ".json" else content


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: timeless(of) for name, of in value.items() if name not in CLOCKS}
    return [timeless(of) for of in value] if isinstance(value, list) else value


assert unihema  # the model classes, which a process that is copied has then imported
