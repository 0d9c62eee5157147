"""A hub of the tests' own on loopback: as much of one as huggingface_hub asks of it here."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t0kEn" * 6
READ_ONLY_TOKEN = "hf_" + "rEad0" * 6


class Repository:
    """Commits, a name and its files each, and the branches that point to them."""

    def __init__(self, files, private=False, gated=False, status=None):
        self.commits, self.branches = {}, {}
        self.private, self.gated, self.status = private, gated, status
        self.commit(files, "main")

    def commit(self, files, branch="main"):
        content = "".join(f"{name} {hashlib.sha1(files[name]).hexdigest()}" for name in files)
        sha = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision):
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self):
        return self.commits[self.branches["main"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    @property
    def repositories(self):
        return self.server.repositories

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do(self):
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path, token))
        if self.command == "POST":
            self.post(path, body, token)
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (found or file).group(1, 2)
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            # As the hub does it: it doesn't tell strangers what there is.
            status = 404 if token else 401
            self.answer(status, {"error": "no"}, X_Error_Code="RepoNotFound")
        elif repository.status:
            self.answer(repository.status, {"error": f"{token} is wrong"})
        elif repository.find(revision or "main") is None:
            self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        elif found:
            self.answer(200, self.info(name, repository, revision or "main"))
        elif repository.gated:
            self.answer(403, {"error": "no"}, X_Error_Code="GatedRepo")
        else:
            sha = repository.find(revision)
            content = repository.commits[sha].get(file[3])
            if content is None:
                self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            else:
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit=sha)

    do_GET = do_HEAD = do_POST = do

    def info(self, name, repository, revision):
        sha = repository.find(revision)
        siblings = [{"rfilename": file} for file in repository.commits[sha]]
        return {"id": name, "sha": sha, "siblings": siblings, "private": repository.private}

    def post(self, path, body, token):
        lines = [json.loads(line) for line in body.splitlines()] or [{}]
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif token != TOKEN:
            self.answer(403 if token == READ_ONLY_TOKEN else 401, {"error": f"{token} may not"})
        elif path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            is_new = name not in self.repositories
            if is_new:
                private = lines[0].get("visibility") == "private" or lines[0].get("private", False)
                self.repositories[name] = Repository({".gitattributes": b""}, private)
            self.answer(200 if is_new else 409, {"url": f"{self.server.address}/{name}"})
        else:
            name, what, branch = re.fullmatch(
                r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path
            ).groups()
            self.change(name, what, branch, lines)

    def change(self, name, what, branch, lines):
        repository = self.repositories[name]
        if what == "branch":
            is_new = branch not in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.answer(200 if is_new else 409, {})
        elif what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in lines[0]["files"]
            ]
            self.answer(200, {"files": files})
        else:
            files = dict(repository.commits[repository.branches[branch]])
            for line in lines[1:]:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    assert line["key"] == "deletedFile", line
                    del files[line["value"]["path"]]
            sha = repository.commit(files, branch)
            url = f"{self.server.address}/{name}/commit/{sha}"
            self.answer(200, {"commitUrl": url, "commitOid": sha})


class Hub:
    """The hub, running until ``stop``; its processes get ``environment``."""

    def __init__(self, home, token=TOKEN):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.repositories, self.server.requests = {}, []
        self.server.address = f"http://127.0.0.1:{self.server.server_port}"
        self.repositories, self.requests = self.server.repositories, self.server.requests
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.environment = {
            "HF_ENDPOINT": self.server.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, name, folder=None, files=(), **how):
        """Make a repository with a folder's files and others; return its commit."""
        content = {file.name: file.read_bytes() for file in folder.iterdir()} if folder else {}
        content |= {file: b"x" for file in files}
        self.repositories[name] = Repository({".gitattributes": b"", **content}, **how)
        return self.repositories[name].branches["main"]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
