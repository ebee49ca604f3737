"""Room app: the command line, when the port opens, what the log says, and how the service ends."""

import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from conftest import IMAGES, ROOT, TOY, Patch, Start, free_port, run
from PIL import Image
from torch.nn import functional

import gme_service as gme

PATIENCE = 60  # seconds after which a test that hangs fails
PART = b'--limit\r\ncontent-disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
PHOTO = (IMAGES / "64x48.png").read_bytes()
FAULTY = """
faults = iter([ValueError("boom")])


def forward(self, inputs):
    raise next(faults, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


Model.forward = forward
"""


@pytest.mark.parametrize(("argument", "words"), [("--help", "--port"), ("--version", gme.__version__)])
def test_help_and_version_need_no_model(tmp_path: Path, argument: str, words: str) -> None:
    end = run("gme_service.py", argument, GME_MODEL_DIR=str(tmp_path), MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    assert (end.returncode, end.stderr) == (0, "")
    assert words in end.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_toy_is_served_on_all_addresses_when_it_is_loaded_and_two_lines_say_what_runs(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    command = [sys.executable, str(ROOT / "gme_service.py"), "--toy", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GME_MODEL_")}
    environment["GME_DTYPE"] = "float32"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output) as process,
    ):
        opened = False
        while not opened and process.poll() is None:
            with socket.socket() as probe:
                opened = probe.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.01)
        assert opened, log.read_text()
        first, second = (line for line in log.read_text().splitlines() if "toy/shapes" in line)
        answer = httpx.post(f"http://127.0.0.2:{port}/embed/text", json={"texts": ["a"]}, timeout=PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert answer.status_code == 200
    assert "Loading toy/shapes on cpu in torch.float32." in first
    for words in (gme.__version__, str(TOY), " on cpu ", "float32", "128 dimensions", "no API key", "GME_API_KEY"):
        assert words in second


def test_what_is_loaded_is_said_before_it_is_read(tmp_path: Path) -> None:
    end = run("-m", "uvicorn", "gme_service:app", GME_MODEL_DIR=str(tmp_path), MODELSCOPE_ENDPOINT="http://127.0.0.1:9")
    first, second, *_ = end.stderr.splitlines()
    assert "Loading toy/shapes" in first
    assert "Downloading toy/shapes" in second


def test_sigterm_while_it_starts_ends_it_with_0(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "gme_service:app"],
            cwd=ROOT,
            env=os.environ | {"GME_MODEL_DIR": str(tmp_path), "MODELSCOPE_ENDPOINT": endpoint},
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            while "Downloading" not in process.stderr.readline():
                pass
            process.terminate()
            assert process.wait(60) == 0


def test_the_toy_of_a_module_without_its_repository_is_a_sentence(tmp_path: Path) -> None:
    shutil.copy(ROOT / "gme_service.py", tmp_path)
    end = run(str(tmp_path / "gme_service.py"), "--toy")
    assert (end.returncode, end.stdout) == (78, "")
    (sentence,) = end.stderr.splitlines()
    assert str(tmp_path / "tests" / "models") in sentence


def without_memory(*_: object, **__: object) -> None:
    torch.empty(2**55)  # raises what torch raises where a machine has too little


def without_gpu_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 892.00 MiB.")


@pytest.mark.parametrize("fail", [without_memory, without_gpu_memory])
@pytest.mark.parametrize(("owner", "name"), [(torch.Tensor, "to"), (functional, "normalize")], ids=["load", "probe"])
def test_a_model_that_does_not_fit_into_memory_is_a_sentence_and_systemd_tries_again(
    monkeypatch: Patch, owner: object, name: str, fail: Callable[..., None]
) -> None:
    settings = gme.Settings.load()
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(gme.StartLaterError) as stop:
        gme.load(settings)
    assert stop.value.exit_code == 1
    for part in (settings.model_id, "memory", " cpu", "GME_DEVICE"):
        assert part in str(stop.value)


def test_another_fault_while_the_model_is_loaded_is_not_told_as_a_lack_of_memory(monkeypatch: Patch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(functional, "normalize", fail)
    with pytest.raises(RuntimeError, match="boom"):
        gme.load(gme.Settings.load())


@pytest.mark.parametrize(
    ("arguments", "host", "seconds"),
    [
        ([], "0.0.0.0", 75),  # which is longer than clients and proxies keep a connection
        (["--port", "9000", "--timeout-keep-alive", "10"], "0.0.0.0", 10),
        (["--toy", "--host", "127.0.0.1"], "127.0.0.1", 75),
    ],
)
def test_the_options_of_the_plain_command_are_defaults(
    monkeypatch: Patch, arguments: list[str], host: str, seconds: int
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    gme.main(arguments)
    options = uvicorn.main.make_context("uvicorn", started[0][3:]).params
    assert (options["app"], options["host"], options["timeout_keep_alive"]) == ("gme_service:app", host, seconds)


def test_uploads_need_no_disk_and_neither_requests_nor_the_key_are_in_the_log(start: Start) -> None:
    server = start("--no-access-log", GME_API_KEY="hush-hush")
    file = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(file, "BMP")  # 6.75 MB
    boundary = {"content-type": "multipart/form-data; boundary=limit"}
    with server.client(headers={"authorization": "Bearer hush-hush"}) as client:
        before = server.log.read_text()
        assert (" an API key is needed" in before, "hush" in before) == (True, False)
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


def test_a_fault_of_the_model_is_a_500_and_a_lost_device_ends_the_process(start: Start, tmp_path: Path) -> None:
    (tmp_path / "gme_service.py").write_text((ROOT / "gme_service.py").read_text() + FAULTY)
    server = start("--app-dir", str(tmp_path))

    def post(text: str) -> httpx.Response:
        return httpx.post(f"{server.url}/embed/text", json={"texts": [text]}, timeout=PATIENCE)

    fault = post("a")
    assert (fault.status_code, "boom" in fault.text) == (500, False)
    assert post("b").status_code == 503  # so that its client tries again
    assert server.process.wait(PATIENCE) not in (0, None)
    log = server.log.read_text()
    assert (log.count("ValueError: boom"), "illegal memory access" in log) == (1, True)


def test_sigterm_finishes_what_is_under_way_and_exits_0(start: Start) -> None:
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


def test_what_is_not_finished_in_time_is_told_to_come_back(start: Start) -> None:
    server = start("--timeout-graceful-shutdown", "1", GME_CACHE_MB="0")
    body = {"texts": [f"{number} " + "word " * 500 for number in range(2000)]}
    with server.client() as client, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(client.post, "/embed/text", json=body)
        with server.client() as watch:
            while watch.get("/health").json()["queue_depth"] == 0:
                assert not answer.done()
        server.process.send_signal(signal.SIGTERM)
        assert answer.result(PATIENCE).status_code == 503
    assert server.process.wait(PATIENCE) == 0
