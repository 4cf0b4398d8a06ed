"""A small Hub on loopback for the real `huggingface_hub` client: repositories, branches, LFS and commits in memory.

It answers what the client asks for during a push, as the Hub does, and is as strict: a token on every call, LFS
objects of the announced size and hash, files only in the announced mode. A stage can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote

import yaml

OWNER = "me"
TOKEN = "hf_" + "LoopbackTokenOfTheTests" * 2
STAGES = ("create", "branch", "validate_yaml", "preupload", "lfs_batch", "lfs_upload", "lfs_verify", "commit")
CLOSE = "close"  # the connection ends without an answer
LOSE = "lose"  # so it does, but what was asked for is done
_REGULAR_LIMIT = 64 * 1024  # bytes; larger files are LFS files here


@dataclass
class Repo:
    """A repository: branches with their files, and what was asked for when it was made."""

    visibility: str | None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    modes: dict[str, str] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **content}


class HubServer:
    """The server; a context manager. `failures` maps a stage to a status code, `CLOSE` or `LOSE`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.unknown: list[str] = []
        self.received: list[bytes] = []
        self.failures: dict[str, int | str] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        # polled often, so that the end of a test does not wait for it
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Files of a branch by path."""
        return self.repos[repo].branches[branch]

    def environment(self, home: Any) -> dict[str, str]:
        """Variables of a process whose Hub this is. The client reads its endpoint when it is imported."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    # ---- the stages of a push -----------------------------------------------------------------------------------

    def create(self, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        name = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        address = f"{self.url}/{name}"
        if wanted.get("type", "model") != "model":
            raise RefusedError(400, f"a model was expected, not {wanted['type']}")
        if name in self.repos:
            raise RefusedError(409, "You already created this model repo", url=address)
        self.repos[name] = Repo(wanted.get("visibility"))
        return {"url": address, "name": name}

    def branch(self, body: bytes, repo: str, branch: str) -> dict[str, Any]:
        branches, branch = self._repo(repo).branches, unquote(branch)
        if branch in branches:
            raise RefusedError(409, f"Reference already exists: refs/heads/{branch}")
        branches[branch] = dict(branches["main"])
        return {}

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        header = json.loads(body)["content"].split("---\n")[1]
        if not isinstance(yaml.safe_load(header), dict):
            raise RefusedError(400, "no metadata", errors=[{"message": "the header is no mapping"}])
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        files, modes = self._branch(repo, revision), self._repo(repo).modes
        answers = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            modes[path] = "lfs" if path.endswith(".safetensors") or entry["size"] > _REGULAR_LIMIT else "regular"
            answer = {"path": path, "uploadMode": modes[path], "shouldIgnore": False}
            answers.append(answer | ({"oid": _oid(files[path], modes[path])} if path in files else {}))
        return {"files": answers}

    def lfs_batch(self, body: bytes, repo: str) -> dict[str, Any]:
        wanted = json.loads(body)
        self._branch(repo, wanted["ref"]["name"])
        objects = []
        for entry in wanted["objects"]:
            oid, size = entry["oid"], entry["size"]
            actions = {
                "upload": {"href": f"{self.url}/lfs/{oid}/{size}"},
                "verify": {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append(entry if oid in self.objects else {**entry, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body: bytes, oid: str, size: str) -> dict[str, Any]:
        if len(body) != int(size) or hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, f"{len(body)} bytes are not the object {oid} of {size} bytes")
        self.objects[oid] = body
        return {}

    def lfs_verify(self, body: bytes, repo: str) -> dict[str, Any]:
        self._object(json.loads(body))
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise RefusedError(400, "the commit has no header")
        modes, new = self._repo(repo).modes, {}
        for line in lines:
            value = line["value"]
            path = value["path"]
            if {"file": "regular", "lfsFile": "lfs"}[line["key"]] != modes.get(path):
                raise RefusedError(400, f"{path} was announced as {modes.get(path)}, not {line['key']}")
            new[path] = self._object(value) if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        self._branch(repo, revision).update(new)
        commits = self._repo(repo).commits
        commits.append({"branch": unquote(revision), "summary": header["value"]["summary"], "files": sorted(new)})
        oid = f"{len(commits):040x}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""}

    def info(self, body: bytes, repo: str, revision: str = "main") -> dict[str, Any]:
        self._branch(repo, revision)
        return {"id": repo, "sha": f"{len(self.repos[repo].commits):040x}", "siblings": []}

    def refs(self, body: bytes, repo: str) -> dict[str, Any]:
        names = self._repo(repo).branches
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": "0" * 40} for name in names]
        return {"branches": branches, "converts": [], "tags": []}

    def _repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise RefusedError(404, "Repository not found", code="RepoNotFound")
        return self.repos[name]

    def _branch(self, repo: str, revision: str) -> dict[str, bytes]:
        branches = self._repo(repo).branches
        if unquote(revision) not in branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return branches[unquote(revision)]

    def _object(self, wanted: dict[str, Any]) -> bytes:
        content = self.objects.get(wanted["oid"])
        if content is None or len(content) != wanted["size"]:
            raise RefusedError(404, f"no object {wanted['oid']} of {wanted['size']} bytes")
        return content


def _oid(content: bytes, mode: str) -> str:
    """What the Hub calls a file by: SHA-256 of an LFS file, git's SHA-1 of another."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_BESIDES = ("/api/agent-harnesses",)  # for the client's user agent; the push does not depend on it
_REPO, _PART = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
_ROUTES: list[tuple[str, str, str, Callable[..., dict[str, Any]]]] = [
    ("POST", r"/api/repos/create", "create", HubServer.create),
    ("POST", rf"/api/models/{_REPO}/branch/{_PART}", "branch", HubServer.branch),
    ("POST", r"/api/validate-yaml", "validate_yaml", HubServer.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/{_PART}", "preupload", HubServer.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch", HubServer.lfs_batch),
    ("PUT", rf"/lfs/{_PART}/{_PART}", "lfs_upload", HubServer.lfs_upload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", "lfs_verify", HubServer.lfs_verify),
    ("POST", rf"/api/models/{_REPO}/commit/{_PART}", "commit", HubServer.commit),
    ("GET", rf"/api/models/((?:[\w.-]+/)?[\w.-]+)(?:/revision/{_PART})?", "info", HubServer.info),
    ("GET", rf"/api/models/{_REPO}/refs", "refs", HubServer.refs),
]


def _route(method: str, path: str) -> tuple[str, Callable[..., dict[str, Any]], list[str]] | None:
    for wanted, pattern, stage, function in _ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method == wanted:
            return stage, function, [part for part in match.groups() if part]
    return None


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: its second half would wait for the client's acknowledgement

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self._body()
        headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        self.hub.received += [body, f"{self.path} {headers}".encode()]
        found = _route(self.command, self.path.partition("?")[0])
        if found is None:
            if self.path not in _BESIDES:
                self.hub.unknown.append(f"{self.command} {self.path}")
            return self._send(404, {"error": "not found"})
        stage, function, parts = found
        self.hub.calls.append(stage)
        failure = self.hub.failures.get(stage)
        try:
            # an upload's address is a secret of its own, as the Hub's signed ones are
            if stage != "lfs_upload" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise RefusedError(401, "Invalid credentials in Authorization header")
            if isinstance(failure, int):
                raise RefusedError(failure, f"{stage} is out of order")
            answer = function(self.hub, body, *parts) if failure != CLOSE else {}
        except RefusedError as refusal:
            return self._send(refusal.status, refusal.content, refusal.code)
        if failure is None:
            return self._send(200, answer)
        self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: dict[str, Any], code: str | None = None) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        """Requests are in `calls`, not on stderr."""
