"""The rig of all tests: the checkpoints, the authors' vectors, and the service in processes of its own.

Whoever imports it first sets the environment in which gme_service, which loads the model when imported, is the toy.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TOY = TESTS / "models" / "toy" / "shapes"
WIDE = TESTS / "models" / "toy" / "wide"  # random weights in the 7B's proportions, as a current transformers saves them
IMAGES = TESTS / "golden" / "images"
ENVIRONMENT = {
    "GME_MODEL_DIR": str(TESTS / "models"),
    "GME_MODEL_ID": "toy/shapes",
    "GME_DEVICE": "cpu",
    "GME_DTYPE": "float32",
    "TOKENIZERS_PARALLELISM": "false",
    "UVICORN_HTTP": "h11",  # as the systemd unit has it
}
# For the clients of others, which else call home
QUIET = {"ANONYMIZED_TELEMETRY": "False", "HAYSTACK_TELEMETRY_ENABLED": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
# The settings of a server with an API key and small limits
STRICT = {"GME_API_KEY": "a-long-and-secret-key", "GME_MAX_INPUTS": "3", "GME_MAX_BODY_MB": "1"}
STRICT["GME_MAX_IMAGE_PIXELS"] = "50000"
for name in [name for name in os.environ if name.startswith(("GME_", "UVICORN_", "MODELSCOPE_"))]:
    del os.environ[name]
os.environ.update(ENVIRONMENT)  # before anything imports gme_service, which loads the model
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Case:
    """One golden input and the vector that the authors' own code gives for it."""

    number: int
    vector: np.ndarray
    text: str = ""
    image: str | None = None
    prompt: str | None = None

    @property
    def data(self) -> bytes | None:
        """The image file, if any."""
        return None if self.image is None else (IMAGES / self.image).read_bytes()


def golden(wide: bool = False) -> list[Case]:
    """The cases of the toy checkpoint, or those of the wide one."""
    folder = TESTS / "golden"
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    numbers = json.loads((folder / "wide_cases.json").read_text()) if wide else range(len(cases))
    vectors = np.load(folder / ("wide_vectors.npy" if wide else "vectors.npy"))
    return [Case(number, vector, **cases[number]) for number, vector in zip(numbers, vectors, strict=True)]


@dataclass
class Address:
    """Where a server of the app is."""

    url: str

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


@dataclass
class Server(Address):
    """A uvicorn that serves the app in a process of its own."""

    process: subprocess.Popen[str]
    log: Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


Start = Callable[..., Server]  # the fixture `start`
Patch = pytest.MonkeyPatch


def run(*arguments: str, prefix: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout until it ends by itself."""
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True, "timeout": 90}
    return subprocess.run([*prefix, sys.executable, *arguments], **options)


@contextlib.contextmanager
def serve(log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Run `uvicorn gme_service:app` on a free port until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "gme_service:app", "--port", str(port), *arguments]
    with log.open("w") as output:
        options = {"cwd": ROOT, "env": os.environ | environment, "stdout": output, "stderr": output, "text": True}
        process = subprocess.Popen(command, **options)
        try:
            yield wait_until_open(Server(f"http://127.0.0.1:{port}", process, log))
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()  # which does nothing when it has ended


def wait_until_open(server: Server, seconds: float = 120) -> Server:
    """The port opens when the model is loaded; poll it, as nothing else says so."""
    deadline = time.monotonic() + seconds
    while server.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{server.url}/health", timeout=5)
            return server
        time.sleep(0.05)
    pytest.fail(f"The server did not start:\n{server.log.read_text()}")


@contextlib.contextmanager
def serve_or_use(config: pytest.Config, option: str, log: Path, **environment: str) -> Iterator[Address]:
    """The server that the command line names with `option`; when it names none at all, one of our own."""
    if url := config.getoption(option):
        yield Address(url)
    else:
        skip_with_an_address(config, f"no {option} is given")
        with serve(log, **environment) as running:
            yield running


def skip_with_an_address(config: pytest.Config, reason: str) -> None:
    if config.getoption("--url") or config.getoption("--strict-url"):
        pytest.skip(reason)
