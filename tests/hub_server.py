"""A small stand-in for the Hugging Face Hub over real HTTP: repositories, LFS, commits, tokens, and faults on request.

It speaks as much of the Hub's protocol as huggingface_hub, datasets and timm use (see `ROUTES`), keeps everything
in memory, and checks what a client must not do: send a token to the storage host, or commit a file it never uploaded.
"""

import base64
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml
from hub_repositories import LFS_SUFFIXES, Fault, PullRequest, Repo, file_entry, git_sha1, sha256
from hub_requests import HubRequest

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


class _Handler(HubRequest):
    routes = ROUTES

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
        target = self._committable(kind, repo, revision)
        _, there = self._at(target, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], file["path"].endswith(LFS_SUFFIXES)
            content = there.get(path)
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular"})
            files[-1]["shouldIgnore"] = re.fullmatch(target.ignored, path) is not None
            files[-1]["oid"] = None if content is None else sha256(content) if lfs else git_sha1(content)
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
        if sha256(self.body) != oid:
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
                entries.append(file_entry(name, files[name]))
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
        self._send(200, entries)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, files = self._at(self._opened(kind, repo), revision)
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        found = [file_entry(name, files[name]) for name in wanted if name in files]
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
            self._content(content, X_Repo_Commit=sha, ETag=f'"{git_sha1(content)}"')
        oid = sha256(content)
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
