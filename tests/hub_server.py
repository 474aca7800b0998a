"""A Hugging Face Hub on localhost, in memory: what `huggingface_hub` needs to create, push, list, download and delete,
and `datasets` to stream.

    with HubServer() as hub:
        subprocess.run(command, env=os.environ | hub.environment)  # the client reads HF_ENDPOINT when it is imported

A commit maps paths to blobs and a branch names a commit, so that a push becomes visible at once or not at all. A
repository of models has the name user/name here, one of data datasets/user/name.
"""

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


USER, TOKEN = "tester", "hf_token_of_the_tester"
WITHOUT_TOKEN = ("/lfs/", "/api/validate-yaml")  # upload links are signed, as far as the client knows
LARGE_FILE = re.compile(r"\.(safetensors|bin|pt|parquet)$")
REPOSITORY = r"(?P<repository>(?:datasets/)?[\w.-]+/[\w.-]+)"


class HubError(Exception):
    """An answer other than success, in the headers from which the client makes its exceptions."""

    def __init__(self, status: int, message: str, code: str = "", **fields):
        super().__init__(message)
        self.status, self.fields = status, {"error": message, **fields}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class Repository:
    def __init__(self):
        self.commits: dict[str, dict[str, str]] = {}  # commit id -> {path: blob id}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, str]) -> str:
        commit_id = hashlib.sha1(f"{len(self.commits)} {sorted(files.items())}".encode()).hexdigest()
        self.commits[commit_id] = files
        self.branches[branch] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str:
        commit_id = self.branches.get(revision, revision)
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit_id


class HubServer:
    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by SHA-256
        self.before_upload: Callable[[], None] = lambda: None  # called when a large file is about to arrive
        self.dies_after: float = math.inf  # bytes of content, in the middle of an answer if need be
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        stored = self.find(repository)
        return {path: self.blobs[blob] for path, blob in stored.commits[stored.resolve(revision)].items()}

    def find(self, repository: str) -> Repository:
        if repository not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repository]

    def store(self, content: bytes) -> str:
        blob = hashlib.sha256(content).hexdigest()
        self.blobs[blob] = content
        return blob


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass  # the tests' output is enough

    def _answer(self):
        if self.hub.dies_after <= 0:
            self.close_connection = True
            return None
        body = self._read_body()
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        try:
            token = self.headers.get("Authorization")
            if token not in (None, f"Bearer {TOKEN}"):
                raise HubError(401, "Invalid credentials in Authorization header")
            if method != "GET" and token is None and not path.startswith(WITHOUT_TOKEN):
                raise HubError(401, "Authentication is required to write")
            for route_method, pattern, handle in ROUTES:
                if route_method == method and (match := re.fullmatch(pattern, path)):
                    # matched before it is unquoted: the name of a branch may hold a slash
                    return handle(self, body, **{k: unquote(v) for k, v in match.groupdict(default="").items()})
            raise HubError(404, f"No route for {self.command} {path}")
        except HubError as error:
            self._send_json(error.fields, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _read_body(self) -> bytes:
        if self.path.startswith("/lfs/"):
            self.hub.before_upload()
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_content(self, content: bytes, status: int, headers: dict[str, str]):
        """Sends a part of a file, or what of it the hub lives to send."""
        if self.command == "HEAD" or len(content) <= self.hub.dies_after:
            self.hub.dies_after -= len(content) if self.command == "GET" else 0
            return self._send(content, status, headers)
        self._send(content[: int(self.hub.dies_after)], status, {**headers, "Content-Length": str(len(content))})
        self.hub.dies_after, self.close_connection = 0, True

    def _send_json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # account and repositories

    def whoami(self, body):
        self._send_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, body):
        self._send_json({"errors": [], "warnings": []})

    def create_repository(self, body):
        name = self._repository_name(body)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        self.hub.repositories[name] = Repository()
        self._send_json({"url": url})

    def delete_repository(self, body):
        name = self._repository_name(body)
        self.hub.find(name)
        del self.hub.repositories[name]
        self._send_json({})

    def _repository_name(self, body: bytes) -> str:
        fields = json.loads(body)
        kind = "datasets/" if fields.get("type") == "dataset" else ""
        return f"{kind}{fields.get('organization') or USER}/{fields['name']}"

    def create_branch(self, body, repository, branch):
        stored = self.hub.find(repository)
        if branch in stored.branches:
            raise HubError(409, "Reference already exists")
        stored.branches[branch] = stored.resolve(json.loads(body).get("startingPoint", "main"))
        self._send_json({})

    # reading

    def info(self, body, repository, revision="main"):
        stored = self.hub.find(repository)
        commit_id = stored.resolve(revision)
        siblings = [{"rfilename": path} for path in stored.commits[commit_id]]
        name = repository.removeprefix("datasets/")
        self._send_json({"id": name, "sha": commit_id, "private": False, "tags": [], "siblings": siblings})

    def refs(self, body, repository):
        branches = self.hub.find(repository).branches
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": head} for name, head in branches.items()]
        self._send_json({"branches": listed, "converts": [], "tags": []})

    def tree(self, body, repository, revision, folder):
        entries = self._entries(repository, revision)
        prefix = f"{folder}/" if folder else ""
        if folder and folder not in entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"]) == ["true"]
        inside = {path: entry for path, entry in entries.items() if path.startswith(prefix)}
        self._send_json([e for path, e in inside.items() if recursive or "/" not in path[len(prefix) :]])

    def paths_info(self, body, repository, revision):
        entries = self._entries(repository, revision)
        self._send_json([entries[path] for path in parse_qs(body.decode())["paths"] if path in entries])

    def _entries(self, repository: str, revision: str) -> dict[str, dict]:
        """The files and folders of a commit, by their paths."""
        stored = self.hub.find(repository)
        files = stored.commits[stored.resolve(revision)]
        folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
        return {path: {"type": "directory", "path": path, "oid": path} for path in sorted(folders)} | {
            path: {"type": "file", "path": path, "oid": blob, "size": len(self.hub.blobs[blob])}
            for path, blob in files.items()
        }

    def resolve_file(self, body, repository, revision, path):
        stored = self.hub.find(repository)
        commit_id = stored.resolve(revision)
        if path not in stored.commits[commit_id]:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = stored.commits[commit_id][path]
        content = self.hub.blobs[blob]
        headers = {"ETag": f'"{blob}"', "X-Repo-Commit": commit_id, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if first >= len(content):
                raise HubError(416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send_content(content[first : last + 1], 206, headers)
        self._send_content(content, 200, headers)

    # writing

    def preupload(self, body, repository, revision):
        self.hub.find(repository).resolve(revision)
        self._send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if LARGE_FILE.search(file["path"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def lfs_batch(self, body, repository):
        self.hub.find(repository)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, blob):
        if hashlib.sha256(body).hexdigest() != blob:
            raise HubError(400, "The content is not the one announced")
        self.hub.store(body)
        self._send(b"")

    def commit(self, body, repository, revision):
        stored = self.hub.find(repository)
        files = dict(stored.commits[stored.resolve(revision)])
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise HubError(400, f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        commit_id = stored.commit(revision, files)
        url = f"{self.hub.url}/{repository}/commit/{commit_id}"
        self._send_json({"success": True, "commitOid": commit_id, "commitUrl": url})


API = rf"/api/(?:models/|(?=datasets/)){REPOSITORY}"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repository),
    ("DELETE", "/api/repos/delete", _Handler.delete_repository),
    ("GET", API, _Handler.info),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"{API}/refs", _Handler.refs),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", _Handler.tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<blob>[0-9a-f]{64})", _Handler.lfs_upload),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve_file),
]
