"""What the vectors are for: over the live server, captions find their drawings and drawings their captions."""

import io
import random
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from conftest import Server
from make_toy import COLORS, PAIRS, QUERY_INSTRUCTION, SHAPES, draw

DRAWN = random.Random(5).sample(PAIRS, 24)  # half of all pairs of a colour and a shape
CAPTIONS = {
    "English": [f"a {color} {shape}" for color, shape in DRAWN],
    "Chinese": [f"一个{COLORS[color][0]}的{SHAPES[shape]}" for color, shape in DRAWN],
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def drawings(client: httpx.Client) -> np.ndarray:
    """The vectors of fresh drawings of `DRAWN`, which the training has not seen."""
    rng = random.Random(2024)
    rows = []
    for color, shape in DRAWN:
        file = io.BytesIO()
        draw(color, shape, rng, (448, 448)).save(file, "PNG")
        rows.append(client.post("/embed/image", files={"file": file.getvalue()}).json()["embeddings"][0])
    return np.array(rows)


def embed(client: httpx.Client, texts: list[str], prompt: str | None = None) -> np.ndarray:
    return np.array(client.post("/embed/text", json={"texts": texts, "prompt": prompt}).json()["embeddings"])


def recall(queries: np.ndarray, documents: np.ndarray) -> float:
    """The share of queries whose nearest document is their own."""
    return float(np.mean((queries @ documents.T).argmax(axis=1) == np.arange(len(queries))))


@pytest.mark.parametrize("language", CAPTIONS)
def test_a_caption_finds_its_drawing(client: httpx.Client, drawings: np.ndarray, language: str) -> None:
    assert recall(embed(client, CAPTIONS[language]), drawings) >= 0.85


@pytest.mark.parametrize("language", CAPTIONS)
def test_a_caption_with_an_instruction_finds_its_drawing(
    client: httpx.Client, drawings: np.ndarray, language: str
) -> None:
    assert recall(embed(client, CAPTIONS[language], QUERY_INSTRUCTION), drawings) >= 0.85


@pytest.mark.parametrize("language", CAPTIONS)
def test_a_drawing_finds_its_caption(client: httpx.Client, drawings: np.ndarray, language: str) -> None:
    assert recall(drawings, embed(client, CAPTIONS[language])) >= 0.85


def test_a_caption_finds_its_translation(client: httpx.Client) -> None:
    assert recall(embed(client, CAPTIONS["English"]), embed(client, CAPTIONS["Chinese"])) >= 0.85
