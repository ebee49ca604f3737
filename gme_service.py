"""GME Service: multimodal embeddings of text and images over HTTP, from one module.

What flows through it: `Source`, what a client sent (text, image bytes, an
instruction); `Input`, what the model reads (token ids, pixel patches); and an
embedding, as the authors' code gives it: an L2-normalised float32 vector.

Seven rooms, each of which knows only those above it:
1. Settings: what the environment changes.
2. Checkpoint: where the model's files are, what they hold, how they are fetched.
3. Inputs: prompt, tokens and images. It knows no model and no HTTP.
4. Model: Qwen2-VL in plain torch, on a CPU or on one GPU.
5. Batcher: whose turn it is, batches, the cache. It knows no torch and no HTTP.
6. HTTP: routes, limits and errors. What it protects against stands at its top.
7. app: all of it loaded, when uvicorn imports the module.

Covered: the published checkpoints, 2B and 7B; texts, images, and both fused into one
embedding. Not covered: video, generating text, training, quantised weights, several
GPUs in one process, and vectors cut to fewer dimensions.
"""

import asyncio
import base64
import binascii
import bisect
import codecs
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import signal
import struct
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http import HTTPMethod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import orjson
import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from filelock import FileLock
from PIL import Image, ImageOps
from prometheus_client import Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator import Instrumentator, metrics
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    Field,
    FiniteFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import BaseSettings
from python_multipart import multipart
from safetensors import SafetensorError, safe_open
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

__version__ = "2.0.0"
# Large pages halve the start time. torch reads this with its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# It would log every broken form.
logging.getLogger("python_multipart").setLevel(logging.ERROR)
# The logger that uvicorn has configured by the time it imports the app.
log = logging.getLogger("uvicorn.error")


class StartError(Exception):
    """The service cannot start, and would not if started again. The message says what to do."""

    # EX_CONFIG of sysexits.h, at which systemd does not start it again.
    exit_code = 78


class StartLaterError(StartError):
    """It may start a moment later: a hub was down, or the process before still holds the memory."""

    exit_code = 1


class DeviceLostError(Exception):
    """The device cannot compute any more, and the process has to end with it."""


class ServiceError(Exception):
    """Why a request has no embeddings, in a sentence for the client.

    Each kind has its HTTP status, and an example of its sentence.
    """

    status = 500
    example = "A fault of the service: its log says more."


class InputError(ServiceError):
    status = 400
    example = "The request has 0 inputs: send 1 to 2048."


class KeyRefusedError(ServiceError):
    status = 401
    example = "No valid API key: send `Authorization: Bearer <key>`."


class NotFoundError(ServiceError):
    status = 404
    example = "The model gpt-4 is not served."


class SlowBodyError(ServiceError):
    status = 408
    example = "The body did not come in time: send it again, faster."


class TooLargeError(ServiceError):
    status = 413
    example = "The request has 3000 inputs: send 1 to 2048."


class EncodingError(ServiceError):
    status = 415
    example = "The body is encoded (gzip): send it as it is."


class MalformedError(ServiceError):
    status = 422
    example = "prompt: Input should be a valid string."


class BusyError(ServiceError):
    status = 503
    example = "Too many inputs wait already: try again in a moment."


# ---------------------------------------------------------------------------------------------------- 1. Settings
# Kubernetes adds these variables to a pod for each Service whose name begins with gme.
# It sets GME_PORT to a URL; a bare number is a setting that somebody meant for this
# service, and is refused.
OF_KUBERNETES = re.compile(
    r"GME(_\w+)?_SERVICE_(HOST|PORT(_\w+)?)=.*"
    r"|GME(_\w+)?_PORT_\d+_[A-Z]+(_ADDR|_PORT|_PROTO)?=.*"
    r"|GME(_\w+)?_PORT=\w+://.*",
    re.DOTALL,
)


def checked_model_id(name: str) -> str:
    """Raises `ValueError` for a name that would lead out of GME_MODEL_DIR."""
    if {"", ".", ".."} & set(name.split("/")):
        raise ValueError(
            "give a name such as iic/gme-Qwen2-VL-2B-Instruct, and in GME_MODEL_DIR the directory that models lie in"
        )
    return name


def checked_key(key: str) -> str:
    """Raises `ValueError` for a key that no client can send, or that would arrive changed."""
    # A server reads a header as Latin-1 and strips it, where NBSP counts as white space.
    received = key.encode().decode("latin-1")
    if re.search(r"[\0-\x1f\x7f]", key) or received != received.strip():
        raise ValueError("no header can carry it; use letters, digits and punctuation")
    return key


class Settings(BaseSettings, env_prefix="GME_", env_ignore_empty=True, str_strip_whitespace=True):
    """What the environment changes. README.md says what each of them means."""

    model_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Path("~/gme_models")
    model_id: Annotated[str, AfterValidator(checked_model_id)] = "iic/gme-Qwen2-VL-2B-Instruct"
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
    query_prompt: str | None = Field(None, min_length=1)
    api_key: Annotated[str, AfterValidator(checked_key)] | None = Field(None, min_length=1)

    @classmethod
    def load(cls) -> "Settings":
        """Read the environment. Raises `StartError` for the first variable that cannot be used."""
        cls.check_names()
        try:
            return cls()
        except ValidationError as error:
            field_name, message = first_fault(error)
            raise StartError(f"GME_{field_name.upper()} cannot be used: {message}.") from None
        except RuntimeError as error:
            # expanduser finds no home.
            raise StartError(f"GME_MODEL_DIR cannot be used: {error} Give an absolute path.") from None

    @classmethod
    def check_names(cls) -> None:
        """Raises `StartError` for a GME_ variable that is no setting.

        It may be a misspelt one, which would have no effect.
        """
        known = [name.upper() for name in cls.model_fields]
        ignored = []
        for name, value in os.environ.items():
            # pydantic ignores their case too.
            name = name.upper()
            setting = name.removeprefix("GME_")
            if setting == name or setting in known:
                continue
            if OF_KUBERNETES.fullmatch(f"{name}={value}"):
                ignored.append(name)
                continue
            near = difflib.get_close_matches(setting, known, n=1)
            advice = f"use GME_{near[0]}" if near else "README.md lists them"
            raise StartError(f"{name} is no setting: {advice}.")
        if ignored:
            names = ", ".join(sorted(ignored))
            log.info("Ignoring the variables that Kubernetes adds for its Services: %s.", names)


def first_fault(error: ValidationError) -> tuple[str, str]:
    """The field of the first fault, as `vision_config.depth`, and what is wrong with it.

    The words do not end with a full stop.
    """
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field_name = ".".join(map(str, fault["loc"]))
    return field_name, fault["msg"].removeprefix("Value error, ")


# -------------------------------------------------------------------------------------------------- 2. Checkpoint
WEIGHT_INDEX = "model.safetensors.index.json"
# Ends an error about a fault that a download mends, and `find_fault` does not see.
DOWNLOAD_ANEW = "The next start then downloads it anew."
SPECIAL_TOKENS = (
    # Those of the authors' prompt.
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
)


class WeightIndex(BaseModel):
    """What `model.safetensors.index.json` holds."""

    # Names of weights to names of files.
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def weight_files(directory: Path) -> set[Path]:
    """The files that the index names, or the one that needs no index.

    Raises `OSError` or `ValueError` for an index that cannot be read or names no file.
    """
    index = directory / WEIGHT_INDEX
    if not index.exists():
        return {directory / "model.safetensors"}
    shards = WeightIndex.model_validate_json(index.read_bytes()).weight_map.values()
    return {directory / shard for shard in shards}


def find_fault(directory: Path) -> str | None:
    """What a checkpoint lacks, as "config.json is missing"; None when it is whole.

    A file is damaged when it is cut or cannot be parsed; `Config.read` judges what it says.
    Raises `StartError` for a file that is there and cannot be read, which no download mends.
    """
    # `path` is the file of which the errors below tell.
    try:
        for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
            path = directory / name
            json.loads(path.read_bytes())
        path = directory / WEIGHT_INDEX
        for file in sorted(weight_files(directory)):
            path = file
            # safe_open reports an unreadable file as missing, so open() tries first.
            # safe_open compares the header with the file's size, and so finds a file that is cut.
            with path.open("rb"), safe_open(path, framework="np"):
                pass
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        return f"{path.name} is damaged ({': '.join(filter(None, first_fault(error)))})"
    except (ValueError, SafetensorError) as error:
        return f"{path.name} is damaged ({error})"
    return None


def find_checkpoint(settings: Settings) -> Path:
    """The checkpoint's directory.

    Files that are missing or damaged are fetched from ModelScope. Raises `StartError`, or
    `StartLaterError` when the hub may answer later.
    """
    directory = settings.model_dir / settings.model_id
    fault = find_fault(directory)
    if fault is None:
        return directory
    prepare_client(settings.model_dir)
    # Where there is no terminal, progress bars would fill the log with 90,000 lines an hour.
    progress_bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        # One worker at a time.
        with FileLock(directory / ".lock"), contextlib.redirect_stderr(progress_bars):
            fault = find_fault(directory)
            if fault is None:
                # Another worker has fetched it.
                return directory
            download(settings, directory, fault)
    except StartError:
        raise
    # The client raises many kinds.
    except Exception as error:
        error_type = StartError
        if getattr(error, "retryable", False):
            error_type = StartLaterError
        reason = " ".join(str(error).split())
        raise error_type(
            f"In {directory}, {fault}, and downloading failed: {reason}."
            " Start again to go on, or set GME_MODEL_DIR or MODELSCOPE_ENDPOINT,"
            " or put the files there by hand."
        ) from None
    return directory


def prepare_client(model_dir: Path) -> None:
    """Set what ModelScope's client reads from the environment, where the user has not set it."""
    # The client fails without a HOME.
    os.environ.setdefault("HOME", str(model_dir))
    # find_checkpoint has a lock already, and the client's would lie in HOME.
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_FILE_LOCK", "false")
    # Seconds for one file: the client's hour may not do for 5 GB.
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")
    try:
        (Path.home() / ".modelscope" / "credentials" / "cookies").read_bytes()
    except PermissionError:
        # HOME is another user's. The client could not read it either.
        os.environ.setdefault("MODELSCOPE_HOME", str(model_dir / ".modelscope"))
    except OSError:
        # Nobody has logged in.
        pass


def download(settings: Settings, directory: Path, fault: str) -> None:
    """Fetch what is missing or differs from the hub's, and write SHA256SUMS for `sha256sum -c`.

    Raises `ValueError` when the checkpoint is not whole after that, and what the client raises.
    """
    # Importing it takes 1.3 s, and is needed once.
    from modelscope import snapshot_download

    model_id = settings.model_id
    log.info(
        "Downloading %s into %s, where %s (the 2B model has 8.8 GB).",
        model_id,
        directory,
        fault,
    )
    snapshot_download(model_id, revision=settings.model_revision, local_dir=str(directory))
    remaining_fault = find_fault(directory)
    if remaining_fault is not None:
        raise ValueError(f"what the hub sent is no complete Qwen2-VL checkpoint: {remaining_fault}")
    lines = []
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.name}\n")
    (directory / "SHA256SUMS").write_text("".join(lines))


class TextFields(BaseModel, strict=True):
    """The decoder's fields.

    They are at the top of the published config.json, and under text_config when a newer
    transformers has saved it. Here and below, a field with a default may be left out. A
    field whose type has a single value is there to refuse a model that this code would
    compute wrongly.
    """

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    rms_norm_eps: float = Field(1e-5, gt=0, allow_inf_nan=False)
    rope_theta: float = Field(
        1_000_000.0,
        gt=0,
        allow_inf_nan=False,
        validation_alias=AliasChoices("rope_theta", AliasPath("rope_parameters", "rope_theta")),
    )
    rope_type: Literal["default", "mrope"] = Field(
        "default",
        validation_alias=AliasChoices(
            AliasPath("rope_parameters", "rope_type"),
            AliasPath("rope_scaling", "rope_type"),
            AliasPath("rope_scaling", "type"),
        ),
    )
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] = False


class VisionFields(BaseModel, strict=True):
    """What describes the vision tower. The published files leave out most of it."""

    depth: PositiveInt = 32
    embed_dim: PositiveInt = 1280
    num_heads: PositiveInt = 16
    mlp_ratio: PositiveInt = 4
    hidden_act: Literal["quick_gelu"] = "quick_gelu"
    patch_size: Literal[14] = 14
    spatial_merge_size: Literal[2] = 2
    temporal_patch_size: Literal[2] = 2


class ConfigFields(BaseModel, strict=True):
    """`config.json`. Without `text_config`, the decoder's fields are beside `vision_config`."""

    vision_config: VisionFields
    text_config: TextFields | None = None


Positive = Annotated[FiniteFloat, Field(gt=0)]


class ProcessorFields(BaseModel, strict=True):
    """`preprocessor_config.json`."""

    image_mean: Annotated[list[FiniteFloat], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[Positive], Field(min_length=3, max_length=3)]


Fields = TypeVar("Fields", bound=BaseModel)


def read_fields(path: Path, fields: type[Fields]) -> Fields:
    """The fields of a JSON file. Raises `StartError` for a file, or a value, that is not served."""
    try:
        return fields.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        field_name, message = first_fault(error)
        where = f"{field_name}: " if field_name else ""
        raise StartError(f"{path} does not describe a Qwen2-VL: {where}{message}.") from None


@dataclass(frozen=True)
class Config:
    """The sizes of a Qwen2-VL, and how the pixels of its images are normalised."""

    width: int
    layers: int
    heads: int
    # Each serves several query heads.
    kv_heads: int
    inner: int
    vocabulary: int
    theta: float
    eps: float
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_inner: int
    mean: list[float]
    std: list[float]

    @classmethod
    def read(cls, directory: Path) -> "Config":
        """Read config.json and preprocessor_config.json.

        Raises `StartError` for one that is missing, damaged or of another model, and for
        sizes that do not fit together.
        """
        path = directory / "config.json"
        fields = read_fields(path, ConfigFields)
        text = fields.text_config or read_fields(path, TextFields)
        vision = fields.vision_config
        processor = read_fields(directory / "preprocessor_config.json", ProcessorFields)
        config = cls(
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            inner=text.intermediate_size,
            vocabulary=text.vocab_size,
            theta=text.rope_theta,
            eps=text.rms_norm_eps,
            vision_width=vision.embed_dim,
            vision_layers=vision.depth,
            vision_heads=vision.num_heads,
            vision_inner=vision.embed_dim * vision.mlp_ratio,
            mean=processor.image_mean,
            std=processor.image_std,
        )
        config.check_sizes(path)
        return config

    def check_sizes(self, path: Path) -> None:
        """Raises `StartError` for sizes of which one has to be a multiple of another and is not."""
        for number, divisor, rule in (
            (self.width, self.heads, "hidden_size is no multiple of num_attention_heads"),
            (self.heads, self.kv_heads, "num_attention_heads is no multiple of num_key_value_heads"),
            (self.width, 2 * self.heads, "hidden_size / num_attention_heads is odd"),
            (self.vision_width, self.vision_heads, "vision_config.embed_dim is no multiple of num_heads"),
            (self.vision_width, 4 * self.vision_heads, "vision_config.embed_dim / num_heads is no multiple of 4"),
        ):
            if number % divisor:
                raise StartError(f"{path} does not describe a Qwen2-VL: {rule}.")

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raises `StartError` when the tokenizer has an id that the model has no embedding for."""
        token, last = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        if last >= self.vocabulary:
            raise StartError(
                "tokenizer.json and config.json are not of one model: the tokenizer has the id"
                f" {last} for {token!r}, and vocab_size is {self.vocabulary}."
                " Delete both: the next start then downloads them anew."
            )


def read_tokenizer(directory: Path) -> Tokenizer:
    """The checkpoint's tokenizer. Raises `StartError` if it is damaged or lacks a special token."""
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises no kind of its own.
    except Exception as error:
        raise StartError(f"{path} is no tokenizer ({error}): delete it. {DOWNLOAD_ANEW}") from None
    for token in SPECIAL_TOKENS:
        if tokenizer.token_to_id(token) is None:
            raise StartError(f"{path} is not a Qwen2-VL's: it has no {token}. Delete it. {DOWNLOAD_ANEW}")
    return tokenizer


# ------------------------------------------------------------------------------------------------------ 3. Inputs
# What the API calls `prompt` is an instruction here; a prompt here is all that the model reads.
DEFAULT_INSTRUCTION = "You are a helpful assistant."
# The authors' prompt, with an image and a text between its two parts.
SYSTEM_PART = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
IMAGE_PART = "<|vision_start|><|image_pad|><|vision_end|>"
# Token ids are kept of instructions of at most so many characters.
MAX_KEPT_INSTRUCTION = 4096
# Attention copies a prefix's keys and values for each input of a batch: 22 MB a
# layer for 1,785 tokens of the 2B in float32. So a long instruction makes batches
# smaller: 32 tokens of a prefix count as one of an input's own.
PREFIX_SHARE = 32

# Pixels on a side of a patch, and of an image token, made of 2 x 2 patches.
PATCH_SIDE = 14
TOKEN_SIDE = 2 * PATCH_SIDE
# An image counts as much as a long text, so that a request's texts go first.
IMAGE_WEIGHT = 1 << 14

# Pillow opens MPO as a kind of JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pixels on a side: the longest that a JPEG can have. To resize longer ones, Pillow
# makes gigabytes of coefficients.
MAX_SIDE = 65_535
# Processor seconds that opening an image file may take.
OPEN_SECONDS = 1
# A file that is decoded more slowly than this is refused.
PIXELS_PER_SECOND = 10_000_000
# Scans and EXIF segments. A photo has about ten scans, each a pass over all pixels.
MAX_JPEG_PARTS = 30
# Segments of every kind: a step in Python for each.
MAX_JPEG_SEGMENTS = 10_000
# Bytes that are searched in one go. It holds the interpreter for 20 ms at most.
JPEG_WINDOW = 1 << 20
# libpng writes chunks of 8 kB: a PNG of 32 MB has about 4,000.
MAX_PNG_CHUNKS = 100_000
# Bytes: the longest that a JPEG segment can be. Pillow makes up to 32 times as much of it.
MAX_EXIF = 1 << 16
NO_MEMORY = "The image does not fit into the server's memory: scale it down."
# Errors that Pillow raises for a damaged EXIF.
EXIF_ERRORS = (AttributeError, LookupError, SyntaxError, TypeError, ValueError, struct.error)

TRUNCATED = Counter("gme_truncated_inputs", "Inputs that were cut, at GME_MAX_LENGTH tokens or at fewer as asked.")


@dataclass(slots=True, frozen=True)
class Source:
    """One input as a client sent it: a text, an image file, or both in one embedding."""

    text: str = ""
    image: bytes | None = None
    instruction: str = DEFAULT_INSTRUCTION
    # An error about this input begins with it. It reads like "Input 3: ".
    name: str = ""
    # A text is cut at so many tokens, if they are fewer than GME_MAX_LENGTH.
    max_tokens: int | None = None
    # If false, an input that would be cut is refused.
    may_cut: bool = True

    @property
    def weight(self) -> int:
        """The work of preparing it, in characters of text. `Input.cost` is the model's."""
        characters = len(self.instruction) + len(self.text)
        if self.image is None:
            return characters
        return characters + IMAGE_WEIGHT


@dataclass(slots=True)
class Input:
    """One input as the model reads it: token ids, and the patches of an image."""

    # (length,) int64
    token_ids: np.ndarray
    # The leading ids that belong to the instruction. Inputs of a batch share them. At
    # least one id is left behind them, whose state becomes the embedding.
    prefix: tuple[int, ...]
    # The position of the first image token.
    image_start: int = 0
    # Rows and columns of patches.
    grid: tuple[int, int] = (0, 0)
    # (rows * columns, 588) uint8: 3 channels of 14 x 14. The four patches of an image
    # token follow one another.
    patches: np.ndarray | None = None
    # A digest of all that the embedding depends on.
    key: bytes = b""
    # Whether tokens were left out, as the input had too many.
    is_cut: bool = False

    @property
    def own_tokens(self) -> int:
        """Tokens behind the prefix, which the model computes for this input alone."""
        return len(self.token_ids) - len(self.prefix)

    @property
    def cost(self) -> int:
        """What it adds to a batch, in tokens: its own, and a share of its prefix."""
        return self.own_tokens + len(self.prefix) // PREFIX_SHARE


class PixelBudget:
    """Bounds the pixels that tasks of one event loop decode at a time.

    Callers are served in their order, so that a large image is not passed for ever.
    Asking for more than the whole budget would wait for ever.
    """

    def __init__(self, pixels: int) -> None:
        """A budget of so many pixels, all of them free."""
        self.free = pixels
        # It serves its waiters in their order.
        self.turn = asyncio.Lock()
        self.freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def share(self, pixels: int) -> AsyncIterator[None]:
        """Wait for so many pixels, and have them for one's own within the context."""
        async with self.turn:
            while self.free < pixels:
                self.freed.clear()
                await self.freed.wait()
            self.free -= pixels
        try:
            yield
        finally:
            self.free += pixels
            self.freed.set()


# The gatekeeper: what of an image file may be decoded at all, by its first bytes and its header.


class TimedFile(io.BytesIO):
    """A file in memory that can be read until its thread's processor time reaches `deadline`."""

    def __init__(self, data: bytes) -> None:
        """The first deadline is that of opening the file."""
        super().__init__(data)
        self.deadline = time.thread_time() + OPEN_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises `InputError` when the deadline is over."""
        if time.thread_time() > self.deadline:
            raise InputError("The image takes too long to read: save it anew, without metadata.")
        return super().read(size)


JPEG_SIGNATURE = b"\xff\xd8\xff"
# Of what follows 0xFF, all that begins a segment with a length, and the end of an image.
JPEG_MARKER = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
JPEG_END = b"\xd9"
JPEG_SCAN = b"\xda"
JPEG_EXIF = b"\xe1"


def find_marker(data: bytes, position: int) -> re.Match[bytes] | None:
    """The next marker of `JPEG_MARKER` from this position on, its code as group 1."""
    for start in range(position, len(data), JPEG_WINDOW):
        if marker := JPEG_MARKER.search(data, start, start + JPEG_WINDOW + 1):
            return marker
    return None


def check_jpeg(data: bytes) -> None:
    """Raises `InputError` for a JPEG that would take far longer to decode than its size suggests.

    Its first image alone counts: others may follow, as in an MPO, and small ones lie
    within its EXIF.
    """
    scans = 0
    exif = 0
    position = len(JPEG_SIGNATURE) - 1
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = find_marker(data, position)
        if marker is None or (marker[1] == JPEG_END and scans):
            return
        start = position = marker.end()
        # Only an end, here before any image, has no length.
        if marker[1] != JPEG_END:
            position += max(2, int.from_bytes(data[start : start + 2]))
        scans += marker[1] == JPEG_SCAN
        exif += marker[1] == JPEG_EXIF and data.startswith(b"Exif\0\0", start + 2)
        if scans + exif > MAX_JPEG_PARTS:
            raise InputError(f"The image has over {MAX_JPEG_PARTS} scans and EXIF segments: save it as a plain JPEG.")
    raise InputError(f"The image has over {MAX_JPEG_SEGMENTS} segments: save it without metadata.")


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The position of the byte that says how many bits a sample has.
PNG_DEPTH = 24
# The length of a chunk's content, and its kind. The content and a checksum follow.
PNG_CHUNK = struct.Struct(">I4s")


def plain_png(data: bytes) -> bytes:
    """A PNG without the chunks that change no pixel.

    So damage in these, or a size beyond Pillow's limits, does not matter.
    Raises `InputError` for a file of very many chunks.
    """
    chunks = [data[: len(PNG_SIGNATURE)]]
    start = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if start + PNG_CHUNK.size > len(data):
            break
        length, kind = PNG_CHUNK.unpack_from(data, start)
        end = start + PNG_CHUNK.size + length + 4
        is_ancillary = kind[:1].islower()
        if not is_ancillary or kind in (b"tRNS", b"eXIf"):
            chunks.append(data[start:end])
        if kind == b"IEND":
            break
        start = end
    else:
        raise InputError(f"The image has over {MAX_PNG_CHUNKS} chunks: save it anew, without metadata.")
    return b"".join(chunks)


def eight_bits(transparent: Any, depth: int) -> Any:
    """A PNG's transparent colour, a number or one for each channel, as Pillow scales its pixels."""
    if isinstance(transparent, tuple):
        return tuple(eight_bits(channel, depth) for channel in transparent)
    if depth == 16:
        return transparent >> 8
    return transparent * 255 // (2**depth - 1)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """An image whose header is read. To decode its pixels takes a bounded time.

    Raises `TooLargeError` for too many pixels, `InputError` for a file that takes too
    long, and what Pillow raises for a broken one.
    """
    too_large = TooLargeError(f"The image is over {max_pixels} pixels or {MAX_SIDE} a side: scale it down.")
    is_png = data.startswith(PNG_SIGNATURE)
    if is_png:
        depth = data[PNG_DEPTH]
        data = plain_png(data)
    elif data.startswith(JPEG_SIGNATURE):
        check_jpeg(data)

    file = TimedFile(data)
    try:
        image = Image.open(file, formats=FORMATS)
    # Pillow raises this above 2 * max_pixels.
    except Image.DecompressionBombError:
        raise too_large from None
    num_pixels = image.width * image.height
    if num_pixels > max_pixels or max(image.size) > MAX_SIDE:
        raise too_large
    file.deadline += num_pixels / PIXELS_PER_SECOND
    if is_png and image.mode in ("L", "RGB") and "transparency" in image.info:
        image.info["transparency"] = eight_bits(image.info["transparency"], depth)
    return image


# The decoder: what a person sees of the file.


def decode(image: Image.Image) -> Image.Image:
    """The first frame of an opened file, upright, on white where transparent, in RGB.

    Raises `InputError` for a large EXIF or a file that takes too long, and what Pillow
    raises for a broken one.
    """
    # A PNG may have its EXIF behind the pixels.
    image.load()
    if len(image.info.get("exif", b"")) > MAX_EXIF:
        raise InputError(f"The image has over {MAX_EXIF} bytes of EXIF: save it without metadata.")
    with contextlib.suppress(*EXIF_ERRORS):
        ImageOps.exif_transpose(image, in_place=True)
    # Viewers read past a BMP's alpha, which is often zero throughout.
    if image.format == "BMP":
        return in_mode("RGB", image)
    if image.mode.startswith("I;16"):
        image = high_byte(image)
    if image.has_transparency_data:
        image = on_white(image)
    return in_mode("RGB", image)


def in_mode(mode: str, image: Image.Image) -> Image.Image:
    """By Pillow's `convert`, which would copy an image that is in that mode already."""
    if image.mode == mode:
        return image
    return image.convert(mode)


def high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, in the way in which Pillow reads 16-bit colours.

    Pillow's `convert` would make everything from 255 on white.
    """
    samples = np.asarray(image)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(samples != image.info["transparency"]))
    return grey


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparency, laid on white.

    `alpha_composite` gives the same as `paste`, and holds the interpreter ten times as
    long.
    """
    image = in_mode("RGBA", image)
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image)
    return ground


# The resizer: what the model sees of the image.


def fitted_size(width: int, height: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """`smart_resize` as published: the size to which an image is resized.

    Both sizes are (width, height) in pixels, the result in multiples of 28.
    """
    columns, rows = (max(1, round(side / TOKEN_SIDE)) for side in (width, height))
    if columns * rows > max_tokens:
        shrink = math.sqrt(width * height / (max_tokens * TOKEN_SIDE**2))
        columns, rows = (max(1, math.floor(side / shrink / TOKEN_SIDE)) for side in (width, height))
    elif columns * rows < min_tokens:
        grow = math.sqrt(min_tokens * TOKEN_SIDE**2 / (width * height))
        columns, rows = (math.ceil(side * grow / TOKEN_SIDE) for side in (width, height))
    return columns * TOKEN_SIDE, rows * TOKEN_SIDE


def resize(image: Image.Image, max_tokens: int) -> Image.Image:
    """The authors' own resize, and then that of the published image processor."""
    width, height = fitted_size(*image.size, min_tokens=4, max_tokens=16384)
    # The authors' bound on the ratio of the sides.
    first = (min(width, 200 * height), min(height, 200 * width))
    second = fitted_size(*first, min_tokens=256, max_tokens=max_tokens)
    for size in (first, second):
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def to_patches(image: Image.Image) -> tuple[tuple[int, int], np.ndarray]:
    """The grid and the patches of an `Input`."""
    # (height, width, 3)
    pixels = np.asarray(image)
    rows = pixels.shape[0] // PATCH_SIDE
    columns = pixels.shape[1] // PATCH_SIDE
    blocks = pixels.reshape(rows // 2, 2, PATCH_SIDE, columns // 2, 2, PATCH_SIDE, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH_SIDE**2)
    return (rows, columns), patches


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn what is raised within, by an image file, into an error that begins with `name`.

    Raises `InputError` or `TooLargeError`.
    """
    try:
        yield
    except ServiceError as error:
        raise type(error)(f"{name}{error}") from None
    except MemoryError:
        raise TooLargeError(f"{name}{NO_MEMORY}") from None
    # For a broken file, Pillow raises nearly anything.
    except Exception:
        raise InputError(f"{name}The image cannot be decoded: send a whole file of {', '.join(FORMATS)}.") from None


def shared_start(ids: list[int], system_ids: list[int]) -> list[int]:
    """The ids with which both begin.

    The last of `system_ids` may not be in `ids`: a text's leading white space can merge with the
    line break before it.
    """
    shared = ids[: len(system_ids)]
    while shared != system_ids[: len(shared)]:
        shared.pop()
    return shared


class Preparer:
    """Turns what clients send into what the model reads. Threads may share it."""

    def __init__(
        self,
        directory: Path,
        max_length: int,
        max_image_pixels: int,
        max_image_tokens: int = 1280,
    ) -> None:
        """Reads the tokenizer in `directory`. Raises `StartError` if it cannot be used.

        `max_length` is that of a whole sequence in tokens; `max_image_pixels` bound an
        image as it was sent, `max_image_tokens` as the model sees it.
        """
        self.tokenizer = read_tokenizer(directory)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # The vocabulary writes each byte as one character. So no token is of more characters
        # than its longest name, and what follows `max_chars` would be cut in any case.
        self.max_chars = max_length * max(map(len, self.tokenizer.get_vocab()))
        self.max_length = max_length
        self.max_pixels = max_image_pixels
        self.max_image_tokens = max_image_tokens
        self.kept_system_ids = functools.lru_cache(16)(self.system_ids)
        # For the whole process. Pillow refuses to open a file of twice as many.
        Image.MAX_IMAGE_PIXELS = max_image_pixels

    def __call__(self, sources: Sequence[Source]) -> list[Input]:
        """An `Input` for each. Raises the `InputError` or `TooLargeError` of one that has none."""
        prompts = [self.prompt(source) for source in sources]
        # It releases the interpreter.
        encodings = self.tokenizer.encode_batch_fast(prompts)
        pairs = zip(sources, encodings, strict=True)
        return [self.to_input(source, encoding.ids) for source, encoding in pairs]

    def count_pixels(self, source: Source) -> int:
        """How many pixels its image has, by the file's header, and 0 without one.

        Raises `InputError` or `TooLargeError` for an image that is not to be decoded.
        """
        if source.image is None:
            return 0
        with refusing(source.name), open_image(source.image, self.max_pixels) as image:
            return image.width * image.height

    def prompt(self, source: Source) -> str:
        """The authors' whole prompt for a source, an image as one `<|image_pad|>`.

        Of a very long instruction or text it has only what may be read.
        """
        system_part = SYSTEM_PART.format(source.instruction[: self.max_chars])
        image_part = "" if source.image is None else IMAGE_PART
        text = source.text[: self.max_chars]
        return system_part + image_part + text + END

    def system_ids(self, instruction: str) -> list[int]:
        """The first ids of a prompt, up to where an image or a text begins."""
        system_part = SYSTEM_PART.format(instruction[: self.max_chars])
        return self.tokenizer.encode(system_part).ids[: self.max_length]

    def to_input(self, source: Source, token_ids: list[int]) -> Input:
        """The `Input` of a source and the ids of its prompt, its image decoded.

        Raises `InputError` or `TooLargeError`.
        """
        if len(source.instruction) <= MAX_KEPT_INSTRUCTION:
            system_ids = self.kept_system_ids(source.instruction)
        else:
            system_ids = self.system_ids(source.instruction)

        start = 0
        grid = (0, 0)
        patches = None
        if source.image is not None:
            with refusing(source.name), open_image(source.image, self.max_pixels) as image:
                decoded = decode(image)
            try:
                grid, patches = to_patches(resize(decoded, self.max_image_tokens))
            except MemoryError:
                raise TooLargeError(f"{source.name}{NO_MEMORY}") from None
            start = len(system_ids) + 1
            token_ids = self.with_image(source, token_ids, start, len(patches) // 4)

        ids = self.cut(source, token_ids)
        prefix = shared_start(ids[:-1], system_ids)
        key = hashlib.sha256(repr((ids, start, grid)).encode())
        if patches is not None:
            key.update(patches.data)
        return Input(
            token_ids=np.array(ids, np.int64),
            prefix=tuple(prefix),
            image_start=start,
            grid=grid,
            patches=patches,
            key=key.digest(),
            is_cut=len(ids) < len(token_ids),
        )

    def with_image(
        self,
        source: Source,
        token_ids: list[int],
        start: int,
        image_tokens: int,
    ) -> list[int]:
        """The ids with so many image tokens in place of the one that is at `start`.

        Raises `InputError` if they do not fit.
        """
        room = max(0, self.max_length - start)
        if image_tokens > room:
            raise InputError(
                f"{source.name}The image has {image_tokens} tokens, and the prompt before it leaves"
                f" {room} of the {self.max_length} that this server reads:"
                " send a smaller image or a shorter prompt."
            )
        return token_ids[:start] + image_tokens * [token_ids[start]] + token_ids[start + 1 :]

    def cut(self, source: Source, token_ids: list[int]) -> list[int]:
        """The ids up to the limit, of the server or a lower one of the source.

        Raises `InputError` for a source that may not be cut.
        """
        limit = self.max_length
        if source.max_tokens is not None and source.image is None:
            limit = min(limit, source.max_tokens)
        if len(token_ids) > limit and not source.may_cut:
            count = f"{len(token_ids)} tokens"
            if max(len(source.text), len(source.instruction)) > self.max_chars:
                count = f"at least {count}"
            advice = "shorten it, or allow it to be cut"
            raise InputError(f"{source.name}The input has {count}, over {limit}: {advice}.")
        return token_ids[:limit]


# ------------------------------------------------------------------------------------------------------- 4. Model
# Qwen2-VL in plain torch. A module for each of the published ones, with their names, so that the
# network is also the list of weights to read. Nothing is padded: the tokens of all inputs lie in
# one row, as do the patches of all images, and only attention knows where one input ends.
#
# In shapes: N tokens of all inputs, D their width, P patches of all images, V the width of the
# vision tower. The residual stream, `hidden`, is float32 whatever the dtype of the weights: for
# precision, and for float16's range.

# quick_gelu(x) = x * sigmoid(1.702 * x), which is silu(1.702 * x) / 1.702
QUICK_GELU = 1.702
VISION_THETA = 10_000
LAYER_NORM_EPS = 1e-6
# Prefixes whose keys and values are kept, and the most tokens of each: 7 MB for the 2B model in
# bfloat16, twice that in float32. Of longer ones the last one's are, for its next batches: 59 MB.
KEPT_PREFIXES = 16
MAX_KEPT_PREFIX = 256
MAX_LONG_PREFIX = 2048
# The least share of a call of attention that is tokens. The rest is padding.
MIN_FILL = 0.8
# How far, in 1 - cosine, rounding may take a vector that was computed in another batch.
MAX_DISTANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
ALL_ROWS = 1 << 30


@dataclass(frozen=True)
class Kernels:
    """How to compute what takes nearly all of the time, as it suits a device."""

    # x, weight and bias of a linear layer.
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # The same, with silu of what it gives.
    linear_silu: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    # x, gate and up: silu(x @ gate) * (x @ up).
    gated: Callable[[Tensor, Tensor, Tensor], Tensor]
    # Query, key and value (1, heads, patches, head_dim) of one image.
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    # Copies a linear layer's matrix into the layout of the three products above; None: it stays.
    pack: Callable[[Tensor], Tensor] | None = None
    # Patches that pass the MLP of a vision block at a time.
    rows_together: int = ALL_ROWS
    # Tokens, or patches, whose queries and keys are rotated at a time.
    rotated_together: int = ALL_ROWS
    # Patches of several images that share a call of the vision tower. With more, memory grows
    # and speed does not.
    patches_together: int = 1 << 14


def torch_linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.silu(functional.linear(x, weight, bias), inplace=True)


def torch_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch_linear_silu(x, gate, None).mul_(functional.linear(x, up))


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def onednn_linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "swish", [], "")


def onednn_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    opened = onednn_linear_silu(x, gate, None)
    return torch.ops.mkldnn._linear_pointwise.binary(x, opened, up, None, "mul")


def onednn_pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, batch_size=512)


def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Head by head, 512 queries at a time.

    In bfloat16 on a CPU without AMX it is twice as fast as torch's own; with AMX, half as fast.
    """
    query = query * query.shape[-1] ** -0.5
    heads = zip(*(x.flatten(0, 1).unbind() for x in (query, key, value)), strict=True)
    chunks = []
    for q, k, v in heads:
        k, v = k.contiguous(), v.contiguous()
        chunks += [(rows @ k.T).softmax(-1) @ v for rows in q.split(512)]
    return torch.cat(chunks).view_as(query)


TORCH = Kernels(functional.linear, torch_linear_silu, torch_gated, functional.scaled_dot_product_attention)


def onednn_agrees(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN operators, which are private, give what its public ones give."""
    seeded = torch.Generator().manual_seed(0)
    shapes = ((3, 64), (64, 64), (64,))
    x, weight, bias = (torch.randn(shape, generator=seeded).to(dtype) / 8 for shape in shapes)
    try:
        packed = onednn_pack(weight)
        pairs = [
            (onednn_linear(x, packed, bias), functional.linear(x, weight, bias)),
            (onednn_linear_silu(x, packed, bias), torch_linear_silu(x, weight, bias)),
            (onednn_gated(x, packed, packed), torch_gated(x, weight, weight)),
        ]
        return all(torch.allclose(ours, theirs, rtol=0.02, atol=0.002) for ours, theirs in pairs)
    except (AttributeError, RuntimeError, TypeError):
        return False


def cpu_kernels(dtype: torch.dtype, width: int) -> Kernels:
    """Set torch up for a CPU, and choose what is fastest there."""
    features = torch.cpu.get_capabilities()
    has_amx = features.get("amx_bf16")
    if width < 512:
        # The products of a small model are too short for two threads.
        torch.set_num_threads(1)
    if features.get("avx2") and not has_amx:
        # oneDNN's products in place of MKL's. With AMX or on ARM it would round to bfloat16.
        torch.set_float32_matmul_precision("medium")
    # One image at a time, and so many rows that the MLP's inner layer, or what a rotation computes
    # with, fits into a cache.
    kernels = replace(TORCH, rows_together=512, rotated_together=128, patches_together=1)
    if dtype == torch.bfloat16 and not has_amx:
        kernels = replace(kernels, attend=attend_in_chunks)
    if not onednn_agrees(dtype):
        log.info(
            "Using torch's public operators: its private oneDNN ones are missing or differ in torch %s."
            " The service is slower, and the embeddings are the same.",
            torch.__version__,
        )
        return kernels
    return replace(kernels, linear=onednn_linear, linear_silu=onednn_linear_silu, gated=onednn_gated, pack=onednn_pack)


def cuda_kernels() -> Kernels:
    """Set torch up for a GPU."""
    # cuDNN would plan its attention for 25 to 400 ms for each new shape, as nearly every batch has.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Sums in float16 can overflow: products that are split add their parts in float32.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return TORCH


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weight."""

    def __init__(self, kernels: Kernels, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        return self.kernels.linear_silu(x.to(self.weight.dtype), self.weight, self.bias)


class MergedLinear(Linear):
    """Several published layers as one matrix: `parts` has each one's name and number of outputs."""

    def __init__(self, kernels: Kernels, inputs: int, parts: dict[str, int]) -> None:
        super().__init__(kernels, inputs, sum(parts.values()))
        self.parts = parts


class Rotation(NamedTuple):
    """Rotary position embedding of N tokens or patches: what the pairs of a head rotate by."""

    # (N, 1, head_dim), float32: each pair's cosine, in both halves.
    cos: Tensor
    # (N, 1, head_dim / 2), float32: each pair's sine.
    sin: Tensor

    @classmethod
    def from_angles(cls, angles: Tensor) -> "Rotation":
        """Angles of a head's pairs, (N, head_dim / 2)."""
        cos = angles.cos()
        return cls(torch.cat((cos, cos), dim=-1)[:, None], angles.sin()[:, None])

    def rotate(self, x: Tensor, together: int) -> None:
        """Rotate x (N, heads, head_dim) in place, so many of the N at a time.

        The first half of a head makes the pairs with its second half.
        """
        parts = (part.split(together) for part in (x, self.cos, self.sin))
        for rows, cos, sin in zip(*parts, strict=True):
            # A CPU takes several times as long for operands of two dtypes as for those of one.
            exact = rows.float()
            first, second = exact.chunk(2, dim=-1)
            rotated = exact * cos
            rotated_first, rotated_second = rotated.chunk(2, dim=-1)
            rotated_first.addcmul_(second, sin, value=-1)
            rotated_second.addcmul_(first, sin)
            rows.copy_(rotated)


@functools.cache
def inverse_frequencies(pairs: int, theta: float, device: torch.device) -> Tensor:
    """(pairs,), computed on the CPU as the authors do: the powers of a GPU may round otherwise."""
    return (1 / theta ** (torch.arange(0, 2 * pairs, 2) / (2 * pairs))).to(device)


def rotary_angles(positions: Tensor, pairs: int, theta: float) -> Tensor:
    """(N, pairs), rounded in the authors' order: the inverse frequencies first, in float32."""
    return positions[:, None] * inverse_frequencies(pairs, theta, positions.device)


@dataclass(frozen=True)
class Span:
    """Inputs of like length that share a call of attention, as (B, T) with padding at the end."""

    # Its tokens, in the row of all.
    start: int
    stop: int
    # B and T.
    count: int
    longest: int
    # Each token's place among the B * T; None where nothing is padded.
    slots: Tensor | None

    def pad(self, x: Tensor) -> Tensor:
        """The span's part of x (N, …), as (B, T, …)."""
        own = x[self.start : self.stop]
        if self.slots is not None:
            padded = own.new_zeros((self.count * self.longest, *own.shape[1:]))
            own = padded.index_copy_(0, self.slots, own)
        return own.unflatten(0, (self.count, self.longest))

    def unpad(self, x: Tensor) -> Tensor:
        """The tokens of x (B, T, …) in a row."""
        flat = x.flatten(0, 1)
        return flat if self.slots is None else flat[self.slots]


class VisionAttention(nn.Module):
    """Full attention within each image."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.heads = config.vision_heads
        self.kernels = kernels
        self.qkv = Linear(kernels, config.vision_width, 3 * config.vision_width)
        self.proj = Linear(kernels, config.vision_width, config.vision_width)

    def forward(self, x: Tensor, rotation: Rotation, sizes: Sequence[int]) -> Tensor:
        """x (P, V), of images with these numbers of patches."""
        qkv = self.qkv(x).unflatten(1, (3 * self.heads, -1))
        rotation.rotate(qkv[:, : 2 * self.heads], self.kernels.rotated_together)
        images = (image.split(self.heads, dim=1) for image in qkv.split(list(sizes)))
        attended = [self.attend(*image) for image in images]
        return self.proj(torch.cat(attended))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One image: (patches, heads, head_dim) to (patches, V)."""
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        return self.kernels.attend(*heads_first)[0].transpose(0, 1).flatten(1)


class VisionMLP(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.fc1 = Linear(kernels, config.vision_width, config.vision_inner)
        self.fc2 = Linear(kernels, config.vision_inner, config.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1.silu(x))


class VisionBlock(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.rows_together = kernels.rows_together
        self.norm1 = nn.LayerNorm(config.vision_width, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.vision_width, eps=LAYER_NORM_EPS)
        self.attn = VisionAttention(config, kernels)
        self.mlp = VisionMLP(config, kernels)

    def fold(self) -> None:
        """Put quick_gelu's factor into the weights: the MLP then gives 1.702 times its output."""
        for tensor in (self.norm2.weight, self.norm2.bias, self.mlp.fc1.bias, self.mlp.fc2.bias):
            tensor.mul_(QUICK_GELU)

    def forward(self, hidden: Tensor, rotation: Rotation, sizes: Sequence[int]) -> None:
        """Add the block's part to hidden (P, V)."""
        hidden += self.attn(self.norm1(hidden), rotation, sizes)
        for rows in hidden.split(self.rows_together):
            rows.add_(self.mlp(self.norm2(rows)), alpha=1 / QUICK_GELU)


class PatchEmbed(nn.Module):
    """The published convolution over two frames, which for a still image are equal."""

    matrix: Tensor  # (V, 588)
    bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mean = config.mean
        self.std = config.std
        self.proj = nn.Conv3d(3, config.vision_width, kernel_size=(2, PATCH_SIDE, PATCH_SIDE), bias=False)

    def fold(self) -> None:
        """Make a matrix and a bias of the weight, for pixels from 0 to 255, not normalised."""
        weight = self.proj.weight.sum(2).flatten(2)  # (V, 3, 196)
        mean, std = (torch.tensor(numbers, device=weight.device)[:, None] for numbers in (self.mean, self.std))
        self.matrix = (weight / (255 * std)).flatten(1)
        self.bias = -(weight * (mean / std)).sum((1, 2))
        del self.proj

    def forward(self, patches: Tensor) -> Tensor:
        """(P, 588) uint8 to (P, V)."""
        return functional.linear(patches.float(), self.matrix, self.bias)


class PatchMerger(nn.Module):
    """Four neighbours become the embedding of one token."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        four = 4 * config.vision_width
        self.ln_q = nn.LayerNorm(config.vision_width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(
            Linear(kernels, four, four),
            nn.GELU(),
            Linear(kernels, four, config.width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden).view(len(hidden) // 4, -1))


class VisionTower(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.head_dim = config.vision_width // config.vision_heads
        self.patch_embed = PatchEmbed(config)
        blocks = (VisionBlock(config, kernels) for _ in range(config.vision_layers))
        self.blocks = nn.ModuleList(blocks)
        self.merger = PatchMerger(config, kernels)

    def forward(self, patches: Tensor, places: Tensor, sizes: Sequence[int]) -> Tensor:
        """Token embeddings (P / 4, D) of images with these numbers of patches.

        Patches are (P, 588), uint8; places, the row and the column of each, are (P, 2).
        """
        hidden = self.patch_embed(patches)
        rotation = Rotation.from_angles(self.angles(places))
        for block in self.blocks:
            block(hidden, rotation, sizes)
        return self.merger(hidden)

    def angles(self, places: Tensor) -> Tensor:
        """(P, head_dim / 2): half of a head's pairs turn by the patch's row, half by its column."""
        pairs = self.head_dim // 4
        axes = [rotary_angles(axis, pairs, VISION_THETA) for axis in places.unbind(1)]
        return torch.cat(axes, dim=1)


class Attention(nn.Module):
    """Causal, with grouped queries, behind the keys and values of a prefix."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.rotated_together = kernels.rotated_together
        head_dim = config.width // config.heads
        queries = config.heads * head_dim
        keys = config.kv_heads * head_dim
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = MergedLinear(kernels, config.width, parts)
        self.o_proj = Linear(kernels, queries, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        spans: Sequence[Span],
        mask: Tensor,
        prefix_states: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What the heads give (N, D), which `o_proj` takes, and the keys and values.

        The latter are (N, 2 * kv_heads, head_dim), the keys first: a view of memory in which the
        queries lie too.
        """
        qkv = self.qkv_proj(x).unflatten(1, (self.heads + 2 * self.kv_heads, -1))
        rotation.rotate(qkv[:, : self.heads + self.kv_heads], self.rotated_together)
        query, states = qkv.split((self.heads, 2 * self.kv_heads), dim=1)
        attended = [self.attend(query, states, span, mask, prefix_states) for span in spans]
        return torch.cat(attended), states

    def attend(
        self,
        query: Tensor,
        states: Tensor,
        span: Span,
        mask: Tensor,
        prefix_states: Tensor | None,
    ) -> Tensor:
        """The part of one span, (tokens of the span, D)."""
        own = span.pad(states)
        seen = own
        if prefix_states is not None:
            seen = torch.cat((prefix_states.expand(span.count, -1, -1, -1), own), dim=1)
        # Each key and value once for every query head: (B, 2 * heads, prefix + T, head_dim).
        repeated = seen.repeat_interleave(self.heads // self.kv_heads, dim=2).transpose(1, 2)
        key, value = repeated.split(self.heads, dim=1)
        mask = mask[: span.longest, : key.shape[2]]
        query = span.pad(query).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(query, key, value, mask)
        return span.unpad(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.gated = kernels.gated
        self.gate_proj = Linear(kernels, config.width, config.inner, bias=False)
        self.up_proj = Linear(kernels, config.width, config.inner, bias=False)
        self.down_proj = Linear(kernels, config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.up_proj.weight.dtype)
        return self.down_proj(self.gated(x, self.gate_proj.weight, self.up_proj.weight))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.eps)
        self.mlp = GatedMLP(config, kernels)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        spans: Sequence[Span],
        mask: Tensor,
        prefix_states: Tensor | None,
        pooled: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The new `hidden`, of the `pooled` tokens alone where given, and the keys and values.

        Without `pooled`, that is the argument itself, changed in place.
        """
        x = self.input_layernorm(hidden)
        attended, states = self.self_attn(x, rotation, spans, mask, prefix_states)
        if pooled is not None:
            hidden = hidden[pooled]
            attended = attended[pooled]
        hidden += self.self_attn.o_proj(attended)
        hidden += self.mlp(self.post_attention_layernorm(hidden))
        return hidden, states


class Decoder(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.theta = config.theta
        self.head_dim = config.width // config.heads
        # Not by its constructor, whose random values would import 800 modules on the meta device.
        table = torch.empty(config.vocabulary, config.width)
        self.embed_tokens = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(DecoderLayer(config, kernels) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        spans: Sequence[Span],
        pooled: Tensor,
        prefix_states: Sequence[Tensor],
        keep_states: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The last layer's output for the `pooled` tokens (B, D).

        With `keep_states` also each layer's keys and values: 57 kB a token of the 2B in float32.
        Of all tokens, `hidden` is (N, D) and `positions` (N,): as in the authors' forward, token i
        of an input has position i on all three rotary axes, image tokens too. `prefix_states` are
        the keys and values of the prefix.
        """
        rotation = Rotation.from_angles(rotary_angles(positions, self.head_dim // 2, self.theta))
        prefix_length = len(prefix_states[0]) if prefix_states else 0
        mask = self.mask(prefix_length, max(span.longest for span in spans), hidden.device)
        states: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            before = prefix_states[number] if prefix_states else None
            # Nothing attends to what the last layer gives: only the tokens that are pooled go on.
            is_last = number == len(self.layers) - 1
            hidden, own = layer(hidden, rotation, spans, mask, before, pooled if is_last else None)
            if keep_states:
                # A copy, as a view would keep the queries too.
                states.append(own.clone())
        return self.norm(hidden), states

    def mask(self, prefix_length: int, longest: int, device: torch.device) -> Tensor:
        """(T, prefix_length + T), to be added: a token sees the prefix, and up to itself."""
        length = prefix_length + longest
        # Attention on a GPU needs rows that begin at a multiple of 8 numbers, and else pads them.
        columns = torch.arange(length + -length % 8, device=device)
        is_unseen = torch.arange(prefix_length, length, device=device)[:, None] < columns
        mask = torch.zeros(is_unseen.shape, dtype=self.embed_tokens.weight.dtype, device=device)
        return mask.masked_fill_(is_unseen, -math.inf)[:, :length]


class Qwen2VL(nn.Module):
    """The network, with the published names as its attributes. `Model.forward` runs it."""

    def __init__(self, config: Config, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.visual = VisionTower(config, kernels)
        self.model = Decoder(config, kernels)


class WeightReader:
    """Reads tensors by their published names from the mapped files of a checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stored: dict[str, tuple[Any, str]] = {}
        for path in sorted(weight_files(directory)):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118
                # A newer transformers saves them as `model.language_model.` and `model.visual.`.
                published = re.sub(r"language_model\.|model\.(?=visual\.)", "", name)
                self.stored[published] = (file, name)

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """A view of the file. Raises `StartError` for a weight that is missing or misshapen."""
        if name not in self.stored:
            raise StartError(f"There is no weight {name}: delete {self.directory}. {DOWNLOAD_ANEW}")
        file, stored_name = self.stored[name]
        weight = file.get_tensor(stored_name)
        if list(weight.shape) != list(shape):
            raise StartError(
                f"The weight {name} has the shape {list(weight.shape)}, and config.json asks for"
                f" {list(shape)}: delete {self.directory}. {DOWNLOAD_ANEW}"
            )
        return weight


def load_weights(
    network: Qwen2VL,
    reader: WeightReader,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill a network that is on the meta device, tensor by tensor: at most one is there twice.

    The matrices and biases of linear layers and the table of embeddings are in `dtype`, all else in
    float32. Raises `StartError` for a weight that is missing or misshapen.
    """
    for path, module in network.named_modules():
        weight_dtype = dtype if isinstance(module, Linear | nn.Embedding) else torch.float32
        for leaf, parameter in module.named_parameters(recurse=False):
            pack = module.kernels.pack if isinstance(module, Linear) and leaf == "weight" else None
            # A copy in any case, as the file may change: `pack` makes one, or `to` does.
            parts = [
                reader.read(name, shape).to(device, weight_dtype, copy=pack is None)
                for name, shape in stored_parts(path, module, leaf, parameter)
            ]
            weight = torch.cat(parts) if len(parts) > 1 else parts[0]
            if pack is not None:
                weight = pack(weight)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    for module in network.modules():
        if isinstance(module, PatchEmbed | VisionBlock):
            module.fold()


def stored_parts(
    path: str,
    module: nn.Module,
    leaf: str,
    parameter: Tensor,
) -> list[tuple[str, Sequence[int]]]:
    """The names and shapes in the checkpoint of what makes a parameter."""
    if not isinstance(module, MergedLinear):
        return [(f"{path}.{leaf}", parameter.shape)]
    parent = path.rpartition(".")[0]
    return [(f"{parent}.{part}.{leaf}", (rows, *parameter.shape[1:])) for part, rows in module.parts.items()]


def place_patches(rows: int, columns: int) -> np.ndarray:
    """The row and the column (P, 2) of an image's patches, the four of each token together."""
    places = np.indices((rows, columns)).transpose(1, 2, 0)
    return places.reshape(rows // 2, 2, columns // 2, 2, 2).swapaxes(1, 2).reshape(-1, 2)


def ran_out_of_memory(error: Exception) -> bool:
    """Of a CPU, and of some of CUDA's own calls, torch says so in words alone."""
    reason = str(error)
    is_said = "out of memory" in reason or "can't allocate memory" in reason
    return is_said or isinstance(error, torch.OutOfMemoryError)


class Model:
    """Embeds prepared inputs; for one thread at a time."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Load the weights. Raises `StartError` for one that is missing or misshapen."""
        self.directory = directory
        self.device = device
        self.dtype = dtype
        self.dimension = config.width
        self.kernels = cpu_kernels(dtype, config.width) if device.type == "cpu" else cuda_kernels()
        # Names and shapes, and no memory.
        with torch.device("meta"):
            self.network = Qwen2VL(config, self.kernels)
        load_weights(self.network, WeightReader(directory), device, dtype)
        self.kept_states = functools.lru_cache(KEPT_PREFIXES)(self.compute_states)
        self.last_long_states = functools.lru_cache(1)(self.compute_states)

    def embed(self, inputs: Sequence[Input]) -> np.ndarray:
        """Unit embeddings (B, D), float32, of inputs that share their prefix.

        Raises `TooLargeError` when memory runs out, `DeviceLostError` when the device has failed.
        """
        try:
            return self.forward(inputs)[0].cpu().numpy()
        except RuntimeError as error:
            if ran_out_of_memory(error):
                sentence = "An input does not fit into the server's memory: send a smaller one."
                raise TooLargeError(sentence) from None
            if isinstance(error, torch.AcceleratorError):
                raise DeviceLostError(f"The device {self.device} cannot go on: {error}") from None
            raise

    @torch.inference_mode()
    def forward(
        self,
        inputs: Sequence[Input],
        keep_states: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The embeddings, still on the device, and each layer's keys and values where kept."""
        prefix = inputs[0].prefix
        prefix_states = self.prefix_states(prefix)

        # All inputs in a row, the short ones first, so that those of like length are neighbours.
        lengths = np.array([item.own_tokens for item in inputs])
        order = lengths.argsort(kind="stable")
        stops = np.empty_like(lengths)
        stops[order] = lengths[order].cumsum()
        starts = stops - lengths
        token_ids = self.to_device([inputs[index].token_ids[len(prefix) :] for index in order])
        own_positions = [np.arange(length) + len(prefix) for length in lengths[order]]
        positions = self.to_device(own_positions)
        # In the order of `inputs`, and so are the embeddings.
        pooled = self.to_device([stops - 1])

        hidden = self.network.model.embed_tokens(token_ids).float()  # (N, D)
        self.put_images(hidden, inputs, starts)
        spans = self.spans(lengths[order])
        final, states = self.network.model(
            hidden,
            positions,
            spans,
            pooled,
            prefix_states,
            keep_states,
        )
        return functional.normalize(final, dim=-1), states

    def prefix_states(self, prefix: tuple[int, ...]) -> list[Tensor]:
        """A prefix's keys and values by layer, (tokens, 2 * kv_heads, head_dim)."""
        if not prefix:
            return []
        if len(prefix) <= MAX_KEPT_PREFIX:
            return self.kept_states(prefix)
        if len(prefix) <= MAX_LONG_PREFIX:
            return self.last_long_states(prefix)
        return self.compute_states(prefix)

    def compute_states(self, prefix: tuple[int, ...]) -> list[Tensor]:
        return self.forward([Input(np.array(prefix), ())], keep_states=True)[1]

    def put_images(self, hidden: Tensor, inputs: Sequence[Input], starts: np.ndarray) -> None:
        """Write images over their tokens in hidden (N, D), where inputs begin at `starts`."""
        for group in self.image_groups(inputs):
            images = [inputs[index] for index in group]
            patches = [image.patches for image in images if image.patches is not None]
            sizes = [len(part) for part in patches]
            places = [place_patches(*image.grid) for image in images]
            embeddings = self.network.visual(self.to_device(patches), self.to_device(places), sizes)
            parts = embeddings.split([size // 4 for size in sizes])
            for index, image, part in zip(group, images, parts, strict=True):
                start = starts[index] + image.image_start - len(image.prefix)
                hidden[start : start + len(part)] = part

    def image_groups(self, inputs: Sequence[Input]) -> Iterator[list[int]]:
        """Which inputs have their images computed together."""
        group: list[int] = []
        patches = 0
        for index, item in enumerate(inputs):
            if item.patches is None:
                continue
            if group and patches + len(item.patches) > self.kernels.patches_together:
                yield group
                group = []
                patches = 0
            group.append(index)
            patches += len(item.patches)
        if group:
            yield group

    def spans(self, lengths: np.ndarray) -> list[Span]:
        """The calls of attention for inputs in a row, of these lengths in ascending order."""
        spans: list[Span] = []
        first_input = first_token = 0
        for stop_input in range(1, len(lengths) + 1):
            # A span grows for as long as MIN_FILL of its B * T slots hold a token.
            with_next = lengths[first_input : stop_input + 1]
            slots_with_next = len(with_next) * with_next[-1]
            if stop_input < len(lengths) and with_next.sum() >= MIN_FILL * slots_with_next:
                continue
            span_lengths = lengths[first_input:stop_input]
            longest = int(span_lengths[-1])
            slots = None
            if span_lengths[0] != longest:
                slots = self.to_device([np.flatnonzero(np.arange(longest) < span_lengths[:, None])])
            stop_token = first_token + int(span_lengths.sum())
            spans.append(Span(first_token, stop_token, len(span_lengths), longest, slots))
            first_input = stop_input
            first_token = stop_token
        return spans

    def to_device(self, parts: Sequence[np.ndarray]) -> Tensor:
        """Arrays, one after the other, on the device."""
        tensor = torch.from_numpy(np.concatenate(parts))
        if self.device.type == "cpu":
            return tensor
        # From pinned memory the copy waits for nothing.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def check(self, texts: Sequence[Input]) -> None:
        """Embed texts, the first with a small image, together, and alone without a kept prefix.

        Raises `StartError` when the vectors are not finite, or differ by more than rounding.
        """
        noise = np.random.default_rng(0).integers(0, 256, (16, 3 * PATCH_SIDE**2), np.uint8)
        # 4 x 4 patches, which are 4 tokens, behind the prefix and the two tokens that follow it.
        image_start = len(texts[0].prefix) + 2
        with_image = replace(texts[0], image_start=image_start, grid=(4, 4), patches=noise)
        inputs = [with_image, *texts[1:]]
        alone = torch.cat([self.forward([replace(item, prefix=())])[0] for item in inputs])
        together = self.forward(inputs)[0]
        if not (together.isfinite().all() and alone.isfinite().all()):
            raise StartError(
                f"The weights give vectors that are not finite in {self.dtype}. If that is float16,"
                " set GME_DTYPE=bfloat16. Otherwise they are damaged:"
                f" delete {self.directory}. {DOWNLOAD_ANEW}"
            )
        distance = 1 - (together * alone).sum(1).min().item()
        if distance > MAX_DISTANCE[self.dtype]:
            raise StartError(
                "An image and a text embed differently together than alone"
                f" (1 - cosine is {distance:.2g}):"
                f" install the versions of requirements.txt, not torch {torch.__version__}."
            )


def choose_device(name: str, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what; "auto" is what suits the machine.

    Raises `StartError` for a device that cannot be used, `StartLaterError` where its memory
    is taken.
    """
    try:
        device = torch.device(automatic_device() if name == "auto" else name)
        # Not on "meta", which has no numbers.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # torch's first sentence: for some devices, a list of 7,000 characters follows.
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        if ran_out_of_memory(error):
            # The process before may still hold the memory: systemd tries again.
            raise StartLaterError(f"GME_DEVICE={name} cannot be used yet: {reason}.") from None
        advice = "Use cpu, or auto, which takes a GPU where torch finds one"
        raise StartError(f"GME_DEVICE={name} cannot be used: {reason}. {advice}.") from None
    if dtype_name == "auto":
        dtype_name = automatic_dtype(device)
    return device, getattr(torch, dtype_name)


def automatic_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def automatic_dtype(device: torch.device) -> str:
    """The name of a 16-bit type that the device computes natively, else float32."""
    # The published weights are float32. float16 keeps closer to them than bfloat16: the
    # least cosine on the toy is 0.9999 and 0.9984. On a CPU it is 16 times as slow.
    if device.type == "cuda":
        return "float16"
    features = torch.cpu.get_capabilities()
    has_bfloat16 = any(has and name.endswith("bf16") for name, has in features.items())
    return "bfloat16" if has_bfloat16 else "float32"


# ----------------------------------------------------------------------------------------------------- 5. Batcher
# How many batches' worth is prepared, with the one under way. An image takes 2.4 kB a token.
AHEAD_BATCHES = 5
# Characters of text that are tokenized in one go.
CHUNK_CHARACTERS = 1 << 14
# 4 ms to 8.5 min: a long queue on a CPU takes minutes.
SECONDS = [2.0**n for n in range(-8, 10)]
QUEUE_SECONDS = Histogram("gme_queue_seconds", "Time that an input waits for the model.", buckets=SECONDS)
MODEL_SECONDS = Histogram("gme_model_seconds", "Time that the model takes for one batch.", buckets=SECONDS)
BATCH_INPUTS = Histogram("gme_batch_inputs", "Distinct inputs in one batch.", buckets=[2**n for n in range(12)])
CACHE_HITS = Counter("gme_cache_hits", "Inputs answered from the cache of recent embeddings.")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class Waiting:
    """What waits: at first it has a source, once prepared an input, and at last an embedding."""

    job: "Job"
    # Its turn by the clock, its job's serial number, and its rank there: the lowest goes first.
    place: tuple[float, int, int]
    source: Source
    input: Input | None = None
    embedding: np.ndarray | None = None
    # Where it stands now: nowhere while a thread prepares it, and once it is answered.
    queue: list["Waiting"] | None = None


@dataclass(eq=False, slots=True)
class Job:
    """One request. It ends when all its inputs have embeddings, or one has failed."""

    serial: int
    arrived: float
    ended: asyncio.Future[None]
    # In the client's order.
    waiting: list[Waiting] = field(default_factory=list)
    unanswered: int = 0
    # Of the inputs that are prepared.
    tokens: int = 0


def place_of(waiting: Waiting) -> tuple[float, int, int]:
    return waiting.place


def isolate(
    function: Callable[[Sequence[Item]], Iterable[Result]], items: Sequence[Item]
) -> list[Result | ServiceError]:
    """The results of `function(items)`, one for each item.

    Where it raises, each half is tried in turn, down to single items: the error of an item that
    fails alone is its result. Raises `DeviceLostError`, after which nothing can be computed.
    """
    try:
        return list(function(items))
    except DeviceLostError:
        raise
    # A panic of the tokenizers library is no Exception.
    except BaseException as error:
        if len(items) == 1 and isinstance(error, ServiceError):
            # A new one, as the traceback of this one keeps images and tensors.
            return [type(error)(str(error))]
        if len(items) == 1:
            log.error("An input could not be embedded.", exc_info=error)
            return [ServiceError(ServiceError.example)]
    # By now the memory of the failed try is free.
    half = len(items) // 2
    return isolate(function, items[:half]) + isolate(function, items[half:])


class Batcher:
    """Gathers the inputs of all requests into batches for the one thread that runs the model.

    The policy is fair queueing between requests by virtual time, counted in inputs. `clock` counts
    the turns that each waiting request has had. The inputs of a new request, short ones first, have
    the turns clock, clock + 1, and so on. The lowest turn goes first; among equals, that of the
    oldest request. A batch of 100 inputs while 4 bulk jobs wait moves the clock by 25; while one
    bulk job and 3 requests of one input wait, by 97. So a request of one input waits for the batch
    under way, for one input of each other request, and for a batch of each other instruction, as
    inputs of different instructions share none. A bulk job keeps its share beside any number of
    those. An image counts as one input, however many tokens it has.

    The event loop owns all state. Threads run `count_pixels`, `prepare` and `compute`, which
    share nothing.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Source]], Iterable[Input]],
        count_pixels: Callable[[Source], int],
        compute: Callable[[Sequence[Input]], Iterable[np.ndarray]],
        *,
        max_tokens: int,
        max_pixels: int,
        max_queue: int = 16384,
        cache_entries: int = 0,
    ) -> None:
        """Batches cost at most `max_tokens`, but for an input that costs more alone.

        At most `max_pixels` are decoded at a time; at most `max_queue` inputs wait for an answer.
        """
        self.prepare = prepare
        self.count_pixels = count_pixels
        self.compute = compute
        self.max_tokens = max_tokens
        self.max_queue = max_queue
        self.cache_entries = cache_entries
        self.pixels = PixelBudget(max_pixels)

        self.clock = 0.0
        self.serials = itertools.count()
        # Those that have not ended.
        self.jobs: set[Job] = set()
        self.unanswered = 0
        # The queues, sorted by place. An input stays in `ready` while the model computes it, so
        # that an equal one that comes meanwhile shares the answer.
        self.texts: list[Waiting] = []
        self.images: list[Waiting] = []
        self.ready: list[Waiting] = []
        self.ready_tokens = 0
        self.ready_by_key: dict[bytes, list[Waiting]] = {}
        self.cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.changed = asyncio.Event()
        # Held by the loop that opens an image and waits for its pixels, so that only one image
        # waits for pixels, and all others can still be chosen by their turn.
        self.choosing = asyncio.Lock()

        cores = min(len(os.sched_getaffinity(0)), 16)
        self.text_thread = ThreadPoolExecutor(1, "texts")
        self.image_threads = ThreadPoolExecutor(cores, "images")
        self.model_thread = ThreadPoolExecutor(1, "model")
        # One more than the threads: the loop that waits for pixels has no thread.
        self.image_loops = cores + 1

    def __len__(self) -> int:
        """Inputs without an answer."""
        return self.unanswered

    async def embed(self, sources: Sequence[Source]) -> tuple[np.ndarray, int]:
        """A request's embeddings (len(sources), D), float32, and its number of tokens.

        Raises the `ServiceError` of the first input that fails, and `ArithmeticError` for vectors
        that are not finite.
        """
        if not sources:
            raise InputError("The request has no inputs: send at least one.")
        if self.unanswered + len(sources) > self.max_queue:
            raise BusyError(BusyError.example)
        job = self.enqueue(sources)
        try:
            await job.ended
            embeddings = np.array([waiting.embedding for waiting in job.waiting])
            tokens = job.tokens
        finally:
            self.end(job)
            # The traceback of an error would keep the job, which has the error, and all its images.
            del job
        if not np.isfinite(embeddings).all():
            raise ArithmeticError("An embedding is not finite. In float16, set GME_DTYPE=bfloat16.")
        return embeddings, tokens

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests while this context lasts. A `DeviceLostError` ends the process."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self.end_process_on_fault(self.compute_batches()))
            loops.create_task(self.end_process_on_fault(self.prepare_texts()))
            for _ in range(self.image_loops):
                loops.create_task(self.end_process_on_fault(self.prepare_images()))

    async def end_process_on_fault(self, loop: Coroutine[Any, Any, None]) -> None:
        """Run a loop. Raises `SystemExit` when it fails, as without it nothing is answered."""
        try:
            await loop
        except Exception as fault:
            raise SystemExit(f"The batcher has ended: {fault!r}") from fault

    # The queues

    def enqueue(self, sources: Sequence[Source]) -> Job:
        loop = asyncio.get_running_loop()
        job = Job(
            serial=next(self.serials),
            arrived=time.perf_counter(),
            ended=loop.create_future(),
            unanswered=len(sources),
        )
        ranks = [0] * len(sources)
        light_first = sorted(range(len(sources)), key=lambda index: sources[index].weight)
        for rank, index in enumerate(light_first):
            ranks[index] = rank
        for rank, source in zip(ranks, sources, strict=True):
            waiting = Waiting(job, (self.clock + rank, job.serial, rank), source)
            job.waiting.append(waiting)
            self.put(waiting, self.texts if source.image is None else self.images)
        self.jobs.add(job)
        self.unanswered += len(sources)
        self.wake()
        return job

    def end(self, job: Job) -> None:
        """Forget a job, with what of it still waits."""
        if job not in self.jobs:
            return
        self.jobs.remove(job)
        self.unanswered -= job.unanswered
        for waiting in job.waiting:
            self.take(waiting)
        # They know the job: without this, only the garbage collector would free their images.
        job.waiting.clear()
        self.wake()

    def put(self, waiting: Waiting, queue: list[Waiting]) -> None:
        bisect.insort(queue, waiting, key=place_of)
        waiting.queue = queue
        if waiting.input is not None:
            self.ready_tokens += waiting.input.cost
            self.ready_by_key.setdefault(waiting.input.key, []).append(waiting)

    def take(self, waiting: Waiting) -> None:
        """Take it out of the queue in which it stands, if it does."""
        if waiting.queue is None:
            return
        del waiting.queue[bisect.bisect_left(waiting.queue, waiting.place, key=place_of)]
        waiting.queue = None
        if waiting.input is not None:
            self.ready_tokens -= waiting.input.cost
            equal = self.ready_by_key[waiting.input.key]
            equal.remove(waiting)
            if not equal:
                del self.ready_by_key[waiting.input.key]

    def wake(self) -> None:
        """Let all loops look for work.

        Each looks and then waits, with no await between, so that no wake-up is lost.
        """
        self.changed.set()
        self.changed.clear()

    def answer(self, waiting: Waiting, embedding: np.ndarray) -> None:
        job = waiting.job
        waiting.embedding = embedding
        # Its patches would stay until the job ends.
        waiting.input = None
        job.unanswered -= 1
        self.unanswered -= 1
        if job.unanswered == 0 and not job.ended.done():
            job.ended.set_result(None)

    def fail(self, waiting: Waiting, error: ServiceError) -> None:
        job = waiting.job
        if not job.ended.done():
            job.ended.set_exception(error)
        self.end(job)

    # Preparing

    async def prepare_texts(self) -> None:
        """Prepare texts chunk by chunk, in a thread of their own: they never wait behind images."""
        while True:
            chunk = self.next_texts()
            if chunk:
                await self.prepare_chunk(chunk)
            else:
                await self.changed.wait()

    async def prepare_chunk(self, chunk: Sequence[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        sources = [waiting.source for waiting in chunk]
        results = await loop.run_in_executor(self.text_thread, isolate, self.prepare, sources)
        for waiting, result in zip(chunk, results, strict=True):
            self.accept(waiting, result)
        self.wake()

    async def prepare_images(self) -> None:
        """Prepare image after image; several of these loops run side by side."""
        while True:
            await self.prepare_first_image()
            self.wake()

    async def prepare_first_image(self) -> None:
        """Wait for the image whose turn is first, and prepare it."""

        def count(sources: Sequence[Source]) -> Iterable[int]:
            return map(self.count_pixels, sources)

        async with contextlib.AsyncExitStack() as shares:
            async with self.choosing:
                waiting = self.next_image()
                while waiting is None:
                    await self.changed.wait()
                    waiting = self.next_image()
                pixels = await self.in_image_thread(count, waiting.source)
                if isinstance(pixels, ServiceError):
                    self.accept(waiting, pixels)
                    return
                if waiting.job not in self.jobs:
                    return
                # An image has its pixels before it takes a thread to decode them.
                await shares.enter_async_context(self.pixels.share(pixels))
            if waiting.job in self.jobs:
                self.accept(waiting, await self.in_image_thread(self.prepare, waiting.source))

    async def in_image_thread(
        self, function: Callable[[Sequence[Source]], Iterable[Result]], source: Source
    ) -> Result | ServiceError:
        loop = asyncio.get_running_loop()
        (result,) = await loop.run_in_executor(self.image_threads, isolate, function, [source])
        return result

    def next_texts(self) -> list[Waiting]:
        """The first texts, to be prepared in one go."""
        chunk: list[Waiting] = []
        if not self.texts or self.is_far_ahead(self.texts[0]):
            return chunk
        characters = 0
        for waiting in self.texts:
            characters += waiting.source.weight
            if chunk and characters > CHUNK_CHARACTERS:
                break
            chunk.append(waiting)
        for waiting in chunk:
            waiting.queue = None
        del self.texts[: len(chunk)]
        return chunk

    def next_image(self) -> Waiting | None:
        if not self.images or self.is_far_ahead(self.images[0]):
            return None
        waiting = self.images.pop(0)
        waiting.queue = None
        return waiting

    def renew_turns(self, queue: list[Waiting]) -> None:
        """Turns cannot be saved up.

        A job that was not prepared in time has missed turns. What of it is in this queue moves by
        those, to begin at the clock, and does not go before all others once it is ready. A job of
        one input keeps its turn.
        """
        passed = itertools.takewhile(lambda waiting: waiting.place[0] < self.clock - 1, queue)
        missed: dict[Job, float] = {}
        for waiting in passed:
            if len(waiting.job.waiting) > 1:
                missed.setdefault(waiting.job, self.clock - waiting.place[0])
        if not missed:
            return
        for waiting in queue:
            if waiting.job in missed:
                turn, serial, rank = waiting.place
                waiting.place = (turn + missed[waiting.job], serial, rank)
        queue.sort(key=place_of)

    def is_far_ahead(self, candidate: Waiting) -> bool:
        """Whether enough is ready that goes before it."""
        enough = AHEAD_BATCHES * self.max_tokens
        if self.ready_tokens < enough:
            return False
        if candidate.place > self.ready[-1].place:
            return True
        tokens = 0
        for waiting in self.ready:
            if waiting.place > candidate.place:
                break
            if waiting.input is not None:
                tokens += waiting.input.cost
        return tokens >= enough

    def accept(self, waiting: Waiting, result: Input | ServiceError) -> None:
        """Queue a prepared input for the model, answer it from the cache, or fail its job."""
        if waiting.job not in self.jobs:
            return
        if isinstance(result, ServiceError):
            self.fail(waiting, result)
            return
        waiting.input = result
        waiting.job.tokens += len(result.token_ids)
        TRUNCATED.inc(result.is_cut)
        if result.key in self.cache:
            CACHE_HITS.inc()
            self.cache.move_to_end(result.key)
            self.answer(waiting, self.cache[result.key])
        else:
            self.put(waiting, self.ready)

    # Computing

    async def compute_batches(self) -> None:
        """Compute batch after batch, in the one thread of the model."""
        while True:
            batch = self.next_batch()
            if batch:
                await self.compute_batch(batch)
            else:
                await self.changed.wait()

    async def compute_batch(self, batch: Sequence[Input]) -> None:
        loop = asyncio.get_running_loop()
        # Now, not when it is computed: a request that comes meanwhile has later turns.
        self.clock += self.turns_of(len(batch))
        self.renew_turns(self.texts)
        self.renew_turns(self.images)
        BATCH_INPUTS.observe(len(batch))
        started = time.perf_counter()
        results = await loop.run_in_executor(self.model_thread, isolate, self.compute, batch)
        MODEL_SECONDS.observe(time.perf_counter() - started)
        for item, result in zip(batch, results, strict=True):
            self.deliver(item.key, result, started)
        self.wake()

    def next_batch(self) -> list[Input]:
        """The first that is ready, and in order those that share its prefix, up to `max_tokens`."""
        batch: dict[bytes, Input] = {}
        prefix: tuple[int, ...] | None = None
        tokens = 0
        for waiting in self.ready:
            item = waiting.input
            if item is None or item.key in batch:
                continue
            if prefix is None:
                prefix = item.prefix
            if item.prefix != prefix:
                continue
            tokens += item.cost
            if batch and tokens > self.max_tokens:
                break
            batch[item.key] = item
        return list(batch.values())

    def deliver(self, key: bytes, result: np.ndarray | ServiceError, started: float) -> None:
        """Answer all that wait for this input, and remember its embedding."""
        for waiting in list(self.ready_by_key.get(key, ())):
            QUEUE_SECONDS.observe(max(0, started - waiting.job.arrived))
            self.take(waiting)
            if isinstance(result, ServiceError):
                self.fail(waiting, result)
            else:
                self.answer(waiting, result)
        if isinstance(result, ServiceError) or not self.cache_entries:
            return
        if not np.isfinite(result).all():
            return
        # A copy, as the row itself would keep its batch.
        self.cache[key] = result.copy()
        while len(self.cache) > self.cache_entries:
            self.cache.popitem(last=False)

    def turns_of(self, computed: int) -> float:
        """Of so many inputs, how many turns each waiting job gets.

        One input is a turn, and a job that has no more inputs takes no more turns. Of fewer inputs
        than jobs, those just answered have their part too: their clients come back.
        """
        if computed <= len(self.jobs):
            return computed / len(self.jobs)
        turns = 0
        jobs = len(self.jobs)
        for unanswered in sorted(job.unanswered for job in self.jobs):
            wanted = (unanswered - turns) * jobs
            if wanted >= computed:
                return turns + computed / jobs
            computed -= wanted
            turns = unanswered
            jobs -= 1
        return turns


# -------------------------------------------------------------------------------------------------------- 6. HTTP
# Protected against here: a wrong key, before the body is read; the size of a body, and the time in
# which it comes; JSON and forms of millions of parts; too many inputs; a full queue. Left to
# deploy/nginx.conf: slow clients by the hundred, floods of requests, TLS; to uvicorn's h11: floods
# of headers; to systemd: memory.
INPUTS = Counter("gme_inputs", "Inputs answered, by kind.", ["kind"])
TEXT_INPUTS = INPUTS.labels("text")
IMAGE_INPUTS = INPUTS.labels("image")
FUSED_INPUTS = INPUTS.labels("fused")
TOKENS = Counter("gme_tokens", "Tokens of the inputs answered.")
PAGE = Path(__file__).with_name("gme_service.html")
# What the page may load: its own script and style, dropped pictures, and this service.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Seconds for a whole body, for its next piece, and for the next piece of one that is refused.
BODY_SECONDS = 600
BODY_IDLE_SECONDS = 30
DROP_IDLE_SECONDS = 10
FORM_FIELDS = {"text", "prompt"}
JSON_OBJECT = TypeAdapter(dict[str, Any])
Body = TypeVar("Body", bound=BaseModel)
BEARER = HTTPBearer(auto_error=False)


# What clients send. They see the docstrings of these three, at the end of a `MalformedError`.


class Texts(BaseModel, extra="forbid"):
    """Send a JSON object with `texts`, a list of strings, and if need be `prompt`."""

    texts: list[str] = Field(description="One embedding each.", examples=[["a red circle", "红色圆形"]], fail_fast=True)
    prompt: str = Field("", description="Give one with queries, none with documents.")


# For /docs and errors: `read_form` reads it.
class ImageForm(BaseModel):
    """Send a multipart form in UTF-8: one or more `file` (curl: -F file=@photo.jpg), perhaps `text` and `prompt`."""

    # With a list as its only type, the form in /docs would send the word "string".
    file: bytes | list[bytes] = Field(description="Choose an image file. Several, each as `file`: one embedding each.")
    text: str = Field("", description="A text to fuse with each image.", examples=[""])
    prompt: str = Field("", description="Give one with queries, none with documents.", examples=[""])


# A field of /v1/embeddings is of one of four kinds. Those of `OpenAIRequest` say what to embed, or
# change what comes. Those of READ_PAST cannot change a vector, nor can those of READ_PAST_AS with
# the value that they have there. Any other is refused by its name, so that nobody gets another
# vector than the one that was asked for. /embed/text reads past the same fields.
ITEM = "a text, an image's data URI, or an object with `text`, `image` (base64 or a data URI) or both"
EXAMPLE = ["a red dot", {"image": "data:image/gif;base64,R0lGODlhAQABAIAAAP8AAAAAACwAAAAAAQABAAACAkQBADs="}]


class OpenAIRequest(BaseModel, extra="forbid"):
    """Send what OpenAI's API has, an instruction as `prompt`, images as `input`: [{"image": "…", "text": "…"}]."""

    input: Any = Field(
        None, description=f"One embedding each: {ITEM}, content parts, or a list of these.", examples=[EXAMPLE]
    )
    messages: Any = Field(
        None,
        description="In place of `input`: a conversation of one turn, one embedding. Its system text is the prompt.",
    )

    prompt: str = Field("", description="Give one with queries, none with documents.")
    input_type: str = Field("", description="A document (`passage`) has no prompt, a `query` that of GME_QUERY_PROMPT.")
    task: str = Field("", description="The same: `retrieval.passage` or `retrieval.query`.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, strict=True, description="A text is cut at these, if they are fewer than GME_MAX_LENGTH; -1: none."
    )
    truncate: Literal[True, False, "END", "NONE"] = Field(
        True, description='false or "NONE": a text that is too long is refused, and not cut.'
    )
    truncation: bool = Field(True, description="The same.")
    dimensions: int | None = Field(None, description="Only the model's own.")
    output_dimension: int | None = Field(None, description="The same.")
    encoding_format: Literal["float", "base64"] = "float"


READ_PAST = {
    # OpenAI's.
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    # Of chats.
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "continue_final_message",
    # Of servers and gateways.
    "request_id",
    "rid",
    "priority",
    "cache_salt",
    "drop_params",
    "timeout",
    "keep_alive",
}
READ_PAST_AS: dict[str, object] = {
    "add_generation_prompt": True,
    "add_special_tokens": True,
    "embed_dtype": "float32",
    "embedding_type": "float",
    "embedding_types": ["float"],
    "late_chunking": False,
    "normalize": True,
    "normalized": True,
    "options": {},
    "output_dtype": "float",
    "return_multivector": False,
    "stream": False,
    "truncation_side": "right",
}
# Of a content part.
PART_READ_PAST = {"cache_control", "uuid"}
ROLES = {"system", "user", "assistant"}
MESSAGE_FIELDS = {"role", "content", "name"}
DOCUMENT_KINDS = {"document", "image", "passage", "retrieval.passage", "retrieval_document", "search_document"}
QUERY_KINDS = {"query", "retrieval.query", "retrieval_query", "search_query"}


# Reading JSON


def check_encoding(request: Request) -> None:
    """Raises `EncodingError` for a body that is compressed."""
    encodings = request.headers.get("content-encoding", "").lower()
    if not set(encodings.replace(",", " ").split()) <= {"identity"}:
        raise EncodingError(f"The body is encoded ({encodings[:50]}): send it as it is, without Content-Encoding.")


def has_too_many_values(body: bytes, most: int) -> bool:
    """Whether JSON has over `most` quotes, or over `most` bytes outside its strings.

    A parser takes seconds for 32 MB of these.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > most:
        return True
    outside_strings = unescaped.split(b'"')[::2]
    return sum(map(len, outside_strings)) > most


def without_half_pairs(text: str) -> str:
    """Half a surrogate pair becomes U+FFFD, as in every browser."""
    # Both take three bytes in UTF-8. Replaced one by one, millions would hold the interpreter
    # for two seconds.
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).copy()
    halves = np.flatnonzero((data[:-1] == 0xED) & (data[1:] >= 0xA0))
    for offset, byte in enumerate("\ufffd".encode()):
        data[halves + offset] = byte
    return data.tobytes().decode()


def mend_half_pairs(value: object) -> object:
    """A value of JSON, without half surrogate pairs in its strings."""
    if isinstance(value, str):
        return without_half_pairs(value)
    if isinstance(value, list):
        return [mend_half_pairs(item) for item in value]
    if isinstance(value, dict):
        return {str(mend_half_pairs(name)): mend_half_pairs(item) for name, item in value.items()}
    return value


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises pydantic's `ValidationError`, or `UnicodeDecodeError`."""
    try:
        return JSON_OBJECT.validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        text = body.decode().removeprefix("\ufeff")
        try:
            # Python's parser takes half pairs, where pydantic's takes none.
            mended = mend_half_pairs(json.loads(text))
        except (ValueError, RecursionError):
            raise error from None
        return JSON_OBJECT.validate_python(mended)


def drop_neutral_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that can change a vector. Raises `MalformedError` for a value not served."""
    kept = {}
    for name, value in fields.items():
        if value is None or name in READ_PAST:
            continue
        if name not in READ_PAST_AS:
            kept[name] = value
            continue
        served = READ_PAST_AS[name]
        # The types too, as 1 is True in Python.
        if type(value) is not type(served) or value != served:
            raise MalformedError(f"{name}: only {json.dumps(served)} is served.")
    return kept


def malformed(error: ValidationError, kind: type[BaseModel]) -> MalformedError:
    """The first fault, in a sentence that names its place; the first text is texts.1."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    steps = [str(step + 1 if isinstance(step, int) else step) for step in fault["loc"]]
    # Of a name of megabytes, difflib and the client get no more.
    place = ".".join(steps)[:50] or "body"
    said = fault["msg"]
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, kind.model_fields, n=1, cutoff=0.8)
        meant = f": did you mean `{near[0]}`?" if near else "."
        return MalformedError(f"{place}: this field is not served{meant} {kind.__doc__}")
    return MalformedError(f"{place}: {said}. {kind.__doc__}")


async def read_json(request: Request, kind: type[Body], max_inputs: int) -> Body:
    """The body, of that kind. Raises `MalformedError`, `EncodingError` or `TooLargeError`."""
    check_encoding(request)
    body = await request.body()
    if has_too_many_values(body, 64 * max_inputs + 100_000):
        raise TooLargeError("The body has too many values: send fewer inputs, and texts instead of token ids.")
    try:
        return kind.model_validate(drop_neutral_fields(parse_object(body)))
    except UnicodeDecodeError as error:
        raise MalformedError(f"body: byte {error.start + 1} is not UTF-8: send JSON in UTF-8.") from None
    except ValidationError as error:
        raise malformed(error, kind) from None


# Reading a form


async def parse_form(
    request: Request,
    max_files: int,
) -> tuple[list[multipart.File], list[multipart.Field]]:
    """The files and the fields of a multipart form, in memory.

    Raises `MalformedError`, `EncodingError` or `TooLargeError`.
    Starlette's own reader would take what is not UTF-8 as Latin-1, and files over 1 MB to disk.
    """
    check_encoding(request)
    files: list[multipart.File] = []
    fields: list[multipart.Field] = []
    ended = False

    def on_end() -> None:
        nonlocal ended
        ended = True

    kind, options = multipart.parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    config = {"MAX_MEMORY_FILE_SIZE": math.inf}
    no_form = f"body: this is no multipart form. {ImageForm.__doc__}"
    if kind != b"multipart/form-data":
        raise MalformedError(no_form)
    try:
        parser = multipart.FormParser(
            kind.decode(),
            fields.append,
            files.append,
            on_end,
            boundary,
            config=config,
        )
        async for chunk in request.stream():
            parser.write(chunk)
            if len(files) + len(fields) > max_files + len(FORM_FIELDS):
                raise TooLargeError(f"The form has too many parts: send at most {max_files} files.")
    except ValueError:
        raise MalformedError(no_form) from None
    if not ended:
        raise MalformedError(f"body: the form has no end. {ImageForm.__doc__}")
    return files, fields


def read_field(field: multipart.Field) -> tuple[str, str]:
    """The name and the text of a form's field. Raises `MalformedError`."""
    name = (field.field_name or b"").decode(errors="replace")[:50]
    if name == "file":
        reason = "this part needs a `filename`, without which it is no file (`filename*` is not read)"
        raise MalformedError(f"file: {reason}. {ImageForm.__doc__}")
    if name not in FORM_FIELDS:
        raise MalformedError(f"{name}: this field is not served. {ImageForm.__doc__}")
    try:
        return name, (field.value or b"").decode()
    except UnicodeDecodeError:
        raise MalformedError(f"{name}: this is not UTF-8. {ImageForm.__doc__}") from None


def read_file(file: multipart.File) -> tuple[str, bytes]:
    """The name and the bytes of a form's file. Raises `MalformedError`."""
    field_name = (file.field_name or b"").decode(errors="replace")[:50]
    if field_name != "file":
        raise MalformedError(f"{field_name}: this part is a file, and files are called `file`. {ImageForm.__doc__}")
    file_object: Any = file.file_object
    return (file.file_name or b"").decode(errors="replace")[:50], file_object.getvalue()


async def read_form(request: Request, max_files: int) -> list[Source]:
    """A form's images. Raises `MalformedError`, `EncodingError` or `TooLargeError`."""
    files, fields = await parse_form(request, max_files)
    texts: dict[str, str] = {}
    for name, text in map(read_field, fields):
        if name in texts:
            raise MalformedError(f"{name}: there are two of it. {ImageForm.__doc__}")
        texts[name] = text
    if not files:
        raise MalformedError(f"file: there is none. {ImageForm.__doc__}")
    text = texts.get("text", "")
    instruction = texts.get("prompt") or DEFAULT_INSTRUCTION
    sources = []
    for number, (file_name, data) in enumerate(map(read_file, files), start=1):
        sources.append(Source(text, data, instruction, f"File {number} ({file_name}): "))
    return sources


# Reading OpenAI's body. `name` is "Input 3: ", with which an error about the item begins.

# A text, an image file's bytes, or both.
Content = tuple[str, bytes | None]
# Qwen's own examples have `data:image;base64,`, without a subtype.
DATA_URI = re.compile(r'\s*data:(?P<media>\w+/[^,;]*|image)?(?P<parameters>;(?:[^,"]|"[^"]*+")*+)?,', re.IGNORECASE)
OTHER_URI = re.compile(r"\s*(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)
BASE64 = re.compile(r";\s*base64\s*$", re.IGNORECASE)
# The most that is searched for the head of a URI: megabytes would hold the interpreter.
MAX_URI_HEAD = 4096
MESSAGES = "messages: send one `user` message, before it a `system` text if need be"


def is_image(text: str) -> bool:
    """Whether a string is a data URI in base64, or one of an image."""
    uri = DATA_URI.match(text, 0, MAX_URI_HEAD)
    if uri is None:
        return False
    is_base64 = BASE64.search(uri["parameters"] or "")
    return bool(is_base64) or (uri["media"] or "").lower().startswith("image/")


def decode_base64(encoded: str) -> bytes:
    """Base64 as browsers read it: with spaces, unpadded, percent-encoded. Raises `ValueError`."""
    characters = encoded.encode().translate(None, b" \t\n\f\r")
    if b"%" in characters:
        # Quoted-printable has another mark for the same, and its decoder is quick on 32 MB.
        quoted = characters.replace(b"=", b"=3D").replace(b"%", b"=")
        characters = binascii.a2b_qp(quoted).translate(None, b" \t\n\f\r")
    return base64.b64decode(characters + b"=" * (-len(characters) % 4), validate=True)


def read_image(value: object, name: str) -> bytes:
    """The bytes of an image in base64, or in a data URI. Raises `InputError`."""
    if not isinstance(value, str):
        raise InputError(f"{name}image: send a string, which is base64 or a data URI.")
    if OTHER_URI.match(value, 0, MAX_URI_HEAD):
        raise InputError(f"{name}image: no URL is fetched: send the image itself, as base64 or a data URI.")
    uri = DATA_URI.match(value, 0, MAX_URI_HEAD)
    media = (uri["media"] or "").strip()[:50] if uri else ""
    if media.lower().startswith(("audio/", "video/")):
        raise InputError(f"{name}image: {media} is not served, but images are.")
    encoded = value[uri.end() :] if uri else value
    try:
        return decode_base64(encoded)
    except ValueError:
        advice = "send a whole file in base64, or a data URI of it"
        raise InputError(f"{name}image: this is not base64: {advice}.") from None


def check_fields(given: Iterable[str], known: set[str], name: str) -> None:
    """Raises `InputError` with the first field that is not known."""
    for key in given:
        if key not in known:
            raise InputError(f"{name}{key[:50]}: this field is not served here: send {ITEM}.")


def without_nulls(item: object) -> dict[str, Any]:
    """The fields of a JSON object that are not null; of anything else, none."""
    if not isinstance(item, dict):
        return {}
    return {name: value for name, value in item.items() if value is not None}


def read_text(value: object, name: str) -> str:
    """A string. Raises `InputError`."""
    if not isinstance(value, str):
        raise InputError(f"{name}text: send a string.")
    return value


def read_part(part: object, name: str) -> Content:
    """One content part, a `text` or an `image_url`, as OpenAI's API has them.

    Raises `InputError`.
    """
    given = without_nulls(part)
    kind = given.get("type")
    if kind not in ("text", "image_url"):
        named = "content" if kind is None else str(kind)[:50]
        raise InputError(f"{name}{named}: a content part is of the type `text` or `image_url`.")
    check_fields(given, {"type", kind, *PART_READ_PAST}, name)
    value = given.get(kind)
    if kind == "text":
        return read_text(value, name), None
    if isinstance(value, dict):
        check_fields(value, {"url", "detail"}, name)
        value = value.get("url")
    if value is None:
        raise InputError(f'{name}image_url: send {{"url": …}}, with a data URI.')
    return "", read_image(value, name)


def read_parts(parts: Sequence[object], name: str) -> Content:
    """Content parts of one item: texts, joined by line breaks, and at most one image.

    Raises `InputError`.
    """
    texts: list[str] = []
    image: bytes | None = None
    for part in parts:
        text, data = read_part(part, name)
        if text:
            texts.append(text)
        if data is not None and image is not None:
            raise InputError(f"{name}image_url: these are two images: send one for each embedding.")
        if data is not None:
            image = data
    if not parts:
        raise InputError(f"{name}content: this is empty: send a text, an image, or both.")
    return "\n".join(texts), image


def read_content(content: object, name: str) -> Content:
    """A string, or a list of content parts. Raises `InputError`."""
    if isinstance(content, list):
        return read_parts(content, name)
    if isinstance(content, str):
        return read_item(content, name)
    raise InputError(f"{name}content: send a string, or a list of content parts.")


def read_item(item: object, name: str) -> Content:
    """An item of `input`. Raises `InputError`."""
    if isinstance(item, str) and is_image(item):
        return "", read_image(item, name)
    if isinstance(item, str):
        return item, None
    first = item[0] if isinstance(item, list) and item else item
    if isinstance(first, int) and not isinstance(first, bool):
        raise InputError(f"{name}send a text, as no token ids are read (LangChain: check_embedding_ctx_length=False).")
    given = without_nulls(item)
    if "type" in given:
        return read_part(given, name)
    if "content" in given:
        check_fields(given, {"content"}, name)
        return read_content(given["content"], name)
    check_fields(given, {"text", "image"}, name)
    if not given:
        raise InputError(f"{name}send {ITEM}.")
    text = read_text(given.get("text", ""), name)
    image = read_image(given["image"], name) if "image" in given else None
    return text, image


def has_text(content: object) -> bool:
    """Whether there is anything but empty texts in the content of a message."""
    if isinstance(content, list):
        texts = [part.get("text", part) if isinstance(part, dict) else part for part in content]
        return any(map(has_text, texts))
    if isinstance(content, str):
        return bool(content.strip())
    return bool(content)


def read_message(message: Mapping[str, object]) -> tuple[str, object]:
    """Role and content. Raises `MalformedError` for roles and fields that are not served."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise MalformedError(f"{MESSAGES}; the role {str(role)[:50]} is not served.")
    for key, value in message.items():
        if value is not None and key not in MESSAGE_FIELDS:
            raise MalformedError(f"{MESSAGES}; the field {key[:50]} is not served.")
    return role, message.get("content")


def read_system(content: object) -> str:
    """The text of a system message. Raises `InputError`."""
    if content is None or content == []:
        return ""
    text, image = read_content(content, "messages: system: ")
    if image is not None:
        raise InputError("messages: system: image_url: a `system` message is a text.")
    return text


def read_messages(messages: object) -> tuple[str, Content]:
    """The system's text and the user's content. Raises `InputError` or `MalformedError`."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise MalformedError(f"{MESSAGES}, each an object with `role` and `content`.")
    turns = [read_message(message) for message in messages]
    if turns and turns[-1][0] == "assistant" and not has_text(turns[-1][1]):
        # The beginning of an answer, in which there is nothing yet.
        turns.pop()
    roles = [role for role, _ in turns]
    if "assistant" in roles:
        raise MalformedError(f"{MESSAGES}; an `assistant` message may be the last, without text.")
    if roles not in (["user"], ["system", "user"]):
        raise MalformedError(f"{MESSAGES}, and no more: one conversation has one embedding.")
    system_text = read_system(turns[0][1]) if roles[0] == "system" else ""
    return system_text, read_content(turns[-1][1], "messages: ")


def find_query_field(request: OpenAIRequest) -> str:
    """The field that says that the inputs are queries, or "". Raises `MalformedError`."""
    sent = {"input_type": request.input_type.lower(), "task": request.task.lower()}
    kinds = {name: kind for name, kind in sent.items() if kind}
    for name, kind in kinds.items():
        if kind not in DOCUMENT_KINDS | QUERY_KINDS:
            advice = "a document kind (`passage`), a query kind (`query`), or an instruction as `prompt`"
            raise MalformedError(f"{name}: {kind[:50]} is not served: send {advice}.")
    of_queries = [name for name, kind in kinds.items() if kind in QUERY_KINDS]
    if of_queries and len(of_queries) < len(kinds):
        raise MalformedError("task: it contradicts `input_type`: send one of them.")
    return of_queries[0] if of_queries else ""


def choose_instruction(request: OpenAIRequest, system_text: str, query_prompt: str | None) -> str:
    """What the request says, else what `input_type` or `task` means.

    Raises `InputError` or `MalformedError`.
    """
    query_field = find_query_field(request)
    if request.prompt and system_text:
        raise MalformedError("prompt: the `system` message is the prompt too: send one of them.")
    if request.prompt or system_text:
        return request.prompt or system_text
    if not query_field:
        return DEFAULT_INSTRUCTION
    if query_prompt is None:
        advice = "send `prompt`, or set GME_QUERY_PROMPT where the service starts"
        raise InputError(f"{query_field}: a query needs a prompt: {advice}.")
    return query_prompt


def read_max_tokens(sent: int | None) -> int | None:
    """At how many tokens to cut a text; None: at no limit of its own. Raises `MalformedError`."""
    if sent == 0:
        raise MalformedError("truncate_prompt_tokens: 0 leaves nothing: send at least 1, or -1 for no cut of your own.")
    return None if sent == -1 else sent


def read_sources(request: OpenAIRequest, query_prompt: str | None) -> list[Source]:
    """What to embed. Raises `InputError` or `MalformedError`."""
    if request.input is None and request.messages is None:
        raise MalformedError(f"input: this is missing. {OpenAIRequest.__doc__}")
    if request.input is not None and request.messages is not None:
        raise MalformedError("messages: send `input`, or `messages` in its place, and not both.")
    system_text = ""
    if request.messages is not None:
        system_text, content = read_messages(request.messages)
        named = [("messages: ", content)]
    else:
        items = request.input if isinstance(request.input, list) else [request.input]
        names = [f"Input {number}: " for number in range(1, len(items) + 1)]
        named = [(name, read_item(item, name)) for name, item in zip(names, items, strict=True)]
    instruction = choose_instruction(request, system_text, query_prompt)
    max_tokens = read_max_tokens(request.truncate_prompt_tokens)
    may_cut = request.truncate in (True, "END") and request.truncation
    return [Source(text, image, instruction, name, max_tokens, may_cut) for name, (text, image) in named]


# Answers


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, "application/json")


def error_response(sentence: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """The sentence where FastAPI's clients look for it, and where OpenAI's do."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    openai_error = {"message": sentence, "type": kind}
    return json_response({"detail": sentence, "error": openai_error}, status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    """A `ServiceError`'s own sentence. Of any other fault, a client is told that it is one."""
    ours = error if isinstance(error, ServiceError) else ServiceError(ServiceError.example)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(ours.status)
    return error_response(str(ours), ours.status, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router refuses: a route or a method that there is not."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    sentences = {
        404: f"There is no {request.url.path[:100]} here: /docs shows what there is.",
        405: f"{request.method[:20]} is not served here: use {allowed}.",
    }
    sentence = sentences.get(error.status_code, error.detail)
    return error_response(sentence, error.status_code, error.headers)


def name_other_methods(info: metrics.Info) -> None:
    """Count unknown methods as one: each would be a label, which the metrics keep for ever."""
    if info.method not in HTTPMethod.__members__:
        info.method = "OTHER"


# ASGI middlewares, each with one question, in the order in which a request meets them


class NormalizePath:
    """Has the path slashes at the end, or several in a row? Then they are left out.

    A redirect would say so too, but proxies bend its address.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("//" in scope["path"] or scope["path"].endswith("/")):
            root = scope.get("root_path", "")
            path = re.sub("/+", "/", scope["path"].removeprefix(root)).rstrip("/") or "/"
            scope = {**scope, "path": root + path}
        await self.app(scope, receive, send)


class LimitBodyTime:
    """Does the body come in time? All in `max_seconds`, each piece in `max_idle` seconds."""

    def __init__(self, app: ASGIApp, max_seconds: float, max_idle: float) -> None:
        self.app = app
        self.max_seconds = max_seconds
        self.max_idle = max_idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        end = clock() + self.max_seconds
        more = True

        async def receive_in_time() -> Message:
            nonlocal more, end
            # Behind the body comes the end of the connection, which may take as long as it likes.
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(min(clock() + self.max_idle, end)):
                    message = await receive()
            except TimeoutError:
                # Every later read fails at once.
                end = clock()
                raise SlowBodyError(SlowBodyError.example) from None
            more = message.get("more_body", False)
            return message

        await self.app(scope, receive_in_time, send)


class ReadBeforeAnswering:
    """Does the client still send? Then it may not see an answer, which waits until all is read.

    Of what still comes, at most `max_dropped` bytes are read and dropped, each piece within
    `max_idle` seconds; none of a client that may wait for leave to send (`Expect`). An answer to
    a body that has not ended then closes the connection.
    """

    def __init__(self, app: ASGIApp, max_dropped: float, max_idle: float) -> None:
        self.app = app
        self.max_dropped = max_dropped
        self.max_idle = max_idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        more = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        if not more:
            await self.app(scope, receive, send)
            return
        may_wait_for_leave = b"expect" in headers
        held: list[Message] = []

        async def receive_watched() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def send_when_read(message: Message) -> None:
            if more or held:
                held.append(message)
            else:
                await send(message)

        # The rest is read after the app has returned, and so has let go of the body.
        await self.app(scope, receive_watched, send_when_read)
        dropped = 0
        with contextlib.suppress(TimeoutError, SlowBodyError):
            while held and more and dropped < self.max_dropped and not may_wait_for_leave:
                async with asyncio.timeout(self.max_idle):
                    # A variable would keep one piece in memory while the next is awaited.
                    dropped += len((await receive_watched()).get("body", b""))
        for message in held:
            if more and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)


class LimitBodies:
    """Is the body too large, as declared or as it comes?

    It is asked when a route reads the body, and so after the key is checked.
    """

    def __init__(self, app: ASGIApp, max_body: float) -> None:
        """`max_body` is in bytes."""
        self.app = app
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        declared = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))

        async def receive_counted() -> Message:
            nonlocal received
            self.check(declared)
            message = await receive()
            received += len(message.get("body", b""))
            self.check(received)
            return message

        await self.app(scope, receive_counted, send)

    def check(self, size: int) -> None:
        """Raises `TooLargeError`."""
        if size > self.max_body:
            megabytes = self.max_body / 2**20
            raise TooLargeError(f"The body is over {megabytes:g} MB: send less in one request.")


class AnswerHead:
    """Is it HEAD? Then the answer is GET's, without its body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


# Routes


def inputs_of_its_kind(source: Source) -> Counter:
    if source.image is None:
        return TEXT_INPUTS
    return FUSED_INPUTS if source.text else IMAGE_INPUTS


async def embed(
    request: Request,
    batcher: Batcher,
    sources: Sequence[Source],
    max_inputs: int,
) -> tuple[np.ndarray, int]:
    """The batcher's answer. When the client leaves before, what is not computed yet is dropped.

    Raises `InputError` or `TooLargeError` for their number, what the batcher raises,
    `ClientDisconnect` when the client has left, and `BusyError` when the service stops.
    """
    if not sources:
        raise InputError(f"The request has 0 inputs: send 1 to {max_inputs}.")
    if len(sources) > max_inputs:
        raise TooLargeError(f"The request has {len(sources)} inputs: send 1 to {max_inputs}.")
    answer = asyncio.ensure_future(batcher.embed(sources))
    # It ends when the client leaves, as the whole body has been read.
    left = asyncio.ensure_future(request.receive())
    left.add_done_callback(answer.cancel)
    try:
        embeddings, tokens = await answer
    except asyncio.CancelledError:
        if left.done() and not left.cancelled():
            raise ClientDisconnect from None
        raise BusyError("Stopping: try again.") from None
    finally:
        left.cancel()
        # The traceback of its error would keep it, with all images of the request.
        del answer
    for source in sources:
        inputs_of_its_kind(source).inc()
    TOKENS.inc(tokens)
    return embeddings, tokens


class Api:
    """The routes over a batcher. Of `model` they read device, dtype and dimension."""

    def __init__(self, settings: Settings, batcher: Batcher, model: Model) -> None:
        self.settings = settings
        self.batcher = batcher
        self.dimension = model.dimension
        self.max_inputs = min(settings.max_inputs, settings.max_queue)
        self.state = {
            "model": settings.model_id,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "version": __version__,
        }

    def queue_depth(self) -> int:
        return len(self.batcher)

    async def check_key(self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        """Raises `KeyRefusedError`."""
        key = str(self.settings.api_key).encode()
        if given is None or not secrets.compare_digest(given.credentials.encode("latin-1"), key):
            raise KeyRefusedError(KeyRefusedError.example)

    async def embed_text(self, request: Request) -> Response:
        """One embedding per text, in their order."""
        body = await read_json(request, Texts, self.max_inputs)
        instruction = body.prompt or DEFAULT_INSTRUCTION
        sources = [
            Source(text, instruction=instruction, name=f"Input {number}: ")
            for number, text in enumerate(body.texts, start=1)
        ]
        embeddings, _ = await embed(request, self.batcher, sources, self.max_inputs)
        return json_response({"embeddings": embeddings})

    async def embed_image(self, request: Request) -> Response:
        """One embedding per file, in their order: of the image, or of image and text together."""
        sources = await read_form(request, self.max_inputs)
        embeddings, _ = await embed(request, self.batcher, sources, self.max_inputs)
        return json_response({"embeddings": embeddings})

    async def openai_embeddings(self, request: Request) -> Response:
        """OpenAI's list object, with one embedding per input in their order."""
        body = await read_json(request, OpenAIRequest, self.max_inputs)
        for name in ("dimensions", "output_dimension"):
            if getattr(body, name) not in (None, self.dimension):
                raise InputError(f"{name} can only be {self.dimension}: this model was not trained to be cut.")
        sources = read_sources(body, self.settings.query_prompt)
        embeddings, tokens = await embed(request, self.batcher, sources, self.max_inputs)
        if body.encoding_format == "base64":
            encoded = [base64.b64encode(embedding).decode() for embedding in embeddings]
            return json_response(self.openai_list(encoded, tokens))
        return json_response(self.openai_list(embeddings, tokens))

    def openai_list(self, embeddings: Iterable[object], tokens: int) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(embeddings)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.settings.model_id, "usage": usage}

    async def openai_models(self) -> Response:
        """OpenAI's list of models: the one there is."""
        return json_response({"object": "list", "data": [self.model_entry()]})

    async def openai_model(self, model_id: str) -> Response:
        """OpenAI's entry of a model, for the one there is."""
        if model_id != self.settings.model_id:
            raise NotFoundError(f"The model {model_id[:100]} is not served, but {self.settings.model_id} is.")
        return json_response(self.model_entry())

    def model_entry(self) -> dict[str, Any]:
        model_id = self.settings.model_id
        return {
            "id": model_id,
            "object": "model",
            "created": 0,
            "owned_by": model_id.split("/")[0],
            # Not OpenAI's. Xinference's client asks for the type before it embeds.
            "model_type": "embedding",
            "dimension": self.dimension,
            "max_length": self.settings.max_length,
        }

    async def health(self) -> Response:
        """Which model runs, where, and how much waits for it."""
        return json_response(self.health_entry(self.queue_depth()))

    def health_entry(self, queue_depth: int) -> dict[str, Any]:
        return {
            "status": "ok",
            **self.state,
            "dimension": self.dimension,
            "queue_depth": queue_depth,
        }

    async def page(self) -> Response:
        """The page that compares pictures with sentences."""
        if not PAGE.is_file():
            raise NotFoundError(f"The page {PAGE.name} does not lie beside gme_service.py: /docs shows what there is.")
        return FileResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


# What /docs says of them


def example(answer: object) -> dict[str, Any]:
    return {"content": {"application/json": {"example": answer}}}


def describe_errors(*statuses: int) -> dict[int | str, Any]:
    kinds: list[type[ServiceError]] = [ServiceError, *ServiceError.__subclasses__()]
    return {kind.status: example({"detail": kind.example}) for kind in kinds if kind.status in statuses}


def describe_post(body: Mapping[str, Any], answer: object, media: str = "application/json") -> dict[str, Any]:
    described = {"required": True, "content": {media: {"schema": body}}}
    responses = {200: example(answer)} | describe_errors(400, 401, 408, 413, 415, 422, 500, 503)
    return {
        "methods": ["POST"],
        "tags": ["Embeddings"],
        "responses": responses,
        "openapi_extra": {"requestBody": described},
    }


def openai_schema() -> dict[str, Any]:
    """`OpenAIRequest`, and after its fields those that are read past."""
    schema = OpenAIRequest.model_json_schema()
    schema["properties"] |= {name: {"description": "Read past."} for name in sorted(READ_PAST)}
    schema["properties"] |= {
        name: {"const": value, "description": "Read past."} for name, value in READ_PAST_AS.items()
    }
    return schema | {"examples": [{"input": EXAMPLE}]}


def openai_description() -> str:
    """The four kinds of fields, for a person."""
    says_what = ["input", "messages"]
    served = [name for name in OpenAIRequest.model_fields if name not in says_what]
    fixed = [f"{name}: {json.dumps(value)}" for name, value in READ_PAST_AS.items()]

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    return "\n".join(
        [
            "OpenAI's list object, with one embedding per input in their order.\n",
            "The fields of a request are of four kinds:\n",
            f"- They say what to embed: {listed(says_what)}, one of the two.",
            f"- They change what comes, and are served: {listed(served)}.",
            f"- They cannot change a vector, and are read past: {listed(sorted(READ_PAST))};",
            f"  null in any field; and with this value alone {listed(fixed)}.",
            "- All others are refused by their name.",
        ]
    )


def add_routes(app: FastAPI, api: Api) -> None:
    key = [Depends(api.check_key)] if api.settings.api_key else []
    vectors = [[0.0134, -0.0127, 0.0451]]
    texts = describe_post(Texts.model_json_schema(), {"embeddings": vectors})
    form = ImageForm.model_json_schema()
    images = describe_post(form, {"embeddings": vectors}, "multipart/form-data")
    openai = describe_post(openai_schema(), api.openai_list(vectors, 25))
    openai["description"] = openai_description()
    for path, route, described in (
        ("/embed/text", api.embed_text, texts),
        ("/embed/image", api.embed_image, images),
        ("/v1/embeddings", api.openai_embeddings, openai),
    ):
        app.add_api_route(path, route, dependencies=key, **described)
    guarded: dict[str, Any] = {"tags": ["Embeddings"], "dependencies": key}
    models = {200: example({"object": "list", "data": [api.model_entry()]})} | describe_errors(401)
    model = {200: example(api.model_entry())} | describe_errors(401, 404)
    app.add_api_route("/v1/models", api.openai_models, responses=models, **guarded)
    app.add_api_route("/v1/models/{model_id:path}", api.openai_model, responses=model, **guarded)
    health: dict[int | str, Any] = {200: example(api.health_entry(0))}
    app.add_api_route("/health", api.health, tags=["State"], responses=health)
    app.add_api_route("/", api.page, include_in_schema=False)


def create_app(settings: Settings, batcher: Batcher, model: Model) -> FastAPI:
    """The service over a batcher, with the metrics and the middlewares."""
    api = Api(settings, batcher, model)
    Gauge("gme_info", "The model and the service.", list(api.state)).labels(**api.state).set(1)
    Gauge("gme_queue_inputs", "Inputs without an answer.").set_function(api.queue_depth)
    app = FastAPIOffline(
        title="GME Service",
        version=__version__,
        description=f"Embeddings by `{settings.model_id}`.",
        lifespan=lambda _: batcher.running(),
        exception_handlers={
            ServiceError: on_error,
            HTTPException: on_http_error,
            ClientDisconnect: lambda *_: Response("", 499),
            Exception: on_error,
        },
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI's own spans and metrics: to find that nobody collects them took 3 % of a request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    # deploy/ray_embed.py embeds without HTTP, with what the import of the module has built.
    app.state.batcher = batcher
    app.state.model = model
    documentation = [*app.router.routes]
    add_routes(app, api)
    max_body = settings.max_body_mb * 2**20
    # The last that a request meets; the first is at the end.
    app.add_middleware(AnswerHead)
    app.add_middleware(LimitBodies, max_body=max_body)
    app.add_middleware(ReadBeforeAnswering, max_dropped=8 * max_body, max_idle=DROP_IDLE_SECONDS)
    app.add_middleware(LimitBodyTime, max_seconds=BODY_SECONDS, max_idle=BODY_IDLE_SECONDS)
    instrumentator = Instrumentator(should_group_status_codes=False)
    instrumentator.add(name_other_methods, metrics.default(latency_lowr_buckets=SECONDS))
    instrumentator.instrument(app).expose(app, tags=["State"])
    # Routes are tried in turn, by the metrics too: behind those of /docs, a request cost 6 % more.
    app.router.routes.sort(key=documentation.__contains__)
    app.add_middleware(NormalizePath)
    return app


# --------------------------------------------------------------------------------------------------------- 7. app
TOY_MODEL_DIR = Path(__file__).parent / "tests" / "models"
UVICORN = ["-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "gme_service:app"]
# By itself uvicorn closes an idle connection after 5 s. A client that comes back just then
# would meet a reset.
UVICORN_OPTIONS = ["--host", "0.0.0.0", "--timeout-keep-alive", "75"]


def load(settings: Settings) -> tuple[Preparer, Model, Batcher]:
    """All that answers, without HTTP.

    Raises `StartError`, or `StartLaterError` when the hub or the device may serve later.
    """
    device, dtype = choose_device(settings.device, settings.dtype)
    log.info("Loading %s on %s in %s.", settings.model_id, device, dtype)
    directory = find_checkpoint(settings)
    config = Config.read(directory)
    prepare = Preparer(
        directory,
        settings.max_length,
        settings.max_image_pixels,
        settings.max_image_tokens,
    )
    config.check_vocabulary(prepare.tokenizer)
    # Short, as every start computes them.
    probes = prepare([Source("A red circle on white."), Source("harbour")])
    try:
        model = Model(directory, config, device, dtype)
        model.check(probes)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise StartLaterError(
            f"{settings.model_id} in {dtype} needs more memory than is free on {device}:"
            " end what else uses it, or choose another device with GME_DEVICE."
        ) from None
    return prepare, model, create_batcher(settings, prepare, model)


def create_batcher(settings: Settings, prepare: Preparer, model: Model) -> Batcher:
    """The batcher of a model, with what the settings leave open chosen for its device."""
    # Enough to keep the device busy, and no more: a lone query may wait for a whole batch.
    max_tokens = 8192
    if model.device.type == "cpu":
        max_tokens = min(256 * torch.get_num_threads(), 8192)
    # Four bytes a number, and 200 of Python's.
    bytes_per_embedding = 4 * model.dimension + 200
    return Batcher(
        prepare,
        prepare.count_pixels,
        model.embed,
        max_tokens=settings.max_batch_tokens or max_tokens,
        max_pixels=settings.max_image_pixels,
        max_queue=settings.max_queue,
        cache_entries=int(settings.cache_mb * 2**20 / bytes_per_embedding),
    )


def build() -> FastAPI:
    """Load the model and return the app that serves it. Raises `StartError`."""
    started = time.perf_counter()
    settings = Settings.load()
    # Before the load: process 1 of a container ignores a SIGTERM for which it has no handler.
    exit_0_at_sigterm()
    _, model, batcher = load(settings)
    log.info(
        "GME Service %s: %s from %s on %s in %s, %d dimensions, loaded in %.1f s; %s.",
        __version__,
        settings.model_id,
        settings.model_dir / settings.model_id,
        model.device,
        model.dtype,
        model.dimension,
        time.perf_counter() - started,
        "an API key is needed" if settings.api_key else "no API key is needed (GME_API_KEY holds none)",
    )
    return create_app(settings, batcher, model)


def exit_0_at_sigterm() -> None:
    """Exit with 0 when uvicorn, after its shutdown, raises SIGTERM again.

    A handler that is set already stays.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def main(arguments: list[str]) -> None:
    """What `python gme_service.py` does.

    `--version` prints the version, `--toy` serves the toy model. All else is for uvicorn.
    """
    match arguments:
        case ["--version"]:
            print(__version__)
        case ["--toy", *options]:
            if not TOY_MODEL_DIR.is_dir():
                raise StartError(
                    f"There is no toy model in {TOY_MODEL_DIR}: run gme_service.py from a clone of its repository."
                )
            os.environ |= {"GME_MODEL_DIR": str(TOY_MODEL_DIR), "GME_MODEL_ID": "toy/shapes"}
            serve(options)
        case options:
            serve(options)


def serve(options: list[str]) -> None:
    """Become a uvicorn that serves the app. Of an option that is given twice, it takes the last."""
    os.execv(sys.executable, [sys.executable, *UVICORN, *UVICORN_OPTIONS, *options])


# uvicorn imports the module as gme_service. The model is loaded here, before uvicorn opens
# the port.
try:
    if __name__ == "__main__":
        main(sys.argv[1:])
    elif __name__ == "gme_service":
        app = build()
except StartError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
