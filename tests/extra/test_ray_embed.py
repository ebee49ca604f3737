"""deploy/ray_embed.py on a real local Ray: files in, vectors out, and what happens when it is killed on the way."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGES, ROOT, golden

ray = pytest.importorskip("ray", reason="deploy/requirements.txt is not installed")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from deploy.ray_embed import Folder, JobError, Output, embed_collection, find_inputs  # noqa: E402

pytestmark = pytest.mark.timeout(600)
PATIENCE = 240  # seconds after which a test that hangs fails
DOCUMENTS = [case for case in golden() if case.prompt is None]
Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One that all jobs share, so that none has to wait for a start of Ray's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        running = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield running
    running.shutdown()


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Command]:
    """Start the command with these arguments."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "deploy" / "ray_embed.py"), *map(str, arguments)]
        environment = os.environ | {"RAY_ADDRESS": cluster.address} | environment
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    return output


def read(folder: Path, key: str) -> dict[object, np.ndarray | str]:
    """The embedding of each row, or its error. Raises when a row is there twice, or a file is not whole."""
    table = pq.read_table(folder)
    found = {}
    for row in table.to_pylist():
        assert row[key] not in found
        assert (row["embedding"] is None) != (row["error"] is None)
        found[row[key]] = row["error"] or np.array(row["embedding"], np.float32)
    return found


def write_texts(folder: Path, copies: int) -> dict[int, np.ndarray]:
    """Parquet with the texts of the golden cases, again and again, and what their vectors are."""
    cases = [case for case in DOCUMENTS if case.image is None] * copies
    folder.mkdir()
    table = pa.table({"id": range(len(cases)), "text": [case.text for case in cases]})
    pq.write_table(table, folder / "texts.parquet", row_group_size=500)
    return {number: case.vector for number, case in enumerate(cases)}


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Nothing says when; poll."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE, f"It never came to this: {what}"
        time.sleep(0.02)


def workers(cluster: Cluster) -> list[int]:
    """The process ids of the workers that embed something."""
    (node,) = cluster.list_all_nodes()
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    titles = {int(child): Path(f"/proc/{child}/cmdline") for child in children}
    return [child for child, title in titles.items() if title.exists() and b"ray::Worker.embed" in title.read_bytes()]


def test_pictures_have_the_authors_vectors_and_broken_ones_an_error(
    tmp_path: Path, cluster: Cluster, start: Command
) -> None:
    pictures = {case.image: case.vector for case in DOCUMENTS if case.image and not case.text}
    for number, name in enumerate(pictures):
        (tmp_path / "in" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        shutil.copy(IMAGES / name, tmp_path / "in" / str(number % 3) / name)
    expected = {f"{number % 3}/{name}": pictures[name] for number, name in enumerate(pictures)}
    (tmp_path / "in" / "broken.jpg").write_bytes((IMAGES / "800x600.png").read_bytes()[:999])
    with (tmp_path / "in" / "endless.png").open("wb") as file:
        file.truncate(33 << 20)
    (tmp_path / "in" / "notes.txt").write_text("passed over")

    told = finish(start(tmp_path / "in", tmp_path / "out", GME_API_KEY="key-of-the-service"))

    found = read(tmp_path / "out", "path")
    assert "cannot be decoded" in str(found.pop("broken.jpg"))
    assert "GME_MAX_BODY_MB" in str(found.pop("endless.png"))
    assert found.keys() == expected.keys()
    for path, vector in expected.items():
        np.testing.assert_allclose(found[path], vector, atol=1e-5)
    assert f"Finished: {len(expected) + 2} inputs, 2 failed" in told
    # Ray writes the environment of its workers into its logs.
    logs = [path for path in Path(cluster.head_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert any(b"GME_MODEL_DIR" in path.read_bytes() for path in logs)
    assert not any(b"key-of-the-service" in path.read_bytes() for path in logs)


def test_texts_images_and_both_and_another_prompt_is_refused(tmp_path: Path, start: Command) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"id": f"number {case.number}", "text": case.text, "image": case.data} for case in DOCUMENTS]
    rows.append({"id": "empty", "text": None, "image": None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "rows.parquet", row_group_size=7)

    finish(start(tmp_path / "in", tmp_path / "out"))

    found = read(tmp_path / "out", "id")
    assert "neither a text nor an image" in str(found.pop("empty"))
    assert len(found) == len(DOCUMENTS)
    for case in DOCUMENTS:
        np.testing.assert_allclose(found[f"number {case.number}"], case.vector, atol=1e-5)
    again = finish(start(tmp_path / "in", tmp_path / "out"))
    assert f"{len(found) + 1} were finished before" in again
    refused = finish(start(tmp_path / "in", tmp_path / "out", "--prompt", "Find a ship."), code=1)
    assert refused.splitlines()[-1] == (
        f"The embeddings in {tmp_path}/out were made with prompt 'You are a helpful assistant.', and this run has "
        "'Find a ship.': give the same, or another folder."
    )


def test_a_killed_worker_is_replaced_and_a_killed_job_goes_on(tmp_path: Path, cluster: Cluster, start: Command) -> None:
    expected = write_texts(tmp_path / "in", copies=100)
    out = tmp_path / "out"
    arguments = (tmp_path / "in", out, "--workers", 2, "--save-every", 0.2)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("*.parquet")}

    job = start(*arguments)
    wait_until(lambda: files() and workers(cluster), "a worker works")
    before = len(files())
    (killed, *_) = workers(cluster)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(files()) > before + 2, "the other goes on")
    job.kill()
    job.wait()
    finished = files()
    rows = len(read(out, "id"))
    assert 0 < rows < len(expected)

    told = finish(start(*arguments))

    found = read(out, "id")
    assert found.keys() == expected.keys()
    for number, vector in expected.items():
        np.testing.assert_allclose(found[number], vector, atol=1e-5)
    kept = int(re.search(r"(\d+) were finished before", told)[1])
    assert kept >= rows
    assert f"Finished: {len(expected) - kept} inputs" in told
    assert files().items() >= finished.items()
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == ["_made_by.json"]


@pytest.mark.parametrize("place", ["{}/out", "memory://{}/out"], ids=["on disk", "an object store"])
def test_a_run_that_another_has_taken_the_folder_from_cannot_finish_a_file(place: str, tmp_path: Path) -> None:
    folder = Folder.at(place.format(tmp_path))
    old, new = (Output(folder, run, "id", pa.int64()) for run in ("old", "new"))
    vector = np.ones(4, np.float32)
    old.claim({})
    old.write("1", [1], [vector], 4)
    new.claim({})
    with pytest.raises(JobError, match="Another run writes into"):
        old.write("2", [2], [vector], 4)
    new.write("1", [2], [vector], 4)
    assert sorted(new.finished().to_pylist()) == [1, 2]


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    output = Output(Folder.at(str(tmp_path)), "run", "id", pa.int64())
    output.claim({})
    output.write("1", [1], [np.ones(4, np.float32)], 4)
    (file,) = tmp_path.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(JobError, match=f"Delete it, and start again: .*{file.name}"):
        output.finished()


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"name": [1], "text": ["a"]}, "has no column `id`, which names each row: it has name, text"),
        ({"id": [1], "caption": ["a"]}, "has no column `text` and no column `image`: it has id, caption"),
        ({"id": [1, 2, 1], "text": ["a", "b", "c"]}, "has the id 1 more than once"),
        ({"id": [1, None], "text": ["a", "b"]}, "1 of the rows have no `id`"),
    ],
)
def test_parquet_that_cannot_be_used_is_a_sentence(columns: dict, sentence: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(JobError, match=sentence):
        find_inputs(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [(None, "is not there"), ([], "has no picture"), (["a.txt"], "has no picture"), (["a.png", "b.parquet"], "either")],
)
def test_a_folder_that_cannot_be_used_is_a_sentence(names: list[str] | None, sentence: str, tmp_path: Path) -> None:
    if names is not None:
        (tmp_path / "in").mkdir()
    for name in names or []:
        (tmp_path / "in" / name).touch()
    with pytest.raises(JobError, match=sentence):
        find_inputs(str(tmp_path / "in"))


def test_an_output_within_the_input_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", copies=1)
    with pytest.raises(JobError, match="choose a folder elsewhere"):
        embed_collection(argparse.Namespace(input=str(tmp_path / "in"), output=str(tmp_path / "in" / "out")))


def test_the_command_ends_with_a_sentence(tmp_path: Path, start: Command) -> None:
    write_texts(tmp_path / "in", copies=1)
    assert finish(start(tmp_path / "none", tmp_path / "out"), code=1).count("\n") == 1
    setting = finish(start(tmp_path / "in", tmp_path / "out", GME_MAX_LENGTH="long"), code=1)
    assert setting.splitlines()[-1].startswith("GME_MAX_LENGTH cannot be used")


def test_the_example_of_loading_the_vectors_runs(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client")
    page = (ROOT / "deploy" / "SCALING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    output = Output(Folder.at(str(tmp_path / "embeddings")), "run", "path", pa.string())
    output.claim({})
    vectors = list(np.eye(3, 1536, dtype=np.float32))
    output.write("1", ["a.jpg", "broken.jpg", "b.jpg"], [vectors[0], "The image cannot be decoded", vectors[1]], 1536)
    output.write("2", ["c.jpg"], [vectors[2]], 1536)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("".join(re.findall(r"^# (.*\n)", example, re.MULTILINE)), "")
