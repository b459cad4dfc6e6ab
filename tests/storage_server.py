"""A bucket of Google's storage on this machine: what gcsfs and tensorstore use of its interface.

With what checkpoints rely on, and other emulators leave out: every object has a generation, and writes,
reads and deletions can be made to depend on it.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>.+?)")
_LIST = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/?")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/?")
_UPLOAD = re.compile(r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o/?")
_COPY = re.compile(_OBJECT.pattern + r"/(?P<how>rewriteTo/b/[^/]+|moveTo)/o/(?P<as>.+)")


class Failed(Exception):
    """An HTTP status."""


class Store:
    """Objects by name, each with its generation."""

    def __init__(self):
        self._objects, self._sessions, self._lock = {}, {}, threading.RLock()
        self._numbers = itertools.count(1_700_000_000_000_001)

    def read(self, name, query):
        with self._lock:
            if name not in self._objects:
                raise Failed(404)
            data, generation = self._objects[name]
            self._require(name, query)
            if query.get("ifGenerationNotMatch") == str(generation):
                raise Failed(304)
            return data, generation

    def write(self, name, data, query):
        with self._lock:
            self._require(name, query)
            self._objects[name] = bytes(data), next(self._numbers)
            return self.describe(name)

    def delete(self, name, query):
        with self._lock:
            self.read(name, query)
            del self._objects[name]

    def names(self, prefix):
        with self._lock:
            return sorted(name for name in self._objects if name.startswith(prefix))

    def describe(self, name):
        with self._lock:
            data, generation = self._objects[name]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": digest,
            "etag": digest,
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def begin(self, name, query):
        with self._lock:
            number = str(next(self._numbers))
            self._sessions[number] = name, query, bytearray()
            return number

    def go_on(self, number, data, is_last):
        """The object when it is whole, or how much there is."""
        with self._lock:
            name, query, so_far = self._sessions[number]
            so_far += data
            return self.write(name, so_far, query) if is_last else len(so_far)

    def _require(self, name, query):
        found = self._objects[name][1] if name in self._objects else 0
        if query.get("ifGenerationMatch", str(found)) != str(found):
            raise Failed(412)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits for the other side
    store: Store

    def log_message(self, *_):
        pass

    def handle_one_method(self):
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        try:
            getattr(self, f"on_{self.command.lower()}")(url.path, query, body)
        except Failed as error:
            self.reply(error.args[0])

    do_GET = do_POST = do_PUT = do_DELETE = handle_one_method

    def reply(self, status, body=b"", **headers):
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def on_get(self, path, query, _):
        if match := _OBJECT.fullmatch(path):
            name = unquote(match["name"])
            data, generation = self.store.read(name, query)
            if query.get("alt") != "media":
                return self.reply(200, self.store.describe(name))
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
            if not wanted:
                return self.reply(200, data, x_goog_generation=generation)
            first, last = wanted.groups()
            start, end = int(first or 0), int(last) + 1 if last and first else len(data)
            if not first:
                start = max(0, len(data) - int(last))
            if start >= len(data):
                raise Failed(416)
            part = data[start:end]
            place = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
            return self.reply(206, part, x_goog_generation=generation, Content_Range=place)
        if _LIST.fullmatch(path):
            return self.reply(200, self.listed(query.get("prefix", ""), query.get("delimiter")))
        if match := _BUCKET.fullmatch(path):
            if match["bucket"] != "bucket":
                raise Failed(404)
            return self.reply(200, {"kind": "storage#bucket", "name": "bucket"})
        raise Failed(404)

    def listed(self, prefix, delimiter):
        items, folders = [], set()
        for name in self.store.names(prefix):
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.store.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def on_post(self, path, query, body):
        if _UPLOAD.fullmatch(path):
            return self.upload(query, body)
        if path.startswith("/session/"):  # gcsfs goes on by POST
            return self.on_put(path, query, body)
        if match := _COPY.fullmatch(path):
            data, _ = self.store.read(unquote(match["name"]), {})
            made = self.store.write(unquote(match["as"]), data, query)
            if match["how"] == "moveTo":
                self.store.delete(unquote(match["name"]), {})
                return self.reply(200, made)
            return self.reply(200, {"done": True, "resource": made})
        raise Failed(404)

    def upload(self, query, body):
        kind, name = query["uploadType"], query.get("name")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
            _, described, sent, _ = body.split(b"--" + boundary.encode())
            name = name or json.loads(described.partition(b"\n\n")[2])["name"]
            data = sent.partition(b"\n\n")[2].removesuffix(b"\n")
            return self.reply(200, self.store.write(name, data, query))
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            host = self.headers["Host"]
            return self.reply(200, Location=f"http://{host}/session/{self.store.begin(name, query)}")
        return self.reply(200, self.store.write(name, body, query))

    def on_put(self, path, _, body):
        number = path.rpartition("/")[2]
        place = self.headers.get("Content-Range", "")
        is_last = not place.endswith("/*")
        found = self.store.go_on(number, body, is_last)
        if is_last:
            return self.reply(200, found)
        return self.reply(308, **({"Range": f"bytes=0-{found - 1}"} if found else {}))

    def on_delete(self, path, query, _):
        self.store.delete(unquote(_OBJECT.fullmatch(path)["name"]), query)
        self.reply(204)


@contextmanager
def storage_server():
    """Serves `gs://bucket`, empty; yields the environment that leads programs to it."""
    handler = type("Handler", (_Handler,), {"store": Store()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
            "EPATH_USE_TF": "0",
        }
    finally:
        server.shutdown()
        server.server_close()
