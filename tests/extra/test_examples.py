"""The programs in examples/, as a person starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TESTS, Address, Start, free_port
from PIL import Image

pytest.importorskip("qdrant_client")
pytest.importorskip("pypdfium2")

SHAPES = TESTS / "shapes"
PROGRAMS = ["search_pictures.py", "search_pdf.py"]


def example(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / program), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def pdf(tmp_path: Path) -> Path:
    """Nine pages with a red circle, and then one with a blue star."""
    red, blue = (Image.open(SHAPES / name).convert("RGB") for name in ("red_circle.png", "blue_star.png"))
    red.save(tmp_path / "report.pdf", save_all=True, append_images=[*[red] * 8, blue])
    return tmp_path / "report.pdf"


def test_pictures_are_found_by_sentences(server: Address) -> None:
    done = example("search_pictures.py", SHAPES, "a red circle", "一个蓝色的星形", "--url", server.url)
    circle, red, _, _, star, blue, _, _ = done.stdout.splitlines()
    assert (circle, star) == ("a red circle", "一个蓝色的星形")
    assert red.endswith(f"  {SHAPES / 'red_circle.png'}")
    assert blue.endswith(f"  {SHAPES / 'blue_star.png'}")
    assert done.returncode == 0


def test_pages_are_found_by_a_question(server: Address, pdf: Path) -> None:
    done = example("search_pdf.py", pdf, "一个蓝色的星形", "--url", server.url, "--top", "2")
    best, second = done.stdout.splitlines()
    assert best.endswith("  page 10")
    assert not second.endswith("  page 10")
    assert done.returncode == 0


def test_a_picture_that_is_refused_is_named_and_the_others_are_found(server: Address, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "CIRCLE.PNG").write_bytes((SHAPES / "red_circle.png").read_bytes())
    done = example("search_pictures.py", tmp_path, "a red circle", "--url", server.url)
    assert f"{tmp_path / 'broken.jpg'}: " in done.stderr
    assert done.stdout.splitlines()[1:] == [done.stdout.splitlines()[1]]
    assert done.stdout.endswith("CIRCLE.PNG\n")


def test_the_key_is_sent(start: Start, pdf: Path) -> None:
    url = start(GME_API_KEY="secret").url
    for program, given in zip(PROGRAMS, [SHAPES, pdf], strict=True):
        refused = example(program, given, "a red circle", "--url", url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "API key" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert example(program, given, "a red circle", "--url", url, "--key", "secret").returncode == 0
        assert example(program, given, "a red circle", "--url", url, GME_API_KEY="secret").returncode == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_service(program: str) -> None:
    done = example(program, "--help")
    assert done.returncode == 0
    assert "http://localhost:8000" in done.stdout


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path, pdf: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pdf").write_text("no PDF")
    sentences = {
        ("search_pictures.py", tmp_path / "none"): "There is no folder",
        ("search_pictures.py", tmp_path / "empty"): "There is no picture in",
        ("search_pictures.py", SHAPES): f"No GME Service answers at {url}",
        ("search_pdf.py", tmp_path / "none.pdf"): "There is no file",
        ("search_pdf.py", tmp_path / "text.pdf"): "cannot be read as a PDF",
        ("search_pdf.py", pdf): f"No GME Service answers at {url}",
    }
    for (program, given), sentence in sentences.items():
        done = example(program, given, "a red circle", "--url", url)
        assert (done.returncode, done.stdout) == (1, "")
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "with --url" in example("search_pictures.py", SHAPES, "a red circle", "--url", "localhost:80").stderr
