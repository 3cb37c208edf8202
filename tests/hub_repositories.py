"""What the Hub's stand-in keeps: repositories with their revisions and pull requests, and faults on request."""

import hashlib
import re
import time
from dataclasses import dataclass, field
from typing import Any

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
    """One repository: commits of main, oldest first, pull requests, numbered from 1, and what its .gitignore names."""

    private: bool = False
    gated: bool = False
    takes_pull_requests: bool = True
    ignored: str = ""
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


def file_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
