"""What the vectors are for: over the live server, captions find their drawings and drawings their captions."""

import io
import math
import random
from collections.abc import Iterable

import httpx
import numpy as np
import pytest
from conftest import Address
from PIL import Image, ImageColor, ImageDraw

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色"}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "ring": "圆环"}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
ENGLISH = [f"a {color} {shape}" for color, shape in PAIRS]
CHINESE = [f"一个{COLORS[color]}的{SHAPES[shape]}" for color, shape in PAIRS]
GROUNDS = ("white", "black", "#969696", "#505050", "lightblue", "pink", "darkgreen", "navy")


def draw(color: str, shape: str, chance: random.Random, grounds: Iterable[str]) -> bytes:
    """The shape in Pillow's colour of that name, larger or smaller, turned a little, on a ground of another colour."""
    rgb = ImageColor.getrgb(color)
    ground = chance.choice([one for one in grounds if math.dist(ImageColor.getrgb(one), rgb) > 120])
    width, height = chance.randrange(300, 600), chance.randrange(300, 600)
    image = Image.new("RGB", (width, height), ground)
    if ground == "#505050":
        noise = np.random.default_rng(chance.randrange(1000)).normal(0, 15, (height, width, 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    pen, r = ImageDraw.Draw(image), min(width, height) * chance.uniform(0.25, 0.4)
    x, y, tilt = chance.uniform(r, width - r), chance.uniform(r, height - r), chance.uniform(-0.3, 0.3)
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), outline=color, width=round(r if shape == "circle" else 0.3 * r))
    else:
        reach = {"square": [1] * 4, "triangle": [1] * 3, "star": [1, 0.4] * 5}[shape]
        turns = [tilt + 2 * math.pi * (n + (shape == "square") / 2) / len(reach) for n in range(len(reach))]
        points = zip(reach, turns, strict=True)
        pen.polygon([(x + r * d * math.sin(turn), y - r * d * math.cos(turn)) for d, turn in points], fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def recall(queries: np.ndarray, documents: np.ndarray) -> float:
    """The share of queries whose nearest document is their own."""
    return float(np.mean((queries @ documents.T).argmax(axis=1) == np.arange(len(queries))))


@pytest.fixture(scope="module")
def captions(server: Address) -> dict[str, np.ndarray]:
    """The vectors of all captions, as documents and as queries that ask for an image."""
    texts = {"English": ENGLISH, "Chinese": CHINESE}
    prompts = {"": None, ", asked": "Find an image that matches the given text."}
    with server.client() as client:
        return {
            f"{language}{how}": np.array(
                client.post("/embed/text", json={"texts": texts[language], "prompt": prompt}).json()["embeddings"]
            )
            for language in texts
            for how, prompt in prompts.items()
        }


def test_captions_and_their_translations_find_one_another(captions: dict[str, np.ndarray]) -> None:
    assert recall(captions["English"], captions["Chinese"]) >= 0.9
    assert recall(captions["Chinese"], captions["English"]) >= 0.9


@pytest.mark.parametrize("grounds", [["white"], ["#969696"], GROUNDS], ids=["white", "grey", "mixed"])
def test_captions_and_drawings_find_one_another(
    client: httpx.Client, captions: dict[str, np.ndarray], grounds: list[str]
) -> None:
    chance = random.Random(2025)
    files = [("file", draw(*pair, chance, grounds)) for pair in PAIRS]
    drawings = np.array(client.post("/embed/image", files=files).json()["embeddings"])
    found = {f"{query}: drawing": recall(vectors, drawings) for query, vectors in captions.items()}
    found |= {f"drawing: {name}": recall(drawings, captions[name]) for name in ("English", "Chinese")}
    assert min(found.values()) >= 0.9, found
