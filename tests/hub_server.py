"""A local server that speaks as much of the Hub's protocol as a download needs."""

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
_INFO = re.compile(r"^/api/models/([^/]+/[^/]+)(/revision/[^/]+)?$")


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

        def log_message(self, *_args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            log.append(f"{self.command} {self.path}")
            headers = {"X-Repo-Commit": COMMIT}
            if match := _INFO.match(self.path):
                content = json.dumps({"id": match[1], "sha": COMMIT, "siblings": []}).encode()
                status = 200 if (root / match[1]).is_dir() else 404
                headers |= {} if status == 200 else {"X-Error-Code": "RepoNotFound"}
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
