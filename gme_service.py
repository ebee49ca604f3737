"""GME Service: multimodal embeddings of text and images over HTTP, from one module.

What flows through it: a request's texts and images become token ids and pixel patches (Inputs), wait with those of
all other requests (Batcher), pass through Qwen2-VL in batches (Model), and leave as L2-normalised float32 vectors
(HTTP). The vectors are those of the model's authors' published code: README.md says where each rule comes from.
"""

import asyncio
import base64
import bisect
import contextlib
import functools
import gc
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import orjson
import torch
import transformers
from fastapi import Depends, FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from filelock import FileLock
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from prometheus_client import Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from python_multipart.multipart import parse_options_header
from safetensors import SafetensorError, safe_open
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tokenizers import Encoding, Tokenizer
from torch.nn import functional
from transformers import DynamicCache, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# torch reads it with its first tensor. Large pages halve the time of a start and take a tenth off a large image's.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
log = logging.getLogger("uvicorn.error")  # the logger that uvicorn has configured by the time it imports the app

# ---------------------------------------------------------------------------------------------------- 1. Settings


class Settings(BaseSettings):
    """The environment variables `GME_*`; README.md has the table."""

    model_config = SettingsConfigDict(env_prefix="GME_", env_ignore_empty=True, extra="ignore")

    model_dir: Path = Path("~/gme_models")
    model_id: str = "iic/gme-Qwen2-VL-2B-Instruct"
    model_revision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_length: int = Field(1800, ge=64, le=32768)
    max_batch_tokens: int | None = Field(None, ge=1)
    max_inputs: int = Field(2048, ge=1, le=1 << 16)
    max_body_mb: float = Field(32, gt=0, allow_inf_nan=False)
    max_image_pixels: int = Field(100_000_000, ge=1)
    max_queue: int = Field(16384, ge=1)
    cache_mb: float = Field(64, ge=0, allow_inf_nan=False)
    api_key: str | None = None

    @classmethod
    def load(cls) -> "Settings":
        """Read the environment. Raises `SystemExit` with a sentence for each variable that does not parse."""
        try:
            return cls()
        except ValidationError as error:
            raise SystemExit(
                "\n".join(
                    f"GME_{str(fault['loc'][0]).upper()}={fault['input']!r} cannot be used: {fault['msg']}."
                    for fault in error.errors()
                )
            ) from None


# -------------------------------------------------------------------------------------------------- 2. Checkpoint


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds a whole checkpoint: config, tokenizer, preprocessor config and every weight shard.

    A shard's header records where its last tensor ends, so one that was cut short is found without reading it.
    """
    index = directory / "model.safetensors.index.json"
    try:
        for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
            json.loads((directory / name).read_bytes())
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for shard in shards:
            with safe_open(directory / shard, framework="np"):
                pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False
    return True


class DownloadLog:
    """What a log gets in place of the client's progress bars: a line for every half gigabyte of a file."""

    STEP = 500_000_000

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size, self._received = name, size, 0

    def update(self, size: int) -> None:
        before, self._received = self._received, self._received + size
        if before // self.STEP < self._received // self.STEP:
            log.info("%s: %.1f of %.1f GB", self._name, self._received / 1e9, self._size / 1e9)

    def end(self) -> None:
        pass


def download(settings: Settings, directory: Path) -> None:
    """Fetch from ModelScope what `directory` lacks. Part of a file that an earlier download left there is continued."""
    # The client's own locks are in HOME, which a service may not write into; `find_checkpoint` holds one of ours.
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_FILE_LOCK", "false")
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")  # s per file; 5 GB may take more than its hour
    from modelscope import snapshot_download  # 1.3 s to import, and needed once

    # A log would get 90,000 lines of progress bars an hour: the client draws them on the stderr of the moment.
    terminal = sys.stderr.isatty()
    with contextlib.nullcontext() if terminal else contextlib.redirect_stderr(io.StringIO()):
        snapshot_download(
            settings.model_id,
            revision=settings.model_revision,
            local_dir=str(directory),
            progress_callbacks=None if terminal else [DownloadLog],
        )


def find_checkpoint(settings: Settings) -> Path:
    """The directory of the checkpoint, downloaded from ModelScope first when it is not complete on disk.

    Raises `SystemExit` with one sentence when it can be had neither way.
    """
    directory = settings.model_dir.expanduser() / settings.model_id
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
    raise SystemExit(
        f"No checkpoint of {settings.model_id}: {directory} is not complete, and downloading it from ModelScope"
        f" ({os.environ.get('MODELSCOPE_ENDPOINT', 'https://www.modelscope.cn')}) failed ({reason})."
        f" Start again to go on where the download ended, or put the model's files into that directory by hand, or set"
        f" GME_MODEL_DIR to a directory that has them in {settings.model_id}, or set MODELSCOPE_ENDPOINT to a hub that"
        f" this machine can reach."
    )


# ------------------------------------------------------------------------------------------------------ 3. Inputs

DEFAULT_INSTRUCTION = "You are a helpful assistant."
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow opens MPO as a kind of JPEG
VISION_START = "<|vision_start|>"
IMAGE = f"{VISION_START}<|image_pad|><|vision_end|>"
HEAD = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
PATCH_FACTOR = 28  # a vision token covers 2 x 2 patches of 14 x 14 pixels
MAX_SIDE_RATIO = 200
UPRIGHT = {  # by EXIF orientation; ImageOps.exif_transpose would rewrite the EXIF too, and fail where it is odd
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_FAX_ROWS = 20_000  # of a TIFF; the decoder takes 10 us and writes a line into the log for each that is broken
COMPRESSION, TILE_WIDTH, TILE_LENGTH = 259, 322, 323  # TIFF tags
FAX = (2, 3, 4, 32771)  # values of COMPRESSION
CHUNK_WEIGHT = 1 << 14  # characters tokenized in one go, so that the texts of a small request are ready together
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # which Pillow gives at half of what it refuses
PARSE_SECONDS = 1  # of the processor's time, until an image file is open; Pillow takes minutes for a million parts
DECODED_PIXELS = 10_000_000  # a second, at the least
MAX_TAG = 400_000  # bytes of a TIFF or EXIF tag; for each of its values Pillow makes objects of some 260
LARGE_TAGS = (700, 34675)  # XMP and colour profile, which stay bytes


class InputError(ValueError):
    """What the client sent cannot be embedded; the message says what to change."""


class ImageTooLargeError(InputError):
    """An image of more pixels than `GME_MAX_IMAGE_PIXELS`."""


class ImageFile(io.BytesIO):
    """The bytes of an image file. Raises `ValueError` when the thread that reads them has taken too long."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.end = time.thread_time() + PARSE_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.end:
            raise ValueError("The file takes too long to read.")
        return super().read(size)


def bounded_tag(
    self: ImageFileDirectory_v2, tag: int, read: Callable[..., Any] = ImageFileDirectory_v2.__getitem__
) -> Any:
    """A tag's value, in place of Pillow's method, which makes gigabytes of a large one while a file is opened."""
    if len(self._tagdata.get(tag, b"")) > MAX_TAG and (tag not in LARGE_TAGS or self.tagtype[tag] not in (1, 7)):
        raise ValueError(f"The tag {tag} is too large.")
    return read(self, tag)


ImageFileDirectory_v2.__getitem__ = bounded_tag  # type: ignore[method-assign]


@dataclass(slots=True, frozen=True)
class Source:
    """One input as a client sent it: a text, an image file's bytes, or both (fused into one vector)."""

    text: str = ""
    image: bytes | None = None
    instruction: str = DEFAULT_INSTRUCTION

    @property
    def weight(self) -> int:
        """What it costs to prepare, in characters of text."""
        return len(self.instruction) + len(self.text) + (0 if self.image is None else CHUNK_WEIGHT)


@dataclass(slots=True, frozen=True)
class Input:
    """One input as the model reads it."""

    token_ids: np.ndarray  # (length,) int64
    prefix: tuple[int, ...]  # token ids of the instruction: the head that inputs with the same instruction share
    shared: int  # how many of this input's first token ids are those of `prefix`, less than its length
    image_start: int = 0  # position of the first image token
    image_grid_thw: tuple[int, int, int] | None = None  # (1, rows, columns) of 14-pixel patches
    pixel_values: np.ndarray | None = None  # (rows * columns, 1176) float32

    @property
    def cost(self) -> int:
        """Tokens that a forward has to compute for it."""
        return len(self.token_ids) - self.shared

    def key(self) -> bytes:
        """A digest of all that the vector depends on."""
        digest = hashlib.blake2b(self.token_ids.tobytes(), digest_size=32)
        if self.pixel_values is not None:
            digest.update(repr((self.image_start, self.image_grid_thw)).encode())
            digest.update(np.ascontiguousarray(self.pixel_values).data)
        return digest.digest()


def first_resize(width: int, height: int) -> tuple[int, int]:
    """The size (width, height) to which the authors' `fetch_image` brings an image before the processor sees it.

    Multiples of 28, [4 * 28^2, 16384 * 28^2] pixels, sides of at least 28, a side ratio of at most 200.
    """

    def multiple(value: float, rounded: Callable[[float], int]) -> int:
        return max(PATCH_FACTOR, rounded(value / PATCH_FACTOR) * PATCH_FACTOR)

    min_pixels, max_pixels = 4 * PATCH_FACTOR**2, 16384 * PATCH_FACTOR**2
    w, h = multiple(width, round), multiple(height, round)
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = multiple(width / shrink, math.floor), multiple(height / shrink, math.floor)
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = multiple(width * grow, math.ceil), multiple(height * grow, math.ceil)
    return min(w, MAX_SIDE_RATIO * h), min(h, MAX_SIDE_RATIO * w)


def read_image(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame, upright and in RGB, after the first resize. Raises `InputError` or `ImageTooLargeError`."""
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # past twice as much Pillow raises, for a frame in the file too
    try:
        with Image.open(file := ImageFile(data), formats=IMAGE_FORMATS) as image:
            file.end += image.width * image.height / DECODED_PIXELS
            tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
            tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)  # a tile may be larger than its image
            if max(image.width * image.height, tile) > max_pixels:
                raise Image.DecompressionBombError
            # every scan of a progressive JPEG passes over the whole image: 14 kB of them make 10 s of work
            scans = data.count(b"\xff\xda") if image.info.get("progressive") else 1
            fax_rows = image.height if tags.get(COMPRESSION) in FAX else 0
            if scans <= MAX_SCANS and fax_rows <= MAX_FAX_ROWS:
                rgb = image.convert("RGB")
                # read after decoding, in which Pillow turns a TIFF by itself and drops its orientation
                turn = UPRIGHT.get(int(image.getexif().get(Base.Orientation) or 1))
                rgb = rgb if turn is None else rgb.transpose(turn)
                return rgb.resize(first_resize(*rgb.size), Image.Resampling.BICUBIC)
    except Image.DecompressionBombError:
        raise ImageTooLargeError(
            f"The image has more than the {max_pixels} pixels that are accepted: scale it down before sending it (the"
            " model sees about a million of them)."
        ) from None
    except Exception:  # Pillow's decoders raise whatever a broken file makes them trip over
        log.debug("An image could not be decoded.", exc_info=True)
    formats = ", ".join(IMAGE_FORMATS)
    raise InputError(f"The image cannot be decoded: send a whole file in one of the formats {formats}.")


class Preparer:
    """Turns what clients send into what the model reads. Thread-safe."""

    def __init__(self, directory: Path, max_length: int, max_image_pixels: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # min_pixels and max_pixels, and not size: the checkpoint's own values would win over size
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(
            directory, min_pixels=256 * PATCH_FACTOR**2, max_pixels=1280 * PATCH_FACTOR**2, local_files_only=True
        )
        self._max_length = max_length
        self._max_image_pixels = max_image_pixels
        # A token of the byte-level vocabulary stands for no more characters than the longest one has bytes: what lies
        # past this many characters is truncated anyway, and is cut before it costs time in the tokenizer.
        self._max_chars = max_length * max(map(len, self._tokenizer.get_vocab()))
        # No text changes how an instruction before it is tokenized, but for what follows its last special token.
        self._head_end = len(self._encode([HEAD[HEAD.rindex("<|") :]])[0].ids)
        self._encode_head = functools.lru_cache(16)(self._encode_head_anew)

    def __call__(self, sources: Sequence[Source]) -> list[Input | InputError]:
        """For each source its `Input`, or the error that says why there is none."""
        heads = [HEAD.format(source.instruction[: self._max_chars]) for source in sources]
        prefixes = [self._encode_head(head) for head in heads]
        prompts = [
            "" if self._fills(prefix) else f"{head}{'' if source.image is None else IMAGE}{source.text}{TAIL}"
            for source, head, prefix in zip(sources, heads, prefixes, strict=True)
        ]
        prepared: list[Input | InputError] = []
        for source, head, prefix, encoding in zip(sources, heads, prefixes, self._encode(prompts), strict=True):
            try:
                prepared.append(self._prepare(source, head, prefix, encoding))
            except InputError as error:
                prepared.append(error)
        return prepared

    def _encode_head_anew(self, head: str) -> tuple[int, ...]:
        return tuple(self._encode([head])[0].ids[: self._max_length + self._head_end])

    def _fills(self, prefix: tuple[int, ...]) -> bool:
        """Whether the instruction alone is all that the model reads: then nothing else is tokenized."""
        return len(prefix) == self._max_length + self._head_end

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        # half a surrogate pair, which JSON can carry, is no character: it becomes a question mark
        whole = [text[: self._max_chars].encode("utf-8", "replace").decode() for text in texts]
        return self._tokenizer.encode_batch(whole)  # which releases the interpreter lock; encode does not

    def _prepare(self, source: Source, head: str, prefix: tuple[int, ...], encoding: Encoding) -> Input:
        ids = list(prefix) if self._fills(prefix) else encoding.ids
        prefix = prefix[: self._max_length]
        image = {}
        if source.image is not None:
            features = self._processor(read_image(source.image, self._max_image_pixels), return_tensors="np")
            _, rows, columns = features["image_grid_thw"][0].tolist()
            tokens = rows * columns // 4
            # by position, not by id: the client may have written <|image_pad|> too
            start = encoding.char_to_token(len(head) + len(VISION_START))
            if start is None or start + tokens > self._max_length:
                raise InputError(
                    f"The image takes {tokens} tokens and does not fit behind the prompt into the {self._max_length}"
                    " tokens that the model reads: send a shorter prompt, or raise GME_MAX_LENGTH on the server."
                )
            ids = ids[:start] + [ids[start]] * tokens + ids[start + 1 :]
            image = {
                "image_start": start,
                "image_grid_thw": (1, rows, columns),
                "pixel_values": features["pixel_values"],
            }
        token_ids = np.array(ids[: self._max_length], dtype=np.int64)
        limit = min(len(prefix), len(token_ids) - 1)
        differs = np.flatnonzero(token_ids[:limit] != prefix[:limit])
        return Input(token_ids, prefix, int(differs[0]) if differs.size else limit, **image)


# ------------------------------------------------------------------------------------------------------- 4. Model

PREFIX_CACHE_TOKENS = 4096  # 115 MB of bfloat16 keys and values in the 2B model
VISION_ATTENTION_ROWS = 512
SMALL_PARAMETERS = 100_000_000  # a model below this is faster on one thread than on all: its products are too short
PACKED_ROWS = 512  # the number of rows that packed weights are laid out for; any number can be multiplied


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when available, else the CPU. Raises `SystemExit` for a device that this machine lacks."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"GME_DEVICE={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA, as published; on a CPU bfloat16 where it computes it natively, else float32."""
    if name == "auto":
        native = {feature for feature, present in torch.cpu.get_capabilities().items() if present}
        cpu = "bfloat16" if native & {"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"} else "float32"
        name = "float16" if device.type == "cuda" else cpu
    return getattr(torch, name)


def chunked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, length, head_dim), like key and value
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention over one image, head by head and 512 queries at a time: twice torch's own in bfloat16 on a CPU."""
    out = torch.empty_like(query)
    for q, k, v, o in zip((query[0] * scaling), key[0].contiguous(), value[0].contiguous(), out[0], strict=True):
        for start in range(0, len(q), VISION_ATTENTION_ROWS):
            rows = slice(start, start + VISION_ATTENTION_ROWS)
            torch.matmul((q[rows] @ k.T).softmax(-1), v, out=o[rows])
    return out.transpose(1, 2).contiguous(), None  # (1, length, heads, head_dim)


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight is laid out for oneDNN once and not in every call: 1.7 x for a lone short text."""

    def __init__(self, linear: torch.nn.Linear, scratch: torch.Tensor) -> None:
        super().__init__()
        weight = scratch[: linear.weight.numel()].view_as(linear.weight).copy_(linear.weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.bias = None if linear.bias is None else linear.bias.to(scratch.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


class Model:
    """Qwen2-VL without its language-modelling head: batches of inputs to unit vectors. For one thread at a time."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.device, self.dtype = device, dtype
        # The class is named and trust_remote_code is not: whatever code lies in the directory, none of it is run.
        # With the checkpoint's own dtype the weights stay mapped from the files until they are converted one by one.
        loaded: Any = Qwen2VLModel.from_pretrained(
            directory,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        model, loading = loaded
        if missing := [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]:
            raise SystemExit(f"{directory} is not a Qwen2-VL checkpoint: it has no usable weights for {missing[0]}.")
        model.eval().requires_grad_(False)
        if device.type == "cpu":
            if platform.machine() == "x86_64" and not torch.cpu.get_capabilities().get("amx_bf16"):
                # oneDNN instead of MKL, up to twice as fast on AMD; with AMX, and on ARM, it would round to bfloat16
                torch.set_float32_matmul_precision("medium")
            if dtype == torch.bfloat16:
                transformers.AttentionInterface.register("chunked", chunked_attention)
                model.set_attn_implementation({"vision_config": "chunked"})
            if sum(parameter.numel() for parameter in model.parameters()) < SMALL_PARAMETERS:
                torch.set_num_threads(1)
            if dtype != torch.float16 and platform.machine() == "x86_64" and torch.backends.mkldnn.is_available():
                self._pack(model)
        for parameter in model.parameters():  # and not buffers: the rotary frequencies stay in float32
            parameter.data = parameter.data.to(device, dtype)
        model.to(device)
        self._visual, self._decoder = model.visual, model.language_model
        self.dimension: int = self._decoder.config.hidden_size
        self._prefixes: OrderedDict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()

    def _pack(self, model: Any) -> None:
        modules = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
        linears = [found for found in modules if isinstance(found[2], torch.nn.Linear)]
        scratch = torch.empty(max(linear.weight.numel() for *_, linear in linears), dtype=self.dtype)
        for parent, name, linear in linears:
            setattr(parent, name, PackedLinear(linear, scratch))

    def embed(self, inputs: Sequence[Input]) -> np.ndarray:
        """Unit vectors (len(inputs), dimension), float32, of inputs that share `prefix`.

        Raises `MemoryError` when the batch does not fit, and `SystemExit` when the device cannot go on.
        """
        try:
            return self._forward(inputs)
        except torch.OutOfMemoryError:
            pass  # the memory is free only when the exception, which holds the batch's tensors, is gone
        except torch.AcceleratorError as error:
            raise SystemExit(f"The device {self.device} cannot go on: {error}") from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch says it on a CPU
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError("The batch does not fit into the device's memory.")

    @torch.inference_mode()
    def _forward(self, inputs: Sequence[Input]) -> np.ndarray:
        shared = min(one.shared for one in inputs)
        ends = np.array([len(one.token_ids) - shared for one in inputs])
        token_ids = np.zeros((len(inputs), ends.max()), np.int64)  # (B, T), padded on the right
        for row, end, one in zip(token_ids, ends, inputs, strict=True):
            row[:end] = one.token_ids[shared:]
        embeddings = self._decoder.embed_tokens(torch.from_numpy(token_ids).to(self.device))  # (B, T, D)

        images = [(row, one) for row, one in enumerate(inputs) if one.pixel_values is not None]
        if images:
            pixels = torch.from_numpy(np.concatenate([one.pixel_values for _, one in images]))
            grids = torch.tensor([one.image_grid_thw for _, one in images])
            features = self._visual(pixels.to(self.device, self.dtype), grid_thw=grids.to(self.device)).pooler_output
            counts = (grids.prod(-1) // 4).tolist()
            for (row, one), image in zip(images, features.split(counts), strict=True):
                start = one.image_start - shared
                embeddings[row, start : start + len(image)] = image

        cache = self._prefix(inputs[0].prefix, shared, len(inputs))
        last = self._decode(embeddings, cache, torch.from_numpy(ends - 1).to(self.device))
        return functional.normalize(last, dim=-1).cpu().numpy()

    def _decode(self, embeddings: torch.Tensor, cache: DynamicCache, last: torch.Tensor) -> torch.Tensor:
        """Final hidden states (B, D), float32, at position `last` (B,) of embeddings (B, T, D) that follow `cache`.

        The residual stream stays in float32 whatever the dtype of the weights: bfloat16 comes closer to the float32
        vectors and float16 overflows later, at no cost in time.
        """
        past, length = cache.get_seq_length(), embeddings.shape[1]
        positions = torch.arange(past, past + length, device=self.device).expand(3, 1, -1)  # sequential on every axis
        rotary = self._decoder.rotary_emb(embeddings, positions)
        # Attention is causal, so that no token sees the padding to its right, and one mask serves every row.
        mask = (
            torch.ones(1, 1, length, past + length, dtype=torch.bool, device=self.device).tril(past) if past else None
        )
        hidden = embeddings.float()
        for layer in self._decoder.layers:
            normed = layer.input_layernorm(hidden).to(self.dtype)
            hidden += layer.self_attn(normed, mask, position_embeddings=rotary, past_key_values=cache)[0]
            if layer is self._decoder.layers[-1]:  # of the last layer only the pooled tokens are needed
                hidden = hidden[torch.arange(len(last), device=self.device), last]
            hidden += layer.mlp(layer.post_attention_layernorm(hidden).to(self.dtype))
        return self._decoder.norm(hidden)

    def _prefix(self, prefix: tuple[int, ...], shared: int, batch: int) -> DynamicCache:
        """Keys and values of the first `shared` tokens of `prefix`, for `batch` rows."""
        layers = self._prefixes.pop(prefix, None)
        if layers is None:
            cache = DynamicCache()
            ids = torch.tensor([prefix], device=self.device)
            self._decode(self._decoder.embed_tokens(ids), cache, torch.tensor([0], device=self.device))
            layers = [(keys, values) for keys, values, _ in cache]  # (1, heads, tokens, head_dim) each
        if len(prefix) <= PREFIX_CACHE_TOKENS:
            self._prefixes[prefix] = layers
        while sum(map(len, self._prefixes)) > PREFIX_CACHE_TOKENS:
            self._prefixes.popitem(last=False)
        return DynamicCache(
            [
                (keys[:, :, :shared].expand(batch, -1, -1, -1), values[:, :, :shared].expand(batch, -1, -1, -1))
                for keys, values in layers
            ]
        )


# ----------------------------------------------------------------------------------------------------- 5. Batcher

MAX_PADDING = 0.2
AHEAD_BATCHES = 4  # how much is prepared ahead of the model; a prepared image takes 19 kB a token
PREPARE_THREADS = min(4, max(2, os.cpu_count() or 1))  # each may hold a GB while it decodes the largest image
CACHE_ENTRY_BYTES = 200  # what a cached vector takes beside its numbers
T = TypeVar("T")
R = TypeVar("R")

QUEUE_DEPTH = Gauge("gme_queue_inputs", "Inputs without an answer.")
SECONDS = [2.0**n for n in range(-8, 10)]  # 4 ms to 8.5 min: a long queue on a CPU takes minutes
QUEUE_SECONDS = Histogram("gme_queue_seconds", "Time that an input waits for the model.", buckets=SECONDS)
MODEL_SECONDS = Histogram("gme_model_seconds", "Time that the model takes for one batch.", buckets=SECONDS)
BATCH_INPUTS = Histogram("gme_batch_inputs", "Distinct inputs in one batch.", buckets=[2**n for n in range(12)])
BATCH_PADDING = Histogram(
    "gme_batch_padding_ratio", "Share of padding in one batch.", buckets=[n / 20 for n in range(6)]
)
CACHE_HITS = Counter("gme_cache_hits", "Inputs answered from the cache of recent vectors.")


class UnavailableError(Exception):
    """Nothing can be taken or answered now; the message says why."""


class Job(Future[np.ndarray]):
    """A request and its vectors (n, dimension), float32. Inputs are ranked by length: neighbours make good batches.

    When it ends with an exception, `failed` says through which input.
    """

    def __init__(self, number: int, start: int, sources: Sequence[Source], dimension: int) -> None:
        super().__init__()
        self.number, self.start, self.sources, self.missing = number, start, sources, len(sources)
        self.by_rank = sorted(range(len(sources)), key=lambda index: sources[index].weight)
        self.arrived = time.perf_counter()
        self.vectors = np.empty((len(sources), dimension), np.float32)
        self.tokens = 0  # that the model read for it
        self.failed: int | None = None


class Turn(NamedTuple):
    """One input of a job on its way through the batcher; the lowest `order` goes first."""

    order: tuple[int, int]  # (start of its job + rank within it, number of the job)
    job: Job
    position: int  # in the request
    source: Source


class Place(NamedTuple):
    """A place in a batch, shared by the turns of all equal inputs that wait together."""

    prepared: Input
    turns: list[Turn]


def isolate(function: Callable[[Sequence[T]], Iterable[R]], items: Sequence[T]) -> list[R | Exception]:
    """`function(items)`; where it raises, halves the items until those it raises for have the exception as result.

    Only `SystemExit` goes through: a panic of the tokenizers library, which is no `Exception` either, must not.
    """
    try:
        return list(function(items))
    except SystemExit:
        raise
    except BaseException as raised:
        if len(items) == 1 and not isinstance(raised, MemoryError):
            log.exception("An input could not be embedded.")
        # without the traceback, which holds the batch's tensors in memory
        error = raised.with_traceback(None) if isinstance(raised, Exception) else RuntimeError(repr(raised))
    if len(items) == 1:
        return [error]
    half = len(items) // 2
    return isolate(function, items[:half]) + isolate(function, items[half:])


class Batcher:
    """Gathers the inputs of all requests into batches for the one thread that runs the model.

    Inputs are taken by rank within their own request, oldest request first among equals, so that the first input of a
    new request overtakes the thousandth of an old one. The ranks of a new request start where the waiting ones are, and
    one higher with every batch, so that an old request gets a place in each however many new ones keep coming. Threads
    prepare a few batches ahead in that order, and at every batch boundary the model thread takes the best batch of what
    is ready.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Source]], Iterable[Input | InputError]],
        embed: Callable[[Sequence[Input]], Iterable[np.ndarray]],
        dimension: int,
        settings: Settings,
        max_tokens: int,
    ) -> None:
        self._prepare, self._embed, self._dimension = prepare, embed, dimension
        self._max_tokens, self._max_queue = max_tokens, settings.max_queue
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._cache_entries = int(settings.cache_mb * 2**20 / (4 * dimension + CACHE_ENTRY_BYTES))
        self._numbers = itertools.count()
        self._start = 0  # of the ranks of a new job
        self._preparing: list[tuple[int, int]] = []  # lowest order of each chunk that a thread prepares
        self._jobs: list[tuple[tuple[int, int], Job]] = []  # heap of (order of the job's next input, job)
        self._open: set[Job] = set()  # jobs without an answer
        self._ready: dict[bytes, Place] = {}  # prepared, by key
        self.depth = 0  # inputs without an answer
        self.alive = True
        self.on_death: Callable[[], None] = lambda: None
        lock = threading.RLock()
        self._lock, self._to_prepare, self._to_run = lock, threading.Condition(lock), threading.Condition(lock)
        runs = [self._run_model] + [self._run_prepare] * PREPARE_THREADS
        self._threads = [threading.Thread(target=self._run, args=(run,), daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()

    def submit(self, sources: Sequence[Source]) -> Job:
        """Queue a request's inputs. Cancelling the job, as for a client that left, drops what has not run yet.

        The job ends with its vectors, or with an `InputError`, a `MemoryError` (an input does not fit into the device,
        even alone), a `FloatingPointError` (its vector is not finite), whatever else was raised for it, or an
        `UnavailableError`. Raises `UnavailableError`.
        """
        with self._lock:
            if not self.alive:
                raise UnavailableError("The model thread has ended: try again when the service has restarted.")
            if self.depth + len(sources) > self._max_queue:
                raise UnavailableError("Too many inputs wait already: try again in a moment.")
            job = Job(next(self._numbers), self._start, sources, self._dimension)
            self.depth += job.missing
            self._open.add(job)
            heapq.heappush(self._jobs, ((job.start, job.number), job))
            self._to_prepare.notify()
        job.add_done_callback(self._forget)  # type: ignore[arg-type]
        return job

    def close(self) -> None:
        """End the threads after the batch under way, and the jobs that it leaves."""
        with self._lock:
            self.alive = False
            self._to_prepare.notify_all()
            self._to_run.notify_all()
        for thread in self._threads:
            thread.join()
        self._end_jobs()

    def _run(self, loop: Callable[[], None]) -> None:
        """The life of a thread. When one ends by a fault, no request can be answered any more."""
        try:
            loop()
        except BaseException as error:
            log.critical("The thread %s has ended: %r", loop.__name__, error)
            self._end_jobs()
            self.on_death()

    def _run_prepare(self) -> None:
        while chunk := self._take_chunk():
            results = isolate(self._prepare, [turn.source for turn in chunk])
            keys = [result.key() if isinstance(result, Input) else b"" for result in results]
            with self._lock:
                self._preparing.remove(chunk[0].order)
                for turn, result, key in zip(chunk, results, keys, strict=True):
                    if isinstance(result, Exception):
                        self._finish(turn, result)
                    elif not turn.job.done():
                        turn.job.tokens += len(result.token_ids)
                        self._make_ready(turn, result, key)

    def _take_chunk(self) -> list[Turn]:
        """The inputs to prepare next; waits for them. Empty once the batcher is closed."""
        with self._lock:
            while self.alive:
                chunk: list[Turn] = []
                weight = 0
                ready = sorted((self._order(key), place.prepared.cost) for key, place in self._ready.items())
                before = [0, *itertools.accumulate(cost for _, cost in ready)]
                while self._jobs and weight < CHUNK_WEIGHT:
                    order, job = self._jobs[0]
                    rank = order[0] - job.start
                    if not job.done():
                        if before[bisect.bisect(ready, (order,))] >= AHEAD_BATCHES * self._max_tokens:
                            break  # enough is ready that goes before it
                        index = job.by_rank[rank]
                        weight += job.sources[index].weight
                        if chunk and weight > CHUNK_WEIGHT:
                            break
                        chunk.append(Turn(order, job, index, job.sources[index]))
                    heapq.heappop(self._jobs)
                    if not job.done() and rank + 1 < len(job.by_rank):
                        heapq.heappush(self._jobs, ((order[0] + 1, job.number), job))
                if chunk:
                    self._preparing.append(chunk[0].order)
                    self._to_prepare.notify()  # another thread may go on with the rest
                    return chunk
                self._to_prepare.wait()
        return []

    def _make_ready(self, turn: Turn, prepared: Input, key: bytes) -> None:
        if key in self._cache:
            CACHE_HITS.inc()
            self._cache.move_to_end(key)
            self._finish(turn, self._cache[key])
        elif key in self._ready:
            self._ready[key].turns.append(turn)
        else:
            self._ready[key] = Place(prepared, [turn])
            self._to_run.notify()

    def _order(self, key: bytes) -> tuple[int, int]:
        return min(turn.order for turn in self._ready[key].turns)

    def _run_model(self) -> None:
        while batch := self._take_batch():
            with MODEL_SECONDS.time():
                results = isolate(self._embed, [place.prepared for place in batch.values()])
            with self._lock:
                for (key, place), result in zip(batch.items(), results, strict=True):
                    finite = isinstance(result, Exception) or np.isfinite(result).all()
                    for turn in place.turns:
                        self._finish(turn, result if finite else FloatingPointError())
                    if finite and not isinstance(result, Exception):
                        self._cache[key] = result.copy()  # and not a row that keeps its whole batch in memory
                while len(self._cache) > self._cache_entries:
                    self._cache.popitem(last=False)

    def _end_jobs(self) -> None:
        with self._lock:
            self.alive = False
            for job in list(self._open):  # a job that is cancelled meanwhile leaves the set
                if not job.done() and job.set_running_or_notify_cancel():
                    job.set_exception(UnavailableError("The service is ending: try again in a moment."))

    def _take_batch(self) -> dict[bytes, Place]:
        """The best batch of what is ready; waits for it. Empty once the batcher is closed.

        The first in order is always in it. Of those that follow in order and share its instruction, as many as fit
        into the batch's tokens, those nearest to it in length are, as long as at most 20 % of the batch is padding.
        """
        with self._lock:
            while self.alive:
                for key in [key for key, place in self._ready.items() if all(turn.job.done() for turn in place.turns)]:
                    del self._ready[key]
                self._to_prepare.notify_all()  # there is room
                if self._ready:
                    break
                self._to_run.wait()
            else:
                return {}
            waiting = sorted(self._ready, key=self._order)
            cost = {key: self._ready[key].prepared.cost for key in waiting}
            first = self._ready[waiting[0]].prepared
            same = [key for key in waiting if self._ready[key].prepared.prefix == first.prefix]
            inside = bisect.bisect(list(itertools.accumulate(cost[key] for key in same)), self._max_tokens)
            near = sorted(same[: max(inside, 1)], key=lambda key: abs(cost[key] - first.cost))
            size, total, longest = 1, 0, 0
            for count, key in enumerate(near, start=1):
                total, longest = total + cost[key], max(longest, cost[key])
                if total / (1 - MAX_PADDING) >= count * longest <= self._max_tokens:
                    size = count
            lowest = min([self._order(waiting[0]), *self._preparing, *(order for order, _ in self._jobs[:1])])
            self._start = max(self._start + 1, lowest[0])
            batch = {key: self._ready.pop(key) for key in near[:size]}
            self._to_prepare.notify_all()
        BATCH_INPUTS.observe(size)
        BATCH_PADDING.observe(1 - sum(cost[key] for key in batch) / (size * max(cost[key] for key in batch)))
        for turn in itertools.chain.from_iterable(place.turns for place in batch.values()):
            QUEUE_SECONDS.observe(time.perf_counter() - turn.job.arrived)
        return batch

    def _finish(self, turn: Turn, result: np.ndarray | Exception) -> None:
        job = turn.job
        if job.done():
            return
        if isinstance(result, Exception):
            if job.set_running_or_notify_cancel():
                job.failed = turn.position
                job.set_exception(result)
            return
        job.vectors[turn.position] = result
        job.missing -= 1
        self.depth -= 1
        if not job.missing and job.set_running_or_notify_cancel():
            job.set_result(job.vectors)

    def _forget(self, job: Job) -> None:
        """What an ended job still has in the queue is dropped when its turn comes."""
        with self._lock:
            self._open.discard(job)
            self.depth -= job.missing
            job.sources = ()
            self._to_prepare.notify()


# -------------------------------------------------------------------------------------------------------- 6. HTTP

INPUTS = Counter("gme_inputs", "Inputs answered, by kind.", ["kind"])
TOKENS = Counter("gme_tokens", "Tokens of the inputs answered.")
STATIC_PATH = "/docs/static"
OPEN_PATHS = ("/", "/health", "/metrics", "/docs", "/openapi.json")  # and what lies below STATIC_PATH
MAX_OPEN_BODIES = 32  # of the largest size that may be in memory at a time, with the answers that wait to be read
BUSY = {"Retry-After": "1", "Connection": "close"}
LARGE_ANSWER = 1 << 16  # bytes; a smaller one is in the hands of the system at once
MAX_HEAD = 1 << 14  # bytes of a request's first line and headers
MAX_PIPELINE = 64  # requests that a connection may send ahead of their answers
STALL_SECONDS = 60  # for which a client may send and read nothing when it should
MAX_STALLS = 5  # times as long may a request take to come, or an answer to be read
# As much of a JSON body as has at most so many strings, and signs outside strings, in one pass over it.
JSON_START = rb'(?:[^"\s]|\s++|"(?:[^"\\]++|\\.)*+"?){0,%d}+'
CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1")  # of forms; the codec idna takes minutes for a megabyte
WRONG_KEY = "The API key is missing or wrong: send it in the header `Authorization: Bearer <key>`."
NO_FILE = "body.file: send the image as a file in a multipart form (with curl: -F file=@photo.jpg)."
TOO_MANY_VALUES = (
    "The body has too many values: send fewer inputs in one request, and texts instead of token ids (in LangChain,"
    " check_embedding_ctx_length=False)."
)
STATUSES = {
    400: "An input that cannot be embedded.",
    401: "The API key is missing or wrong.",
    413: "The body, the number of inputs or an image is too large.",
    422: "The request is malformed.",
    500: "A fault of the service.",
    503: "Too much work waits: try again.",
}
FAULTS: tuple[tuple[type[Exception], int, str], ...] = (  # what a job can end with; "": the exception's own sentence
    (UnavailableError, 503, ""),
    (ImageTooLargeError, 413, ""),
    (InputError, 400, ""),
    (MemoryError, 413, "This input does not fit into the memory of the server: send a smaller one."),
    (FloatingPointError, 500, "The vector is not finite: set GME_DTYPE to bfloat16 or float32 on the server."),
    (Exception, 500, "This input could not be embedded, through a fault of the service: its log says more."),
)
Many = Field(fail_fast=True, max_length=1 << 16)  # a fault in each of a million items would be as many errors
PROMPT = f"The instruction. Give one with queries, none with documents. Default: {DEFAULT_INSTRUCTION!r}"
Prompt = Annotated[str | None, Field(description=PROMPT, examples=["Find an image that matches the given text."])]


class Texts(BaseModel):
    """Texts to embed."""

    model_config = ConfigDict(extra="forbid")  # a `promt` that is dropped would give another vector
    texts: Annotated[list[str], Many] = Field(
        description="The texts, one vector each.", examples=[["a red circle", "一个红色的圆形"]]
    )
    prompt: Prompt = None


class Embeddings(BaseModel):
    """L2-normalised vectors, in the order of the inputs."""

    embeddings: list[list[float]] = Field(description="One vector per input.", examples=[[[0.0134, -0.0127, 0.0451]]])


class ImageForm(BaseModel):
    """An image to embed, alone or fused with a text."""

    model_config = ConfigDict(extra="forbid")
    file: UploadFile = Field(description="The image file: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.")
    text: str = Field("", description="A text to fuse with the image.", examples=["", "a red circle"])
    prompt: str = Field("", description=PROMPT, examples=["", "Find a text that matches the given image."])


class Item(BaseModel):
    """A text, an image, or both fused into one vector."""

    model_config = ConfigDict(extra="forbid")
    text: str | None = Field(None, description="The text.", examples=["a red circle"])
    image: str | None = Field(None, description="The image file, as a data URI or base64.", examples=["iVBORw0KGgo="])


class OpenAIRequest(BaseModel):
    """A request in the shape of OpenAI's embeddings API, which takes images too."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["a red circle", "a blue star"]}]})
    input: Annotated[list[str | Item | int | list[Any]], Many] | str = Field(
        description="A text, or a list of texts, or of objects with `text`, `image` or both. Token ids are refused.",
        examples=[["a red circle", "a blue star"]],
    )
    model: str | None = Field(None, description="Any name: there is one model.", examples=["gme"])
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="How the vectors are written; base64 is that of float32.", examples=["float"]
    )
    dimensions: int | None = Field(None, description="Only the model's own dimension.", examples=[1536])
    user: str | None = Field(None, description="Ignored.", examples=["me"])
    prompt: Prompt = None


class Health(BaseModel):
    """The state of the service."""

    status: str = Field(description="`ok`, or what is wrong.", examples=["ok"])
    model: str = Field(description="The model's id.", examples=["iic/gme-Qwen2-VL-2B-Instruct"])
    device: str = Field(description="Where the model runs.", examples=["cuda"])
    dtype: str = Field(description="The type of the model's weights.", examples=["float16"])
    dimension: int = Field(description="Numbers in a vector.", examples=[1536])
    queue_depth: int = Field(description="Inputs without an answer.", examples=[0])


class Error(BaseModel):
    """What was wrong, and what to change."""

    detail: str = Field(description="A sentence.", examples=["texts is empty: send at least one."])


EMBEDDING_LIST = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.0134, -0.0127, 0.0451]}],
    "model": "iic/gme-Qwen2-VL-2B-Instruct",
    "usage": {"prompt_tokens": 23, "total_tokens": 23},
}
MODEL = {"id": "iic/gme-Qwen2-VL-2B-Instruct", "object": "model", "created": 0, "owned_by": "iic"}
MODEL_LIST = {"object": "list", "data": [MODEL]}
REFUSAL = {"message": "input is empty: send at least one.", "type": "invalid_request_error", "code": None}


def openai_responses(answer: object) -> dict[int | str, dict[str, Any]]:
    """The description of a route in OpenAI's shapes, which OpenAI has described: an example of each."""
    sentences = {200: "As OpenAI answers."} | STATUSES
    return {
        status: {
            "description": sentence,
            "content": {"application/json": {"example": answer if status == 200 else {"error": REFUSAL}}},
        }
        for status, sentence in sentences.items()
    }


class RefusedError(HTTPException):
    """A refusal of ours, as distinct from those of the library's parsers."""


def error_response(request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the shape that the route's clients expect."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    openai = {"error": {"message": message, "type": kind, "code": None}}
    body = openai if request.scope["path"].startswith("/v1/") else {"detail": message}
    return Response(orjson.dumps(body), status, headers, "application/json")


class Connection(HttpToolsProtocol):
    """uvicorn's own connection, with limits on what a client can make it keep.

    uvicorn limits headers under h11 alone: here 100 MB of `X: a` would take 2 GB. It limits neither how long a request
    may take to come, nor an answer to be read, nor how many requests come ahead of their answers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.received, self.unused = 0, 0  # bytes; since a part of a body came, or the end of a request
        self.running: RequestResponseCycle | None = None
        self.stalls, self.seen, self.watched = 0, (0, 0), (self.cycle, False)
        self.watch = self.loop.call_later(STALL_SECONDS, self.end_stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.cancel()
        super().connection_lost(exc)  # which tells the last request that has come, and not the one that is answered
        if self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def end_stalled(self) -> None:
        """End the connection if the client has stalled, or takes too long; look again later if not."""
        unread, cycle = self.transport.get_write_buffer_size(), self.cycle
        awaited = cycle is None or cycle.more_body or (cycle.response_complete and self.unused > 0)
        if unread or (awaited and not self.pipeline):
            self.stalls = self.stalls + 1 if self.watched == (cycle, unread > 0) else 0
            if self.seen == (self.received, unread) or self.stalls >= MAX_STALLS:
                self.transport.abort()
                return
        self.seen, self.watched = (self.received, unread), (cycle, unread > 0)
        self.watch = self.loop.call_later(STALL_SECONDS, self.end_stalled)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_HEAD):
            part = data[start : start + MAX_HEAD]
            self.received += len(part)
            self.unused += len(part)
            super().data_received(part)
            if self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            if self.unused > MAX_HEAD:
                self.send_400_response(f"The headers are longer than {MAX_HEAD} bytes.")
                return
            if len(self.pipeline) > MAX_PIPELINE:
                self.transport.abort()
                return

    def on_body(self, body: bytes) -> None:
        self.unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.unused = 0
        super().on_message_complete()


class BoundedRequest(Request):
    """A request of which no parser makes seconds of work or gigabytes of objects. Raises `RefusedError`."""

    async def json(self) -> Any:
        body, start = await self.body(), self.app.state.json_start
        if b"\0" in body:  # UTF-16, which is JSON for Python, and in which no quotation mark ends where it seems to
            raise RefusedError(422, "body: it is not JSON in UTF-8.")
        if start.match(body).end() < len(body):  # 31 MB of `[],` would hold the event loop for 3 s, of keys for 26
            raise RefusedError(413, TOO_MANY_VALUES)
        return await super().json()

    async def form(self, **limits: Any) -> FormData:  # type: ignore[override]
        kind, options = parse_options_header(self.headers.get("content-type"))
        if kind != b"multipart/form-data":
            raise RefusedError(422, NO_FILE)
        if options.get(b"charset", b"utf-8").lower() not in CHARSETS:
            raise RefusedError(422, "body: the charset of the form has to be UTF-8.")
        return await super().form(**limits)


class BoundedRoute(APIRoute):
    """A route that gets a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return bounded


class Guard:
    """ASGI middleware in front of all routes: the API key, before anything is read, and the limits of bodies."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.key, self.max_body = app, settings.api_key, int(settings.max_body_mb * 2**20)
        self.too_large = f"The body is larger than {settings.max_body_mb:g} MB: send less in one request."
        self.open_bytes = 0  # of the bodies of all requests under way, and of the answers that wait to be read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = 0  # bytes of the body and of the answer

        async def receive_counted() -> Message:
            nonlocal held
            message = await receive()
            held += (size := len(message.get("body", b"")))
            self.open_bytes += size
            if held > self.max_body:
                raise RefusedError(413, self.too_large, {"Connection": "close"})
            if self.open_bytes > MAX_OPEN_BODIES * self.max_body:
                raise RefusedError(503, "Too much is being sent: try again in a moment.", BUSY)
            return message

        async def send_counted(message: Message) -> None:
            nonlocal held
            if (size := len(message.get("body", b""))) > LARGE_ANSWER and not message.get("more_body"):
                held += size
                self.open_bytes += size
                await send({**message, "more_body": True})
                message = {"type": "http.response.body"}  # for which uvicorn waits until the client has read the rest
            await send(message)

        request, app = Request(scope), self.app
        if not self.admits(request):
            app = error_response(request, 401, WRONG_KEY, {"WWW-Authenticate": "Bearer", "Connection": "close"})
        elif int(request.headers.get("content-length", 0)) > self.max_body:
            app = error_response(request, 413, self.too_large, {"Connection": "close"})
        try:
            await app(scope, receive_counted, send_counted)
        finally:
            self.open_bytes -= held

    def admits(self, request: Request) -> bool:
        if self.key is None or request.scope["path"] in OPEN_PATHS or request.scope["path"].startswith(STATIC_PATH):
            return True
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(
            key.strip(" ").encode("latin-1"), self.key.encode()
        )


def fault(error: BaseException, which: str = "") -> RefusedError:
    """What to tell the client about an exception of the batcher; `which` names the input."""
    status, sentence = next((status, sentence) for kind, status, sentence in FAULTS if isinstance(error, kind))
    return RefusedError(status, which + (sentence or str(error)), {"Retry-After": "1"} if status == 503 else None)


async def embed(request: Request, batcher: Batcher, sources: Sequence[Source]) -> Job:
    """The answered job. Raises `RefusedError` with a sentence for the client; drops work that nobody waits for."""
    try:
        job = batcher.submit(sources)
    except UnavailableError as error:
        raise fault(error) from None
    answer = asyncio.wrap_future(job)
    gone = asyncio.ensure_future(request.receive())  # the body has been read: only a disconnect can come
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise RefusedError(499, "The client closed the connection.")
        if raised := answer.exception():
            raise fault(raised, "" if job.failed is None or len(sources) == 1 else f"Input {job.failed}: ")
    finally:
        gone.cancel()
        answer.cancel()
    for source in sources:
        INPUTS.labels("text" if source.image is None else "fused" if source.text else "image").inc()
    TOKENS.inc(job.tokens)
    return job


def read_item(item: str | Item | int | list[Any], index: int, instruction: str) -> Source:
    """An item of OpenAI's `input` as a source. Raises `RefusedError`."""
    if isinstance(item, str):
        return Source(item, None, instruction)
    if not isinstance(item, Item):
        sentence = "token ids cannot be embedded: send texts (in LangChain, check_embedding_ctx_length=False)."
    elif item.image is None:
        if item.text:
            return Source(item.text, None, instruction)
        sentence = "the object has neither text nor image: give it at least one."
    elif item.image[:6].lower().startswith(("http:", "https:")):
        sentence = "an image URL is never fetched: send the image itself, as a data URI or base64."
    else:
        with contextlib.suppress(ValueError):
            data = item.image.partition(";base64,")[2] if item.image.startswith("data:") else item.image
            image = base64.b64decode(data.encode("ascii").translate(None, b" \t\r\n"), validate=True)
            return Source(item.text or "", image, instruction)
        sentence = "the image is neither base64 nor a data URI of base64."
    raise RefusedError(400, f"Input {index}: {sentence}")


def explain(fault: dict[str, Any]) -> str:
    """A sentence about a fault in the shape of a request. What the client sent is not echoed."""
    match fault:
        case {"type": "json_invalid", "loc": (_, position)}:
            return f"body: it is not JSON, from character {position} on."
        case {"loc": ("body", "file")}:
            return NO_FILE
        case {"loc": ("body", "input", _, *_), "type": kind} if kind != "too_long":
            return "body.input: send a text, or a list of texts or of objects with `text`, `image` or both."
        case {"type": "model_attributes_type"}:
            return "body: send a JSON object, with the header `Content-Type: application/json`."
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}."


def create_app(settings: Settings, batcher: Batcher, model: Model) -> FastAPI:
    """The routes over a batcher. `model` is asked for its names only."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPIOffline(
        title="GME Service",
        description=f"Multimodal embeddings of text and images by `{settings.model_id}`.",
        lifespan=lifespan,
        redoc_url=None,
        static_url=STATIC_PATH,
        form_limits={"max_files": 1, "max_fields": 16, "max_part_size": int(settings.max_body_mb * 2**20)},
        responses={status: {"model": Error, "description": sentence} for status, sentence in STATUSES.items()},
        dependencies=[Depends(HTTPBearer(auto_error=False, description="Needed when GME_API_KEY is set."))],
    )
    app.state.batcher = batcher
    app.state.json_start = re.compile(JSON_START % (20 * settings.max_inputs + 100_000), re.DOTALL)
    app.router.route_class = BoundedRoute
    app.add_middleware(Guard, settings=settings)

    @app.exception_handler(StarletteHTTPException)
    async def on_http_error(request: Request, error: StarletteHTTPException) -> Response:
        if error.status_code == 400 and not isinstance(error, RefusedError):
            reason = error.detail.rstrip(".")
            sentence = f"body: it cannot be read ({reason}): send JSON in UTF-8, or a form with one file."
            return error_response(request, 422, sentence)
        return error_response(request, error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_malformed(request: Request, error: RequestValidationError) -> Response:
        status = 413 if any(fault["type"] == "too_long" for fault in error.errors()) else 422
        return error_response(request, status, " ".join(dict.fromkeys(map(explain, error.errors()[:5]))))

    @app.exception_handler(Exception)
    async def on_fault(request: Request, _: Exception) -> Response:
        return error_response(request, 500, "A fault of the service: its log says more.")

    def check_count(inputs: Sequence[object], name: str) -> None:
        if not inputs:
            raise RefusedError(400, f"{name} is empty: send at least one.")
        if len(inputs) > (most := min(settings.max_inputs, settings.max_queue)):
            raise RefusedError(413, f"{name} has {len(inputs)} inputs: send at most {most} in one request.")

    def json_response(content: object) -> Response:
        return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    @app.post("/embed/text", response_model=Embeddings, summary="Embed texts")
    async def embed_text(request: Request, body: Texts) -> Response:
        """One vector per text, in their order."""
        check_count(body.texts, "texts")
        instruction = body.prompt or DEFAULT_INSTRUCTION
        job = await embed(request, batcher, [Source(text, None, instruction) for text in body.texts])
        return json_response({"embeddings": job.vectors})

    @app.post("/embed/image", response_model=Embeddings, summary="Embed an image, alone or fused with a text")
    async def embed_image(
        request: Request, form: Annotated[ImageForm, Form(media_type="multipart/form-data")]
    ) -> Response:
        """One vector for the image, or for image and text together."""
        source = Source(form.text, await form.file.read(), form.prompt or DEFAULT_INSTRUCTION)
        job = await embed(request, batcher, [source])
        return json_response({"embeddings": job.vectors})

    @app.post("/v1/embeddings", responses=openai_responses(EMBEDDING_LIST), summary="Embed as with OpenAI's API")
    async def openai_embeddings(request: Request, body: OpenAIRequest) -> Response:
        """OpenAI's list object, with one embedding per input in their order."""
        if body.dimensions not in (None, model.dimension):
            sentence = f"dimensions can only be {model.dimension}: this model was not trained to be cut."
            raise RefusedError(400, sentence)
        items = [body.input] if isinstance(body.input, str) else body.input
        check_count(items, "input")
        instruction = body.prompt or DEFAULT_INSTRUCTION
        job = await embed(request, batcher, [read_item(item, index, instruction) for index, item in enumerate(items)])
        numbers = body.encoding_format != "base64"
        vectors = job.vectors if numbers else [base64.b64encode(vector.tobytes()).decode() for vector in job.vectors]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        usage = {"prompt_tokens": job.tokens, "total_tokens": job.tokens}
        return json_response({"object": "list", "data": data, "model": settings.model_id, "usage": usage})

    @app.get("/v1/models", responses=openai_responses(MODEL_LIST), summary="The one model, as with OpenAI's API")
    async def openai_models() -> Response:
        """OpenAI's list of models."""
        owner = settings.model_id.partition("/")[0]
        entry = {"id": settings.model_id, "object": "model", "created": 0, "owned_by": owner}
        return json_response({"object": "list", "data": [entry]})

    @app.get("/health", response_model=Health, responses={503: {"model": Health}}, summary="Whether the service works")
    async def health() -> Response:
        """Which model runs, where, and how much waits for it."""
        state = Health(
            status="ok" if batcher.alive else "the model thread has ended",
            model=settings.model_id,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            dimension=model.dimension,
            queue_depth=batcher.depth,
        )
        return Response(state.model_dump_json(), 200 if batcher.alive else 503, media_type="application/json")

    instrumentator = Instrumentator(should_group_status_codes=False).instrument(app, latency_lowr_buckets=SECONDS)
    instrumentator.expose(app, summary="Metrics for Prometheus", response_class=PlainTextResponse)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    return app


# --------------------------------------------------------------------------------------------------------- 7. app

DEATH_SECONDS = 10  # for the answers under way, when the model thread has ended


def default_batch_tokens(device: torch.device) -> int:
    """Enough to keep the device busy, and no more: a batch is as long as a lone query may have to wait."""
    return 16384 if device.type == "cuda" else min(256 * torch.get_num_threads(), 8192)


def build() -> FastAPI:
    """Load the model and return the app that serves it. Raises `SystemExit` with a sentence when it cannot."""
    started = time.perf_counter()
    died = threading.Event()

    def end_process() -> None:
        died.set()
        os.kill(os.getpid(), signal.SIGTERM)  # uvicorn answers what it can and shuts down
        hard_end = threading.Timer(DEATH_SECONDS, os._exit, (1,))
        hard_end.daemon = True
        hard_end.start()

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # uvicorn raises the signal again when its graceful shutdown is done: this is what it meets
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(died.is_set())))
    # uvicorn has chosen the class of its connections by now, but makes each of them anew
    HttpToolsProtocol.__new__ = lambda *_, **__: object.__new__(Connection)  # type: ignore[assignment]
    settings = Settings.load()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    max_tokens = settings.max_batch_tokens or default_batch_tokens(device)
    directory = find_checkpoint(settings)
    prepare = Preparer(directory, settings.max_length, settings.max_image_pixels)
    model = Model(directory, device, dtype)
    model.embed([one for one in prepare([Source("warm up")]) if isinstance(one, Input)])
    gc.collect()
    gc.freeze()  # what is loaded by now stays, and going over it took the collector a third of the event loop's time
    batcher = Batcher(prepare, model.embed, model.dimension, settings, max_tokens)
    batcher.on_death = end_process
    QUEUE_DEPTH.set_function(lambda: batcher.depth)
    name, seconds = f"{settings.model_id} on {device} in {dtype}", time.perf_counter() - started
    log.info("%s: %d dimensions, loaded in %.1f s from %s.", name, model.dimension, seconds, directory)
    return create_app(settings, batcher, model)


if __name__ == "__main__":
    # uvicorn with its own flags, in this process but from the start: it imports this file by its name
    if "--help" in sys.argv:
        print("python gme_service.py [OPTIONS]: on all addresses and port 8000 unless the options of uvicorn, below,")
        print("say otherwise. The settings are environment variables, GME_*: see README.md.\n", flush=True)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "gme_service:app"]
    os.execv(sys.executable, [*command, "--host", "0.0.0.0", *sys.argv[1:]])
try:
    app = build()
except SystemExit as end:
    print(end, file=sys.stderr)
    sys.exit(3)  # for uvicorn a failed start: it does not start its workers again and again
