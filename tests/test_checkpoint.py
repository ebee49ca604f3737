"""The room Checkpoint: processes of the service, with the real ModelScope client, against a hub on loopback."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, Server, golden
from hub import Hub, serve_hub

import gme_service as gme

SHARDS = sorted(path.name for path in TOY.glob("*.safetensors"))
LOAD = "import gme_service"  # what uvicorn does before it opens the port
CLOSED_PORT = "http://127.0.0.1:9"

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub(TOY, "toy/shapes") as hub:
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Where the service expects the checkpoint; nothing is there yet."""
    return tmp_path / "models" / "toy" / "shapes"


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The hub and the model directory. HOME can hold nothing, as under the systemd unit, where it is read-only."""
    return {"MODELSCOPE_ENDPOINT": hub.url, "GME_MODEL_DIR": str(tmp_path / "models"), "HOME": "/dev/null"}


@pytest.fixture
def launch(environment: dict[str, str]) -> Iterator[Launch]:
    """Start a Python process that runs `code`, with environment variables of the test's own."""
    processes: list[subprocess.Popen[str]] = []

    def launch(code: str = LOAD, **variables: str) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=os.environ | environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_ends_with_a_sentence(process: subprocess.Popen[str]) -> str:
    """The process gives up, and the last that it prints is one line that says why; returns that line."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert not output
    assert "Traceback" not in errors
    sentence = errors.splitlines()[-1]
    assert sentence.startswith("No checkpoint of toy/shapes: ")
    return sentence


def test_the_first_start_downloads_the_checkpoint_and_serves_it(
    hub: Hub, environment: dict[str, str], checkpoint: Path, start: Callable[..., Server]
) -> None:
    hub.cuts[SHARDS[1]] = 500_000  # the connection breaks once
    case = golden()[0]

    server = start(**environment)
    with server.client() as client:
        answer = client.post("/embed/text", json={"texts": [case.text]})

    np.testing.assert_allclose(answer.json()["embeddings"][0], case.vector, atol=1e-5)
    assert contents(checkpoint) == contents(TOY)
    first, second = hub.starts(SHARDS[1])
    assert first == 0 < second <= 500_000
    assert hub.revisions == {"master"}
    assert b"\r" not in server.log.read_bytes()  # no progress bars where there is no terminal


def test_a_complete_checkpoint_needs_no_hub_no_client_and_no_write(checkpoint: Path, launch: Launch) -> None:
    shutil.copytree(TOY, checkpoint)
    for path in [*checkpoint.iterdir(), checkpoint, *checkpoint.parents[:2]]:
        path.chmod(0o555)
    before = contents(checkpoint.parents[1])

    process = launch(
        "import sys, gme_service; print([name for name in sys.modules if name.startswith('modelscope')])",
        MODELSCOPE_ENDPOINT=CLOSED_PORT,
    )
    output, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert output == "[]\n"
    assert contents(checkpoint.parents[1]) == before
    for path in [checkpoint, *checkpoint.parents[:2]]:
        path.chmod(0o755)


def test_a_download_that_was_killed_goes_on_where_it_ended(hub: Hub, checkpoint: Path, launch: Launch) -> None:
    stall = hub.stall(SHARDS[2], at=900_000)
    part = checkpoint / f"{SHARDS[2]}.incomplete"

    killed = launch()
    assert stall.reached.wait(60)
    while not part.exists() or part.stat().st_size < 500_000:  # sent, and on its way to the disk
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()

    received = part.stat().st_size
    finished = {path.name for path in checkpoint.iterdir() if path.suffix != ".incomplete"}
    assert SHARDS[2] not in finished
    hub.fetches.clear()
    stall.released.set()

    assert launch().wait(60) == 0
    assert hub.starts(SHARDS[2]) == [received]
    assert not finished & {fetch.file for fetch in hub.fetches}
    assert contents(checkpoint) == contents(TOY)


def test_a_missing_and_a_truncated_shard_are_fetched_again_and_nothing_else(
    hub: Hub, checkpoint: Path, launch: Launch
) -> None:
    shutil.copytree(TOY, checkpoint)
    (checkpoint / SHARDS[0]).unlink()
    with (checkpoint / SHARDS[2]).open("r+b") as shard:
        shard.truncate(700_000)

    process = launch(GME_MODEL_REVISION="v1.1.0")

    assert process.wait(60) == 0
    assert {fetch.file for fetch in hub.fetches} == {SHARDS[0], SHARDS[2]}
    assert hub.revisions == {"v1.1.0"}
    assert contents(checkpoint) == contents(TOY)


def test_a_shard_with_wrong_bytes_is_refused(hub: Hub, checkpoint: Path, launch: Launch) -> None:
    right = (TOY / SHARDS[1]).read_bytes()
    hub.wrong[SHARDS[1]] = right[:-1] + bytes([right[-1] ^ 1])

    sentence = assert_ends_with_a_sentence(launch())

    assert f"{SHARDS[1]}: [E2020] Hash mismatch" in sentence
    assert not list(checkpoint.glob(f"{SHARDS[1]}*"))


def test_with_no_hub_and_no_files_a_sentence_says_what_to_do(checkpoint: Path, launch: Launch) -> None:
    process = launch(
        "import uvicorn; uvicorn.run('gme_service:app', port=0)",
        MODELSCOPE_ENDPOINT=CLOSED_PORT,
        MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS="1",  # the client would try for 7 s
    )

    sentence = assert_ends_with_a_sentence(process)

    for part in (str(checkpoint), CLOSED_PORT, "Connection refused", "by hand", "GME_MODEL_DIR", "MODELSCOPE_ENDPOINT"):
        assert part in sentence


def test_two_processes_that_start_together_download_once(hub: Hub, checkpoint: Path, launch: Launch) -> None:
    stall = hub.stall(SHARDS[1], at=900_000)
    say_when_at_the_lock = """
import sys
sys.addaudithook(lambda event, arguments: event == "open" and str(arguments[0]).endswith(".lock") and print("here"))
import gme_service
"""

    processes = [launch(say_when_at_the_lock, PYTHONUNBUFFERED="1") for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    assert stall.reached.wait(60)
    stall.released.set()

    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert hub.listings == 1
    assert Counter(fetch.file for fetch in hub.fetches) == Counter(path.name for path in TOY.iterdir())
    assert contents(checkpoint) == contents(TOY)


def test_in_a_terminal_the_download_shows_how_far_it_is(
    hub: Hub, environment: dict[str, str], checkpoint: Path
) -> None:
    stall = hub.stall(SHARDS[1], at=900_000)
    terminal, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 120))
    often = {"TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD], cwd=ROOT, env=os.environ | environment | often, stderr=inner
    )
    os.close(inner)

    shown = ""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while text := os.read(terminal, 65536).decode(errors="replace"):
            shown += text
            if re.search(rf"\r[^\r\n]*{SHARDS[1]}: +[1-9]\d?%\|", shown):
                stall.released.set()
    os.close(terminal)

    assert process.wait(60) == 0
    assert re.search(r"\rDownloading: 100%\|", shown)
    assert contents(checkpoint) == contents(TOY)


def test_a_log_gets_a_line_for_every_half_gigabyte(caplog: pytest.LogCaptureFixture) -> None:
    progress = gme.DownloadLog("model-00001-of-00002.safetensors", 1_000_000_000)
    with caplog.at_level("INFO"):
        for _ in range(1000):
            progress.update(1_000_000)
    assert caplog.messages == [f"model-00001-of-00002.safetensors: {part} of 1.0 GB" for part in ("0.5", "1.0")]


def test_two_workers_download_once_and_both_serve(
    hub: Hub, environment: dict[str, str], checkpoint: Path, start: Callable[..., Server]
) -> None:
    server = start("--workers", "2", **environment)
    while server.log.read_text().count("loaded in") < 2:
        assert server.process.poll() is None
        time.sleep(0.05)

    assert "died" not in server.log.read_text()  # uvicorn ends a worker that it believes to hang
    assert hub.listings == 1
    assert Counter(fetch.file for fetch in hub.fetches) == Counter(path.name for path in TOY.iterdir())
    assert contents(checkpoint) == contents(TOY)
