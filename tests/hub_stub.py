"""A Hub that lives in memory and listens on loopback, for tests of what is pushed and loaded: the real clients use it.

The address of the Hub is read when `huggingface_hub` is imported, so whatever talks to it runs in a new process:

    with HubStub() as hub:
        hub.files["datasets/tester/pairs"] = {"data.jsonl": b"{}"}  # where something is to be there from the start
        hub.fail("GET", r"/resolve/.+/data\\.jsonl", status=503)  # the next time
        subprocess.run([sys.executable, "script.py"], env=os.environ | hub.environment, check=True)
    hub.files["tester/model"]  # name of the file → its bytes

A repository goes by its id, with `datasets/` or `spaces/` before it if it is one.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import yaml


USER = "tester"
# What the real Hub keeps in large-file storage goes there; everything else comes inline with the commit.
IS_LARGE = re.compile(
    r"\.(7z|arrow|bin|bz2|ckpt|gif|gz|h5|jpe?g|model|mp[34]|msgpack|np[yz]|onnx|parquet|pb|pickle|pkl|png|pth?"
    r"|safetensors|tar|tgz|wav|webp|xz|zip|zst)$|tfevents"
)
LARGE_SIZE = 10 * 2**20
FRONT_MATTER = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---(?:\r?\n|$)")
DATE = "2026-01-01T00:00:00.000Z"
NO_LOGIN = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"

API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+?)"
REVISION = r"/(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "_whoami"),
    ("GET", "/api/agent-harnesses", "_harnesses"),
    ("POST", "/api/validate-yaml", "_validate_yaml"),
    ("POST", "/api/repos/create", "_create"),
    ("PUT", f"{API}/settings", "_change_settings"),
    ("GET|HEAD", f"{API}(?:/revision{REVISION})?", "_info"),
    ("GET", f"{API}/refs", "_refs"),
    ("POST|DELETE", f"{API}/(?P<kind_of_ref>branch|tag){REVISION}", "_change_ref"),
    ("GET", f"{API}/tree{REVISION}(?:/(?P<path>.*))?", "_tree"),
    ("POST", f"{API}/paths-info{REVISION}", "_paths_info"),
    ("POST", f"{API}/(?P<action>preupload|commit){REVISION}", "_change_files"),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/(?P<action>batch|verify)", "_large_files"),
    ("PUT|POST", "/lfs/(?P<repo>.+)/(?P<oid>[0-9a-f]{64})(?:/(?P<part>[0-9]+|complete))?", "_upload"),
    ("GET|HEAD", f"{PAGE}/resolve{REVISION}/(?P<path>.+)", "_resolve"),
    ("GET|HEAD", "/api/(?:models|datasets|spaces)/[^/]+(?:/revision/.+)?|/[^/]+/resolve/.+", "_missing"),
]
# Where the address begins with https://, the client reads a 401 as a missing repository; else it needs the code.
IS_ABOUT_A_REPOSITORY = re.compile(r"/api/(models|datasets|spaces)/.+|/.+/resolve/.+")


class Refusal(Exception):
    """An answer with a status and a message, and with the code by which the client tells what is missing."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **content):
        super().__init__(message)
        self.status, self.content = status, {"error": message} | content
        message = message.encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": message, "X-Error-Code": code} | (headers or {})


def is_large(name: str, size: int) -> bool:
    return size > 0 and (size > LARGE_SIZE or IS_LARGE.search(name) is not None)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid(name: str, data: bytes) -> str:
    """What stands for the content of a file: git's hash, or the SHA-256 of a large file."""
    return hashlib.sha256(data).hexdigest() if is_large(name, len(data)) else git_oid(data)


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@dataclass
class Commit:
    title: str
    files: dict[str, bytes]
    parent: str | None


@dataclass
class Repository:
    """What there is to a repository beside the files on `main`."""

    settings: dict[str, object] = field(default_factory=lambda: {"private": False, "gated": False})
    history: dict[str, Commit] = field(default_factory=dict)  # by SHA
    branches: dict[str, str] = field(default_factory=dict)  # name → SHA
    tags: dict[str, str] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)  # SHA-256 → bytes

    def add(self, title: str, files: dict[str, bytes], branch: str = "main") -> str:
        oids = {name: oid(name, data) for name, data in files.items()}
        self.large_files.update((oids[name], data) for name, data in files.items() if is_large(name, len(data)))
        parent = self.branches.get(branch)
        sha = hashlib.sha1(json.dumps([title, oids, parent], sort_keys=True).encode()).hexdigest()
        self.history[sha] = Commit(title, files, parent)
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        found = self.branches.get(revision) or self.tags.get(revision) or (revision in self.history and revision)
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def last_change(self, sha: str, path: str) -> dict[str, str]:
        """The commit in which a file, or a file of a folder, was last changed."""

        def content(sha):
            files = self.history[sha].files
            return {name: files[name] for name in files if f"{name}/".startswith(f"{path}/")}

        while (parent := self.history[sha].parent) and content(parent) == content(sha):
            sha = parent
        return {"id": sha, "title": self.history[sha].title, "date": DATE}

    def entry(self, sha: str, path: str, expand: bool = False) -> dict[str, object] | None:
        """What a list of files tells of a file or a folder."""
        files = self.history[sha].files
        data = files.get(path)
        if data is None:
            if not any(name.startswith(f"{path}/") for name in files):
                return None
            entry = {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
        else:
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_large(path, len(data)):
                sha256 = oid(path, data)
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
                entry["oid"] = git_oid(pointer.encode())
                entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
        return entry | {"lastCommit": self.last_change(sha, path)} if expand else entry


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def has(self, option: str) -> bool:
        return self.query.get(option, [""])[0].lower() in ("1", "true")


@dataclass
class Fault:
    method: str
    pattern: str
    times: int
    answer: tuple | None = None
    after: int = 0


class HubStub:
    """Repositories by name, as mappings of file names to bytes, and the titles of their commits.

    What a test writes into `files` is there for the clients, as a commit without a title. The settings of a
    repository, tokens, organizations and faults can be changed at any time, too.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}  # on `main`
        self.commits: dict[str, list[str]] = defaultdict(list)  # on any branch, the oldest first
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_stub": USER, "hf_secret": USER}  # token → user
        self.read_only_tokens: set[str] = set()
        self.orgs: dict[str, list[str]] = {}  # user → organizations
        self.multipart_from: int | None = None  # size beyond which a file is uploaded in parts of this size
        self.log: list[tuple[str, str]] = []  # method and path of every request
        self.unknown: list[tuple[str, str]] = []  # of those that are not part of this Hub
        self.uploads: list[str] = []  # SHA-256 of the large files that arrived whole, each as often as it did
        self.faults: list[Fault] = []
        self.parts: dict[tuple[str, str], dict[int, bytes]] = defaultdict(dict)
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = dict(HF_ENDPOINT=self.url, HF_TOKEN="hf_stub", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
        self.environment |= dict(HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method, pattern, status=503, times=1, headers=None, body=None):
        """Gives this answer (body: bytes or JSON) to the next requests with a match for the pattern in their path."""
        content = {"error": HTTPStatus(status).phrase} if body is None else body
        self.faults.append(Fault(method, pattern, times, answer=(status, content, headers or {})))

    def drop(self, method, pattern, after=0, times=1):
        """Hangs up on the next such requests, after so many bytes of the answer to a GET, else of what is sent."""
        self.faults.append(Fault(method, pattern, times, after=after))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def repository(self, repo: str) -> Repository | None:
        with self.lock:
            if repo not in self.files:
                return None
            repository = self.repositories.setdefault(repo, Repository())
            if not repository.branches or repository.history[repository.branches["main"]].files != self.files[repo]:
                repository.add("", dict(self.files[repo]))
            return repository

    def revision(self, repo: str, name: str = "main") -> str:
        """SHA of a branch or a tag."""
        return self.repository(repo).sha(name)

    def answer(self, request: Request) -> tuple:
        """Status, body (bytes or JSON) and, where there are any, headers for a request."""
        try:
            if request.token is not None and request.token not in self.tokens:
                raise Refusal(401, BAD_TOKEN if request.method in ("GET", "HEAD") else NO_LOGIN)
            for methods, pattern, name in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and request.method in methods.split("|") and not request.has("create_pr"):
                    parts = {key: unquote(value) for key, value in match.groupdict("").items()}
                    if "kind" in parts:
                        parts["repo"] = self._key(parts.pop("kind"), parts.pop("name"))
                    return getattr(self, name)(request, **parts)
            self.unknown.append((request.method, unquote(request.path)))
            raise Refusal(404, f"{request.method} {unquote(request.path)} is not part of this Hub")
        except Refusal as refusal:
            if refusal.status == 401 and str(refusal) != BAD_TOKEN and IS_ABOUT_A_REPOSITORY.fullmatch(request.path):
                refusal.headers["X-Error-Code"] = "RepoNotFound"
            return refusal.status, refusal.content, refusal.headers

    def preupload(self, repo: str, body: bytes, revision: str = "main") -> tuple:
        repository = self.repository(repo)
        sha = repository.sha(revision)
        files = []
        for name, size in ((file["path"], file["size"]) for file in json.loads(body)["files"]):
            here = repository.history[sha].files.get(name)
            files.append({"path": name, "uploadMode": "lfs" if is_large(name, size) else "regular"})
            files[-1] |= {"shouldIgnore": False, "oid": None if here is None else oid(name, here)}
        return 200, {"files": files, "commitOid": sha}

    def commit(self, repo: str, body: bytes, revision: str = "main") -> tuple:
        with self.lock:
            repository = self.repository(repo)
            if revision not in repository.branches:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repository.branches[revision]
            files, title = dict(repository.history[head].files), ""
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                path = value.get("path", "")
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit", head) != head:
                        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[path] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in repository.large_files:
                        raise Refusal(400, f"The content of {path} was not uploaded")
                    files[path] = repository.large_files[value["oid"]]
                elif key in ("deletedFile", "deletedFolder"):
                    folder = path.rstrip("/") + "/" if key == "deletedFolder" else None
                    gone = [name for name in files if (name.startswith(folder) if folder else name == path)]
                    if not gone:
                        raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    for name in gone:
                        del files[name]
                else:
                    raise Refusal(400, f"a commit with {key} is not part of this Hub")
            sha = repository.add(title, files, revision)
            if revision == "main":
                self.files[repo] = dict(files)
            self.commits[repo].append(title)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}

    def _key(self, kind: str, name: str) -> str:
        return name if kind in ("", "models") else f"{kind}/{name}"

    def _namespaces(self, request: Request) -> list[str]:
        user = self.tokens.get(request.token)
        return [] if user is None else [user, *self.orgs.get(user, [])]

    def _check_may_write(self, request: Request, namespace: str, message: str):
        if request.token is None:
            raise Refusal(401, NO_LOGIN)
        if request.token in self.read_only_tokens or namespace not in self._namespaces(request):
            raise Refusal(403, message)

    def _repository(self, request: Request, repo: str, to_write: bool = False) -> Repository:
        repository = self.repository(repo)
        namespace = repo.split("/")[-2]
        if repository is None or (repository.settings["private"] and namespace not in self._namespaces(request)):
            self._missing(request)
        if to_write:
            self._check_may_write(request, namespace, f"You don't have the rights to write to {repo}")
        return repository

    def _missing(self, request: Request):
        raise Refusal(401, NO_LOGIN) if request.token is None else Refusal(404, "Repository not found", "RepoNotFound")

    def _whoami(self, request: Request) -> tuple:
        if request.token is None:
            raise Refusal(401, NO_LOGIN)
        user, *orgs = self._namespaces(request)
        token = {"displayName": "stub", "role": "read" if request.token in self.read_only_tokens else "write"}
        auth = {"type": "access_token", "accessToken": token}
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in orgs]
        return 200, {"type": "user", "id": "0", "name": user, "fullname": user, "orgs": orgs, "auth": auth}

    def _harnesses(self, request: Request) -> tuple:
        return 200, {"standardEnvVars": [], "harnesses": {}}

    def _validate_yaml(self, request: Request) -> tuple:
        match = FRONT_MATTER.match(json.loads(request.body)["content"])
        if match is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            error = None if isinstance(yaml.safe_load(match[1]), dict) else "the metadata is not a mapping"
        except yaml.YAMLError as invalid:
            error = str(invalid)
        return (200, {"errors": [], "warnings": []}) if error is None else (400, {"errors": [{"message": error}]})

    def _create(self, request: Request) -> tuple:
        asked = json.loads(request.body)
        kind, namespace = asked.get("type") or "model", asked.get("organization") or self.tokens.get(request.token)
        name = f"{namespace}/{asked['name']}"
        refused = f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
        self._check_may_write(request, namespace, refused)
        repo = self._key(f"{kind}s", name)
        with self.lock:
            if repo in self.files:
                raise Refusal(409, f"You already created this {kind} repo: {name}", url=f"{self.url}/{repo}")
            self.files[repo] = {}
            self._set(self.repository(repo), asked)
        return 200, {"url": f"{self.url}/{repo}", "name": name, "id": name}

    def _change_settings(self, request: Request, repo: str) -> tuple:
        self._set(self._repository(request, repo, to_write=True), json.loads(request.body))
        return 200, {}

    def _set(self, repository: Repository, asked: dict[str, object]):
        if "visibility" in asked:
            asked = asked | {"private": asked["visibility"] == "private"}
        repository.settings.update((name, asked[name]) for name in ("private", "gated", "sdk") if name in asked)

    def _info(self, request: Request, repo: str, revision: str) -> tuple:
        repository = self._repository(request, repo)
        sha = repository.sha(revision or "main")
        siblings = []
        for name in sorted(repository.history[sha].files):
            siblings.append({"rfilename": name})
            if request.has("blobs"):
                entry = repository.entry(sha, name)
                siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"], "lfs": entry.get("lfs")}
        name = "/".join(repo.split("/")[-2:])
        info = {"id": name, "author": name.split("/")[0], "sha": sha, "tags": [], "siblings": siblings}
        return 200, info | {"createdAt": DATE, "lastModified": DATE, "downloads": 0, "likes": 0} | repository.settings

    def _refs(self, request: Request, repo: str) -> tuple:
        repository = self._repository(request, repo)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]
            for kind, names in (("heads", repository.branches), ("tags", repository.tags))
        )
        return 200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def _change_ref(self, request: Request, repo: str, kind_of_ref: str, revision: str) -> tuple:
        repository = self._repository(request, repo, to_write=True)
        asked = json.loads(request.body or b"{}")
        if kind_of_ref == "branch":
            names, name, start = repository.branches, revision, asked.get("startingPoint", "main")
        else:
            names, name, start = repository.tags, asked.get("tag", revision), revision
        if request.method == "POST":
            if name in names:
                raise Refusal(409, f"Reference already exists: {name}")
            names[name] = repository.sha(start)
        elif name == "main" or names.pop(name, None) is None:
            raise Refusal(403, "main cannot be deleted") if name == "main" else Refusal(404, f"There is no {name}")
        return 200, {}

    def _tree(self, request: Request, repo: str, revision: str, path: str) -> tuple:
        repository = self._repository(request, repo)
        sha, expand = repository.sha(revision), request.has("expand")
        files = repository.history[sha].files
        if path in files:
            return 200, [repository.entry(sha, path, expand)]
        folder = path and path.rstrip("/") + "/"
        below = [name.removeprefix(folder).split("/") for name in files if name.startswith(folder)]
        if folder and not below:
            raise Refusal(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        depth = max(map(len, below), default=0) if request.has("recursive") else 1
        paths = {folder + "/".join(parts[:length]) for parts in below for length in range(1, depth + 1)}
        return 200, [repository.entry(sha, path, expand) for path in sorted(paths)]

    def _paths_info(self, request: Request, repo: str, revision: str) -> tuple:
        repository = self._repository(request, repo)
        sha, asked = repository.sha(revision), parse_qs(request.body.decode())
        expand = asked.get("expand") == ["true"]
        entries = [repository.entry(sha, path.rstrip("/"), expand) for path in asked.get("paths", [])]
        return 200, [entry for entry in entries if entry is not None]

    def _change_files(self, request: Request, repo: str, action: str, revision: str) -> tuple:
        self._repository(request, repo, to_write=True)
        return getattr(self, action)(repo, request.body, *([] if revision == "main" else [revision]))

    def _large_files(self, request: Request, repo: str, action: str) -> tuple:
        repository = self._repository(request, repo, to_write=True)
        asked = json.loads(request.body)
        if action == "verify":
            if len(repository.large_files.get(asked["oid"], b"")) != asked["size"]:
                raise Refusal(404, f"There is no file {asked['oid']} of this size")
            return 200, {}
        objects = []
        for item in asked["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"], "authenticated": True})
            if item["oid"] not in repository.large_files:
                upload = {"href": f"{self.url}/lfs/{repo}/{item['oid']}"}
                if self.multipart_from is not None and item["size"] > self.multipart_from:
                    parts = range(1, -(-item["size"] // self.multipart_from) + 1)
                    upload["header"] = {f"{part:05d}": f"{upload['href']}/{part}" for part in parts}
                    upload["header"]["chunk_size"] = str(self.multipart_from)
                    upload["href"] += "/complete"
                verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _upload(self, request: Request, repo: str, oid: str, part: str) -> tuple:
        """Takes a large file or a part of one. No token comes with them: to know the address is enough."""
        repository, data = self.repository(repo), request.body
        if part.isdigit():
            self.parts[repo, oid][int(part)] = data
            return 200, b"", {"ETag": etag(data)}
        if part == "complete":
            parts = self.parts.pop((repo, oid), {})
            listed = {item["partNumber"]: item["etag"] for item in json.loads(data)["parts"]}
            if listed != {number: etag(content) for number, content in parts.items()}:
                raise Refusal(400, "These are not the parts that were uploaded")
            data = b"".join(parts[number] for number in sorted(parts))
        if repository is None or hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, f"The SHA-256 of the file is not {oid}")
        repository.large_files[oid] = data
        self.uploads.append(oid)
        return 200, b"", {"ETag": etag(data)}

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> tuple:
        repository = self._repository(request, repo)
        headers = {"X-Repo-Commit": repository.sha(revision)}
        data = repository.history[headers["X-Repo-Commit"]].files.get(path)
        if data is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{oid(path, data)}"', "Accept-Ranges": "bytes"}
        if is_large(path, len(data)):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", request.headers.get("Range", ""))
        if asked is None or request.method == "HEAD":
            return 200, data, headers
        first, last, size = asked.groups()
        start = int(first) if first else max(len(data) - int(size), 0)
        end = min(int(last) + 1, len(data)) if last else len(data)
        if start >= end:
            return 416, b"", headers | {"Content-Range": f"bytes */{len(data)}"}
        return 206, data[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of more than wait here a client hears nothing, and comes back after a second


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.hub.log.append((self.command, unquote(path)))
        fault = self.hub.take_fault(self.command, unquote(path))
        is_cut = fault is not None and fault.answer is None
        if is_cut and self.command != "GET":
            self._read_body(fault.after)
            return self._hang_up()
        body = self._read_body()
        if fault is not None and not is_cut:
            answer = fault.answer
        else:
            answer = self.hub.answer(Request(self.command, path, parse_qs(query), self.headers, body))
        status, content, *headers = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": len(data)} | (headers or [{}])[0]).items():
            self.send_header(name, value)
        with suppress(ConnectionError):
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: fault.after] if is_cut else data)
        if is_cut:
            self._hang_up()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _hang_up(self):
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _read_body(self, limit: int | None = None) -> bytes:
        """What is sent with a request, or so many bytes of it."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if limit is None else min(length, limit))
        data = b""
        while (limit is None or len(data) < limit) and (size := int(self.rfile.readline(), 16)):
            data += self.rfile.read(size)
            self.rfile.readline()
        if limit is None:
            self.rfile.readline()
        return data

    def log_message(self, *_):
        pass
