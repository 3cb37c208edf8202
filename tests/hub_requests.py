"""One request to the Hub's stand-in: reading it, faults, the answer, and who may do what."""

import json
import re
import socket
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import Commit, Repo

if TYPE_CHECKING:
    from hub_server import HubServer


class Answered(Exception):
    """An error answer was sent; nothing else is to be done."""


class HubRequest(BaseHTTPRequestHandler):
    hub: "HubServer"
    routes: tuple[tuple[str, str, str], ...]
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
        with suppress(Answered):
            if self.fault is not None and self.fault.isdigit():
                self._send(int(self.fault), "<html>No</html>", kind="text/html")
            for method, pattern, name in self.routes:
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
            raise Answered
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
        raise Answered

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
