"""A small Hugging Face Hub on the loopback interface: enough of its HTTP interface to download, to push and to list.

Repositories live in memory. Clients are pointed at it by `HF_ENDPOINT`, which `huggingface_hub` reads when it is imported:
they run in processes of their own (`run_code`).
"""

import base64
import hashlib
import importlib
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TextIO
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
from huggingface_hub import ModelCard


TOKEN = "hf_token_of_the_tests"
ROOT = Path(__file__).parent.parent

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, and the commits that branches and tags point to."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    downloads: int = 0
    last_modified: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def files(self) -> Files:
        """What is on the main branch."""
        return self.commits[self.refs["main"]]

    def tags(self) -> list[str]:
        """What the Hub makes of the model card's metadata."""
        data = ModelCard(self.files["README.md"].decode()).data if "README.md" in self.files else ModelCard("").data
        models = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
        tags = [data.library_name, *(data.tags or []), *(f"base_model:{model}" for model in models)]
        tags += [f"base_model:{data.get('base_model_relation', 'finetune')}:{model}" for model in models]
        return [tag for tag in [*tags, data.license and f"license:{data.license}", "region:us"] if tag]

    def commit(self, files: Files, ref: str = "main") -> str:
        content = json.dumps([len(self.commits), sorted((path, blob_id(data)) for path, data in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.last_modified = datetime.now(timezone.utc)
        return sha


def blob_id(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server, with its repositories by name, the paths that were asked for, and those that fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        # Paths, as regular expressions, that are answered with an error; with status 0 the connection is closed.
        self.failing: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add_folder(self, repo_id: str, folder: Path, ref: str = "main", private: bool = False) -> str:
        """Commits the files of a folder and returns the commit's hash."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.repositories.setdefault(repo_id, Repository(private)).commit(files, ref)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers as long as the context lasts."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def client_environment(url: str, home: Path, **settings: str) -> dict[str, str]:
    """The environment of a process that takes the server for the Hub and has its cache in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    defaults = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]),
    }
    return kept | defaults | settings


def run_code(hub: Hub, home: Path, code: str, **settings: str) -> dict[str, Any]:
    """Runs code in a client; what it puts into the dictionary `answers` comes back, with its messages as `"stderr"`.

    The client is a copy of this process, which saves it the imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers, messages = Path(folder, "answers"), Path(folder, "messages")
        process = os.fork()
        if process == 0:
            status = 1
            with messages.open("w") as stream:
                try:
                    _become_client(client_environment(hub.url, home, **settings), stream)
                    os.chdir(home.parent)
                    names: dict[str, Any] = {"answers": {}}
                    exec(code, names)
                    answers.write_text(json.dumps(names["answers"]))
                    status = 0
                except BaseException:
                    traceback.print_exc(file=stream)
                finally:
                    stream.flush()
                    os._exit(status)
        _, status = os.waitpid(process, 0)
        assert status == 0, messages.read_text()
        return json.loads(answers.read_text()) | {"stderr": messages.read_text()}


def _become_client(environment: dict[str, str], stream: TextIO) -> None:
    """Lets this process be what it would be if it had been started with an environment, and write its messages to a stream."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout = sys.stderr = stream
    for name in ("diffusers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(stream)
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


class _Refused(Exception):
    """An answer with an error code of the Hub's."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which holds an answer back until its header was acknowledged
    server: Hub

    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", r"/api/models", "list_models"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write", "check_write"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, unquote(path)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        status = next((status for failing, status in self.server.failing.items() if re.fullmatch(failing, path)), None)
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            self.answer_json({"error": "fails in this test"}, status)
            return
        try:
            for route_method, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if match and route_method == method:
                    getattr(self, name)(*map(unquote, match.groups()))
                    return
            raise _Refused(404, "UnknownRoute")
        except _Refused as refused:
            self.answer_json({"error": refused.code}, refused.status, {"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str) -> Repository:
        """As the Hub does, a private repository is hidden from those who may not see it."""
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.authorized):
            raise _Refused(404 if self.authorized else 401, "RepoNotFound")
        return repository

    def revision(self, repo_id: str, revision: str) -> tuple[str, Files]:
        repository = self.repository(repo_id)
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def info(self, repo_id: str, revision: str = "main") -> None:
        sha, files = self.revision(repo_id, revision)
        private = self.server.repositories[repo_id].private
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer_json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": private, "siblings": siblings})

    def list_models(self) -> None:
        """Repositories that have all tags of `filter`; of each the fields that `expand` asks for."""
        query = parse_qs(urlsplit(self.path).query)
        visible = {
            name: repo for name, repo in self.server.repositories.items() if not repo.private or self.authorized
        }
        found = [
            {
                "id": name,
                "tags": repo.tags(),
                "downloads": repo.downloads,
                "lastModified": repo.last_modified.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            }
            for name, repo in visible.items()
            if set(query.get("filter", [])) <= set(repo.tags())
            and query.get("author", [name.split("/")[0]]) == [name.split("/")[0]]
        ]
        assert query["sort"] == ["downloads"]
        found.sort(key=lambda model: -model["downloads"])
        fields = {"id", *query["expand"]}
        limit = int(query.get("limit", ["1000"])[0])
        self.answer_json([{key: model[key] for key in fields} for model in found[:limit]])

    def tree(self, repo_id: str, revision: str) -> None:
        _, files = self.revision(repo_id, revision)
        self.answer_json(
            [{"type": "file", "path": p, "size": len(data), "oid": blob_id(data)} for p, data in sorted(files.items())]
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self.revision(repo_id, revision)
        if path not in files:
            headers = {"X-Repo-Commit": sha, "X-Error-Code": "EntryNotFound"}
            self.answer(b"Entry not found", 404, headers)
            return
        self.repository(repo_id).downloads += self.command == "GET"
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(files[path])}"', "X-Linked-Size": str(len(files[path]))}
        self.answer(files[path], 200, headers)

    def require_token(self) -> None:
        if not self.authorized:
            raise _Refused(401, "Unauthorized")

    def check_write(self, repo_id: str) -> None:
        self.require_token()
        self.repository(repo_id)
        self.answer_json({})

    def create(self) -> None:
        self.require_token()
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
        if repo_id in self.server.repositories:
            self.answer_json({"error": "exists", "url": f"{self.server.url}/{repo_id}"}, 409)
            return
        repository = self.server.repositories[repo_id] = Repository(
            request.get("private") or request.get("visibility") == "private"
        )
        repository.commit({".gitattributes": b""})
        self.answer_json({"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def validate_card(self) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        """Small files travel inside the commit."""
        self.require_token()
        self.revision(repo_id, revision)
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self.answer_json({"files": files})

    def commit(self, repo_id: str, revision: str) -> None:
        self.require_token()
        _, files = self.revision(repo_id, revision)
        files = dict(files)
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert operation["key"] == "header"
        sha = self.server.repositories[repo_id].commit(files, revision)
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
