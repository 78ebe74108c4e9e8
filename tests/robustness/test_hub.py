"""A Hub that is hostile or sick: pushing and loading end with a `UniHemaError` that shows nothing they should not, or succeed."""

import shutil
import time

import pytest
from attacks import attack, mutate_json
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils import _http
from local_hub import TOKEN, LocalHub
from tiny_checkpoint import save_tiny_checkpoint

from unihema import hub as limits
from unihema.checkpoint_files import local_folder
from unihema.errors import PushError
from unihema.hub import MOST_REDIRECTS, READ_SECONDS, bounded_hub, hidden, seconds_to_wait
from unihema.hub_cards import folder_card, push_folder


REPO = "lab/smears"
STATUS = [
    100,
    204,
    206,
    301,
    302,
    304,
    307,
    308,
    400,
    401,
    403,
    404,
    408,
    409,
    410,
    412,
    416,
    418,
    429,
    451,
    500,
    502,
    503,
    504,
    599,
    999,
]
WAITS = ["²", "-5", "9" * 400, "1e9", "nan", "", "1", "٣", "Fri, 31 Dec 2399 23:59:59 GMT", "Thu, 99 Foo 99999", TOKEN]
PLACES = [
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "",
    "//",
    "javascript:1",
    f"http://{TOKEN}@127.0.0.1:1/",
    "http://[::1",
]
TEXTS = [
    f"bad token {TOKEN}",
    "\x1b[2J\x1b]0;owned\x07",
    "x" * 5_000_000,
    "\n" * 1000,
    "\u202e\ud7ff",
    '"',
    "<html>" * 1000,
    "[" * 100_000,
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("pushed"))
    card = folder_card(folder, licence="cc-by-4.0", data_licences={"smears": "cc-by-4.0"}, name="Smears")
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


class HostileHub(LocalHub):
    """A hub that spoils the answer to one of its requests."""

    def spoil_one(self, rng):
        self.left, self.times, self.kind = rng.randrange(14), rng.choice([1, 2, 1000]), rng.choice(sorted(SPOILS))
        self.rng = rng

    def spoils(self, handler, content, status, headers):
        self.left -= 1
        if self.left >= 0 or self.times <= 0:
            return False
        self.times -= 1
        SPOILS[self.kind](handler, self.rng, content, status, headers)
        return True


def plain(handler, content, status, headers):
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def other_status(handler, rng, content, status, headers):
    waits = {"Retry-After": rng.choice(WAITS).encode("utf-8").decode("latin-1")} if rng.random() < 0.5 else {}
    if rng.random() < 0.2:
        waits["RateLimit"] = f'"api";r=0;t={"9" * rng.choice([1, 30, 5000])}'
    plain(handler, content, rng.choice(STATUS), headers | waits)


def redirected(handler, rng, content, status, headers):
    plain(
        handler,
        b"",
        rng.choice([301, 302, 303, 307, 308]),
        {"Location": rng.choice([*PLACES, handler.path, handler.path + "/x"])},
    )


def text(handler, rng, content, status, headers):
    said = rng.choice(TEXTS)
    kinds = [said.encode("utf-8", "surrogatepass"), f'{{"error": "{said[:1000]}"}}'.encode("utf-8", "surrogatepass")]
    extra = {"X-Error-Message": f"no {TOKEN}", "X-HF-Warning": f"a; {TOKEN}"} if rng.random() < 0.3 else {}
    plain(
        handler,
        rng.choice(kinds),
        rng.choice([200, 400, 401, 403, 404, 500]),
        {"Content-Type": "application/json", **extra},
    )


def other_json(handler, rng, content, status, headers):
    import json

    try:
        value = json.loads(content)
    except ValueError:
        value = {}
    for _ in range(rng.choice([1, 2, 5])):
        value = mutate_json(value, rng)
    plain(handler, json.dumps(value).encode(), status, headers)


def endless(handler, rng, content, status, headers):
    handler.send_response(rng.choice([200, 200, 400]))
    if rng.random() < 0.5:
        handler.send_header("Content-Length", rng.choice(["9" * 15, "9" * 300]))
    else:
        handler.send_header("Connection", "close")
    if rng.random() < 0.3:
        handler.send_header("Content-Encoding", rng.choice(["gzip", "br", "x"]))
    handler.end_headers()
    handler.close_connection = True
    piece, pause = rng.choice([(bytes(1 << 20), 0), (b"{", 0.2)])
    for _ in range(400):
        handler.wfile.write(piece)
        time.sleep(pause)


def silent(handler, rng, content, status, headers):
    if rng.random() < 0.5:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
    time.sleep(4)
    handler.close_connection = True


def cut(handler, rng, content, status, headers):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"[: rng.randrange(40)])
    handler.close_connection = True


SPOILS = {
    each.__name__: each for each in (other_status, redirected, text, other_json, endless, silent, cut)
}  # fmt: skip


def use(hub, monkeypatch, home):
    """huggingface_hub asks this one; limits of time are short, and nobody sleeps."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(limits, "READ_SECONDS", 1.0)
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 3.0)
    sleep = time.sleep

    def short(seconds):
        assert 0 <= seconds <= limits.LONGEST_WAIT * 1.25 + 1, seconds
        sleep(min(seconds, 0.01))

    return short


def test_pushing(checkpoint, tmp_path, monkeypatch, capfd):
    from huggingface_hub.utils import _http

    from unihema.hub_cards import push

    told: list = []

    def attempt(rng):
        told.clear()
        hub = HostileHub()
        short = use(hub, monkeypatch, tmp_path / "home")
        monkeypatch.setattr(_http, "time", type("Clock", (), {"sleep": staticmethod(short), "time": time.time}))
        monkeypatch.setattr(push, "time", type("Clock", (), {"sleep": staticmethod(short)}))
        hub.spoil_one(rng)
        told.append((hub.kind, hub.left, hub.times))
        try:
            push_folder(checkpoint, REPO, token=TOKEN)
        except Exception as error:
            assert TOKEN not in str(error) and "\x1b" not in str(error) and len(str(error)) < 4000, str(error)[:300]
            raise
        finally:
            commits = hub.repos[REPO].branches["main"] if REPO in hub.repos else []
            hub.close()
            # A repository has all files or none.
            for _, _, files in commits[1:]:
                assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
        shown = "".join(capfd.readouterr())
        assert TOKEN not in shown and "\x1b" not in shown

    attack("pushing to a hostile hub", 6, attempt, lambda: str(told))


def test_loading(checkpoint, tmp_path, monkeypatch):
    from huggingface_hub.utils import _http

    told: list = []

    def attempt(rng):
        told.clear()
        hub = HostileHub()
        home = tmp_path / str(rng.random())
        short = use(hub, monkeypatch, home)
        monkeypatch.setattr(_http, "time", type("Clock", (), {"sleep": staticmethod(short), "time": time.time}))
        hub.left = 1000
        files = {name: (checkpoint / name).read_bytes() for name in ("config.json", "tokenizer.json", "README.md")}
        from local_hub import Repo

        hub.repos[REPO] = Repo(True)
        hub.repos[REPO].commit("main", files, "all")
        hub.spoil_one(rng)
        hub.left //= 2
        told.append((hub.kind, hub.left, hub.times))
        try:
            local_folder(REPO, token=TOKEN, cache_dir=home)
        except Exception as error:
            assert TOKEN not in str(error)
            raise
        finally:
            hub.close()
            shutil.rmtree(home, ignore_errors=True)

    attack("loading from a hostile hub", 6, attempt, lambda: str(told))


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
