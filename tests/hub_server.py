"""A small Hub on loopback for the real `huggingface_hub` client: repositories, branches, LFS and commits in memory.

It answers what the client asks for during a push, as the Hub does: a token on every call, LFS objects of the announced
size and hash. A stage can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote

OWNER = "me"
TOKEN = "hf_" + "LoopbackTokenOfTheTests" * 2
STAGES = ("create", "branch", "validate_yaml", "preupload", "lfs_batch", "lfs_upload", "lfs_verify", "commit")
CLOSE = "close"  # the connection ends without an answer
LOSE = "lose"  # so it does, but what was asked for is done

_REPO, _PART = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
_ROUTES = {  # stages that are methods of `HubServer`
    r"POST /api/repos/create": "create",
    rf"POST /api/models/{_REPO}/branch/{_PART}": "branch",
    r"POST /api/validate-yaml": "validate_yaml",
    rf"POST /api/models/{_REPO}/preupload/{_PART}": "preupload",
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": "lfs_batch",
    rf"PUT /lfs/{_PART}/{_PART}": "lfs_upload",
    rf"POST /{_REPO}\.git/info/lfs/objects/verify": "lfs_verify",
    rf"POST /api/models/{_REPO}/commit/{_PART}": "commit",
    rf"GET /api/models/((?:[\w.-]+/)?[\w.-]+)(?:/revision/{_PART})?": "info",
    rf"GET /api/models/{_REPO}/refs": "refs",
}


@dataclass
class Repo:
    """A repository: branches with their files, and what was asked for when it was made."""

    visibility: str | None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
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
        if repo not in self.repos:
            raise RefusedError(404, "Repository not found", code="RepoNotFound")
        return self.repos[repo].branches[unquote(branch)]

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
        if name in self.repos:
            raise RefusedError(409, "You already created this model repo", url=address)
        self.repos[name] = Repo(wanted.get("visibility"))
        return {"url": address, "name": name}

    def branch(self, body: bytes, repo: str, branch: str) -> dict[str, Any]:
        branches = self.repos[repo].branches
        if unquote(branch) in branches:
            raise RefusedError(409, f"Reference already exists: refs/heads/{branch}")
        branches[unquote(branch)] = dict(branches["main"])
        return {}

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        there = self.files(repo, revision)
        answers = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            lfs = path.endswith(".safetensors")
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": _oid(there[path], lfs)} if path in there else {}))
        return {"files": answers}

    def lfs_batch(self, body: bytes, repo: str) -> dict[str, Any]:
        verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"href": f"{self.url}/lfs/{entry['oid']}/{entry['size']}"}
            new = {} if entry["oid"] in self.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**entry, **new})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body: bytes, oid: str, size: str) -> dict[str, Any]:
        if len(body) != int(size) or hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, f"{len(body)} bytes are not the object {oid} of {size} bytes")
        self.objects[oid] = body
        return {}

    def lfs_verify(self, body: bytes, repo: str) -> dict[str, Any]:
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> dict[str, Any]:
        header, *lines = [json.loads(line) for line in body.splitlines()]
        new = {}
        for value in (line["value"] for line in lines):
            new[value["path"]] = self.objects[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        self.files(repo, revision).update(new)
        commits = self.repos[repo].commits
        commits.append({"summary": header["value"]["summary"], "files": sorted(new)})
        oid = f"{len(commits):040x}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""}

    def info(self, body: bytes, repo: str, revision: str = "main") -> dict[str, Any]:
        self.files(repo, revision)
        return {"id": repo, "sha": f"{len(self.repos[repo].commits):040x}", "siblings": []}

    def refs(self, body: bytes, repo: str) -> dict[str, Any]:
        names = self.repos[repo].branches
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": "0" * 40} for name in names]
        return {"branches": branches, "converts": [], "tags": []}


def _oid(content: bytes, lfs: bool) -> str:
    """What the Hub calls a file by: SHA-256 of an LFS file, git's SHA-1 of another."""
    return (hashlib.sha256(content) if lfs else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: its second half would wait for the client's acknowledgement

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        self.hub.received += [body, f"{self.path} {headers}".encode()]
        call = f"{self.command} {self.path.partition('?')[0]}"
        found = ((re.fullmatch(pattern, call), stage) for pattern, stage in _ROUTES.items())
        match, stage = next((pair for pair in found if pair[0]), (None, ""))
        if match is None:
            if self.path != "/api/agent-harnesses":  # for the client's user agent; the push does not depend on it
                self.hub.unknown.append(call)
            return self._send(404, {"error": "not found"})
        self.hub.calls.append(stage)
        failure = self.hub.failures.get(stage)
        try:
            # an upload's address is a secret of its own, as the Hub's signed ones are
            if stage != "lfs_upload" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise RefusedError(401, "Invalid credentials in Authorization header")
            if isinstance(failure, int):
                raise RefusedError(failure, f"{stage} is out of order")
            parts = [part for part in match.groups() if part]
            answer = getattr(self.hub, stage)(body, *parts) if failure != CLOSE else {}
        except RefusedError as refusal:
            return self._send(refusal.status, refusal.content, refusal.code)
        if failure is None:
            return self._send(200, answer)
        self.close_connection = True

    do_GET = do_POST = do_PUT = _answer

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
