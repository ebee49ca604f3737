"""GME Service: multimodal embeddings of text and images over HTTP, from one module.

What flows through it: a text, an image file and an instruction, as a client sent them (`Source`); token ids and pixel
patches, as the model reads them (`Input`); and the embedding that goes back, an L2-normalised float32 vector. The
embeddings are those of the model's authors: where a rule is theirs, the docstring says so.

Seven rooms, each knowing only those above it: Settings, Checkpoint, Inputs, Model, Batcher, HTTP, app. What is
protected against, and what is left to the proxy in front and to systemd, stands at the top of room 6.
"""

import asyncio
import base64
import binascii
import contextlib
import difflib
import functools
import gc
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import secrets
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import orjson
import torch
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from filelock import FileLock
from PIL import Image
from PIL.ExifTags import Base
from prometheus_client import Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header
from safetensors import SafetensorError, safe_open
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

__version__ = "2.0.0"
log = logging.getLogger("uvicorn.error")  # the logger that uvicorn has configured by the time it imports the app


class StartError(Exception):
    """The service cannot start; the message says what to do."""

    exit_code = 78  # EX_CONFIG in sysexits.h: it would end in the same way when it is started again


class HubError(StartError):
    """The checkpoint cannot be had at the moment."""

    exit_code = 1


class ServiceError(Exception):
    """Why a request has no embeddings. The message is for the client, who gets it with the HTTP status of its class."""

    status = 500  # a fault of ours


class InputError(ServiceError):
    """An input cannot be embedded."""

    status = 400


class KeyRefusedError(ServiceError):
    """The API key is missing or wrong."""

    status = 401


class TooLargeError(ServiceError):
    """The body, the number of inputs or an image is too large."""

    status = 413


class MalformedError(ServiceError):
    """The request has another shape than the route takes."""

    status = 422


class BusyError(ServiceError):
    """Too much work waits, or the service is ending: try again."""

    status = 503


class DeviceError(ServiceError):
    """The device cannot go on, and the process has to end."""


# ---------------------------------------------------------------------------------------------------- 1. Settings


class Settings(BaseSettings):
    """The environment variables `GME_*`; README.md has the table."""

    model_config = SettingsConfigDict(env_prefix="GME_", env_ignore_empty=True, str_strip_whitespace=True)

    model_dir: Path = Field(Path("~/gme_models"), validate_default=True)
    model_id: str = "iic/gme-Qwen2-VL-2B-Instruct"
    model_revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_length: int = Field(1800, ge=64, le=32768)
    max_batch_tokens: int | None = Field(None, ge=1)
    max_inputs: int = Field(2048, ge=1, le=1 << 16)
    max_body_mb: float = Field(32, gt=0, allow_inf_nan=False)
    max_image_pixels: int = Field(64_000_000, ge=1)
    max_image_tokens: int = Field(1280, ge=256, le=16384)
    max_queue: int = Field(16384, ge=1)
    cache_mb: float = Field(64, ge=0, allow_inf_nan=False)
    api_key: str | None = None

    @field_validator("model_dir")
    @classmethod
    def expand_user(cls, directory: Path) -> Path:
        try:
            return directory.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{error} Set GME_MODEL_DIR to a directory that the service may write into") from None

    @classmethod
    def load(cls) -> "Settings":
        """Read the environment. Raises `StartError` with a sentence for each variable that cannot be used."""
        known = [f"GME_{name.upper()}" for name in cls.model_fields]
        faults = []
        for name in os.environ:
            if name.startswith("GME_") and name not in known:
                nearest = difflib.get_close_matches(name, known, 1) or known
                faults.append(f"{name} is not a setting: did you mean {' or '.join(nearest)}?")
        try:
            settings = cls()
        except ValidationError as error:
            for fault in error.errors():
                faults.append(f"GME_{str(fault['loc'][0]).upper()}={fault['input']!s} cannot be used: {fault['msg']}.")
        if faults:
            raise StartError("\n".join(faults))
        if not settings.api_key and "GME_API_KEY" in os.environ:
            log.warning("GME_API_KEY is empty: every client is served.")
        return settings


# -------------------------------------------------------------------------------------------------- 2. Checkpoint

SUMS = "SHA256SUMS"  # in the format of the command sha256sum


def weight_files(directory: Path) -> set[Path]:
    """The safetensors files of a checkpoint. Raises `OSError`, `ValueError` or `KeyError` where its index is broken."""
    index = directory / "model.safetensors.index.json"
    shards = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ["model.safetensors"]
    return {directory / shard for shard in shards}


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds a whole checkpoint: config, tokenizer, preprocessor config and every weight file.

    A weight file's header records where its last tensor ends: one that was cut short is found without reading it.
    """
    try:
        for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
            json.loads((directory / name).read_bytes())
        for path in weight_files(directory):
            with safe_open(path, framework="np"):
                pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False
    return True


class DownloadLog:
    """What a log gets in place of the client's progress bars: a line for every half gigabyte of a file."""

    STEP = 500_000_000

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.received = name, size, 0

    def update(self, size: int) -> None:
        before, self.received = self.received, self.received + size
        if before // self.STEP < self.received // self.STEP:
            log.info("%s: %.1f of %.1f GB", self.name, self.received / 1e9, self.size / 1e9)

    def end(self) -> None: ...


def download(settings: Settings, directory: Path) -> None:
    """Fetch from ModelScope what `directory` lacks, going on where an earlier download ended, and note the sums."""
    # The client's own locks and settings are in HOME, which a service may lack; `find_checkpoint` holds our lock.
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_FILE_LOCK", "false")
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")  # s per file; 5 GB may take more than its hour
    if os.path.expanduser("~") == "~":  # noqa: PTH111  # Path.home() raises instead
        os.environ["HOME"] = str(settings.model_dir)
    from modelscope import snapshot_download  # 1.3 s to import, and needed once

    terminal = sys.stderr.isatty()
    with contextlib.nullcontext() if terminal else contextlib.redirect_stderr(io.StringIO()):
        snapshot_download(
            settings.model_id,
            revision=settings.model_revision,
            local_dir=str(directory),
            progress_callbacks=None if terminal else [DownloadLog],
        )
    (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in file_sums(directory)))


def file_sums(directory: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 sum of each file of a checkpoint."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != SUMS:
            with path.open("rb") as file:
                yield path.name, hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(settings: Settings) -> Path:
    """The directory of the checkpoint, downloaded from ModelScope first when it is not complete on disk.

    Raises `HubError` with one sentence when it can be had neither way.
    """
    directory = settings.model_dir / settings.model_id
    if is_complete(directory):
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.parent / f".{directory.name}.lock"):  # one download per machine, however many workers
            if not is_complete(directory):
                download(settings, directory)
        if is_complete(directory):
            return directory
        reason = "what the hub sent is not a complete Qwen2-VL checkpoint"
    except Exception as error:  # the client raises many kinds, its HTTP library's among them
        # its messages go on for many lines, of which the second names the first file that failed
        reason = "; ".join(line.strip(" -") for line in f"{type(error).__name__}: {error}".splitlines()[:2])
    raise HubError(
        f"No checkpoint of {settings.model_id}: {directory} is not complete, and downloading it from ModelScope"
        f" ({os.environ.get('MODELSCOPE_ENDPOINT', 'https://www.modelscope.cn')}) failed ({reason})."
        f" Start again to go on where the download ended, or put the model's files into that directory by hand, or set"
        f" GME_MODEL_DIR to a directory that has them in {settings.model_id}, or set MODELSCOPE_ENDPOINT to a hub that"
        f" this machine can reach."
    )


def verify(settings: Settings) -> str:
    """Compare the checkpoint's files with the sums noted after the download, or else with the hub's.

    Returns a sentence when all agree. Raises `StartError` with one that says which files to delete.
    """
    directory = settings.model_dir / settings.model_id
    if (directory / SUMS).exists():
        noted = [line.split("  ", 1) for line in (directory / SUMS).read_text().splitlines()]
        actual = dict(file_sums(directory))
        wrong = [name for digest, name in noted if actual.get(name) != digest]
    else:
        from modelscope_hub import HubApi

        result = HubApi().verify_cache(
            settings.model_id, "model", revision=settings.model_revision, local_dir=str(directory)
        )
        wrong = [mismatch.path for mismatch in result.mismatches] + list(result.missing_paths)
    if wrong:
        raise StartError(
            f"Changed or missing in {directory}: {', '.join(wrong)}. Delete these files and {SUMS}, and start the service: it downloads them again."
        )
    return f"All files of {settings.model_id} in {directory} are as they were published."


# ------------------------------------------------------------------------------------------------------ 3. Inputs

DEFAULT_INSTRUCTION = "You are a helpful assistant."
# The prompt of the model's authors: the instruction part, an image's place, the text, and the end.
INSTRUCTION_PART = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
IMAGE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
END = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
PATCH = 14  # pixels on a side
TOKEN = 2 * PATCH  # pixels on a side of what one image token covers
FIRST_TOKENS = (4, 16384)  # the least and the most of them after the first resize
MIN_IMAGE_TOKENS = 256  # after the second resize
MAX_SIDE_RATIO = 200
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")  # Pillow opens MPO as a kind of JPEG
UPRIGHT = {  # by EXIF orientation; ImageOps.exif_transpose would rewrite the EXIF too, and fail where it is odd
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_SCANS = 30  # of a progressive JPEG, each of which passes over the whole image; encoders write about ten
MAX_EXIF = 1 << 16  # bytes; Pillow makes an object of 260 bytes for each value of a tag
MAX_EXIF_SEGMENTS = 2  # of a JPEG, each of 64 kB at most; a photo has one
JPEG_START, JPEG_SCAN, JPEG_EXIF = b"\xff\xd8", b"\xff\xda", b"Exif\0\0"
AVIF_EXIF = re.compile(rb"(infe.{8})Exif", re.DOTALL)  # where an AVIF says that one of its items is EXIF
OPEN_SECONDS = 1  # of the processor's time, until an image file is open; a file of a million parts takes minutes
DECODED_PIXELS = 10_000_000  # a second, at the least
CHUNK_WEIGHT = 1 << 14  # characters tokenized in one go, so that the texts of a small request are ready together
TRUNCATED = Counter("gme_truncated_inputs", "Inputs that were cut at GME_MAX_LENGTH tokens.")


@dataclass(slots=True, frozen=True)
class Source:
    """One input as a client sent it: a text, the bytes of an image file, or both (fused into one embedding)."""

    text: str = ""
    image: bytes | None = None
    instruction: str = DEFAULT_INSTRUCTION
    name: str = ""  # what an error calls it; empty: its position in the request

    @property
    def weight(self) -> int:
        """What it costs to prepare, in characters of text."""
        return len(self.instruction) + len(self.text) + (0 if self.image is None else CHUNK_WEIGHT)


@dataclass(slots=True, frozen=True)
class Input:
    """One input as the model reads it."""

    token_ids: np.ndarray  # (length,) int64
    prefix: tuple[int, ...]  # token ids of the instruction part, the same for all inputs with that instruction
    shared: int  # how many of the first token ids are those of `prefix`; less than length
    image_start: int = 0  # position of the first image token
    grid: tuple[int, int] = (0, 0)  # rows and columns of patches
    patches: np.ndarray | None = None  # (rows * columns, 588) uint8: 3 channels x 14 x 14, four of a token together

    @property
    def cost(self) -> int:
        """Tokens that the model computes for it."""
        return len(self.token_ids) - self.shared

    def key(self) -> bytes:
        """A digest of all that the embedding depends on."""
        digest = hashlib.blake2b(self.token_ids.tobytes(), digest_size=32)
        if self.patches is not None:
            digest.update(repr((self.image_start, self.grid)).encode())
            digest.update(self.patches.data)
        return digest.digest()


class ImageFile(io.BytesIO):
    """The bytes of an image file. Raises `ValueError` when the thread that reads them has taken too long."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.end = time.thread_time() + OPEN_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.end:
            raise ValueError("The file takes too long to read.")
        return super().read(size)


class PixelBudget:
    """Bounds the pixels that all threads together decode at a time."""

    def __init__(self, pixels: int) -> None:
        self.free = pixels
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


def fitted_size(width: int, height: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """The size (width, height), in multiples of 28 pixels, to bring an image to: `smart_resize` as published."""

    def multiple(length: float, rounded: Callable[[float], int]) -> int:
        return max(TOKEN, rounded(length / TOKEN) * TOKEN)

    fitted = multiple(width, round), multiple(height, round)
    tokens = fitted[0] * fitted[1] // TOKEN**2
    if tokens > max_tokens:
        shrink = math.sqrt(width * height / (max_tokens * TOKEN**2))
        return multiple(width / shrink, math.floor), multiple(height / shrink, math.floor)
    if tokens < min_tokens:
        grow = math.sqrt(min_tokens * TOKEN**2 / (width * height))
        return multiple(width * grow, math.ceil), multiple(height * grow, math.ceil)
    return fitted


def resize_twice(image: Image.Image, max_tokens: int) -> Image.Image:
    """The two resizes of the authors' code: their own `fetch_image`, then that of the published image processor."""
    width, height = fitted_size(*image.size, *FIRST_TOKENS)
    first = min(width, MAX_SIDE_RATIO * height), min(height, MAX_SIDE_RATIO * width)
    second = fitted_size(*first, MIN_IMAGE_TOKENS, max_tokens)
    return image.resize(first, Image.Resampling.BICUBIC).resize(second, Image.Resampling.BICUBIC)


def upright(image: Image.Image) -> Image.Image:
    """The first frame in RGB, turned as its EXIF says."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.load()  # some formats have their EXIF behind the pixels
    if len(image.info.get("exif", b"")) > MAX_EXIF:
        raise ValueError("The EXIF data are too large.")
    turn = UPRIGHT.get(int(image.getexif().get(Base.Orientation) or 1))
    return rgb if turn is None else rgb.transpose(turn)


def to_patches(image: Image.Image) -> np.ndarray:
    """(rows * columns, 588) uint8: the patches of an image, the 2 x 2 of each token one behind the other."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // TOKEN, 2, PATCH, width // TOKEN, 2, PATCH, 3)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, 3 * PATCH * PATCH)


class Preparer:
    """Turns what clients send into what the model reads. Thread-safe."""

    def __init__(self, directory: Path, max_length: int, max_image_pixels: int, max_image_tokens: int = 1280) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.max_length, self.max_image_tokens = max_length, max_image_tokens
        # No token stands for more characters than the longest one has bytes: what lies past this many characters would
        # be truncated, and is cut before it costs time in the tokenizer.
        self.max_chars = max_length * max(map(len, self.tokenizer.get_vocab()))
        self.max_pixels, self.decoding = max_image_pixels, PixelBudget(max_image_pixels)
        self.prefix = functools.lru_cache(16)(self.encode_instruction)
        Image.MAX_IMAGE_PIXELS = (max_image_pixels + 1) // 2  # past twice as many, Pillow refuses to open a file
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # which it gives past half of those

    def __call__(self, sources: Sequence[Source]) -> list[Input | ServiceError]:
        """For each source its `Input`, or the error that says why there is none."""
        prefixes = [self.prefix(source.instruction) for source in sources]
        prompts = [
            INSTRUCTION_PART.format(source.instruction) + (source.image is not None) * IMAGE_PLACE + source.text + END
            for source in sources
        ]
        # An instruction that is all that the model reads is not tokenized again for each text behind it.
        prompts = ["" if self.is_full(prefix) else prompt for prefix, prompt in zip(prefixes, prompts, strict=True)]
        prepared: list[Input | ServiceError] = []
        for source, prefix, token_ids in zip(sources, prefixes, self.encode(prompts), strict=True):
            try:
                prepared.append(self.prepare(source, prefix, list(prefix) if self.is_full(prefix) else token_ids))
            except ServiceError as error:
                prepared.append(error)
        return prepared

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        cut = [prompt[: self.max_chars] for prompt in prompts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(cut)]  # releases the interpreter lock

    def encode_instruction(self, instruction: str) -> tuple[int, ...]:
        return tuple(self.encode([INSTRUCTION_PART.format(instruction)])[0])

    def is_full(self, prefix: tuple[int, ...]) -> bool:
        """Whether the instruction alone is all that the model reads.

        Of its tokens, those that a text behind it may change are the ones of "user\\n", after the last special token.
        """
        return len(prefix) >= self.max_length + len("user\n")

    def prepare(self, source: Source, prefix: tuple[int, ...], token_ids: list[int]) -> Input:
        image: dict[str, Any] = {}
        if source.image is not None:
            picture = resize_twice(self.open_image(source.image), self.max_image_tokens)
            grid, patches = (picture.height // PATCH, picture.width // PATCH), to_patches(picture)
            start, count = (
                len(prefix) + 1,
                len(patches) // 4,
            )  # its place is behind the instruction and <|vision_start|>
            if start + count > self.max_length:
                raise InputError(
                    f"The image takes {count} tokens and does not fit behind the prompt into the {self.max_length}"
                    " tokens that the model reads: send a shorter prompt, or raise GME_MAX_LENGTH on the server."
                )
            token_ids = token_ids[:start] + [token_ids[start]] * count + token_ids[start + 1 :]
            image = {"image_start": start, "grid": grid, "patches": patches}
        if len(token_ids) > self.max_length:
            TRUNCATED.inc()
        ids, prefix = np.array(token_ids[: self.max_length], np.int64), prefix[: self.max_length]
        shared = min(len(prefix), len(ids) - 1)
        differs = np.flatnonzero(ids[:shared] != prefix[:shared])  # where a text begins with white space, for example
        return Input(ids, prefix, int(differs[0]) if differs.size else shared, **image)

    def open_image(self, data: bytes) -> Image.Image:
        """The first frame of an image file, upright and in RGB. Raises `InputError` or `TooLargeError`."""
        try:
            if data.startswith(JPEG_START) and data.count(JPEG_SCAN) > MAX_SCANS:
                raise ValueError("The JPEG has too many scans.")
            if data.startswith(JPEG_START) and data.count(JPEG_EXIF) > MAX_EXIF_SEGMENTS:
                raise ValueError("The JPEG has too much EXIF data.")
            # An AVIF says how it is turned outside its EXIF data, which Pillow would read whole while it opens the file.
            file = ImageFile(AVIF_EXIF.sub(rb"\1skip", data))
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self.max_pixels:
                    raise Image.DecompressionBombError
                file.end += pixels / DECODED_PIXELS
                with self.decoding.take(pixels):
                    return upright(image)
        except Image.DecompressionBombError:
            raise TooLargeError(
                f"The image has more than the {self.max_pixels} pixels that are accepted: scale it down before sending it"
                " (the model sees about a million of them)."
            ) from None
        except Exception:  # Pillow's decoders raise whatever a broken file makes them trip over
            log.debug("An image could not be decoded.", exc_info=True)
        formats = ", ".join(IMAGE_FORMATS)
        raise InputError(f"The image cannot be decoded: send a whole file in one of the formats {formats}.")


# ------------------------------------------------------------------------------------------------------- 4. Model

PREFIX_CACHE_TOKENS = 4096  # 115 MB of bfloat16 keys and values in the 2B model
MAX_DISTANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}  # 1 - cosine, of rounding alone
KeyValues = list[tuple[Tensor, Tensor]]  # for each layer keys and values, (B, heads, T, head_dim)


class Linear:
    """y = x W^T + b, with the weight (rows, columns) in the dtype and on the device of the model."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def swiglu(gate: Any, up: Any, x: Tensor) -> Tensor:
    return functional.silu(gate(x)) * up(x)


def image_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention within one image; all are (heads, patches, head_dim)."""
    return functional.scaled_dot_product_attention(query[None], key[None], value[None])[0]


class Kernels(NamedTuple):
    """The operations that have a faster form on CPUs."""

    linear: Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]] = Linear
    swiglu: Callable[[Any, Any, Tensor], Tensor] = swiglu
    image_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = image_attention


def speed_up_on_cpu(dtype: torch.dtype, small: bool) -> Kernels:
    """Set torch up for a CPU, and return what computes faster there than torch's own operations.

    oneDNN's operators are private to torch: they are used only where they give what `linear` gives.
    """
    capabilities = torch.cpu.get_capabilities()
    if small:
        torch.set_num_threads(1)  # its products are too short for two
    if platform.machine() == "x86_64" and not capabilities.get("amx_bf16"):
        torch.set_float32_matmul_precision("medium")  # oneDNN in place of MKL; with AMX, and on ARM, it would round

    class PackedLinear(Linear):
        """A weight laid out for oneDNN once, and not in every call: 1.7 times as fast for a lone short text."""

        def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
            rows = 512  # that it is laid out for; any number can be multiplied
            super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias)

        def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, activation, [], "")

    def packed_swiglu(gate: PackedLinear, up: PackedLinear, x: Tensor) -> Tensor:
        gated = gate(x, "swish")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up.weight, up.bias, "mul")

    def chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Head by head and 512 queries at a time: twice as fast as torch's own in bfloat16."""
        out = torch.empty_like(query)
        query, key, value = query * query.shape[-1] ** -0.5, key.contiguous(), value.contiguous()
        for q, k, v, o in zip(query, key, value, out, strict=True):
            for start in range(0, len(q), 512):
                rows = slice(start, start + 512)
                torch.matmul((q[rows] @ k.T).softmax(-1), v, out=o[rows])
        return out

    kernels = Kernels(image_attention=chunked_attention if dtype == torch.bfloat16 else image_attention)
    if dtype == torch.float16 or platform.machine() != "x86_64":
        return kernels
    try:
        x, weight, bias = torch.randn(3, 64).to(dtype), torch.randn(32, 64).to(dtype), torch.randn(32).to(dtype)
        plain, packed = Linear(weight, bias), PackedLinear(weight, bias)
        torch.testing.assert_close(packed(x), plain(x), rtol=0.02, atol=0.02)
        torch.testing.assert_close(packed_swiglu(packed, packed, x), swiglu(plain, plain, x), rtol=0.02, atol=0.02)
    except (AttributeError, RuntimeError, TypeError, AssertionError) as error:
        log.info(
            "Plain products instead of oneDNN's, which this torch has in another form: %s", str(error).split("\n")[0]
        )
        return kernels
    return kernels._replace(linear=PackedLinear, swiglu=packed_swiglu)


class Weights:
    """The weights of a checkpoint by their published names, read from the mapped files one at a time.

    Files that a current transformers has saved name them otherwise: both are taken.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.directory, self.device, self.dtype = directory, device, dtype
        paths = weight_files(directory)
        small = sum(path.stat().st_size for path in paths) < 200_000_000
        self.kernels = speed_up_on_cpu(dtype, small) if device.type == "cpu" else Kernels()
        self.stored: dict[str, tuple[Any, str]] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                published = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
                self.stored[published] = (file, name)

    def stored_tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor as it is in its file. Raises `StartError` when it is missing or has another shape."""
        if name not in self.stored:
            raise StartError(f"{self.directory} is not a whole Qwen2-VL checkpoint: it has no weight {name}.")
        file, stored_name = self.stored[name]
        tensor: Tensor = file.get_tensor(stored_name)
        if tensor.shape != shape:
            raise StartError(f"{self.directory}: the weight {name} is {tuple(tensor.shape)} and should be {shape}.")
        return tensor

    def tensor(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.stored_tensor(name, *shape).to(self.device, dtype, copy=True)

    def norm(self, name: str, size: int, bias: bool) -> tuple[Tensor, ...]:
        """Weight, and bias if any, of a norm: in float32."""
        parts = ("weight", "bias") if bias else ("weight",)
        return tuple(self.tensor(f"{name}.{part}", size, dtype=torch.float32) for part in parts)

    def linear(self, columns: int, rows: Mapping[str, int], bias: bool = True) -> Any:
        """One layer of all the published ones in `rows` (their number of rows by name), which have the same input."""
        weights = [self.stored_tensor(f"{name}.weight", count, columns) for name, count in rows.items()]
        biases = [self.stored_tensor(f"{name}.bias", count) for name, count in rows.items() if bias]
        return self.layer(weights[0] if len(weights) == 1 else torch.cat(weights), torch.cat(biases) if bias else None)

    def layer(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        copy = self.kernels.linear is Linear  # what oneDNN lays out is a copy by itself
        weight = weight.to(self.device, self.dtype, copy=copy)
        return self.kernels.linear(weight, None if bias is None else bias.to(self.device, self.dtype))


def frequencies(pairs: int, theta: float, device: torch.device) -> Tensor:
    """Angles per position (pairs,), float32, by which rotary embedding turns each pair of numbers."""
    return theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs).to(device)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding of x (..., head_dim), whose halves make the pairs, by angles (..., head_dim / 2)."""
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class VisionTower:
    """Qwen2-VL's vision transformer: the patches of images to the embeddings of their tokens."""

    def __init__(self, weights: Weights, config: Mapping[str, Any], normalization: Mapping[str, Any]) -> None:
        self.width, self.heads, self.kernels = config["embed_dim"], config["num_heads"], weights.kernels
        self.dtype, device = weights.dtype, weights.device
        self.mean, self.std = (
            torch.tensor(normalization[name], dtype=torch.float32, device=device)[:, None]
            for name in ("image_mean", "image_std")
        )
        self.frequencies = frequencies(self.width // self.heads // 4, 10000.0, device)  # a quarter for rows and columns
        # A 3-D convolution over two frames, which are the same for a still image.
        patch = weights.stored_tensor("visual.patch_embed.proj.weight", self.width, 3, 2, PATCH, PATCH)
        self.patch_embedding = weights.layer(patch.float().sum(2).flatten(1))
        self.blocks = [self.load_block(weights, f"visual.blocks.{number}") for number in range(config["depth"])]
        self.merger_norm = weights.norm("visual.merger.ln_q", self.width, bias=True)
        self.merger_in = weights.linear(4 * self.width, {"visual.merger.mlp.0": 4 * self.width})
        self.merger_out = weights.linear(4 * self.width, {"visual.merger.mlp.2": config["hidden_size"]})

    def load_block(self, weights: Weights, name: str) -> SimpleNamespace:
        width = self.width
        return SimpleNamespace(
            norm1=weights.norm(f"{name}.norm1", width, bias=True),
            qkv=weights.linear(width, {f"{name}.attn.qkv": 3 * width}),
            proj=weights.linear(width, {f"{name}.attn.proj": width}),
            norm2=weights.norm(f"{name}.norm2", width, bias=True),
            fc1=weights.linear(width, {f"{name}.mlp.fc1": 4 * width}),
            fc2=weights.linear(4 * width, {f"{name}.mlp.fc2": width}),
        )

    def __call__(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Token embeddings (P / 4, D) of uint8 patches (P, 588) of images with these grids of patches."""
        pixels = patches.view(len(patches), 3, PATCH * PATCH).float()
        pixels = ((pixels / 255 - self.mean) / self.std).flatten(1)
        hidden = self.patch_embedding(pixels.to(self.dtype)).float()  # (P, width)
        angles = torch.cat([self.angles(*grid) for grid in grids])[:, None]  # (P, 1, head_dim / 2)
        lengths = [rows * columns for rows, columns in grids]
        for block in self.blocks:
            qkv = block.qkv(self.norm(hidden, block.norm1)).view(len(hidden), 3, self.heads, -1)
            query, key = rotate(qkv[:, :2], angles[:, None]).unbind(1)  # (P, heads, head_dim)
            images = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, qkv[:, 2])), strict=True)
            attended = torch.cat([self.kernels.image_attention(*image) for image in images], 1)
            hidden += block.proj(attended.transpose(0, 1).flatten(1))
            inner = block.fc1(self.norm(hidden, block.norm2))
            hidden += block.fc2(torch.sigmoid(1.702 * inner).mul_(inner))  # quick_gelu
        merged = self.norm(hidden, self.merger_norm).view(-1, 4 * self.width)
        return self.merger_out(functional.gelu(self.merger_in(merged)))

    def norm(self, hidden: Tensor, weight_and_bias: tuple[Tensor, ...]) -> Tensor:
        return functional.layer_norm(hidden, (self.width,), *weight_and_bias, eps=1e-6).to(self.dtype)

    def angles(self, rows: int, columns: int) -> Tensor:
        """Rotary angles (rows * columns, head_dim / 2) of an image's patches, the four of each token together."""
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack((row, column), -1).view(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2).reshape(-1, 2, 1)
        return (places.to(self.frequencies.device) * self.frequencies).flatten(1)


class Decoder:
    """Qwen2: the embeddings of a prompt's tokens to the hidden state of its last one.

    The residual stream is float32 whatever the dtype of the weights: bfloat16 comes closer to the float32 embeddings so,
    and float16 overflows later.
    """

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.width, self.heads, self.groups = (
            config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        self.eps, self.dtype, self.kernels = config["rms_norm_eps"], weights.dtype, weights.kernels
        self.head_dim = self.width // self.heads
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.frequencies = frequencies(self.head_dim // 2, theta, weights.device)
        self.embedding = weights.tensor(
            "model.embed_tokens.weight", config["vocab_size"], self.width, dtype=weights.dtype
        )
        inner = config["intermediate_size"]
        self.layers = [
            self.load_layer(weights, f"model.layers.{number}", inner) for number in range(config["num_hidden_layers"])
        ]
        self.final_norm = weights.norm("model.norm", self.width, bias=False)

    def load_layer(self, weights: Weights, name: str, inner: int) -> SimpleNamespace:
        width, attention, mlp = self.width, f"{name}.self_attn", f"{name}.mlp"
        shared = self.groups * self.head_dim
        qkv = {f"{attention}.q_proj": width, f"{attention}.k_proj": shared, f"{attention}.v_proj": shared}
        return SimpleNamespace(
            norm1=weights.norm(f"{name}.input_layernorm", width, bias=False),
            qkv=weights.linear(width, qkv),
            output=weights.linear(width, {f"{attention}.o_proj": width}, bias=False),
            norm2=weights.norm(f"{name}.post_attention_layernorm", width, bias=False),
            gate=weights.linear(width, {f"{mlp}.gate_proj": inner}, bias=False),
            up=weights.linear(width, {f"{mlp}.up_proj": inner}, bias=False),
            down=weights.linear(inner, {f"{mlp}.down_proj": width}, bias=False),
        )

    def __call__(self, hidden: Tensor, last: Tensor, past: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        """Final hidden states (B, D) at position `last` (B,) of token embeddings (B, T, D) that follow `past`.

        Also returns the keys and values of these tokens. All three rotary axes have the token's position, image tokens
        too, as in the authors' forward. Attention is causal, so that no token sees the padding to its right.
        """
        batch, length, _ = hidden.shape
        before = past[0][0].shape[2] if past else 0
        positions = torch.arange(before, before + length, device=hidden.device)
        angles = positions[:, None, None] * self.frequencies  # (T, 1, head_dim / 2)
        mask = positions[:, None] >= torch.arange(before + length, device=hidden.device) if past else None
        hidden, new = hidden.float(), []
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(self.norm(hidden, layer.norm1)).view(batch, length, -1, self.head_dim)
            turned = rotate(qkv[:, :, : self.heads + self.groups], angles).transpose(1, 2)
            query, key = turned[:, : self.heads], turned[:, self.heads :]  # (B, heads or groups, T, head_dim)
            value = qkv[:, :, self.heads + self.groups :].transpose(1, 2)
            new.append((key, value))
            if past:
                key, value = (
                    torch.cat((old.expand(batch, -1, -1, -1), x), 2)
                    for old, x in zip(past[number], new[-1], strict=True)
                )
            key, value = (x.repeat_interleave(self.heads // self.groups, 1) for x in (key, value))
            attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
            attended = attended.transpose(1, 2).flatten(2)
            if layer is self.layers[-1]:  # of which only the pooled tokens go on
                rows = torch.arange(batch, device=hidden.device)
                hidden, attended = hidden[rows, last], attended[rows, last]
            hidden += layer.output(attended)
            hidden += layer.down(self.kernels.swiglu(layer.gate, layer.up, self.norm(hidden, layer.norm2)))
        return functional.rms_norm(hidden, (self.width,), *self.final_norm, eps=self.eps), new

    def norm(self, hidden: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        return functional.rms_norm(hidden, (self.width,), *weight, eps=self.eps).to(self.dtype)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when available, else the CPU. Raises `StartError` for a device that cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.ones(1, device=device).item()  # the device meta has none
    except (RuntimeError, AssertionError) as error:
        raise StartError(f"GME_DEVICE={name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA, as published; on a CPU bfloat16 where it computes it natively, else float32."""
    if name == "auto":
        native = {feature for feature, present in torch.cpu.get_capabilities().items() if present}
        cpu = "bfloat16" if native & {"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"} else "float32"
        name = "float16" if device.type == "cuda" else cpu
    return getattr(torch, name)


class Model:
    """Batches of inputs to embeddings. For one thread at a time."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        config = json.loads((directory / "config.json").read_bytes())
        weights = Weights(directory, device, dtype)
        normalization = json.loads((directory / "preprocessor_config.json").read_bytes())
        with torch.inference_mode():
            self.vision = VisionTower(weights, config["vision_config"], normalization)
            self.decoder = Decoder(weights, config.get("text_config", config))
        self.device, self.dtype, self.dimension = device, dtype, self.decoder.width
        self.prefixes: OrderedDict[tuple[int, ...], KeyValues] = OrderedDict()

    def embed(self, inputs: Sequence[Input]) -> np.ndarray:
        """L2-normalised embeddings (len(inputs), dimension), float32, of inputs that share their instruction.

        Raises `MemoryError` when the batch does not fit, and `DeviceError` when the device cannot go on.
        """
        try:
            return self.forward(inputs).cpu().numpy()
        except torch.OutOfMemoryError:
            pass  # the memory is free only when the exception, which holds the batch's tensors, is gone
        except torch.AcceleratorError as error:
            raise DeviceError(f"The device {self.device} cannot go on: {error}") from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch says it on a CPU
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError("The batch does not fit into the device's memory.")

    @torch.inference_mode()
    def forward(self, inputs: Sequence[Input]) -> Tensor:
        """Embeddings (B, D), float32: the last token's final hidden state, L2-normalised, as the authors pool."""
        shared = min(one.shared for one in inputs)
        lengths = [len(one.token_ids) - shared for one in inputs]
        token_ids = torch.zeros(len(inputs), max(lengths), dtype=torch.int64)  # (B, T), padded on the right
        for row, length, one in zip(token_ids, lengths, inputs, strict=True):
            row[:length] = torch.from_numpy(one.token_ids[shared:])
        hidden = functional.embedding(token_ids.to(self.device), self.decoder.embedding)  # (B, T, D)
        images = [(row, one) for row, one in enumerate(inputs) if one.patches is not None]
        if images:
            patches = torch.from_numpy(np.concatenate([one.patches for _, one in images])).to(self.device)
            features = self.vision(patches, [one.grid for _, one in images])
            counts = [len(one.patches) // 4 for _, one in images]
            for (row, one), image in zip(images, features.split(counts), strict=True):
                start = one.image_start - shared
                hidden[row, start : start + len(image)] = image
        past = self.prefix(inputs[0].prefix, shared) if shared else None
        last = torch.tensor(lengths, device=self.device) - 1
        return functional.normalize(self.decoder(hidden, last, past)[0], dim=-1)

    def prefix(self, token_ids: tuple[int, ...], length: int) -> KeyValues:
        """Keys and values (1, heads, length, head_dim) of an instruction's first tokens; the last few are kept."""
        layers = self.prefixes.pop(token_ids, None)
        if layers is None:
            hidden = functional.embedding(torch.tensor([token_ids], device=self.device), self.decoder.embedding)
            _, layers = self.decoder(hidden, torch.tensor([0], device=self.device))
        if len(token_ids) <= PREFIX_CACHE_TOKENS:
            self.prefixes[token_ids] = layers
        while sum(map(len, self.prefixes)) > PREFIX_CACHE_TOKENS:
            self.prefixes.popitem(last=False)
        return [(key[:, :, :length], value[:, :, :length]) for key, value in layers]

    def check(self, texts: Sequence[Input]) -> None:
        """Compute texts and a small image alone and in one batch, with the prefix cache and without.

        Raises `StartError` when they disagree by more than the dtype rounds: a torch that changed must not mean wrong
        embeddings. `texts` share their instruction and are at least 8 tokens long behind it; each has another length.
        """
        pixels = np.arange(16 * 588, dtype=np.uint32) * 2654435761 >> 24  # noise of 4 x 4 patches, four tokens
        start = texts[0].shared + 2
        image = replace(texts[0], image_start=start, grid=(4, 4), patches=pixels.astype(np.uint8).reshape(16, 588))
        inputs = [*texts, image]
        together = self.embed(inputs)
        ways = {
            "in a batch and alone": [self.embed([one])[0] for one in inputs],
            "with the prefix cache and without": [self.embed([replace(one, shared=0)])[0] for one in inputs],
        }
        for way, embeddings in ways.items():
            distance = 1 - (together * np.array(embeddings)).sum(axis=1).min()
            if not distance <= MAX_DISTANCE[self.dtype]:
                raise StartError(
                    f"The model computes other embeddings {way} (1 - cosine is {distance:.2g}): the torch"
                    f" {torch.__version__} installed does not suit this service. Install the versions of requirements.txt."
                )


# ----------------------------------------------------------------------------------------------------- 5. Batcher

MAX_PADDING = 0.2
AHEAD_BATCHES = 4  # how much is prepared ahead of the model, in batches; a prepared image takes 2.4 kB a token
PREPARE_THREADS = min(4, max(2, os.cpu_count() or 1))
CACHE_ENTRY_BYTES = 200  # what a cached embedding takes beside its numbers
SECONDS = [2.0**n for n in range(-8, 10)]  # 4 ms to 8.5 min: a long queue on a CPU takes minutes
QUEUE_SECONDS = Histogram("gme_queue_seconds", "Time that an input waits for the model.", buckets=SECONDS)
MODEL_SECONDS = Histogram("gme_model_seconds", "Time that the model takes for one batch.", buckets=SECONDS)
BATCH_INPUTS = Histogram("gme_batch_inputs", "Distinct inputs in one batch.", buckets=[2**n for n in range(12)])
BATCH_PADDING = Histogram("gme_batch_padding_ratio", "Share of padding in a batch.", buckets=[n / 20 for n in range(6)])
CACHE_HITS = Counter("gme_cache_hits", "Inputs answered from the cache of recent embeddings.")
T = TypeVar("T")
R = TypeVar("R")


class Answer(NamedTuple):
    """The embeddings (n, dimension), float32, of a request's sources, and the tokens that the model reads for them."""

    embeddings: np.ndarray
    tokens: int


@dataclass(eq=False)
class Waiting:
    """A source with its place in the queue: the lowest order goes first."""

    source: Source
    name: str  # in an error
    future: asyncio.Future[np.ndarray]
    arrived: float
    order: tuple[int, int] = (0, 0)  # (start of its request + rank within it, number of the request)
    input: Input | None = None  # once it is prepared


def isolate(function: Callable[[Sequence[T]], Iterable[R]], items: Sequence[T]) -> list[R | ServiceError]:
    """`function(items)`; where it raises, halves the items until those it raises for have an error as result."""
    try:
        return list(function(items))
    except DeviceError:
        raise
    except MemoryError:
        error = TooLargeError("This input does not fit into the memory of the server: send a smaller one.")
    except BaseException as fault:  # a panic of the tokenizers library is no Exception
        error = ServiceError("This input could not be embedded, through a fault of the service: its log says more.")
        if len(items) == 1:
            log.error("An input could not be embedded.", exc_info=fault)
    if len(items) == 1:
        return [error]
    half = len(items) // 2
    return isolate(function, items[:half]) + isolate(function, items[half:])


class Batcher:
    """Gathers the inputs of all requests into batches for the one thread that runs the model.

    The policy is start-time fair queueing. A request's inputs, shortest first, are numbered from where the queue has got
    to; the lowest number goes first, the oldest request first among equals. So a lone query waits for the batch under
    way and its own, and a bulk job keeps a place in every batch.

    The event loop owns all state. Threads run `prepare` and `embed`, which share nothing.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Source]], Iterable[Input | ServiceError]],
        embed: Callable[[Sequence[Input]], Iterable[np.ndarray]],
        max_tokens: int,
        max_queue: int = 16384,
        cache_entries: int = 0,
    ) -> None:
        self.prepare, self.embed_batch, self.max_tokens, self.max_queue = prepare, embed, max_tokens, max_queue
        self.cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.cache_entries = cache_entries
        self.unprepared: list[tuple[tuple[int, int], Waiting]] = []  # a heap
        self.preparing: list[tuple[int, int]] = []  # the lowest order of each chunk under way
        self.ready: dict[bytes, list[Waiting]] = {}  # by the key of their input: equal inputs are computed once
        self.computing: dict[bytes, list[Waiting]] = {}  # the batch under way
        self.open: set[asyncio.Future[np.ndarray]] = set()
        self.numbers = itertools.count()
        self.clock = 0  # where the queue has got to
        self.changed = asyncio.Event()
        self.alive = True
        self.on_death: Callable[[], None] = lambda: None

    @property
    def depth(self) -> int:
        """Inputs without an answer."""
        return len(self.open)

    async def embed(self, sources: Sequence[Source]) -> Answer:
        """Answer a request. What it has in the queue is dropped when this is cancelled, as for a client that left.

        Raises the `ServiceError` of the first input that has one, and `BusyError` when the queue is full.
        """
        if not self.alive:
            raise BusyError("The model has ended: try again when the service has restarted.")
        if self.depth + len(sources) > self.max_queue:
            raise BusyError("Too many inputs wait already: try again in a moment.")
        loop, number, now = asyncio.get_running_loop(), next(self.numbers), time.perf_counter()
        waiting = [
            Waiting(source, source.name or f"Input {position}: " * (len(sources) > 1), loop.create_future(), now)
            for position, source in enumerate(sources, start=1)
        ]
        for rank, one in enumerate(sorted(waiting, key=lambda one: one.source.weight)):
            one.order = (self.clock + rank, number)
            heapq.heappush(self.unprepared, (one.order, one))
            self.open.add(one.future)
            one.future.add_done_callback(self.open.discard)
        self.notify()
        try:
            embeddings = await asyncio.gather(*(one.future for one in waiting))
        finally:
            for one in waiting:
                one.future.cancel()
            self.notify()
        return Answer(np.array(embeddings), sum(len(one.input.token_ids) for one in waiting if one.input))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests for as long as this context lasts."""
        preparers, device = ThreadPoolExecutor(PREPARE_THREADS), ThreadPoolExecutor(1)
        tasks = [asyncio.create_task(self.prepare_ahead(preparers)) for _ in range(PREPARE_THREADS)]
        tasks.append(asyncio.create_task(self.compute(device)))
        for task in tasks:
            task.add_done_callback(self.end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for pool in (preparers, device):
                pool.shutdown(wait=False)

    def end(self, task: asyncio.Task[None]) -> None:
        """No request can be answered any more."""
        self.alive = False
        for future in list(self.open):
            if not future.done():
                future.set_exception(BusyError("The service is ending: try again in a moment."))
        if not task.cancelled():
            log.critical("The batcher has ended.", exc_info=task.exception())
            self.on_death()

    def notify(self) -> None:
        """Wake the tasks that wait for something to do."""
        self.changed.set()
        self.changed.clear()

    async def when_there_is(self, take: Callable[[], T | None]) -> T:
        while (taken := take()) is None:
            await self.changed.wait()
        return taken

    # ------------------------------------------------------------------------------------------------- preparing

    async def prepare_ahead(self, threads: ThreadPoolExecutor) -> None:
        def prepare(sources: Sequence[Source]) -> list[tuple[Any, bytes]]:
            results = isolate(self.prepare, sources)
            return [(result, result.key() if isinstance(result, Input) else b"") for result in results]

        while True:
            chunk = await self.when_there_is(self.next_chunk)
            self.preparing.append(chunk[0].order)
            sources = [one.source for one in chunk]
            prepared = await asyncio.get_running_loop().run_in_executor(threads, prepare, sources)
            self.preparing.remove(chunk[0].order)
            for one, (result, key) in zip(chunk, prepared, strict=True):
                if isinstance(result, Exception):
                    self.finish([one], result)
                else:
                    one.input = result
                    self.enqueue(one, key)
            self.notify()

    def next_chunk(self) -> list[Waiting] | None:
        """What to prepare next: in order, while no more than a few batches are ready that go before it."""
        ready = sorted(((self.order(group), group[0].input.cost) for group in self.ready.values()), reverse=True)
        chunk: list[Waiting] = []
        weight = tokens_before = 0
        while self.unprepared:
            order, one = self.unprepared[0]
            if not one.future.done():
                while ready and ready[-1][0] < order:
                    tokens_before += ready.pop()[1]
                if tokens_before >= AHEAD_BATCHES * self.max_tokens:
                    break
                weight += one.source.weight
                if chunk and weight > CHUNK_WEIGHT:
                    break
                chunk.append(one)
            heapq.heappop(self.unprepared)
        return chunk or None

    def enqueue(self, one: Waiting, key: bytes) -> None:
        if key in self.cache:
            CACHE_HITS.inc()
            self.cache.move_to_end(key)
            self.finish([one], self.cache[key])
        elif key in self.computing:
            self.computing[key].append(one)
        else:
            self.ready.setdefault(key, []).append(one)

    # ------------------------------------------------------------------------------------------------- computing

    async def compute(self, thread: ThreadPoolExecutor) -> None:
        def embed(inputs: Sequence[Input]) -> list[np.ndarray | Exception]:
            with MODEL_SECONDS.time():
                return isolate(self.embed_batch, inputs)

        while True:
            batch = self.computing = await self.when_there_is(self.next_batch)
            inputs = [group[0].input for group in batch.values()]
            results = await asyncio.get_running_loop().run_in_executor(thread, embed, inputs)
            for (key, group), result in zip(batch.items(), results, strict=True):
                if not isinstance(result, Exception) and not np.isfinite(result).all():
                    result = ServiceError("The embedding is not finite: set GME_DTYPE to bfloat16 or float32.")
                elif not isinstance(result, Exception) and self.cache_entries:
                    self.cache[key] = result.copy()  # and not a row that keeps its whole batch in memory
                self.finish(group, result)
            while len(self.cache) > self.cache_entries:
                self.cache.popitem(last=False)
            self.computing = {}

    def next_batch(self) -> dict[bytes, list[Waiting]] | None:
        """The best batch of what is ready.

        The first in order is always in it. Of those that follow in order and share its instruction, as many as fit
        into the batch's tokens, those nearest to it in length are, as long as at most 20 % of the batch is padding.
        """
        for key, group in list(self.ready.items()):
            group[:] = [one for one in group if not one.future.done()]
            if not group:
                del self.ready[key]
        if not self.ready:
            return None
        waiting = sorted(self.ready, key=lambda key: self.order(self.ready[key]))
        first = self.ready[waiting[0]][0].input
        cost = {key: self.ready[key][0].input.cost for key in waiting}
        fitting, num_tokens = [], 0
        for key in waiting:
            if self.ready[key][0].input.prefix != first.prefix:
                continue
            num_tokens += cost[key]
            if fitting and num_tokens > self.max_tokens:
                break
            fitting.append(key)
        fitting.sort(key=lambda key: abs(cost[key] - first.cost))
        size, num_tokens, longest = 1, 0, 0
        for count, key in enumerate(fitting, start=1):
            num_tokens, longest = num_tokens + cost[key], max(longest, cost[key])
            num_padded = count * longest
            if num_padded <= self.max_tokens and num_tokens >= (1 - MAX_PADDING) * num_padded:
                size = count
        # A new request starts where the first of what waits is, and one further with every batch.
        first_orders = [
            self.order(self.ready[waiting[0]]),
            *self.preparing,
            *(order for order, _ in self.unprepared[:1]),
        ]
        self.clock = max(self.clock + 1, min(first_orders)[0])
        batch = {key: self.ready.pop(key) for key in fitting[:size]}
        BATCH_INPUTS.observe(size)
        BATCH_PADDING.observe(1 - sum(cost[key] for key in batch) / (size * max(cost[key] for key in batch)))
        for one in itertools.chain.from_iterable(batch.values()):
            QUEUE_SECONDS.observe(time.perf_counter() - one.arrived)
        self.notify()  # there is room to prepare more
        return batch

    @staticmethod
    def order(group: Sequence[Waiting]) -> tuple[int, int]:
        return min(one.order for one in group)

    @staticmethod
    def finish(group: Sequence[Waiting], result: np.ndarray | ServiceError) -> None:
        for one in group:
            if one.future.done():
                continue
            if isinstance(result, ServiceError):
                one.future.set_exception(type(result)(f"{one.name}{result}"))
            else:
                one.future.set_result(result)


# -------------------------------------------------------------------------------------------------------- 6. HTTP
#
# Protected against here: a wrong key, before the body is read; the size of a body as it comes, and of all bodies
# together; JSON of millions of parts; forms of many parts; too many inputs; a full queue. Images are bounded in room 3.
# Not protected against: slow clients, dead connections, floods of pipelined requests, and eavesdroppers, which are the
# proxy's (deploy/nginx.conf); floods of headers, which are uvicorn's h11's; memory that runs away, which is systemd's.

QUEUE_DEPTH = Gauge("gme_queue_inputs", "Inputs without an answer.")
INPUTS = Counter("gme_inputs", "Inputs answered, by kind.", ["kind"])
TOKENS = Counter("gme_tokens", "Tokens of the inputs answered.")
MODEL_INFO = Gauge("gme_info", "The model and the service.", ["model", "device", "dtype", "version"])
STATIC_PATH = "/docs/static"
OPEN_PATHS = ("/", "/health", "/metrics", "/docs", "/openapi.json")  # and what lies below STATIC_PATH
MAX_OPEN_BODIES = 32  # of the largest size that may be in memory at a time
LINGER_BODIES = 8  # how many times the largest size is read and dropped after a refusal, so that its sender reads it
LINGER_SECONDS = 60
MAX_FORM_FIELDS = 16
FORM = "body: send a multipart form with the image in the field `file` (with curl: -F file=@photo.jpg)."
STATUSES = {  # with an example of each
    400: ("An input cannot be embedded.", "texts is empty: send at least one."),
    401: ("The API key is missing or wrong.", "The API key is missing or wrong: send `Authorization: Bearer <key>`."),
    413: ("The body, the number of inputs or an image is too large.", "texts has 3000 inputs: send at most 2048."),
    422: ("The request is malformed.", "prompt: Input should be a valid string."),
    500: ("A fault of the service.", "A fault of the service: its log says more."),
    503: ("Too much work waits: try again.", "Too many inputs wait already: try again in a moment."),
}
PROMPT = f"The instruction. Give one with queries, none with documents. Default: {DEFAULT_INSTRUCTION!r}"
Prompt = Annotated[str | None, Field(description=PROMPT, examples=["Find an image that matches the given text."])]
HARMLESS: dict[str, tuple[Any, ...]] = {  # what clients of other services send along, and we do anyway
    "normalized": (True,),
    "embedding_type": ("float",),
    "truncate": (True, "END"),
    "late_chunking": (False,),
}
INSTEAD = {  # what to use in place of a field that would change the embedding
    "messages": 'input, for example [{"text": "a red circle", "image": "data:image/png;base64,…"}]',
    **dict.fromkeys(
        ("instruction", "instructions", "input_type", "task", "prompt_name"), "prompt, with the instruction"
    ),
}


DATA_URI = re.compile(r"data:(\w+)/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
B = TypeVar("B", bound="Body")
EMBEDDINGS = {"embeddings": [[0.0134, -0.0127, 0.0451]]}
OPENAI_EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.0134, -0.0127, 0.0451]}],
    "model": "iic/gme-Qwen2-VL-2B-Instruct",
    "usage": {"prompt_tokens": 23, "total_tokens": 23},
}
OPENAI_INPUT = {
    "description": "A text, an image's data URI, or a list of these and of objects with `text`, `image` or both.",
    "examples": [["a red circle", {"image": "data:image/png;base64,iVBORw0KGgo="}, {"text": "a", "image": "iVBORw0="}]],
}
IMAGE_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "One or more images.",
        },
        "text": {"type": "string", "description": "A text to fuse with each image."},
        "prompt": {"type": "string", "description": PROMPT},
    },
}


class Body(BaseModel):
    """A JSON body. Fields that the route does not have are kept apart, to be refused by name."""

    model_config = ConfigDict(extra="allow")


class Texts(Body):
    """A request of /embed/text."""

    texts: Annotated[list[str], Field(fail_fast=True)] = Field(
        description="The texts, one vector each.", examples=[["a red circle", "一个红色的圆形"]]
    )
    prompt: Prompt = None


class OpenAIRequest(Body):
    """A request in the shape of OpenAI's embeddings API, which takes images too."""

    input: Annotated[str | list[Any], WithJsonSchema(OPENAI_INPUT)]
    model: str | None = Field(None, description="Any name: there is one model.", examples=["gme"])
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64 is that of float32.")
    dimensions: int | None = Field(None, description="Only the model's own.")
    user: str | None = Field(None, description="Ignored.")
    prompt: Prompt = None


def request_body(schema: Mapping[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    """The description of a body that its route reads by itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def responses(example: object, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The description of a route's answers, with an example of each."""

    def described(sentence: str, example: object) -> dict[str, Any]:
        return {"description": sentence, "content": {"application/json": {"example": example}}}

    errors = {
        status: described(sentence, error_body(status, detail, openai))
        for status, (sentence, detail) in STATUSES.items()
    }
    return {200: described("The answer.", example), **errors}


def error_body(status: int, message: str, openai: bool) -> dict[str, Any]:
    """An error in our shape; on OpenAI's routes in theirs too, as clients made for Jina read `detail` there."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    error = {"error": {"message": message, "type": kind, "code": None}} if openai else {}
    return {**error, "detail": message}


def error_response(request: Request, status: int, message: str) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    body = error_body(status, message, request.scope["path"].startswith("/v1/"))
    return Response(orjson.dumps(body), status, headers, "application/json")


def json_response(content: object) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


class Guard:
    """ASGI middleware in front of all routes: the API key, the size of bodies, and refusals that arrive.

    A client that still sends when its connection is closed may never see the answer. So the end of an early answer is
    held back while what still comes is read and dropped, up to a bound; then the connection is closed.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.key, self.max_body = app, settings.api_key, int(settings.max_body_mb * 2**20)
        self.too_large = TooLargeError(
            f"The body is larger than {settings.max_body_mb:g} MB: send less in one request."
        )
        self.open_bytes = 0  # of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, held = Request(scope), 0
        length = request.headers.get("content-length", "0")
        coming = length != "0" or "transfer-encoding" in request.headers  # whether more of the body is to be read

        async def receive_counted() -> Message:
            nonlocal held, coming
            message = await receive()
            size, coming = len(message.get("body", b"")), message.get("more_body", False)
            held += size
            self.open_bytes += size
            if held > self.max_body:
                raise self.too_large
            if self.open_bytes > MAX_OPEN_BODIES * self.max_body:
                raise BusyError("Too much is being sent: try again in a moment.")
            return message

        async def send_to_the_end(message: Message) -> None:
            if coming and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            if coming and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                await drop_the_rest()
                message = {"type": "http.response.body"}
            await send(message)

        async def drop_the_rest() -> None:
            dropped, more = 0, True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while more and dropped < LINGER_BODIES * self.max_body:
                        message = await receive()
                        dropped, more = dropped + len(message.get("body", b"")), message.get("more_body", False)

        app = self.app
        if not self.admits(request):
            app = error_response(request, 401, STATUSES[401][1])
        elif int(length) > self.max_body:
            app = error_response(request, 413, str(self.too_large))
        try:
            await app(scope, receive_counted, send_to_the_end)
        finally:
            self.open_bytes -= held

    def admits(self, request: Request) -> bool:
        path = request.scope["path"]
        if not self.key or path in OPEN_PATHS or path.startswith(STATIC_PATH):
            return True
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode("latin-1"), self.key.encode())


async def read_json(request: Request, kind: type[B], max_inputs: int) -> B:
    """The body as JSON of that kind. Raises `MalformedError` and `TooLargeError`."""
    body = await request.body()
    # Ten million `[],` would hold the event loop for seconds: what lies outside the strings is bounded before parsing.
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    bound = 64 * max_inputs + 100_000
    if unescaped.count(b'"') > bound or sum(map(len, unescaped.split(b'"')[::2])) > bound:
        raise TooLargeError("The body has too many values: send fewer inputs, and texts instead of token ids.")
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        sentences = (f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}." for fault in faults[:5])
        raise MalformedError(" ".join(sentences)) from None
    for name, value in (parsed.model_extra or {}).items():
        if value is not None and value not in HARMLESS.get(name, ()):
            instead = INSTEAD.get(name, f"{', '.join(kind.model_fields)}")
            raise MalformedError(f"{name[:80]} is not a field of this route: use {instead}.")
    return parsed


async def read_form(request: Request, max_files: int) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """The files (name, content) and the text fields of a multipart form, kept in memory. Raises `MalformedError`."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise MalformedError(FORM)
    files: list[tuple[str, bytes]] = []
    fields: list[tuple[str, str]] = []

    def on_file(file: Any) -> None:
        if file.field_name != b"file":
            raise MalformedError(FORM)
        if len(files) == max_files:
            raise TooLargeError(f"The form has more than {max_files} files: send fewer in one request.")
        file.file_object.seek(0)
        files.append(((file.file_name or b"").decode("utf-8", "replace"), file.file_object.read()))

    def on_field(part: Any) -> None:
        name = part.field_name.decode("utf-8", "replace")
        if name not in ("text", "prompt") or len(fields) == MAX_FORM_FIELDS:
            raise MalformedError(FORM)
        fields.append((name, (part.value or b"").decode()))

    try:
        in_memory = {"MAX_MEMORY_FILE_SIZE": math.inf}
        parser = FormParser("multipart/form-data", on_field, on_file, boundary=options[b"boundary"], config=in_memory)
        async for chunk in request.stream():
            parser.write(chunk)
    except (FormParserError, UnicodeDecodeError) as error:
        raise MalformedError(f"body: it is not a multipart form in UTF-8 ({error}).") from None
    if not files:
        raise MalformedError(FORM)
    return files, dict(fields)


def read_item(item: object, position: int, instruction: str) -> Source:
    """An item of OpenAI's `input`: a text, an image's data URI, or an object with `text`, `image` or both."""
    which = f"Input {position}: "
    if isinstance(item, str):
        if not DATA_URI.match(item):
            return Source(item, None, instruction)
        item = {"image": item}
    if isinstance(item, int | list):
        raise InputError(
            f"{which}token ids are not embedded: send texts (in LangChain, check_embedding_ctx_length=False)."
        )
    if not isinstance(item, dict) or not item.keys() <= {"text", "image"}:
        raise MalformedError(f"{which}send a text, or an object with `text`, `image` or both.")
    text, image = item.get("text") or "", item.get("image")
    if not isinstance(text, str) or not isinstance(image, str | None):
        raise MalformedError(f"{which}`text` and `image` have to be strings.")
    if image is None:
        if not text:
            raise InputError(f"{which}the object has neither text nor image: give it at least one.")
        return Source(text, None, instruction)
    if image.lower().startswith(("http:", "https:")):
        raise InputError(f"{which}an image URL is never fetched: send the image itself, as a data URI or base64.")
    uri = DATA_URI.match(image)
    try:
        if uri and uri[1].lower() != "image":
            raise ValueError
        encoded = image[uri.end() if uri else 0 :].encode("ascii").translate(None, b" \t\r\n")
        return Source(text, base64.b64decode(encoded, validate=True), instruction)
    except ValueError:
        raise InputError(f"{which}the image is neither base64 nor an image's data URI of base64.") from None


async def embed(request: Request, batcher: Batcher, sources: Sequence[Source]) -> Answer:
    """The batcher's answer, unless the client leaves before: then what is not computed yet never is."""
    answer = asyncio.ensure_future(batcher.embed(sources))
    gone = asyncio.ensure_future(request.receive())  # the body has been read: only a disconnect can come
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        result = answer.result()
    finally:
        gone.cancel()
        answer.cancel()
    for source in sources:
        INPUTS.labels("text" if source.image is None else "fused" if source.text else "image").inc()
    TOKENS.inc(result.tokens)
    return result


def create_app(settings: Settings, batcher: Batcher, model: Model) -> FastAPI:
    """The routes over a batcher. `model` is asked for its names only."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    description = f"Multimodal embeddings of text and images by `{settings.model_id}`."
    app = FastAPIOffline(
        title="GME Service",
        version=__version__,
        description=description,
        lifespan=lifespan,
        redoc_url=None,
        static_url=STATIC_PATH,
    )
    app.add_middleware(Guard, settings=settings)
    key = [Depends(HTTPBearer(auto_error=False, description="GME_API_KEY"))] if settings.api_key else []
    ours, openai, state = (
        APIRouter(tags=["GME"], dependencies=key),
        APIRouter(prefix="/v1", tags=["OpenAI"], dependencies=key),
        APIRouter(tags=["State"]),
    )
    names = {
        "model": settings.model_id,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
    }
    MODEL_INFO.labels(**names).set(1)
    QUEUE_DEPTH.set_function(lambda: batcher.depth)

    @app.exception_handler(ServiceError)
    async def on_service_error(request: Request, error: ServiceError) -> Response:
        if error.status == 500:
            log.error("%s", error)
        return error_response(request, error.status, str(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return error_response(request, error.status_code, error.detail)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def on_fault(request: Request, _: Exception) -> Response:
        return error_response(request, 500, STATUSES[500][1])

    def check_count(inputs: Sequence[object], name: str) -> None:
        most = min(settings.max_inputs, settings.max_queue)
        if not inputs:
            raise InputError(f"{name} is empty: send at least one.")
        if len(inputs) > most:
            raise TooLargeError(f"{name} has {len(inputs)} inputs: send at most {most} in one request.")

    @ours.post(
        "/embed/text",
        summary="Embed texts",
        responses=responses(EMBEDDINGS),
        openapi_extra=request_body(Texts.model_json_schema()),
    )
    async def embed_text(request: Request) -> Response:
        """One embedding per text, in their order."""
        body = await read_json(request, Texts, settings.max_inputs)
        check_count(body.texts, "texts")
        instruction = body.prompt or DEFAULT_INSTRUCTION
        answer = await embed(request, batcher, [Source(text, None, instruction) for text in body.texts])
        return json_response({"embeddings": answer.embeddings})

    @ours.post(
        "/embed/image",
        summary="Embed images, alone or fused with a text",
        responses=responses(EMBEDDINGS),
        openapi_extra=request_body(IMAGE_FORM, "multipart/form-data"),
    )
    async def embed_image(request: Request) -> Response:
        """One embedding per file, in their order; with `text`, each of image and text together."""
        files, fields = await read_form(request, settings.max_inputs)
        check_count(files, "file")
        text, instruction = fields.get("text", ""), fields.get("prompt") or DEFAULT_INSTRUCTION
        sources = [
            Source(text, content, instruction, f"File {position} ({name}): ")
            for position, (name, content) in enumerate(files, start=1)
        ]
        answer = await embed(request, batcher, sources)
        return json_response({"embeddings": answer.embeddings})

    @openai.post(
        "/embeddings",
        summary="Embed as with OpenAI's API",
        responses=responses(OPENAI_EMBEDDINGS, openai=True),
        openapi_extra=request_body(OpenAIRequest.model_json_schema()),
    )
    async def openai_embeddings(request: Request) -> Response:
        """OpenAI's list object, with one embedding per input in their order. Images are data URIs or base64."""
        body = await read_json(request, OpenAIRequest, settings.max_inputs)
        if body.dimensions not in (None, model.dimension):
            raise InputError(f"dimensions can only be {model.dimension}: this model was not trained to be cut.")
        items = [body.input] if isinstance(body.input, str) else body.input
        check_count(items, "input")
        instruction = body.prompt or DEFAULT_INSTRUCTION
        sources = [read_item(item, position, instruction) for position, item in enumerate(items, start=1)]
        answer = await embed(request, batcher, sources)
        vectors: Sequence[Any] = answer.embeddings
        if body.encoding_format == "base64":
            vectors = [base64.b64encode(vector.tobytes()).decode() for vector in answer.embeddings]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
        return json_response({"object": "list", "data": data, "model": settings.model_id, "usage": usage})

    @openai.get("/models", summary="The one model, as with OpenAI's API")
    async def openai_models() -> Response:
        """OpenAI's list of models."""
        entry = {"id": settings.model_id, "object": "model", "created": 0, "owned_by": settings.model_id.split("/")[0]}
        more = {"dimension": model.dimension, "max_length": settings.max_length}
        return json_response({"object": "list", "data": [entry | more]})

    @state.get("/health", summary="Whether the service works")
    async def health() -> Response:
        """Which model runs, where, and how much waits for it; status 503 when it has ended."""
        status = "ok" if batcher.alive else "the model has ended"
        body = {"status": status, **names, "dimension": model.dimension, "queue_depth": batcher.depth}
        return Response(orjson.dumps(body), 200 if batcher.alive else 503, media_type="application/json")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    instrumentator = Instrumentator(should_group_status_codes=False).instrument(app, latency_lowr_buckets=SECONDS)
    instrumentator.expose(app, summary="Metrics for Prometheus", response_class=PlainTextResponse, tags=["State"])
    for router in (ours, openai, state):
        app.include_router(router)
    return app


# --------------------------------------------------------------------------------------------------------- 7. app

DEATH_SECONDS = 10  # for the answers under way, when the batcher has ended
PROBES = (
    "A red circle on a white ground, and nothing else to be seen.",
    "a photograph of a harbour at dusk, with boats",
)


def build() -> FastAPI:
    """Load the model and return the app that serves it. Raises `StartError`."""
    started = time.perf_counter()
    settings = Settings.load()
    device = choose_device(settings.device)
    directory = find_checkpoint(settings)
    prepare = Preparer(directory, settings.max_length, settings.max_image_pixels, settings.max_image_tokens)
    model = Model(directory, device, choose_dtype(settings.dtype, device))
    model.check([one for one in prepare([Source(text) for text in PROBES]) if isinstance(one, Input)])
    gc.collect()
    gc.freeze()  # what is loaded by now stays, and going over it took the collector a third of the event loop's time
    # Enough to keep the device busy, and no more: a batch is as long as a lone query may have to wait.
    batch_tokens = 16384 if device.type == "cuda" else min(256 * torch.get_num_threads(), 8192)
    cache_entries = int(settings.cache_mb * 2**20 / (4 * model.dimension + CACHE_ENTRY_BYTES))
    batcher = Batcher(
        prepare, model.embed, settings.max_batch_tokens or batch_tokens, settings.max_queue, cache_entries
    )
    exit_code = 0

    def end_process() -> None:
        nonlocal exit_code
        exit_code = 1
        asyncio.get_running_loop().call_later(DEATH_SECONDS, os._exit, 1)
        os.kill(os.getpid(), signal.SIGTERM)  # uvicorn answers what it can and shuts down

    batcher.on_death = end_process
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # uvicorn raises the signal again when its graceful shutdown is done: this is what it meets
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_code))
    log.info(
        "GME Service %s: %s on %s in %s, %d dimensions, loaded in %.1f s from %s; %s.",
        *(
            __version__,
            settings.model_id,
            device,
            model.dtype,
            model.dimension,
            time.perf_counter() - started,
            directory,
        ),
        "an API key is needed" if settings.api_key else "no API key is needed",
    )
    return create_app(settings, batcher, model)


def main(arguments: list[str]) -> None:
    """`python gme_service.py`: uvicorn with its own options, or one of ours. Raises `StartError`."""
    if arguments == ["--version"]:
        print(__version__)
    elif arguments == ["--verify"]:
        print(verify(Settings.load()))
    else:
        if "--help" in arguments:
            print("python gme_service.py [--verify | --version | OPTIONS of uvicorn, below]: serves on all addresses,")
            print("port 8000. The settings are environment variables GME_*: see README.md.\n", flush=True)
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "gme_service:app"]
        os.execv(sys.executable, [*command, "--host", "0.0.0.0", *arguments])


try:
    if __name__ == "__main__":
        main(sys.argv[1:])
    else:
        app = build()
except StartError as error:
    print(error, file=sys.stderr)
    # uvicorn starts a worker again and again unless it ends with 3
    sys.exit(3 if multiprocessing.parent_process() else error.exit_code)
