"""A small stand-in for the Hugging Face Hub over real HTTP: repositories, LFS, commits, tokens, and faults on request.

It speaks as much of the Hub's protocol as huggingface_hub, datasets and timm use (see `ROUTES`), keeps everything in
memory, and checks what a client must not do: send a token to the storage host, or commit a file it never uploaded.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin", ".arrow", ".onnx")


Commit = tuple[str, dict[str, bytes]]
"""Hash, and path to content."""


@dataclass
class PullRequest:
    """An open pull request: its commits, oldest first."""

    title: str
    author: str
    commits: list[Commit] = field(default_factory=list)


@dataclass
class Repo:
    """One repository: commits of main, oldest first, and pull requests, which are numbered from 1."""

    private: bool = False
    gated: bool = False
    takes_pull_requests: bool = True
    commits: list[Commit] = field(default_factory=list)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        branch = self.branch(revision)
        digest = hashlib.sha1(repr((len(branch), sorted(files), time.time_ns())).encode()).hexdigest()
        branch.append((digest, files))
        return digest

    def branch(self, revision: str) -> list[Commit]:
        if not revision.startswith("refs/pr/"):
            return self.commits
        return self.pull_requests[int(revision.rpartition("/")[2]) - 1].commits

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main" or revision.startswith("refs/pr/"):
            return self.branch(revision)[-1]
        everything = [*self.commits, *(commit for request in self.pull_requests for commit in request.commits)]
        return next((commit for commit in everything if commit[0] == revision), None)


@dataclass
class Fault:
    """What happens to the next `times` requests that match.

    kind: "503", "403", … (refused before anything happens), "cut" (connection closed within the upload), "lost"
    (carried out, but its answer never comes), "stall" (no answer for `seconds`, nothing carried out), "corrupt" (an
    answer with one byte changed).
    """

    kind: str
    method: str
    path: str
    times: int = 1
    seconds: float = 3.0

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


class HubServer:
    """The server; `tokens` maps a token to the user who has it and may write under that name."""

    def __init__(self) -> None:
        self.tokens: dict[str, str] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.lock = threading.RLock()
        self.released = threading.Event()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # Another origin, as the Hub's storage is: a client must not send its token there.
        self.storage = f"http://localhost:{self.port}"

    def fault(self, kind: str, method: str, path: str, times: int = 1, seconds: float = 3.0) -> Fault:
        self.faults.append(Fault(kind, method, path, times, seconds))
        return self.faults[-1]

    def environment(self, home: Path, token: str | None) -> dict[str, str]:
        """Return the variables of a process that takes this server for the Hub and has an empty cache."""
        wanted = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        wanted |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        dropped = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return kept | wanted | ({"HF_TOKEN": token} if token else {})

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def add(self, repo_id: str, kind: str = "models", **options: Any) -> Repo:
        return self.repos.setdefault((kind, repo_id), Repo(**options))

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        return self.repos[kind, repo_id]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    hub = HubServer()
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()


class _Answered(Exception):
    """An error answer was sent; nothing else is to be done."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of its headers
    wbufsize = -1

    def log_message(self, *args: Any) -> None:
        pass

    # ---- one request ----

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, TimeoutError):
            super().handle_one_request()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append((self.command, self.route))
        fault = self.hub.take_fault(self.command, self.route)
        self.fault = fault.kind if fault else None
        if self.fault == "cut":
            self.rfile.read(min(10_000, int(self.headers.get("Content-Length", 0)) // 2))
            self._hang_up()
            return
        self.body = self._read_body()
        if fault and fault.kind == "stall":
            self.hub.released.wait(fault.seconds)
            self._hang_up()
            return
        with suppress(_Answered):
            if self.fault is not None and self.fault.isdigit():
                self._send(int(self.fault), "<html>No</html>", kind="text/html")
            for method, pattern, name in ROUTES:
                found = re.fullmatch(pattern, self.route)
                if method == self.command and found:
                    getattr(self, name)(**found.groupdict())
                    return
            self.hub.problems.append(f"no route {self.command} {self.route}")
            self._send(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: Any = b"", kind: str = "application/json", **headers: str) -> None:
        """Answer and end the handling of this request."""
        if not isinstance(content, bytes):
            content = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        if self.fault == "lost":
            self._hang_up()
            raise _Answered
        if self.fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", headers.pop("length", str(len(content))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        raise _Answered

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    # ---- who may do what ----

    def _user(self) -> str | None:
        """Return who asks; a token nobody has is refused, as the Hub does, even for what is public."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            message = "Invalid credentials in Authorization header"
            self._send(401, {"error": message}, X_Error_Message=message)
        return user

    def _readable(self, kind: str, repo_id: str) -> Repo:
        user, repo = self._user(), self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            self._refuse(401 if user is None else 404, "RepoNotFound", "Repository not found")
        assert repo is not None
        return repo

    def _opened(self, kind: str, repo_id: str) -> Repo:
        """As `_readable`, for contents: a gated repository shows its page to all, its files to its owner."""
        repo = self._readable(kind, repo_id)
        user = self._user()
        if repo.gated and user != repo_id.split("/")[0]:
            self._refuse(401 if user is None else 403, "GatedRepo", f"Access to {repo_id} is restricted")
        return repo

    def _writable(self, kind: str, repo_id: str) -> Repo:
        repo, user = self._readable(kind, repo_id), self._user()
        if user is None:
            self._send(401, {"error": "Unauthorized"})
        if user != repo_id.split("/")[0]:
            self._send(403, {"error": "Forbidden: you must have write access"}, X_Error_Message="Forbidden")
        return repo

    def _committable(self, kind: str, repo_id: str, revision: str) -> Repo:
        """As `_writable`; a pull request can be opened by whoever may read, and goes on being its author's."""
        is_opened = self.query.get("create_pr") == ["1"]
        if not is_opened and not revision.startswith("refs/pr/"):
            return self._writable(kind, repo_id)
        repo, user = self._readable(kind, repo_id), self._user()
        if user is None:
            self._send(401, {"error": "Unauthorized"})
        is_another = not is_opened and repo.pull_requests[int(revision.rpartition("/")[2]) - 1].author != user
        if is_another or not repo.takes_pull_requests:
            self._send(403, {"error": "Pull requests are disabled"}, X_Error_Message="Pull requests are disabled")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        assert commit is not None
        return commit

    # ---- routes ----

    def create(self) -> None:
        wanted, user = json.loads(self.body), self._user()
        owner = wanted.get("organization") or user
        if user is None:
            self._send(401, {"error": "Unauthorized"})
        if owner != user:
            self._send(403, {"error": f"You don't have the rights to create a repo under the namespace {owner!r}"})
        kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                self._send(409, {"error": "You already created this repo", "url": url})
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.add(repo_id, kind, private=private)
        self._send(200, {"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        front = re.match(r"\s*---\n([\s\S]*?)\n---", text)
        try:
            data = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        if not isinstance(data, dict):
            self._send(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        _, there = self._at(self._committable(kind, repo, revision), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], file["path"].endswith(LFS_SUFFIXES)
            content = there.get(path)
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            files[-1]["oid"] = None if content is None else _sha256(content) if lfs else _git_sha1(content)
        self._send(200, {"files": files})

    def lfs_batch(self, prefix: str | None, repo: str) -> None:
        wanted = json.loads(self.body)
        if "ref" in wanted:  # without one it is the upload for a new pull request
            self._committable((prefix or "models/").rstrip("/"), repo, wanted["ref"]["name"])
        else:
            self._readable((prefix or "models/").rstrip("/"), repo)
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.storage}/storage/{item['oid']}?X-Amz-Signature=abc"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/api/lfs-verify"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self._check_no_token()
        if _sha256(self.body) != oid:
            self._send(400, {"error": "wrong checksum"})
        self.hub.lfs[oid] = self.body
        self._send(200, b"", ETag='"x"')

    def _check_no_token(self) -> None:
        if "Authorization" in self.headers:
            self.hub.problems.append(f"{self.command} {self.route}: a token was sent to the storage host")

    def verify(self) -> None:
        wanted = json.loads(self.body)
        known = len(self.hub.lfs.get(wanted["oid"], b"")) == wanted["size"]
        self._send(200 if known else 404, {"message": "verified" if known else "missing"})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        target = self._committable(kind, repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo}"
        answer: dict[str, Any] = {"success": True}
        with self.hub.lock:
            head, there = self._at(target, revision)
            files = dict(there)
            for line in lines:
                self._apply(line["key"], line["value"], head, files)
            if self.query.get("create_pr") == ["1"]:
                target.pull_requests.append(PullRequest(lines[0]["value"]["summary"], self._user() or ""))
                revision = f"refs/pr/{len(target.pull_requests)}"
                answer["pullRequestUrl"] = f"{url}/discussions/{len(target.pull_requests)}"
            answer["commitOid"] = target.commit(files, revision)
        self._send(200, answer | {"commitUrl": f"{url}/commit/{answer['commitOid']}"})

    def discussions(self, kind: str, repo: str) -> None:
        found = self._readable(kind, repo)
        if not found.takes_pull_requests:
            self._send(403, {"error": "Discussions are disabled"}, X_Error_Message="Discussions are disabled")
        about = {"status": "open", "isPullRequest": True, "createdAt": "2025-01-01T00:00:00.000Z"}
        about |= {"repo": {"name": repo, "type": kind.removesuffix("s")}}
        listed = [
            about | {"num": number, "title": request.title, "author": {"name": request.author}}
            for number, request in enumerate(found.pull_requests, start=1)
            if self.query.get("author", [request.author]) == [request.author]
        ]
        self._send(200, {"discussions": listed, "count": len(listed), "start": 0})

    def _apply(self, key: str, value: dict[str, Any], head: str, files: dict[str, bytes]) -> None:
        if key == "header":
            if value.get("parentCommit") not in (None, head):
                self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                self._send(400, {"error": f"LFS object {value['oid']} was never uploaded"})
            files[value["path"]] = self.hub.lfs[value["oid"]]
        elif key == "deletedFile":
            files.pop(value["path"])

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        found = self._readable(kind, repo)
        sha, files = self._at(found, revision or "main")
        answer = {"_id": "0", "id": repo, "sha": sha, "private": found.private}
        answer |= {"gated": "manual" if found.gated else False}
        answer |= {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "author": repo.split("/")[0]}
        answer |= {"siblings": [{"rfilename": name} for name in sorted(files)], "cardData": {}}
        answer |= {"lastModified": "2025-01-01T00:00:00.000Z", "createdAt": "2025-01-01T00:00:00.000Z"}
        self._send(200, answer)

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self._at(self._opened(kind, repo), revision)
        start = f"{folder}/" if folder else ""
        names = [name for name in sorted(files) if name.startswith(start)]
        if folder and not names:
            self._refuse(404, "EntryNotFound", "no such folder")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for name in names:
            rest = name[len(start) :]
            for depth in range(1, len(rest.split("/"))):
                folders.add(start + "/".join(rest.split("/")[:depth]))
            if recursive or "/" not in rest:
                entries.append(_entry(name, files[name]))
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
        self._send(200, entries)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, files = self._at(self._opened(kind, repo), revision)
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        found = [_entry(name, files[name]) for name in wanted if name in files]
        folders = [name for name in wanted if any(file.startswith(f"{name}/") for file in files)]
        self._send(200, found + [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders])

    def resolve(self, prefix: str | None, repo: str, revision: str, file: str) -> None:
        target = self._opened((prefix or "models/").rstrip("/"), repo)
        sha, files = self._at(target, revision)
        if file not in files:
            headers = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found", "X_Repo_Commit": sha}
            self._send(404, {"error": "Entry not found"}, **headers)
        content = files[file]
        if not file.endswith(LFS_SUFFIXES):
            self._content(content, X_Repo_Commit=sha, ETag=f'"{_git_sha1(content)}"')
        oid = _sha256(content)
        self.hub.lfs.setdefault(oid, content)  # a test may have put the file there without an upload
        headers = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": sha}
        self._send(302, b"", Location=f"{self.hub.storage}/storage/{oid}?X-Amz-Signature=abc", **headers)

    def stored(self, oid: str) -> None:
        self._check_no_token()
        self._content(self.hub.lfs[oid], ETag=f'"{oid}"')

    def _content(self, content: bytes, **headers: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._send(200, content, kind="application/octet-stream", Accept_Ranges="bytes", **headers)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        where = {"Content_Range": f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"}
        self._send(206, content[start : end + 1], kind="application/octet-stream", **where, **headers)

    def whoami(self) -> None:
        user = self._user()
        self._send(200 if user else 401, {"name": user, "type": "user", "orgs": [], "auth": {}} if user else {})


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES: tuple[tuple[str, str, str], ...] = (
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", _API + r"/preupload/" + _REVISION, "preupload"),
    ("POST", r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "store"),
    ("POST", "/api/lfs-verify", "verify"),
    ("POST", _API + r"/commit/" + _REVISION, "commit"),
    ("GET", _API, "info"),
    ("GET", _API + "/discussions", "discussions"),
    ("GET", _API + r"/revision/" + _REVISION, "info"),
    ("GET", _API + r"/tree/" + _REVISION + r"(?:/(?P<folder>.+))?", "tree"),
    ("POST", _API + r"/paths-info/" + _REVISION, "paths_info"),
    *(
        (method, rf"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<file>.+)", "resolve")
        for method in ("HEAD", "GET")
    ),
    *((method, r"/storage/(?P<oid>[0-9a-f]{64})", "stored") for method in ("HEAD", "GET")),
    ("GET", "/api/whoami-v2", "whoami"),
)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _git_sha1(content)}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
