"""Embed a whole collection with Ray: pictures or Parquet in, Parquet of embeddings out.

Each worker is a process with the service's own model, and HTTP is not on the way. Its inputs
come in parts, each as much as takes it `--save-every` seconds. A part's file gets its name, and
with it `.parquet`, when it is whole: what stands in the files of OUTPUT is finished, and all
else is computed, by this run or by the next one. The settings are the service's environment
variables, of the process that runs this file.

The workers are plain actors of Ray. Ray Data would write Parquet under its final name before
it has recorded that as finished: a kill between the two would leave rows twice.
"""

import argparse
import asyncio
import functools
import importlib
import itertools
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.exceptions import RayActorError, RayTaskError

ROOT = Path(__file__).resolve().parent.parent
# Of files that are pictures.
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".webp")
# Readers of Parquet pass over names with a leading "_".
DESCRIPTION = "_made_by.json"
UNFINISHED = "_unfinished"
# Inputs of a part. 4096 embeddings of the 2B model take 25 MB.
FIRST_PART = 16
LARGEST_PART = 4096
# Texts that share a request to the batcher. A picture has one of its own.
TEXTS = 64
# Requests that a worker has at a time: enough that the next batches are prepared.
REQUESTS = 256
# Files that a worker reads at a time.
READERS = 16
PROGRESS_SECONDS = 5
# Tries of a part whose worker dies.
LIVES = 3

# What the type of a column may be. A null type is that of a column without a value.
CONTENT = {
    "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary, pa.types.is_null),
    "image": (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct, pa.types.is_null),
}

# Columns of inputs that are computed and written together.
Part = dict[str, list[Any]]
# Or the sentence why there is none.
Embedding = np.ndarray | str


class JobError(Exception):
    """Why the job cannot start or go on, in a sentence that says what to do."""


class ItemError(Exception):
    """Why one input has no embedding."""


@dataclass(frozen=True)
class Folder:
    """A folder on a file system."""

    filesystem: fs.FileSystem
    root: str

    @classmethod
    def at(cls, place: str) -> "Folder":
        """A path, or a URI that pyarrow or fsspec knows, as for Ray's readers. Raises `JobError`."""
        if "://" not in place:
            return cls(fs.LocalFileSystem(), str(Path(place).resolve()))
        try:
            filesystem, root = fs.FileSystem.from_uri(place)
            return cls(filesystem, root.rstrip("/"))
        except pa.ArrowInvalid:
            # pyarrow does not know the scheme: fsspec may.
            pass
        try:
            filesystem, root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise JobError(f"{place} cannot be read: {error}") from None
        return cls(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root.rstrip("/"))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def files(self, recursive: bool = True) -> list[str]:
        """The names, relative to the folder, in order. Raises `JobError` for one that is not UTF-8."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=recursive))
        start = len(self.root) + 1
        try:
            return sorted(one.path[start:] for one in found if one.is_file)
        except UnicodeDecodeError as error:
            raise JobError(f"The name of {error.object!r} is not UTF-8: rename the file.") from None

    def read(self, name: str, most: int = 2**20) -> bytes:
        """Raises `ItemError` for a file that cannot be read, or has more than `most` bytes."""
        try:
            with self.filesystem.open_input_file(self.path(name)) as file:
                if file.size() <= most:
                    return file.read()
        except OSError as error:
            raise ItemError(f"The file cannot be read: {error}") from None
        raise ItemError(f"The file has more than the {most} bytes of GME_MAX_BODY_MB: scale the image down.")

    def parquet(self, name: str) -> pq.ParquetFile:
        """Raises `JobError` for a file that is no Parquet."""
        try:
            return pq.ParquetFile(self.path(name), filesystem=self.filesystem)
        except (pa.ArrowInvalid, OSError) as error:
            raise JobError(f"{self.path(name)} cannot be read: {error}") from None


@dataclass(frozen=True)
class Item:
    """What is in one input: a text, an image's bytes or the name of its file, or both.

    In their place, `error` says why it cannot be read.
    """

    text: str | None = None
    image: bytes | None = None
    file: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, with those of its subfolders."""

    folder: Folder
    # The column that names a row of the output.
    key = "path"

    def find(self, names: Sequence[str]) -> pa.Table:
        """One row for each picture; all other files are passed over."""
        pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
        return pa.table({"path": pa.array(pictures, pa.string())})

    def items(self, part: Part) -> list[Item]:
        return [Item(file=path) for path in part["path"]]


@dataclass
class Rows:
    """Parquet with an `id`, and `text`, `image` (the bytes of an image file) or both: then they are fused."""

    folder: Folder
    # The row group that was read last, by its file and number.
    kept: dict[tuple[str, int], dict[str, pa.ChunkedArray]] = field(default_factory=dict)
    key = "id"

    def find(self, names: Sequence[str]) -> pa.Table:
        """A row for each input: its id, file, row group and place in it. Raises `JobError`."""
        files = [name for name in names if name.endswith(".parquet")]
        with ThreadPoolExecutor(READERS) as readers:
            tables = list(itertools.chain(*readers.map(self.find_in_file, files)))
        try:
            inputs = pa.concat_tables(tables).unify_dictionaries()
        except pa.ArrowInvalid as error:
            raise JobError(f"The files of {self.folder.root} have ids of several types: {error}") from None
        self.check_ids(inputs["id"])
        return inputs

    def find_in_file(self, name: str) -> list[pa.Table]:
        parquet = self.folder.parquet(name)
        self.check_columns(name, parquet.schema_arrow)
        tables = []
        for group in range(parquet.num_row_groups):
            ids = parquet.read_row_group(group, columns=["id"])["id"]
            columns = {"id": ids, "file": pa.repeat(name, len(ids)).dictionary_encode()}
            columns["group"] = pa.repeat(pa.scalar(group, pa.int32()), len(ids))
            columns["row"] = pa.array(np.arange(len(ids), dtype=np.int32))
            tables.append(pa.table(columns))
        return tables

    def check_columns(self, name: str, schema: pa.Schema) -> None:
        place, columns, names = self.folder.path(name), schema.names, ", ".join(schema.names)
        if "id" not in columns:
            raise JobError(f"{place} has no column `id`, which names each row: it has {names}.")
        if not {"text", "image"} & set(columns):
            raise JobError(f"{place} has no column `text` and no column `image`: it has {names}.")
        for column in {"text", "image"} & set(columns):
            kind = schema.field(column).type
            if not any(is_of(kind) for is_of in CONTENT[column]):
                wanted = "texts" if column == "text" else "the bytes of image files"
                raise JobError(f"{place}: the column `{column}` has {kind} where {wanted} should be.")

    def check_ids(self, ids: pa.ChunkedArray) -> None:
        if ids.null_count:
            raise JobError(f"In {self.folder.root}, {ids.null_count} of the rows have no `id`: give each its own.")
        counts = pc.value_counts(ids)
        if len(counts) < len(ids):
            (twice,) = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[:1]
            raise JobError(f"{self.folder.root} has the id {twice} more than once: give each row its own.")

    def items(self, part: Part) -> list[Item]:
        return [self.item(*place) for place in zip(part["file"], part["group"], part["row"], strict=True)]

    def item(self, file: str, group: int, row: int) -> Item:
        if (file, group) not in self.kept:
            self.kept = {(file, group): self.read_row_group(file, group)}
        return Item(**{name: column[row].as_py() for name, column in self.kept[file, group].items()})

    def read_row_group(self, file: str, group: int) -> dict[str, pa.ChunkedArray]:
        """Its texts and images, or for each row why they cannot be read."""
        parquet = self.folder.parquet(file)
        names = [name for name in ("text", "image") if name in parquet.schema_arrow.names]
        try:
            table = parquet.read_row_group(group, columns=names)
        except (pa.ArrowInvalid, OSError) as error:
            why = f"Row group {group} of {file} cannot be read: {error}"
            rows = parquet.metadata.row_group(group).num_rows
            return {"error": pa.chunked_array([pa.repeat(why, rows)])}
        columns = {name: table[name] for name in names}
        # As the datasets of Hugging Face have it.
        if "image" in columns and pa.types.is_struct(columns["image"].type):
            columns["image"] = pc.struct_field(columns["image"], "bytes")
        return columns


def find_inputs(place: str) -> tuple[Pictures | Rows, pa.Table]:
    """What INPUT is, and a row for each input in it. Raises `JobError`."""
    folder = Folder.at(place)
    about = folder.filesystem.get_file_info(folder.root)
    if about.type == fs.FileType.NotFound:
        raise JobError(f"{place} is not there: give a folder of pictures, or Parquet.")
    if about.is_file:
        parent, _, name = folder.root.rpartition("/")
        folder, names = Folder(folder.filesystem, parent), [name]
    else:
        names = folder.files()
    pictures = any(name.lower().endswith(SUFFIXES) for name in names)
    parquet = any(name.endswith(".parquet") for name in names)
    if pictures and parquet:
        raise JobError(f"{place} has pictures and Parquet: give a folder of either.")
    if not pictures and not parquet:
        raise JobError(f"{place} has no picture ({', '.join(SUFFIXES)}) and no Parquet file.")
    collection = Rows(folder) if parquet else Pictures(folder)
    return collection, collection.find(names)


@dataclass(frozen=True)
class Output:
    """The folder of the embeddings.

    The run that started last owns it: what others have not finished is dropped.
    """

    folder: Folder
    run: str
    key: str
    key_type: pa.DataType

    def claim(self, description: dict[str, Any]) -> None:
        """From now on no other run can finish a file.

        Raises `JobError` when what is there was made otherwise.
        """
        described = self.folder.filesystem.get_file_info(self.folder.path(DESCRIPTION)).is_file
        if described:
            check_same(json.loads(self.folder.read(DESCRIPTION)), description, self.folder.root)
        filesystem, unfinished = self.folder.filesystem, self.folder.path(UNFINISHED)
        if filesystem.get_file_info(unfinished).type != fs.FileType.NotFound:
            filesystem.delete_dir(unfinished)
        filesystem.create_dir(f"{unfinished}/{self.run}", recursive=True)
        with filesystem.open_output_stream(self.owner()):
            pass
        if not described:
            self.put(DESCRIPTION, lambda file: file.write(json.dumps(description, indent=2).encode()))

    def release(self) -> None:
        self.folder.filesystem.delete_dir(self.folder.path(UNFINISHED))

    def finished(self) -> pa.ChunkedArray:
        """The keys of all rows that are there. Raises `JobError` for a file that is not whole."""
        paths = [self.folder.path(name) for name in self.folder.files(recursive=False) if name.endswith(".parquet")]
        if not paths:
            return pa.chunked_array([], self.key_type)
        try:
            rows = pyarrow.dataset.dataset(paths, filesystem=self.folder.filesystem, format="parquet")
            return rows.to_table(columns=[self.key])[self.key].cast(self.key_type)
        except (pa.ArrowInvalid, OSError) as error:
            raise JobError(f"A file of OUTPUT is not as it was written. Delete it, and start again: {error}") from None

    def write(self, name: str, keys: list[Any], embeddings: Sequence[Embedding], dimension: int) -> None:
        """Write a part's rows. Raises `JobError` when another run owns the folder."""
        failed = np.array([isinstance(one, str) for one in embeddings])
        numbers = np.zeros((len(keys), dimension), np.float32)
        for row, embedding in zip(numbers, embeddings, strict=True):
            row[:] = 0 if isinstance(embedding, str) else embedding
        vectors = pa.FixedSizeListArray.from_arrays(numbers.ravel(), dimension, mask=pa.array(failed))
        errors = pa.array([one if isinstance(one, str) else None for one in embeddings], pa.string())
        table = pa.table({self.key: pa.array(keys, self.key_type), "embedding": vectors, "error": errors})
        self.put(self.file(name), functools.partial(pq.write_table, table, use_dictionary=False))

    def file(self, name: str) -> str:
        """Of a part."""
        return f"{self.run}-{name}.parquet"

    def is_written(self, name: str) -> bool:
        return self.folder.filesystem.get_file_info(self.folder.path(self.file(name))).is_file

    def owner(self) -> str:
        """The file that is there as long as this run owns the folder: object stores know no folder."""
        return self.folder.path(f"{UNFINISHED}/{self.run}/owner")

    def put(self, name: str, write: Callable[[pa.NativeFile], object]) -> None:
        """A file that is there as a whole, or not at all."""
        filesystem = self.folder.filesystem
        part = self.folder.path(f"{UNFINISHED}/{self.run}/{uuid.uuid4().hex}")
        try:
            with filesystem.open_output_stream(part) as file:
                write(file)
            # Asked now that `part` is there, for another run to delete.
            owned = filesystem.get_file_info(self.owner()).is_file
            if owned:
                filesystem.move(part, self.folder.path(name))
        except FileNotFoundError:
            owned = False
        if not owned:
            raise JobError(f"Another run writes into {self.folder.root} by now: this one stops.")


def check_same(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    for name in before | now:
        if before.get(name) != now.get(name):
            difference = f"{name} {before.get(name)!r}, and this run has {now.get(name)!r}"
            raise JobError(f"The embeddings in {where} were made with {difference}: give the same, or another folder.")


class Embedder:
    """The service in this process, whose import loads the model. Raises `JobError`."""

    def __init__(self, collection: Pictures | Rows, prompt: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import gme_service
        except SystemExit as stop:
            raise JobError(str(stop.__context__ or stop)) from None
        self.folder = collection.folder
        self.service = gme_service
        self.settings = gme_service.Settings.load()
        self.batcher = gme_service.app.state.batcher
        self.model = gme_service.app.state.model
        self.instruction = prompt or gme_service.DEFAULT_INSTRUCTION
        self.description = {
            "model": self.settings.model_id,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompt": self.instruction,
            "GME_MAX_IMAGE_TOKENS": self.settings.max_image_tokens,
            "GME_MAX_LENGTH": self.settings.max_length,
            "version of the service": gme_service.__version__,
            "name of a row": collection.key,
        }
        self.texts = min(TEXTS, self.settings.max_queue)
        self.room = asyncio.Semaphore(max(1, min(REQUESTS, self.settings.max_queue // TEXTS)))
        self.readers = ThreadPoolExecutor(READERS)

    async def embed(self, items: Sequence[Item]) -> list[Embedding]:
        """An embedding for each, or the sentence why there is none."""
        async with self.batcher.running():
            answers = await asyncio.gather(*map(self.embed_request, self.requests(items)))
        return list(itertools.chain(*answers))

    def requests(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Texts share a request. A picture has its own: when it fails, no other is done again."""
        for is_text, group in itertools.groupby(items, key=lambda item: item.image is None and item.file is None):
            alike = list(group)
            size = self.texts if is_text else 1
            for start in range(0, len(alike), size):
                yield alike[start : start + size]

    async def embed_request(self, items: Sequence[Item]) -> list[Embedding]:
        try:
            async with self.room:
                sources = [await self.source(item) for item in items]
                embeddings, _ = await self.batcher.embed(sources)
                return list(embeddings)
        except (self.service.ServiceError, ArithmeticError, ItemError) as error:
            if len(items) == 1:
                return [str(error)]
        alone = [await self.embed_request([item]) for item in items]
        return list(itertools.chain(*alone))

    async def source(self, item: Item) -> Any:
        """Raises `ItemError`."""
        if item.error is not None:
            raise ItemError(item.error)
        image = item.image
        if item.file is not None:
            most = int(self.settings.max_body_mb * 2**20)
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(self.readers, self.folder.read, item.file, most)
        if image is None and item.text is None:
            raise ItemError("The row has neither a text nor an image.")
        return self.service.Source(item.text or "", image, self.instruction)


class Worker:
    """A process of Ray's with the model: it reads a part's inputs, embeds them and writes a file."""

    def __init__(self, collection: Pictures | Rows, output: Output, prompt: str) -> None:
        self.collection = collection
        self.output = output
        self.prompt = prompt
        # One event loop for all parts, as the batcher belongs to its loop.
        self.runner = asyncio.Runner()

    @functools.cached_property
    def embedder(self) -> Embedder:
        return Embedder(self.collection, self.prompt)

    def describe(self) -> dict[str, Any]:
        """All that the embeddings depend on. Raises `JobError`."""
        return self.embedder.description

    def embed(self, name: str, part: Part, description: dict[str, Any]) -> tuple[int, float]:
        """The number of inputs that failed, and the seconds it took. Raises `JobError`."""
        started = time.perf_counter()
        # A worker that died may be back on another machine.
        check_same(description, self.describe(), self.output.folder.root)
        try:
            embeddings = self.runner.run(self.embedder.embed(self.collection.items(part)))
        except SystemExit as stop:
            # The device is lost. Ray starts another worker in place of one that dies.
            self.embedder.service.log.error("The worker ends: %s", stop)
            os._exit(1)
        self.output.write(name, part[self.output.key], embeddings, self.embedder.model.dimension)
        failed = sum(isinstance(one, str) for one in embeddings)
        return failed, time.perf_counter() - started

    def give_up(self, name: str, part: Part, error: str) -> None:
        """Write the error in place of each embedding."""
        keys = part[self.output.key]
        self.output.write(name, keys, [error] * len(keys), self.embedder.model.dimension)


def worker_options(workers: int | None) -> tuple[int, dict[str, Any]]:
    """How many workers, and what each gets: a GPU where there are any, else a share of the cores."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [resources["CPU"] for resources in alive if resources.get("CPU")]
    cores = int(min(nodes, default=0))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if (os.environ.get("GME_DEVICE") or "auto") == "cpu":
        gpus = 0
    number = workers or gpus or len(nodes)
    on_each = math.ceil(number / (gpus or len(nodes)))
    settings = {name: value for name, value in os.environ.items() if name.startswith(("GME_", "MODELSCOPE_"))}
    # It is for HTTP, and Ray writes the settings of its workers into its logs.
    settings.pop("GME_API_KEY", None)
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    options: dict[str, Any] = {"runtime_env": {"env_vars": settings | {"PYTHONPATH": path}}}
    if gpus:
        return number, options | {"num_gpus": 1 / on_each, "num_cpus": 1}
    if on_each > cores:
        raise JobError(f"--workers {number} is over the {cores * len(nodes)} cores that there are: give fewer.")
    return number, options | {"num_cpus": cores // on_each, "scheduling_strategy": "SPREAD"}


@dataclass
class Progress:
    """What is told while the job runs, and at its end."""

    total: int
    # Finished by earlier runs.
    before: int
    done: int = 0
    failed: int = 0
    started: float = 0.0
    told: float = 0.0

    def start(self) -> None:
        self.started = self.told = time.monotonic()
        print(f"{self.total} inputs, of which {self.before} were finished before.", flush=True)

    def add(self, done: int, failed: int) -> None:
        self.done += done
        self.failed += failed
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS:
            self.told = now
            rate = self.done / (now - self.started)
            left = self.total - self.before - self.done
            so_far = f"{self.before + self.done} of {self.total} done, {self.failed} failed"
            print(f"{so_far}, {rate:.3g} inputs/s, {duration(left / rate)} left", flush=True)

    def finish(self) -> None:
        seconds = time.monotonic() - self.started
        rate = f"{self.done / seconds:.3g} inputs/s" if self.done else "nothing was left to do"
        hint = " (the column `error` says why)" if self.failed else ""
        told = f"{self.done} inputs, {self.failed} failed{hint}, in {duration(seconds)}, {rate}."
        print(f"Finished: {told}", flush=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Job:
    """Gives the workers one part after the other."""

    def __init__(
        self, workers: Sequence[Any], output: Output, description: dict[str, Any], inputs: pa.Table, seconds: float
    ) -> None:
        self.workers = workers
        self.output = output
        self.description = description
        self.inputs = inputs
        self.seconds = seconds
        # Inputs of the table that are in a part.
        self.given = 0
        # Parts whose worker has died.
        self.again: list[Part] = []
        self.sizes = dict.fromkeys(workers, FIRST_PART)
        self.names = 0

    def run(self, progress: Progress) -> None:
        """Raises `JobError` when it cannot go on."""
        idle = list(self.workers)
        under_way: dict[Any, tuple[Any, str, Part]] = {}
        while True:
            while idle and (part := self.next_part(idle[-1])):
                worker = idle.pop()
                name = self.next_name()
                answer = worker.embed.remote(name, part, self.description)
                under_way[answer] = worker, name, part
            if not under_way:
                return
            (answer,), _ = ray.wait(list(under_way))
            worker, name, part = under_way.pop(answer)
            idle.append(worker)
            size = len(next(iter(part.values())))
            try:
                failed, seconds = ray.get(answer)
                fitting = int(size * self.seconds / seconds)
                self.sizes[worker] = min(max(fitting, 1), 4 * size, LARGEST_PART)
                progress.add(size, failed)
            except RayActorError:
                if self.output.is_written(name):
                    # The worker died between its file and its answer.
                    progress.add(size, 0)
                else:
                    self.isolate(worker, part, size, progress)

    def next_name(self) -> str:
        self.names += 1
        return f"{self.names:06}"

    def next_part(self, worker: Any) -> Part | None:
        """As much as takes the worker `seconds`; near the end less, that all end together."""
        if self.again:
            return self.again.pop()
        left = len(self.inputs) - self.given
        share = max(FIRST_PART, left // (2 * len(self.workers)))
        part = self.inputs.slice(self.given, min(self.sizes[worker], share))
        self.given += len(part)
        return part.to_pydict() if len(part) else None

    def isolate(self, worker: Any, part: Part, size: int, progress: Progress) -> None:
        """Halve a part at which workers die, again and again, down to the input they die of."""
        if size > 1:
            half = size // 2
            self.again.append({name: column[half:] for name, column in part.items()})
            self.again.append({name: column[:half] for name, column in part.items()})
            return
        try:
            ray.get(worker.give_up.remote(self.next_name(), part, f"{LIVES} workers have died of it."))
        except RayActorError as error:
            raise JobError(f"The workers die, whatever they do: {error}") from None
        progress.add(1, 1)


def embed_collection(arguments: argparse.Namespace) -> None:
    """Raises `JobError`, `OSError`, or `RayTaskError` with one of them as its cause."""
    collection, inputs = find_inputs(arguments.input)
    place = Folder.at(arguments.output)
    if f"{place.root}/".startswith(f"{Folder.at(arguments.input).root}/"):
        raise JobError(f"{arguments.output} lies in {arguments.input}: choose a folder elsewhere.")
    ray.init(logging_level="error", log_to_driver=False)
    key_type = inputs.schema.field(collection.key).type
    output = Output(place, uuid.uuid4().hex[:8], collection.key, key_type)
    number, options = worker_options(arguments.workers)
    actor = ray.remote(max_restarts=-1, max_task_retries=LIVES - 1)(Worker).options(**options)
    workers = [actor.remote(collection, output, arguments.prompt) for _ in range(number)]
    print(f"{len(inputs)} inputs. Waiting for one of {number} workers to load the model ...", flush=True)
    try:
        loaded, _ = ray.wait([worker.describe.remote() for worker in workers])
        description = ray.get(loaded[0])
    except RayActorError as error:
        raise JobError(f"The workers die while they load the model: {error}") from None
    output.claim(description)
    left = inputs.filter(pc.invert(pc.is_in(inputs[collection.key], output.finished())))
    progress = Progress(total=len(inputs), before=len(inputs) - len(left))
    progress.start()
    Job(workers, output, description, left, arguments.save_every).run(progress)
    output.release()
    progress.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help="a folder of pictures, or Parquet: id and text, image or both")
    parser.add_argument("output", metavar="OUTPUT", help="a folder: Parquet with path or id, embedding, error")
    parser.add_argument("--prompt", default="", help="give one for queries; documents have none")
    parser.add_argument("--workers", type=int, help="default: one for each GPU, or for each machine without any")
    parser.add_argument("--save-every", type=float, default=30, metavar="SECONDS", help="what a kill may cost (30)")
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        parser.error("--workers: give 1 or more")
    return arguments


def main() -> None:
    """Exits with 0 when all inputs have a row, be it with an error; else with 1 and a sentence."""
    arguments = parse_arguments()
    try:
        embed_collection(arguments)
    # Before the others: it is of its cause's class too, with a traceback for a sentence.
    except RayTaskError as error:
        if not isinstance(error.cause, JobError | OSError):
            raise
        sys.exit(str(error.cause))
    except (JobError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # By this name the workers find the classes.
    importlib.import_module("deploy.ray_embed").main()
