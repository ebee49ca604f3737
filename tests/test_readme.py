"""The two READMEs say the same, and every command and example in them works.

The info string of a code block says what to do with it: `bash` is run, command by command, against a live server; `bash
serve` and `bash run` start the service, and are run without their set-up; `bash test` is what .ci/run runs, and so runs
this; `bash example` is run without its set-up, with the address of the server added; `bash manual` needs a download, and
is not run. `python` is run, and prints the comments at its end; a second word names the package that it needs. The
snippets in the table of clients are run where their packages are installed (those of npm in tests/extra).
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, Server, wait_until_open
from PIL import Image
from prometheus_client import REGISTRY

from gme_service import ServiceError, Settings, app

URL = "http://localhost:8000"
SET_UP = ("python3 -m venv .venv", ".venv/bin/pip install ")
QUIET = {"ANONYMIZED_TELEMETRY": "False", "HAYSTACK_TELEMETRY_ENABLED": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
PAGES = ["README.md", "README.zh-CN.md", "deploy/README.md", "deploy/SCALING.md", "deploy/METRICS.md"]
PAGES += ["tests/PERFORMANCE.md"]
LANGUAGES = PAGES[:2]


class Block(NamedTuple):
    info: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(*found) for found in re.findall(r"^```(\S.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)]


def prose(page: str) -> str:
    return re.sub(r"^```\S.*\n(?:.*\n)*?```$", "", (ROOT / page).read_text(), flags=re.MULTILINE)


def table(page: str, first: str) -> list[list[str]]:
    """The rows from the one that starts with `first` to the end of its table, as cells."""
    rows = re.search(rf"^\| {re.escape(first)}.*\n(?:\|.*\n)*", prose(page), re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def of(*infos: str) -> list[object]:
    return [pytest.param(block, id=block.code[:40]) for block in blocks("README.md") if block.info in infos]


def steps(code: str) -> tuple[list[str], list[str]]:
    """What a block does to set up, and what then."""
    lines = re.split(r"\n| && ", code.strip())
    return [line for line in lines if line.startswith(SET_UP)], [line for line in lines if not line.startswith(SET_UP)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What looks like a clone in which set-up has been done, with a user's files and a curl that fails on an error."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    drawing = Image.open(ROOT / "tests/shapes/red_circle.png").convert("RGB")
    drawing.save(tmp_path / "photo.jpg")
    drawing.save(tmp_path / "report.pdf")
    return tmp_path


def run(command: list[str], clone: Path) -> str:
    environment = os.environ | QUIET | {"CURL_HOME": str(clone), "CHROMA_OPENAI_API_KEY": "any"}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_readmes_are_short_and_have_the_same_commands_and_structure() -> None:
    first, second = (
        [line[:2] for line in prose(page).splitlines() if line.startswith(("#", "- ", "| ", "<"))] for page in LANGUAGES
    )
    assert first == second
    assert blocks(LANGUAGES[0]) == blocks(LANGUAGES[1])
    assert [block.info for block in blocks("README.md") if block.info in ("bash run", "bash test")] == [
        "bash run",
        "bash test",
    ]
    assert all(len((ROOT / page).read_text().splitlines()) <= 250 for page in LANGUAGES)
    assert not re.search(r"[^\n|>]\n(?![-#|`\n])\S", prose(LANGUAGES[1]))  # a line break becomes a space in a browser


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_commands_are_shell(page: str) -> None:
    text = prose(page)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        near = (ROOT / page).parent / target.partition("#")[0]
        assert target.startswith("https://") or (target[1:] in anchors if target[0] == "#" else near.exists()), target
    for block in blocks(page):
        if block.info.startswith("bash"):
            subprocess.run(["bash", "-n", "-c", block.code], check=True)


def test_the_test_command_is_the_one_that_ci_extracts() -> None:
    (script,) = re.findall(r"sed -n '.*bash test.*README.md", (ROOT / ".ci/run").read_text())
    extracted = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [extracted] == [block.code for block in blocks("README.md") if block.info == "bash test"]


@pytest.mark.parametrize("photo", ["tests/shapes/red_circle.png", "large.png"])
@pytest.mark.parametrize("block", of("bash"))
def test_curl(block: Block, photo: str, clone: Path, server: Server) -> None:
    """With the README's drawing, and with a photo of 5 MB in its place."""
    if photo == "large.png":
        Image.frombytes("RGB", (1500, 1200), os.urandom(5_400_000)).save(clone / photo)
    for command in block.code.splitlines():
        if photo in command or photo != "large.png":
            answer = run(["bash", "-euo", "pipefail", "-c", command.replace(URL, server.url)], clone)
            assert json.loads(answer).keys() & {"embeddings", "data"}


@pytest.mark.parametrize("block", of("python", "python openai"))
def test_python(block: Block, clone: Path, server: Server) -> None:
    for package in block.info.split()[1:]:
        pytest.importorskip(package)
    printed = run([sys.executable, "-c", block.code.replace(URL, server.url)], clone)
    assert printed.splitlines() == re.findall(r"^# (.*)", block.code, re.MULTILINE)


@pytest.mark.parametrize("row", table("README.md", "LangChain"), ids=lambda row: row[0][:20])
def test_client_in_the_table(row: list[str], clone: Path, server: Server) -> None:
    *imports, snippet = re.findall(r"`(.*?)`", row[1])
    if not imports:
        pytest.skip("It is no snippet of Python.")
    for line in imports:
        pytest.importorskip(line.split()[1], exc_type=ImportError)
    prompt = row[2].strip("`")
    prompted = [snippet.replace('gme"', f'gme", {prompt}', 1)] * (prompt != "none")
    image = base64.b64encode((ROOT / "tests/shapes/red_circle.png").read_bytes()).decode()
    values = f"{server.url}/v1", "Find it.", ["a red circle", f"data:image/png;base64,{image}"]
    run([sys.executable, "-c", "\n".join([f"URL, PROMPT, INPUT = {values}", *imports, snippet, *prompted])], clone)


@pytest.mark.parametrize("block", of("bash example"))
def test_example(block: Block, clone: Path, server: Server) -> None:
    pytest.importorskip("qdrant_client")
    pytest.importorskip("pypdfium2")
    for command in steps(block.code)[1]:
        assert re.search(r"circle: red_circle.png|page 1: \d", run(["bash", "-c", f"{command} {server.url}"], clone))


@pytest.mark.parametrize("block", of("bash serve", "bash run"))
def test_start(block: Block, clone: Path) -> None:
    """The set-up is in the test command and in .ci/run."""
    set_up, (start,) = steps(block.code)
    assert set_up[-1] == f"{SET_UP[1]}-r requirements.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = start.replace("0.0.0.0", "127.0.0.1").replace("--port 8000", f"--port {port}")
    with (clone / "log").open("w") as log:
        process = subprocess.Popen(["bash", "-c", start], cwd=clone, stdout=log, stderr=log, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process, clone / "log")
    try:
        with wait_until_open(server).client() as client:
            assert client.get("/health").json()["model"] == "toy/shapes"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.parametrize("page", LANGUAGES)
def test_the_tables_name_what_the_code_has(page: str) -> None:
    settings = table(page, "`GME_MODEL_DIR`")
    assert [row[0] for row in settings] == [f"`GME_{name.upper()}`" for name in Settings.model_fields]
    for (name, field), (_, cell, _) in zip(Settings.model_fields.items(), settings, strict=True):
        stated = getattr(Settings.model_validate({name: cell.strip("`")}), name) if "`" in cell else None
        assert stated == field.default
    routes = {f"`{method.upper()} {path}`" for path, methods in app.openapi()["paths"].items() for method in methods}
    assert {row[0] for row in table(page, "`POST /embed/text`")} == routes | {"`GET /docs`"}
    statuses = {error.status for error in [ServiceError, *ServiceError.__subclasses__()]}
    assert {int(row[0]) for row in table(page, "400")} == statuses


def test_the_glossary_has_every_metric_of_ours() -> None:
    ours = {f"{one.name}{'_total' * (one.type == 'counter')}" for one in REGISTRY.collect() if one.name[:4] == "gme_"}
    named = {row[0].strip("`") for row in table("deploy/METRICS.md", "`gme_info`")}
    assert {name for name in named if name.startswith("gme_")} == ours
