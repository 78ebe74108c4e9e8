"""`python -m benchmarks.serve`: many clients at a served checkpoint, good requests and bad ones, beside `unihema predict`."""

import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.measuring import processor_name
from unihema import Analyzer
from unihema.files import sha256, write_text
from unihema.shipped import copy_examples, lay_down_checkpoint


# Longer edges to which the images are brought, as shares of their own: batches are of one size.
SHARES = (1.0, 0.75, 0.5)
QUESTIONS = (
    "What type of white blood cell is this?",
    "How many red blood cells are there?",
    "Are there any platelets?",
)
# Of all requests, those that are wrong in some way, and those that ask.
BAD, ASKING = 0.15, 0.2
# Seconds for a request: on a machine with other work, 32 that wait for each other may take long.
PATIENCE = 600
# Seconds between looks at the server's memory, and those of the beginning that are no part of the slope.
LOOK, WARMING = 2.0, 60.0
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Sent(NamedTuple):
    """An image that is sent.

    Args:
        name (`str`): Of its file.
        content (`bytes`): The file.
        sha256 (`str`): Of it.
    """

    name: str
    content: bytes
    sha256: str


class Served:
    """A process that serves a checkpoint.

    Args:
        process (`Popen`): The process.
        address (`str`): Where it is asked.
    """

    def __init__(self, process: subprocess.Popen, address: str):
        self.process, self.address = process, address

    def megabytes(self) -> float:
        """Resident memory (Linux)."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def processor_seconds(self) -> float:
        """Of all of its threads so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def served(checkpoint: Path, device: str, *options: str) -> Iterator[Served]:
    """A server of its own process, which is asked to stop at the end.

    Args:
        checkpoint (`Path`): What it serves.
        device (`str`): Where it computes.
        *options (`str`): More of `unihema serve`.
    """
    command = [sys.executable, "-m", "unihema", "serve", str(checkpoint), "--port", "0", "--device", device, *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            said = process.stdout.readline()
            if " is served at " not in said:
                log.seek(0)
                raise click.ClickException(f"The server did not start: {log.read().decode(errors='replace')[-500:]}")
            yield Served(process, said.partition(" is served at ")[2].partition(",")[0])
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(150)
            process.kill()


@dataclass
class Counts:
    """What became of requests.

    Args:
        seconds (`list[float]`): Of good requests, from the first byte sent to the answer.
        failed (`list[str]`): Good requests that were not answered rightly, and why.
        again (`int`): How often one was told to come again (429).
        bad (`Counter`): Kind of a bad request, and the status of its answer -> how many.
    """

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    again: int = 0
    bad: Counter = field(default_factory=Counter)


def pictures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Each image in several sizes, as JPEG.

    Args:
        paths (`Sequence[Path]`): Images.
        folder (`Path`): Where they go.
    """
    folder.mkdir()
    made = []
    for path, share in itertools.product(paths, SHARES):
        with Image.open(path) as image:
            picture = image.convert("RGB")
        size = max(32, round(picture.width * share)), max(32, round(picture.height * share))
        made.append(folder / f"{path.stem}-{size[0]}.jpg")
        picture.resize(size).save(made[-1], quality=92)
    return made


class Clients:
    """Clients that ask as long as they are told to.

    Args:
        address (`str`): Of the server.
        images (`Sequence[Sent]`): What good requests send.
        asks (`bool`): Whether the checkpoint answers questions.
    """

    def __init__(self, address: str, images: Sequence[Sent], asks: bool):
        self.address, self.images, self.asks = address, list(images), asks
        self.counts, self._counting = Counts(), threading.Lock()

    def ask_until(self, end: float, clients: int) -> None:
        """Good and bad requests in turn, each client by itself, until a time."""

        def ask(number: int) -> None:
            draw = random.Random(number)
            with httpx.Client(timeout=PATIENCE) as client:
                while time.monotonic() < end:
                    if draw.random() < BAD:
                        self._bad(client, draw)
                    else:
                        self._good(client, draw.choice(self.images), draw)

        self._together(ask, clients)

    def send_all(self, clients: int) -> float:
        """Sends each image once, as many at a time as there are clients; returns the seconds."""
        left = iter(self.images)

        def send(_: int) -> None:
            with httpx.Client(timeout=PATIENCE) as client:
                while True:
                    with self._counting:
                        image = next(left, None)
                    if image is None:
                        return
                    self._good(client, image, None)

        begun = time.monotonic()
        self._together(send, clients)
        return time.monotonic() - begun

    def _together(self, work: Any, clients: int) -> None:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _good(self, client: httpx.Client, image: Sent, draw: random.Random | None) -> None:
        question = draw.choice(QUESTIONS) if draw is not None and self.asks and draw.random() < ASKING else None
        begun = time.monotonic()
        while True:
            try:
                if question is None:
                    answer = client.post(f"{self.address}/v1/analyze", files={"images": (image.name, image.content)})
                else:
                    answer = client.post(
                        f"{self.address}/v1/ask",
                        files={"image": (image.name, image.content)},
                        data={"questions": question},
                    )
            except httpx.TransportError as error:
                wrong = repr(error)
                break
            if answer.status_code == 429:
                with self._counting:
                    self.counts.again += 1
                time.sleep(float(answer.headers["retry-after"]))
                continue
            wrong = f"{answer.status_code} {answer.text[:200]}" if answer.status_code != 200 else ""
            if not wrong and question is None:
                (entry,) = answer.json()["results"]
                got = entry["result"]["image"], entry["result"]["provenance"]["image_sha256"]
                wrong = "" if got == (image.name, image.sha256) else f"the answer of another image, {got}"
            elif not wrong:
                got = [each["question"] for each in answer.json()["answers"]]
                wrong = "" if got == [question] else f"the answer to another question, {got}"
            break
        with self._counting:
            self.counts.seconds.append(time.monotonic() - begun)
            if wrong:
                self.counts.failed.append(wrong)

    def _bad(self, client: httpx.Client, draw: random.Random) -> None:
        image = draw.choice(self.images)
        kind = draw.choice(
            ("no image", "half an image", "a bomb", "no form", "another field", "too much", "half an upload")
        )
        files: dict[str, Any] = {"images": (image.name, image.content)}
        if kind == "no image":
            files = {"images": ("text.png", b"no image")}
        elif kind == "half an image":
            files = {"images": (image.name, image.content[: len(image.content) // 2])}
        elif kind == "a bomb":
            files = {"images": ("bomb.png", _bomb())}
        elif kind == "another field":
            files = {"picture": (image.name, image.content)}
        try:
            if kind == "no form":
                answer = client.post(f"{self.address}/v1/analyze", json={"images": image.name})
            elif kind == "too much":
                headers = {"content-type": "multipart/form-data; boundary=b"}
                answer = client.post(f"{self.address}/v1/analyze", content=_endless(), headers=headers)
            elif kind == "half an upload":
                answer = _broken_off(self.address, image)
            else:
                answer = client.post(f"{self.address}/v1/analyze", files=files)
            status = str(answer.status_code) if answer is not None else "broken off"
        except httpx.TransportError:
            status = "connection closed"
        with self._counting:
            self.counts.bad[kind, status] += 1


@cache
def _bomb() -> bytes:
    written = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(written, "PNG")
    return written.getvalue()


def _endless() -> Iterator[bytes]:
    """An image of two gigabytes, without saying so."""
    yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    for _ in range(2 << 14):
        yield b"x" * (1 << 16)


def _broken_off(address: str, image: Sent) -> None:
    import socket

    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/analyze HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        connection.sendall(f"{head}Content-Length: {len(image.content)}\r\n\r\n".encode() + image.content[:1000])


def measure(
    checkpoint: Path, images: Sequence[Path], clients: int, minutes: float, rounds: int, device: str = "cpu"
) -> dict[str, Any]:
    """Serves a checkpoint, asks for some minutes, and compares its speed with that of `unihema predict`.

    Args:
        checkpoint (`Path`): The checkpoint.
        images (`Sequence[Path]`): Images that are sent, each in several sizes.
        clients (`int`): How many ask at the same time.
        minutes (`float`): For how long.
        rounds (`int`): How often all images are analysed by either, in turn.
        device (`str`): Where both compute.
    """
    with tempfile.TemporaryDirectory() as temporary, served(checkpoint, device, "--seconds", str(PATIENCE)) as server:
        work = Path(temporary)
        made = pictures(images, work / "images")
        sent = [Sent(path.name, path.read_bytes(), sha256(path)) for path in made]
        analyzer = Analyzer.from_pretrained(checkpoint, device=device)
        asks = "question_answering" in analyzer.tasks
        speeds = _side_by_side(server, analyzer, sent, work, clients, rounds)
        asking = Clients(server.address, sent, asks)
        load = os.getloadavg()[0]
        memory, begun = [], time.monotonic()
        end = begun + 60 * minutes
        asked = threading.Thread(target=asking.ask_until, args=(end, clients))
        asked.start()
        with tqdm(desc="clients", unit="request") as bar:
            while asked.is_alive():
                memory.append((time.monotonic() - begun, server.megabytes()))
                asked.join(LOOK)
                bar.update(len(asking.counts.seconds) - bar.n)
        took = time.monotonic() - begun
        counts = asking.counts
    warm = [each for each in memory if each[0] >= min(WARMING, took / 3)] or memory[-1:]
    slope = float(np.polyfit(*zip(*warm, strict=True), 1)[0]) * 60 if len(warm) > 1 else 0.0
    ordered = sorted(counts.seconds)
    return {
        "clients": clients,
        "minutes": took / 60,
        "images": len(sent),
        "good requests": len(ordered),
        "failed good requests": len(counts.failed),
        "why": counts.failed[:5],
        "told to come again": counts.again,
        "p50 seconds": statistics.median(ordered) if ordered else None,
        "p95 seconds": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else None,
        "bad requests": {f"{kind}: {status}": number for (kind, status), number in sorted(counts.bad.items())},
        "MB at the start": warm[0][1],
        "MB at the end": warm[-1][1],
        "MB a minute": slope,
        "speed": speeds,
        "load": load,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _side_by_side(
    server: Served, analyzer: Analyzer, sent: Sequence[Sent], work: Path, clients: int, rounds: int
) -> list[dict[str, float]]:
    """Seconds and processor seconds for all images, of each round; the first, which warms up, is left out."""
    found = []
    for number in tqdm(range(rounds + 1), desc="speed", unit="round"):
        processor, begun = time.process_time(), time.monotonic()
        analyzer.analyze_files([work / "images"], work / f"results-{number}")
        predict, predict_processor = time.monotonic() - begun, time.process_time() - processor
        asking, processor = Clients(server.address, sent, False), server.processor_seconds()
        serve = asking.send_all(clients)
        if asking.counts.failed:
            raise click.ClickException(f"A good request failed: {asking.counts.failed[0]}")
        if number:
            found.append(
                {
                    "predict": predict,
                    "serve": serve,
                    "predict processor": predict_processor,
                    "serve processor": server.processor_seconds() - processor,
                }
            )
    return found


def page(found: dict[str, Any]) -> str:
    """The measurement as Markdown.

    Args:
        found (`dict`): What [`measure`] gives.
    """
    rounds, images = found["speed"], found["images"]
    ratio = statistics.median(each["predict"] / each["serve"] for each in rounds)
    processor = statistics.median(each["predict processor"] / each["serve processor"] for each in rounds)
    of_image = statistics.median(each["serve processor"] for each in rounds) / images
    rows = {
        "good requests": f"{found['good requests']}, of which {found['failed good requests']} failed",
        "told to come again (429)": found["told to come again"],
        "time of a good request": f"p50 {found['p50 seconds']:.2f} s, p95 {found['p95 seconds']:.2f} s",
        "memory": f"{found['MB at the start']:.0f} MB after warming up, {found['MB at the end']:.0f} MB at the end "
        f"({found['MB at the end'] / found['MB at the start'] - 1:+.1%}), {found['MB a minute']:+.2f} MB a minute",
        "an image, served": f"{of_image:.2f} processor seconds",
        f"{images} images, served": f"{images / statistics.median(each['serve'] for each in rounds):.2f} a second",
        f"{images} images, `unihema predict`": f"{images / statistics.median(each['predict'] for each in rounds):.2f} "
        "a second",
        "served to predicted": f"{ratio:.2f} by the clock, {processor:.2f} by processor seconds (medians of "
        f"{len(rounds)} rounds in turn)",
    }
    bad = ", ".join(f"{kind} ({number})" for kind, number in found["bad requests"].items())
    return "\n".join(
        [
            "# A server under load",
            "",
            f"`python -m benchmarks.serve`: {found['clients']} clients for {found['minutes']:.1f} minutes on "
            f"{found['processor']}, threads: {found['threads']}; the load of the machine was {found['load']:.1f} on "
            f"{found['cores']} cores before they began: on a busy one, times by the clock say little. "
            "The shipped checkpoint and examples, each in three sizes; one request in seven is wrong.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            f"Bad requests and the status of their answers: {bad}.",
            "",
            "`unihema predict` is timed without its start, as the server is; it writes tables and overlays, the server "
            "answers with JSON. Both analyse the same images with the same threads, round after round in turn.",
            "",
        ]
    )


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True, help="Asking at the same time.")
@click.option("--minutes", type=click.FloatRange(0), default=10, show_default=True, help="For how long.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of either, for the speed.")
@click.option("--device", default="cpu", show_default=True, help="Where both compute.")
@click.option(
    "--output", type=click.Path(path_type=Path), default="docs/results", show_default=True,
    help="Folder for serve.md and serve.json.",
)  # fmt: skip
def bench(checkpoint: Path | None, clients: int, minutes: float, rounds: int, device: str, output: Path) -> None:
    """Serve CHECKPOINT, the one that ships if there is none, ask, and say how it did (Linux).

    Exit code 1: a good request failed.
    """
    with tempfile.TemporaryDirectory() as work:
        checkpoint = checkpoint or lay_down_checkpoint(Path(work) / "unihema")
        found = measure(checkpoint, copy_examples(Path(work) / "examples"), clients, minutes, rounds, device)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "serve.json", [json.dumps(found, indent=1), "\n"])
    write_text(output / "serve.md", [page(found)])
    click.echo(page(found))
    if found["failed good requests"]:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    bench()
