"""A Hub of our own on the loopback: the real huggingface_hub client pushes to it and loads from it, without a network.

It speaks the part of the Hub's API that the client uses: who am I, repositories (private and gated too), branches,
tags and pull requests, file listings, commits, and downloads (small files straight, large ones over a redirect to
another host). Xet storage is switched off in the client, so weights go through the LFS endpoints.

    with HubServer() as hub:
        token = hub.add_user("alice")
        subprocess.run([...], env={**os.environ, **hub.environment("cache", token=token)})

In a test: `pytest_plugins = ["hub_server"]`, then the fixture `hub`, to which this process's client already points.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, file_download, hf_api, repocard
from huggingface_hub.utils import get_session

try:
    from huggingface_hub.utils import close_session
except ImportError:  # huggingface_hub 0
    from huggingface_hub.utils._http import reset_sessions as close_session

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class Repo:
    """One model repository: its commits, and what branches, tags and pull requests point to."""

    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """Returns the commit that a branch, tag, pull request or commit id names, or None."""
        refs = {**self.pulls, **self.tags, **self.branches}
        return refs.get(revision, revision if revision in self.commits else None)

    def add_commit(self, files: Mapping[str, bytes]) -> str:
        """Keeps a commit with exactly these files and returns its id."""
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def point(self, revision: str, sha: str) -> None:
        """Moves a branch or pull request to a commit."""
        (self.pulls if revision.startswith("refs/pr/") else self.branches)[revision] = sha


class HubError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body, self.commit = status, message, code, body, None
        self.headers: dict[str, str] = {}


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        repos: Repositories by id.
        requests: What was asked so far, as "METHOD path".
        fault: Called with each "METHOD path"; an error that it returns is the answer, `ConnectionResetError` hangs up.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.fault: Callable[[str], Exception | None] = lambda _: None
        self.large_files: dict[str, bytes] = {}
        self.users: dict[str, str] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stops answering; a second call does nothing."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    @property
    def url(self) -> str:
        """The endpoint, without a slash at the end."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def storage_url(self) -> str:
        """Where large files lie: to the client another host, which must never see a token."""
        return f"http://localhost:{self._http.server_port}/storage"

    def environment(self, home: str | Path, *, token: str | None = None) -> dict[str, str]:
        """Returns the environment variables with which another process has this for its Hub."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def take_client(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Makes this the Hub of the running process, with a cache and a token file of its own."""
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "agents.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value, raising=False)  # older releases lack some
            if hasattr(file_download, name):  # or import it by name
                monkeypatch.setattr(file_download, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        if hasattr(repocard, "requests"):  # huggingface_hub 0 checks a card at a fixed address, by a form

            def post(_: str, body: Any, headers: Any) -> Any:
                return get_session().post(f"{self.url}/api/validate-yaml", json=body, headers=headers)

            monkeypatch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=post))
        close_session()

    def add_user(self, name: str) -> str:
        """Makes an account and returns its token, which may write in the namespace of that name."""
        token = f"hf_{name}"
        self.users[token] = name
        return token

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Makes a repository with these files and returns its first commit."""
        repo = self.repos[repo_id] = Repo(private=private, gated=gated, readers={repo_id.split("/")[0]})
        content = {path: text.encode() if isinstance(text, str) else text for path, text in (files or {}).items()}
        sha = repo.add_commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", **content})
        repo.point("main", sha)
        return sha

    def commit(self, repo_id: str, files: Mapping[str, bytes | None], revision: str = "main") -> str:
        """Adds, replaces and (None) removes files in a branch, and returns the commit."""
        repo = self.repos[repo_id]
        tree = {**repo.commits[str(repo.find(revision))], **files}
        sha = repo.add_commit({path: content for path, content in tree.items() if content is not None})
        repo.point(revision, sha)
        return sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Returns what a revision holds, the `.gitattributes` of every repository left out."""
        repo = self.repos[repo_id]
        tree = repo.commits[str(repo.find(revision))]
        return {path: content for path, content in tree.items() if path != ".gitattributes"}


class _Handler(BaseHTTPRequestHandler):
    """One request: `route` returns (status, headers, body) or raises HubError."""

    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            fault = self.hub.fault(f"{self.command} {unquote(self.path)}")
            if isinstance(fault, ConnectionResetError):
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            if fault is not None:
                raise fault
            status, headers, content = self._route(body)
        except HubError as error:
            status, content = error.status, json.dumps({"error": error.message, **error.body}).encode()
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json"}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
            headers |= error.headers
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match parts:
            case ["storage", oid]:
                return self._storage(oid, body)
            case [namespace, name, "resolve", revision, *path]:
                return self._resolve(f"{namespace}/{name}", revision, "/".join(path))
            case [namespace, name, "info", "lfs", "objects", "batch"]:
                return _json(self._lfs_batch(f"{namespace}/{name.removesuffix('.git')}", json.loads(body)))
            case ["api", "whoami-v2"]:
                return _json({"type": "user", "name": self._must_be_user(), "orgs": []})
            case ["api", "validate-yaml"]:
                return _json(_validated(json.loads(body)["content"]))
            case ["api", "repos", "create"]:
                return _json(self._create(json.loads(body)))
            case ["api", "models", namespace, name, *rest]:
                return _json(self._model(f"{namespace}/{name}", rest, query, body))
        raise HubError(404, f"no such endpoint: {self.command} {url.path}")

    def _model(self, repo_id: str, rest: list[str], query: Mapping[str, str], body: bytes) -> Any:
        repo = self._readable(repo_id)
        match self.command, rest:
            case "GET", []:
                return self._info(repo_id, repo, "main")
            case "GET", ["revision", revision]:
                return self._info(repo_id, repo, revision)
            case "GET", ["auth-check", "write"]:
                self._must_write(repo_id)
                return {}
            case "GET", ["refs"]:
                return _refs(repo)
            case "GET", ["tree", revision, *folder]:
                tree = repo.commits[_must_find(repo, revision)]
                return _listing(tree, "/".join(folder), recursive=query.get("recursive", "").lower() == "true")
            case "POST", ["branch", branch]:
                self._must_write(repo_id)
                return self._new_ref(repo, repo.branches, branch, json.loads(body).get("startingPoint", "main"))
            case "POST", ["tag", revision]:
                self._must_write(repo_id)
                return self._new_ref(repo, repo.tags, json.loads(body)["tag"], revision)
            case "POST", ["preupload", revision]:
                self._must_be_user()
                tree = repo.commits[_must_find(repo, revision)]
                return {"files": [_upload_mode(tree, file["path"]) for file in json.loads(body)["files"]]}
            case "POST", ["commit", revision]:
                return self._commit(repo_id, repo, revision, body, pull="create_pr" in query)
        raise HubError(404, f"no such endpoint: {self.command} {'/'.join(rest)}")

    def _user(self) -> str | None:
        """Returns who asks, None for nobody."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        if scheme != "Bearer" or token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _must_be_user(self) -> str:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def _must_write(self, repo_id: str) -> None:
        if self._must_be_user() != repo_id.split("/")[0]:
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def _readable(self, repo_id: str) -> Repo:
        """Returns a repository that whoever asks may know of."""
        user, repo = self._user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user not in repo.readers):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _create(self, wanted: Mapping[str, Any]) -> Any:
        user = self._must_be_user()
        namespace = wanted.get("organization") or user
        repo_id = f"{namespace}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if namespace != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace}")
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", **url)
        self.hub.add_repo(repo_id, private=wanted.get("private") or wanted.get("visibility") == "private")
        return {**url, "name": repo_id}

    def _info(self, repo_id: str, repo: Repo, revision: str) -> Any:
        sha = _must_find(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        gated = "manual" if repo.gated else False
        return {"id": repo_id, "sha": sha, "private": repo.private, "gated": gated, "tags": [], "siblings": siblings}

    def _new_ref(self, repo: Repo, refs: dict[str, str], name: str, start: str) -> Any:
        if name in refs:
            raise HubError(409, f"Reference {name} already exists")
        refs[name] = _must_find(repo, start)
        return {}

    def _commit(self, repo_id: str, repo: Repo, revision: str, body: bytes, *, pull: bool) -> Any:
        if pull:
            self._must_be_user()
        else:
            self._must_write(repo_id)
        tree = dict(repo.commits[_must_find(repo, revision)])
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HubError(400, f"the content of {value['path']} was never uploaded")
                tree[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        sha = repo.add_commit(tree)
        number = len(repo.pulls) + 1
        repo.point(f"refs/pr/{number}" if pull else revision, sha)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        return {**answer, "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"} if pull else answer

    def _lfs_batch(self, repo_id: str, wanted: Mapping[str, Any]) -> Any:
        self._readable(repo_id)
        self._must_be_user()
        objects = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage_url}/{item['oid']}"}}
            known = item["oid"] in self.hub.large_files
            objects.append({**item, **({} if known else {"actions": upload})})
        return {"transfer": "basic", "objects": objects}

    def _storage(self, oid: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to the storage host")
        if self.command != "PUT":
            return 200, {"ETag": f'"{oid}"'}, self.hub.large_files[oid]
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the content does not match its sha256")
        self.hub.large_files[oid] = body
        return 200, {}, b""

    def _resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._readable(repo_id)
        user = self._user()
        if repo.gated and user not in repo.readers:
            raise HubError(401 if user is None else 403, f"Access to model {repo_id} is restricted.", "GatedRepo")
        sha = _must_find(repo, revision)
        content = repo.commits[sha].get(path)
        if content is None:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.commit = sha
            raise error
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(path, content)}"'}
        if not path.endswith(LFS_SUFFIXES):
            return 200, headers, content
        oid = _oid(path, content)
        self.hub.large_files[oid] = content
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
        return 302, {**headers, **linked, "Location": f"{self.hub.storage_url}/{oid}"}, b""


def _json(answer: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def _must_find(repo: Repo, revision: str) -> str:
    sha = repo.find(revision)
    if sha is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return sha


def _oid(path: str, content: bytes) -> str:
    """Returns the id of a file's content: sha256 in large file storage, git's sha1 otherwise."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _upload_mode(tree: Mapping[str, bytes], path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
    known = {"oid": _oid(path, tree[path])} if path in tree else {}
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}


def _listing(tree: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(tree.items()):
        if folder and not path.startswith(folder + "/"):
            continue
        parents = [str(parent) for parent in PurePosixPath(path).parents][:-1]
        for parent in reversed([parent for parent in parents if len(parent) > len(folder)]):
            entries.setdefault(parent, {"type": "directory", "path": parent, "size": 0, "oid": _oid(parent, b"")})
        entry = {"type": "file", "path": path, "size": len(content), "oid": _oid("", content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 128}
        entries[path] = entry
    depth = len(PurePosixPath(folder).parts) + 1
    return [entry for path, entry in entries.items() if recursive or len(PurePosixPath(path).parts) == depth]


def _refs(repo: Repo) -> dict[str, Any]:
    def listed(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

    return {
        "branches": listed(repo.branches, "refs/heads/"),
        "tags": listed(repo.tags, "refs/tags/"),
        "pullRequests": listed(repo.pulls, ""),
        "converts": [],
    }


def _validated(card: str) -> dict[str, Any]:
    """The Hub's check of a card's metadata: it wants some, and a base model that is a repository."""
    found = _FRONT_MATTER.match(card)
    metadata = yaml.safe_load(found[1]) if found else None
    if not metadata:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    bases = metadata.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not _REPO_ID.fullmatch(base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            raise HubError(400, message, errors=[{"message": message}], warnings=[])
    return {"errors": [], "warnings": []}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the user alice, to which this process's client points; its cache starts empty."""
    # The client's own warning, when it uploads to large file storage.
    warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)
    with HubServer() as server:
        server.add_user("alice")
        server.take_client(monkeypatch, tmp_path / "hf_home")
        yield server
        close_session()
