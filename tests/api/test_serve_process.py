"""The server as its own process, over loopback: what slow, broken and hostile clients do to it, and to others."""

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from review_results import write_results
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

pytestmark = [
    pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory and files of another process are read from /proc"),
]

TOKEN = {"authorization": "Bearer secret"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'


class Server:
    """A process that serves a checkpoint."""

    def __init__(self, checkpoint: Path, temporary: Path, port: int = 0, *more: str):
        temporary.mkdir(exist_ok=True)
        self.temporary, self.log = temporary, temporary.with_suffix(".log")
        options = "--device cpu --megabytes 1 --megapixels 1 --waiting 8 --upload-seconds 2 --seconds 90"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary), "UNIHEMA_TOKEN": "secret"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "unihema", "serve", str(checkpoint), "--port", str(port), *options.split(), *more],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        said = self.process.stdout.readline()
        self.address = said.partition(" is served at ")[2].partition(",")[0]
        self.host, port = self.address.removeprefix("http://").split(":")
        self.port = int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)

    def head(self, path: str = "/v1/analyze", **headers: object) -> bytes:
        lines = {"Host": "a", **TOKEN, **FORM, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return "\r\n".join([f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items()), "", ""]).encode()

    def analyze(
        self, *contents: bytes, path: str = "/v1/analyze", field: str = "images", number: str = "", **data: object
    ) -> httpx.Response:
        files = [(field, ("a.png", content)) for content in contents]
        headers = {**TOKEN, "x-request-id": number}
        return httpx.post(self.address + path, files=files, data=data, headers=headers, timeout=120)

    def memory(self) -> float:
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)[1]) / 1024

    def folders(self) -> list[Path]:
        """What requests have left in the folder of temporary files."""
        return [each for folder in self.temporary.iterdir() if folder.is_dir() for each in folder.iterdir()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "unihema")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    results = write_results(folder / "results", {"a.png": ["RBC", "neutrophil"]})
    one = Server(checkpoint, folder / "temporary", 0, "--review", str(results))
    assert one.analyze(png()).status_code == 200
    yield one
    one.process.kill()
    one.process.wait()


@pytest.fixture(autouse=True)
def is_well(request):
    """After each test a good request is answered, and nothing of others is left."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        if server.process.poll() is None:
            assert server.analyze(png(7)).status_code == 200
            assert not server.folders() and "Traceback" not in server.log.read_text(), server.log.read_text()


def png(seed: int = 0, size: tuple[int, int] = (40, 32), **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", **options)
    return written.getvalue()


def test_the_page_of_a_review_stands_beside_it(server):
    """It opens with the service's token in its address, and the service does not open with the page's cookie."""
    with httpx.Client(base_url=server.address, follow_redirects=True, timeout=60) as browser:
        assert browser.get("/review/").status_code == browser.get("/review/api/samples").status_code == 401
        page = browser.get("/review/", params={"token": "secret"})
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert [sample["images"] for sample in browser.get("/review/api/samples").json()] == [1]
        assert browser.get("/v1/info").status_code == 401 and browser.get("/health").status_code == 200


def answer_of(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer, after which the server has closed the connection."""
    received = b""
    while block := connection.recv(1 << 16):
        received += block
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower(), head
    return int(head.split()[1]), body


def test_two_gigabytes_are_refused_before_they_are_sent(server):
    before = server.memory()
    with server.connect() as connection:
        connection.sendall(server.head(Content_Length=2 << 30) + PART + b"x" * (1 << 16))
        connection.shutdown(socket.SHUT_WR)
        assert answer_of(connection) == (413, b'{"error":"A request has 1 MB at most."}')
    assert server.memory() - before < 30


@pytest.mark.parametrize("beginning", [PART, b"", b'--b\r\nContent-Disposition: form-data; name="images'])
def test_two_gigabytes_in_pieces_are_refused_while_they_are_sent(server, beginning):
    """As an image, as what is no form, and as the name of a field."""
    before, block = server.memory(), b"x" * (1 << 16)
    with server.connect() as connection:
        connection.sendall(
            server.head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n" % (len(beginning) or 2, beginning or b"--")
        )
        sent = 0
        with pytest.raises(OSError):
            while sent < 2 << 30:
                connection.sendall(b"10000\r\n" + block + b"\r\n")
                sent += len(block)
        # A client that only sends is not read for ever; how much fits into the buffers of the system is not ours.
        assert sent < 64 << 20
    assert server.memory() - before < 30


def test_a_client_that_sends_on_hears_why_it_is_refused(server):
    with server.connect() as connection:
        connection.sendall(server.head(Transfer_Encoding="chunked") + b"%x\r\n%s\r\n" % (len(PART), PART))
        for _ in range(40):
            connection.sendall(b"10000\r\n" + b"x" * (1 << 16) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        status, body = answer_of(connection)
    assert (status, body) == (413, b'{"error":"A request has 1 MB at most."}')


def test_uploads_that_break_off_and_slow_ones_harm_nobody(server):
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        slow = [stack.enter_context(server.connect()) for _ in range(16)]
        for connection in slow:
            connection.sendall(server.head(Content_Length=5000) + PART + png()[:100])
        for number in range(16):
            with server.connect() as half:
                half.sendall(server.head(Content_Length=5000) + PART + b"x" * 1000)
                if number % 2:
                    # A reset instead of an end.
                    half.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        statuses = {answer.status_code for answer in pool.map(lambda seed: server.analyze(png(seed)), range(8))}
        assert statuses == {200}
        for connection in slow:
            assert answer_of(connection) == (
                408,
                b'{"error":"The request did not arrive within 2 seconds."}',
            )
    assert server.log.read_text().count(" POST /v1/analyze 499 ") == 16


def bomb(width: int, height: int, behind: bytes = b"") -> bytes:
    """A PNG of zeros, perhaps with metadata behind its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compressobj(9)
    pixels = b"".join(packed.compress(bytes(width + 1)) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + behind + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_images_that_swell_are_refused_unopened(server):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (40 << 20), zip=True)
    behind = struct.pack(">I", 3) + b"tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b"))
    before = server.memory()
    for content, said in (
        (bomb(12000, 12000), "a.png: 12000 x 12000 pixels; this server takes 1 million"),
        (bomb(12000, 12000, behind), "a.png: 12000 x 12000 pixels; this server takes 1 million"),
        (png(pnginfo=text), "a.png: "),
    ):
        answer = server.analyze(content)
        assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    assert server.memory() - before < 60


def test_what_is_no_form_and_no_image_is_named(server):
    assert server.analyze(png(), field="picture").json() == {"error": "images: Field required."}
    assert server.analyze(png(), path="/v1/ask", field="image").json() == {"error": "questions: Field required."}
    body = PART + png() + b"\r\n--b--\r\n"
    for headers, content, status, said in (
        ({"content-type": "application/json"}, b"{}", 415, "come as a form"),
        ({"content-type": "application/x-www-form-urlencoded"}, b"images=/etc/passwd", 415, "come as a form"),
        ({}, body, 415, "come as a form"),
        ({"content-type": "multipart/form-data"}, body, 400, "Missing boundary"),
        (FORM, zlib.compress(body), 400, ""),
        (FORM, body[:-30], 422, ""),
        (FORM, b"--b\r\n" + b"x" * 9000, 400, ""),
        (FORM, PART.replace(b'name="images"', b""), 400, "name"),
        (FORM, body, 200, ""),
        ({"content-type": "multipart/form-data; boundary=b", "authorization": ""}, body, 401, "wants a token"),
        ({"content-type": "multipart/form-data; boundary=b", "authorization": "Bearer secre"}, body, 401, "wants"),
    ):
        answer = httpx.post(f"{server.address}/v1/analyze", content=content, headers={**TOKEN, **headers}, timeout=60)
        assert answer.status_code == status and said in answer.text, (headers, answer.text)
        assert status == 200 or set(answer.json()) == {"error"}, answer.text
    for request in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nHost", b"GET / HTTP/9\r\n\r\n", b"A" * (1 << 17)):
        with server.connect() as connection:
            answer = b""
            # Who is no client of HTTP may be cut off while it still sends, before it has read the answer.
            with suppress(OSError):
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1 << 12)
            assert answer[:12] in (b"HTTP/1.1 400", b"")
    assert server.analyze(png()).status_code == 200


def test_where_it_is_full_a_client_is_told_when_to_come_again(server):
    """Each of 6 clients has 4 images, and 8 may wait: who comes again is answered in the end."""

    def until_taken(seed):
        refused = 0
        while (answer := server.analyze(*[png(seed)] * 4)).status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1 and "The queue is full" in answer.json()["error"]
            refused += 1
        return answer.status_code, refused

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(until_taken, range(6)))
    assert {status for status, _ in found} == {200} and sum(refused for _, refused in found)


def test_clients_with_other_questions_get_their_own_answers(server, checkpoint):
    analyzer = Analyzer.from_pretrained(checkpoint, device="cpu")
    kinds = [
        (seed, question)
        for seed in (1, 2)
        for question in ("What is this?", "How many cells are there?", "The cell is ___.")
    ]
    right = {}
    for seed, question in kinds:
        (told,) = analyzer.ask(Image.open(io.BytesIO(png(seed))), [question])
        right[seed, question] = (told.question, told.answer, told.counts, told.source)

    def ask(kind):
        answer = server.analyze(png(kind[0]), path="/v1/ask", field="image", questions=kind[1])
        assert answer.status_code == 200, answer.text
        (told,) = answer.json()["answers"]
        return told["question"], told["answer"], told.get("counts", {}), told["source"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, kinds * 2)) == [right[kind] for kind in kinds * 2]


def test_killed_it_starts_again_and_asked_to_stop_it_finishes(server, checkpoint):
    """What a killed server leaves is removed by the next one at the same port; SIGTERM lets it finish what it took."""
    with ThreadPoolExecutor(4) as pool:
        lost = [pool.submit(server.analyze, png(seed, (300, 300)), overlay="true") for seed in range(4)]
        while not server.folders():
            pass
        server.process.kill()
        server.process.wait()
        assert all(
            isinstance(each.exception(), httpx.TransportError) or each.result().status_code == 200 for each in lost
        )
    (left,) = server.temporary.iterdir()
    again = Server(checkpoint, server.temporary, server.port)
    try:
        assert again.analyze(png()).status_code == 200 and again.address == server.address
        assert left not in server.temporary.iterdir()
        with ThreadPoolExecutor(4) as pool, again.connect() as slow:
            body = PART + png() + b"\r\n--b--\r\n"
            slow.sendall(again.head(Content_Length=len(body)) + body[:200])
            asked = {
                f"n-{seed}": pool.submit(again.analyze, png(seed, (300, 300)), number=f"n-{seed}") for seed in range(4)
            }
            while again.folders() == []:
                pass
            again.process.send_signal(signal.SIGTERM)
            slow.sendall(body[200:])
            assert slow.recv(1 << 12).startswith(b"HTTP/1.1 200 OK")
            answers = {number: each.exception() or each.result().status_code for number, each in asked.items()}
        assert again.process.wait(120) in (0, -signal.SIGTERM)
        # Whole only now: a request is logged after its answer is sent.
        logged = again.log.read_text()
        # A request that had not been read when it stopped is in no log.
        taken = {number for number in answers if f" {number} " in logged}
        assert taken and {answers[number] for number in taken} == {200}, answers
        assert all(isinstance(answers[number], httpx.TransportError) for number in asked.keys() - taken), answers
        assert not list(server.temporary.iterdir()) and "Traceback" not in logged
    finally:
        again.process.kill()
        again.process.wait()
