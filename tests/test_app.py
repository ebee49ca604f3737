"""Room app: when the port opens, what the start says, and how the service ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from conftest import ROOT, Server

LOADED = re.compile(
    r"INFO: +toy/shapes on cpu in (torch\.)?float32: 128 dimensions, loaded in \d+\.\d s from .*/toy/shapes\.$"
)
UVICORN = (
    "Started server process",
    "Waiting for application startup",
    "Application startup complete",
    "Uvicorn running",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_start_logs_one_line_of_ours(server: Server) -> None:
    lines = server.log.read_text().splitlines()
    start = lines[: 1 + next(number for number, line in enumerate(lines) if "Uvicorn running" in line)]
    (ours,) = [line for line in start if not any(words in line for words in UVICORN)]
    assert LOADED.match(ours)


def test_the_port_opens_when_the_model_is_loaded(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "gme_service.py", "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        while not (opened := is_open(port)) and process.poll() is None:
            time.sleep(0.01)
        assert opened, log.read_text()
        assert any(LOADED.match(line) for line in log.read_text().splitlines())
        # by itself it listens on all addresses
        answer = httpx.post(f"http://127.0.0.2:{port}/embed/text", json={"texts": ["a red circle"]}, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_help_needs_no_model(tmp_path: Path) -> None:
    nowhere = {"GME_MODEL_DIR": str(tmp_path), "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "gme_service.py", "--help"]
    end = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, timeout=60)
    assert end.returncode == 0
    assert "--port" in end.stdout
    assert end.stderr == ""
    assert list(tmp_path.iterdir()) == []
