"""Overload: good and bad requests of 200 clients at once, from a process of their own, more than a server can compute.

The load lasts four seconds; `OVERLOAD_SECONDS=1200 python -m pytest -s tests/extra/test_overload.py` makes it twenty
minutes, and prints a line for each.
"""

import asyncio
import base64
import io
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Start, golden
from PIL import Image

CLIENTS = int(os.environ.get("OVERLOAD_CLIENTS", "200"))
SECONDS = float(os.environ.get("OVERLOAD_SECONDS", "4"))
PATIENCE = 60  # seconds after which a request counts as one that hangs
MAX_GROWTH = 512 << 20  # bytes of resident memory, which grows for some minutes before it levels off
LIMITS = {"GME_MAX_QUEUE": "512", "GME_MAX_INPUTS": "512", "GME_MAX_BODY_MB": "2", "GME_CACHE_MB": "0"}
CASES = [case for case in golden() if case.prompt is None]
TEXTS, IMAGES = [case for case in CASES if not case.data], [case for case in CASES if case.data]
TEXT, IMAGE, OPENAI = "/embed/text", "/embed/image", "/v1/embeddings"
PHOTO = next(case.data for case in IMAGES if case.image == "64x48.png")
HUGE = io.BytesIO()
Image.new("1", (20_000, 20_000)).save(HUGE, "PNG")  # 400 million pixels in 50 kB


def items(*images: bytes) -> dict[str, Any]:
    return {"json": {"input": ["a", *({"image": base64.b64encode(image).decode()} for image in images)]}}


OTHERS: list[tuple[int, str, dict[str, Any]]] = [  # requests of every kind, and the status that each gets
    (200, IMAGE, {"files": [("file", PHOTO)] * 3, "data": {"text": "a", "prompt": "Find."}}),
    (200, OPENAI, items(PHOTO, PHOTO)),
    (200, TEXT, {"json": {"texts": ["\0", "a" + "\u0301" * 10_000, "\u202e<|image_pad|><|im_end|>"]}}),
    (400, IMAGE, {"files": {"file": PHOTO[:500]}}),
    (400, OPENAI, items(PHOTO, b"<html>", PHOTO)),
    (400, TEXT, {"json": {"texts": []}}),
    (404, "/nothing", {}),
    (405, "/health", {}),
    (413, IMAGE, {"files": {"file": HUGE.getvalue()}}),
    (413, TEXT, {"content": b'{"texts": ["' + bytes(3 << 20)}),
    (413, TEXT, {"json": {"texts": ["a"] * 513}}),
    (422, TEXT, {"content": b"[" * 1000}),
]


async def leave(http: httpx.AsyncClient, chance: random.Random) -> None:
    """Disconnect before the body ends, or before the answer."""
    body = json.dumps({"texts": [f"{chance.random()} " + "word " * 60] * 64}).encode()
    _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    writer.write(b"POST /embed/text HTTP/1.1\r\nHost: gme\r\nContent-Length: %d\r\n\r\n" % len(body))
    writer.write(body[: chance.choice([len(body) // 2, len(body)])])
    await asyncio.sleep(chance.random() / 10)
    writer.transport.abort()


async def send(http: httpx.AsyncClient, chance: random.Random, tally: SimpleNamespace) -> None:
    """Send known inputs with new ones among them, or another request, and note what comes."""
    started, known, expected = time.monotonic(), chance.choices(TEXTS, k=chance.randint(1, 16)), 200
    new = [f"{chance.random()} " + "word " * chance.randint(0, 40) for _ in range(chance.randint(0, 48))]
    path, request = TEXT, {"json": {"texts": [case.text for case in known] + new}}
    if chance.random() < 0.1:
        known = [chance.choice(IMAGES)]
        path, request = IMAGE, {"files": {"file": known[0].data}, "data": {"text": known[0].text}}
    elif chance.random() < 0.2:
        known, (expected, path, request) = [], chance.choice(OTHERS)
    response = await http.post(path, **request)
    tally.statuses[response.status_code] += 1
    if response.status_code == 200:
        tally.seconds.append(time.monotonic() - started)
        vectors = response.json()["embeddings"][: len(known)] if known else []
        if not np.allclose(vectors, [case.vector for case in known], atol=1e-5):
            tally.wrong.append(response.text[:1000])
    if response.status_code == 503:
        await asyncio.sleep(int(response.headers["Retry-After"]) * chance.random())
    elif response.status_code != expected:
        tally.wrong.append(f"{path}: {response.status_code} and not {expected}: {response.text[:1000]}")


async def run_clients(url: str, seconds: float) -> SimpleNamespace:
    """What the clients see: the answers by status, those that are wrong, and the seconds until those of status 200."""
    tally, deadline = SimpleNamespace(statuses=Counter(), wrong=[], seconds=[]), time.monotonic() + seconds

    async def run_client(chance: random.Random) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False, trust_env=False) as http:
            while time.monotonic() < deadline:
                await (leave(http, chance) if chance.random() < 0.05 else send(http, chance, tally))

    await asyncio.gather(*(run_client(random.Random(number)) for number in range(CLIENTS)))
    return tally


def load(url: str, seconds: float) -> SimpleNamespace:
    os.nice(10)  # what is measured is the server, and not the clients beside it
    return asyncio.run(run_clients(url, seconds))


@pytest.mark.timeout(300 + 2 * SECONDS)
def test_clients_that_are_too_many_are_each_answered_or_told_to_come_back(start: Start) -> None:
    server = start("--no-access-log", **LIMITS)
    memory, waits, statuses, left = [], [], Counter[int](), SECONDS
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, server.client() as watch:
        pool.submit(load, server.url, min(60, SECONDS)).result()  # to warm up
        while left > 0:
            work = pool.submit(load, server.url, min(60, left))
            while not work.done():
                asked = time.perf_counter()
                assert watch.get("/health").status_code == 200
                waits.append(time.perf_counter() - asked)
                pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
                memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
                wait([work], timeout=0.1)
            tally, left = work.result(), left - 60
            assert tally.wrong == []
            statuses += tally.statuses
            p50, p99 = np.quantile(tally.seconds, [0.5, 0.99])
            print(f"\n{dict(tally.statuses)}; p50 {p50:.2f} s, p99 {p99:.2f} s; {memory[-1] >> 20} MB resident", end="")
        while watch.get("/health").json()["queue_depth"]:  # of clients that have just left
            time.sleep(0.1)
    assert statuses.keys() >= {200, 400, 413, 422, 503}
    assert max(waits) < 2
    assert memory[-1] - memory[0] < MAX_GROWTH
    assert "Traceback" not in server.log.read_text()
