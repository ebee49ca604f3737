"""Overload: 200 clients at once, from a process of their own, send a real server more than it can compute.

The load lasts four seconds; `OVERLOAD_SECONDS=60 python -m pytest -s tests/extra/test_overload.py` makes it a minute and
prints its numbers.
"""

import asyncio
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from conftest import Case, Server, golden

CLIENTS = 200
SECONDS = float(os.environ.get("OVERLOAD_SECONDS", "4"))
PATIENCE = 60  # seconds after which a request counts as one that hangs
MAX_GROWTH = 512 << 20  # bytes of resident memory, which grows for some minutes before it levels off


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # answers that are not as they should be
    seconds: list[float] = field(default_factory=list)  # that the answers of status 200 took


async def send_texts(http: httpx.AsyncClient, chance: random.Random, cases: list[Case]) -> tuple[httpx.Response, bool]:
    """A request of 1 to 64 texts, known ones and new ones; its answer, and whether that has the right vectors."""
    known = {number: chance.choice(cases) for number in range(0, chance.randint(1, 64), chance.randint(1, 4))}
    texts = [
        known[number].text if number in known else f"{chance.random()} " + "word " * chance.randint(0, 40)
        for number in range(max(known) + 1)
    ]
    response = await http.post("/embed/text", json={"texts": texts})
    if response.status_code != 200:
        return response, True
    vectors = np.array(response.json()["embeddings"])
    right = [np.allclose(vectors[number], case.vector, atol=1e-5) for number, case in known.items()]
    return response, vectors.shape == (len(texts), 128) and np.allclose((vectors**2).sum(1), 1) and all(right)


async def send_image(http: httpx.AsyncClient, chance: random.Random, cases: list[Case]) -> tuple[httpx.Response, bool]:
    """A request of one image, alone or fused; its answer, and whether that has the right vector."""
    case = chance.choice(cases)
    fields = {name: value for name in ("text", "prompt") if (value := getattr(case, name))}
    response = await http.post("/embed/image", files={"file": case.data}, data=fields)
    if response.status_code != 200:
        return response, True
    return response, np.allclose(response.json()["embeddings"], [case.vector], atol=1e-5)


async def run_client(url: str, number: int, deadline: float, tally: Tally) -> None:
    """Send one request after the other until the deadline; wait, as told, after a 503."""
    chance = random.Random(number)
    cases = [case for case in golden() if case.prompt is None]
    texts, images = [case for case in cases if case.image is None], [case for case in cases if case.image is not None]
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False, trust_env=False) as http:
        while (started := time.monotonic()) < deadline:
            send, of = (send_image, images) if chance.random() < 0.1 else (send_texts, texts)
            response, right = await send(http, chance, of)
            tally.statuses[response.status_code] += 1
            if response.status_code == 200:
                tally.seconds.append(time.monotonic() - started)
            if not right:
                tally.wrong.append(response.text[:1000])
            if response.status_code == 503:
                await asyncio.sleep(int(response.headers["Retry-After"]) * chance.random())


def load(url: str, seconds: float) -> Tally:
    """What `CLIENTS` clients see that send for so many seconds; raises when one of them is not answered."""
    os.nice(10)  # what is measured is the server, and not the clients beside it

    async def run_clients() -> Tally:
        tally, deadline = Tally(), time.monotonic() + seconds
        await asyncio.gather(*(run_client(url, number, deadline, tally) for number in range(CLIENTS)))
        return tally

    return asyncio.run(run_clients())


def resident(server: Server) -> int:
    """Bytes of the server's resident memory."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_200_clients_at_once_are_each_answered_or_told_to_come_back(start: Callable[..., Server]) -> None:
    server = start("--no-access-log", GME_MAX_QUEUE="512", GME_CACHE_MB="0")
    waits, memory = [], []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, server.client() as watch:
        pool.submit(load, server.url, SECONDS).result()
        memory.append(resident(server))

        work = pool.submit(load, server.url, SECONDS)
        while not work.done():
            asked = time.perf_counter()
            assert watch.get("/health").status_code == 200
            waits.append(time.perf_counter() - asked)
            memory.append(resident(server))
            wait([work], timeout=0.1)
        tally = work.result()

        assert watch.get("/health").json()["queue_depth"] == 0
        memory.append(resident(server))
    print(
        f"\n{dict(tally.statuses)};"
        f" answered in {np.median(tally.seconds):.2f} s, p99 {np.quantile(tally.seconds, 0.99):.2f} s;"
        f" health in {np.median(waits):.3f} s, at most {max(waits):.3f}, asked {len(waits)} times;"
        f" MB resident: {memory[0] >> 20} warm, {max(memory) >> 20} at most, {memory[-1] >> 20} after"
    )
    assert tally.wrong == []
    assert set(tally.statuses) == {200, 503}
    assert max(waits) < 1
    assert memory[-1] - memory[0] < MAX_GROWTH
