"""A Hub on 127.0.0.1: what huggingface_hub and transformers send over HTTP → repositories as files in a folder.

For tests of pushing and pulling with the real clients over real sockets; standard library only. It has repositories,
public and private, tokens, commits, branches, pull requests, and large files that are stored apart and checked by their
SHA-256. A commit is written whole before any reference points to it, so a reader sees all of it or nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".png")


class Refused(Exception):
    """An error answer: status, `X-Error-Code` and message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


# ---------------------------------------------------------------------------------------------------------------------
# Files on disk
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A file of a commit: where its bytes are, and whether it is a large one."""

    sha256: str
    size: int
    oid: str  # as git names it
    large: bool


@dataclass
class Store:
    """Blobs by their SHA-256, and for each repository its commits, references and visibility."""

    root: Path
    lock: threading.RLock = field(default_factory=threading.RLock)

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def put(self, content: bytes) -> str:
        """Store bytes, and return their SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        _write(self.blob(sha256), content)
        return sha256

    def exists(self, repo: str) -> bool:
        return (self._folder(repo) / "repo.json").is_file()

    def create(self, repo: str, private: bool) -> None:
        _write_json(self._folder(repo) / "repo.json", {"private": private})
        _write_json(self._folder(repo) / "refs.json", {})
        self.commit(repo, "main", "initial commit", {}, None)

    def private(self, repo: str) -> bool:
        return bool(_read_json(self._folder(repo) / "repo.json")["private"])

    def refs(self, repo: str) -> dict[str, str]:
        """{branch or pull request: commit}."""
        refs: dict[str, str] = _read_json(self._folder(repo) / "refs.json")
        return refs

    def resolve(self, repo: str, revision: str) -> str:
        """The commit that a branch, a pull request or a commit's own name stands for."""
        commit = self.refs(repo).get(revision, revision)
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not self._commit_file(repo, commit).is_file():
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def point(self, repo: str, name: str, commit: str) -> None:
        with self.lock:
            _write_json(self._folder(repo) / "refs.json", {**self.refs(repo), name: commit})

    def files(self, repo: str, commit: str) -> dict[str, Stored]:
        listed = _read_json(self._commit_file(repo, commit))["files"]
        return {path: Stored(**entry) for path, entry in listed.items()}

    def log(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of the commits that lead to a revision, the last one first."""
        titles, commit = [], self.resolve(repo, revision)
        while commit:
            record = _read_json(self._commit_file(repo, commit))
            titles.append(record["title"])
            commit = record["parent"]
        return titles

    def commit(self, repo: str, branch: str, title: str, files: dict[str, Stored], parent: str | None) -> str:
        record = {"title": title, "parent": parent, "files": {path: vars(entry) for path, entry in files.items()}}
        name = hashlib.sha1(json.dumps(record).encode() + uuid.uuid4().bytes).hexdigest()
        _write_json(self._commit_file(repo, name), record)
        self.point(repo, branch, name)
        return name

    def _folder(self, repo: str) -> Path:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
            raise Refused(400, f"Invalid repository name: {repo}")
        return self.root / "repos" / repo.replace("/", "--")

    def _commit_file(self, repo: str, commit: str) -> Path:
        return self._folder(repo) / "commits" / f"{commit}.json"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def _write_json(path: Path, record: Any) -> None:
    _write(path, json.dumps(record).encode())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Requests like `pattern` ("PUT /lfs/…") go wrong: with a status, or for 0 by half an answer and a closed door."""

    pattern: str
    status: int


@dataclass
class LoopbackHub:
    """The server and what tests ask of it. `tokens` are {token: (user, "read" or "write")}."""

    root: Path
    tokens: dict[str, tuple[str, str]]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.root)
        # Large files are at another origin, as on the Hub: the client would follow a redirect within one by itself.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, routes)) for routes in (API, STORAGE)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @contextmanager
    def fault(self, pattern: str, status: int) -> Iterator[None]:
        """Requests that match `pattern` fail within the block."""
        self.faults.append(Fault(pattern, status))
        try:
            yield
        finally:
            self.faults.pop()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """{path: content} of a revision."""
        listed = self.store.files(repo, self.store.resolve(repo, revision))
        return {path: self.store.blob(entry.sha256).read_bytes() for path, entry in listed.items()}


@dataclass
class Request:
    """What a route gets: the hub, who asks, and the parts of the request."""

    hub: LoopbackHub
    user: str | None
    role: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def store(self) -> Store:
        return self.hub.store

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def readable(self, repo: str) -> str:
        """The repository's name, if this user may know of it."""
        known = self.store.exists(repo) and (not self.store.private(repo) or self.user == repo.partition("/")[0])
        if not known:
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo: str) -> str:
        self.readable(repo)
        self.may_write(repo.partition("/")[0])
        return repo

    def may_write(self, owner: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user != owner or self.role != "write":
            raise Refused(403, f"You don't have the rights to write under the namespace {owner!r}")

    @property
    def opens_pull_request(self) -> bool:
        return self.query.get("create_pr") == ["1"]


@dataclass
class Answer:
    """Status, body (JSON unless bytes) and headers."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def whoami(request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    return Answer({"type": "user", "name": request.user, "orgs": []})


def create_repository(request: Request) -> Answer:
    owner = request.json.get("organization") or request.user or ""
    repo = f"{owner}/{request.json['name']}"
    request.may_write(owner)
    url = {"url": f"{request.hub.url}/{repo}"}
    with request.store.lock:
        if request.store.exists(repo):
            return Answer({**url, "error": "You already created this model repo"}, 409)
        request.store.create(repo, request.json.get("visibility") == "private" or bool(request.json.get("private")))
    return Answer(url)


def validate_card(request: Request) -> Answer:
    """The metadata must be there; what the Hub checks besides is not known here."""
    if not request.json["content"].startswith("---\n"):
        return Answer({"errors": [{"message": "there is no metadata"}], "warnings": []}, 400)
    return Answer({"errors": [], "warnings": []})


def repository_info(request: Request, repo: str, revision: str | None = None) -> Answer:
    commit = request.store.resolve(request.readable(repo), revision or "main")
    siblings = [{"rfilename": path} for path in request.store.files(repo, commit)]
    private = request.store.private(repo)
    return Answer({"id": repo, "modelId": repo, "sha": commit, "private": private, "siblings": siblings, "tags": []})


def list_files(request: Request, repo: str, revision: str, folder: str | None = None) -> Answer:
    commit = request.store.resolve(request.readable(repo), revision)
    entries = []
    for path, file in request.store.files(repo, commit).items():
        if folder is None or path.startswith(f"{folder}/"):
            large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.large else {}
            entries.append({"type": "file", "oid": file.oid, "size": file.size, "path": path, **large})
    return Answer(entries)


def create_branch(request: Request, repo: str, branch: str) -> Answer:
    if branch in request.store.refs(request.writable(repo)):
        raise Refused(409, f"Reference already exists: {branch}")
    request.store.point(repo, branch, request.store.resolve(repo, request.json.get("startingPoint", "main")))
    return Answer({})


def announce_files(request: Request, repo: str, revision: str) -> Answer:
    """Which of the files that are going to be committed are large, and which are there already."""
    (request.readable if request.opens_pull_request else request.writable)(repo)
    there = request.store.files(repo, request.store.resolve(repo, revision))
    answers = []
    for file in request.json["files"]:
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        known = there.get(file["path"])
        oid = {"oid": known.sha256 if known.large else known.oid} if known else {}
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return Answer({"files": answers})


def announce_large_files(request: Request, repo: str) -> Answer:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    request.readable(repo)
    objects = []
    for wanted in request.json["objects"]:
        actions = {
            "upload": {"href": f"{request.hub.storage_url}/lfs/{wanted['oid']}"},
            "verify": {"href": f"{request.hub.url}/{repo}.git/info/lfs/verify"},
        }
        stored = request.store.blob(wanted["oid"]).is_file()
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if stored else {"actions": actions})})
    return Answer({"transfer": "basic", "objects": objects})


def verify_large_file(request: Request, repo: str) -> Answer:
    blob = request.store.blob(_digest(request.json["oid"]))
    if not blob.is_file() or blob.stat().st_size != request.json["size"]:
        raise Refused(404, "The object was not uploaded")
    return Answer({})


def commit(request: Request, repo: str, revision: str) -> Answer:
    """Apply a commit: one JSON object per line, a header and then the files."""
    (request.readable if request.opens_pull_request else request.writable)(repo)
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    header = next(line["value"] for line in lines if line["key"] == "header")
    with request.store.lock:
        parent = request.store.resolve(repo, revision)
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "A commit has happened since")
        files = request.store.files(repo, parent)
        for line in lines:
            if line["key"] != "header":
                _apply(request.store, files, line["key"], line["value"])
        branch, pull_request = revision, {}
        if request.opens_pull_request:
            number = sum(name.startswith("refs/pr/") for name in request.store.refs(repo)) + 1
            branch = f"refs/pr/{number}"
            pull_request = {"pullRequestUrl": f"{request.hub.url}/{repo}/discussions/{number}"}
        name = request.store.commit(repo, branch, header["summary"], files, parent)
    return Answer({"commitOid": name, "commitUrl": f"{request.hub.url}/{repo}/commit/{name}", **pull_request})


def _apply(store: Store, files: dict[str, Stored], kind: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if path.startswith("/") or ".." in path.split("/"):
        raise Refused(400, f"Invalid path: {path}")
    if kind == "file":
        content = base64.b64decode(value["content"])
        files[path] = Stored(store.put(content), len(content), _git_oid(content), large=False)
    elif kind == "lfsFile":
        if not store.blob(_digest(value["oid"])).is_file():
            raise Refused(400, f"{path} was not uploaded")
        files[path] = Stored(value["oid"], value["size"], _git_oid(value["oid"].encode()), large=True)
    elif kind == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    else:
        raise Refused(400, f"Unknown operation: {kind}")


def download(request: Request, repo: str, revision: str, path: str) -> Answer:
    name = request.store.resolve(request.readable(repo), revision)
    file = request.store.files(repo, name).get(path)
    if file is None:
        raise Refused(404, f"{path} does not exist", "EntryNotFound")
    if file.large:
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        location = f"{request.hub.storage_url}/lfs/{file.sha256}"
        return Answer(b"", 302, {"X-Repo-Commit": name, "Location": location, **linked})
    content = request.store.blob(file.sha256).read_bytes()
    return Answer(content, 200, {"X-Repo-Commit": name, "ETag": f'"{file.oid}"'})


def upload_large_file(request: Request, sha256: str) -> Answer:
    found = hashlib.sha256(request.body).hexdigest()
    if found != sha256:
        raise Refused(400, f"The content has the SHA-256 {found}, not {sha256}")
    request.store.put(request.body)
    return Answer()


def download_large_file(request: Request, sha256: str) -> Answer:
    blob = request.store.blob(_digest(sha256))
    if not blob.is_file():
        raise Refused(404, "There is no such object")
    content = blob.read_bytes()
    if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
        start = int(match[1])
        return Answer(content[start:], 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
    return Answer(content, 200, {"ETag": f'"{sha256}"'})


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise Refused(400, f"Not a SHA-256 digest: {text}")
    return text


Routes = list[tuple[str, str, Callable[..., Answer]]]
REPO = r"([^/]+/[^/]+?)"
API: Routes = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repository),
    ("POST", r"/api/validate-yaml", validate_card),
    ("GET", rf"/api/models/{REPO}(?:/revision/([^/]+))?", repository_info),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", list_files),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", create_branch),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", announce_files),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", announce_large_files),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", verify_large_file),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", download),
]
STORAGE: Routes = [
    ("PUT", r"/lfs/([0-9a-f]{64})", upload_large_file),
    ("GET", r"/lfs/([0-9a-f]{64})", download_large_file),
]


def _handler(hub: LoopbackHub, routes: Routes) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests of one of the two servers; HEAD is GET without its body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {unquote(self.path)}")
            fault = next((fault for fault in hub.faults if re.search(fault.pattern, hub.requests[-1])), None)
            try:
                if fault is not None and fault.status:
                    raise Refused(fault.status, "This server is broken")
                self.send(self.result(body), broken_off=fault is not None)
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                self.send(Answer({"error": refused.message}, refused.status, headers))
            except BrokenPipeError:
                pass  # the client is gone

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def result(self, body: bytes) -> Answer:
            address = urlsplit(self.path)
            method = "GET" if self.command == "HEAD" else self.command
            user, role = self.who()
            request = Request(hub, user, role, parse_qs(address.query), self.headers, body)
            for wanted, pattern, route in routes:
                if wanted == method and (match := re.fullmatch(pattern, address.path)):
                    return route(request, *(part and unquote(part) for part in match.groups()))
            raise Refused(404, f"No such address: {address.path}")

        def who(self) -> tuple[str | None, str]:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                raise Refused(401, "Invalid credentials in Authorization header", "InvalidToken")
            return hub.tokens.get(token, (None, ""))

        def send(self, answer: Answer, broken_off: bool = False) -> None:
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if broken_off else body)
            if broken_off:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed; tests read `LoopbackHub.requests`."""

    return Handler
