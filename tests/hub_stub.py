"""A Hub that lives in memory and listens on loopback, for tests of what is pushed: the real client talks to it.

The address of the Hub is read when `huggingface_hub` is imported, so whatever talks to it runs in a new process:

    with HubStub() as hub:
        subprocess.run([sys.executable, "script.py"], env=os.environ | hub.environment, check=True)
    hub.files["tester/model"]  # name of the file → its bytes
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


USER = "tester"
# What the real Hub keeps in large-file storage goes there; everything else comes inline with the commit.
IS_LARGE = re.compile(r"\.(safetensors|parquet|bin|pt|pth|png|jpe?g)$")


class HubStub:
    """Repositories by name, as mappings of file names to bytes, and the titles of their commits."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.commits: dict[str, list[str]] = defaultdict(list)
        self.large_files: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_stub",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def revision(self, repo: str) -> str:
        return hashlib.sha1(json.dumps(self.commits[repo]).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Status and body, bytes or JSON, for a request."""
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": USER, "orgs": [], "auth": {}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            repo = f"{USER}/{json.loads(body)['name']}"
            return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)/.*)?", path):
            repo, action = match.groups()
            if action in ("preupload", "commit"):
                return getattr(self, action)(repo, body)
            if action in (None, "revision", "tree"):
                return 200, self.tree(repo) if action == "tree" else self.info(repo)
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{self.url}/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if method == "PUT" and hashlib.sha256(body).hexdigest() == path[1:]:
            self.large_files[path[1:]] = body
            return 200, b""
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.files[match[1]].get(match[2])
            return (404, b"") if data is None else (200, data)
        return 404, {"error": f"{method} {path} is not part of this Hub"}

    def preupload(self, repo: str, body: bytes) -> tuple[int, object]:
        files = [
            {"path": name, "uploadMode": "lfs" if IS_LARGE.search(name) else "regular", "shouldIgnore": False}
            for name in (file["path"] for file in json.loads(body)["files"])
        ]
        return 200, {"files": files, "commitOid": self.revision(repo)}

    def commit(self, repo: str, body: bytes) -> tuple[int, object]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits[repo].append(value["summary"])
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large_files[value["oid"]]
            else:
                return 400, {"error": f"a commit with {line['key']} is not part of this Hub"}
        return 200, {"commitOid": self.revision(repo), "commitUrl": f"{self.url}/{repo}/commit/{self.revision(repo)}"}

    def info(self, repo: str) -> dict[str, object]:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files[repo].items()]
        return {"_id": "0", "id": repo, "modelId": repo, "sha": self.revision(repo), "siblings": siblings, "tags": []}

    def tree(self, repo: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files[repo].items()
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self._read_body()
        path = self.path.split("?")[0]
        status, answer = self.hub.answer(self.command, path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        is_about_large_files = path.endswith("/objects/batch")
        self.send_header("Content-Type", f"application/{'vnd.git-lfs+json' if is_about_large_files else 'json'}")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/.+", path):
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.hub.revision(match[1]))
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_):
        pass
