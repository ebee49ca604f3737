"""Room Settings: what the environment changes, and what stops the start with a sentence instead of a traceback."""

import os
import re
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TOY, Patch, run
from hub import serve_hub

import gme_service as gme

UVICORN = ("-m", "uvicorn", "gme_service:app", "--port", "0")
VALUES = [("MODEL_DIR", "~nosuchuser"), ("DTYPE", "int8"), ("MAX_IMAGE_PIXELS", "1e400"), ("MAX_BODY_MB", "inf")]
VALUES += [("CACHE_MB", "-1"), *(("MAX_LENGTH", text) for text in ("long", "1800.5", "0", "32769"))]


@pytest.fixture
def environment(monkeypatch: Patch) -> Patch:
    """No `GME_*` variable is set but those that the test sets."""
    for name in [name for name in os.environ if name.startswith("GME_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def refusal() -> str:
    """The sentence with which the settings of the environment are refused."""
    with pytest.raises(gme.StartError) as stop:
        gme.Settings.load()
    return str(stop.value)


def test_an_empty_variable_leaves_the_default(environment: Patch) -> None:
    default = gme.Settings.load()
    for name in gme.Settings.model_fields:
        environment.setenv(f"GME_{name.upper()}", "")
    assert gme.Settings.load() == default


@pytest.mark.parametrize(("name", "text"), VALUES)
def test_a_value_that_cannot_be_used_is_named(environment: Patch, name: str, text: str) -> None:
    environment.setenv(f"GME_{name}", text)
    assert refusal().startswith(f"GME_{name} ")


@pytest.mark.parametrize("name", ["GME_APIKEY", "gme_apikey"])
def test_a_name_that_is_no_setting_is_refused_with_the_nearest(environment: Patch, name: str) -> None:
    environment.setenv(name, "secret")  # which would serve everybody, were it ignored
    sentence = refusal()
    assert re.findall(r"(?i)GME_\w+", sentence) == ["GME_APIKEY", "GME_API_KEY"]
    assert "secret" not in sentence


def test_a_key_is_stripped_and_one_of_blanks_is_refused(environment: Patch) -> None:
    environment.setenv("GME_API_KEY", " 秘密 key\n")
    assert gme.Settings.load().api_key == "秘密 key"
    environment.setenv("GME_API_KEY", " \n")  # which would serve everybody, were it none
    assert "GME_API_KEY" in refusal()


def test_a_bad_setting_ends_uvicorn_with_a_sentence_and_a_code_of_its_own() -> None:
    end = run(*UVICORN, GME_MAX_LENGTH="long")
    assert (end.returncode, end.stdout) == (78, "")  # with which the systemd unit is not started again
    assert len(end.stderr.splitlines()) == 1
    assert end.stderr.startswith("GME_MAX_LENGTH ")


@pytest.mark.parametrize("name", ["warp", "cuda:99", "cpu, please", "meta"])
def test_a_device_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(gme.StartError) as stop:
        gme.choose_device(name, "auto")
    assert f"GME_DEVICE={name}" in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_device_whose_memory_is_still_taken_is_tried_again_by_systemd(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "ones", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(gme.StartLaterError):  # and not with the code that prevents a restart
        gme.choose_device("cpu", "auto")


@pytest.mark.parametrize(
    ("name", "device", "features", "dtype"),
    [
        ("auto", "cuda", {}, torch.float16),  # as published
        ("auto", "cpu", {"avx2": True, "avx512_bf16": False}, torch.float32),
        ("auto", "cpu", {"avx512_bf16": True}, torch.bfloat16),  # where it computes it natively
        ("float16", "cpu", {"avx512_bf16": True}, torch.float16),
    ],
)
def test_the_dtype_suits_the_device_unless_it_is_named(
    monkeypatch: Patch, name: str, device: str, features: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch, "ones", Mock())  # as if every device were there
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert gme.choose_device(device, name) == (torch.device(device), dtype)


def test_a_user_without_home_is_asked_for_a_directory_and_downloads_into_it(environment: Patch, tmp_path: Path) -> None:
    prefix = ["env", "--unset=HOME", "unshare", "--user", "--map-user=54321"]
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system gives no user namespaces")
    end = run(*UVICORN, prefix=prefix)
    assert end.returncode == 78
    assert "GME_MODEL_DIR" in end.stderr
    assert len(end.stderr.splitlines()) == 1
    environment.setenv("GME_MODEL_ID", "toy/shapes")
    with serve_hub(TOY, "toy/shapes") as hub:
        variables = {"GME_MODEL_DIR": str(tmp_path), "MODELSCOPE_ENDPOINT": hub.url}
        end = run("-c", "import gme_service", prefix=prefix, **variables)
    assert end.returncode == 0, end.stderr
    for name, content in hub.files.items():
        assert (tmp_path / "toy" / "shapes" / name).read_bytes() == content
