"""A small ModelScope hub on loopback: what the real client downloads from in the tests."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Stall:
    """A file of which only the first bytes are sent until `released`."""

    def __init__(self, at: int) -> None:
        self.at, self.reached, self.released = at, threading.Event(), threading.Event()


class Hub:
    """Serves the files of one directory as one model, to clients whose `MODELSCOPE_ENDPOINT` is `url`."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self.files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
        self.route = f"/api/v1/models/{model_id}/repo"
        self.listings = 0  # how often a client asked what there is
        self.fetches: list[tuple[str, int]] = []  # file and first byte asked for, in the order in which they arrived
        self.revisions: set[str] = set()  # of the listings and files asked for
        self.wrong: dict[str, bytes] = {}  # what is sent in place of a file's content
        self.cuts: dict[str, int] = {}  # after how many bytes the next answer for a file breaks off
        self.stalls: dict[str, Stall] = {}
        self.url = ""

    def fetched(self) -> list[str]:
        return [file for file, _ in self.fetches]

    def starts(self, file: str) -> list[int]:
        """The first byte of each request for the file: not 0 when a download goes on where an earlier one ended."""
        return [start for name, start in self.fetches if name == file]

    def listing(self) -> bytes:
        """What the hub says of its files, true whatever it then sends."""
        entries = [
            {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.files.items()
        ]
        return json.dumps({"Code": 200, "Data": {"Files": entries}}).encode()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with contextlib.suppress(ConnectionError):  # the client may be gone: tests kill it
            self.hub.revisions |= {query[name] for name in query if name == "Revision"}
            if url.path == f"{self.hub.route}/files":
                self.hub.listings += 1
                self.start(self.hub.listing())
                self.wfile.write(self.hub.listing())
            elif url.path == self.hub.route and query.get("FilePath") in self.hub.files:
                self.send_file(query["FilePath"])
            else:
                self.send_error(404)

    def start(self, content: bytes, first: int = 0) -> None:
        self.send_response(206 if first else 200)
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()

    def send_file(self, name: str) -> None:
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.hub.fetches.append((name, start))
        content = self.hub.wrong.get(name) or self.hub.files[name]
        self.start(content, start)
        if (stall := self.hub.stalls.get(name)) and start < stall.at:
            self.wfile.write(content[start : stall.at])
            start = stall.at
            stall.reached.set()
            stall.released.wait()
        self.wfile.write(content[start : self.hub.cuts.pop(name, len(content))])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the tests' output to the tests."""


@contextlib.contextmanager
def serve_hub(directory: Path, model_id: str, port: int = 0) -> Iterator[Hub]:
    """A hub until the block ends; from then on its address is a closed port."""
    hub = Hub(directory, model_id)
    with ThreadingHTTPServer(("127.0.0.1", port), type("HubHandler", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            for stall in hub.stalls.values():
                stall.released.set()
            server.shutdown()
            thread.join()
