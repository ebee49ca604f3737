"""The fixtures of all tests, and what they take: a running service, in place of those that the tests start."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from rig import (  # noqa: F401  # the tests have them from here
    ENVIRONMENT,
    IMAGES,
    QUIET,
    ROOT,
    STRICT,
    TESTS,
    TOY,
    WIDE,
    Address,
    Case,
    Patch,
    Server,
    Start,
    free_port,
    golden,
    run,
    serve,
    serve_or_use,
    skip_with_an_address,
    wait_until_open,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    toy = "a running server of the toy checkpoint, on a CPU in float32"
    parser.addoption("--url", help=f"run the tests that need nothing but HTTP against {toy}")
    parser.addoption("--strict-url", help=f"the same with {toy}, and with the settings of the tests of limits")


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """One server for all tests that do not change it."""
    with serve_or_use(pytestconfig, "--url", tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def client(server: Address) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def start(pytestconfig: pytest.Config, tmp_path: Path) -> Iterator[Start]:
    """Start further servers, with uvicorn arguments and environment variables of the test's own."""
    skip_with_an_address(pytestconfig, "it starts servers of its own")
    with contextlib.ExitStack() as stack:
        logs = (tmp_path / f"server-{number}.log" for number in itertools.count())
        yield lambda *arguments, **environment: stack.enter_context(serve(next(logs), *arguments, **environment))
