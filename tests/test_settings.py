"""Room Settings: what the environment changes, and what stops the start with a sentence instead of a traceback."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TOY, run
from hub import serve_hub

import gme_service as gme

UVICORN = ("-m", "uvicorn", "gme_service:app", "--port", "0")
EVERY = {
    "model_dir": Path("/srv/models"),
    "model_id": "iic/gme-Qwen2-VL-7B-Instruct",
    "model_revision": "v1.0.0",
    "device": "cuda:1",
    "dtype": "bfloat16",
    "max_length": 32768,
    "max_batch_tokens": 4096,
    "max_inputs": 1,
    "max_body_mb": 0.5,
    "max_image_pixels": 1_000_000,
    "max_image_tokens": 256,
    "max_queue": 10,
    "cache_mb": 0,
    "api_key": "秘密 key",
}
VALUES = [("DTYPE", "int8"), ("MAX_QUEUE", "none"), ("MAX_IMAGE_PIXELS", "1e400"), ("MAX_IMAGE_TOKENS", "255")]
VALUES += [("MAX_LENGTH", text) for text in ("long", "1800.5", "0", "32769")]
VALUES += [(f"MAX_{name}", "0") for name in ("BATCH_TOKENS", "INPUTS", "BODY_MB", "IMAGE_PIXELS", "QUEUE")]
VALUES += [(name, text) for name in ("MAX_BODY_MB", "CACHE_MB") for text in ("-1", "inf", "nan")]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No `GME_*` variable is set but those that the test sets."""
    for name in [name for name in os.environ if name.startswith("GME_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def refusal() -> list[str]:
    """The sentences with which the settings of the environment are refused, one a line."""
    with pytest.raises(gme.StartError) as stop:
        gme.Settings.load()
    return str(stop.value).splitlines()


def test_every_variable_sets_its_value(environment: pytest.MonkeyPatch) -> None:
    for name, value in EVERY.items():
        environment.setenv(f"GME_{name.upper()}", str(value))
    assert gme.Settings.load().model_dump() == EVERY


def test_an_empty_variable_leaves_the_default(environment: pytest.MonkeyPatch) -> None:
    default = gme.Settings.load()
    for name in EVERY:
        environment.setenv(f"GME_{name.upper()}", "")
    assert gme.Settings.load() == default


@pytest.mark.parametrize(("name", "text"), VALUES)
def test_a_value_that_cannot_be_used_is_named(environment: pytest.MonkeyPatch, name: str, text: str) -> None:
    environment.setenv(f"GME_{name}", text)
    (sentence,) = refusal()
    assert f"GME_{name}" in sentence
    assert text in sentence


def test_a_directory_of_a_user_who_is_none_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GME_MODEL_DIR", "~nosuchuser/models")
    (sentence,) = refusal()
    assert "GME_MODEL_DIR" in sentence


@pytest.mark.parametrize(
    ("typo", "meant"), [("GME_APIKEY", "GME_API_KEY"), ("GME_KEY", "GME_API_KEY"), ("GME_MAX_LENGHT", "GME_MAX_LENGTH")]
)
def test_a_name_that_is_no_setting_is_refused_with_the_nearest(
    environment: pytest.MonkeyPatch, typo: str, meant: str
) -> None:
    environment.setenv(typo, "secret")  # which would serve everybody, were it ignored
    (sentence,) = refusal()
    assert re.findall(r"GME_\w+", sentence) == [typo, meant]
    assert "secret" not in sentence


@pytest.mark.parametrize(("text", "key"), [("", None), (" \n", None), (" 秘密 key\n", "秘密 key")])
def test_a_key_is_stripped_and_an_empty_one_is_said_in_the_log(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, key: str | None
) -> None:
    environment.setenv("GME_API_KEY", text)
    assert (gme.Settings.load().api_key or None) == key
    assert ("GME_API_KEY" in caplog.text) == (key is None)


def test_bad_settings_end_uvicorn_with_a_sentence_each_and_a_code_of_their_own() -> None:
    end = run(*UVICORN, GME_MAX_LENGTH="long", GME_APIKEY="secret")
    assert end.returncode == 78  # with which the systemd unit is not started again
    assert sorted(re.findall(r"^GME_\w+", end.stderr, re.MULTILINE)) == ["GME_APIKEY", "GME_MAX_LENGTH"]
    assert len(end.stderr.splitlines()) == 2
    assert end.stdout == ""


@pytest.mark.parametrize("name", ["warp", "cuda:99", "cpu:cpu", "cpu, please", "meta"])
def test_a_device_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(gme.StartError) as stop:
        gme.choose_device(name)
    assert f"GME_DEVICE={name}" in str(stop.value)
    assert "\n" not in str(stop.value)


def test_the_device_is_cuda_where_there_is_one() -> None:
    assert gme.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert gme.choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "device", "features", "dtype"),
    [
        ("auto", "cuda", {}, torch.float16),  # as published
        ("auto", "cpu", {"avx2": True, "avx512_bf16": False}, torch.float32),
        ("auto", "cpu", {"avx512_bf16": True}, torch.bfloat16),  # where it computes it natively
        ("auto", "cpu", {"arm_bf16": True}, torch.bfloat16),
        ("float32", "cuda", {}, torch.float32),
        ("float16", "cpu", {"avx512_bf16": True}, torch.float16),
    ],
)
def test_the_dtype_suits_the_device_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, features: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert gme.choose_dtype(name, torch.device(device)) == dtype


@pytest.fixture
def nobody() -> list[str]:
    """What goes in front of a command to run it for a user without HOME and without an entry in the list of users."""
    prefix = ["env", "--unset=HOME", "unshare", "--user", "--map-user=54321"]
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system gives no user namespaces")
    return prefix


def test_a_user_without_home_is_asked_for_a_directory(environment: pytest.MonkeyPatch, nobody: list[str]) -> None:
    end = run(*UVICORN, prefix=nobody)
    assert end.returncode == 78
    assert "GME_MODEL_DIR" in end.stderr
    assert len(end.stderr.splitlines()) == 1


def test_a_user_without_home_downloads_into_a_directory(tmp_path: Path, nobody: list[str]) -> None:
    with serve_hub(TOY, "toy/shapes") as hub:
        variables = {"GME_MODEL_DIR": str(tmp_path), "MODELSCOPE_ENDPOINT": hub.url}
        end = run("-c", "import gme_service", prefix=nobody, **variables)
    assert end.returncode == 0, end.stderr
    for name, content in hub.files.items():
        assert (tmp_path / "toy" / "shapes" / name).read_bytes() == content
