"""Room Settings: what the environment changes, and what stops the start with a sentence instead of a traceback."""

import logging
import os
import re
from unittest.mock import Mock

import h11
import pytest
import torch
from conftest import Patch, run
from fastapi.security.utils import get_authorization_scheme_param
from hypothesis import HealthCheck, given, settings, strategies

import gme_service as gme

UVICORN = ("-m", "uvicorn", "gme_service:app", "--port", "0")
VALUES = [
    ("MODEL_DIR", "~nosuchuser"),
    *(("MODEL_ID", name) for name in ("/toy/shapes", "../shapes", "toy/../../shapes", "toy//shapes", ".")),
    ("DTYPE", "int8"),
    *(("MAX_LENGTH", text) for text in ("long", "1800.5", "0", "32769")),
    ("MAX_BODY_MB", "inf"),
    ("MAX_IMAGE_PIXELS", "1e400"),
    ("CACHE_MB", "-1"),
    ("QUERY_PROMPT", " "),
    *(("API_KEY", key) for key in (" \n", "two\nlines", "a\x7fb", "clé à")),  # "à" ends with a byte that HTTP strips
]
# What a container sees of two Services, called `gme` and `gme-service`. A name that is upper-case has no dashes.
OF_KUBERNETES = {
    "GME_PORT": "tcp://10.0.0.1:8000",
    "GME_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "GME_PORT_8000_TCP_ADDR": "10.0.0.1",
    "GME_PORT_8000_TCP_PORT": "8000",
    "GME_PORT_8000_TCP_PROTO": "tcp",
    "GME_SERVICE_HOST": "10.0.0.1",
    "GME_SERVICE_PORT": "8000",
    "GME_SERVICE_PORT_HTTP": "8000",
    "GME_SERVICE_PORT_80_TCP_ADDR": "10.0.0.2",
    "GME_SERVICE_SERVICE_HOST": "10.0.0.2",
    "GME_SERVICE_SERVICE_PORT": "80",
}


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
def test_a_name_that_is_no_setting_is_refused_with_one_that_is_near(environment: Patch, name: str) -> None:
    environment.setenv(name, "secret")  # which would serve everybody, were it ignored
    sentence = refusal()
    assert re.findall(r"(?i)GME_\w+", sentence) == ["GME_APIKEY", "GME_API_KEY"]
    assert "secret" not in sentence


@pytest.mark.parametrize(("name", "value"), [("GME_LOG_LEVEL", "info"), ("GME_PORT", "9000"), ("GME_HOST", "gme")])
def test_where_no_setting_is_near_none_is_named(environment: Patch, name: str, value: str) -> None:
    environment.setenv(name, value)
    assert re.findall(r"GME_\w+", refusal()) == [name]


def test_what_kubernetes_adds_for_a_service_is_ignored_with_one_line(
    environment: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    default = gme.Settings.load()
    for name, value in OF_KUBERNETES.items():
        environment.setenv(name, value)
    assert gme.Settings.load() == default
    (line,) = caplog.messages
    assert re.findall(r"GME_\w+", line) == sorted(OF_KUBERNETES)


def test_a_key_and_a_prompt_are_stripped(environment: Patch) -> None:
    environment.setenv("GME_API_KEY", " 秘密 key\n")
    environment.setenv("GME_QUERY_PROMPT", "Find an image that matches the given text.\n")
    found = gme.Settings.load()
    assert found.api_key == "秘密 key"
    assert found.query_prompt == "Find an image that matches the given text."


@given(key=strategies.text(strategies.characters(max_codepoint=0x2100, exclude_characters="\0"), min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_key_that_is_taken_comes_as_it_was_sent(environment: Patch, key: str) -> None:
    environment.setenv("GME_API_KEY", key)
    try:
        key = gme.Settings.load().api_key
    except gme.StartError:
        return
    headers = [("Host", "gme"), ("Authorization", b"Bearer " + key.encode())]
    request = h11.Request(method="GET", target="/", headers=headers)
    received = dict(request.headers)[b"authorization"].decode("latin-1")
    assert get_authorization_scheme_param(received)[1].encode("latin-1").decode() == key


def test_a_bad_setting_ends_uvicorn_with_a_sentence_and_a_code_of_its_own() -> None:
    end = run(*UVICORN, GME_MAX_LENGTH="long")
    assert (end.returncode, end.stdout) == (78, "")  # with which the systemd unit is not started again
    assert len(end.stderr.splitlines()) == 1
    assert end.stderr.startswith("GME_MAX_LENGTH ")


@pytest.mark.parametrize("name", ["warp", "cuda:99", "cpu, please", "meta", "mps:9", "vulkan", "hpu"])
def test_a_device_that_cannot_be_used_is_named_in_one_short_line(name: str) -> None:
    with pytest.raises(gme.StartError) as stop:
        gme.choose_device(name, "auto")
    sentence = str(stop.value)
    assert sentence.startswith(f"GME_DEVICE={name} cannot be used: ")
    assert "\n" not in sentence
    assert len(sentence) < 320  # torch lists its 20 kinds of device for one, and its 40 backends for others


def test_a_device_whose_memory_is_still_taken_is_tried_again_by_systemd(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "ones", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(gme.StartLaterError):  # and not with the code that prevents a restart
        gme.choose_device("cpu", "auto")


@pytest.mark.parametrize(
    ("name", "device", "features", "dtype"),
    [
        ("auto", "cuda", {}, torch.float16),
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
