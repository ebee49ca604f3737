"""GME Service: multimodal embeddings of text and images over HTTP, from one module.

What flows through it: `Source`, what a client sent (text, image bytes, an instruction); `Input`, what the model reads
(token ids, pixel patches); and an embedding, the L2-normalised float32 vector of the model's authors. Where a rule is
theirs, the docstring says so. What is protected against, and what is left to others, stands at the top of section 6.
"""

import asyncio
import base64
import contextlib
import difflib
import functools
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
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http import HTTPMethod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import orjson
import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from filelock import FileLock
from PIL import ExifTags, Image
from prometheus_client import Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings
from python_multipart import multipart
from safetensors import SafetensorError, safe_open
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

__version__ = "2.0.0"
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read with torch's first tensor: large pages halve the start time
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs every broken form
log = logging.getLogger("uvicorn.error")  # the logger that uvicorn has configured by the time it imports the app


class StartError(Exception):
    """The service cannot start; the message says what to do."""

    exit_code = 78  # EX_CONFIG of sysexits.h: a restart would fail the same way


class HubError(StartError):
    exit_code = 1  # unlike a setting, the hub may be right when systemd starts the service again


class ServiceError(Exception):
    """Why a request has no embeddings: a sentence for the client. Each kind has its HTTP status, and an example."""

    status, example = 500, "A fault of the service: its log says more."


class InputError(ServiceError):
    status, example = 400, "The request has no input: send at least one."


class KeyRefusedError(ServiceError):
    status, example = 401, "The API key is missing or wrong: send it in the header `Authorization: Bearer <key>`."


class TooLargeError(ServiceError):
    status, example = 413, "The request has more than 2048 inputs: send fewer."


class MalformedError(ServiceError):
    status, example = 422, "prompt: Input should be a valid string."


class BusyError(ServiceError):
    status, example = 503, "Too many inputs wait already: try again in a moment."


class DeviceError(Exception):
    """The device cannot go on, and the process has to end: no client gets this."""


# ---------------------------------------------------------------------------------------------------- 1. Settings


class Settings(BaseSettings, env_prefix="GME_", env_ignore_empty=True, str_strip_whitespace=True):
    """The environment variables `GME_*`; README.md has the table."""

    model_dir: Path = Path("~/gme_models")
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

    @classmethod
    def load(cls) -> "Settings":
        """Read the environment. Raises `StartError` with a sentence for each variable that cannot be used."""
        known = [f"GME_{name.upper()}" for name in cls.model_fields]
        unknown = [name for name in os.environ if name.upper().startswith("GME_") and name.upper() not in known]
        nearest = {name: difflib.get_close_matches(name.upper(), known, 1) or known for name in unknown}
        faults = [f"{name} is not a setting: use {' or '.join(names)}." for name, names in nearest.items()]
        try:
            settings = cls()
            settings.model_dir = settings.model_dir.expanduser()
        except ValidationError as error:
            named = ((f"GME_{fault['loc'][0]!s}".upper(), fault) for fault in error.errors())
            faults += [f"{name}={fault['input']} cannot be used: {fault['msg']}." for name, fault in named]
        except RuntimeError as error:
            faults.append(f"GME_MODEL_DIR={settings.model_dir} cannot be used: {error} Give an absolute path.")
        if faults:
            raise StartError("\n".join(faults))
        if "GME_API_KEY" in map(str.upper, os.environ) and not settings.api_key:
            log.warning("GME_API_KEY is empty: every client is served.")
        return settings


# -------------------------------------------------------------------------------------------------- 2. Checkpoint

CONFIGS = ("config.json", "tokenizer.json", "preprocessor_config.json")
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"  # of what a start reads, in the format of the command sha256sum


def weight_files(directory: Path) -> set[Path]:
    index = directory / INDEX
    shards = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ["model.safetensors"]
    return {directory / shard for shard in shards}


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds a whole checkpoint. The header of a weight file shows when the file was cut short."""
    try:
        for name in CONFIGS:
            json.loads((directory / name).read_bytes())
        return all(safe_open(path, framework="np") for path in weight_files(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def file_sums(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file that a start reads, by its name."""
    paths = [*(directory / name for name in (*CONFIGS, INDEX)), *weight_files(directory)]
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in paths if path.exists()}


def download(settings: Settings, directory: Path, compare: bool = False) -> None:
    """Fetch from ModelScope what `directory` lacks, going on where an earlier download ended, and note the sums.

    With `compare`, also what is there and differs from the hub's. Raises `HubError`, or `StartError` for a directory
    that cannot be written and a model that the hub does not have.
    """
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_FILE_LOCK", "false")  # it would be in HOME; there is a lock below
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")  # s per file; 5 GB may take more than its hour
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111  # Path.home() raises where there is none
        os.environ["HOME"] = str(settings.model_dir)  # where the client keeps settings of its own
    # In a terminal the client draws progress bars; in a log they would be 90,000 lines an hour.
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"GME_MODEL_DIR={settings.model_dir} cannot be used: {error}.") from None
    try:
        with FileLock(directory.parent / f".{directory.name}.lock"), bars:  # once, however many workers
            if is_complete(directory) and not compare:
                return
            from modelscope import snapshot_download  # takes 1.3 s, and is needed once

            log.info("Downloading %s into %s, which grows to its size (2B: 8.8 GB).", settings.model_id, directory)
            snapshot_download(settings.model_id, revision=settings.model_revision, local_dir=str(directory))
            if not is_complete(directory):
                raise ValueError("what the hub sent is not a complete Qwen2-VL checkpoint")
            noted = directory / f"{SUMS}.part"
            noted.write_text("".join(f"{x}  {name}\n" for name, x in file_sums(directory).items()))
            noted.replace(directory / SUMS)
    except Exception as error:  # the client raises many kinds; the second of its many lines names the file that failed
        reason = "; ".join(line.strip(" -") for line in f"{type(error).__name__}: {error}".splitlines()[:2])
        hub = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn")
        unknown = getattr(getattr(error, "response", None), "status_code", None) == 404
        raise (StartError if unknown else HubError)(
            f"Downloading {settings.model_id} from {hub} into {directory} failed ({reason}). Start again to go on where"
            " the download ended, or put the model's files there by hand, or set GME_MODEL_DIR to a directory that has"
            f" them in {settings.model_id}, or MODELSCOPE_ENDPOINT to a hub that can be reached."
        ) from None


def find_checkpoint(settings: Settings) -> Path:
    """The directory of the checkpoint, downloaded first when it is not complete. Raises `HubError`."""
    directory = settings.model_dir / settings.model_id
    if not is_complete(directory):
        download(settings, directory)
    return directory


def verify(settings: Settings) -> str:
    """Compare the checkpoint with the sums noted after its download; where there are none, with the hub.

    Returns a sentence when all agree, or when the hub's files have taken the place of those that differed. Raises
    `StartError` with one that says which to delete, or `HubError`.
    """
    directory = settings.model_dir / settings.model_id
    noted_before = (directory / SUMS).exists()
    if not noted_before and not is_complete(directory):
        raise StartError(f"There is no complete checkpoint in {directory} yet: start the service to fetch it.")
    try:
        found = file_sums(directory)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StartError(f"{INDEX} is damaged. Delete it in {directory}, and start again.") from None
    if not noted_before:
        download(settings, directory, compare=True)
    lines = (line.partition(" ") for line in (directory / SUMS).read_text().splitlines())
    noted = {name.lstrip(" *"): digest for digest, _, name in lines}
    wrong = ", ".join(sorted(name for name in found.keys() | noted.keys() if found.get(name) != noted.get(name)))
    if wrong and noted_before:
        raise StartError(f"Changed since they came, or missing: {wrong}. Delete them in {directory}, and start again.")
    if wrong:
        return f"Other than the hub's, and fetched again into {directory}: {wrong}."
    return f"The files of {settings.model_id} in {directory} are as they were published."


# ------------------------------------------------------------------------------------------------------ 3. Inputs

DEFAULT_INSTRUCTION = "You are a helpful assistant."
# The authors' prompt: the instruction, the place of an image if there is one, the text, and the end.
SYSTEM_PART = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
IMAGE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
END = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
PATCH, TOKEN = 14, 28  # pixels on a side: of a patch, and of the 2 x 2 patches that make an image token
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")  # Pillow opens MPO as a kind of JPEG
# What turns an image upright, by EXIF orientation from 2 on. ImageOps.exif_transpose would fail where the EXIF is odd.
UPRIGHT = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
JPEG_SCAN = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # the start of a scan
MAX_SCANS = 30  # of a progressive JPEG, each of which passes over the whole image; encoders write about ten
MAX_SIDE = 65_535  # pixels, a JPEG's most: to resize longer sides, Pillow makes gigabytes of coefficients
MAX_EXIF = 1 << 16  # bytes, as many as a segment of a JPEG has; Pillow may make 32 times as much of them
OPEN_SECONDS, PIXELS_PER_SECOND = 1, 10_000_000  # CPU time allowed to open a file, and then for its pixels
CHUNK_WEIGHT = 1 << 14  # characters that are tokenized in one go; an image is a chunk of its own
TRUNCATED = Counter("gme_truncated_inputs", "Inputs that were cut at GME_MAX_LENGTH tokens.")


@dataclass(slots=True, frozen=True)
class Source:
    """One input as a client sent it: a text, the bytes of an image file, or both (fused into one embedding)."""

    text: str = ""
    image: bytes | None = None
    instruction: str = DEFAULT_INSTRUCTION
    name: str = ""  # what an error begins with

    @property
    def weight(self) -> int:
        """What it costs to prepare, in characters of text."""
        return len(self.instruction) + len(self.text) + (0 if self.image is None else CHUNK_WEIGHT)


@dataclass(slots=True)
class Input:
    """One input as the model reads it."""

    token_ids: np.ndarray  # (length,) int64
    prefix: tuple[int, ...]  # token ids of the prompt's part with the instruction
    shared: int  # how many of the first token ids are those of `prefix`: at most length - 1
    image_start: int = 0  # position of the first image token
    grid: tuple[int, int] = (0, 0)  # rows and columns of patches
    patches: np.ndarray | None = None  # (rows * columns, 588) uint8: 3 channels of 14 x 14, a token's four together

    key: bytes = field(init=False, repr=False)  # a digest of all that the embedding depends on

    def __post_init__(self) -> None:
        digest = hashlib.sha256(repr((self.image_start, self.grid)).encode() + self.token_ids.tobytes())
        digest.update(b"" if self.patches is None else self.patches.data)
        self.key = digest.digest()

    @property
    def cost(self) -> int:
        """Tokens that the model computes for it."""
        return len(self.token_ids) - self.shared


class ImageFile(io.BytesIO):
    """The bytes of an image file. Raises `ValueError` when the thread that reads them has taken too long."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.deadline = time.thread_time() + OPEN_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.deadline:
            raise ValueError("The file takes too long to read.")
        return super().read(size)


def fitted_size(width: int, height: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """The size (width, height) in multiples of 28 pixels to bring an image to: `smart_resize` as published."""

    def multiple(length: float, rounded: Callable[[float], int]) -> int:
        return max(1, rounded(length / TOKEN)) * TOKEN

    tokens = multiple(width, round) * multiple(height, round) // TOKEN**2
    if tokens > max_tokens:
        shrink = math.sqrt(width * height / (max_tokens * TOKEN**2))
        return multiple(width / shrink, math.floor), multiple(height / shrink, math.floor)
    if tokens < min_tokens:
        grow = math.sqrt(min_tokens * TOKEN**2 / (width * height))
        return multiple(width * grow, math.ceil), multiple(height * grow, math.ceil)
    return multiple(width, round), multiple(height, round)


def upright(image: Image.Image) -> Image.Image:
    """The first frame in RGB, turned as its EXIF says."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.load()  # a PNG may have its EXIF behind the pixels
    if len(image.info.get("exif", b"")) > MAX_EXIF:
        raise ValueError("The EXIF data are too large.")
    orientation: Any = None
    with contextlib.suppress(Exception):  # an image is not broken because its EXIF is
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    turned = isinstance(orientation, int) and 2 <= orientation <= 8
    return rgb.transpose(Image.Transpose[UPRIGHT[orientation - 2]]) if turned else rgb


def resize_twice(image: Image.Image, max_tokens: int) -> Image.Image:
    """The two resizes of the authors' code: their own, then that of the published image processor."""
    width, height = fitted_size(*image.size, min_tokens=4, max_tokens=16384)
    first = min(width, 200 * height), min(height, 200 * width)
    second = fitted_size(*first, min_tokens=256, max_tokens=max_tokens)
    return image.resize(first, Image.Resampling.BICUBIC).resize(second, Image.Resampling.BICUBIC)


class Preparer:
    """Turns what clients send into what the model reads. Thread-safe."""

    def __init__(self, directory: Path, max_length: int, max_image_pixels: int, max_image_tokens: int = 1280) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # A token is at most as many characters as the longest has bytes: what follows so many would be cut anyway.
        self.max_chars = max_length * max(map(len, self.tokenizer.get_vocab()))
        self.max_length, self.max_pixels, self.max_image_tokens = max_length, max_image_pixels, max_image_tokens
        self.prefix_ids = functools.lru_cache(16)(lambda text: tuple(self.encode([SYSTEM_PART.format(text)])[0]))
        self.turn, self.decoding, self.free_pixels = threading.Lock(), threading.Condition(), max_image_pixels
        Image.MAX_IMAGE_PIXELS = max_image_pixels  # Pillow refuses to open a file of twice as many

    def __call__(self, sources: Sequence[Source]) -> list[Input | ServiceError]:
        """For each source its `Input`, or the error that says why there is none."""
        images = ["" if source.image is None else IMAGE_PLACE for source in sources]
        pairs = zip(sources, images, strict=True)
        cut = slice(self.max_chars)  # before long strings are put together, for each of the sources
        prompts = [SYSTEM_PART.format(one.instruction[cut]) + image + one.text[cut] + END for one, image in pairs]
        results: list[Input | ServiceError] = []
        for source, token_ids in zip(sources, self.encode(prompts), strict=True):
            try:
                results.append(self.prepare(source, token_ids))
            except ServiceError as error:
                results.append(error)
        return results

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        cut = [prompt[: self.max_chars] for prompt in prompts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(cut)]  # releases the interpreter lock

    def prepare(self, source: Source, token_ids: list[int]) -> Input:
        prefix = self.prefix_ids(source.instruction[: self.max_chars])
        image = dict[str, Any]()
        if source.image is not None:
            pixels = np.asarray(self.read_image(source.image))
            rows, columns, start = pixels.shape[0] // TOKEN, pixels.shape[1] // TOKEN, len(prefix) + 1
            if start + rows * columns > self.max_length:
                sentence = f"The image's {rows * columns} tokens and the {start} before it are over {self.max_length}"
                raise InputError(f"{sentence}: send a shorter prompt, or raise GME_MAX_LENGTH on the server.")
            token_ids = token_ids[:start] + [token_ids[start]] * (rows * columns) + token_ids[start + 1 :]
            blocks = pixels.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            patches = np.ascontiguousarray(blocks).reshape(-1, 3 * PATCH**2)
            image = {"image_start": start, "grid": (2 * rows, 2 * columns), "patches": patches}
        TRUNCATED.inc(len(token_ids) > self.max_length)
        ids, prefix = np.array(token_ids[: self.max_length], np.int64), prefix[: self.max_length]
        shared = min(len(prefix), len(ids) - 1)
        differs = np.flatnonzero(ids[:shared] != prefix[:shared])  # white space at the start of a text joins "user\n"
        return Input(ids, prefix, int(differs[0]) if differs.size else shared, **image)

    def read_image(self, data: bytes) -> Image.Image:
        """The first frame of an image file, upright, in RGB and resized. Raises `InputError` or `TooLargeError`."""
        try:
            head, *scans = JPEG_SCAN.split(data, MAX_SCANS + 1) if data.startswith(b"\xff\xd8") else [b""]
            if len(scans) > MAX_SCANS or head.count(b"Exif\0\0") > 8:
                raise ValueError("The JPEG has more scans or EXIF segments than a photo.")
            if data[4:8] == b"ftyp":  # AVIF: Pillow would read all its EXIF, but turns it by its irot and imir boxes
                data = re.sub(rb"(?s)(infe.{8,10}?)Exif", rb"\1skip", data)
            with Image.open(file := ImageFile(data), formats=FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self.max_pixels or max(image.size) > MAX_SIDE:
                    raise Image.DecompressionBombError  # as Pillow does
                file.deadline += pixels / PIXELS_PER_SECOND
                with self.turn, self.decoding:  # in turn, so that small images do not hold off a large one
                    self.decoding.wait_for(lambda: self.free_pixels >= pixels)
                    self.free_pixels -= pixels
                try:
                    return resize_twice(upright(image), self.max_image_tokens)
                finally:
                    with self.decoding:
                        self.free_pixels += pixels
                        self.decoding.notify_all()
        except MemoryError:
            raise
        except Image.DecompressionBombError:
            limits = f"{self.max_pixels} pixels in all and {MAX_SIDE} on a side"
            raise TooLargeError(f"The image has more pixels than are accepted ({limits}): scale it down.") from None
        except Exception:  # Pillow's decoders raise whatever a broken file makes them trip over
            log.debug("An image could not be decoded.", exc_info=True)
        raise InputError(f"The image cannot be decoded: send a whole file in one of the formats {', '.join(FORMATS)}.")


# ------------------------------------------------------------------------------------------------------- 4. Model


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """A linear layer; with the weight of a gate, times silu of what that gives."""
    out = functional.linear(x, weight, bias)
    return out if gate is None else functional.silu(functional.linear(x, gate)) * out


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding of x (..., head_dim), whose halves make the pairs, by angles (..., head_dim / 2)."""
    cos, sin, (first, second) = angles.cos(), angles.sin(), x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def speed_up_on_cpu(dtype: torch.dtype, small: bool) -> tuple[Callable[..., Tensor], ...]:
    """Set torch up for a CPU. Returns what lays a weight out, multiplies by it, and attends within an image."""
    x86, amx = platform.machine() == "x86_64", torch.cpu.get_capabilities().get("amx_bf16")
    if small:
        torch.set_num_threads(1)  # the products of a small model are too short for two
    if x86 and not amx:
        torch.set_float32_matmul_precision("medium")  # oneDNN in place of MKL; with AMX, and on ARM, it would round

    def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Head by head and 512 queries at a time: twice as fast as torch's own in bfloat16."""
        out = torch.empty_like(query)
        query, key, value = query * query.shape[-1] ** -0.5, key.contiguous(), value.contiguous()
        for q, k, v, o in zip(query[0], key[0], value[0], out[0], strict=True):
            for chunk, rows in zip(q.split(512), o.split(512), strict=True):
                torch.matmul((chunk @ k.T).softmax(-1), v, out=rows)
        return out

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise
        if gate is None:
            return pointwise.default(x, weight, bias, "none", [], "")
        return pointwise.binary(x, pointwise.default(x, gate, None, "swish", [], ""), weight, bias, "mul")

    attend = attend_in_chunks if dtype == torch.bfloat16 else functional.scaled_dot_product_attention
    if x86 and dtype != torch.float16:
        try:  # these operators are private to torch: they have to be there, and to give what its public ones give
            # Once, and not in every call: 1.7 times as fast for a lone short text.
            lay_out = functools.partial(torch.ops.mkldnn._reorder_linear_weight, batch_size=512)
            x, weight, bias = (torch.randn(shape).to(dtype) / 8 for shape in ((3, 64), (64, 64), 64))
            packed, expected = lay_out(weight), multiply(multiply(x, weight, bias), weight, bias, weight)
            found = fused(fused(x, packed, bias), packed, bias, packed)
            if not torch.allclose(found, expected, rtol=0.02, atol=0.002):
                raise RuntimeError("their products differ")
            return lay_out, fused, attend
        except (AttributeError, RuntimeError, TypeError) as error:
            log.info("torch's own products are used, as its oneDNN operators are not as expected: %.200r", error)
    return Tensor.clone, multiply, attend


class Model:
    """Qwen2-VL, for one thread at a time. A weight is read when it is first used, and `check` uses all."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        names = ("config.json", "preprocessor_config.json")
        config, self.processor = (json.loads((directory / name).read_bytes()) for name in names)
        if "embed_dim" not in config.get("vision_config", {}):
            raise StartError(f"{directory} is no Qwen2-VL checkpoint: its config.json has no vision_config.embed_dim.")
        self.text, self.vision = config.get("text_config", config), config["vision_config"]
        self.directory, self.device, self.dtype, self.dimension = directory, device, dtype, self.text["hidden_size"]
        small = sum(path.stat().st_size for path in weight_files(directory)) < 200_000_000
        plain: tuple[Callable[..., Tensor], ...] = Tensor.clone, multiply, functional.scaled_dot_product_attention
        self.lay_out, self.multiply, self.attend = speed_up_on_cpu(dtype, small) if device.type == "cpu" else plain
        self.weights, self.stored = dict[str, Tensor](), dict[str, Callable[[], Tensor]]()
        for file in [safe_open(path, framework="pt") for path in weight_files(directory)]:
            for name in file.keys():  # noqa: SIM118  # a file is no mapping
                # a current transformers saves other names than the published ones
                published = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
                self.stored[published] = functools.partial(file.get_tensor, name)
        self.kept_states = functools.lru_cache(16)(self.prefix_states)

    def weight(self, name: str, *shape: int, exact: bool = False, packed: bool = False) -> Tensor:
        """Read straight into its final dtype and place. Raises `StartError` when it is missing or misshapen."""
        if name not in self.weights:
            found = self.stored[name]() if name in self.stored else None
            if found is None or found.shape != shape:
                raise StartError(f"{self.directory}: the weight {name} is missing, or has not the shape {shape}.")
            weight = found.to(self.device, torch.float32 if exact else self.dtype)
            self.weights[name] = self.lay_out(weight) if packed else weight.clone()  # the file's own may change
        return self.weights[name]

    def linear(self, x: Tensor, name: str, width: int, biased: bool = True, gate: str | None = None) -> Tensor:
        shape = width, x.shape[-1]
        weight = self.weight(f"{name}.weight", *shape, packed=True)
        bias = self.weight(f"{name}.bias", width) if biased else None
        gate_weight = self.weight(f"{gate}.weight", *shape, packed=True) if gate else None
        return self.multiply(x.to(self.dtype), weight, bias, gate_weight)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm in the decoder, layer norm in the vision tower: in float32, whatever the dtype of the model."""
        weight = self.weight(f"{name}.weight", x.shape[-1], exact=True)
        if name.startswith("model."):
            return functional.rms_norm(x, weight.shape, weight, self.text["rms_norm_eps"])
        bias = self.weight(f"{name}.bias", x.shape[-1], exact=True)
        return functional.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def see(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """The vision tower: token embeddings (P / 4, D) of an image's uint8 patches (P, 588)."""
        width, heads, device = self.vision["embed_dim"], self.vision["num_heads"], self.device
        mean, std = (torch.tensor(self.processor[f"image_{x}"], device=device)[:, None] for x in ("mean", "std"))
        pixels = (patches.view(-1, 3, PATCH**2).float() / 255 - mean) / std
        # The published layer is a convolution over two frames, which are the same for a still image.
        patch = self.weight("visual.patch_embed.proj.weight", width, 3, 2, PATCH, PATCH, exact=True).sum(2)
        hidden = functional.linear(pixels.flatten(1), patch.flatten(1))  # (P, width)
        places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        places = places.view(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2)  # the four of each token together
        pairs = width // heads // 4  # of numbers in a head, for the row and for the column each
        angles = places.reshape(-1, 2, 1) / 10000 ** (torch.arange(pairs, device=device) / pairs)
        for block in (f"visual.blocks.{number}" for number in range(self.vision["depth"])):
            qkv = self.linear(self.norm(hidden, f"{block}.norm1"), f"{block}.attn.qkv", 3 * width)
            qkv = qkv.view(-1, 3, 1, heads, width // heads).permute(1, 2, 3, 0, 4)  # (3, 1, heads, P, head_dim)
            query, key = rotate(qkv[:2], angles.flatten(1))
            attended = self.attend(query, key, qkv[2])[0].transpose(0, 1).flatten(1)  # (P, width)
            hidden += self.linear(attended, f"{block}.attn.proj", width)
            for part in hidden.split(512 if device.type == "cpu" else len(hidden)):  # views: so few stay in the cache
                inner = self.linear(self.norm(part, f"{block}.norm2"), f"{block}.mlp.fc1", 4 * width)
                part += self.linear(torch.sigmoid(1.702 * inner).mul_(inner), f"{block}.mlp.fc2", width)  # quick_gelu
        merged = self.norm(hidden, "visual.merger.ln_q").view(-1, 4 * width)
        inner = functional.gelu(self.linear(merged, "visual.merger.mlp.0", 4 * width))
        return self.linear(inner, "visual.merger.mlp.2", self.dimension)

    def embedded(self, token_ids: Tensor) -> Tensor:
        weight = self.weight("model.embed_tokens.weight", self.text["vocab_size"], self.dimension)
        return functional.embedding(token_ids.to(self.device), weight)

    def read(self, hidden: Tensor, last: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The decoder: final hidden states (B, D) at `last` (B,) of token embeddings (B, T, D) that follow `past`.

        Also returns each layer's keys and values (2, B, groups, T, head_dim). As in the authors' forward, token i has
        position i on all rotary axes, image tokens too. The residual stream is float32 for its precision and its range.
        """
        config, device, (batch, length, width) = self.text, self.device, hidden.shape
        heads, groups, inner = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        before, head_dim, pairs = past[0].shape[3] if past else 0, width // heads, width // heads // 2
        positions = torch.arange(before, before + length, device=device)
        angles = positions[:, None, None] / theta ** (torch.arange(pairs, device=device) / pairs)  # (T, 1, pairs)
        mask = positions[:, None] >= torch.arange(before + length, device=device) if past else None
        sizes = {"q": width, "k": groups * head_dim, "v": groups * head_dim}
        hidden, states = hidden.float(), list[Tensor]()
        for number in range(config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            normed = self.norm(hidden, f"{layer}.input_layernorm")
            projected = (self.linear(normed, f"{layer}.self_attn.{x}_proj", size) for x, size in sizes.items())
            query, key, value = (x.unflatten(2, (-1, head_dim)) for x in projected)
            states.append(torch.stack((rotate(key, angles), value)).transpose(2, 3))
            both = torch.cat((past[number].expand(-1, batch, -1, -1, -1), states[-1]), 3) if past else states[-1]
            key, value = both.repeat_interleave(heads // groups, 2)
            query = rotate(query, angles).transpose(1, 2)
            out = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=not past)
            out = out.transpose(1, 2).flatten(2)  # (B, T, D)
            if number == config["num_hidden_layers"] - 1:  # of which only the pooled tokens go on
                hidden, out = (x[torch.arange(batch, device=device), last] for x in (hidden, out))
            hidden += self.linear(out, f"{layer}.self_attn.o_proj", width, biased=False)
            normed = self.norm(hidden, f"{layer}.post_attention_layernorm")
            gated = self.linear(normed, f"{layer}.mlp.up_proj", inner, biased=False, gate=f"{layer}.mlp.gate_proj")
            hidden += self.linear(gated, f"{layer}.mlp.down_proj", width, biased=False)
        return self.norm(hidden, "model.norm"), states

    def prefix_states(self, token_ids: tuple[int, ...]) -> list[Tensor]:
        ids, last = (torch.tensor(x, device=self.device) for x in ([token_ids], [0]))
        return self.read(self.embedded(ids), last, past=[])[1]

    @torch.inference_mode()
    def forward(self, inputs: Sequence[Input]) -> Tensor:
        """Embeddings (B, D), float32: the last token's final hidden state, L2-normalised, as the authors pool."""
        shared, prefix = min(one.shared for one in inputs), inputs[0].prefix
        rows = [torch.from_numpy(one.token_ids[shared:]) for one in inputs]
        hidden = self.embedded(nn.utils.rnn.pad_sequence(rows, batch_first=True))  # (B, T, D); none sees padding
        for row, one in enumerate(inputs):
            if one.patches is not None:
                image = self.see(torch.from_numpy(one.patches).to(self.device), *one.grid)
                hidden[row, one.image_start - shared :][: len(image)] = image
        # 256 tokens of the 2B model take 7 MB in bfloat16: what is longer is computed again
        states = (self.kept_states if len(prefix) <= 256 else self.prefix_states)(prefix) if shared else []
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        return functional.normalize(self.read(hidden, last, [one[:, :, :, :shared] for one in states])[0], dim=-1)

    def embed(self, inputs: Sequence[Input]) -> np.ndarray:
        """L2-normalised embeddings (len(inputs), dimension), float32, of inputs that share their instruction.

        Raises `MemoryError` when the batch does not fit, and `DeviceError` when the device cannot go on.
        """
        try:
            return self.forward(inputs).cpu().numpy()
        except torch.AcceleratorError as error:
            raise DeviceError(f"The device {self.device} cannot go on: {error}") from None
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise MemoryError("The batch does not fit into the device's memory.") from None

    def check(self, texts: Sequence[Input]) -> None:
        """A probe: texts, the first with a small image, embedded together, and alone without the prefix cache.

        `texts` share their instruction and have at least 8 tokens behind it. Raises `StartError` when the two disagree
        by more than the dtype rounds: a library that changed must not mean wrong embeddings.
        """
        noise = np.random.default_rng(0).integers(0, 256, (16, 588), np.uint8)  # 4 x 4 patches
        inputs = [replace(texts[0], image_start=texts[0].shared + 2, grid=(4, 4), patches=noise), *texts[1:]]
        alone = np.concatenate([self.embed([replace(one, shared=0)]) for one in inputs])
        distance = 1 - (self.embed(inputs) * alone).sum(1).min()
        self.stored.clear()  # all weights are read: this closes their files
        if not distance <= (1e-5 if self.dtype == torch.float32 else 1e-3):  # of rounding alone
            reason = f"An image and a text have other embeddings together than alone (1 - cosine is {distance:.2g})"
            raise StartError(f"{reason}: install the versions of requirements.txt, not torch {torch.__version__}.")


def choose_device(device_name: str, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """Where to compute and in what; `auto` is what suits. Raises `StartError` for a device that cannot be used."""
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device_name)
        torch.ones(1, device=device).item()  # "meta" has no numbers
    except torch.OutOfMemoryError:
        raise  # the process before this one may still hold the memory: systemd tries again
    except (RuntimeError, AssertionError) as error:
        raise StartError(f"GME_DEVICE={device_name} cannot be used: {str(error).splitlines()[0]}") from None
    if dtype_name == "auto":
        native = any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())
        dtype_name = "float16" if device.type == "cuda" else "bfloat16" if native else "float32"
    return device, getattr(torch, dtype_name)


# ----------------------------------------------------------------------------------------------------- 5. Batcher

MAX_PADDING = 0.2  # of a batch's tokens
AHEAD_BATCHES = 4  # how much is prepared ahead of the model; a prepared image takes 2.4 kB a token
PREPARE_THREADS = min(4, max(2, os.cpu_count() or 1))
SECONDS = [2.0**n for n in range(-8, 10)]  # 4 ms to 8.5 min: a long queue on a CPU takes minutes
QUEUE_SECONDS = Histogram("gme_queue_seconds", "Time that an input waits for the model.", buckets=SECONDS)
MODEL_SECONDS = Histogram("gme_model_seconds", "Time that the model takes for one batch.", buckets=SECONDS)
BATCH_INPUTS = Histogram("gme_batch_inputs", "Distinct inputs in one batch.", buckets=[2**n for n in range(12)])
CACHE_HITS = Counter("gme_cache_hits", "Inputs answered from the cache of recent embeddings.")
ENDING = "The service is ending: try again in a moment."
Order = tuple[int, int]  # (Batcher.clock at arrival + rank in its request, number of the request): lowest first
Embedding = tuple[np.ndarray, int]  # with the number of its input's tokens
Future = asyncio.Future[Embedding]


class Unprepared(NamedTuple):
    order: Order
    arrived: float
    source: Source
    future: Future


@dataclass(slots=True)
class Ready:
    """An input that waits for the model."""

    input: Input
    order: Order
    arrived: float
    futures: dict[Future, str]  # of all who want its embedding, each with what its error begins with

    @property
    def wanted(self) -> bool:
        return not all(future.done() for future in self.futures)


def settle(futures: Mapping[Future, str], result: Embedding | ServiceError) -> None:
    for future, name in futures.items():
        if future.done():
            continue
        if isinstance(result, ServiceError):
            future.set_exception(type(result)(f"{name}{result}"))
        else:
            future.set_result(result)


def isolate(function: Callable[[Any], Iterable[Any]], items: Sequence[Any]) -> list[Any]:
    """`function(items)`; where it raises, halves the items until those it raises for have an error as result."""
    try:
        return list(function(items))
    except DeviceError:
        raise
    except MemoryError:
        error: ServiceError = TooLargeError("This input does not fit into the server's memory: send a smaller one.")
    except BaseException as fault:  # a panic of the tokenizers library is no Exception
        error = ServiceError("This input could not be embedded, through a fault of the service: its log says more.")
        if len(items) == 1:
            log.error("An input could not be embedded.", exc_info=fault)
    half = len(items) // 2
    return isolate(function, items[:half]) + isolate(function, items[half:]) if half else [error]


class Batcher:
    """Gathers the inputs of all requests into batches for the one thread that runs the model.

    The policy is start-time fair queueing. A request's inputs, shortest first, are numbered from where the queue has
    got to; the lowest number goes first, the oldest request first among equals. So a lone query waits for the batch
    under way and its own, and a bulk job keeps a place in every batch.

    The event loop owns all state. Threads run `prepare` and `compute`, and nothing else.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Source]], Iterable[Input | ServiceError]],
        compute: Callable[[Sequence[Input]], Iterable[np.ndarray]],
        max_tokens: int,
        max_queue: int = 16384,
        cache_entries: int = 0,
    ) -> None:
        self.prepare, self.compute = prepare, compute
        self.on_death: Callable[[], object] = lambda: None
        self.max_tokens, self.max_queue, self.cache_entries = max_tokens, max_queue, cache_entries
        self.threads, self.model_thread = ThreadPoolExecutor(PREPARE_THREADS), ThreadPoolExecutor(1)
        self.unprepared: list[Unprepared] = []  # a heap
        self.preparing: list[Order] = []  # the lowest of each chunk under way
        self.ready: dict[bytes, Ready] = {}  # by key of the input: equal ones are computed once
        self.computing: dict[bytes, Ready] = {}  # the batch under way
        self.cache: OrderedDict[bytes, Embedding] = OrderedDict()
        self.open: set[Future] = set()  # of all inputs of the requests under way
        self.clock = self.requests = 0  # how far the queue has got, in inputs; requests so far
        self.changed, self.alive = asyncio.Event(), True

    async def embed(self, sources: Sequence[Source]) -> tuple[np.ndarray, int]:
        """Embeddings (len(sources), dimension), float32, of a request, and how many tokens the model reads for them.

        What still waits is dropped when this is cancelled, as for a client that left. Raises the `ServiceError` of an
        input that has one, and `BusyError` when the queue is full.
        """
        if not self.alive:
            raise BusyError(ENDING)
        if len(self.open) + len(sources) > self.max_queue:
            raise BusyError(BusyError.example)
        self.requests += 1
        loop, arrived = asyncio.get_running_loop(), time.perf_counter()
        futures: list[Future] = [loop.create_future() for _ in sources]
        shortest_first = sorted(zip(sources, futures, strict=True), key=lambda pair: pair[0].weight)
        for rank, (source, future) in enumerate(shortest_first):
            order = (self.clock + rank, self.requests)
            heapq.heappush(self.unprepared, Unprepared(order, arrived, source, future))
        self.open.update(futures)
        self.notify()
        try:
            embeddings = await asyncio.gather(*futures)
        except BaseException:
            for future in futures:
                future.cancel()
            self.unprepared = [one for one in self.unprepared if not one.future.done()]
            heapq.heapify(self.unprepared)
            self.notify()
            raise
        finally:
            self.open.difference_update(futures)
        return np.array([embedding for embedding, _ in embeddings]), sum(tokens for _, tokens in embeddings)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests for as long as this context lasts."""
        loops = [self.compute_batches(), *(self.prepare_ahead() for _ in range(PREPARE_THREADS))]
        tasks = [asyncio.create_task(loop) for loop in loops]
        for task in tasks:
            task.add_done_callback(self.end)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def end(self, task: asyncio.Task[None]) -> None:
        """A task has ended, by a fault or with the service: no request can be answered any more."""
        self.alive = False
        settle(dict.fromkeys(self.open, ""), BusyError(ENDING))
        if not task.cancelled():
            log.critical("The batcher has ended.", exc_info=task.exception())
            self.on_death()

    def notify(self) -> None:
        """Wake the loops below, to see whether there is something to do."""
        self.changed.set()
        self.changed.clear()

    async def prepare_ahead(self) -> None:
        """Prepare chunk after chunk; a few of these loops run side by side."""
        loop = asyncio.get_running_loop()
        while True:
            while not (chunk := self.next_chunk()):
                await self.changed.wait()
            self.preparing.append(chunk[0].order)
            prepared = await loop.run_in_executor(self.threads, isolate, self.prepare, [one.source for one in chunk])
            self.preparing.remove(chunk[0].order)
            for (order, arrived, source, future), one in zip(chunk, prepared, strict=True):
                if isinstance(one, ServiceError):
                    settle({future: source.name}, one)
                elif one.key in self.cache:
                    CACHE_HITS.inc()
                    self.cache.move_to_end(one.key)
                    settle({future: source.name}, self.cache[one.key])
                elif equal := self.computing.get(one.key) or self.ready.get(one.key):
                    equal.order = min(equal.order, order)
                    equal.futures[future] = source.name
                else:
                    self.ready[one.key] = Ready(one, order, arrived, {future: source.name})
            self.notify()

    def next_chunk(self) -> list[Unprepared]:
        """The next to prepare, in order: none while AHEAD_BATCHES batches that go before it are ready."""
        chunk: list[Unprepared] = []
        if not self.unprepared:
            return chunk
        costs = sorted((one.order, one.input.cost) for one in self.ready.values() if one.wanted)
        sums, enough = itertools.accumulate(cost for _, cost in costs), AHEAD_BATCHES * self.max_tokens
        last = next((order for (order, _), tokens in zip(costs, sums, strict=True) if tokens >= enough), (math.inf, 0))
        weight = 0
        while self.unprepared and self.unprepared[0].order <= last:
            weight += self.unprepared[0].source.weight
            if chunk and weight > CHUNK_WEIGHT:
                break
            chunk.append(heapq.heappop(self.unprepared))
        return chunk

    async def compute_batches(self) -> None:
        """Compute batch after batch."""
        loop = asyncio.get_running_loop()
        while True:
            while not (batch := self.next_batch()):
                await self.changed.wait()
            self.computing = {one.input.key: one for one in batch}
            self.notify()  # there is room to prepare more
            inputs = [one.input for one in batch]
            with MODEL_SECONDS.time():
                results = await loop.run_in_executor(self.model_thread, isolate, self.compute, inputs)
            for one, result in zip(batch, results, strict=True):
                if isinstance(result, np.ndarray) and not np.isfinite(result).all():
                    result = ServiceError("The embedding is not finite: set GME_DTYPE to bfloat16 on the server.")
                    log.error(str(result))
                if isinstance(result, np.ndarray):  # a row of it would keep its whole batch in memory
                    result = self.cache[one.input.key] = result.copy(), len(one.input.token_ids)
                settle(one.futures, result)
            while len(self.cache) > self.cache_entries:
                self.cache.popitem(last=False)
            self.computing = {}

    def next_batch(self) -> list[Ready]:
        """The best batch of what is ready: the first in order, and of those behind it the nearest to it in length.

        Candidates follow in order, share its instruction and fit into the batch's tokens. Of these, nearest first, the
        longest run is taken that makes a batch with at most MAX_PADDING.
        """
        self.ready = {key: one for key, one in self.ready.items() if one.wanted}
        in_order = sorted(self.ready.values(), key=lambda one: one.order)
        if not in_order:
            return []
        first = in_order[0]
        alike = [one for one in in_order if one.input.prefix == first.input.prefix]
        sums = itertools.accumulate(one.input.cost for one in alike)
        fitting = [one for one, tokens in zip(alike, sums, strict=True) if one is first or tokens <= self.max_tokens]
        fitting.sort(key=lambda one: abs(one.input.cost - first.input.cost))
        size, num_tokens, longest = 1, 0, 0
        for count, one in enumerate(fitting, start=1):
            num_tokens, longest = num_tokens + one.input.cost, max(longest, one.input.cost)
            num_padded = count * longest
            if num_padded <= self.max_tokens and num_tokens >= (1 - MAX_PADDING) * num_padded:
                size = count
        # New requests are numbered from the lowest order that is not computed, or 1 higher than before this batch.
        waiting = [first.order, *self.preparing, *(one.order for one in self.unprepared[:1])]
        self.clock = max(self.clock + 1, min(waiting)[0])
        BATCH_INPUTS.observe(size)
        for one in fitting[:size]:
            QUEUE_SECONDS.observe(time.perf_counter() - one.arrived)
            del self.ready[one.input.key]
        return fitting[:size]


# -------------------------------------------------------------------------------------------------------- 6. HTTP
#
# Protected against here: a wrong key, before the body is read; the size of a body as it comes, and of all together;
# JSON and forms of millions of parts; too many inputs; a full queue. Section 3 bounds images, section 5 what one
# input does to others. Left to the proxy (deploy/nginx.conf): slow clients, dead connections, floods of pipelined
# requests, TLS; to uvicorn's h11: floods of headers; to systemd: memory that runs away.

INPUTS = Counter("gme_inputs", "Inputs answered, by kind.", ["kind"])
TOKENS = Counter("gme_tokens", "Tokens of the inputs answered.")
QUEUE_DEPTH = Gauge("gme_queue_inputs", "Inputs without an answer.")
INFO = Gauge("gme_info", "The model and the service.", ["model", "device", "dtype", "version"])
OPEN_PATHS = ("/", "/health", "/metrics", "/docs", "/openapi.json")  # and what lies below /docs/static
MAX_OPEN_BODIES = 32  # bodies of the largest size in memory at a time
LINGER_BODIES, LINGER_SECONDS = 8, 60  # a refused body is read on for so many times the largest size, and so long
FORM = (
    "body: send a multipart form in UTF-8 with one or more files in the field `file` (with curl: -F file=@photo.jpg),"
    " and no other fields than `text` and `prompt`, once each."
)
DATA_URI = re.compile(r"\s*data:(\w+/[^,]*|;[^,]*),", re.IGNORECASE)  # and no text that begins with "data: "
# clients send these values, which hold anyway
IGNORED = {"normalized": True, "embedding_type": "float", "truncate": True, "late_chunking": False}
INSTEAD = dict.fromkeys(("instruction", "input_type", "task", "prompt_name"), "prompt, with the instruction itself")
ITEM = 'input, for example [{"text": "a red circle", "image": "data:image/png;base64,iVBORw0KGgo="}]'
INSTEAD |= {"messages": ITEM, "modality": ITEM}
PROMPT = "The instruction: give one with queries, none with documents."
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"  # of a pixel
EXAMPLE = ["a red circle", {"image": f"data:image/png;base64,{PNG}"}]
OPENAI_INPUT = "A text, an image's data URI, or a list of these and of objects with `text`, `image` (base64) or both."
B = TypeVar("B", bound=BaseModel)


class Texts(BaseModel):
    texts: list[str] = Field(description="One embedding each.", examples=[["a red circle", "红色圆形"]], fail_fast=True)
    prompt: str | None = Field(None, description=PROMPT)


class ImageForm(BaseModel):
    file: list[bytes] = Field(description="One or more image files: one embedding each.")
    text: str = Field("", description="A text to fuse with each image.", examples=[""])
    prompt: str = Field("", description=PROMPT, examples=[""])


class OpenAIRequest(BaseModel, json_schema_extra={"examples": [{"input": EXAMPLE}]}):
    input: Any = Field(description=OPENAI_INPUT, examples=[EXAMPLE])
    model: str | None = Field(None, description="Any name: there is one model.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="Only the model's own.")
    user: str | None = Field(None, description="Ignored.")
    prompt: str | None = Field(None, description=PROMPT)


def example(answer: object) -> dict[str, Any]:
    return {"content": {"application/json": {"example": answer}}}


def described(body: type[BaseModel], media_type: str, answer: object) -> dict[str, Any]:
    """What the page /docs shows of a route that reads its body by itself."""
    request = {"required": True, "content": {media_type: {"schema": body.model_json_schema()}}}
    answers = {"200": {"description": "The embeddings."} | example(answer)}
    return {"requestBody": request, "responses": answers}


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, headers, "application/json")


def route_path(request: Request) -> str:
    return str(request.scope["path"]).removeprefix(request.scope.get("root_path", ""))


def error_response(request: Request, status: int, sentence: str, more: Mapping[str, str] | None = None) -> Response:
    """`detail` for our clients and those made for Jina's service; on OpenAI's routes also `error`, for theirs."""
    body: dict[str, Any] = {"detail": sentence}
    if route_path(request).startswith("/v1/"):
        types = {401: "authentication_error", 500: "server_error", 503: "server_error"}
        body["error"] = {"message": sentence, "type": types.get(status, "invalid_request_error"), "code": None}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
    return json_response(body, status, headers.get(status, more))


async def on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # which nobody reads
    if isinstance(error, HTTPException):  # FastAPI's own, for a route or a method that there is not
        return error_response(request, error.status_code, error.detail, error.headers)
    if isinstance(error, ServiceError):
        return error_response(request, error.status, str(error))
    return error_response(request, ServiceError.status, ServiceError.example)


class Guard:
    """ASGI middleware in front of all routes: the API key, the size of bodies, and refusals that clients get to see.

    A client that is still sending when its connection ends may not see the answer. So an answer that comes early is
    sent but for its end, which waits until the rest of the body has been read and dropped, up to a bound.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.key, self.max_body = app, settings.api_key, int(settings.max_body_mb * 2**20)
        self.too_large = TooLargeError(f"The body is over {settings.max_body_mb:g} MB: send less in one request.")
        self.open_bytes = 0  # of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, held = Request(scope), 0
        coming = "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"

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

        async def send_and_drain(message: Message) -> None:
            if coming and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif coming and not message.get("more_body"):
                await send({**message, "more_body": True})
                message, dropped, more = {"type": "http.response.body"}, 0, True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while more and dropped < LINGER_BODIES * self.max_body:
                            rest = await receive()
                            dropped, more = dropped + len(rest.get("body", b"")), rest.get("more_body", False)
            await send(message)

        refusal = self.refusal(request)
        try:
            app = error_response(request, refusal.status, str(refusal)) if refusal else self.app
            await app(scope, receive_counted, send_and_drain)
        finally:
            self.open_bytes -= held

    def refusal(self, request: Request) -> ServiceError | None:
        """Why the request is refused before its body is read."""
        path, (scheme, _, key) = route_path(request), request.headers.get("authorization", "").partition(" ")
        if request.method not in HTTPMethod.__members__:  # it would become a label of the metrics
            return MalformedError("The request has a method that HTTP does not know.")
        if self.key and path not in OPEN_PATHS and not path.startswith("/docs/static"):
            same = secrets.compare_digest(key.strip(" \t").encode("latin-1"), self.key.encode())
            if scheme.lower() != "bearer" or not same:
                return KeyRefusedError(KeyRefusedError.example)
        return self.too_large if int(request.headers.get("content-length", "0")) > self.max_body else None


async def read_json(request: Request, kind: type[B], max_inputs: int) -> B:
    """The body as JSON of that kind. Raises `MalformedError`, or `TooLargeError` for millions of values."""
    body = await request.body()
    # A parser takes seconds for 32 MB of small values: what lies outside the strings is bounded first.
    unescaped, bound = body.replace(rb"\\", b"").replace(rb"\"", b""), 64 * max_inputs + 100_000
    if unescaped.count(b'"') > bound or sum(map(len, unescaped.split(b'"')[::2])) > bound:
        raise TooLargeError("The body has too many values: send fewer inputs, and texts instead of token ids.")
    try:
        values = orjson.loads(body)
    except ValueError as error:
        raise MalformedError(f"body: it is not JSON in UTF-8 ({error}).") from None
    if not isinstance(values, dict):
        raise MalformedError(f"body: send a JSON object with the fields {', '.join(kind.model_fields)}.")
    for name, value in values.items():
        if name in kind.model_fields or value is None or IGNORED.get(name) == value:
            continue
        if name in IGNORED:
            raise MalformedError(f"{name} can only be {json.dumps(IGNORED[name])}: leave it out.")
        instead = INSTEAD.get(name, ", ".join(kind.model_fields))
        raise MalformedError(f"{name[:50]} is not a field of this route: use {instead}.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)[:3]
        named = (([str(x + 1 if isinstance(x, int) else x) for x in fault["loc"]], fault["msg"]) for fault in faults)
        sentences = (f"{'.'.join(names) or 'body'}: {message}." for names, message in named)
        raise MalformedError(" ".join(sentences)) from None


async def read_form(request: Request, max_files: int) -> tuple[list[tuple[str, bytes]], dict[Any, str]]:
    """The files (name, content) and other fields of a multipart form, kept in memory. Raises `MalformedError`."""
    kind, options = multipart.parse_options_header(request.headers.get("content-type"))
    parts: list[Any] = []
    done: list[bool] = []
    try:
        callbacks, config = (parts.append, parts.append, lambda: done.append(True)), {"MAX_MEMORY_FILE_SIZE": math.inf}
        parser = multipart.FormParser(kind.decode(), *callbacks, options.get(b"boundary"), config=config)
        async for chunk in request.stream():
            parser.write(chunk)
            check_count(max(1, len(parts) - 2), max_files)
        if not done:
            raise ValueError("it ends before its last boundary")
        found: list[Any] = [part for part in parts if isinstance(part, multipart.File) and part.field_name == b"file"]
        others: list[Any] = [part for part in parts if isinstance(part, multipart.Field)]
        fields = {part.field_name: part.value or b"" for part in others if part.field_name in (b"text", b"prompt")}
        if not found or len(found) + len(fields) < len(parts):
            raise MalformedError(FORM)
        files = [((file.file_name or b"").decode(errors="replace"), file.file_object.getvalue()) for file in found]
        return files, {name: value.decode() for name, value in fields.items()}
    except ValueError as error:
        raise MalformedError(f"{FORM} What came cannot be read: {error}.") from None


def read_item(item: Any, name: str, instruction: str) -> Source:
    """An item of OpenAI's `input`: a text, an image's data URI, or an object with `text`, `image` or both."""
    if isinstance(item, str):
        item = {"image": item} if DATA_URI.match(item) else {"text": item}
    valid = isinstance(item, dict) and item.keys() <= {"text", "image"} and any(x is not None for x in item.values())
    if not valid or not all(isinstance(value, str | None) for value in item.values()):
        either = "send a text, or an object with `text`, `image` or both"
        raise InputError(f"{name}{either}, and no token ids (in LangChain: check_embedding_ctx_length=False).")
    text, image = item.get("text") or "", item.get("image")
    if image is None:
        return Source(text, None, instruction, name)
    uri = DATA_URI.match(image)
    encoded = image[uri.end() if uri else 0 :].encode(errors="replace").translate(None, b" \t\r\n")
    try:
        head = uri[1].lower().replace(" ", "") if uri else "image/;base64"
        if not head.startswith("image/") or not head.endswith(";base64"):
            raise ValueError("It is another kind of data URI.")
        return Source(text, base64.b64decode(encoded, validate=True), instruction, name)
    except ValueError:
        raise InputError(f"{name}send an image as base64 or as its data URI (a URL is never fetched).") from None


def check_count(inputs: int, most: int) -> None:
    """Raises `InputError` or `TooLargeError`."""
    if not inputs:
        raise InputError(InputError.example)
    if inputs > most:
        raise TooLargeError(f"The request has more than {most} inputs: send fewer.")


async def embed(request: Request, batcher: Batcher, sources: Sequence[Source], most: int) -> tuple[np.ndarray, int]:
    """The batcher's answer. When the client leaves before it is there, what is not computed yet never is."""
    check_count(len(sources), most)
    answer = asyncio.ensure_future(batcher.embed(sources))
    disconnect = asyncio.ensure_future(request.receive())  # the body has been read: only a disconnect can come
    try:
        await asyncio.wait((answer, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        embeddings, tokens = answer.result()
    finally:
        answer.cancel()
        disconnect.cancel()
    for source in sources:
        INPUTS.labels("text" if source.image is None else "fused" if source.text else "image").inc()
    TOKENS.inc(tokens)
    return embeddings, tokens


def create_app(settings: Settings, batcher: Batcher, model: Model) -> FastAPI:
    """The routes over a batcher. Of `model` they read device, dtype and dimension."""
    dtype = str(model.dtype).removeprefix("torch.")
    state = {"model": settings.model_id, "device": str(model.device), "dtype": dtype, "version": __version__}
    INFO.labels(**state).set(1)
    QUEUE_DEPTH.set_function(lambda: len(batcher.open))
    app = FastAPIOffline(
        title="GME Service",
        version=__version__,
        description=f"Multimodal embeddings of text and images by `{settings.model_id}`.",
        lifespan=lambda _: batcher.running(),
        exception_handlers=dict.fromkeys((ServiceError, ClientDisconnect, HTTPException, Exception), on_error),
        redoc_url=None,
        static_url="/docs/static",
    )
    errors: dict[int | str, dict[str, Any]] = {
        kind.status: example({"detail": kind.example})
        for kind in (InputError, KeyRefusedError, TooLargeError, MalformedError, ServiceError, BusyError)
    }
    key = [Depends(HTTPBearer(auto_error=False))] if settings.api_key else []
    ours: dict[str, Any] = {"tags": ["Embeddings"], "dependencies": key, "responses": errors}
    openai: dict[str, Any] = {"tags": ["OpenAI's API"], "dependencies": key, "responses": errors}
    vector, most = [0.0134, -0.0127, 0.0451], min(settings.max_inputs, settings.max_queue)
    vectors, usage = {"embeddings": [vector]}, {"prompt_tokens": 25, "total_tokens": 25}
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    vector_list = {"object": "list", "data": data, "model": settings.model_id, "usage": usage}

    @app.post("/embed/text", **ours, openapi_extra=described(Texts, "application/json", vectors))
    async def embed_text(request: Request) -> Response:
        """One embedding per text, in their order."""
        body = await read_json(request, Texts, settings.max_inputs)
        prompt = body.prompt or DEFAULT_INSTRUCTION
        sources = [Source(text, None, prompt, f"Input {number}: ") for number, text in enumerate(body.texts, start=1)]
        return json_response({"embeddings": (await embed(request, batcher, sources, most))[0]})

    @app.post("/embed/image", **ours, openapi_extra=described(ImageForm, "multipart/form-data", vectors))
    async def embed_image(request: Request) -> Response:
        """One embedding per file, in their order: of the image alone, or of image and text together."""
        files, fields = await read_form(request, most)
        text, prompt = fields.get(b"text", ""), fields.get(b"prompt") or DEFAULT_INSTRUCTION
        names = [f"File {number} ({name[:50]}): " for number, (name, _) in enumerate(files, start=1)]
        sources = [Source(text, content, prompt, name) for name, (_, content) in zip(names, files, strict=True)]
        return json_response({"embeddings": (await embed(request, batcher, sources, most))[0]})

    @app.post("/v1/embeddings", **openai, openapi_extra=described(OpenAIRequest, "application/json", vector_list))
    async def openai_embeddings(request: Request) -> Response:
        """OpenAI's list object, with one embedding per input in their order."""
        body = await read_json(request, OpenAIRequest, settings.max_inputs)
        if body.dimensions not in (None, model.dimension):
            raise InputError(f"dimensions can only be {model.dimension}: this model was not trained to be cut.")
        items = body.input if isinstance(body.input, list) else [body.input]
        prompt = body.prompt or DEFAULT_INSTRUCTION
        sources = [read_item(item, f"Input {number}: ", prompt) for number, item in enumerate(items, start=1)]
        embeddings, tokens = await embed(request, batcher, sources, most)
        encode = (lambda one: base64.b64encode(one).decode()) if body.encoding_format == "base64" else np.asarray
        data = [{"object": "embedding", "index": n, "embedding": encode(one)} for n, one in enumerate(embeddings)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": settings.model_id, "usage": usage})

    entry = {"id": settings.model_id, "object": "model", "created": 0, "owned_by": settings.model_id.split("/")[0]}
    more = {"dimension": model.dimension, "max_length": settings.max_length}
    models = {"object": "list", "data": [entry | more]}

    @app.get("/v1/models", tags=openai["tags"], dependencies=key, responses={200: example(models), 401: errors[401]})
    async def openai_models() -> Response:
        """OpenAI's list of models: the one there is."""
        return json_response(models)

    def health_now() -> dict[str, Any]:
        status = "ok" if batcher.alive else "the batcher has ended"
        return {"status": status, **state, "dimension": model.dimension, "queue_depth": len(batcher.open)}

    ended = example(health_now() | {"status": "the batcher has ended"})

    @app.get("/health", tags=["State"], responses={200: example(health_now()), 503: ended})
    async def health() -> Response:
        """Which model runs, where, and how much waits for it."""
        return json_response(health_now(), 200 if batcher.alive else 503)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    instrumentator = Instrumentator(should_group_status_codes=False)
    instrumentator.instrument(app, latency_lowr_buckets=SECONDS).expose(app, tags=["State"])
    app.add_middleware(Guard, settings=settings)  # the last one is the first that a request meets
    return app


# --------------------------------------------------------------------------------------------------------- 7. app

PROBES = ("A red circle on white.", "harbour")  # short, as every start computes them


def build() -> FastAPI:
    """Load the model and return the app that serves it. Raises `StartError`."""
    started, settings = time.perf_counter(), Settings.load()
    device, dtype = choose_device(settings.device, settings.dtype)
    directory = find_checkpoint(settings)
    prepare = Preparer(directory, settings.max_length, settings.max_image_pixels, settings.max_image_tokens)
    model = Model(directory, device, dtype)
    model.check([one for one in prepare([Source(text) for text in PROBES]) if isinstance(one, Input)])
    # Enough to keep the device busy, and no more: a batch is as long as a lone query may have to wait.
    batch_tokens = 16384 if device.type == "cuda" else min(256 * torch.get_num_threads(), 8192)
    cache_entries = int(settings.cache_mb * 2**20 / (4 * model.dimension + 200))  # bytes, with what Python adds
    max_tokens = settings.max_batch_tokens or batch_tokens
    batcher = Batcher(prepare, model.embed, max_tokens, settings.max_queue, cache_entries)

    # The 503 of all that waits goes out, and then the process ends, for systemd to start a fresh one.
    batcher.on_death = lambda: asyncio.get_running_loop().call_later(3, os._exit, 1)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # uvicorn raises the signal again when its graceful shutdown is done: this is what it meets
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    where = f"{settings.model_id} on {device} in {model.dtype}, {model.dimension} dimensions"
    key = "an API key is needed" if settings.api_key else "no API key is needed"
    seconds = time.perf_counter() - started
    log.info("GME Service %s: %s, loaded in %.1f s from %s; %s.", __version__, where, seconds, directory, key)
    return create_app(settings, batcher, model)


def main(arguments: list[str]) -> None:
    """`python gme_service.py`: uvicorn with its own options, or one of ours. Raises `StartError`."""
    if arguments == ["--version"]:
        print(__version__)
    elif arguments == ["--verify"]:
        print(verify(Settings.load()))
    else:
        Settings.load()  # here, as a worker of uvicorn cannot pass on its exit code
        if "--help" in arguments:
            print("gme_service.py [--verify | --version | options of uvicorn, below], on all addresses and port 8000.")
            print("The settings are environment variables GME_*: see README.md.\n", flush=True)
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
