"""Inputs that nobody thought of, against a real server: the API's own description, any Unicode, broken image files.

Always the same ones; `FUZZ=20 python -m pytest -s tests/extra/test_fuzz.py` tries twenty times as many.
"""

import base64
import io
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import schemathesis
from conftest import IMAGES, Server, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

FUZZ = int(os.environ.get("FUZZ", "1"))
PATIENCE = 30  # seconds after which a request counts as one that hangs
settings.register_profile(
    "fuzz",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
FIXED = settings.get_profile("fuzz")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that computes every vector anew; after the tests it still works, and its log has no fault."""
    with serve(tmp_path_factory.mktemp("fuzz") / "log", GME_CACHE_MB="0") as running:
        yield running
        assert httpx.post(f"{running.url}/embed/text", json={"texts": ["still there?"]}).status_code == 200
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def client(fuzzed: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fuzzed.url, timeout=PATIENCE) as client:
        yield client


# ---------------------------------------------------------------------------------------------- the API's description


@pytest.fixture(scope="module")
def description(fuzzed: Server) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


@pytest.mark.parametrize(
    "operation",
    ["POST /embed/text", "POST /embed/image", "POST /v1/embeddings", "GET /v1/models", "GET /health", "GET /metrics"],
)
def test_every_answer_is_as_the_description_says(description: schemathesis.schemas.BaseSchema, operation: str) -> None:
    method, path = operation.split()
    kinds = [description[path][method].as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

    @given(st.one_of(kinds))
    @settings(FIXED, max_examples=25 * FUZZ)
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(
            timeout=PATIENCE,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_headers_conformance,
                response_schema_conformance,
            ],
        )

    check()


# --------------------------------------------------------------------------------------------------------- any Unicode

NASTY = ["<|image_pad|>", "<|vision_start|>", "<|im_start|>", "<|im_end|>\n", "<|endoftext|>", "<|im", "\0", "\x1b[31m"]
NASTY += [
    "\ufeff",
    "\ufffe",
    "\U0010ffff",
    "e\u0301",
    "\u0301" * 20,
    "\u202e",
    "👩‍👩‍👧‍👧",
    "ᄒ\u1161\u11ab",
    "\n\n",
    "  ",
    "\r\n",
]
NASTY += ["\u3000", "\u2028", "{}", "%s", "\\", '"', "word " * 500, "a" * 3000]
any_text = st.lists(st.sampled_from(NASTY) | st.text(max_size=12), max_size=6).map("".join)


def embed(client: httpx.Client, texts: list[str], prompt: str | None) -> np.ndarray:
    response = client.post("/embed/text", json={"texts": texts, "prompt": prompt})
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"])


@given(st.lists(any_text, min_size=2, max_size=5), st.none() | any_text)
@settings(FIXED, max_examples=60 * FUZZ)
def test_a_text_has_the_same_vector_alone_and_among_others(
    client: httpx.Client, texts: list[str], prompt: str | None
) -> None:
    together = embed(client, texts, prompt)
    alone = np.concatenate([embed(client, [text], prompt) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


@given(any_text, any_text)
@settings(FIXED, max_examples=15 * FUZZ)
def test_image_and_text_have_the_same_vector_in_a_form_and_in_json(
    client: httpx.Client, text: str, prompt: str
) -> None:
    photo = (IMAGES / "64x48.png").read_bytes()
    item = {"text": text, "image": base64.b64encode(photo).decode()}
    answer = client.post("/v1/embeddings", json={"input": [item], "prompt": prompt})
    form = client.post("/embed/image", files={"file": photo, "text": (None, text), "prompt": (None, prompt)})
    assert form.status_code == answer.status_code, (form.text, answer.text)
    if form.status_code == 200:
        np.testing.assert_allclose(form.json()["embeddings"], [answer.json()["data"][0]["embedding"]], atol=1e-5)
    else:
        assert (form.status_code, "send a shorter prompt" in form.text) == (400, True)


# -------------------------------------------------------------------------------------------------- broken image files


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seeds() -> dict[str, bytes]:
    """A small valid file of every format, in the variants that take other ways through its decoder."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    alpha = Image.fromarray(noise)
    rgb = alpha.convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    exif.get_ifd(0x8769).update({0x927C: bytes(64), 0x9003: "2026:01:01 00:00:00"})
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    return {
        "JPEG": save(rgb, "JPEG"),
        "progressive JPEG": save(rgb, "JPEG", progressive=True),
        "JPEG with EXIF": save(rgb, "JPEG", exif=exif),
        "JPEG in CMYK": save(rgb.convert("CMYK"), "JPEG", restart_marker_blocks=2),
        "MPO": save(rgb, "MPO", **frames),
        "PNG": save(rgb, "PNG"),
        "PNG with EXIF": save(alpha, "PNG", exif=exif, dpi=(72, 72)),
        "PNG of colours": save(rgb.quantize(16), "PNG", bits=4, transparency=3),
        "PNG of 16 bits": save(Image.new("I;16", (24, 32), 1000), "PNG"),
        "animated PNG": save(rgb, "PNG", **frames),
        "WebP": save(rgb, "WEBP", exif=exif),
        "lossless WebP": save(alpha, "WEBP", lossless=True),
        "animated WebP": save(rgb, "WEBP", **frames),
        "GIF": save(rgb, "GIF"),
        "animated GIF": save(rgb, "GIF", transparency=0, **frames),
        "BMP": save(rgb, "BMP"),
        "BMP of colours": save(rgb.quantize(16), "BMP"),
        "AVIF": save(rgb, "AVIF", exif=exif),
        "animated AVIF": save(rgb, "AVIF", **frames),
    }


SEEDS = seeds()
EXTREMES = [b"\0", b"\xff", b"\x7f", b"\x80", bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"]


def mutant(number: int) -> tuple[str, bytes]:
    """The name of a valid file, and that file with one to eight faults."""
    chance = random.Random(number)
    name = chance.choice(list(SEEDS))
    data = bytearray(SEEDS[name])
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at = chance.randrange(chance.choice([min(64, len(data)), len(data)]) or 1)
        size = chance.choice([1, 2, 4, 16, 100])
        extreme = chance.choice(EXTREMES)[:: chance.choice([1, -1])]
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([255 & ~1 << chance.randrange(8)])
            case 1:
                data[at : at + len(extreme)] = extreme
            case 2:
                del data[at : at + size]
            case 3:
                del data[max(at, 1) :]
            case 4:
                data[at:at] = chance.randbytes(size)
            case _:
                data[at:at] = data[at : at + size]
    return name, bytes(data)


def test_the_files_are_valid_before_they_are_broken(client: httpx.Client) -> None:
    for name, data in SEEDS.items():
        assert client.post("/embed/image", files={"file": data}).status_code == 200, name


def test_a_broken_image_is_an_image_or_a_refusal_that_names_its_place(fuzzed: Server, client: httpx.Client) -> None:
    good = {"image": base64.b64encode(SEEDS["PNG"]).decode()}

    def send(number: int) -> int:
        _, data = mutant(number)
        alone = client.post("/embed/image", files={"file": data})
        assert alone.status_code in (200, 400, 413), alone.text
        if alone.status_code != 200:
            items = [good, good]
            items.insert(number % 3, {"image": base64.b64encode(data).decode()})
            together = client.post("/v1/embeddings", json={"input": items})
            assert together.status_code == alone.status_code
            assert together.json()["detail"].startswith(f"Input {number % 3 + 1}: ")
        return alone.status_code

    def outcome(number: int) -> tuple[str, object]:
        try:
            return mutant(number)[0], send(number)
        except (AssertionError, httpx.HTTPError) as error:
            return mutant(number)[0], f"mutant({number}): {error!r}"

    with ThreadPoolExecutor(4) as pool:
        outcomes = Counter(pool.map(outcome, range(200 * FUZZ)))
    print(*outcomes.items(), sep="\n")
    assert [result for _, result in outcomes if not isinstance(result, int)] == []
    assert fuzzed.process.poll() is None
