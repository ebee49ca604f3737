"""Room app: the command line, when the port opens, what the log says, and how the service ends."""

import io
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import IMAGES, ROOT, Server
from PIL import Image

import gme_service as gme

PATIENCE = 60  # seconds after which a test that hangs fails
PART = b'--limit\r\ncontent-disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
PHOTO = (IMAGES / "64x48.png").read_bytes()
FAULTY = '''
ordinary_forward = Model.forward


def forward(self, inputs):
    """Does what the file ORDER says."""
    order = Path(os.environ["ORDER"]).read_text()
    if order == "lose the device":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if order == "run out of memory" and len(inputs) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if order == "overflow":
        return ordinary_forward(self, inputs) * float("inf")
    if order == "fail":
        raise ValueError("boom")
    return ordinary_forward(self, inputs)


Model.forward = forward
'''


class Faulty:
    """A server whose model does what a test orders."""

    def __init__(self, start: Callable[..., Server], folder: Path) -> None:
        self.file = folder / "order"
        self.order("work")
        (folder / "gme_service.py").write_text((ROOT / "gme_service.py").read_text() + FAULTY)
        self.server = start("--app-dir", str(folder), ORDER=str(self.file), GME_CACHE_MB="0")

    def order(self, order: str) -> None:
        self.file.write_text(order)

    def post(self, *texts: str) -> httpx.Response:
        return httpx.post(f"{self.server.url}/embed/text", json={"texts": texts}, timeout=PATIENCE)


@pytest.fixture
def faulty(start: Callable[..., Server], tmp_path: Path) -> Faulty:
    return Faulty(start, tmp_path)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "gme_service.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize(("argument", "words"), [("--help", "--port"), ("--version", gme.__version__)])
def test_help_and_version_need_no_model(tmp_path: Path, argument: str, words: str) -> None:
    end = run(argument, GME_MODEL_DIR=str(tmp_path), MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert (end.returncode, end.stderr) == (0, "")
    assert words in end.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_port_opens_when_the_model_is_loaded_on_all_addresses_and_one_line_says_what_runs(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "gme_service.py", "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        opened = False
        while not opened and process.poll() is None:
            with socket.socket() as probe:
                opened = probe.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.01)
        assert opened, log.read_text()
        lines = [line for line in log.read_text().splitlines() if "toy/shapes" in line]
        answer = httpx.post(f"http://127.0.0.2:{port}/embed/text", json={"texts": ["a"]}, timeout=PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert answer.status_code == 200
    (ours,) = lines
    for words in (gme.__version__, " on cpu ", "float32", "128 dimensions", "no API key is needed"):
        assert words in ours
    assert 0 < float(ours.partition("loaded in ")[2].split()[0]) < 60


def test_the_start_says_that_a_key_is_needed_and_not_which(start: Callable[..., Server]) -> None:
    log = start(GME_API_KEY="hush-hush").log.read_text()
    assert " an API key is needed" in log
    assert "hush" not in log


# -------------------------------------------------------------------------------------------------- while it serves


def test_uploads_need_no_disk_and_no_request_leaves_a_line_in_the_log(start: Callable[..., Server]) -> None:
    server = start("--no-access-log")
    file = io.BytesIO()
    Image.fromarray(np.zeros((1500, 1500, 3), np.uint8)).save(file, "BMP")  # 6.75 MB
    boundary = {"content-type": "multipart/form-data; boundary=limit"}
    with server.client() as client:
        before = server.log.read_text()
        form = {"files": [("file", file.getvalue()), ("file", PHOTO)], "data": {"text": "word " * 500_000}}
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # as on a full disk
        assert client.post("/embed/image", **form).status_code == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert client.post("/embed/text", json={"texts": ["word " * 100_000]}).status_code == 200
        for status, request in {
            400: {"files": {"file": b"<html>"}},
            413: {"content": iter([PART, *[bytes(2**20)] * 33]), "headers": boundary},
            422: {"content": b"--limit\r\na\r\n\r\n\r\n--limit--", "headers": boundary},
        }.items():
            assert client.post("/embed/image", **request).status_code == status
        assert client.post("/embed/image", content=b"--limi\0\xff", headers=boundary).status_code == 422
        assert client.get("/nothing").status_code == 404
    assert server.log.read_text() == before


def test_what_goes_wrong_in_the_model_is_an_answer_and_its_cause_is_in_the_log(faulty: Faulty) -> None:
    texts = [f"text {number}" for number in range(8)]
    expected = faulty.post(*texts).json()["embeddings"]
    faulty.order("run out of memory")
    np.testing.assert_allclose(faulty.post(*texts).json()["embeddings"], expected, atol=1e-5)
    faulty.order("overflow")
    assert faulty.post("a").status_code == 500
    assert "Traceback" not in faulty.server.log.read_text()
    faulty.order("fail")
    answer = faulty.post("a")
    assert answer.status_code == 500
    assert "boom" not in answer.json()["detail"]
    assert "ValueError: boom" in faulty.server.log.read_text()
    faulty.order("work")
    np.testing.assert_allclose(faulty.post(*texts).json()["embeddings"], expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- end


def test_a_device_that_is_lost_ends_the_process(faulty: Faulty) -> None:
    assert faulty.post("a").status_code == 200
    faulty.order("lose the device")
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(faulty.post, f"{number}") for number in range(4)]
    for answer in answers:
        if not isinstance(answer.exception(), httpx.TransportError):  # of one that came too late
            assert answer.result().status_code == 503
            assert int(answer.result().headers["Retry-After"]) > 0
    assert any(answer.exception() is None for answer in answers)
    assert faulty.server.process.wait(PATIENCE) not in (0, None)
    assert "illegal memory access" in faulty.server.log.read_text()


def test_sigterm_finishes_what_is_under_way_and_exits_0(start: Callable[..., Server]) -> None:
    server = start()
    deadline = time.monotonic() + PATIENCE
    with server.client() as client, ThreadPoolExecutor(4) as clients:
        requests = [[f"{number} {text} " + "word " * 60 for text in range(40)] for number in range(4)]
        answers = [clients.submit(client.post, "/embed/text", json={"texts": texts}) for texts in requests]
        while client.get("/health").json()["queue_depth"] <= 120:  # until all four have come
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        for answer in answers:
            assert len(answer.result(PATIENCE).json()["embeddings"]) == 40
    assert server.process.wait(PATIENCE) == 0


def test_sigterm_does_not_wait_for_ever_for_a_body_that_does_not_come(start: Callable[..., Server]) -> None:
    server = start("--timeout-graceful-shutdown", "1")
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), PATIENCE) as slow:
        slow.sendall(b"POST /embed/text HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n{")
        httpx.get(f"{server.url}/health")  # an answer, so that the slow one has arrived
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
