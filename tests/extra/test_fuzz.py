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
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

FUZZ = int(os.environ.get("FUZZ", "1"))
PATIENCE = 30  # seconds after which a request counts as one that hangs
FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


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


@pytest.mark.parametrize("path", ["/embed/text", "/embed/image", "/v1/embeddings"])
def test_every_answer_is_as_the_description_says(fuzzed: Server, path: str) -> None:
    operation = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")[path]["POST"]

    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]))
    @settings(FIXED, max_examples=25 * FUZZ)
    def check(case: schemathesis.Case) -> None:
        checks = [not_a_server_error, status_code_conformance, content_type_conformance]
        case.call_and_validate(timeout=PATIENCE, checks=checks)

    check()


NASTY = ["<|image_pad|>", "<|im_start|>", "<|im_end|>\n", "<|endoftext|>", "<|im", "{}", "%s", "\r\n", "👩‍👩‍👧‍👧"]
NASTY += [*'\\"\0\x1b\ufeff\ufffe\U0010ffff\u0301\u202e\u200d\t\n\u3000\u2028ﷺ', "word " * 500, "a" * 3000]
any_text = st.lists(st.sampled_from(NASTY) | st.text(max_size=12), max_size=6).map("".join)


@given(any_text, any_text)
@settings(FIXED, max_examples=15 * FUZZ)
def test_an_image_has_the_same_vector_in_a_form_and_in_json(client: httpx.Client, text: str, prompt: str) -> None:
    photo = (IMAGES / "64x48.png").read_bytes()
    item = {"text": text, "image": base64.b64encode(photo).decode()}
    answer = client.post("/v1/embeddings", json={"input": [item], "prompt": prompt})
    form = client.post("/embed/image", files={"file": photo, "text": (None, text), "prompt": (None, prompt)})
    assert form.status_code == answer.status_code in (200, 400), (form.text, answer.text)
    if form.status_code == 200:  # and not a prompt too long for an image
        np.testing.assert_allclose(form.json()["embeddings"], [answer.json()["data"][0]["embedding"]], atol=1e-5)


def seeds() -> Iterator[bytes]:
    """A small valid file of every format, in the variants that take other ways through its decoder."""
    alpha = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8))
    rgb, exif = alpha.convert("RGB"), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    for image, kind, options in [
        *((rgb, kind, {}) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")),
        *((rgb, kind, {"exif": exif}) for kind in ("JPEG", "PNG", "WEBP")),
        *((rgb, kind, frames) for kind in ("MPO", "PNG", "WEBP", "GIF")),
        *((rgb.quantize(16), kind, {}) for kind in ("PNG", "GIF", "BMP")),
        *((rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}), (alpha, "WEBP", {"lossless": True})),
    ]:
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield file.getvalue()


SEEDS = list(seeds())
EXTREMES = [b"\0", b"\xff", b"\x7f", b"\x80", bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"]


def mutant(number: int) -> bytes:
    """A valid file with one to eight faults."""
    chance = random.Random(number)
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at, size = chance.randrange(chance.choice([64, len(data) or 1])), chance.choice([1, 2, 4, 16, 100])
        extreme = chance.choice(EXTREMES)[:: chance.choice([1, -1])]
        more = chance.choice([b"", extreme, chance.randbytes(size), data[at : at + size] * 2])
        data[at : at + chance.choice([0, len(more), size, chance.choice([size, len(data)])])] = more
    return bytes(data)


def test_a_broken_image_is_an_image_or_a_refusal_that_names_its_place(client: httpx.Client) -> None:
    good = {"image": base64.b64encode(SEEDS[1]).decode()}

    def send(number: int) -> int:
        data = mutant(number)
        alone = client.post("/embed/image", files={"file": data})
        assert alone.status_code in (200, 400, 413), (number, alone.text)
        if alone.status_code != 200:
            items = [good, good]
            items.insert(number % 3, {"image": base64.b64encode(data).decode()})
            together = client.post("/v1/embeddings", json={"input": items})
            assert together.status_code == alone.status_code, number
            assert together.json()["detail"].startswith(f"Input {number % 3 + 1}: "), number
        return alone.status_code

    assert all(client.post("/embed/image", files={"file": data}).status_code == 200 for data in SEEDS)
    with ThreadPoolExecutor(4) as pool:
        statuses = Counter(pool.map(send, range(200 * FUZZ)))
    assert min(statuses[200], statuses[400]) > 10 * FUZZ, statuses  # both are tried
