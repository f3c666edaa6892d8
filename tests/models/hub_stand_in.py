"""A hub on loopback: the few addresses that huggingface_hub asks for files of a model."""

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "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"


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(n.encode() + files[n] for n in sorted(files))).hexdigest()


@dataclasses.dataclass
class Repository:
    """Files by commit, commits by branch or tag, and who may read them."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    card: dict = dataclasses.field(default_factory=lambda: {"license": "apache-2.0"})
    token: str | None = None
    gated: bool = False

    def put(self, files: dict[str, bytes], *revisions: str) -> str:
        commit = commit_of(files)
        self.commits[commit] = dict(files)
        self.revisions |= dict.fromkeys(revisions or ("main",), commit)
        return commit


class Hub:
    """`with Hub() as hub`: serves `hub.repositories` at `hub.address`, and notes every request in
    `hub.requests`.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut = 0  # so many answers to GET of a file end in the middle
        self.altered = 0  # so many answers to GET of a file have a flipped bit
        self.down = False  # answers 503 to everything

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, "GET")

            def do_HEAD(self):
                hub.answer(self, "HEAD")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self) -> list[str]:
        """Files whose bytes were asked for."""
        return [
            path.split("/")[-1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def asked(self) -> set[str]:
        """Files that were asked for, those included that turned out to be in the cache."""
        return {path.split("/")[-1] for _, path in self.requests if "/resolve/" in path}

    def answer(self, request, method):
        path = urllib.parse.unquote(urllib.parse.urlparse(request.path).path)
        self.requests.append((method, path))
        if self.down:
            return self.refuse(request, 503, "", "down")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|(tree))/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if not found:
            return self.refuse(request, 404, "", "no such address")
        repository = self.repositories.get(found[1])
        given = request.headers.get("Authorization")
        if given and given != f"Bearer {TOKEN}":
            return self.refuse(request, 401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.token and not repository.gated and not given):
            return self.refuse(
                request, 404 if given else 401, "RepoNotFound", "Repository not found"
            )
        if file and repository.gated and not given:
            return self.refuse(request, 403, "GatedRepo", "Access to this model is restricted")
        revision = found[2] if file else found[3] or "main"
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(request, 404, "RevisionNotFound", "Invalid rev id")
        files = repository.commits[commit]
        if api:
            facts = self.facts(found[1], repository, commit)
            if found[2]:
                facts = [
                    {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]}
                    | ({"lfs": s["lfs"] | {"oid": s["lfs"]["sha256"]}} if "lfs" in s else {})
                    for s in facts["siblings"]
                ]
            return self.send(request, method, json.dumps(facts).encode(), {})
        if file[3] not in files:
            return self.refuse(request, 404, "EntryNotFound", "Entry not found")
        body = files[file[3]]
        digest = hashlib.sha256(body).hexdigest()
        return self.send(
            request, method, body, {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}, file=True
        )

    def facts(self, name, repository, commit):
        siblings = []
        for file, body in repository.commits[commit].items():
            facts = {
                "rfilename": file,
                "size": len(body),
                "blobId": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(),
            }
            if not file.endswith((".json", ".yaml", ".md", ".gitattributes")):
                facts["lfs"] = {
                    "sha256": hashlib.sha256(body).hexdigest(),
                    "size": len(body),
                    "pointerSize": 130,
                }
            siblings.append(facts)
        facts = {"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        return facts | ({"cardData": repository.card} if repository.card else {})

    def send(self, request, method, body, headers, file=False):
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if wanted:
            start = int(wanted[1])
        request.send_response(206 if wanted else 200)
        for name, value in headers.items():
            request.send_header(name, value)
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        if method == "HEAD":
            return
        part = body[start:]
        if file and self.altered:
            self.altered -= 1
            part = part[:-1] + bytes([part[-1] ^ 1])
        if file and self.cut:
            self.cut -= 1
            part = part[: len(part) // 2]
            request.close_connection = True
        with contextlib.suppress(ConnectionError):
            request.wfile.write(part)
            request.wfile.flush()

    def refuse(self, request, status, code, message):
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()
