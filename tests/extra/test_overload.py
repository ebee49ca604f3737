"""Overload: 200 clients at once, from a process of their own, send a real server more than it can compute.

The load lasts four seconds; `OVERLOAD_SECONDS=60 python -m pytest -s tests/extra/test_overload.py` makes it a minute
and prints its numbers.
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
from conftest import Server, golden

CLIENTS = 200
SECONDS = float(os.environ.get("OVERLOAD_SECONDS", "4"))
PATIENCE = 60  # seconds after which a request counts as one that hangs
MAX_GROWTH = 512 << 20  # bytes of resident memory, which grows for some minutes before it levels off
CASES = [case for case in golden() if case.prompt is None]
TEXTS, IMAGES = [case for case in CASES if not case.data], [case for case in CASES if case.data]


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # answers that are not as they should be
    seconds: list[float] = field(default_factory=list)  # that the answers of status 200 took


async def run_client(url: str, number: int, deadline: float, tally: Tally) -> None:
    """Send one request after the other until the deadline, known inputs and new ones; wait, as told, after a 503."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False, trust_env=False) as http:
        while (started := time.monotonic()) < deadline:
            if chance.random() < 0.1:
                known = [chance.choice(IMAGES)]
                form = {"files": {"file": known[0].data}, "data": {"text": known[0].text}}
                response = await http.post("/embed/image", **form)
            else:
                known = chance.choices(TEXTS, k=chance.randint(1, 16))
                new = [f"{chance.random()} " + "word " * chance.randint(0, 40) for _ in range(chance.randint(0, 48))]
                response = await http.post("/embed/text", json={"texts": [case.text for case in known] + new})
            tally.statuses[response.status_code] += 1
            if response.status_code == 200:
                tally.seconds.append(time.monotonic() - started)
                vectors = np.array(response.json()["embeddings"])
                if not np.allclose(vectors[: len(known)], [case.vector for case in known], atol=1e-5):
                    tally.wrong.append(response.text[:1000])
            elif response.status_code == 503:
                await asyncio.sleep(int(response.headers["Retry-After"]) * chance.random())


def load(url: str, seconds: float) -> Tally:
    """What `CLIENTS` clients see that send for so many seconds; raises when one of them is not answered."""
    os.nice(10)  # what is measured is the server, and not the clients beside it

    async def run_clients() -> Tally:
        tally, deadline = Tally(), time.monotonic() + seconds
        await asyncio.gather(*(run_client(url, number, deadline, tally) for number in range(CLIENTS)))
        return tally

    return asyncio.run(run_clients())


def test_200_clients_at_once_are_each_answered_or_told_to_come_back(start: Callable[..., Server]) -> None:
    server = start("--no-access-log", GME_MAX_QUEUE="512", GME_CACHE_MB="0")
    memory, waits = [], []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, server.client() as watch:
        pool.submit(load, server.url, SECONDS).result()  # to warm up
        work = pool.submit(load, server.url, SECONDS)
        while not work.done():
            asked = time.perf_counter()
            assert watch.get("/health").status_code == 200
            waits.append(time.perf_counter() - asked)
            pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
            memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
            wait([work], timeout=0.1)
        tally = work.result()
        assert watch.get("/health").json()["queue_depth"] == 0
    p50, p99 = np.quantile(tally.seconds, [0.5, 0.99])
    print(f"\n{dict(tally.statuses)}; answered in {p50:.2f} s, p99 {p99:.2f} s; health in at most {max(waits):.3f} s")
    print(f"MB resident: {memory[0] >> 20} at first, {max(memory) >> 20} at most, {memory[-1] >> 20} at the end")
    assert tally.wrong == []
    assert set(tally.statuses) == {200, 503}
    assert max(waits) < 2
    assert memory[-1] - memory[0] < MAX_GROWTH
