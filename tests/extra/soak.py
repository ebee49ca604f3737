"""Good and bad traffic for a long time: `PYTHONPATH=tests python tests/extra/soak.py [--minutes 20] [--clients 32]`.

It starts the service with the toy checkpoint and prints a row of a Markdown table for each minute: requests, answers by
status, latency of the answers of status 200, resident memory, and inputs without an answer. It ends with 1 when an
answer had another status than it should have, a vector was wrong, or no answer came.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from conftest import IMAGES, Server, golden, serve
from PIL import Image

LIMITS = {"GME_MAX_QUEUE": "2048", "GME_MAX_INPUTS": "512", "GME_MAX_BODY_MB": "2", "GME_CACHE_MB": "1"}
PATIENCE = 120  # seconds after which a request counts as one that hangs
TEXT, IMAGE, OPENAI = "/embed/text", "/embed/image", "/v1/embeddings"
CASES = [case for case in golden() if case.image is None and case.prompt is None]
PHOTOS = [(IMAGES / name).read_bytes() for name in ("64x48.png", "photo.webp", "mode_CMYK.jpg", "animated.gif")]
HUGE = io.BytesIO()
Image.new("1", (20_000, 20_000)).save(HUGE, "PNG")  # 400 million pixels in 50 kB
MALFORMED = [b"", b"{", b'{"texts": "a"}', b'{"texts": [1]}', b"[" * 1000, b"\xff\xfe"]
STATES = ["/health", "/metrics", "/v1/models", "/docs", "/openapi.json"]


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # that the answers of status 200 took
    failures: list[str] = field(default_factory=list)

    def row(self, label: str, resident: int, depth: int) -> str:
        others = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()) if status != 200)
        p50, p99 = np.quantile(self.seconds or [0], (0.5, 0.99)) * 1000
        counts = f"{self.statuses.total()} | {self.statuses[200]} | {others}"
        return f"| {label} | {counts} | {p50:.0f} | {p99:.0f} | {resident >> 20} | {depth} |"


def words(chance: random.Random, most: int) -> str:
    return f"{chance.random()} " + "word " * chance.randint(0, most)


def photo(chance: random.Random) -> bytes:
    return chance.choice(PHOTOS)


def cut(chance: random.Random) -> bytes:
    data = chance.choice(PHOTOS[:3])  # half of an animation is still a picture
    return data[: chance.randint(1, len(data) // 2)]


def items(*images: bytes) -> dict[str, Any]:
    return {"json": {"input": ["a", *({"image": base64.b64encode(image).decode()} for image in images)]}}


KINDS: list[tuple[int, int, str, Callable[[random.Random], dict[str, Any]]]] = [  # weight, status, path, request
    (3, 200, TEXT, lambda c: {"json": {"texts": [words(c, 20) for _ in range(c.randint(64, 256))], "prompt": "Find."}}),
    (8, 200, IMAGE, lambda c: {"files": [("file", photo(c)) for _ in range(c.randint(1, 3))]}),
    (8, 200, IMAGE, lambda c: {"files": {"file": photo(c)}, "data": {"text": words(c, 20), "prompt": words(c, 5)}}),
    (8, 200, OPENAI, lambda c: items(photo(c), photo(c))),
    (2, 200, TEXT, lambda _: {"json": {"texts": ["\0", "a" + "\u0301" * 10_000, "\u202e<|image_pad|><|im_end|>"]}}),
    (4, 400, IMAGE, lambda c: {"files": {"file": cut(c)}}),
    (2, 400, OPENAI, lambda c: items(photo(c), b"<html>", photo(c))),
    (2, 400, OPENAI, lambda _: {"json": {"input": [{"image": "http://127.0.0.1/a.png"}]}}),
    (2, 400, TEXT, lambda _: {"json": {"texts": []}}),
    (2, 413, IMAGE, lambda _: {"files": {"file": HUGE.getvalue()}}),
    (2, 413, TEXT, lambda _: {"content": b'{"texts": ["' + bytes(3 << 20)}),
    (2, 413, TEXT, lambda _: {"json": {"texts": ["a"] * 513}}),
    (4, 422, TEXT, lambda c: {"content": c.choice(MALFORMED)}),
    (2, 404, "/nothing", lambda c: {"params": {"number": c.random()}}),
    (2, 405, "/health", lambda _: {}),
]


async def check_vectors(http: httpx.AsyncClient, chance: random.Random, tally: Tally) -> httpx.Response:
    cases = chance.choices(CASES, k=chance.randint(1, 8))
    texts = [*(case.text for case in cases), words(chance, 60)]
    response = await http.post(TEXT, json={"texts": texts})
    if response.status_code == 200:
        vectors = response.json()["embeddings"]
        if not np.allclose(vectors[:-1], [case.vector for case in cases], atol=1e-5):
            tally.failures.append("A vector is wrong.")
    return response


async def leave(http: httpx.AsyncClient, chance: random.Random) -> None:
    """Disconnect before the body ends, before the answer, or in the middle of it."""
    body = json.dumps({"texts": [words(chance, 60) for _ in range(64)]}).encode()
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    stage = chance.randint(0, 2)
    head = b"POST /embed/text HTTP/1.1\r\nHost: gme\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write(head + body[: len(body) // (2 if stage == 0 else 1)])
    await writer.drain()
    await (asyncio.wait_for(reader.read(1), PATIENCE) if stage == 2 else asyncio.sleep(chance.random() / 10))
    writer.transport.abort()


async def send(http: httpx.AsyncClient, chance: random.Random, tally: Tally) -> None:
    started, action = time.monotonic(), chance.random()
    if action < 0.06:
        await leave(http, chance)
        return
    expected, what = 200, TEXT
    if action < 0.4:
        response = await check_vectors(http, chance, tally)
    elif action < 0.48:
        response = await http.get(what := chance.choice(STATES))
    else:
        ((_, expected, what, request),) = chance.choices(KINDS, [kind[0] for kind in KINDS])
        response = await http.post(what, **request(chance))
    tally.statuses[response.status_code] += 1
    if response.status_code == 200:
        tally.seconds.append(time.monotonic() - started)
    if response.status_code == 503:
        await asyncio.sleep(int(response.headers["Retry-After"]) * chance.random())
    elif response.status_code != expected:
        tally.failures.append(f"{what}: {response.status_code} and not {expected}: {response.text}")


async def run_client(url: str, number: int, deadline: float, tallies: list[Tally]) -> None:
    """Send one request after the other until the deadline; what it sees goes into the last tally."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False, trust_env=False) as http:
        while time.monotonic() < deadline:
            try:
                await send(http, chance, tallies[-1])
            except Exception as error:
                tallies[-1].failures.append(repr(error))
            await asyncio.sleep(2 * chance.random())


async def soak(server: Server, minutes: float, clients: int) -> list[Tally]:
    async def state() -> tuple[int, int]:
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
            return pages * os.sysconf("SC_PAGE_SIZE"), (await http.get("/health")).json()["queue_depth"]

    print("| minute | requests | 200 | others | p50 ms | p99 ms | MB resident | queue |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(Tally().row("start", *await state()), flush=True)
    tallies, deadline = [Tally()], time.monotonic() + 60 * minutes
    running = [asyncio.create_task(run_client(server.url, number, deadline, tallies)) for number in range(clients)]
    while (left := deadline - time.monotonic()) > 0:
        await asyncio.sleep(min(60, left))
        print(tallies[-1].row(str(len(tallies)), *await state()), flush=True)
        print(*(failure[:1000] for failure in tallies[-1].failures[:10]), sep="\n", end="", flush=True)
        tallies.append(Tally())
    await asyncio.gather(*running)
    print(Tally().row("end", *await state()))
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "log", "--no-access-log", **LIMITS) as server:
        tallies = asyncio.run(soak(server, options.minutes, options.clients))
        log = server.log.read_text()
    print(f"{sum(len(tally.failures) for tally in tallies)} failures", log if "Traceback" in log else "", sep="\n")
    return int(any(tally.failures for tally in tallies) or "Traceback" in log)


if __name__ == "__main__":
    sys.exit(main())
