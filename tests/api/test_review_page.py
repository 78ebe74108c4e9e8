"""The page of a review, driven by a browser: Debian's Chromium by Playwright."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import run_command
from review_results import write_results

from unihema.review.state import Review


playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("unihema.review.server")


CHROMIUM = os.environ.get("UNIHEMA_CHROMIUM") or shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium")]
HOSTILE = "<img src=x onerror=document.title='taken'>"
FIELDS = {"a.png": ["RBC"] * 12 + ["neutrophil", "lymphocyte", "neutrophil"], "b.png": ["WBC", "Platelets", "RBC"]}
TOKEN = "a-token-of-tests"
# Texts whose contrast with their ground is below 4.5, by WCAG's formula.
CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(rgb[i] / 255), 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return channels(getComputedStyle(document.body).backgroundColor);
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.disabled || node.closest("select")) continue;
    const [high, low] = [light(channels(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found[node.id || node.className || node.tagName] = ratio;
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Served:
    """A review and its server in a thread of this process."""

    def __init__(self, folder: Path, sample_by: str | None = None):
        self.review = Review(folder, sample_by)
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/?token={TOKEN}"
        config = uvicorn.Config(server.review_app(self.review, TOKEN, port), log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def labels(self):
        return {
            (cell.image, cell.original.id): cell.label
            for sample in self.review.samples.values()
            for cell in sample.cells
            if cell.present
        }

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()
        self.review.close()


@pytest.fixture
def served(tmp_path):
    served = Served(write_results(tmp_path / "results", FIELDS))
    yield served
    served.close()


@pytest.fixture
def opened(browser):
    """Opens the page of a server; what a browser complains of fails the test."""
    contexts, problems = [], []

    def open_page(served, who="Ada"):
        context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        if who:
            page.add_init_script(f"localStorage.setItem('unihema-reviewer', {who!r})")
        page.goto(served.address)
        page.wait_for_selector(".cell")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # A refused change is an answer like any other, and the browser notes it, as it does when the server has gone.
    assert [text for text in problems if not re.search("409|423|CONNECTION_REFUSED", text)] == []


def cell_of(page, image, number):
    return page.locator(f"#cell-{image}-{number}")


def says(page, text):
    page.wait_for_function("text => document.getElementById('message').textContent.includes(text)", arg=text)


def count(page, name):
    row = page.locator("#classes li", has=page.locator(".name span:first-child", has_text=name)).first
    return int(row.locator(".count").inner_text())


def test_cells_move_by_key_and_the_next_one_is_at_hand(served, opened):
    page = opened(served)
    cell_of(page, 0, 13).click()
    assert cell_of(page, 0, 13).get_attribute("aria-selected") == "true"
    page.keyboard.press("l")
    says(page, "1 cell moved to lymphocyte")
    assert (
        served.labels()["a", 13] == "lymphocyte" and count(page, "lymphocyte") == 2 and count(page, "neutrophil") == 1
    )
    # Two keys in a row concern two cells.
    cell_of(page, 0, 12).click()
    page.keyboard.press("n")
    page.keyboard.press("p")
    says(page, "moved to Platelets")
    assert served.labels()["a", 12] == "neutrophil"
    assert [key for key, label in served.labels().items() if label == "Platelets"] != [("b", 2)]
    assert page.locator("#gallery").get_attribute("aria-activedescendant")
    assert "Total" not in page.title()


def test_many_cells_move_by_mouse(served, opened):
    page = opened(served)
    shown = page.locator("#gallery [role=group]", has=page.locator(".heading", has_text="RBC")).locator(".cell")
    shown.nth(0).click()
    shown.nth(4).click(modifiers=["Shift"])
    shown.nth(2).click(modifiers=["Control"])
    assert page.locator(".cell[aria-selected=true]").count() == 4
    page.get_by_role("button", name="Move the selected cells to neutrophil").click()
    says(page, "4 cells moved to neutrophil")
    assert count(page, "neutrophil") == 6
    assert page.locator("#differential tbody tr", has_text="neutrophil").locator("td").first.inner_text() == "6"


def test_a_missed_cell_is_drawn_with_the_mouse_and_with_keys(served, opened):
    page = opened(served)
    cell_of(page, 1, 1).click()
    page.get_by_role("button", name="Field", exact=True).click()
    page.get_by_role("button", name="Draw a missed cell").click()
    page.wait_for_function("() => document.getElementById('view-image').complete")
    frame = page.locator("#view-image").bounding_box()
    at = lambda x, y: (frame["x"] + frame["width"] * x / 200, frame["y"] + frame["height"] * y / 160)
    page.mouse.move(*at(100, 80))
    page.mouse.down()
    page.mouse.move(*at(120, 90))
    page.mouse.move(*at(140, 110))
    page.mouse.up()
    page.keyboard.press("n")
    says(page, "A cell of neutrophil was added")
    drawn = served.review.images["b"].cells[4]
    assert drawn.drawn and drawn.original.box == pytest.approx((100, 80, 140, 110), abs=2)
    assert cell_of(page, 1, 4).locator(".score").inner_text() == "drawn"

    page.keyboard.press("Shift+Enter")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("l")
    says(page, "A cell of lymphocyte was added")
    left, top, right, bottom = served.review.images["b"].cells[5].original.box
    assert right - left > 40 and served.labels()["b", 5] == "lymphocyte"


def test_delete_undo_redo_and_restore(served, opened):
    page = opened(served)
    cell_of(page, 1, 1).click()
    page.keyboard.press("Delete")
    says(page, "1 cell deleted")
    assert ("b", 1) not in served.labels() and cell_of(page, 1, 1).count() == 0
    page.keyboard.press("Control+z")
    says(page, "Taken back")
    assert served.labels()["b", 1] == "WBC"
    page.keyboard.press("Control+y")
    says(page, "Done again")
    assert ("b", 1) not in served.labels()
    page.get_by_label("deleted cells").check()
    cell_of(page, 1, 1).click()
    page.get_by_role("button", name="Restore").click()
    says(page, "1 cell restored")
    assert served.labels()["b", 1] == "WBC"


def test_filters_leave_what_was_asked_for(served, opened):
    page = opened(served)
    shown = lambda: int(page.locator("#shown").inner_text().split()[0])
    assert shown() == 18
    # Results without such scores offer no filter by them.
    assert not page.get_by_label("odd cells").is_visible()
    page.locator("#filter-class").select_option("neutrophil")
    assert shown() == 2
    page.get_by_role("button", name="Show all").click()
    page.locator("#filter-attribute").select_option(label="granules: coarse")
    assert shown() == 10
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Score at most").fill("50")
    assert 0 < shown() < 18
    page.get_by_role("button", name="Show all").click()
    page.locator("#filter-image").select_option(label="b.png")
    assert shown() == 3
    page.get_by_role("button", name="Show all").click()
    page.locator("#gallery").focus()
    page.keyboard.press("Enter")
    says(page, "1 cell confirmed")
    page.get_by_label("not looked at yet").check()
    assert shown() == 17


def test_odd_cells_come_first_and_are_filtered(tmp_path, opened):
    odd = {1: 0.4, 2: 1.8}
    served = Served(write_results(tmp_path / "results", {"a.png": ["neutrophil"] * 5}, odd=odd))
    try:
        page = opened(served)
        tiles = page.locator("#gallery .cell")
        first = tiles.nth(0)
        assert "odd, not looked at" in first.get_attribute("aria-label")
        assert first.locator(".odd").is_visible() and not tiles.nth(1).locator(".odd").is_visible()
        first.click()
        assert "1.80 (above 1: unlike its class)" in page.locator("#details").inner_text()
        page.get_by_label("odd cells").check()
        assert page.locator("#shown").inner_text().startswith("1 shown")
        assert tiles.count() == 1 and not page.evaluate(CONTRASTS)
    finally:
        served.close()


def test_sign_and_amend(served, opened):
    page = opened(served, who="")
    page.locator("#gallery").focus()
    page.keyboard.press("Enter")
    page.locator("#ask-input").fill("Ada")
    page.keyboard.press("Enter")
    says(page, "confirmed")
    page.get_by_role("button", name="Sign", exact=True).click()
    assert "17 cells were not looked at" in page.locator("#ask-text").inner_text()
    page.locator("#ask-yes").click()
    says(page, "Signed: final")
    assert page.locator("#status").inner_text().startswith("final, Ada")
    page.locator("#gallery").focus()
    page.keyboard.press("n")
    page.wait_for_function("() => document.getElementById('alert').textContent.includes('amendment')")
    page.get_by_role("button", name="Amend").click()
    page.locator("#ask-input").fill("second look")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('status').textContent === 'amendment open'")
    page.locator("#gallery").focus()
    page.keyboard.press("n")
    says(page, "moved to neutrophil")
    page.get_by_role("button", name="Sign", exact=True).click()
    page.locator("#ask-yes").click()
    says(page, "Signed: amended")
    assert [each["status"] for each in served.review.sample("results").signatures] == ["final", "amended"]


def test_two_pages_see_each_other_and_lose_nothing(served, opened):
    one, other = opened(served), opened(served, who="Bob")
    cell_of(one, 0, 13).click()
    one.keyboard.press("l")
    says(one, "moved to lymphocyte")
    group = "#gallery [role=group][aria-label^='lymphocyte, 2']"
    other.wait_for_selector(group, state="attached")
    # Both at one cell: the second, which has not yet seen the change, is refused and shown what is there.
    other.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
    cell_of(other, 0, 14).click()
    cell_of(one, 0, 14).click()
    one.keyboard.press("n")
    says(one, "moved to neutrophil")
    other.keyboard.press("p")
    other.wait_for_function("() => document.getElementById('alert').textContent.includes('somebody else')")
    assert served.labels()["a", 14] == "neutrophil"
    other.wait_for_selector("#cell-0-14[aria-label^=neutrophil]")
    other.keyboard.press("p")
    says(other, "moved to Platelets")
    assert served.labels()["a", 14] == "Platelets"


def test_a_field_is_looked_through(served, opened):
    page = opened(served)
    cell_of(page, 1, 1).click()
    page.get_by_role("button", name="Confirm the rest of this field").click()
    says(page, "All cells of b.png are confirmed")
    assert served.review.images["b"].looked_through and not served.review.images["a"].looked_through
    page.get_by_role("button", name="take back").click()
    says(page, "open again")
    assert not served.review.images["b"].looked_through


def test_it_works_without_a_mouse_and_says_what_is_what(served, opened):
    page = opened(served)
    page.locator("#gallery").focus()
    page.keyboard.press("Home")
    first = page.locator("#gallery").get_attribute("aria-activedescendant")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("End")
    assert page.locator("#gallery").get_attribute("aria-activedescendant") != first
    page.keyboard.press("Control+a")
    selected = page.locator(".cell[aria-selected=true]")
    assert selected.count() == 13 and "RBC, score" in selected.first.get_attribute("aria-label")
    page.keyboard.press("Escape")
    assert page.locator(".cell[aria-selected=true]").count() == 1
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="Keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("-")
    assert page.get_by_role("button", name="Field", exact=True).get_attribute("aria-pressed") == "true"
    # Everything that can be clicked is reached by Tab and has a name.
    names = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        names.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    expected = {
        "sign",
        "undo",
        "help",
        "filter-class",
        "gallery",
        "view",
        "confirm",
        "delete",
        "draw",
        "through",
        "history",
    }
    assert expected - {"undo"} <= names
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter(e => !(e.textContent.trim() || e.ariaLabel || "
        "e.labels?.length)).map(e => e.id)"
    )
    assert unnamed == []


def test_hostile_texts_are_shown_as_text(tmp_path, opened):
    folder = write_results(
        tmp_path / "<i>results", {f"{HOSTILE.replace('/', '')}.png": [HOSTILE, "RBC"]}, warnings=[HOSTILE]
    )
    served = Served(folder)
    try:
        page = opened(served, who=HOSTILE)
        assert page.locator("h1").inner_text() == "<i>results"
        page.get_by_role("button", name="Other class").click()
        page.locator("#ask-input").fill("<b>another</b>")
        page.keyboard.press("Enter")
        says(page, "moved to <b>another</b>")
        page.get_by_role("button", name="History").click()
        page.wait_for_selector("#history-list li")
        assert HOSTILE in page.locator("#history-list").inner_text()
        assert page.locator("#history-list *:not(li), #classes img, #details img, h1 *").count() == 0
        assert "taken" not in page.title()
    finally:
        served.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(served, opened, scheme):
    page = opened(served)
    page.emulate_media(color_scheme=scheme)
    ratios = page.evaluate(CONTRASTS)
    assert ratios == {}


def test_five_thousand_cells_stay_few_nodes_and_move(tmp_path, opened):
    labels = ["RBC"] * 400 + ["neutrophil"] * 60 + ["lymphocyte"] * 40
    served = Served(write_results(tmp_path / "results", {f"{n}.png": labels for n in range(10)}, size=(500, 420)))
    try:
        page = opened(served)
        assert page.locator("#shown").inner_text().startswith("5000 shown")
        assert page.locator(".cell").count() < 300
        page.locator("#gallery").focus()
        page.keyboard.press("End")
        page.wait_for_function("() => document.getElementById('scroller').scrollTop > 10000")
        assert page.locator(".cell").count() < 300
        page.keyboard.press("n")
        says(page, "moved to neutrophil")
        assert count(page, "neutrophil") == 601 and count(page, "RBC") == 3999
        page.keyboard.press("Control+a")
        page.keyboard.press("l")
        says(page, "3999 cells moved to lymphocyte")
        assert count(page, "lymphocyte") == 4399
        page.keyboard.press("Control+z")
        says(page, "Taken back")
        assert count(page, "RBC") == 3999
    finally:
        served.close()


def test_the_command_shows_what_the_demo_found(tmp_path, opened):
    assert run_command("demo", tmp_path / "demo").returncode == 0
    results = tmp_path / "demo" / "results"
    process = subprocess.Popen(
        [sys.executable, "-c", "from unihema_cli import main; main()", "review", results],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(line.strip() for line in process.stdout if line.startswith("http://127.0.0.1:"))
        page = opened(SimpleNamespace(address=address))
        assert "token" not in page.url
        before = {name: count(page, name) for name in ("RBC", "Platelets")}
        page.get_by_role("button", name="RBC", exact=False).first.click()
        page.keyboard.press("p")
        says(page, "1 cell moved to Platelets")
        after = {name: count(page, name) for name in ("RBC", "Platelets")}
        assert after == {"RBC": before["RBC"] - 1, "Platelets": before["Platelets"] + 1}
        page.wait_for_function("() => document.querySelector('.cell img').naturalWidth === 128")
        page.wait_for_function("() => document.getElementById('view-image').naturalWidth > 100")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert "all as they were written" in run_command("review", results, "--check").stdout
    done = run_command("corrections", results, "-o", tmp_path / "data")
    assert done.stdout.startswith("1 fields (0 looked through) with 1 cells"), done.stderr


def test_samples_are_chosen_from_a_list(tmp_path, opened):
    served = Served(write_results(tmp_path / "results", FIELDS), "image")
    try:
        page = opened(served)
        assert count(page, "RBC") == 12
        page.locator("#sample").select_option("b")
        page.wait_for_selector("#cell-1-1")
        assert count(page, "RBC") == 1
        page.locator("#gallery").focus()
        page.keyboard.press("n")
        says(page, "moved to neutrophil")
        assert served.labels()["b", 1] == "neutrophil"
    finally:
        served.close()
