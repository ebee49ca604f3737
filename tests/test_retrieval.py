"""What the vectors are for: over the live server, captions find their drawings and drawings their captions."""

import io
import math
import random

import httpx
import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色"}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "ring": "圆环"}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
ENGLISH = [f"a {color} {shape}" for color, shape in PAIRS]
CHINESE = [f"一个{COLORS[color]}的{SHAPES[shape]}" for color, shape in PAIRS]
GROUND = "#969696"  # the toy knows shapes on grey grounds


def draw(color: str, shape: str, chance: random.Random) -> bytes:
    """The shape in Pillow's colour of that name."""
    image = Image.new("RGB", (448, 448), GROUND)
    pen, r = ImageDraw.Draw(image), chance.uniform(110, 170)
    x, y = chance.uniform(r, 448 - r), chance.uniform(r, 448 - r)
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), outline=color, width=round(r if shape == "circle" else 0.3 * r))
    else:
        reach = {"square": [1] * 4, "triangle": [1] * 3, "star": [1, 0.4] * 5}[shape]
        turns = [2 * math.pi * (n + (shape == "square") / 2) / len(reach) for n in range(len(reach))]
        points = zip(reach, turns, strict=True)
        pen.polygon([(x + r * d * math.sin(turn), y - r * d * math.cos(turn)) for d, turn in points], fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def recall(queries: np.ndarray, documents: np.ndarray) -> float:
    """The share of queries whose nearest document is their own."""
    return float(np.mean((queries @ documents.T).argmax(axis=1) == np.arange(len(queries))))


def embed(client: httpx.Client, texts: list[str], prompt: str | None = None) -> np.ndarray:
    return np.array(client.post("/embed/text", json={"texts": texts, "prompt": prompt}).json()["embeddings"])


def test_captions_and_drawings_find_one_another(client: httpx.Client) -> None:
    chance = random.Random(2024)
    files = [("file", draw(*pair, chance)) for pair in PAIRS]
    drawings = np.array(client.post("/embed/image", files=files).json()["embeddings"])
    for captions in (ENGLISH, CHINESE):
        plain = embed(client, captions)
        asked = embed(client, captions, "Find an image that matches the given text.")
        for queries, documents in ((plain, drawings), (asked, drawings), (drawings, plain)):
            assert recall(queries, documents) >= 0.9


def test_a_caption_finds_its_translation(client: httpx.Client) -> None:
    assert recall(embed(client, ENGLISH), embed(client, CHINESE)) >= 0.9
