"""`example_pages.py` as a user runs it: on a PDF whose pages show one drawing each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS, Server
from PIL import Image

pytest.importorskip("pypdfium2")
pytest.importorskip("qdrant_client")

SHAPES = ["blue_star", "green_triangle", "red_circle", "yellow_square"]
PAGES = SHAPES * 3  # more than the example sends in one request


@pytest.fixture
def pdf(tmp_path: Path) -> Path:
    first, *others = (Image.open(TESTS / "shapes" / f"{shape}.png").convert("RGB") for shape in PAGES)
    first.save(tmp_path / "shapes.pdf", save_all=True, append_images=others)
    return tmp_path / "shapes.pdf"


@pytest.mark.parametrize(
    ("question", "shape"), [("a red circle", "red_circle"), ("一个蓝色的星形", "blue_star")], ids=["English", "Chinese"]
)
def test_a_question_finds_the_pages_that_show_it(server: Server, pdf: Path, question: str, shape: str) -> None:
    command = [sys.executable, str(TESTS / "example_pages.py"), str(pdf), question, server.url]

    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)

    assert printed.returncode == 0, printed.stderr
    found = [int(line.split()[1].rstrip(":")) for line in printed.stdout.splitlines()]
    assert sorted(found) == [number for number, name in enumerate(PAGES, 1) if name == shape]
