"""A Hub on this machine: what huggingface_hub's client asks for when it pushes and loads, and failures on demand.

It has no xet storage, so that clients run with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_localtesttokenlocaltesttokenlocal"
# Files that the Hub keeps beside Git.
LARGE = (".safetensors", ".bin")


@dataclass
class Failure:
    """Answers to the next `times` requests whose `method path` matches: a status, or a cut connection for `None`."""

    pattern: str
    status: int | None
    times: int
    headers: dict = field(default_factory=dict)


@dataclass
class Repo:
    """A repository: commits of each branch, newest last."""

    private: bool
    branches: dict = field(default_factory=dict)

    def commit(self, branch: str, files: dict, title: str) -> str:
        commits = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{branch} {len(commits)} {sorted(files)} {title}".encode()).hexdigest()
        commits.append((oid, title, files))
        return oid

    def head(self, revision: str) -> tuple | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commits in self.branches.values() for commit in commits if commit[0] == revision), None)


class LocalHub:
    """The server, its repositories, and a list of all requests it has had, each as `method path`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def spoils(self, handler, content: bytes, status: int, headers: dict) -> bool:
        """Whether another answer was sent instead of this one; for subclasses."""
        return False

    def fail(self, pattern: str, status: int | None, times: int = 1, **headers: str) -> None:
        """The next `times` requests that match are answered with `status`, or cut off in their middle for `None`."""
        self.failures.append(Failure(pattern, status, times, headers))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        return self.repos[repo_id].head(revision)[2]

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """Messages of its commits."""
        return [title for _, title, _ in self.repos[repo_id].branches[revision]]

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """What a client's process needs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        # Nothing but this machine can be asked, so a proxy would only be in the way.
        return {**kept, **own, "HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class _Server(ThreadingHTTPServer):
    def handle_error(self, *arguments):
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        failure = next((f for f in self.hub.failures if f.times and re.search(f.pattern, asked)), None)
        if failure is not None:
            failure.times -= 1
            if failure.status is None:
                return self._cut()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            # The client has died in the middle of it.
            self.close_connection = True
            return None
        if failure is not None:
            return self._json({"error": "as the test asked for"}, failure.status, **failure.headers)
        open_to_all = path == "/api/validate-yaml" or path.startswith("/storage/")
        if not open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self._json({"error": message}, 401, **{"X-Error-Message": message})
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, asked):
                return answer(self, body, *match.groups())
        return self._json({"error": f"the local Hub does not know {asked}"}, 404)

    def _cut(self):
        """Reads half of what is sent and resets the connection."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, content: bytes, status: int = 200, **headers):
        if self.hub.spoils(self, content, status, headers):
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200, **headers):
        self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

    def _missing(self, code: str):
        self._json({"error": code}, 404, **{"X-Error-Code": code})

    def create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self._json(url, 409)
        self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[repo_id].commit("main", {".gitattributes": b""}, "initial commit")
        return self._json(url)

    def branch(self, body, repo_id, branch):
        repo = self.hub.repos[repo_id]
        if branch in repo.branches:
            return self._json({"error": "there already"}, 409)
        repo.branches[branch] = list(repo.branches["main"])
        return self._json({})

    def info(self, body, repo_id, revision=None):
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._missing("RepoNotFound")
        head = repo.head(revision or "main")
        if head is None:
            return self._missing("RevisionNotFound")
        files = [{"rfilename": name} for name in head[2]]
        return self._json({"id": repo_id, "sha": head[0], "private": repo.private, "siblings": files})

    def tree(self, body, repo_id, revision, folder=""):
        if repo_id not in self.hub.repos:
            return self._missing("RepoNotFound")
        files = self.hub.repos[repo_id].head(revision)[2]
        found = [name for name in files if not folder or name.startswith(f"{folder}/")]
        if folder and not found:
            return self._missing("EntryNotFound")
        return self._json(
            [{"type": "file", "path": name, "size": len(files[name]), "oid": _git_oid(files[name])} for name in found]
        )

    def validate(self, body):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.S)
        values = yaml.safe_load(match.group(1)) if match else {}
        texts = ("license", "pipeline_tag", "library_name")
        errors = [f'"{name}" must be a string' for name in texts if not isinstance(values.get(name, ""), str)]
        if values.get("license") == "osl-3.0":
            errors.append('"license" must be one of the others, for the sake of the test')
        for result in (values.get("model-index") or [{}])[0].get("results", []):
            errors += [f'"model-index" lacks {name}' for name in ("task", "dataset", "metrics") if not result.get(name)]
        return self._json({"errors": [{"message": error} for error in errors]}, 400 if errors else 200)

    def preupload(self, body, repo_id, revision):
        files = self.hub.files(repo_id, revision)
        answers = []
        for file in json.loads(body)["files"]:
            name, large = file["path"], file["path"].endswith(LARGE)
            there = files.get(name)
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _git_oid(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": answers})

    def batch(self, body, repo_id):
        objects = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.stored:
                upload = {"href": f"{self.hub.url}/storage/{item['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "other bytes than announced"}, 400)
        self.hub.stored[oid] = body
        return self._send(b"")

    def verify(self, body):
        asked = json.loads(body)
        stored = self.hub.stored.get(asked["oid"])
        return self._json({}, 200 if stored is not None and len(stored) == asked["size"] else 404)

    def commit(self, body, repo_id, revision):
        repo = self.hub.repos[repo_id]
        head, _, files = repo.head(revision)
        files, title = dict(files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    return self._json({"error": "the branch has moved"}, 412)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files, title)
        return self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def resolve(self, body, repo_id, revision, name):
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._missing("RepoNotFound")
        head = repo.head(revision)
        if head is None:
            return self._missing("RevisionNotFound")
        if name not in head[2]:
            return self._missing("EntryNotFound")
        content = head[2][name]
        etag = hashlib.sha256(content).hexdigest()
        return self._send(content, **{"ETag": f'"{etag}"', "X-Repo-Commit": head[0]})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_ID}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_ID}/commit/(.+)", _Handler.commit),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/(\w+)", _Handler.store),
    (r"POST /verify", _Handler.verify),
    (rf"GET /api/models/{_ID}", _Handler.info),
    (rf"GET /api/models/{_ID}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_ID}/tree/([^/]+)/(.+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
