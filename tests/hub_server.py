"""A local server that speaks as much of the Hub's protocol as a download and a small upload need."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"^/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_INFO = re.compile(r"^/api/models/([^/]+/[^/]+)(/revision/[^/?]+)?(\?.*)?$")
_TREE = re.compile(r"^/api/models/([^/]+/[^/]+)/tree/[^/?]+(\?.*)?$")
_UPLOAD = re.compile(r"^/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)(\?.*)?$")


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves root/owner/name/… as repositories. Yields the address and the log of requests."""
    log: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_POST(self) -> None:
            log.append(f"{self.command} {self.path}")
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                sent = b"".join(iter(self._chunk, b""))
            else:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(sent)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                (root / name).mkdir(parents=True, exist_ok=True)
                answer = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
            elif match := _UPLOAD.match(self.path):
                url = f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}"
                answer = _preupload(sent) if match[2] == "preupload" else _commit(root / match[1], sent, url)
            else:
                answer = {}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def log_message(self, *_args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            log.append(f"{self.command} {self.path}")
            asked = match[2] if (match := _RESOLVE.match(self.path)) else ""
            headers = {"X-Repo-Commit": asked if re.fullmatch("[0-9a-f]{40}", asked) else COMMIT}
            if self.path == "/api/whoami-v2":
                status, content = 200, b'{"type": "user", "name": "me"}'
            elif match := _INFO.match(self.path):
                status = 200 if (root / match[1]).is_dir() else 404
                files = [{"rfilename": name} for name in _files(root / match[1])]
                content = json.dumps({"id": match[1], "sha": COMMIT, "siblings": files}).encode()
                headers |= {} if status == 200 else {"X-Error-Code": "RepoNotFound"}
            elif (match := _TREE.match(self.path)) and (root / match[1]).is_dir():
                status, content = 200, json.dumps(_tree(root / match[1])).encode()
            elif asked == "nowhere":
                status, content = 404, b""
                headers["X-Error-Code"] = "RevisionNotFound"
            elif (match := _RESOLVE.match(self.path)) and (root / match[1]).is_dir():
                file = root / match[1] / match[3]
                status = 200 if file.is_file() else 404
                content = file.read_bytes() if file.is_file() else b""
                headers |= (
                    {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                    if status == 200
                    else {"X-Error-Code": "EntryNotFound"}
                )
            else:
                status, content = 404, b""
                headers["X-Error-Code"] = "RepoNotFound"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _tree(folder: Path) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
        for name in _files(folder)
    ]


def _preupload(sent: bytes) -> dict:
    """Every file comes inside the commit itself."""
    files = json.loads(sent)["files"]
    return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}


def _commit(folder: Path, sent: bytes, url: str) -> dict:
    for line in map(json.loads, sent.splitlines()):
        if line["key"] == "file":
            path = folder / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(line["value"]["content"]))
    return {"commitUrl": url, "commitOid": COMMIT}
