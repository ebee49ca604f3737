"""Room Checkpoint: the service and the real ModelScope client against a hub on loopback, and files that changed."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, Server, golden, run
from hub import Hub, serve_hub

import gme_service as gme

SHARDS = sorted(path.name for path in TOY.glob("*.safetensors"))
LOAD = "import gme_service"  # what uvicorn does before it opens the port
CLOSED_PORT = "http://127.0.0.1:9"
SERVE = "import sys, uvicorn; sys.argv = ['uvicorn', 'gme_service:app', '--port', '0']; uvicorn.main()"
NOT_READ = {"merges.txt", "vocab.json", "tokenizer_config.json"}  # what other code reads of a checkpoint
ONE_ATTEMPT = {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}  # the client would try for 7 s

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
    with contextlib.ExitStack() as processes:

        def launch(code: str = LOAD, **variables: str) -> subprocess.Popen[str]:
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            variables = os.environ | environment | variables
            process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=variables, **options)
            processes.callback(process.communicate)
            processes.callback(process.kill)
            return process

        yield launch


def contents(directory: Path) -> dict[str, bytes]:
    """The files of the checkpoint that are there, and no others that may lie beside them."""
    return {
        path.name: (directory / path.name).read_bytes() for path in TOY.iterdir() if (directory / path.name).exists()
    }


def zero(path: Path, start: int = 200_000, size: int = 300_000) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))


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
    before = sorted(checkpoint.parents[1].rglob("*"))

    process = launch(
        "import sys, gme_service; print([name for name in sys.modules if name.startswith('modelscope')])",
        MODELSCOPE_ENDPOINT=CLOSED_PORT,
    )
    output, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert output == "[]\n"
    assert sorted(checkpoint.parents[1].rglob("*")) == before


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

    received, finished = part.stat().st_size, contents(checkpoint)
    assert SHARDS[2] not in finished
    hub.fetches.clear()
    stall.released.set()

    assert launch().wait(60) == 0
    assert hub.starts(SHARDS[2]) == [received]
    assert not finished.keys() & set(hub.fetched())
    assert contents(checkpoint) == contents(TOY)


def test_a_missing_and_a_truncated_shard_are_fetched_again_and_nothing_else(
    hub: Hub, checkpoint: Path, launch: Launch
) -> None:
    shutil.copytree(TOY, checkpoint)
    (checkpoint / SHARDS[0]).unlink()
    os.truncate(checkpoint / SHARDS[2], 700_000)

    assert launch(GME_MODEL_REVISION="v1.1.0").wait(60) == 0
    assert set(hub.fetched()) == {SHARDS[0], SHARDS[2]}
    assert hub.revisions == {"v1.1.0"}
    assert contents(checkpoint) == contents(TOY)


@pytest.mark.parametrize("name", sorted({path.name for path in TOY.glob("*.*")} - NOT_READ))
def test_a_checkpoint_is_complete_when_every_file_is_whole(checkpoint: Path, name: str) -> None:
    shutil.copytree(TOY, checkpoint)
    assert gme.is_complete(checkpoint)
    os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - 10)
    assert not gme.is_complete(checkpoint)
    (checkpoint / name).unlink()
    assert not gme.is_complete(checkpoint)


def sentence(process: subprocess.Popen[str]) -> str:
    """The process gives up for now, to be started again; returns the line that says why, the last that it prints."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not output
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_a_shard_with_wrong_bytes_is_refused(hub: Hub, checkpoint: Path, launch: Launch) -> None:
    right = (TOY / SHARDS[1]).read_bytes()
    hub.wrong[SHARDS[1]] = right[:-1] + bytes([right[-1] ^ 1])
    assert SHARDS[1] in sentence(launch())
    assert SHARDS[1] not in contents(checkpoint)


def test_with_no_hub_and_no_files_a_sentence_says_what_to_do(checkpoint: Path, launch: Launch) -> None:
    reason = sentence(launch(SERVE, MODELSCOPE_ENDPOINT=CLOSED_PORT, **ONE_ATTEMPT))
    for part in (str(checkpoint), CLOSED_PORT, "Connection refused", "by hand", "GME_MODEL_DIR", "MODELSCOPE_ENDPOINT"):
        assert part in reason


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
    assert sorted(hub.fetched()) == sorted(hub.files)
    assert contents(checkpoint) == contents(TOY)


def test_two_workers_outlive_a_download_and_both_serve(
    hub: Hub, environment: dict[str, str], start: Callable[..., Server]
) -> None:
    server = start("--workers", "2", **environment)
    while server.log.read_text().count("loaded in") < 2:
        assert server.process.poll() is None
        time.sleep(0.05)
    assert "died" not in server.log.read_text()  # uvicorn ends a worker that it believes to hang
    assert hub.listings == 1


def test_in_a_terminal_the_download_shows_how_far_it_is(
    hub: Hub, environment: dict[str, str], checkpoint: Path
) -> None:
    stall = hub.stall(SHARDS[1], at=900_000)
    terminal, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 120))
    often = {"TQDM_MININTERVAL": "0"}
    command = [sys.executable, "-c", LOAD]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment | often, stderr=inner)
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


def test_a_log_gets_a_line_for_every_half_gigabyte(caplog: pytest.LogCaptureFixture) -> None:
    progress = gme.DownloadLog("model-00001-of-00002.safetensors", 1_000_000_000)
    with caplog.at_level("INFO"):
        for _ in range(1000):
            progress.update(1_000_000)
    assert [re.findall(r"\d\.\d", line) for line in caplog.messages] == [["0.5", "1.0"], ["1.0", "1.0"]]


# ------------------------------------------------------------------------------------- files that changed on the disk


def verify(**variables: str) -> subprocess.CompletedProcess[str]:
    end = run("gme_service.py", "--verify", **variables)
    assert "Traceback" not in end.stderr
    return end


def test_after_a_download_a_changed_file_is_found_without_the_hub(
    hub: Hub, environment: dict[str, str], checkpoint: Path, launch: Launch
) -> None:
    assert launch().wait(60) == 0
    offline = environment | {"MODELSCOPE_ENDPOINT": CLOSED_PORT}
    assert verify(**offline).returncode == 0

    zero(checkpoint / SHARDS[1])
    assert gme.is_complete(checkpoint)  # so that it would be served
    end = verify(**offline)
    assert end.returncode not in (0, None)
    assert [shard for shard in [*SHARDS, "config.json"] if shard in end.stderr] == [SHARDS[1]]
    assert str(checkpoint) in end.stderr

    (checkpoint / SHARDS[1]).unlink()
    assert SHARDS[1] in verify(**offline).stderr


def test_files_that_were_put_there_by_hand_are_compared_with_the_hub(
    hub: Hub, environment: dict[str, str], checkpoint: Path
) -> None:
    shutil.copytree(TOY, checkpoint)
    assert verify(**environment).returncode == 0
    assert hub.fetches == []

    zero(checkpoint / SHARDS[2])
    (checkpoint / "vocab.json").unlink()
    end = verify(**environment)
    assert end.returncode not in (0, None)
    assert [name for name in hub.files if name in end.stderr] == [SHARDS[2], "vocab.json"]


def test_what_cannot_be_compared_is_said_in_a_sentence(checkpoint: Path, environment: dict[str, str]) -> None:
    offline = environment | {"MODELSCOPE_ENDPOINT": CLOSED_PORT} | ONE_ATTEMPT
    assert verify(**offline).returncode not in (0, None)  # no such directory
    shutil.copytree(TOY, checkpoint)
    assert verify(**offline).returncode not in (0, None)  # no hub


def test_the_version_is_printed_without_a_checkpoint() -> None:
    end = run("gme_service.py", "--version", GME_MODEL_DIR="/nowhere")
    assert (end.returncode, end.stdout, end.stderr) == (0, f"{gme.__version__}\n", "")
