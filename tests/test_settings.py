"""Room Settings: the table's defaults, what the environment changes, and what stops the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import gme_service as gme

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No `GME_*` variable is set but those that the test sets."""
    for name in [name for name in os.environ if name.startswith("GME_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def start(**variables: str) -> subprocess.CompletedProcess[str]:
    """Start the service as its users do, until it ends by itself."""
    command = [sys.executable, "-m", "uvicorn", "gme_service:app", "--port", "0"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)


def test_defaults_are_those_of_the_table(environment: pytest.MonkeyPatch) -> None:
    assert gme.Settings.load().model_dump() == {
        "model_dir": Path("~/gme_models"),
        "model_id": "iic/gme-Qwen2-VL-2B-Instruct",
        "model_revision": None,
        "device": "auto",
        "dtype": "auto",
        "max_length": 1800,
        "max_batch_tokens": None,
        "max_inputs": 2048,
        "max_body_mb": 32,
        "max_image_pixels": 100_000_000,
        "max_queue": 16384,
        "cache_mb": 64,
        "api_key": None,
    }


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("GME_MODEL_DIR", "/srv/models", Path("/srv/models")),
        ("GME_MODEL_ID", "iic/gme-Qwen2-VL-7B-Instruct", "iic/gme-Qwen2-VL-7B-Instruct"),
        ("GME_MODEL_REVISION", "v1.0.0", "v1.0.0"),
        ("GME_DEVICE", "cuda:1", "cuda:1"),
        ("GME_DTYPE", "bfloat16", "bfloat16"),
        ("GME_MAX_LENGTH", "32768", 32768),
        ("GME_MAX_BATCH_TOKENS", "4096", 4096),
        ("GME_MAX_INPUTS", "1", 1),
        ("GME_MAX_BODY_MB", "0.5", 0.5),
        ("GME_MAX_IMAGE_PIXELS", "1000000", 1_000_000),
        ("GME_MAX_QUEUE", "10", 10),
        ("GME_CACHE_MB", "0", 0),
        ("GME_API_KEY", "秘密 key", "秘密 key"),
    ],
)
def test_a_variable_sets_its_value(environment: pytest.MonkeyPatch, variable: str, text: str, value: object) -> None:
    environment.setenv(variable, text)
    assert getattr(gme.Settings.load(), variable.removeprefix("GME_").lower()) == value


@pytest.mark.parametrize("name", list(gme.Settings.model_fields))
def test_an_empty_variable_leaves_the_default(environment: pytest.MonkeyPatch, name: str) -> None:
    default = gme.Settings.load()
    environment.setenv(f"GME_{name.upper()}", "")
    assert gme.Settings.load() == default


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("GME_DTYPE", "int8"),
        ("GME_MAX_LENGTH", "long"),
        ("GME_MAX_LENGTH", "1800.5"),
        ("GME_MAX_LENGTH", "0"),
        ("GME_MAX_LENGTH", "32769"),
        ("GME_MAX_BATCH_TOKENS", "0"),
        ("GME_MAX_INPUTS", "0"),
        ("GME_MAX_BODY_MB", "0"),
        ("GME_MAX_BODY_MB", "-1"),
        ("GME_MAX_BODY_MB", "32 MB"),
        ("GME_MAX_BODY_MB", "inf"),
        ("GME_MAX_BODY_MB", "nan"),
        ("GME_MAX_IMAGE_PIXELS", "1e400"),
        ("GME_MAX_IMAGE_PIXELS", "0"),
        ("GME_MAX_QUEUE", "none"),
        ("GME_CACHE_MB", "-1"),
        ("GME_CACHE_MB", "inf"),
        ("GME_CACHE_MB", "nan"),
    ],
)
def test_a_value_that_does_not_parse_is_refused_by_name(
    environment: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    environment.setenv(variable, text)
    with pytest.raises(SystemExit) as stop:
        gme.Settings.load()
    sentence = str(stop.value.code)
    assert sentence.startswith(f"{variable}={text!r} cannot be used: ")
    assert "\n" not in sentence


def test_a_value_that_does_not_parse_stops_the_start_with_a_sentence_for_each() -> None:
    end = start(GME_MAX_LENGTH="long", GME_DTYPE="int8")
    assert end.returncode == 3  # with another code uvicorn starts its workers again and again
    sentences = end.stderr.splitlines()
    assert len(sentences) == 2
    assert all(line.startswith(("GME_MAX_LENGTH='long' cannot", "GME_DTYPE='int8' cannot")) for line in sentences)


@pytest.mark.parametrize("name", ["warp", "cuda:99", "cpu:cpu", "cpu, please"])
def test_a_device_that_does_not_exist_is_refused_by_name(name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        gme.choose_device(name)
    assert str(stop.value.code).startswith(f"GME_DEVICE={name!r} cannot be used: ")
    assert "\n" not in str(stop.value.code)


def test_auto_device_is_cuda_where_there_is_one() -> None:
    assert gme.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert gme.choose_device("cpu") == CPU


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_on_every_device(name: str, device: torch.device) -> None:
    assert gme.choose_dtype(name, device) == getattr(torch, name)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"arm_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu_is_bfloat16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert gme.choose_dtype("auto", CPU) == dtype


def test_auto_dtype_on_cuda_is_the_published_float16() -> None:
    assert gme.choose_dtype("auto", CUDA) == torch.float16
