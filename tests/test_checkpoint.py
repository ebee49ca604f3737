"""Room Checkpoint: the real ModelScope client against a hub on loopback, and files that changed on the disk."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, Patch, Start, free_port, golden, run
from hub import Hub, Stall, serve_hub

import gme_service as gme

SHARDS = sorted(path.name for path in TOY.glob("*.safetensors"))
PORT = free_port()  # of the hub of every test: in a process, the client keeps the first that it is told
CLOSED_PORT = "http://127.0.0.1:9"
UVICORN = ("-m", "uvicorn", "gme_service:app", "--port", "0")
LOAD = ("-c", "import gme_service")  # what uvicorn does before it opens the port


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub(TOY, "toy/shapes", PORT) as hub:
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path, monkeypatch: Patch) -> dict[str, str]:
    """The hub and the model directory. HOME can hold nothing, as under the systemd unit, where it is read-only."""
    environment = {"MODELSCOPE_ENDPOINT": hub.url, "GME_MODEL_DIR": str(tmp_path / "models"), "HOME": "/dev/null"}
    environment["MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS"] = "1"  # the client would try for 7 s
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def checkpoint(environment: dict[str, str]) -> Path:
    """Where the service expects the checkpoint; nothing is there yet."""
    return Path(environment["GME_MODEL_DIR"]) / "toy" / "shapes"


@pytest.fixture
def by_hand(checkpoint: Path) -> Path:
    """The checkpoint, put there by hand."""
    return Path(shutil.copytree(TOY, checkpoint))


def contents(directory: Path) -> dict[str, bytes]:
    """The files of the checkpoint that are there, and no others that may lie beside them."""
    names = [path.name for path in TOY.iterdir() if (directory / path.name).exists()]
    return {name: (directory / name).read_bytes() for name in names}


def test_the_first_start_downloads_the_checkpoint_and_serves_it(
    hub: Hub, environment: dict[str, str], checkpoint: Path, start: Start
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


def test_a_complete_checkpoint_needs_no_hub_no_client_and_no_write(by_hand: Path) -> None:
    before = sorted(by_hand.parents[1].rglob("*"))
    code = "import sys, gme_service; print([name for name in sys.modules if name.startswith('modelscope')])"
    end = run("-c", code, MODELSCOPE_ENDPOINT=CLOSED_PORT)
    assert (end.returncode, end.stdout) == (0, "[]\n"), end.stderr
    assert sorted(by_hand.parents[1].rglob("*")) == before


def test_a_download_that_was_killed_goes_on_where_it_ended(hub: Hub, checkpoint: Path) -> None:
    stall = hub.stalls[SHARDS[2]] = Stall(at=900_000)
    part = checkpoint / f"{SHARDS[2]}.incomplete"
    with subprocess.Popen([sys.executable, *LOAD], cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
        assert stall.reached.wait(60)
        while not part.exists() or part.stat().st_size < 500_000:  # sent, and on its way to the disk
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    received, finished = part.stat().st_size, contents(checkpoint)
    assert SHARDS[2] not in finished
    hub.fetches.clear()
    stall.released.set()
    assert gme.find_checkpoint(gme.Settings.load()) == checkpoint
    assert hub.starts(SHARDS[2]) == [received]
    assert not finished.keys() & set(hub.fetched())
    assert contents(checkpoint) == contents(TOY)


def test_a_missing_and_a_truncated_shard_are_fetched_again_and_nothing_else(
    hub: Hub, by_hand: Path, monkeypatch: Patch
) -> None:
    (by_hand / SHARDS[0]).unlink()
    os.truncate(by_hand / SHARDS[2], 700_000)
    monkeypatch.setenv("GME_MODEL_REVISION", "v1.1.0")
    assert gme.find_checkpoint(gme.Settings.load()) == by_hand
    assert set(hub.fetched()) == {SHARDS[0], SHARDS[2]}
    assert hub.revisions == {"v1.1.0"}
    assert contents(by_hand) == contents(TOY)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", SHARDS[-1]])
def test_a_checkpoint_is_complete_when_every_file_that_is_read_is_whole(by_hand: Path, name: str) -> None:
    assert gme.is_complete(by_hand)
    os.truncate(by_hand / name, (by_hand / name).stat().st_size - 10)
    assert not gme.is_complete(by_hand)
    (by_hand / name).unlink()
    assert not gme.is_complete(by_hand)


def test_a_shard_with_wrong_bytes_is_refused(hub: Hub, checkpoint: Path) -> None:
    right = (TOY / SHARDS[1]).read_bytes()
    hub.wrong[SHARDS[1]] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(gme.StartLaterError, match=SHARDS[1]):
        gme.find_checkpoint(gme.Settings.load())
    assert SHARDS[1] not in contents(checkpoint)


@pytest.mark.parametrize("command", [UVICORN, ("gme_service.py", "--verify")])
def test_with_no_hub_a_sentence_says_what_to_do(checkpoint: Path, command: tuple[str, ...]) -> None:
    if "--verify" in command:
        assert "start the service" in run(*command).stderr
        shutil.copytree(TOY, checkpoint)
    end = run(*command, MODELSCOPE_ENDPOINT=CLOSED_PORT)
    assert end.returncode == 1  # with which systemd starts it again
    assert "Traceback" not in end.stderr
    sentence = end.stderr.splitlines()[-1]
    for part in (str(checkpoint), "port=9", "Connection refused", "by hand", "GME_MODEL_DIR", "MODELSCOPE_ENDPOINT"):
        assert part in sentence


def test_workers_that_start_together_download_once(hub: Hub, checkpoint: Path) -> None:
    with ThreadPoolExecutor(2) as workers:
        assert list(workers.map(gme.find_checkpoint, [gme.Settings.load()] * 2)) == [checkpoint] * 2
    assert sorted(hub.fetched()) == sorted(hub.files)


def test_in_a_terminal_the_download_shows_how_far_it_is(hub: Hub, checkpoint: Path, monkeypatch: Patch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert gme.find_checkpoint(gme.Settings.load()) == checkpoint
    assert re.search(r"\rDownloading: 100%\|", terminal.getvalue())


def zero(path: Path) -> None:
    """Write zeros into the midst of a file, which stays as long as it was."""
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(bytes(300_000))


def named(sentence: object) -> list[str]:
    return [name for name in sorted(contents(TOY)) if name in str(sentence)]


def test_after_a_download_a_changed_file_is_found_without_the_hub(hub: Hub, checkpoint: Path) -> None:
    settings = gme.Settings.load()
    assert gme.find_checkpoint(settings) == checkpoint
    assert str(checkpoint) in gme.verify(settings)
    zero(checkpoint / SHARDS[1])
    assert gme.is_complete(checkpoint)  # so that it would be served
    end = run("gme_service.py", "--verify", MODELSCOPE_ENDPOINT=CLOSED_PORT)
    assert (end.returncode, len(end.stderr.splitlines()), named(end.stderr)) == (78, 1, [SHARDS[1]])
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(gme.StartError) as changed:
        gme.verify(settings)
    assert named(changed.value) == [SHARDS[1], "tokenizer.json"]
    assert hub.listings == 1  # for the download


def test_what_was_put_there_by_hand_is_compared_with_the_hub_and_mended(hub: Hub, by_hand: Path) -> None:
    settings = gme.Settings.load()
    zero(by_hand / SHARDS[2])
    with pytest.raises(gme.StartError) as changed:  # so that one learns that wrong vectors were served
        gme.verify(settings)
    assert named(changed.value) == [SHARDS[2]]
    assert hub.fetched() == [SHARDS[2]]
    assert contents(by_hand) == contents(TOY)
    assert str(by_hand) in gme.verify(settings)
    assert hub.listings == 1  # the sums are noted


def test_sums_that_are_damaged_agree_with_nothing(hub: Hub, by_hand: Path) -> None:
    for text in ("", "abc\n"):
        (by_hand / "SHA256SUMS").write_text(text)
        with pytest.raises(gme.StartError):
            gme.verify(gme.Settings.load())


def test_what_a_restart_does_not_mend_has_the_code_that_prevents_it(checkpoint: Path, monkeypatch: Patch) -> None:
    for name, value in (("GME_MODEL_ID", "toy/none"), ("GME_MODEL_DIR", "/proc/nowhere")):
        monkeypatch.setenv(name, value)
        with pytest.raises(gme.StartError) as stop:
            gme.find_checkpoint(gme.Settings.load())
        assert value in str(stop.value)
