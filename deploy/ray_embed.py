"""Embed a whole collection with Ray: pictures or Parquet in, Parquet of embeddings out.

Each worker is a process with the service's own model, and HTTP is not on the way. Its inputs
come in parts, each as much as takes it `--save-every` seconds. A part's file gets its name, and
with it `.parquet`, when it is whole: what stands in the files of OUTPUT is finished, and all
else is computed, by this run or by the next one. The settings are the service's environment
variables, of the process that runs this file.
"""

import argparse
import asyncio
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from ray.exceptions import RayError, RayTaskError

ROOT = Path(__file__).resolve().parent.parent
# Of files that are pictures.
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".webp")
# Readers of Parquet pass over names with a leading "_".
DESCRIPTION = "_made_by.json"
UNFINISHED = "_unfinished"
# Inputs of a worker's first part: on a CPU, one may take a minute.
FIRST_PART = 1
# 32,768 embeddings of the 2B model take 200 MB.
LARGEST_PART = 1 << 15
# Near the end the parts become smaller, but not below this.
SMALL_PART = 16
# Texts that share a request to the batcher. A picture has one of its own.
TEXTS = 64
# Requests that a worker has at a time: enough that the next batches are prepared.
REQUESTS = 256
# Files that a worker reads at a time.
READERS = 16
# A line of progress at most, and at least, as often.
PROGRESS_SECONDS = 5
SILENCE_SECONDS = 60
# Tries of a part whose worker dies.
LIVES = 3
# Seconds before each try to read a file.
PAUSES = (0, 1, 10)

# What the type of a column may be. A null type is that of a column without a value.
TEXTS_IN = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
BYTES_IN = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
CONTENT = {"text": ("texts", TEXTS_IN), "image": ("the bytes of image files", BYTES_IN)}
# What is wrong with one file. Of any other error, its whole file system may be the reason.
OF_A_FILE = (FileNotFoundError, PermissionError, IsADirectoryError)
UNREADABLE = "The file cannot be read: "
# Settings that no worker needs. Ray writes those of its workers into its logs.
SECRETS = ("GME_API_KEY", "MODELSCOPE_API_TOKEN")

# Columns of inputs that are computed and written together.
Part = dict[str, list[Any]]
# Or the sentence why there is none.
Embedding = np.ndarray | str


class JobError(Exception):
    """Why the job cannot start or go on, in a sentence that says what to do."""


class NoModelError(JobError):
    """Why a worker has no model. Others may have one."""


class ItemError(Exception):
    """Why one input has no embedding."""


@dataclass(frozen=True)
class Folder:
    """A folder on a file system."""

    filesystem: fs.FileSystem
    root: str
    # That of its URI, if any.
    scheme: str = ""

    @classmethod
    def at(cls, place: str) -> "Folder":
        """A path, or a URI that pyarrow or fsspec knows, as for Ray's readers. Raises `JobError`."""
        if "://" not in place:
            return cls(fs.LocalFileSystem(), str(Path(place).resolve()))
        scheme = place.partition("://")[0]
        try:
            filesystem, root = fs.FileSystem.from_uri(place)
            if isinstance(filesystem, fs.LocalFileSystem):
                scheme = ""
            return cls(filesystem, root.rstrip("/"), scheme)
        except pa.ArrowInvalid:
            # pyarrow does not know the scheme: fsspec may.
            pass
        try:
            filesystem, root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise JobError(f"{place} cannot be read: {error}") from None
        return cls(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root.rstrip("/"), scheme)

    @property
    def name(self) -> str:
        """The path, or the URI without its options, which may hold keys."""
        return f"{self.scheme}://{self.root}" if self.scheme else self.root

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def files(self, recursive: bool = True) -> list[str]:
        """The names, relative to the folder, in order; of a folder that is not there, none.

        Raises `JobError` for one that is not UTF-8.
        """
        everything = fs.FileSelector(self.root, allow_not_found=True, recursive=recursive)
        found = self.filesystem.get_file_info(everything)
        start = len(self.root) + 1
        try:
            return sorted(one.path[start:] for one in found if one.is_file)
        except UnicodeDecodeError as error:
            raise JobError(f"The name of {error.object!r} is not UTF-8: rename the file.") from None

    def read(self, name: str, most: int = 2**20) -> bytes:
        """What is in a file of at most `most` bytes.

        Raises `ItemError` where the file is at fault, `JobError` where the file system may be.
        """
        limit = f"the {most} bytes of GME_MAX_BODY_MB"
        for pause in PAUSES:
            time.sleep(pause)
            try:
                with self.filesystem.open_input_file(self.path(name)) as file:
                    if file.size() > most:
                        raise ItemError(f"The file has more than {limit}: scale the image down.")
                    return file.read()
            except OF_A_FILE as error:
                raise ItemError(f"{UNREADABLE}{error}") from None
            except OSError as error:
                reason = error
        raise self.unreadable(name, reason)

    def read_through(self, name: str) -> None:
        """Raises `JobError` where the bytes of a file do not come, whatever is in them."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as file:
                while file.read(2**24):
                    pass
        except OSError as error:
            raise self.unreadable(name, error) from None

    def unreadable(self, name: str, error: Exception) -> JobError:
        advice = "When it can be read again, or is taken away, the same command goes on."
        return JobError(f"{self.path(name)} cannot be read: {error}. {advice}")

    def parquet(self, name: str) -> pq.ParquetFile:
        """Raises `JobError` for a file that is no Parquet."""
        try:
            return pq.ParquetFile(self.path(name), filesystem=self.filesystem)
        except (pa.ArrowInvalid, OSError) as error:
            raise self.unreadable(name, error) from None


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
        return pa.table({"path": pa.array(pictures, pa.large_string())})

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
        if not any(map(len, tables)):
            raise JobError(f"The Parquet in {self.folder.name} has no rows.")
        try:
            inputs = pa.concat_tables(tables).unify_dictionaries()
        except pa.ArrowInvalid as error:
            raise JobError(f"The files of {self.folder.name} have ids of several types: {error}") from None
        self.check_ids(inputs["id"])
        return inputs

    def find_in_file(self, name: str) -> list[pa.Table]:
        with self.folder.parquet(name) as parquet:
            self.check_columns(name, parquet.schema_arrow)
            groups = range(parquet.num_row_groups)
            try:
                return [self.find_in_group(name, parquet, group) for group in groups]
            except (pa.ArrowInvalid, OSError) as error:
                raise self.folder.unreadable(name, error) from None

    def find_in_group(self, name: str, parquet: pq.ParquetFile, group: int) -> pa.Table:
        ids = keys_of(parquet.read_row_group(group, columns=["id"])["id"])
        columns = {"id": ids, "file": pa.repeat(name, len(ids)).dictionary_encode()}
        columns["group"] = pa.repeat(pa.scalar(group, pa.int32()), len(ids))
        columns["row"] = pa.array(np.arange(len(ids), dtype=np.int32))
        return pa.table(columns)

    def check_columns(self, name: str, schema: pa.Schema) -> None:
        place = self.folder.path(name)
        names = ", ".join(schema.names)
        if "id" not in schema.names:
            raise JobError(f"{place} has no column `id`, which names each row: it has {names}.")
        if not {"text", "image"} & set(schema.names):
            raise JobError(f"{place} has no column `text` and no column `image`: it has {names}.")
        for column in {"text", "image"} & set(schema.names):
            kind = schema.field(column).type
            wanted, types = CONTENT[column]
            if not any(is_of(type_of_values(kind)) for is_of in types):
                raise JobError(f"{place}: the column `{column}` has {kind} where {wanted} should be.")

    def check_ids(self, ids: pa.ChunkedArray) -> None:
        place = self.folder.name
        if ids.null_count:
            raise JobError(f"In {place}, {ids.null_count} of the rows have no `id`: give each its own.")
        twice = first_twice(ids)
        if twice is not None:
            raise JobError(f"{place} has the id {twice} more than once: give each row its own.")

    def items(self, part: Part) -> list[Item]:
        return [self.item(*place) for place in zip(part["file"], part["group"], part["row"], strict=True)]

    def item(self, file: str, group: int, row: int) -> Item:
        if (file, group) not in self.kept:
            # Before the next is read, as each may take gigabytes.
            self.kept.clear()
            self.kept[file, group] = self.read_row_group(file, group)
        values = {name: column[row].as_py() for name, column in self.kept[file, group].items()}
        image = values.get("image")
        # As the datasets of Hugging Face have it.
        if isinstance(image, dict):
            values["image"] = image["bytes"]
            if image["bytes"] is None and image.get("path"):
                return Item(error=f"The row has a picture's path and not its bytes: {image['path']}.")
        return Item(**values)

    def read_row_group(self, file: str, group: int) -> dict[str, pa.ChunkedArray]:
        """Its texts and images, or for each row why they cannot be read.

        Raises `JobError` where it is the file system that cannot be read.
        """
        with self.folder.parquet(file) as parquet:
            names = [name for name in ("text", "image") if name in parquet.schema_arrow.names]
            # Twice, as a network may fail once.
            for _ in range(2):
                try:
                    table = parquet.read_row_group(group, columns=names)
                    return {name: table[name] for name in names}
                except (pa.ArrowInvalid, OSError) as error:
                    reason = f"Row group {group} of {file} cannot be read: {error}"
                self.folder.read_through(file)
            rows = parquet.metadata.row_group(group).num_rows
        return {"error": pa.chunked_array([pa.repeat(reason, rows)])}


def keys_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A category's values; and strings of more than 2 GB fit into one column of `large_string`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    return column


def first_twice(keys: pa.ChunkedArray) -> pa.Scalar | None:
    """A key that is there more than once."""
    counts = pc.value_counts(keys)
    if len(counts) == len(keys):
        return None
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]


def type_of_values(kind: pa.DataType) -> pa.DataType:
    """Of a category, or of an image as the datasets of Hugging Face have it."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return kind.field("bytes").type
    return kind


def find_inputs(place: str) -> tuple[Pictures | Rows, pa.Table]:
    """What INPUT is, and a row for each input in it. Raises `JobError`."""
    folder = Folder.at(place)
    about = folder.filesystem.get_file_info(folder.root)
    if about.type == fs.FileType.NotFound:
        raise JobError(f"{place} is not there: give a folder of pictures, or Parquet.")
    if about.is_file:
        parent, _, name = folder.root.rpartition("/")
        folder, names = replace(folder, root=parent), [name]
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

    The run that started last owns it: what others have not finished is dropped. On a disk, where a
    file moves in one step, this is exact. In an object store a move is a copy: one that another run
    began before it lost the folder may still come to its end, and its rows are there twice.
    The next run is told by `finished`.
    """

    folder: Folder
    run: str
    key: str
    key_type: pa.DataType

    def claim(self, description: dict[str, Any]) -> None:
        """From now on no other run can finish a file.

        Raises `JobError` when what is there was made otherwise.
        """
        self.is_described(description)
        filesystem = self.folder.filesystem
        unfinished = self.folder.path(UNFINISHED)
        if filesystem.get_file_info(unfinished).type != fs.FileType.NotFound:
            filesystem.delete_dir(unfinished)
        filesystem.create_dir(f"{unfinished}/{self.run}", recursive=True)
        self.touch(self.owner())
        # Asked again: another first run may have described it meanwhile.
        if not self.is_described(description):
            self.put(DESCRIPTION, lambda file: file.write(json.dumps(description, indent=2).encode()))

    def is_described(self, description: dict[str, Any]) -> bool:
        """Whether the folder says what made it. Raises `JobError` when that was something else."""
        if self.folder.filesystem.get_file_info(self.folder.path(DESCRIPTION)).is_file:
            check_same(json.loads(self.folder.read(DESCRIPTION)), description, self.folder.name)
            return True
        if self.files():
            made_by = f"no {DESCRIPTION}, which says what made it"
            raise JobError(f"{self.folder.name} has Parquet and {made_by}: give another OUTPUT.")
        return False

    def release(self) -> None:
        """Nothing of an unfinished file is left, unless another run owns the folder by now."""
        with contextlib.suppress(FileNotFoundError):
            if self.folder.filesystem.get_file_info(self.owner()).is_file:
                self.folder.filesystem.delete_dir(self.folder.path(UNFINISHED))

    def files(self) -> list[str]:
        """The paths of all files that are finished."""
        names = self.folder.files(recursive=False)
        return [self.folder.path(name) for name in names if name.endswith(".parquet")]

    def finished(self) -> pa.ChunkedArray:
        """The keys of all rows that are there. Raises `JobError` for files that are not as written."""
        paths = self.files()
        place = self.folder.name
        if not paths:
            return pa.chunked_array([], self.key_type)
        try:
            rows = pyarrow.dataset.dataset(paths, filesystem=self.folder.filesystem, format="parquet")
            keys = keys_of(rows.to_table(columns=[self.key])[self.key]).cast(self.key_type)
        except (pa.ArrowInvalid, OSError) as error:
            advice = "Delete a file that is damaged, and start again; else give another OUTPUT"
            raise JobError(f"{place} is not as it was written. {advice}: {error}") from None
        twice = first_twice(keys)
        if twice is not None:
            advice = "Delete one of the files that have it, and start again."
            raise JobError(f"{place} has the {self.key} {twice} more than once. {advice}")
        return keys

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

    def failed(self, name: str) -> int:
        """The number of errors in a part that is written."""
        place = self.folder.path(self.file(name))
        errors = pq.read_table(place, columns=["error"], filesystem=self.folder.filesystem)["error"]
        return len(errors) - errors.null_count

    def owner(self) -> str:
        """The file that is there as long as this run owns the folder: object stores know no folder."""
        return self.folder.path(f"{UNFINISHED}/{self.run}/owner")

    def dropped(self, name: str) -> str:
        """The file that is there when a part's file must not be finished any more."""
        return self.folder.path(f"{UNFINISHED}/{self.run}/{name}.dropped")

    def touch(self, path: str) -> None:
        """Raises `JobError` when another run owns the folder."""
        try:
            with self.folder.filesystem.open_output_stream(path):
                pass
        except FileNotFoundError:
            raise self.taken() from None

    def put(self, name: str, write: Callable[[pa.NativeFile], object]) -> None:
        """A file that is there as a whole, or not at all."""
        filesystem = self.folder.filesystem
        attempt = self.folder.path(f"{UNFINISHED}/{self.run}/{name}.{uuid.uuid4().hex}")
        try:
            with filesystem.open_output_stream(attempt) as file:
                write(file)
            # Asked now that `attempt` is there, for who drops it to delete.
            owner, dropped = filesystem.get_file_info([self.owner(), self.dropped(name)])
            allowed = owner.is_file and not dropped.is_file
            if allowed:
                filesystem.move(attempt, self.folder.path(name))
        except FileNotFoundError:
            allowed = False
        if not allowed:
            raise self.taken()

    def drop(self, name: str) -> None:
        """From now on a part's file cannot be finished, also where its worker is only out of reach."""
        filesystem = self.folder.filesystem
        self.touch(self.dropped(self.file(name)))
        run = fs.FileSelector(self.folder.path(f"{UNFINISHED}/{self.run}"))
        for one in filesystem.get_file_info(run):
            if one.base_name.startswith(f"{self.file(name)}.") and one.extension != "dropped":
                # It may be finished by now.
                with contextlib.suppress(FileNotFoundError):
                    filesystem.delete_file(one.path)

    def taken(self) -> JobError:
        return JobError(f"Another run writes into {self.folder.name} by now, or it is gone: this one stops.")


def check_same(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    for name in before | now:
        if before.get(name) != now.get(name):
            difference = f"{name} {before.get(name)!r}, and this run has {now.get(name)!r}"
            raise JobError(f"The embeddings in {where} were made with {difference}: give the same, or another OUTPUT.")


def digest(checkpoint: Path) -> str:
    """Of the configuration, and of the names and sizes of the weights: equal on all machines."""
    found = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
    return found.hexdigest()[:16]


class Embedder:
    """The service in this process, whose import loads the model. Raises `NoModelError`."""

    def __init__(self, collection: Pictures | Rows, prompt: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import gme_service
        except SystemExit as stop:
            raise NoModelError(str(stop.__context__ or stop)) from None
        self.folder = collection.folder
        self.service = gme_service
        self.settings = gme_service.Settings.load()
        self.batcher = gme_service.app.state.batcher
        self.model = gme_service.app.state.model
        self.instruction = prompt or gme_service.DEFAULT_INSTRUCTION
        self.description = {
            "model": self.settings.model_id,
            "GME_MODEL_REVISION": self.settings.model_revision,
            "config.json and sizes of the weights": digest(self.model.directory),
            "dimension": self.model.dimension,
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


# A plain actor, and no transform of Ray Data. Ray Data (2.60) writes Parquet under its final name
# from the first byte, and deletes at its next start what it had not committed: who reads OUTPUT
# meanwhile would read half a file, or rows that go away.
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
        """All that the embeddings depend on. Raises `NoModelError`."""
        return self.embedder.description

    def embed(self, name: str, part: Part, description: dict[str, Any]) -> tuple[int, float]:
        """The number of inputs that failed, and the seconds it took. Raises `JobError`."""
        if self.output.is_written(name):
            # By a worker that died before it could say so.
            return self.output.failed(name), 0.0
        started = time.perf_counter()
        # A worker that died may be back on another machine.
        check_same(description, self.describe(), self.output.folder.name)
        try:
            embeddings = self.runner.run(self.embedder.embed(self.collection.items(part)))
        except SystemExit as stop:
            # The device is lost. Ray starts another worker in place of one that dies.
            self.embedder.service.log.error("The worker ends: %s", stop)
            os._exit(1)
        errors = [one for one in embeddings if isinstance(one, str)]
        unreadable = [error for error in errors if error.startswith(UNREADABLE)]
        if len(unreadable) == len(embeddings) >= SMALL_PART:
            gone = f"Of {self.collection.folder.name}, {len(unreadable)} files in a row cannot be read"
            raise JobError(f"{gone}. {unreadable[0]}. When they can be, the same command goes on.")
        self.output.write(name, part[self.output.key], embeddings, self.embedder.model.dimension)
        return len(errors), time.perf_counter() - started


def worker_options(workers: int | None) -> tuple[int, dict[str, Any]]:
    """How many workers, and what each gets: a GPU where there are any, else a share of the cores."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [resources["CPU"] for resources in alive if resources.get("CPU")]
    if not nodes:
        raise JobError("Ray has no machine with cores for a worker: `ray status` shows what it has.")
    cores = int(min(nodes))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if (os.environ.get("GME_DEVICE") or "auto") == "cpu":
        gpus = 0
    number = workers or gpus or len(nodes)
    on_each = math.ceil(number / (gpus or len(nodes)))
    options: dict[str, Any] = {"runtime_env": {"env_vars": worker_settings(gpus > 0)}}
    if gpus:
        if number > gpus and number % gpus:
            raise JobError(f"--workers {number} cannot be shared evenly by {gpus} GPUs: give a multiple.")
        return number, options | {"num_gpus": 1 / on_each, "num_cpus": 1}
    if on_each > cores:
        raise JobError(f"--workers {number} is over the {cores * len(nodes)} cores that there are: give fewer.")
    return number, options | {"num_cpus": cores // on_each, "scheduling_strategy": "SPREAD"}


def worker_settings(on_gpu: bool) -> dict[str, str]:
    """The environment variables of a worker, which are those of this process."""
    settings = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("GME_", "MODELSCOPE_")) and name not in SECRETS
    }
    # Where a GPU is lost, a worker must not go on with the processor.
    if on_gpu and (settings.get("GME_DEVICE") or "auto") == "auto":
        settings["GME_DEVICE"] = "cuda"
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return settings | {"PYTHONPATH": path}


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
        if time.monotonic() - self.told >= PROGRESS_SECONDS:
            self.tell()

    def tell(self) -> None:
        self.told = time.monotonic()
        told = f"{self.before + self.done} of {self.total} done, {self.failed} failed"
        if self.done:
            rate = self.done / (self.told - self.started)
            left = self.total - self.before - self.done
            told += f", {rate:.3g} inputs/s, {duration(left / rate)} left"
        print(told, flush=True)

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

    def __init__(self, workers: Sequence[Any], output: Output, seconds: float) -> None:
        self.workers = list(workers)
        self.output = output
        self.seconds = seconds
        # That of the first worker with a model. Each of the others compares it with its own.
        self.description: dict[str, Any] = {}
        # Where each worker is, by the answer that it owes.
        self.starting = {worker.describe.remote(): worker for worker in workers}
        self.under_way: dict[Any, tuple[Any, str, pa.Table]] = {}
        self.idle: list[Any] = []
        self.sizes = dict.fromkeys(workers, FIRST_PART)
        self.names = (f"{number:06}" for number in itertools.count(1))
        # Inputs of the table that are in a part.
        self.given = 0
        # Parts whose worker has died.
        self.again: list[pa.Table] = []
        # Parts of one input of which workers have died since the last one that was embedded.
        self.deadly: list[pa.Table] = []

    def start(self) -> dict[str, Any]:
        """Wait for a worker with a model, and return what it says of it. Raises `JobError`."""
        while not self.idle:
            answer = self.next_answer()
            if answer is not None:
                self.welcome(answer)
        return self.description

    def run(self, inputs: pa.Table, progress: Progress) -> None:
        """Raises `JobError` when it cannot go on."""
        while True:
            self.give_parts(inputs)
            if not self.under_way and not self.again and self.given == len(inputs):
                break
            answer = self.next_answer()
            if answer is None:
                progress.tell()
            elif answer in self.starting:
                self.welcome(answer)
            else:
                self.collect(answer, progress)
        self.give_up(progress)

    def next_answer(self) -> Any:
        """None when there was none for a while."""
        answers, _ = ray.wait([*self.starting, *self.under_way], timeout=SILENCE_SECONDS)
        if answers:
            return answers[0]
        if self.starting:
            waiting = f"{len(self.starting)} of {len(self.workers)} workers"
            print(f"{waiting} wait for a place, or load the model.", flush=True)
        return None

    def welcome(self, answer: Any) -> None:
        """A worker has loaded the model, or cannot."""
        worker = self.starting.pop(answer)
        try:
            described = ray.get(answer)
            self.description = self.description or described
            self.idle.append(worker)
        except RayTaskError as error:
            if not isinstance(error.cause, NoModelError):
                raise
            self.dismiss(worker, str(error.cause))
        except RayError as error:
            self.dismiss(worker, f"It dies while it loads the model: {error}")

    def dismiss(self, worker: Any, why: str) -> None:
        """Go on without a worker. Raises `JobError` when it was the last."""
        ray.kill(worker)
        self.workers.remove(worker)
        if not self.workers:
            raise JobError(why)
        print(f"A worker cannot start, and {len(self.workers)} go on. {why}", flush=True)

    def give_parts(self, inputs: pa.Table) -> None:
        while self.idle:
            worker = self.idle.pop()
            # Halves of a part at which workers died: only an input alone is worth several lives.
            lives = 1 if self.again and len(self.again[-1]) > 1 else LIVES
            part = self.next_part(worker, inputs)
            if not part:
                # A worker that has no place yet gets this one's.
                ray.kill(worker)
                self.workers.remove(worker)
                continue
            name = next(self.names)
            embed = worker.embed.options(max_task_retries=lives - 1)
            answer = embed.remote(name, part.to_pydict(), self.description)
            self.under_way[answer] = worker, name, part

    def next_part(self, worker: Any, inputs: pa.Table) -> pa.Table:
        """As much as takes the worker `seconds`; near the end less, that all end together."""
        if self.again:
            return self.again.pop()
        left = len(inputs) - self.given
        share = left
        if len(self.workers) > 1:
            share = max(SMALL_PART, left // (2 * len(self.workers)))
        part = inputs.slice(self.given, min(self.sizes[worker], share))
        self.given += len(part)
        return part

    def collect(self, answer: Any, progress: Progress) -> None:
        """Take a worker's answer about its part."""
        worker, name, part = self.under_way.pop(answer)
        try:
            failed, seconds = ray.get(answer)
        except RayTaskError as error:
            if not isinstance(error.cause, NoModelError):
                raise
            # It died, and was started again where there is no model.
            if not self.is_finished(name, part, progress):
                self.again.append(part)
            self.dismiss(worker, str(error.cause))
        except RayError as error:
            self.idle.append(worker)
            if not self.is_finished(name, part, progress):
                self.isolate(part, error)
        else:
            self.idle.append(worker)
            self.give_up(progress)
            if seconds:
                fitting = int(len(part) * self.seconds / seconds)
                self.sizes[worker] = min(max(fitting, 1), 4 * len(part), LARGEST_PART)
            progress.add(len(part), failed)

    def is_finished(self, name: str, part: pa.Table, progress: Progress) -> bool:
        """Whether a worker died after it had written its part. If not, it will not be written."""
        self.output.drop(name)
        if not self.output.is_written(name):
            return False
        progress.add(len(part), self.output.failed(name))
        return True

    def isolate(self, part: pa.Table, error: RayError) -> None:
        """Halve a part at which workers die, again and again, down to the input they die of."""
        if len(part) > 1:
            half = len(part) // 2
            self.again += [part.slice(half), part.slice(0, half)]
            return
        self.deadly.append(part)
        if len(self.deadly) == LIVES:
            advice = "They may have too little memory. The same command goes on"
            raise JobError(f"The workers die of one input after the other. {advice}: {error}")

    def give_up(self, progress: Progress) -> None:
        """Workers live, but died of these: each gets a row with an error."""
        for part in self.deadly:
            keys = part[self.output.key].to_pylist()
            errors = [f"{LIVES} workers have died of it."]
            self.output.write(next(self.names), keys, errors, self.description["dimension"])
            progress.add(1, 1)
        self.deadly.clear()


def embed_collection(arguments: argparse.Namespace) -> None:
    """Raises `JobError`, `OSError`, or `RayTaskError` with one of them as its cause."""
    collection, inputs = find_inputs(arguments.input)
    source = Folder.at(arguments.input)
    place = Folder.at(arguments.output)
    if f"{place.name}/".startswith(f"{source.name}/"):
        raise JobError(f"{arguments.output} lies in {arguments.input}: choose a folder elsewhere.")
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    key_type = inputs.schema.field(collection.key).type
    output = Output(place, uuid.uuid4().hex[:8], collection.key, key_type)
    number, options = worker_options(arguments.workers)
    actor = ray.remote(max_restarts=-1, max_task_retries=LIVES - 1)(Worker).options(**options)
    workers = [actor.remote(collection, output, arguments.prompt) for _ in range(number)]
    print(f"{len(inputs)} inputs. Waiting for one of {number} workers to load the model ...", flush=True)
    job = Job(workers, output, arguments.save_every)
    description = job.start()
    output.claim({"INPUT": source.name} | description)
    left = inputs.filter(pc.invert(pc.is_in(inputs[collection.key], output.finished())))
    progress = Progress(total=len(inputs), before=len(inputs) - len(left))
    progress.start()
    job.run(left, progress)
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
    if not 0 < arguments.save_every < math.inf:
        parser.error("--save-every: give the seconds")
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
    except (JobError, ItemError, OSError) as error:
        sys.exit(str(error))
    # Ray makes the latter of SIGTERM.
    except (KeyboardInterrupt, SystemExit):
        sys.exit("Stopped. The same command goes on from here.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # By this name the workers find the classes.
    importlib.import_module("deploy.ray_embed").main()
