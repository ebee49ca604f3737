"""The service when things go wrong, in real processes: a faulty model, a full queue, clients that leave, signals."""

import contextlib
import fcntl
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT, Server, wait_until_open

PATIENCE = 60  # seconds after which a test that hangs fails
FAULTY = '''
"""The service with a model that does what the file CONTROL says, and waits as long as a test holds the lock on it."""

import fcntl
import os
from pathlib import Path

import torch

import gme_service

decode = gme_service.Model._decode


def faulty(self, embeddings, *rest):
    with Path(os.environ["CONTROL"]).open() as control:
        fcntl.flock(control, fcntl.LOCK_SH)
        order, _, number = control.read().partition(" ")
    if order == "AcceleratorError":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if order == "memory" and len(embeddings) > int(number):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    result = decode(self, embeddings, *rest)
    return result * float("inf") if order == "overflow" else result


gme_service.Model._decode = faulty
gme_service.STALL_SECONDS = float(os.environ.get("STALL_SECONDS", gme_service.STALL_SECONDS))
app = gme_service.app
'''


def resources(server: Server) -> tuple[int, int]:
    """How many files a server has open, connections among them, and how many threads."""
    process = Path("/proc", str(server.process.pid))
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def await_resources(server: Server, files: int, threads: int) -> None:
    """Wait until it has no more of them than that."""
    deadline = time.monotonic() + PATIENCE
    while (now := resources(server))[0] > files or now[1] > threads:
        assert time.monotonic() < deadline, f"{now} open files and threads, and not {files}, {threads}"
        time.sleep(0.01)


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    return connection


class Faulty(Server):
    """A server whose model a test can hold, and give an order."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "faulty.py").write_text(FAULTY)
        self.control = folder / "control"
        self.order("none")
        self.command = [sys.executable, "-m", "uvicorn", "faulty:app", "--port", str(port), *arguments]
        self.environment = {"PYTHONPATH": f"{folder}:{ROOT}", "CONTROL": str(self.control), "GME_CACHE_MB": "0"}
        self.environment |= environment
        log = folder / "log"
        log.touch()
        super().__init__(f"http://127.0.0.1:{port}", self.start(log), log)
        fresh = httpx.Limits(max_keepalive_connections=0)  # a connection for each request
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, limits=fresh, verify=False)

    def start(self, log: Path) -> subprocess.Popen[str]:
        with log.open("a") as output:
            return subprocess.Popen(
                self.command, env=os.environ | self.environment, stdout=output, stderr=output, text=True
            )

    def order(self, order: str) -> None:
        self.control.write_text(order)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the model waits, if it has anything to do."""
        with self.control.open() as control:
            fcntl.flock(control, fcntl.LOCK_EX)
            yield

    def post(self, *texts: str) -> httpx.Response:
        return self.http.post("/embed/text", json={"texts": texts})

    def await_depth(self, depth: int) -> None:
        """Wait until so many inputs have no answer."""
        for _ in range(10_000):
            if self.http.get("/health").json()["queue_depth"] == depth:
                return
        pytest.fail(f"The queue's depth never became {depth}.")

    def await_batches(self, number: float) -> None:
        """Wait until the model has been given so many batches."""
        for _ in range(10_000):
            if self.metric("gme_batch_inputs_count") == number:
                return
        pytest.fail(f"The model never got {number} batches.")

    def await_refusal(self) -> None:
        """Wait until nobody can connect any more."""
        with contextlib.suppress(httpx.TransportError):
            for _ in range(10_000):
                self.http.get("/health")
            pytest.fail("The server never closed its port.")

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (.*)$", text, re.MULTILINE)
        return float(found[1]) if found else 0

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def start_faulty(tmp_path: Path) -> Iterator[Callable[..., Faulty]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> Faulty:
            server = Faulty(tmp_path, *arguments, **environment)
            stack.callback(server.end)
            wait_until_open(server)
            return server

        yield start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """One server with room for eight inputs, for the tests that leave it alive."""
    server = Faulty(tmp_path_factory.mktemp("faulty"), GME_MAX_QUEUE="8")
    try:
        wait_until_open(server)
        server.metric("up")  # the first that takes a thread of the pool
        yield server
    finally:
        server.end()


@pytest.fixture
def faulty(shared: Faulty) -> Iterator[Faulty]:
    """The shared server; after the test it still answers, nothing is left in it, and there is no fault in its log."""
    read, before = shared.log.stat().st_size, resources(shared)
    shared.order("none")
    yield shared
    shared.order("none")
    assert shared.post("is it still there?").status_code == 200
    shared.await_depth(0)
    await_resources(shared, *before)
    assert "Traceback" not in shared.log.read_text()[read:]


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def request(*texts: str) -> bytes:
    body = json.dumps({"texts": texts}).encode()
    head = f"POST /embed/text HTTP/1.1\r\nHost: gme\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\nConnection: close\r\n\r\n".encode() + body


def read_answer(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as stream:
        return stream.read()


# ---------------------------------------------------------------------------------------------- the process and its end


class Supervisor(threading.Thread):
    """Starts the server again when it fails, as systemd does with Restart=on-failure."""

    def __init__(self, server: Faulty) -> None:
        super().__init__()
        self.server, self.codes = server, queue.SimpleQueue[int]()

    def run(self) -> None:
        while code := self.server.process.wait():
            self.server.process = self.server.start(self.server.log)
            self.codes.put(code)
        self.codes.put(code)


def test_a_dead_model_thread_ends_the_process_and_its_supervisor_brings_it_back(
    start_faulty: Callable[..., Faulty], clients: ThreadPoolExecutor
) -> None:
    server = start_faulty()
    supervisor = Supervisor(server)
    supervisor.start()
    vectors = server.post("a", "b").json()["embeddings"]

    with server.held():
        waiting = [clients.submit(server.post, f"{number}", "and another") for number in range(3)]
        server.await_depth(6)
        server.order("AcceleratorError")
    answers = [future.result(PATIENCE) for future in waiting]
    with contextlib.suppress(httpx.TransportError):  # when it has ended already
        assert server.http.get("/health").status_code == 503

    assert [answer.status_code for answer in answers] == [503] * 3
    assert all(answer.json()["detail"] and answer.headers["Retry-After"] for answer in answers)
    server.order("none")
    assert supervisor.codes.get(timeout=PATIENCE) == 1
    assert "illegal memory access" in server.log.read_text()

    wait_until_open(server)
    assert server.post("a", "b").json()["embeddings"] == vectors
    server.process.terminate()
    assert supervisor.codes.get(timeout=PATIENCE) == 0
    supervisor.join()


def test_sigterm_under_load_answers_what_is_under_way_and_exits_0(
    start_faulty: Callable[..., Faulty], clients: ThreadPoolExecutor
) -> None:
    server = start_faulty("--timeout-graceful-shutdown", "20")

    with server.held():
        waiting = [clients.submit(server.post, f"{number}", "and another") for number in range(20)]
        server.await_depth(40)
        server.process.send_signal(signal.SIGTERM)
        server.await_refusal()

    assert [future.result(PATIENCE).status_code for future in waiting] == [200] * 20
    assert server.process.wait(PATIENCE) == 0


def test_sigterm_does_not_wait_for_ever_for_a_body_that_does_not_come(start_faulty: Callable[..., Faulty]) -> None:
    server = start_faulty("--timeout-graceful-shutdown", "1")

    with connect(server) as slow:
        slow.sendall(request("a text")[:-5])
        server.post("another")  # so that the slow one has arrived
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


# ------------------------------------------------------------------------------------------------------- a faulty model


def test_out_of_memory_halves_the_batch_and_all_are_answered(faulty: Faulty, clients: ThreadPoolExecutor) -> None:
    requests = [["a", "b"], ["c"], ["d", "e"], ["f", "g"]]
    before = [faulty.post(*texts).json()["embeddings"] for texts in requests]

    with faulty.held():
        plug = clients.submit(faulty.post, "plug")
        faulty.await_depth(1)
        waiting = [clients.submit(faulty.post, *texts) for texts in requests]
        faulty.await_depth(8)
        faulty.order("memory 2")

    for vectors, future in zip(before, waiting, strict=True):
        assert future.result(PATIENCE).status_code == 200
        np.testing.assert_allclose(future.result().json()["embeddings"], vectors, atol=1e-5)
    assert plug.result(PATIENCE).status_code == 200


def test_an_input_that_does_not_fit_into_memory_is_refused(faulty: Faulty) -> None:
    faulty.order("memory 0")

    answer = faulty.post("a", "b")

    assert answer.status_code == 413
    assert "memory" in answer.json()["detail"]


def test_a_vector_that_is_not_finite_is_never_sent(faulty: Faulty) -> None:
    faulty.order("overflow")

    answer = faulty.post("a")

    assert answer.status_code == 500
    assert "GME_DTYPE" in answer.json()["detail"]


# ------------------------------------------------------------------------------------------------ too much, and clients


def test_past_the_queues_limit_requests_are_refused_at_once(faulty: Faulty, clients: ThreadPoolExecutor) -> None:
    with faulty.held():
        waiting = [clients.submit(faulty.post, f"{number}", "b", "c", "d") for number in range(2)]
        faulty.await_depth(8)

        refused = faulty.post("one more")

        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["detail"]
        health = faulty.http.get("/health")
        assert (health.status_code, health.json()["queue_depth"]) == (200, 8)

    assert [future.result(PATIENCE).status_code for future in waiting] == [200, 200]
    assert faulty.post("one more").status_code == 200


def test_the_work_of_a_client_that_left_never_reaches_the_model(faulty: Faulty, clients: ThreadPoolExecutor) -> None:
    computed, answered = faulty.metric("gme_batch_inputs_sum"), faulty.metric('gme_inputs_total{kind="text"}')
    batches = faulty.metric("gme_batch_inputs_count")

    with faulty.held():
        plug = clients.submit(faulty.post, "plug")
        faulty.await_batches(batches + 1)
        with connect(faulty) as leaving:
            leaving.sendall(request("left 0", "left 1", "left 2"))
            faulty.await_depth(4)
        faulty.await_depth(1)
        stays = clients.submit(faulty.post, "stays")
        faulty.await_depth(2)

    assert plug.result(PATIENCE).status_code == stays.result(PATIENCE).status_code == 200
    assert faulty.metric("gme_batch_inputs_sum") - computed == 2
    assert faulty.metric('gme_inputs_total{kind="text"}') - answered == 2


def test_a_client_that_leaves_after_another_request_leaves_no_work(faulty: Faulty, clients: ThreadPoolExecutor) -> None:
    batches = faulty.metric("gme_batch_inputs_count")

    with faulty.held():
        plug = clients.submit(faulty.post, "plug")
        faulty.await_batches(batches + 1)
        with connect(faulty) as leaving:
            leaving.sendall(request("left 0", "left 1").replace(b"Connection: close\r\n", b"") + request("next"))
            faulty.await_depth(3)
        faulty.await_depth(1)

    assert plug.result(PATIENCE).status_code == 200


def test_a_client_that_leaves_while_its_input_is_computed_harms_nobody(
    faulty: Faulty, clients: ThreadPoolExecutor
) -> None:
    batches = faulty.metric("gme_batch_inputs_count")

    with faulty.held():
        with connect(faulty) as leaving:
            leaving.sendall(request("left"))
            faulty.await_batches(batches + 1)
        faulty.await_depth(0)
        stays = clients.submit(faulty.post, "stays")
        faulty.await_depth(1)

    assert stays.result(PATIENCE).status_code == 200


def test_a_client_that_leaves_before_its_body_ends_leaves_nothing(faulty: Faulty) -> None:
    batches = faulty.metric("gme_batch_inputs_count")

    for sent in (10, 60, len(request("left")) - 1):
        with connect(faulty) as leaving:
            leaving.sendall(request("left")[:sent])
            faulty.metric("up")  # an answer, so that the bytes have arrived too
    faulty.post("stays")

    assert faulty.metric("gme_batch_inputs_count") - batches == 1


def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_no_file(faulty: Faulty) -> None:
    head = b"POST /embed/image HTTP/1.1\r\nHost: gme\r\nContent-Type: multipart/form-data; boundary=limit\r\n"
    part = b'--limit\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'

    with connect(faulty) as leaving:
        leaving.sendall(head + b"Content-Length: 4000000\r\n\r\n" + part + bytes(3_000_000))


def test_clients_that_do_not_read_a_large_answer_harm_nobody(server: Server) -> None:
    large = request(*["the same"] * 2048)  # computed once, answered with 3 MB

    with server.client() as http:
        http.get("/health")
        before = resources(server)
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                leaving = stack.enter_context(connect(server, receive_buffer=1024))
                leaving.sendall(large)
                assert leaving.recv(1)  # the answer begins
            assert http.post("/embed/text", json={"texts": ["another"]}).status_code == 200
        await_resources(server, *before)
        assert http.get("/health").json()["queue_depth"] == 0


def test_a_slow_body_keeps_nobody_waiting(faulty: Faulty) -> None:
    slow = connect(faulty)

    for byte in request("slow"):
        slow.sendall(bytes([byte]))
        if byte in b"\n {}":
            assert faulty.post("quick").status_code == 200

    assert read_answer(slow).startswith(b"HTTP/1.1 200 OK")


def test_many_slow_bodies_keep_nobody_waiting(faulty: Faulty) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(faulty)) for _ in range(100)]
        for connection in slow:
            connection.sendall(request("slow")[:-3])

        assert faulty.post("quick").status_code == 200

        slow[0].sendall(request("slow")[-3:])
        assert read_answer(slow[0]).startswith(b"HTTP/1.1 200 OK")


def test_bodies_and_unread_answers_have_a_limit_together_and_clients_that_stall_are_left(
    start_faulty: Callable[..., Faulty],
) -> None:
    server = start_faulty(GME_MAX_BODY_MB="0.1", STALL_SECONDS="2")
    large, many = request("a" * 100_000), request(*["the same"] * 2048)  # computed once, answered with 3 MB

    with contextlib.ExitStack() as stack:
        idle, *stalled = [stack.enter_context(connect(server, receive_buffer=1024)) for _ in range(40)]
        for connection in stalled:
            connection.sendall(large[:-10])
        refused = await_status(server, 503)
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["detail"] == "Too much is being sent: try again in a moment."
        await_status(server, 200)  # when those have been left
        await_end(idle)

        for connection in [stack.enter_context(connect(server, receive_buffer=1024)) for _ in range(2)]:
            connection.sendall(many)
        await_status(server, 503)
        await_status(server, 200)


def await_end(connection: socket.socket) -> None:
    """Wait until the server has ended it."""
    with contextlib.suppress(ConnectionError):
        assert connection.recv(1) == b""


def await_status(server: Faulty, status: int) -> httpx.Response:
    """Wait until a request of 100 kB gets it."""
    deadline = time.monotonic() + PATIENCE
    while (answer := server.post("a" * 100_000)).status_code != status:
        assert time.monotonic() < deadline, f"{answer.status_code} and not {status}"
    return answer


def test_requests_may_come_ahead_of_their_answers_but_not_without_bound(faulty: Faulty) -> None:
    ahead = connect(faulty)
    ahead.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 20 + b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert read_answer(ahead).count(b"HTTP/1.1 200 OK") == 21

    too_many = connect(faulty)
    with contextlib.suppress(ConnectionError):
        too_many.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 10_000)
        assert read_answer(too_many).count(b"HTTP/1.1 200 OK") < 10_000


HEAD = b"POST /embed/text HTTP/1.1\r\nHost: gme\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "start",
    [b"GET /", HEAD, HEAD + b"X: ", HEAD + b"\r\n1\r\n{\r\n0\r\n", HEAD + b"\r\n1\r\n{\r\n0\r\nX: "],
    ids=["line", "headers", "header", "trailers", "trailer"],
)
def test_endless_headers_are_refused(faulty: Faulty, start: bytes) -> None:
    endless = connect(faulty)
    piece = b"X: a\r\n" if start.endswith(b"\r\n") else b"aaaaaa"

    endless.sendall(start)
    faulty.metric("up")  # an answer, so that the start has arrived too

    with contextlib.suppress(ConnectionError):  # when the connection ends before all has been sent
        endless.sendall(piece * (2**16 // 6 + 1))
        assert read_answer(endless).startswith(b"HTTP/1.1 400 Bad Request")


def test_a_storm_of_clients_that_come_and_go_is_answered(faulty: Faulty, clients: ThreadPoolExecutor) -> None:
    def client(number: int) -> set[int]:
        statuses = set()
        for turn in range(10):
            if (number + turn) % 3 == 0:
                with connect(faulty) as leaving:
                    leaving.sendall(request(f"{number} {turn} left", "b"))
            else:
                statuses.add(faulty.post(f"{number} {turn}").status_code)
        return statuses

    done: list[Future[set[int]]] = [clients.submit(client, number) for number in range(16)]

    assert set().union(*(future.result(PATIENCE) for future in done)) <= {200, 503}
