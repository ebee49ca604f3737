"""What the vectors are for: over the live server, captions find their drawings and drawings their captions."""

import io
import math
import random
from collections.abc import Iterable

import httpx
import numpy as np
import pytest
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


def embed(client: httpx.Client, texts: list[str], prompt: str | None = None) -> np.ndarray:
    return np.array(client.post("/embed/text", json={"texts": texts, "prompt": prompt}).json()["embeddings"])


@pytest.mark.parametrize("grounds", [["white"], ["#969696"], GROUNDS], ids=["white", "grey", "mixed"])
def test_captions_and_drawings_and_translations_find_one_another(client: httpx.Client, grounds: list[str]) -> None:
    found = {"caption: translation": [recall(embed(client, ENGLISH), embed(client, CHINESE))]}
    for seed in (2024, 2025):
        chance = random.Random(seed)
        files = [("file", draw(*pair, chance, grounds)) for pair in PAIRS]
        drawings = np.array(client.post("/embed/image", files=files).json()["embeddings"])
        for language, captions in (("English", ENGLISH), ("Chinese", CHINESE)):
            plain = embed(client, captions)
            asked = embed(client, captions, "Find an image that matches the given text.")
            searches = {"drawing": (plain, drawings), "drawing, asked": (asked, drawings), "caption": (drawings, plain)}
            for what, search in searches.items():
                found.setdefault(f"{language}: {what}", []).append(recall(*search))
    assert min(map(np.mean, found.values())) >= 0.9, found
