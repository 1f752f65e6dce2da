"""A Hugging Face Hub on the loopback address: folders of files behind the Hub's links."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves root/user/repository/file as user/repository/resolve/REVISION/file; data sets stand
    below datasets/, as on the Hub.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, str]] = []  # (path, range) of each GET
        self.ranges = True  # whether it knows them
        self.most = 1 << 40  # bytes of an answer, after which the connection ends

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        repository, _, rest = self.path.partition("/resolve/")
        path = self.server.root / repository.strip("/") / rest.partition("/")[2]
        data = path.read_bytes() if path.is_file() else None
        wanted = self.headers.get("Range") if self.server.ranges else None
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        status = 404 if data is None else 200
        if data is not None and wanted:
            status = 206 if start < len(data) else 416
        body = (data or b"")[start:]
        self.send_response(status)
        if status == 404:
            kind = "EntryNotFound" if path.parent.is_dir() else "RepoNotFound"
            self.send_header("X-Error-Code", kind)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: self.server.most])
            self.close_connection = len(body) > self.server.most

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_at(root: Path) -> Iterator[Hub]:
    """A hub over a folder, as long as it is needed."""
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
