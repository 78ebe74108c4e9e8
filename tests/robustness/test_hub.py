"""A Hub that is hostile or sick: pushing and loading end with a `UniHemaError` that shows nothing they should not, or succeed."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils import _http
from hypothesis import given
from hypothesis import strategies as st
from local_hub import TOKEN, LocalHub, Repo
from robustness.confined import attack, confined
from robustness.good_folders import files_of
from robustness.strategies import hostile_values
from tiny_checkpoint import save_tiny_checkpoint

from unihema import hub as limits
from unihema.checkpoint_files import local_folder
from unihema.errors import PushError, UniHemaError
from unihema.hub import MOST_REDIRECTS, READ_SECONDS, bounded_hub, hidden, seconds_to_wait
from unihema.hub_cards import folder_card, push, push_folder


REPO = "lab/smears"
STATUS = [
    *(100, 204, 206, 301, 302, 304, 307, 308, 400, 401, 403, 404, 408, 409, 410, 412, 416, 418, 429, 451, 500, 502),
    *(503, 504, 599, 999),
]
WAITS = ["²", "-5", "9" * 400, "1e9", "nan", "", "1", "٣", "Fri, 31 Dec 2399 23:59:59 GMT", "Thu, 99 Foo 99999", TOKEN]
PLACES = [
    *("file:///etc/passwd", "http://127.0.0.1:1/x", "", "//", "javascript:1", f"http://{TOKEN}@127.0.0.1:1/"),
    *("http://[::1", "SELF", "SELF/x"),
]
TEXTS = [
    *(f"bad token {TOKEN}", "\x1b[2J\x1b]0;owned\x07", "x" * 5_000_000, "\n" * 1000, "\u202e\ud7ff", '"'),
    *("<html>" * 1000, "[" * 100_000),
]


@dataclass
class Spoil:
    """What becomes of the answer to some of the requests.

    Args:
        kind (`str`): `headers`, `redirect`, `text`, `json`, `many`, `endless`, `silent` or `cut`.
        after (`int`): Requests that are answered as they should be first.
        times (`int`): Requests that are not.
        details (`dict`): Of the kind.
    """

    kind: str
    after: int
    times: int
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.kind} after {self.after}, {self.times} times: {str(self.details)[:200]}>"

    def answer(self, handler: Any, content: bytes, status: int, headers: dict[str, str]) -> None:
        """Sends it."""
        of = self.details
        if self.kind == "headers":
            send(handler, content, of["status"], headers | of["headers"])
        elif self.kind == "redirect":
            send(handler, b"", of["status"], {"Location": of["place"].replace("SELF", handler.path)})
        elif self.kind == "text":
            text = f'{{"error": "{of["text"][:1000]}"}}' if of["quoted"] else of["text"]
            send(
                handler,
                text.encode("utf-8", "surrogatepass"),
                of["status"],
                {"Content-Type": "application/json", **of["headers"]},
            )
        elif self.kind in ("json", "many"):
            try:
                value = json.loads(content)
            except ValueError:
                value = {}
            send(handler, json.dumps(self._changed(value)).encode(), status, headers)
        elif self.kind == "cut":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"[: of["bytes"]])
            handler.close_connection = True
        else:
            self._wait(handler)

    def _changed(self, value: Any) -> Any:
        if self.kind == "many" and isinstance(value, dict):
            return value | {
                "siblings": [{"rfilename": f"{n}{self.details['ending']}"} for n in range(self.details["files"])]
            }
        root = [value]
        for steps, new in self.details.get("changes", ()):
            holder: Any = root
            key: Any = 0
            for step in steps:
                if not isinstance(holder[key], (dict, list)) or not holder[key]:
                    break
                holder = holder[key]
                key = list(holder)[step % len(holder)] if isinstance(holder, dict) else step % len(holder)
            holder[key] = new
        return root[0]

    def _wait(self, handler: Any) -> None:
        of = self.details
        handler.close_connection = True
        if self.kind == "silent":
            if of["begins"]:
                handler.send_response(200)
                handler.send_header("Content-Length", "100")
                handler.end_headers()
            time.sleep(2)
            return
        handler.send_response(of["status"])
        for name, value in of["headers"].items():
            handler.send_header(name, value)
        handler.end_headers()
        piece, pause = (bytes(1 << 20), 0) if of["fast"] else (b"{", 0.1)
        # A slow one ends: huggingface_hub repeats each file that stands still several times, with waits in between.
        for _ in range(400 if of["fast"] else 20):
            handler.wfile.write(piece)
            time.sleep(pause)


def send(handler: Any, content: bytes, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


waits = st.one_of(
    st.just({}),
    st.sampled_from(WAITS).map(lambda wait: {"Retry-After": wait.encode().decode("latin-1")}),
    st.sampled_from([1, 30, 5000]).map(lambda digits: {"RateLimit": f'"api";r=0;t={"9" * digits}'}),
)
told = st.sampled_from([{}, {"X-Error-Message": f"no {TOKEN}", "X-HF-Warning": f"a; {TOKEN}"}])
lengths = st.sampled_from(
    [{"Content-Length": "9" * 15}, {"Content-Length": "9" * 300}, {"Connection": "close"}, {"Content-Encoding": "gzip"}]
)
DETAILS = {
    "headers": st.fixed_dictionaries({"status": st.sampled_from([200, *STATUS]), "headers": waits}),
    "redirect": st.fixed_dictionaries(
        {"status": st.sampled_from([301, 302, 303, 307, 308]), "place": st.sampled_from(PLACES)}
    ),
    "text": st.fixed_dictionaries(
        {
            "status": st.sampled_from([200, 400, 401, 403, 404, 500]),
            "text": st.sampled_from(TEXTS),
            "quoted": st.booleans(),
            "headers": told,
        }
    ),
    "json": st.fixed_dictionaries(
        {
            "changes": st.lists(
                st.tuples(st.lists(st.integers(0, 12), max_size=4), hostile_values), min_size=1, max_size=3
            )
        }
    ),
    "many": st.fixed_dictionaries(
        {"files": st.sampled_from([2000, 100_000, 300_000]), "ending": st.sampled_from([".json", ".bin"])}
    ),
    "endless": st.fixed_dictionaries(
        {"status": st.sampled_from([200, 400]), "headers": lengths, "fast": st.booleans()}
    ),
    "silent": st.fixed_dictionaries({"begins": st.booleans()}),
    "cut": st.fixed_dictionaries({"bytes": st.integers(0, 40)}),
}


@st.composite
def spoils(draw: Any, requests: int) -> Spoil:
    """One fault of a Hub, in one of the first `requests` answers or from there on."""
    kind = draw(st.sampled_from(sorted(DETAILS)))
    return Spoil(kind, draw(st.integers(0, requests)), draw(st.sampled_from([1, 2, 1000])), draw(DETAILS[kind]))


class HostileHub(LocalHub):
    """A Hub that spoils some of its answers, once it is told how."""

    spoil: Spoil | None = None

    def spoils(self, handler, content, status, headers):
        spoil = self.spoil
        if spoil is None:
            return False
        spoil.after -= 1
        if spoil.after >= 0 or spoil.times <= 0:
            return False
        spoil.times -= 1
        spoil.answer(handler, content, status, headers)
        return True


def ask(hub: HostileHub, home: Path) -> None:
    """In this process huggingface_hub asks this Hub; limits of time are short, and nobody sleeps for long."""
    values = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home)}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    # huggingface_hub gives its own limits of time with some requests.
    values |= {"HF_HUB_ETAG_TIMEOUT": 0.5, "HF_HUB_DOWNLOAD_TIMEOUT": 0.5}
    for name, value in values.items():
        setattr(constants, name, value)
    limits.READ_SECONDS, limits.ANSWER_SECONDS, limits.CALL_SECONDS = 0.5, 1.5, 5.0
    sleep = time.sleep

    def short(seconds):
        assert 0 <= seconds <= limits.LONGEST_WAIT * 1.25 + 1, seconds
        sleep(min(seconds, 0.01))

    for module in (_http, push):
        module.time = type("Clock", (), {"sleep": staticmethod(short), "time": time.time})
    mock.patch.dict("os.environ", {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}).start()


def check_told(text: str) -> None:
    assert TOKEN not in text and "\x1b" not in text, text[:500]


def tried(attempt: Any, said: Path) -> Any:
    """An attempt that tells nothing it should not, neither in its error nor beside it."""
    try:
        return attempt()
    except UniHemaError as error:
        check_told(str(error))
        raise
    finally:
        check_told(said.read_text(errors="replace"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("pushed"))
    card = folder_card(folder, licence="cc-by-4.0", data_licences={"smears": "cc-by-4.0"}, name="Smears")
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def push_to(spoil: Spoil | None, checkpoint: Path, out: Path) -> int:
    """Commits of the repository after a push."""
    hub = HostileHub()
    hub.spoil = spoil
    ask(hub, out)
    try:
        tried(lambda: push_folder(checkpoint, REPO, token=TOKEN), out.parent / "said")
    finally:
        commits = hub.repos[REPO].branches["main"] if REPO in hub.repos else []
        # A repository has all files or none.
        for _, _, files in commits[1:]:
            assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    return len(commits)


def load_from(spoil: Spoil | None, files: dict[str, bytes], out: Path) -> None:
    """Loads a repository; where that succeeds, it has all of its files."""
    hub = HostileHub()
    ask(hub, out)
    hub.repos[REPO] = Repo(True)
    hub.repos[REPO].commit("main", files, "all")
    hub.spoil = spoil
    folder = tried(lambda: local_folder(REPO, token=TOKEN, cache_dir=out), out.parent / "said")
    # What a Hub lists, and what is in its files, is what it says.
    if spoil is None:
        assert files_of(folder) == files


@attack(inputs=8, share=0.02)
@given(spoil=spoils(14))
def test_pushing(checkpoint, spoil):
    confined("pushing to a hostile Hub", lambda given, out: push_to(spoil, checkpoint, out))


@attack(inputs=8, share=0.02)
@given(spoil=spoils(20))
def test_loading(checkpoint, spoil):
    files = files_of(checkpoint)
    confined("loading from a hostile Hub", lambda given, out: load_from(spoil, files, out))


def test_a_hub_that_is_well(checkpoint):
    assert confined("pushing", lambda given, out: push_to(None, checkpoint, out)) == 2
    assert confined("loading", lambda given, out: load_from(None, files_of(checkpoint), out)) is None


@pytest.mark.parametrize("asked", WAITS)
def test_waits_are_bounded(asked):
    wait = seconds_to_wait(asked)
    assert wait is None or 0 <= wait <= limits.LONGEST_WAIT
    assert seconds_to_wait("7") == 7 and seconds_to_wait("²") is None


def test_what_a_server_says_is_one_short_line_without_tokens():
    said = hidden(f"a\x1b[2J {TOKEN} b\n" + "x" * 5_000_000, TOKEN)
    assert TOKEN not in said and "\n" not in said and "\x1b" not in said and len(said) < 320
    assert "hf_" not in hidden("another token hf_abcdefghijklmnop")
    assert issubclass(PushError, RuntimeError)


def test_a_client_of_the_users_has_bounds_inside_and_is_as_it_was_outside():
    # The private point of hub.py: where huggingface_hub keeps the factory of its clients.
    theirs = _http._GLOBAL_CLIENT_FACTORY

    def own():
        client = theirs()
        client.headers["x-lab"] = "ours"
        return client

    set_client_factory(own)
    try:
        free = get_session()
        usual = free.max_redirects, free.timeout
        with bounded_hub():
            inside = get_session()
            assert inside.headers["x-lab"] == "ours" and inside.max_redirects == MOST_REDIRECTS
            assert inside.timeout.read == READ_SECONDS
        outside = get_session()
        assert outside.headers["x-lab"] == "ours" and (outside.max_redirects, outside.timeout) == usual
    finally:
        set_client_factory(theirs)
