"""Analysis over HTTP: right answers, limits that hold, and bad input that harms nobody else."""

import base64
import contextlib
import errno
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from tempfile import SpooledTemporaryFile

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

import uvicorn  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from unihema.progress import Progress  # noqa: E402
from unihema.serve.gate import Limits, PatientProtocol  # noqa: E402
from unihema.serve.queue import AnalysisQueue, Job, QueueFullError, StoppingError  # noqa: E402
from unihema.serve.server import serve_app  # noqa: E402
from unihema.slides import open_regions  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")


def png(seed: int = 0, size: tuple[int, int] = (40, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


@pytest.fixture
def client(analyzer):
    with TestClient(
        serve_app(analyzer, Limits(megabytes=1, megapixels=1, images=3)), raise_server_exceptions=False
    ) as one:
        yield one


def sent(*contents: bytes, name: str = "a.png") -> list:
    return [("images", (name, content, "application/octet-stream")) for content in contents]


def test_an_answer_is_what_the_analyzer_gives(client, analyzer):
    answer = client.post("/v1/analyze", files=sent(png(1), png(2)), data={"overlay": "true", "geojson": "true"})
    assert answer.status_code == 200, answer.text
    for seed, entry in zip((1, 2), answer.json()["results"], strict=True):
        result = analyzer(Image.open(io.BytesIO(png(seed))))
        assert [cell["box"] for cell in entry["result"]["cells"]] == [
            pytest.approx(cell.box, abs=1e-3) for cell in result.cells
        ]
        assert entry["result"]["image"] == "a.png" and len(entry["result"]["provenance"]["image_sha256"]) == 64
        assert len(entry["geojson"]["features"]) == len(result.cells) + (
            result.mask is not None and bool(result.mask.any())
        )
        Image.open(io.BytesIO(base64.b64decode(entry["overlay_png"]))).load()


def test_questions_are_answered(client, analyzer):
    questions = ["What type of white blood cell is this?", "The nucleus is ___."]
    answer = client.post("/v1/ask", files={"image": ("a.png", png(3))}, data={"questions": questions})
    assert answer.status_code == 200, answer.text
    expected = analyzer.ask(Image.open(io.BytesIO(png(3))), questions)
    assert [entry["answer"] for entry in answer.json()["answers"]] == [str(each) for each in expected]


def test_what_is_wrong_is_named_and_nothing_else_suffers(client):
    bomb = io.BytesIO()
    Image.new("L", (4000, 4000)).save(bomb, "PNG")
    for files, data, status, said in (
        (sent(b"no image", name="cells.png"), {}, 422, "cells.png: not an image"),
        (sent(png()[:200], name="half.png"), {}, 422, "half.png: the image is truncated or damaged"),
        (sent(bomb.getvalue(), name="bomb.png"), {}, 422, "bomb.png: 4000 x 4000 pixels; this server takes 1 million"),
        (sent(png(), b""), {}, 422, "a.png: the file is empty"),
        (sent(*[png()] * 4), {}, 422, "1 to 3 images, got 4"),
        (sent(png()), {"tasks": "dancing"}, 422, "Unknown task 'dancing'"),
        (sent(png()), {"threshold": "2"}, 422, "The threshold must lie in 0..1"),
        (sent(png()), {"threshold": "much"}, 422, "threshold: Input should be a valid number"),
        (sent(png()), {"tiles": "many"}, 422, "tiles must be auto, off"),
        (sent(png()), {"questions": "word " * 5000}, 422, ""),
        (sent(b"x" * (3 << 20)), {}, 413, "A request has 1 MB at most"),
        ([], {}, 415, "come as a form"),
        ([("tasks", (None, "detection"))], {}, 422, "images: Field required"),
    ):
        answer = client.post("/v1/analyze", files=files or None, data=data)
        assert answer.status_code == status and said in answer.json()["error"], (answer.status_code, answer.text)
        assert client.post("/v1/analyze", files=sent(png(5))).status_code == 200
    assert client.get("/v1/nothing").status_code == 404 and client.get("/v1/analyze").status_code == 405
    assert client.post("/v1/ask", files={"image": ("a.png", png())}, data={"questions": ""}).status_code == 422


def test_what_would_be_passed_over_is_refused(client):
    image = {"image": ("a.png", png())}
    for path, files, data, name in (
        ("/v1/analyze", sent(png()), {"treshold": "0.5"}, "treshold"),
        ("/v1/analyze?threshold=0.5", sent(png()), {}, "threshold"),
        ("/v1/analyze", [*sent(png()), ("image", ("b.png", png()))], {}, "image"),
        ("/v1/ask", image, {"questions": "a", "question": "b"}, "question"),
    ):
        answer = client.post(path, files=files, data=data)
        assert answer.status_code == 422 and answer.json()["error"].startswith(
            f"{name}: no field of this form. There are "
        )


def test_names_are_text_and_no_path_of_a_client_is_opened(client, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(9))
    name = f"..%2f../{tmp_path}/secret.png"
    result = client.post("/v1/analyze", files=sent(png(1), name=name)).json()["results"][0]["result"]
    assert result["image"] == "secret.png"
    answer = client.post("/v1/analyze", files=sent(b"none", name="<b>\x1b[31m.png"))
    assert answer.headers["content-type"] == "application/json" and "\x1b" not in answer.json()["error"]
    for path in (str(tmp_path / "secret.png"), "http://127.0.0.1/a.png"):
        assert client.post("/v1/analyze", files=[("images", (None, path))]).status_code == 422


def test_a_body_that_does_not_say_how_long_it_is(client):
    def endless():
        for _ in range(64):
            yield b"x" * (1 << 16)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/analyze", content=endless(), headers=kind)
    assert answer.status_code in (400, 413), answer.text


def test_who_has_no_token_is_not_let_in(analyzer):
    with TestClient(serve_app(analyzer, token="secret")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            answer = client.post("/v1/analyze", files=sent(png()), headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/info").status_code == 401 and client.get("/health").status_code == 200
        allowed = {"authorization": "Bearer secret"}
        assert client.post("/v1/analyze", files=sent(png()), headers=allowed).status_code == 200


def test_what_can_be_asked_and_how_the_server_is(client):
    assert client.get("/health").json()["status"] == "ok"
    info = client.get("/v1/info").json()
    assert info["limits"]["images"] == 3 and "detection" in info["tasks"]
    client.post("/v1/analyze", files=sent(png(), png(1)))
    measured = client.get("/metrics").text
    assert 'unihema_requests_total{path="/v1/analyze",status="200"} 1.0' in measured
    assert "unihema_images_total 2.0" in measured
    page = client.get("/docs").text
    assert "POST /v1/analyze" in page and "<script" not in page and "um_per_pixel" in page
    assert "/v1/ask" in client.get("/openapi.json").json()["paths"]


def test_a_request_has_a_number(client):
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = client.get("/health", headers={"x-request-id": "not mine\t"}).headers["x-request-id"]
    assert made != "not mine\t" and len(made) == 32


def test_clients_at_once_get_their_own_answers(client, analyzer):
    kinds = [
        (seed, size, question)
        for seed, (size, question) in enumerate(
            [((40, 32), "What is this?"), ((64, 48), "How many cells?"), ((40, 32), "What shape has the nucleus?")] * 6
        )
    ]
    expected = [
        analyzer(Image.open(io.BytesIO(png(seed, size))), questions=[question]).to_dict()
        for seed, size, question in kinds
    ]

    def ask(kind):
        seed, size, question = kind
        answer = client.post("/v1/analyze", files=sent(png(seed, size)), data={"questions": question})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"][0]["result"]

    def told(result):
        # Scores differ in their last digits where images are analysed together.
        return [[answer[key] for key in ("question", "answer", "cells", "counts")] for answer in result["answers"]]

    with ThreadPoolExecutor(8) as pool:
        for found, right in zip(pool.map(ask, kinds), expected, strict=True):
            assert told(found) == told(right) and found["width"] == right["width"]
            assert [cell["label"] for cell in found["cells"]] == [cell["label"] for cell in right["cells"]]


class Slow:
    """An analyzer that waits until it may go on, and tells what it was given."""

    def __init__(self):
        self.go, self.begun, self.batches = threading.Event(), threading.Event(), []

    def run(self, request, sources, on_progress=None):
        self.batches.append((request, [source.size for source in sources]))
        self.begun.set()
        assert self.go.wait(60)
        return [f"{request} {source.width}" for source in sources]


def job(size=(8, 8), prompt=None, opened=None):
    """A job whose answer is what `Slow` gives."""
    opened = opened or (lambda: open_regions(Image.new("RGB", size)))
    return Job(opened, size, (prompt,), prompt, lambda result, source: result)


def test_the_queue_is_bounded_and_analyses_alike_ones_together():
    slow = Slow()
    queue = AnalysisQueue(slow, most=5, batch_size=3)
    first = job()
    queue.add([first])
    assert slow.begun.wait(60)
    jobs = [job(), job((9, 8)), job(), job(prompt="RBC"), job()]
    queue.add(jobs)
    with pytest.raises(QueueFullError, match=r"The queue is full\. Ask again in \d+ seconds") as full:
        queue.add([job()])
    assert full.value.seconds >= 1 and len(queue) == 5
    queue.leave([jobs[2]])
    assert len(queue) == 4
    slow.go.set()
    queue.stop()
    with pytest.raises(StoppingError):
        queue.add([job()])
    assert first.answer.result() == "None 8" and jobs[3].answer.result() == "RBC 8" and not jobs[2].answer.done()
    assert [len(sizes) for _, sizes in slow.batches] == [1, 2, 1, 1]


def test_of_a_batch_only_the_one_at_fault_fails():
    class Choosy(Slow):
        def run(self, request, sources, on_progress=None):
            if any(source.width == 7 for source in sources):
                raise RuntimeError("no")
            return [source.width for source in sources]

    def missing():
        raise OSError("gone")

    held = Slow()
    queue = AnalysisQueue(Choosy(), batch_size=4)
    queue.analyzer.run, run = held.run, queue.analyzer.run
    queue.add([job()])
    assert held.begun.wait(60)
    queue.analyzer.run = run
    at_fault = job(opened=lambda: open_regions(Image.new("RGB", (7, 8))))
    jobs = [job(), at_fault, job(opened=missing), job()]
    queue.add(jobs)
    held.go.set()
    assert jobs[0].answer.result(60) == jobs[3].answer.result(60) == 8
    for each, error in ((at_fault, RuntimeError), (jobs[2], OSError)):
        with pytest.raises(error):
            each.answer.result(60)
    queue.stop()


def test_an_image_that_nobody_waits_for_stops_at_its_next_tile(caplog):
    class Tiled(Slow):
        tiles = 0

        def run(self, request, sources, on_progress=None):
            super().run(request, sources)
            for number in range(3):
                on_progress(Progress(sources[0].name, "tile", number, 3, 0))
                self.tiles += 1
            return [None]

    tiled = Tiled()
    queue = AnalysisQueue(tiled)
    left = job()
    queue.add([left])
    assert tiled.begun.wait(60)
    queue.leave([left])
    tiled.go.set()
    queue.stop()
    assert tiled.tiles == 0 and left.answer.exception() is not None and not caplog.records


def test_a_full_queue_and_a_slow_analyzer_are_told(analyzer, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(analyzer, "run", slow.run)
    with TestClient(serve_app(analyzer, Limits(waiting=1, seconds=1.0))) as client, ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/v1/analyze", files=sent(png()))
        assert slow.begun.wait(60)
        answers = [pool.submit(client.post, "/v1/analyze", files=sent(png())) for _ in range(2)]
        statuses = sorted(answer.result().status_code for answer in answers)
        assert statuses in ([429, 504], [504, 504]) and first.result().status_code == 504
        refused = [answer.result() for answer in answers if answer.result().status_code == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        slow.go.set()


def test_an_address_that_is_taken(checkpoint):
    from click.testing import CliRunner

    from unihema_cli.app import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", str(port), "--device", "cpu"])
    assert done.exit_code and "cannot be listened at" in str(done.exception), json.dumps(done.output)


def test_what_arrives_is_bounded_for_all_clients_together(analyzer):
    """What a client says it will send counts for nothing; what has come counts until it is answered."""
    with TestClient(serve_app(analyzer, Limits(arriving_megabytes=1))) as client:
        answer = client.post("/v1/analyze", files=sent(b"x" * (2 << 20)))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "5"
        assert "Too much arrives at once" in answer.json()["error"]
        assert client.post("/v1/analyze", files=sent(png())).status_code == 200
    with TestClient(serve_app(analyzer, Limits(arriving=0))) as client:
        answer = client.post("/v1/analyze", files=sent(png()))
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_a_disk_that_is_full_is_named(client, monkeypatch):
    class Full(SpooledTemporaryFile):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    def no_folder(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name, value in (
        ("starlette.formparsers", "SpooledTemporaryFile", Full),
        ("unihema.serve.server.tempfile", "mkdtemp", no_folder),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"{place}.{name}", value)
            answer = client.post("/v1/analyze", files=sent(png()))
        assert answer.status_code == 507 and "No space left on device" in answer.json()["error"], answer.text
        assert client.post("/v1/analyze", files=sent(png())).status_code == 200


def test_a_connection_without_a_request_and_one_that_fetches_no_answer_are_given_up():
    async def large(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    protocol = type("Protocol", (PatientProtocol,), {"first_seconds": 0.2, "fetch_seconds": 0.5})
    server = uvicorn.Server(uvicorn.Config(large, http=protocol, ws="none", lifespan="off", log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        for begun, again in ((b"", b""), (request[:10], b""), (request, request[:10])):
            with socket.create_connection(listener.getsockname(), timeout=60) as connection:
                connection.sendall(begun)
                connection.sendall(again)
                received = 0
                with contextlib.suppress(ConnectionResetError):
                    while block := connection.recv(1 << 20):
                        received += len(block)
                # A request that is complete is answered, however long its answer takes to fetch.
                assert (received > 64 << 20) == (begun == request)
        with socket.create_connection(listener.getsockname(), timeout=60) as connection:
            connection.sendall(request)
            while not server.server_state.connections:
                time.sleep(0.01)
            # Nothing is fetched of it, and the server lets go.
            while server.server_state.connections:
                time.sleep(0.05)
        server.should_exit = True
        thread.join()
