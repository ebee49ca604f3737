"""The two READMEs say the same, and every command and example in them works.

The info string of a code block says what to do with it. `bash` is run, line by line, against a live server; `bash run`
and `bash serve` start the service, `bash example` asks it, all without their set-up; `bash test` is what .ci/run runs;
`bash manual` is not run. `python` prints the comments in it. What needs a package that is not installed is skipped.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUIET, ROOT, TESTS, Server, free_port, wait_until_open
from PIL import Image
from prometheus_client import REGISTRY

from gme_service import FORMATS, OpenAIRequest, ServiceError, Settings, app

URL, DRAWING, BLUE = "http://localhost:8000", "tests/shapes/red_circle.png", "一个蓝色的星形"
ENVIRONMENT = {"CURL_HOME": ".", **QUIET}
LANGUAGES = ["README.md", "README.zh-CN.md"]
PAGES = [
    *LANGUAGES,
    "deploy/README.md",
    "deploy/SCALING.md",
    "deploy/METRICS.md",
    "deploy/CLIENTS.md",
    "deploy/CLIENTS.zh-CN.md",
    "tests/PERFORMANCE.md",
]
BLOCK = re.compile(r"^```(\S.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def read(page: str) -> tuple[str, list[tuple[str, str]]]:
    """A page's prose, and its code blocks as info string and code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return BLOCK.sub("", text), BLOCK.findall(text)


def table(page: str, first: str) -> list[list[str]]:
    (rows,) = re.findall(rf"^\| {first}.*\n(?:\|.*\n)*", read(page)[0], re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


def of(*infos: str) -> list[object]:
    return [pytest.param(code, id=f"{info} {code[:30]}") for info, code in read("README.md")[1] if info in infos]


def after_set_up(code: str) -> list[str]:
    return [x for x in re.split(r"\n| && ", code.strip()) if not x.startswith(("python3 -m venv", ".venv/bin/pip "))]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What looks like a clone in which set-up has been done, with a user's files and a curl that fails on an error."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    red, blue = (Image.open(TESTS / f"shapes/{name}.png").convert("RGB") for name in ("red_circle", "blue_star"))
    red.save(tmp_path / "report.pdf", save_all=True, append_images=[*[red] * 8, blue])
    return tmp_path


def run(clone: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=clone, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_readmes_are_short_and_have_the_same_structure_and_commands() -> None:
    (english, blocks), (chinese, same_blocks) = map(read, LANGUAGES)
    marks = re.compile(r"^(?:#+|-|\|) |<!-- \w+ -->", re.MULTILINE)
    assert (marks.findall(english), blocks) == (marks.findall(chinese), same_blocks)
    assert max((ROOT / page).read_bytes().count(b"\n") for page in LANGUAGES) <= 275
    assert not re.search(r"^[^\n|].*\n(?=[^-#|\n])", chinese, re.MULTILINE)  # a browser would show it as a space
    set_up = [(info, code) for info, code in blocks if info in ("bash serve", "bash test", "bash run")]
    assert [info for info, _ in set_up] == ["bash serve", "bash test", "bash run"]
    assert [code.count("\n") for _, code in set_up] == [1, 1, 1]  # a line is all that a person has to copy
    (extract,) = re.findall(r"sed -n '.*bash test.* README.md", (ROOT / ".ci/run").read_text())
    assert run(ROOT, "bash", "-c", extract) == dict(blocks)["bash test"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_commands_are_shell(page: str) -> None:
    prose, blocks = read(page)
    anchors = {f"#{head.lower().replace(' ', '-')}" for head in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", prose):
        assert target in anchors or ((ROOT / page).parent / target.partition("#")[0]).is_file(), target
    for info, code in blocks:
        assert run(ROOT, "bash", "-n", "-c", code if info.startswith("bash") else "") == ""


@pytest.mark.parametrize("code", of("bash"))
def test_curl(code: str, clone: Path, server: Server) -> None:
    (clone / "large.png").write_bytes((ROOT / DRAWING).read_bytes() + bytes(5 << 20))  # as long as a photo
    for line in code.replace(URL, server.url).replace(DRAWING, "large.png").splitlines():
        assert json.loads(run(clone, "bash", "-euo", "pipefail", "-c", line)).keys() & {"embeddings", "data"}


@pytest.mark.parametrize("code", of("python", "python openai"))
def test_python(code: str, clone: Path, server: Server) -> None:
    pytest.importorskip("openai" if "from openai" in code else "requests")
    printed = run(clone, sys.executable, "-c", code.replace(URL, server.url))
    assert printed.splitlines() == re.findall(r"^# (.*)", code, re.MULTILINE)


@pytest.mark.parametrize("code", of("bash example"))
def test_python_example(code: str, clone: Path, server: Server) -> None:
    pytest.importorskip("pypdfium2")
    commands = after_set_up(code.replace("What did sales cost?", BLUE))
    search, pages = (run(clone, "bash", "-c", f"{command} --url {server.url}") for command in commands)
    assert re.search(rf"^{BLUE}\n  0\.\d+  \S*blue_star\.png$", search, re.MULTILINE)
    assert re.match(r"\d\.\d+  page 10\n", pages)


@pytest.mark.parametrize("info", ["bash serve", "bash run"])
def test_start(info: str, clone: Path) -> None:
    code = dict(read("README.md")[1])[info]
    assert " && .venv/bin/pip install -r requirements.txt && " in code
    port = free_port()
    (command,) = after_set_up(code)
    environment = dict(os.environ)
    if info == "bash serve":  # it says itself which model, and "bash run" is given the toy
        del environment["GME_MODEL_DIR"], environment["GME_MODEL_ID"]
    with (clone / "log").open("w") as log:
        options = {"cwd": clone, "env": environment, "stdout": log, "stderr": log}
        process = subprocess.Popen(["bash", "-c", f"{command} --host 127.0.0.1 --port {port}"], **options)
    try:
        with wait_until_open(Server(f"http://127.0.0.1:{port}", process, clone / "log")).client() as client:
            assert client.get("/health").json()["model"] == "toy/shapes"
    finally:
        process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("page", LANGUAGES)
def test_the_tables_name_what_the_code_has(page: str) -> None:
    settings = {row[0].strip("`"): row[1] for row in table(page, "`GME_MODEL_DIR`")}
    assert list(settings) == [f"GME_{name.upper()}" for name in Settings.model_fields]
    given = {name[4:].lower(): cell.strip("`") for name, cell in settings.items() if "`" in cell}
    assert Settings(**given) == Settings(**Settings.model_construct().model_dump())
    routes = {f"`{method.upper()} {path}`" for path, methods in app.openapi()["paths"].items() for method in methods}
    assert {row[0] for row in table(page, "`POST /embed/text`")} == routes | {"`GET /docs`", "`GET /`"}
    errors = {500, *(error.status for error in ServiceError.__subclasses__())}
    assert {int(row[0]) for row in table(page, "400")} == errors
    ours = {f"{one.name}{'_total' * (one.type == 'counter')}" for one in REGISTRY.collect() if one.name[:4] == "gme_"}
    assert {row[0].strip("`") for row in table("deploy/METRICS.md", "`gme_info`")} >= ours


@pytest.mark.parametrize("page", LANGUAGES)
def test_the_fields_and_the_formats_are_those_of_the_code(page: str) -> None:
    prose = read(page)[0]
    (fields,) = (part for part in re.split(r"^##+ ", prose, flags=re.MULTILINE) if "`truncate_prompt_tokens`" in part)
    assert {f"`{name}`" for name in OpenAIRequest.model_fields} <= set(re.findall(r"`\w+`", fields))
    formats = re.search(r"JPEG[^;；]*", prose)
    assert formats
    assert tuple(re.findall(r"[A-Z]{3,4}", formats[0].upper())) == FORMATS
