"""deploy/ray_embed.py on a real local Ray: files in, vectors out, and what happens when it is killed on the way."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGES, ROOT, golden

ray = pytest.importorskip("ray", reason="deploy/requirements.txt is not installed")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402
from pyarrow import fs  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from deploy import ray_embed  # noqa: E402
from deploy.ray_embed import (  # noqa: E402
    Folder,
    Item,
    ItemError,
    Job,
    JobError,
    NoModelError,
    Output,
    Pictures,
    Progress,
    Rows,
    Worker,
    digest,
    embed_collection,
    find_inputs,
    worker_options,
    worker_settings,
)

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
def connected(cluster: Cluster) -> Iterator[None]:
    """The test itself can start actors."""
    ray.init(cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


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


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """What the condition returns once that is true. Nothing says when; poll."""
    started = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - started < PATIENCE, f"It never came to this: {what}"
        time.sleep(0.02)
    return found


def children(process: int) -> set[int]:
    """Also those of its children."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()):
            found |= {child} | children(child)
    return found


def workers(of: set[int]) -> set[int]:
    """Those of the processes that embed something."""
    found = set()
    for process in of:
        with contextlib.suppress(OSError):
            if b"ray::Worker.embed" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.add(process)
    return found


def workers_of(cluster: Cluster) -> set[int]:
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    return set().union(*(workers(children(raylet)) for raylet in raylets))


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

    secrets = {"GME_API_KEY": "key-of-the-service", "MODELSCOPE_API_TOKEN": "token-of-the-hub"}

    told = finish(start(tmp_path / "in", tmp_path / "out", **secrets))

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
    for secret in secrets.values():
        assert not any(secret.encode() in path.read_bytes() for path in logs)
    made_by = json.loads((tmp_path / "out" / "_made_by.json").read_text())
    assert (made_by["INPUT"], made_by["dimension"]) == (str(tmp_path / "in"), 128)


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
        "'Find a ship.': give the same, or another OUTPUT."
    )


def test_a_killed_worker_is_replaced_and_a_killed_job_goes_on(tmp_path: Path, cluster: Cluster, start: Command) -> None:
    expected = write_texts(tmp_path / "in", copies=1000)
    out = tmp_path / "out"
    arguments = (tmp_path / "in", out, "--workers", 2, "--save-every", 0.2)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("*.parquet")}

    def both() -> set[int]:
        found = workers_of(cluster)
        return found if files() and len(found) == 2 else set()

    job = start(*arguments)
    killed, other = wait_until(both, "both workers work")
    # With a part that never ends, the job does not either, however fast the machine is.
    os.kill(other, signal.SIGSTOP)
    try:
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: workers_of(cluster) - {killed} > {other}, "another works in its place")
        job.kill()
        job.wait()
        finished = files()
        rows = len(read(out, "id"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGCONT)
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


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_with_a_ray_of_its_own_leaves_no_worker_behind(how: int, tmp_path: Path, start: Command) -> None:
    write_texts(tmp_path / "in", copies=1000)
    job = start(tmp_path / "in", tmp_path / "out", "--save-every", 0.2, RAY_ADDRESS="local")
    wait_until(lambda: workers(children(job.pid)), "a worker works")
    its_own = workers(children(job.pid))
    job.send_signal(how)
    told = finish(job, code=1 if how == signal.SIGTERM else -how)
    assert ("Stopped. The same command goes on" in told) == (how == signal.SIGTERM)
    wait_until(lambda: not any(Path(f"/proc/{process}/exe").exists() for process in its_own), "its worker has ended")


def test_a_worker_without_a_place_holds_nothing_up(tmp_path: Path, connected: None, start: Command) -> None:
    expected = write_texts(tmp_path / "in", copies=10)

    class Other:
        """Something else that runs on the cluster."""

    other = ray.remote(num_cpus=1)(Other).remote()
    ray.get(other.__ray_ready__.remote())
    finish(start(tmp_path / "in", tmp_path / "out", "--workers", 2))
    assert read(tmp_path / "out", "id").keys() == expected.keys()


def test_a_machine_that_is_lost_costs_no_row(tmp_path: Path, cluster: Cluster, start: Command) -> None:
    expected = write_texts(tmp_path / "in", copies=1000)
    machine = cluster.add_node(num_cpus=2)
    job = start(tmp_path / "in", tmp_path / "out", "--save-every", 0.2)
    wait_until(lambda: len(workers_of(cluster)) == 2, "a worker works on each machine")
    cluster.remove_node(machine)
    finish(job)
    assert read(tmp_path / "out", "id").keys() == expected.keys()


def run_job(tmp_path: Path, workers: int = 1, deadly: Any = (), faults: Any = ()) -> dict[object, np.ndarray | str]:
    """Run it with workers that have no model: some cannot start, and they die of some inputs."""

    class Toy:
        def __init__(self, output: Output, fault: str | None) -> None:
            self.output = output
            self.fault = fault

        def describe(self) -> dict[str, Any]:
            if self.fault:
                raise NoModelError(self.fault)
            return {"dimension": 4}

        def embed(self, name: str, part: dict[str, list[Any]], _: dict[str, Any]) -> tuple[int, float]:
            if set(part["id"]) & set(deadly):
                os._exit(1)
            self.output.write(name, part["id"], [np.ones(4, np.float32) for _ in part["id"]], 4)
            return 0, 0.01

    inputs = pa.table({"id": range(20)})
    output = Output(Folder.at(str(tmp_path / "out")), "run", "id", pa.int64())
    actor = ray.remote(max_restarts=-1, max_task_retries=2, num_cpus=0)(Toy)
    faults = [*faults, *[None] * workers][:workers]
    job = Job([actor.remote(output, fault) for fault in faults], output, 1.0)
    output.claim(job.start())
    progress = Progress(total=len(inputs), before=0)
    progress.start()
    job.run(inputs, progress)
    assert progress.done == len(inputs)
    assert progress.failed == len(deadly)
    return read(tmp_path / "out", "id")


def test_a_job_tells_how_far_it_is_and_how_long_it_takes(
    tmp_path: Path, connected: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_embed, "PROGRESS_SECONDS", 0)
    run_job(tmp_path)
    told = capsys.readouterr().out
    assert re.search(r"^\d+ of \d+ done, 0 failed, .* inputs/s, \d+ s left$", told, re.MULTILINE)


def test_an_input_at_which_workers_die_gets_an_error_and_no_other_does(tmp_path: Path, connected: None) -> None:
    found = run_job(tmp_path, deadly=[7])
    assert {number for number, embedding in found.items() if isinstance(embedding, str)} == {7}
    assert found[7] == "3 workers have died of it."
    assert found.keys() == set(range(20))


def test_workers_that_die_of_everything_end_the_job_and_write_nothing(tmp_path: Path, connected: None) -> None:
    with pytest.raises(JobError, match="of one input after the other"):
        run_job(tmp_path, deadly=range(20))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_worker_that_cannot_start_is_told_and_the_others_go_on(
    tmp_path: Path, connected: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(tmp_path, workers=2, faults=["The hub is down."]).keys() == set(range(20))
    with pytest.raises(JobError, match=r"^The hub is down\.$"):
        run_job(tmp_path, workers=2, faults=["The hub is down."] * 2)
    # Where the first parts are done before the fault comes, nobody needs to know it.
    assert capsys.readouterr().out.count("A worker cannot start, and 1 go on. The hub is down.") >= 1


def test_a_part_that_is_written_is_not_computed_again(tmp_path: Path) -> None:
    output = Output(Folder.at(str(tmp_path / "out")), "run", "path", pa.string())
    output.claim({})
    output.write("1", ["a.jpg", "b.jpg"], [np.ones(4, np.float32), "It cannot be decoded."], 4)
    # It would be refused as another model's.
    worker = Worker(Pictures(Folder.at(str(tmp_path))), output, "")
    assert worker.embed("1", {"path": ["a.jpg", "b.jpg"]}, {"model": "another"}) == (1, 0.0)


def test_progress_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=99, before=10)
    progress.start()
    progress.tell()
    progress.add(1, 0)
    progress.started -= 60
    progress.told -= 60
    progress.add(29, 2)
    first, nothing, line = capsys.readouterr().out.splitlines()
    assert first == "99 inputs, of which 10 were finished before."
    assert nothing == "10 of 99 done, 0 failed"
    assert line == "40 of 99 done, 2 failed, 0.5 inputs/s, 118 s left"


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
    old.release()
    new.write("1", [2], [vector], 4)
    assert sorted(new.finished().to_pylist()) == [1, 2]
    new.release()
    assert sorted(name for name in folder.files()) == ["_made_by.json", "new-1.parquet", "old-1.parquet"]


@pytest.mark.parametrize("place", ["{}/out", "memory://{}/out"], ids=["on disk", "an object store"])
def test_a_part_that_is_given_to_others_cannot_be_finished_any_more(place: str, tmp_path: Path) -> None:
    output = Output(Folder.at(place.format(tmp_path)), "run", "id", pa.int64())
    output.claim({})
    vector = np.ones(4, np.float32)
    with pytest.raises(JobError):
        output.put(output.file("1"), lambda _: output.drop("1"))
    with pytest.raises(JobError):
        output.write("1", [1], [vector], 4)
    assert not output.is_written("1")
    output.write("10", [1], [vector], 4)
    output.drop("10")
    assert output.is_written("10")


class Late(MemoryFileSystem):
    """A worker that was allowed to finish its file, and is slow to do it."""

    meanwhile: Callable[[], None]

    def mv(self, *names: str, **options: object) -> None:
        self.meanwhile()
        super().mv(*names, **options)


def test_a_part_that_is_given_to_others_in_the_last_moment_is_not_finished(tmp_path: Path) -> None:
    store = Late()
    folder = Folder(fs.PyFileSystem(fs.FSSpecHandler(store)), f"{tmp_path}/late")
    output = Output(folder, "run", "id", pa.int64())
    store.meanwhile = lambda: None
    output.claim({})
    store.meanwhile = lambda: output.drop("1")
    with pytest.raises(JobError):
        output.write("1", [1], [np.ones(4, np.float32)], 4)
    assert not output.is_written("1")


def test_rows_that_are_there_twice_are_told(tmp_path: Path) -> None:
    output = Output(Folder.at(str(tmp_path)), "run", "id", pa.int64())
    output.claim({})
    output.write("1", [1, 2], [np.ones(4, np.float32)] * 2, 4)
    output.write("2", [2, 3], [np.ones(4, np.float32)] * 2, 4)
    with pytest.raises(JobError, match="has the id 2 more than once"):
        output.finished()


def test_a_folder_with_parquet_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "mine.parquet")
    output = Output(Folder.at(str(tmp_path)), "run", "path", pa.string())
    with pytest.raises(JobError, match="give another OUTPUT"):
        output.claim({})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.parquet"]


def test_a_run_that_describes_the_folder_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, output = (Output(Folder.at(str(tmp_path)), run, "id", pa.int64()) for run in ("other", "run"))
    is_described = Output.is_described

    def ask(self: Output, description: dict[str, Any]) -> bool:
        """The other claims the folder between this question and the next."""
        monkeypatch.undo()
        answer = is_described(self, description)
        other.claim({"prompt": "Find a ship."})
        return answer

    monkeypatch.setattr(Output, "is_described", ask)
    with pytest.raises(JobError, match=r"made with prompt 'Find a ship\.'"):
        output.claim({"prompt": ""})


def test_another_checkpoint_under_the_same_name_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    seen = {digest(tmp_path)}
    (tmp_path / "config.json").write_text("{ }")
    seen.add(digest(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    seen.add(digest(tmp_path))
    assert len(seen) == 3


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    output = Output(Folder.at(str(tmp_path)), "run", "id", pa.int64())
    output.claim({})
    output.write("1", [1], [np.ones(4, np.float32)], 4)
    (file,) = tmp_path.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(JobError, match=f"Delete a file that is damaged, and start again; .*{file.name}"):
        output.finished()


class Away(MemoryFileSystem):
    """A store whose token has expired."""

    def _open(self, path: str, *_: object, **__: object) -> None:
        raise OSError("ExpiredToken")


def test_a_store_that_is_away_makes_no_rows_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_embed, "PAUSES", (0, 0))
    MemoryFileSystem().pipe("/pictures/a.jpg", b"a")
    away = Folder(fs.PyFileSystem(fs.FSSpecHandler(Away())), "/pictures")
    with pytest.raises(JobError, match=r"/pictures/a\.jpg cannot be read: .*ExpiredToken"):
        away.read("a.jpg")
    with pytest.raises(ItemError, match="The file cannot be read"):
        Folder.at(str(tmp_path)).read("a.jpg")


def test_a_disk_that_is_away_makes_no_rows_of_errors(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(IMAGES / "800x600.png", tmp_path / "in" / "0.png")
    output = Output(Folder.at(str(tmp_path / "out")), "run", "path", pa.string())
    output.claim({})
    worker = Worker(Pictures(Folder.at(str(tmp_path / "in"))), output, "")
    names = [f"{number}.png" for number in range(16)]
    assert worker.embed("1", {"path": names}, worker.describe())[0] == 15
    (tmp_path / "in" / "0.png").unlink()
    with pytest.raises(JobError, match="16 files in a row cannot be read"):
        worker.embed("2", {"path": names}, worker.describe())
    assert not output.is_written("2")


def test_a_damaged_row_group_is_rows_with_an_error(tmp_path: Path) -> None:
    texts = [f"A text of its own, {number * 7919}." for number in range(2000)]
    pq.write_table(pa.table({"id": range(2000), "text": texts}), tmp_path / "rows.parquet", row_group_size=1000)
    about = pq.read_metadata(tmp_path / "rows.parquet").row_group(1).column(1)
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    start = about.dictionary_page_offset or about.data_page_offset
    content[start + 100 : start + 200] = b"\xff" * 100
    (tmp_path / "rows.parquet").write_bytes(content)
    collection, inputs = find_inputs(str(tmp_path))
    first, second = (collection.items(inputs.slice(at, 1).to_pydict())[0] for at in (0, 1000))
    assert first == Item(text=texts[0])
    assert "Row group 1 of rows.parquet cannot be read" in str(second.error)


def test_a_row_that_names_a_picture_and_does_not_hold_it_is_an_error(tmp_path: Path) -> None:
    images = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    columns = {"id": pa.array(["1", "2", "3"]), "text": pa.array(["a", "b", "c"])}
    # As pandas has its categories.
    columns = {name: column.dictionary_encode() for name, column in columns.items()}
    pq.write_table(pa.table(columns | {"image": images}), tmp_path / "rows.parquet")
    collection, inputs = find_inputs(str(tmp_path))
    assert isinstance(collection, Rows)
    assert inputs["id"].type == pa.large_string()
    whole, named, text = collection.items(inputs.to_pydict())
    assert whole == Item(text="a", image=b"a")
    assert "not its bytes: b.jpg" in str(named.error)
    assert text == Item(text="c")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"name": [1], "text": ["a"]}, "has no column `id`, which names each row: it has name, text"),
        ({"id": [1], "caption": ["a"]}, "has no column `text` and no column `image`: it has id, caption"),
        ({"id": [1, 2, 1], "text": ["a", "b", "c"]}, "has the id 1 more than once"),
        ({"id": [1, None], "text": ["a", "b"]}, "1 of the rows have no `id`"),
        ({"id": [], "text": []}, "The Parquet in .* has no rows"),
        ({"id": [1], "text": [2]}, "the column `text` has int64 where texts should be"),
        ({"id": [1], "image": [{"path": "a.jpg"}]}, "the column `image` has struct<path: string>"),
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


GPUS = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("machines", "workers", "outcome"),
    [
        ([{}], None, "no machine with cores"),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 9, "over the 8 cores"),
        ([GPUS], 3, "cannot be shared evenly by 2 GPUs"),
        ([{"CPU": 4.0}, {"CPU": 4.0}], None, (2, {"num_cpus": 4})),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 4, (4, {"num_cpus": 2})),
        ([GPUS], None, (2, {"num_gpus": 1, "num_cpus": 1})),
        ([GPUS], 4, (4, {"num_gpus": 0.5, "num_cpus": 1})),
    ],
)
def test_what_a_worker_gets(
    machines: list[dict[str, float]], workers: int | None, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GME_DEVICE")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": machine} for machine in machines])
    monkeypatch.setattr(ray, "cluster_resources", lambda: machines[0])
    if isinstance(outcome, str):
        with pytest.raises(JobError, match=outcome):
            worker_options(workers)
        return
    number, options = worker_options(workers)
    assert number == outcome[0]
    assert options.items() >= outcome[1].items()


@pytest.mark.parametrize(
    ("device", "on_gpu", "given"), [("", True, "cuda"), ("auto", True, "cuda"), ("auto", False, "auto")]
)
def test_a_worker_with_a_gpu_never_goes_on_without(
    device: str, on_gpu: bool, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GME_DEVICE", device)
    assert worker_settings(on_gpu)["GME_DEVICE"] == given


def test_the_command_ends_with_a_sentence(tmp_path: Path, start: Command) -> None:
    write_texts(tmp_path / "in", copies=1)
    assert finish(start(tmp_path / "none", tmp_path / "out"), code=1).count("\n") == 1
    setting = finish(start(tmp_path / "in", tmp_path / "out", GME_MAX_LENGTH="long"), code=1)
    assert setting.splitlines()[-1].startswith("GME_MAX_LENGTH cannot be used")
    assert "give the seconds" in finish(start(tmp_path / "in", tmp_path / "out", "--save-every", "nan"), code=2)


def test_the_example_of_loading_the_vectors_runs(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client")
    page = (ROOT / "deploy" / "SCALING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    output = Output(Folder.at(str(tmp_path / "embeddings")), "run", "path", pa.string())
    output.claim({})
    vectors = list(np.eye(3, 1536, dtype=np.float32))
    output.write("1", ["a.jpg", "broken.jpg", "b.jpg"], [vectors[0], "The image cannot be decoded", vectors[1]], 1536)
    output.write("2", ["c.jpg"], [vectors[2]], 1536)
    # Again, as the page says.
    example = example.replace('":memory:"', 'path="database"')
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("".join(re.findall(r"^# (.*\n)", example, re.MULTILINE)), "")
