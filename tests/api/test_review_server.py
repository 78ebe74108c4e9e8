"""The server of a review, by what it answers: who is let in, what is refused, and what others see."""

import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from command import run_command
from PIL import Image
from review_results import CLASSES, write_results

from unihema import OutputError, SmearReport
from unihema.review.pictures import Pictures
from unihema.review.reviewed_results import reviewed_samples
from unihema.review.rows import class_keys
from unihema.review.state import Review
from unihema.slides import open_regions


pytest.importorskip("fastapi")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from unihema.review.server import HEADERS, MOST_BODY, mounted_review, review_app, serve


TOKEN, PORT = "a-token-of-tests", 8123
ORIGIN = f"http://127.0.0.1:{PORT}"
FIELDS = {"a.png": ["RBC", "neutrophil", "RBC"], "b.png": ["WBC", "Platelets"]}
HOSTILE = "<script>alert(1)</script>\"'&\u202e'; DROP TABLE entries;--"


def client_of(review, token=TOKEN, **headers):
    client = TestClient(review_app(review, TOKEN, PORT), base_url=ORIGIN, headers={"Origin": ORIGIN, **headers})
    if token:
        assert client.get("/", params={"token": token}).status_code == 200
    return client


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("written") / "results", FIELDS)


@pytest.fixture
def folder(written, tmp_path):
    """A results folder that nobody has reviewed; its images are shared."""
    return shutil.copytree(written, tmp_path / "results")


@pytest.fixture
def review(folder):
    with Review(folder) as review:
        yield review


@pytest.fixture
def client(review):
    return client_of(review)


@pytest.fixture(scope="module")
def untouched(written, tmp_path_factory):
    """A review in which nothing is changed, and its client."""
    folder = shutil.copytree(written, tmp_path_factory.mktemp("untouched") / "results")
    with Review(folder) as review:
        yield review, client_of(review)
        assert review.log.head[0] == len(FIELDS)


def change(client, cells, kind="class", label="lymphocyte", who="Ada", **more):
    targets = [dict(zip(("image", "cell", "revision"), cell)) for cell in cells]
    body = {"who": who, "kind": kind, "cells": targets, **({"label": label} if kind == "class" else {}), **more}
    return client.post("/api/samples/0/changes", json=body)


def cell(answer, image, number):
    return next(row for row in answer["cells"] if row[:2] == [image, number])


def test_the_address_lets_in_once_and_gives_a_cookie(review):
    client = client_of(review, token=None)
    assert client.get("/api/samples").status_code == 401
    assert client.get("/", params={"token": "another"}).status_code == 401
    assert "whole address" in client.get("/").text
    answer = client.get("/", params={"token": TOKEN}, follow_redirects=False)
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert client.get("/").status_code == 200 and client.get("/api/samples").json()[0]["name"] == "results"
    other = client_of(review, token=None)
    other.cookies = client.cookies
    assert other.get("/api/samples").status_code == 401, "a cookie of another server"


def test_every_answer_tells_the_browser_what_it_may_do(client):
    for path in (
        "/",
        "/static/review.js",
        "/api/samples",
        "/api/nothing",
        "/api/images/0/cells/1",
        "/api/images/9/cells/1",
    ):
        answer = client.get(path)
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "unsafe" not in answer.headers["content-security-policy"]
    page = client.get("/").text
    assert "<script>" not in page and "style=" not in page and "onclick" not in page and "http:" not in page


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1:80"}, 421),
        ({"Host": f"127.0.0.1:{PORT}.evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"https://127.0.0.1:{PORT}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Length": "99999999999"}, 413),
    ],
)
def test_other_hosts_and_origins_are_refused(untouched, headers, status):
    review, client = untouched
    answer = client.post("/api/samples/0/undo", json={"who": "Ada"}, headers=headers)
    assert answer.status_code == status and answer.json()["error"]
    assert review.log.head[0] == 2


def test_a_change_without_an_origin_is_refused_and_localhost_is_this_machine(review):
    client = client_of(review)
    del client.headers["origin"]
    assert client.get("/api/samples").status_code == 200
    assert client.post("/api/samples/0/undo", json={"who": "Ada"}).status_code == 403
    local = f"http://localhost:{PORT}"
    other = TestClient(review_app(review, TOKEN, PORT), base_url=local, headers={"Origin": local})
    assert other.get("/", params={"token": TOKEN}).status_code == 200 and change(other, [(0, 1, 0)]).status_code == 200


def test_bodies_have_a_limit_however_they_are_sent(client):
    def pieces():
        for _ in range(MOST_BODY // 65536 + 2):
            yield b" " * 65536

    answer = client.post("/api/samples/0/changes", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "MB" in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"who": 3}', b'{"who": "Ada", "kind": "class"}',
        b'{"who": "Ada", "kind": "class", "cells": [], "label": "x"}',
        b'{"who": "Ada", "kind": "explode", "cells": [{"image": 0, "cell": 1, "revision": 0}]}',
        b'{"who": "Ada", "kind": "class", "cells": [{"image": 0, "cell": 1, "revision": 0}], "label": ""}',
        b'{"who": "", "kind": "confirm", "cells": [{"image": 0, "cell": 1, "revision": 0}]}',
        b'{"who": "\\ud800", "kind": "confirm", "cells": [{"image": 0, "cell": 1, "revision": 0}]}',
        b'{"who": "Ada", "kind": "confirm", "cells": [{"image": -1, "cell": 1, "revision": 0}]}',
        b'{"who": "Ada", "kind": "confirm", "cells": [{"image": 0, "cell": 99, "revision": 0}]}',
        b'{"who": "Ada", "kind": "confirm", "cells": [{"image": "../../etc", "cell": 1, "revision": 0}]}',
        b'{"who": "Ada", "kind": "confirm", "cells": [{"image": 1e99, "cell": 1, "revision": 0}], "path": "/etc/passwd"}',
        b'\xff\xfe', b'{"a":' * 3000,
    ],
)  # fmt: skip
def test_what_is_no_change_is_told_in_plain_words(untouched, body):
    review, client = untouched
    answer = client.post("/api/samples/0/changes", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500 and len(answer.json()["error"]) < 400
    assert review.log.head[0] == 2


@pytest.mark.parametrize(
    "box", [[0, 0, 1, 1], [5, 5, 5, 50], [-50, 0, -9, 20], [0, 0, 9], ["a", 0, 9, 9], [1e400, 0, 9, 9]]
)
def test_a_box_that_is_none_is_not_drawn(untouched, box):
    review, client = untouched
    text = json.dumps({"who": "Ada", "image": 0, "box": box, "label": "RBC"})
    answer = client.post("/api/samples/0/draw", content=text, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500 and answer.json()["error"] and review.log.head[0] == 2


def test_no_path_of_a_page_is_opened(untouched):
    _, client = untouched
    for path in (
        "/static/..%2f..%2fserver.py", "/static/review.html", "/static/%2e%2e/state.py", "/api/images/0/cells/..%2f..%2fetc",
        "/api/images/..%2f0/cells/1", "/api/images/0/view?left=0&top=0&right=9&bottom=9&path=/etc/passwd",
    ):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code in (404, 422) or answer.headers["content-type"] == "image/jpeg"


def test_cells_move_and_the_counts_and_the_differential_with_them(client):
    before = client.get("/api/samples/0", params={"who": "Ada"}).json()
    assert [row["name"] for row in before["classes"]] == ["WBC", "neutrophil", "lymphocyte", "Platelets", "RBC"]
    assert len({row["key"] for row in before["classes"]}) == 5
    answer = change(client, [(0, 1, 0), (0, 3, 0)])
    assert answer.status_code == 200 and [row[:3] for row in answer.json()["cells"]] == [
        [0, 1, "lymphocyte"],
        [0, 3, "lymphocyte"],
    ]
    counts = {row["name"]: row["count"] for row in answer.json()["classes"]}
    assert counts == {"RBC": 0, "WBC": 1, "Platelets": 1, "neutrophil": 1, "lymphocyte": 2}
    told = answer.json()["differential"]
    assert told["total"] == 4 and {row["name"]: row["percent"] for row in told["rows"]} == {
        "unidentified": 25, "neutrophil": 25, "lymphocyte": 50,
    }  # fmt: skip
    (row,) = [row for row in told["rows"] if row["name"] == "lymphocyte"]
    # Clopper-Pearson, 2 of 4.
    assert (row["low"], row["high"]) == (pytest.approx(6.76, abs=0.01), pytest.approx(93.24, abs=0.01))


def test_the_score_that_is_shown_is_a_probability_where_there_is_one(tmp_path):
    alone = {"label": "neutrophil", "score": 0.9, "probability": 0.6}
    folder = write_results(tmp_path / "results", {"crop.png": "neutrophil"}, size=(60, 60), single_cell=alone)
    with Review(folder) as review:
        assert client_of(review).get("/api/samples/0").json()["cells"][0][8] == 0.6


def test_the_differential_leaves_types_open_as_the_report_does_until_a_person_has_looked(tmp_path):
    told = {"typed_from": 0.8, "precision": 0.95, "ece": 0.01, "cells": 100}
    fields = {"a.png": ["neutrophil", "lymphocyte", "neutrophil", "RBC"]}
    folder = write_results(tmp_path / "results", fields, provenance={"calibration": {"detection": told}})
    with Review(folder) as review:
        client = client_of(review)

        def both():
            shown = client.get("/api/samples/0", params={"who": "Ada"}).json()
            (sample,) = reviewed_samples(folder)
            report = SmearReport.of(sample.results, sample.name)
            counted = {row["name"]: row["count"] for row in report.figures["white_cells"]["rows"] if not row["hidden"]}
            assert {row["name"]: row["count"] for row in shown["differential"]["rows"]} == counted
            (note,) = [note for note in shown["differential"]["notes"] if "too uncertain" in note]
            assert note in report.figures["notes"]
            # The pictures keep the class that was found.
            assert {row["name"]: row["count"] for row in shown["classes"]}["lymphocyte"] == 1
            return counted, note

        counted, note = both()
        assert (counted["neutrophil"], counted["unidentified"]) == (1, 2) and note.startswith("2 of 3 white cells")
        assert change(client, [(0, 2, 0)], kind="confirm").status_code == 200
        counted, note = both()
        assert (counted["lymphocyte"], counted["unidentified"]) == (1, 1) and note.startswith("1 of 3 white cells")


def test_a_stale_change_is_refused_with_what_is_there_now(client, review):
    first = change(client, [(0, 1, 0)]).json()
    answer = change(client, [(0, 2, 0), (0, 1, 0)], label="Platelets", who="Bob")
    assert answer.status_code == 409 and answer.json()["cells"] == first["cells"]
    assert review.images["a"].cells[2].label == "neutrophil"
    assert change(client, [(0, 1, cell(first, 0, 1)[3])], label="Platelets", who="Bob").status_code == 200


def test_many_browsers_at_once_lose_no_change_and_none_twice(review):
    clients = [client_of(review) for _ in range(4)]
    acknowledged, conflicts = [], []

    def work(number):
        chance = random.Random(number)
        mine = {}
        for turn in range(25):
            target = chance.choice([(0, 1), (0, 2), (1, 1)])
            label = f"{number}-{turn}"
            answer = change(clients[number], [(*target, mine.get(target, 0))], label=label, who=f"person {number}")
            for row in answer.json()["cells"]:
                mine[row[0], row[1]] = row[3]
            (acknowledged if answer.status_code == 200 else conflicts).append(label)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = [entry for entry in review.log.entries() if entry.kind == "class"]
    assert sorted(entry.new["label"] for entry in entries) == sorted(acknowledged)
    assert conflicts and len(acknowledged) + len(conflicts) == 100
    for image, number in (("a", 1), ("a", 2), ("b", 1)):
        of_cell = [entry for entry in entries if (entry.image, entry.cell) == (image, number)]
        # Whoever changed a cell had seen what it was.
        assert all(after.old["label"] == before.new["label"] for before, after in zip(of_cell, of_cell[1:]))


def test_a_browser_sees_what_another_did(review):
    one, other = client_of(review), client_of(review)
    seen = other.get("/api/samples/0").json()["revision"]
    assert other.get("/api/samples/0/changes", params={"after_revision": seen}).json() == {
        "after": seen,
        "revision": seen,
    }
    change(one, [(0, 1, 0)])
    one.post("/api/samples/0/draw", json={"who": "Ada", "image": 1, "box": [50.0, 50.0, 70.0, 70.0], "label": "RBC"})
    answer = other.get("/api/samples/0/changes", params={"after_revision": seen}).json()
    assert [row[:3] for row in answer["cells"]] == [[0, 1, "lymphocyte"], [1, 3, "RBC"]] and answer["after"] == seen


def test_undo_redo_draw_delete_and_a_field_looked_through(client):
    drawn = client.post(
        "/api/samples/0/draw", json={"who": "Ada", "image": 0, "box": [150.0, 100.0, 180.0, 130.0], "label": "WBC"}
    )
    assert cell(drawn.json(), 0, 4)[9] == [150, 100, 180, 130]
    assert cell(client.post("/api/samples/0/undo", json={"who": "Ada"}).json(), 0, 4)[4] is False
    assert cell(client.post("/api/samples/0/redo", json={"who": "Ada"}).json(), 0, 4)[4] is True
    deleted = change(client, [(1, 2, 0)], "delete").json()
    assert cell(deleted, 1, 2)[4] is False and deleted["undo"] and not deleted["redo"]
    assert client.post("/api/samples/0/undo", json={"who": "Bob"}).json() == {
        "error": "There is nothing of Bob to undo."
    }
    body = {"who": "Ada", "image": 0, "revision": 0}
    assert client.post("/api/samples/0/through", json=body).status_code == 409
    body["revision"] = next(row[2] for row in client.get("/api/samples/0").json()["images"] if row[0] == 0)
    assert client.post("/api/samples/0/through", json=body).json()["images"][0][:2] == [0, True]
    kinds = [entry["kind"] for entry in client.get("/api/samples/0/log").json()["entries"]]
    assert kinds == ["draw", "undo", "redo", "delete", "look through"]


def test_sign_and_amend(client):
    change(client, [(0, 1, 0)])
    assert client.put("/api/samples/0/signature", json={"who": "Ada", "revision": 0}).status_code == 409
    revision = client.get("/api/samples/0").json()["revision"]
    signed = client.put("/api/samples/0/signature", json={"who": "Ada", "revision": revision}).json()
    assert signed["status"] == "final" and signed["signatures"][0]["who"] == "Ada"
    refused = change(client, [(0, 2, 0)])
    assert refused.status_code == 423 and "amendment" in refused.json()["error"]
    assert client.post("/api/samples/0/amend", json={"who": "Bob"}).status_code == 400
    assert client.post("/api/samples/0/amend", json={"who": "Bob", "why": "band"}).json()["status"] == "amendment open"
    last = change(client, [(0, 2, 0)], who="Bob").json()
    again = client.put("/api/samples/0/signature", json={"who": "Bob", "revision": last["revision"]}).json()
    assert [each["status"] for each in again["signatures"]] == ["final", "amended"] and again["status"] == "amended"


def test_hostile_texts_stay_text(tmp_path):
    name = "<img src=x onerror=alert(1)>'.png"
    folder = write_results(tmp_path / "<b>results", {name: [HOSTILE, "RBC"]}, warnings=[HOSTILE])
    with Review(folder) as review:
        client = client_of(review)
        page = client.get("/").text
        assert "<b>results" not in page and "&lt;b&gt;results" in page
        answer = client.get("/api/samples/0")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["files"]["0"][0] == name and answer.json()["warnings"] == [HOSTILE]
        told = change(client, [(0, 2, 0)], label=HOSTILE, who=HOSTILE, why=HOSTILE).json()
        assert cell(told, 0, 2)[2] == HOSTILE
        signed = client.put("/api/samples/0/signature", json={"who": HOSTILE, "revision": told["revision"]})
        assert signed.json()["signatures"][0]["who"] == HOSTILE.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="names there are text")
def test_a_file_name_that_is_no_text_is_shown_escaped(tmp_path):
    name = os.fsdecode(b"sm\xffear.png")
    with Review(write_results(tmp_path / "results", {name: ["RBC"]})) as review:
        answer = client_of(review).get("/api/samples/0")
        assert answer.status_code == 200 and answer.json()["files"]["0"][0] == "sm\\udcffear.png"


def test_pictures_of_cells_and_views_are_cached_by_content(client, review):
    answer = client.get("/api/images/0/cells/1")
    assert answer.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(answer.content)).size == (128, 128)
    tag = answer.headers["etag"]
    again = client.get("/api/images/0/cells/1", headers={"If-None-Match": tag})
    assert again.status_code == 304 and again.content == b"" and "private" in again.headers["cache-control"]
    assert client.get("/api/images/0/cells/2").headers["etag"] != tag
    whole = client.get("/api/images/0/view", params={"left": 0, "top": 0, "right": 200, "bottom": 160, "longest": 200})
    shown = np.asarray(Image.open(io.BytesIO(whole.content)), dtype=float)
    truth = np.asarray(Image.open(review.images["a"].stored.source), dtype=float)
    assert shown.shape == truth.shape and np.abs(shown - truth).mean() < 4
    for wrong in ((0, 0, 0, 10), (-1, 0, 5, 5), (0, 0, 9999, 10), (50, 50, 20, 60)):
        answer = client.get("/api/images/0/view", params=dict(zip(("left", "top", "right", "bottom"), wrong)))
        assert answer.status_code == 400 and "no part" in answer.json()["error"]
    huge = client.get("/api/images/0/view", params={"left": 0, "top": 0, "right": 20, "bottom": 16, "longest": 10**9})
    assert max(Image.open(io.BytesIO(huge.content)).size) == 1024


@pytest.mark.parametrize(
    ("size", "compared", "told"),
    [((200, 160), 1 << 28, "another image"), ((30, 30), 1 << 28, "another image"), ((30, 30), 0, "30 x 30")],
)
def test_an_image_that_is_gone_or_another_is_told_without_its_folder(tmp_path, monkeypatch, size, compared, told):
    monkeypatch.setattr("unihema.slides.MOST_COMPARED", compared)
    folder = write_results(tmp_path / "results", FIELDS)
    with Review(folder) as review:
        _images_are_gone(client_of(review), folder, size, told)


def _images_are_gone(client, folder, size, told):
    path = folder.parent / "smears" / "a.png"
    Image.new("RGB", size, "red").save(path)
    answer = client.get("/api/images/0/cells/1")
    assert answer.status_code == 422 and told in answer.json()["error"]
    path.unlink()
    answer = client.get("/api/images/0/cells/2")
    assert answer.status_code == 422 and "a.png" in answer.json()["error"] and str(folder.parent) not in answer.text


def test_cells_of_a_slide_are_cut_from_it(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    noise = np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((960, 800)))
    (tmp_path / "smears").mkdir()
    tifffile.imwrite(tmp_path / "smears" / "slide.tif", pixels, tile=(256, 256), photometric="rgb", compression="jpeg")
    folder = write_results(tmp_path / "results", {"slide.tif": ["WBC", "RBC"]}, size=(960, 800))
    # What is larger than this is read in parts.
    monkeypatch.setattr("unihema.review.pictures.open_regions", partial(open_regions, max_pixels=1000))
    with Review(folder) as review:
        client = client_of(review)
        assert Image.open(io.BytesIO(client.get("/api/images/0/cells/2").content)).size == (128, 128)
        box = {"left": 500, "top": 300, "right": 600, "bottom": 380, "longest": 100}
        part = np.asarray(Image.open(io.BytesIO(client.get("/api/images/0/view", params=box).content)), dtype=float)
        assert np.abs(part - pixels[300:380, 500:600]).mean() < 8


def test_few_images_are_kept_open(tmp_path, monkeypatch):
    folder = write_results(tmp_path / "results", {f"{number}.png": ["RBC"] for number in range(4)})
    monkeypatch.setattr("unihema.review.pictures.KEPT_IMAGES", 3 * 200 * 160 * 2)
    monkeypatch.setattr("unihema.review.pictures.KEPT_PICTURES", 5000)
    with Review(folder) as review:
        pictures = Pictures()
        for image in review.images.values():
            pictures.view(image, (0, 0, 200, 160), 200)
        assert list(pictures._open) == ["2", "3"] and sum(map(len, pictures._cut.values())) == pictures._bytes <= 5000
        pictures.close()


def test_a_picture_of_one_cell_is_its_cell(tmp_path):
    with Review(write_results(tmp_path / "results", {"crop.png": "neutrophil"}, size=(90, 70))) as review:
        client = client_of(review)
        answer = client.get("/api/samples/0").json()
        assert answer["cells"][0][:3] == [0, 0, "neutrophil"] and answer["files"]["0"][3] is True
        assert client.get("/api/images/0/cells/0").status_code == 200
        assert cell(change(client, [(0, 0, 0)]).json(), 0, 0)[2] == "lymphocyte"
        body = {"who": "Ada", "image": 0, "box": [0.0, 0.0, 9.0, 9.0], "label": "RBC"}
        assert "one cell" in client.post("/api/samples/0/draw", json=body).json()["error"]


def test_a_change_that_cannot_be_written_is_not_acknowledged(client, review, monkeypatch):
    def full(*_, **__):
        raise OutputError("review.sqlite: cannot be written (database or disk is full).")

    monkeypatch.setattr(review.log, "append", full)
    answer = change(client, [(0, 1, 0)])
    assert answer.status_code == 507 and "not written" in answer.json()["error"]
    assert review.images["a"].cells[1].label == "RBC"


class Browser:
    """Asks a server as the page does."""

    def __init__(self, address):
        self.origin = address.split("/?")[0]
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        self.opener.open(address, timeout=10).read()

    def change(self, revision, label):
        body = {"who": "Ada", "kind": "class", "label": label, "cells": [{"image": 0, "cell": 1, "revision": revision}]}
        request = urllib.request.Request(
            f"{self.origin}/api/samples/0/changes",
            json.dumps(body).encode(),
            {"Origin": self.origin, "Content-Type": "application/json"},
        )
        return json.load(self.opener.open(request, timeout=10))["cells"][0][3]


@contextmanager
def served(folder):
    """A server in a process of its own; its number and its address."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            serve(folder, on_address=lambda address: os.write(writer, address.encode()))
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        yield child, os.read(reader, 500).decode()
    finally:
        os.close(reader)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_server_has_every_change_that_it_acknowledged(folder, kills):
    chance, acknowledged, sent = random.Random(kills), [], 0
    for _ in range(kills):
        with served(folder) as (child, address):
            browser = Browser(address)
            threading.Timer(chance.uniform(0, 0.3), os.kill, (child, signal.SIGKILL)).start()
            with Review(folder, read_only=True) as review:
                revision = review.images["a"].cells[1].revision
            try:
                while True:
                    sent += 1
                    revision = browser.change(revision, f"class {sent}")
                    acknowledged.append(f"class {sent}")
            except (OSError, http.client.HTTPException, ValueError):
                os.waitpid(child, 0)
        with Review(folder, read_only=True) as review:
            assert review.log.verify() is None
            labels = [entry.new["label"] for entry in review.log.entries() if entry.kind == "class"]
            # One that was written may not have been acknowledged any more.
            assert set(acknowledged) <= set(labels) and len(labels) <= len(acknowledged) + kills
            assert review.images["a"].cells[1].label == (labels[-1] if labels else "RBC")
    assert acknowledged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_server_stops_at_a_signal_and_gives_the_folder_back(folder):
    with served(folder) as (child, address):
        assert Browser(address).change(0, "lymphocyte") > 0
        with pytest.raises(OutputError, match="another run"):
            Review(folder)
        started = time.monotonic()
        os.kill(child, signal.SIGINT)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 130 and time.monotonic() - started < 30
    with Review(folder) as review:
        assert review.images["a"].cells[1].label == "lymphocyte"


def test_a_port_that_is_taken_is_told(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"Port {port}"):
            serve(folder, port=port)


def test_the_command_checks_a_log(folder):
    assert "no such file" in run_command("review", folder, "--check").stderr
    with Review(folder) as review:
        head = review.log.head[1]
    said = run_command("review", folder, "--check")
    assert said.returncode == 0 and head in said.stdout
    assert run_command("review", folder, "--head", head).returncode == 0
    missing = run_command("review", folder, "--check", "--head", "0" * 63 + "1")
    assert missing.returncode == 1 and "missing" in missing.stderr


def test_the_command_says_what_to_install(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "unihema.review.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    run = run_command("review", folder)
    assert run.returncode == 2 and "pip install 'unihema[review]'" in run.stderr


def test_classes_have_keys_as_far_as_there_are_any():
    keys = class_keys([*CLASSES, *(f"class {number}" for number in range(60))])
    assert keys["neutrophil"] == "n" and len(set(keys.values())) == len(keys) == 36


def test_the_page_stands_beside_another_application(folder):
    """At a path of its own, called by whatever name the other one has, with the same rules."""
    host = FastAPI()
    with mounted_review(folder, TOKEN) as app:
        host.mount("/review", app)
        client = TestClient(host, base_url="https://lab.example", headers={"Origin": "https://lab.example"})
        assert client.get("/review/").status_code == client.get("/review/api/samples").status_code == 401
        assert client.get("/review/", params={"token": "wrong"}).status_code == 401
        answer = client.get("/review", params={"token": TOKEN})
        assert answer.status_code == 200 and str(answer.url) == "https://lab.example/review/"
        for link in re.findall(r'(?:href|src)="(static/[^"]+)"', answer.text):
            assert client.get(f"/review/{link}").status_code == 200
        assert (
            "path=/review/" in client.get("/review/", params={"token": TOKEN}).history[0].headers["set-cookie"].lower()
        )
        assert [sample["images"] for sample in client.get("/review/api/samples").json()] == [2]
        cell = client.get("/review/api/samples/0").json()["cells"][0]
        change = {
            "who": "Ann",
            "kind": "class",
            "label": "WBC",
            "cells": [{"image": cell[0], "cell": cell[1], "revision": cell[3]}],
        }
        for origin in ("https://other.example", "null"):
            refused = client.post("/review/api/samples/0/changes", json=change, headers={"Origin": origin})
            assert refused.status_code == 403
        assert client.post("/review/api/samples/0/changes", json=change).status_code == 200
        assert client.get("/review/api/samples/0").json()["cells"][0][2] == "WBC"
    # The log is closed, and another may open it.
    with Review(folder) as review:
        assert [entry.new["label"] for entry in review.log.entries() if entry.who == "Ann"] == ["WBC"]
