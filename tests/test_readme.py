"""The two READMEs say the same, and every command and example in them works.

The info string of a code block says what to do with it: `bash` is run, command by command, against a live server;
`bash serve` starts the service, and is run without its set-up; `bash test` is what .ci/run runs, and so runs this;
`bash manual` needs root, a download, conda or half an hour, and is not run; `bash example` is run without its set-up,
with the address of the server as its argument. `python` is run. What an example prints is the `text` block after it,
if one does; a second word names the package that it needs.
"""

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
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from gme_service import STATUSES, Settings

INFOS = {"bash", "bash serve", "bash test", "bash manual", "bash example", "json", "text"}
PACKAGES = {"openai", "langchain_openai", "llama_index.embeddings.openai_like"}
INFOS |= {"python", *(f"python {package}" for package in PACKAGES)}
SET_UP = ("python3 -m venv ", ".venv/bin/pip install ")
PORT = "8000"
ADDRESS = f"localhost:{PORT}"


class Block(NamedTuple):
    """A code block: its info string, its text and the line of the README that it starts on."""

    info: str
    code: str
    line: int


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(readme: str) -> list[Block]:
    found = re.finditer(r"^```(.+)\n((?:.*\n)*?)```$", readme, re.MULTILINE)
    return [Block(match[1], match[2], readme[: match.start()].count("\n") + 1) for match in found]


def commands(code: str) -> list[str]:
    """The shell commands of a block: a line each, with the lines that its backslashes join to it."""
    return [line for line in re.split(r"(?<!\\)\n", code) if line and not line.startswith("#")]


def without_comments(block: Block) -> tuple[str, str]:
    return block.info, re.sub(r"^#.*\n", "", block.code, flags=re.MULTILINE)


def table(readme: str, first: str) -> list[list[str]]:
    """The rows below the head of the table whose first row starts with `first`, as cells."""
    lines = readme.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first}"))
    rows = []
    while lines[start + len(rows)].startswith("|"):
        rows.append([cell.strip() for cell in lines[start + len(rows)].strip("|").split("|")])
    return rows


ENGLISH, CHINESE = read("README.md"), read("README.zh-CN.md")
BLOCKS = blocks(ENGLISH)


def of(*infos: str) -> list[object]:
    return [pytest.param(block, id=f"line {block.line}") for block in BLOCKS if block.info in infos]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A place that looks like a clone in which set-up has been done, with a curl that fails on an error's status."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    return tmp_path


def run(command: list[str], clone: Path) -> str:
    environment = os.environ | {"CURL_HOME": str(clone)}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_readmes_have_the_same_commands_in_the_same_order() -> None:
    assert [without_comments(block) for block in blocks(CHINESE)] == [without_comments(block) for block in BLOCKS]


def test_the_two_readmes_have_the_same_structure() -> None:
    def structure(readme: str) -> list[str]:
        prose = re.sub(r"^```.+\n(?:.*\n)*?```$", "", readme, flags=re.MULTILINE)
        return re.findall(r"^(?:#+ |[-|] |<!-- \w+ -->)", prose, re.MULTILINE)

    assert structure(CHINESE) == structure(ENGLISH)


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_links_lead_somewhere(readme: str) -> None:
    def anchor(heading: str) -> str:  # as GitHub makes it
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", readme, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_each_block_says_what_to_do_with_it() -> None:
    assert {block.info for block in BLOCKS} == INFOS
    assert ENGLISH.count("\n```") == 2 * len(BLOCKS)
    assert [block.info for block in BLOCKS].count("bash test") == 1


def test_the_first_answer_is_on_the_first_screen() -> None:
    first = next(block for block in BLOCKS if block.code.startswith("curl"))
    assert [block.info for block in BLOCKS[: BLOCKS.index(first)]] == ["bash serve"]
    assert first.line <= 25


@pytest.mark.parametrize("block", of("bash"))
def test_shell_example(block: Block, clone: Path, server: Server) -> None:
    for command in commands(block.code):
        assert command.startswith("curl "), "another kind of command needs a check of its own here"
        answer = run(["bash", "-euo", "pipefail", "-c", command.replace(f"http://{ADDRESS}", server.url)], clone)
        if command.endswith("/metrics"):
            assert list(text_string_to_metric_families(answer))
        else:
            assert json.loads(answer)


@pytest.mark.parametrize("block", of(*(info for info in INFOS if info.startswith("python"))))
def test_python_example(block: Block, clone: Path, server: Server) -> None:
    for package in block.info.split()[1:]:
        pytest.importorskip(package)
    following = BLOCKS[BLOCKS.index(block) + 1]
    printed = run([sys.executable, "-c", block.code.replace(f"http://{ADDRESS}", server.url)], clone)
    if following.info == "text":
        assert printed == following.code


@pytest.mark.parametrize("block", of("bash example"))
def test_example_script(block: Block, clone: Path, server: Server) -> None:
    pytest.importorskip("qdrant_client")
    *set_up, command = block.code.strip().split(" && ")
    assert all(step.startswith(SET_UP) for step in set_up)
    printed = run([*command.split(), server.url], clone)
    assert printed == BLOCKS[BLOCKS.index(block) + 1].code


@pytest.mark.parametrize("block", of("bash serve"))
def test_start_command(block: Block, clone: Path) -> None:
    (command,) = commands(block.code)
    *set_up, start = command.split(" && ")
    assert all(step.startswith(SET_UP) for step in set_up)
    assert start.count(f"--port {PORT}") == 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = start.replace("--host 0.0.0.0", "--host 127.0.0.1").replace(f"--port {PORT}", f"--port {port}")
    log = clone / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", start], cwd=clone, stdout=output, stderr=output, text=True, start_new_session=True
        )
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            wait_until_open(server)
            with server.client() as client:
                assert client.get("/health").json()["model"] == "toy/shapes"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0


def test_the_test_command_is_the_one_that_ci_extracts() -> None:
    script = "cd \"$1\" && sed -n '/^```bash test$/,/^```$/{/^```/!p}' README.md"
    assert script.rpartition("sed")[2] in read(".ci/run")
    extracted = subprocess.run(["bash", "-c", script, "bash", ROOT], capture_output=True, text=True, check=True).stdout
    (block,) = (block for block in BLOCKS if block.info == "bash test")
    assert extracted == block.code


@pytest.mark.parametrize("block", of("bash manual"))
def test_manual_commands_are_at_least_shell(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.code], check=True)


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_settings_table_is_that_of_the_code(readme: str) -> None:
    rows = table(readme, "`GME_MODEL_DIR`")
    assert [row[0] for row in rows] == [f"`GME_{name.upper()}`" for name in Settings.model_fields]
    for (name, field), (_, cell, meaning) in zip(Settings.model_fields.items(), rows, strict=True):
        assert meaning
        if field.default is None:
            assert "`" not in cell  # words say what happens
        else:
            assert getattr(Settings.model_validate({name: cell.strip("`")}), name) == field.default


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_every_metric_of_ours_is_named(readme: str) -> None:
    ours = {family.name: family for family in REGISTRY.collect() if family.name.startswith("gme_")}
    assert len(ours) >= 8
    for name, family in ours.items():
        assert f"`{name}{'_total' if family.type == 'counter' else ''}`" in readme


def test_the_errors_table_has_every_status() -> None:
    assert [int(row[0]) for row in table(ENGLISH, "400")] == [int(row[0]) for row in table(CHINESE, "400")]
    assert {int(row[0]) for row in table(ENGLISH, "400")} == set(STATUSES)
