"""Good and bad traffic for a long time: `python tests/soak.py [--minutes 20] [--clients 32]`.

It starts the service with the toy checkpoint and prints a row of a Markdown table for each minute: requests, answers by
status, latency of the answers of status 200, resident memory, and inputs without an answer. It ends with 1 when an
answer had another status than it should have, a vector was wrong, or no answer came.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from conftest import IMAGES, Server, golden, serve
from PIL import Image

LIMITS = {"GME_MAX_QUEUE": "2048", "GME_MAX_INPUTS": "512", "GME_MAX_BODY_MB": "2", "GME_CACHE_MB": "1"}
PATIENCE = 120  # seconds after which a request counts as one that hangs
JSON = {"content-type": "application/json"}
CASES = [case for case in golden() if case.image is None and case.prompt is None]
PHOTOS = [(IMAGES / name).read_bytes() for name in ("64x48.png", "photo.webp", "mode_CMYK.jpg", "animated.gif")]
HUGE = io.BytesIO()
Image.new("1", (20_000, 20_000)).save(HUGE, "PNG")  # 400 million pixels in 50 kB


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # that the answers of status 200 took
    failures: list[str] = field(default_factory=list)

    def row(self, label: str, resident: int, depth: int) -> str:
        good = self.statuses[200]
        others = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()) if status != 200)
        p50, p99 = np.quantile(self.seconds or [0], (0.5, 0.99)) * 1000
        total = self.statuses.total()
        return f"| {label} | {total} | {good} | {others} | {p50:.0f} | {p99:.0f} | {resident >> 20} | {depth} |"


@dataclass
class Client:
    """One of the clients; each method is a kind of request and says, if it is answered, what was wrong about that."""

    http: httpx.AsyncClient
    chance: random.Random
    tally: Tally

    async def send(self, expected: int, method: str, path: str, **request: object) -> httpx.Response:
        started = time.monotonic()
        response = await self.http.request(method, path, **request)
        self.tally.statuses[response.status_code] += 1
        if response.status_code == 200:
            self.tally.seconds.append(time.monotonic() - started)
        if response.status_code == 503:
            await asyncio.sleep(int(response.headers["Retry-After"]) * self.chance.random())
        elif response.status_code != expected:
            self.tally.failures.append(f"{method} {path}: {response.status_code} and not {expected}: {response.text}")
        return response

    def words(self, most: int) -> str:
        return f"{self.chance.random()} " + "word " * self.chance.randint(0, most)

    def check(self, vectors: object, expected: np.ndarray) -> None:
        if not np.allclose(vectors, expected, atol=1e-5):
            self.tally.failures.append("A vector is wrong.")

    async def texts(self) -> None:
        cases = self.chance.choices(CASES, k=self.chance.randint(1, 8))
        texts = [case.text for case in cases]
        response = await self.send(200, "POST", "/embed/text", json={"texts": [*texts, self.words(60)]})
        if response.status_code == 200:
            self.check(response.json()["embeddings"][:-1], np.array([case.vector for case in cases]))

    async def bulk(self) -> None:
        texts = [self.words(20) for _ in range(self.chance.randint(64, 256))]
        response = await self.send(200, "POST", "/embed/text", json={"texts": texts, "prompt": "Find it."})
        if response.status_code == 200:
            self.check(np.square(response.json()["embeddings"]).sum(1), np.ones(len(texts)))

    async def image(self) -> None:
        await self.send(200, "POST", "/embed/image", files={"file": self.chance.choice(PHOTOS)})

    async def fused(self) -> None:
        fields = {"text": self.words(20), "prompt": self.words(5)}
        await self.send(200, "POST", "/embed/image", files={"file": self.chance.choice(PHOTOS)}, data=fields)

    async def openai(self) -> None:
        photo = base64.b64encode(self.chance.choice(PHOTOS)).decode()
        case = self.chance.choice(CASES)
        items = [case.text, {"image": photo}, {"text": self.words(9), "image": f"data:image/png;base64,{photo}"}]
        response = await self.send(200, "POST", "/v1/embeddings", json={"input": items})
        if response.status_code == 200:
            self.check(response.json()["data"][0]["embedding"], case.vector)

    async def strange_text(self) -> None:
        texts = ["\ud800", "\0", "a" + "\u0301" * 10_000, "\u202e<|image_pad|><|im_end|>", "👩‍👩‍👧‍👧"]
        await self.send(200, "POST", "/embed/text", content=json.dumps({"texts": texts}), headers=JSON)

    async def broken_image(self) -> None:
        photo = bytearray(self.chance.choice(PHOTOS[:3]))  # half of an animation is still a picture
        del photo[self.chance.randint(1, len(photo) // 2) :]
        await self.send(400, "POST", "/embed/image", files={"file": bytes(photo)})

    async def broken_image_in_a_batch(self) -> None:
        items = [{"image": base64.b64encode(data).decode()} for data in (PHOTOS[0], b"<html>", PHOTOS[1])]
        response = await self.send(400, "POST", "/v1/embeddings", json={"input": items})
        if response.status_code == 400 and "Input 1: " not in response.text:
            self.tally.failures.append(response.text)

    async def huge_image(self) -> None:
        await self.send(413, "POST", "/embed/image", files={"file": HUGE.getvalue()})

    async def large_body(self) -> None:
        with contextlib.suppress(httpx.ReadError, httpx.WriteError):  # the connection may be reset before the answer
            await self.send(413, "POST", "/embed/text", content=b'{"texts": ["' + bytes(3 << 20), headers=JSON)

    async def too_many(self) -> None:
        await self.send(413, "POST", "/embed/text", json={"texts": ["a"] * 513})

    async def malformed(self) -> None:
        body = self.chance.choice([b"", b"{", b'{"texts": "a"}', b'{"texts": [1]}', b"[" * 1000, b"\xff\xfe"])
        await self.send(422, "POST", "/embed/text", content=body, headers=JSON)

    async def nothing(self) -> None:
        await self.send(400, "POST", "/embed/text", json={"texts": []})

    async def url(self) -> None:
        await self.send(400, "POST", "/v1/embeddings", json={"input": [{"image": "http://127.0.0.1/a.png"}]})

    async def no_route(self) -> None:
        await self.send(404, "GET", f"/{self.chance.random()}")

    async def no_method(self) -> None:
        await self.send(405, "PUT", "/embed/text")

    async def state(self) -> None:
        await self.send(200, "GET", self.chance.choice(["/health", "/metrics", "/v1/models", "/docs", "/openapi.json"]))

    async def leaving(self) -> None:
        """Disconnect before the body ends, before the answer, or in the middle of it."""
        body = json.dumps({"texts": [self.words(60) for _ in range(64)]}).encode()
        head = (
            f"POST /embed/text HTTP/1.1\r\nHost: gme\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        url = self.http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        stage = self.chance.randint(0, 2)
        writer.write(f"{head}\r\n\r\n".encode() + body[: len(body) // (2 if stage == 0 else 1)])
        await writer.drain()
        if stage == 2:
            await asyncio.wait_for(reader.read(1), PATIENCE)
        else:
            await asyncio.sleep(self.chance.random() / 10)
        writer.transport.abort()


WEIGHTS: dict[Callable[[Client], Awaitable[None]], int] = {
    Client.texts: 30,
    Client.bulk: 3,
    Client.image: 8,
    Client.fused: 8,
    Client.openai: 8,
    Client.strange_text: 2,
    Client.broken_image: 4,
    Client.broken_image_in_a_batch: 2,
    Client.huge_image: 2,
    Client.large_body: 2,
    Client.too_many: 2,
    Client.malformed: 4,
    Client.nothing: 2,
    Client.url: 2,
    Client.no_route: 2,
    Client.no_method: 2,
    Client.state: 8,
    Client.leaving: 6,
}


async def run_client(url: str, number: int, deadline: float, tallies: list[Tally]) -> None:
    """Send one request after the other until the deadline; what it sees goes into the last tally."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False, trust_env=False) as http:
        while time.monotonic() < deadline:
            (kind,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
            try:
                await kind(Client(http, chance, tallies[-1]))
            except Exception as error:
                tallies[-1].failures.append(f"{kind.__name__}: {error!r}")
            await asyncio.sleep(2 * chance.random())


async def state(server: Server) -> tuple[int, int]:
    """Bytes of resident memory, and inputs without an answer."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, verify=False, trust_env=False) as http:
        return pages * os.sysconf("SC_PAGE_SIZE"), (await http.get("/health")).json()["queue_depth"]


async def soak(server: Server, minutes: int, clients: int) -> list[Tally]:
    print("| minute | requests | 200 | others | p50 ms | p99 ms | MB resident | queue |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(Tally().row("start", *await state(server)), flush=True)
    started, tallies = time.monotonic(), [Tally()]
    deadline = started + 60 * minutes
    running = [asyncio.create_task(run_client(server.url, number, deadline, tallies)) for number in range(clients)]
    for minute in range(1, minutes + 1):
        await asyncio.sleep(started + 60 * minute - time.monotonic())
        print(tallies[-1].row(str(minute), *await state(server)), flush=True)
        for failure in tallies[-1].failures[:10]:
            print(failure[:1000], flush=True)
        tallies.append(Tally())
    await asyncio.gather(*running)
    total = Tally()
    for tally in tallies:
        total.statuses += tally.statuses
        total.seconds += tally.seconds
        total.failures += tally.failures
    print(total.row("total", *await state(server)))
    print(f"{len(total.failures)} failures")
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "log", "--no-access-log", **LIMITS) as server:
        tallies = asyncio.run(soak(server, options.minutes, options.clients))
        log = server.log.read_text()
    if "Traceback" in log:
        print(log)
    return int(any(tally.failures for tally in tallies) or "Traceback" in log)


if __name__ == "__main__":
    sys.exit(main())
