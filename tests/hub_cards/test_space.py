"""A Gradio Space of a checkpoint: its folder, and the app by its client and in a browser."""

import csv
import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import SpaceCard
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer, CheckpointError
from unihema.errors import CardError, FileThereError
from unihema.hub_cards import folder_card, write_space
from unihema_cli.app import app


HOSTILE = "<img src=x onerror=document.title='taken'>"
CHROMIUM = os.environ.get("UNIHEMA_CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With a class whose name would be markup."""
    folder = save_tiny_checkpoint(
        tmp_path_factory.mktemp("made") / "unihema", text_length=64, id2label={0: "neutrophil", 1: HOSTILE}
    )
    card = folder_card(folder, licence="mit", data_licences={"smears": "mit"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def test_the_folder_is_a_space_and_its_checkpoint_analyses(checkpoint, tmp_path):
    (checkpoint / "log.jsonl").write_text("{}")
    space = write_space(checkpoint, tmp_path / "space", name="Our: smears")
    assert {path.name for path in space.iterdir()} == {"README.md", "app.py", "checkpoint", "requirements.txt"}
    data = SpaceCard.load(space / "README.md").data
    assert (data.title, data.sdk, data.app_file, data.license) == ("Our: smears", "gradio", "app.py", "mit")
    files = {path.name for path in (space / "checkpoint").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= files and "log.jsonl" not in files
    assert Analyzer.from_pretrained(space / "checkpoint", device="cpu").tasks
    with pytest.raises(FileThereError, match="is there already"):
        write_space(checkpoint, space)
    (space / "app.py").write_text("old")
    write_space(checkpoint, space, overwrite=True)
    assert "import gradio" in (space / "app.py").read_text(encoding="utf-8")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileThereError):
        write_space(checkpoint, tmp_path / "mine", overwrite=True)


def test_what_makes_no_space(checkpoint, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "README.md").unlink()
    with pytest.raises(CardError, match=r"no README\.md"):
        write_space(bare, tmp_path / "space")
    (bare / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError):
        write_space(bare, tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_the_command_writes_the_card_first_where_there_is_none(checkpoint, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "README.md").unlink()
    command = ["card", str(bare), "--space", str(tmp_path / "space")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, CardError) and not (tmp_path / "space").exists()
    done = CliRunner().invoke(app, [*command, "--license", "mit", "--data-license", "smears=mit"])
    assert done.exit_code == 0 and (tmp_path / "space" / "app.py").is_file(), done.output
    again = CliRunner().invoke(app, [*command, "--overwrite"])
    assert again.exit_code == 0, again.output


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """The address of the app, run as a Space runs it."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'unihema[space]'")
    folder = write_space(checkpoint, tmp_path_factory.mktemp("served") / "space")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "uploads"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=os.environ | own, stdout=log, stderr=log)
        try:
            yield wait_for(f"http://127.0.0.1:{port}", process, folder / "log.txt")
        finally:
            process.terminate()
            process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> str:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return address
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smears")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"field_{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    # Six kilobytes that would be 66 million pixels.
    Image.new("1", (8200, 8100)).save(folder / "bomb.png", optimize=True)
    return folder


def test_images_of_one_name_are_told_apart(checkpoint, smears, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", mock.MagicMock())
    page = runpy.run_path(str(write_space(checkpoint, tmp_path / "space") / "app.py"), run_name="app")
    paths = [smears / "field_0.png", tmp_path / "field_0.png", smears / "broken.png", tmp_path / "broken.png"]
    shutil.copy(smears / "field_1.png", paths[1])
    paths[3].write_bytes(b"none either")
    archive, notes = page["analyze_all"](list(map(str, paths)), mock.Mock(tqdm=lambda paths: paths))
    assert notes.startswith("2 analysed, 2 failed.\n")
    with zipfile.ZipFile(archive) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("counts.csv").decode())))
        results = json.loads(archive.read("results.json"))
    assert {row["image"] for row in rows} == {"field_0.png", "02_field_0.png"}
    assert set(results["failed"]) == {"broken.png", "04_broken.png"}


@pytest.mark.slow
def test_the_app_by_its_client(served, smears):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(served, verbose=False)

    def analyze(name, questions=""):
        return client.predict(client_of.handle_file(str(smears / name)), questions, api_name="/analyze")

    overlay, counts, cells, answers, notes = analyze("field_0.png", f"How many neutrophils are there?\n{HOSTILE}?")
    with Image.open(overlay) as picture:
        assert picture.width >= 160
    found = {row[0]: int(row[1]) for row in counts["data"]}
    assert set(found) == {"neutrophil", HOSTILE} and sum(found.values()) == len(cells["data"]) > 0
    assert answers["data"][0][1].startswith(str(found["neutrophil"])) and answers["data"][1][0] == f"{HOSTILE}?"
    assert answers["data"][0][3].startswith("neutrophil 0.") and "/" not in notes
    for name, problem in (("broken.png", "broken.png: not an image"), ("bomb.png", "bomb.png: more than 64 million")):
        overlay, counts, _, _, notes = analyze(name)
        assert overlay is None and not counts["data"] and notes.startswith(problem), notes
    *_, notes = analyze("field_0.png", "Is it?\n" * 11)
    assert notes == "11 questions; 10 at most."

    files = [client_of.handle_file(str(path)) for path in sorted(smears.glob("*.png"))]
    archive, notes = client.predict(files, api_name="/batch")
    assert notes.startswith("3 analysed, 2 failed.\n")
    with zipfile.ZipFile(archive) as archive:
        pictures = [name for name in archive.namelist() if name.endswith(".png")]
        rows = list(csv.DictReader(io.StringIO(archive.read("cells.csv").decode())))
        results = json.loads(archive.read("results.json"))
    assert len(pictures) == 3 and {row["image"] for row in rows} == {f"field_{number}.png" for number in range(3)}
    assert set(results["failed"]) == {"bomb.png", "broken.png"} and len(results["images"]) == 3
    assert "/" not in json.dumps([image["image"] for image in results["images"]])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_the_app_in_a_browser(served, smears, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.set_default_timeout(120_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        page.set_input_files("input[type=file] >> nth=0", str(smears / "field_0.png"))
        page.get_by_label("Questions, one a line").fill(f"How many neutrophils are there?\n{HOSTILE}?")
        page.get_by_text("field_0", exact=False).first.wait_for()
        page.get_by_role("button", name="Analyse").first.click()
        # The table has a hidden copy of its cells, by which it measures them.
        page.get_by_text(HOSTILE).locator("visible=true").first.wait_for()
        page.locator("img[src*='image.png'], img[src*='.png']").first.wait_for()
        page.screenshot(path=str(tmp_path / "space.png"), full_page=True)
        assert page.title() == "UniHema" and page.locator("img[src='x']").count() == 0
        # Of ours nothing is fetched from elsewhere; Gradio's own frame asks for what it brings along.
        assert not [url for url in asked if "fonts.g" in url]
        browser.close()
