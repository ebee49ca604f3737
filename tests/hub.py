"""A small ModelScope hub on loopback: what the real client downloads from in the tests."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit


class Fetch(NamedTuple):
    """One request for the content of a file."""

    file: str
    start: int  # the first byte asked for: not 0 when a download goes on where an earlier one ended


class Stall:
    """A file of which only the first bytes are sent until `released`."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.reached = threading.Event()
        self.released = threading.Event()


class Hub:
    """Serves the files of one directory as one model, to clients whose `MODELSCOPE_ENDPOINT` is `url`."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self.fetches: list[Fetch] = []  # in the order in which they arrived
        self.listings = 0  # how often a client asked what there is
        self.revisions: set[str] = set()  # of the listings and files asked for
        self.wrong: dict[str, bytes] = {}  # what is sent in place of a file's content
        self.cuts: dict[str, int] = {}  # after how many bytes the next answer for a file breaks off
        self._stalls: dict[str, Stall] = {}
        self._files = {path.name: path for path in sorted(directory.iterdir())}
        self._route = f"/api/v1/models/{model_id}/repo"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def starts(self, file: str) -> list[int]:
        """The first byte of each request for the file."""
        return [fetch.start for fetch in self.fetches if fetch.file == file]

    def stall(self, file: str, at: int) -> Stall:
        self._stalls[file] = Stall(at)
        return self._stalls[file]

    def stop(self) -> None:
        """From here on the hub's address is a closed port."""
        for stall in self._stalls.values():
            stall.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def listing(self) -> bytes:
        """What the hub says of its files, true whatever it then sends."""
        entries = [
            {
                "Path": name,
                "Name": name,
                "Type": "blob",
                "Size": path.stat().st_size,
                "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for name, path in self._files.items()
        ]
        return json.dumps({"Code": 200, "Data": {"Files": entries}}).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(ConnectionError):  # the client may be gone: tests kill it
                    self._answer()

            def _answer(self) -> None:
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                if url.path.startswith(hub._route):
                    hub.revisions.add(query["Revision"])
                if url.path == f"{hub._route}/files":
                    hub.listings += 1
                    self._send(200, hub.listing())
                elif url.path == hub._route and query.get("FilePath") in hub._files:
                    asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                    self._send_file(Fetch(query["FilePath"], int(asked[1]) if asked else 0))
                else:
                    self._send(404, b'{"Code": 404, "Message": "not found"}')

            def _send_file(self, fetch: Fetch) -> None:
                hub.fetches.append(fetch)
                content = hub.wrong.get(fetch.file) or hub._files[fetch.file].read_bytes()
                end = len(content)
                until = min(hub.cuts.pop(fetch.file, end), end)
                self.send_response(206 if fetch.start else 200)
                if fetch.start:
                    self.send_header("Content-Range", f"bytes {fetch.start}-{end - 1}/{end}")
                self.send_header("Content-Length", str(end - fetch.start))
                self.end_headers()
                position = fetch.start
                if (stall := hub._stalls.get(fetch.file)) and position < stall.at:
                    self.wfile.write(content[position : stall.at])
                    position = stall.at
                    stall.reached.set()
                    stall.released.wait()
                self.wfile.write(content[position:until])

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Keep the tests' output to the tests."""

        return Handler


@contextmanager
def serve_hub(directory: Path, model_id: str) -> Iterator[Hub]:
    hub = Hub(directory, model_id)
    try:
        yield hub
    finally:
        hub.stop()
