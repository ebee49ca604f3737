"""The rig of test_batcher.py: a batcher over functions that record what reaches them and stop where a test wants."""

import asyncio
import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import numpy as np

import gme_service as gme

Task = asyncio.Task[tuple[np.ndarray, int]]
PATIENCE = 60  # seconds after which a thread or a test that hangs gives up


def text(name: str, length: int = 10, instruction: str = "i") -> gme.Source:
    """A text that costs `length` tokens."""
    return gme.Source(name.ljust(length, "."), None, instruction)


def image(name: str, length: int = 10, instruction: str = "i") -> gme.Source:
    """An image with a text, `length` tokens together."""
    return gme.Source(name, b"\1" * (length - len(name)), instruction)


def read(source: gme.Source) -> gme.Input:
    """One token for each character and byte; the instruction is the part that the model has already."""
    data = source.image or b""
    prefix = [ord(character) for character in source.instruction]
    ids = np.array([*prefix, *[0] * len(data), *map(ord, source.text)], np.int64)
    patches = np.array([*data], np.uint8) if data else None
    return gme.Input(ids, tuple(prefix), patches=patches, key=ids.tobytes() + data)


def name_of(one: gme.Source | gme.Input) -> str:
    written = one.text if isinstance(one, gme.Source) else "".join(map(chr, one.token_ids[len(one.prefix) :]))
    return written.strip("\0.")


def identity(one: gme.Input) -> np.ndarray:
    """A vector that no other input has."""
    return np.frombuffer(hashlib.blake2b(one.key, digest_size=4).digest(), np.uint8).astype(np.float32)


class Rig:
    """A batcher over `prepare` and `embed` below, which a test can stop and let fail; `check` ends every test."""

    def __init__(self, max_tokens: int = 1000, max_queue: int = 16384, cache_entries: int = 0) -> None:
        self.prepared: list[str] = []  # names, in the order in which they were prepared
        self.counted: list[str] = []  # names of pictures, in the order in which their pixels were counted
        self.in_image_threads, self.lock = 0, threading.Lock()  # how many are counted or prepared just now
        self.batches: list[list[str]] = []  # names, as the model got them
        self.whole = set[str]()  # the last batch that was no half of the one before it
        self.unlawful: list[list[str]] = []  # batches against the rules
        self.prepare_faults: dict[str, BaseException | type[BaseException]] = {}
        self.model_faults: dict[str, BaseException | float] = {}  # raised, or put into the vector
        self.room = 1 << 30  # inputs for which there is memory
        self.gate, self.busy = threading.Event(), False  # the model waits at a closed gate
        self.slow, self.may_go = "", threading.Event()  # names that begin so are prepared when `may_go` is set
        self.gate.set()
        self.requests: list[tuple[Task, Sequence[gme.Source]]] = []
        limits = {"max_tokens": max_tokens, "max_queue": max_queue, "cache_entries": cache_entries}
        self.batcher = gme.Batcher(self.prepare, self.count_pixels, self.embed, max_pixels=1000, **limits)

    def count_pixels(self, source: gme.Source) -> int:
        with self.in_a_thread_of_images():
            self.counted.append(name_of(source))
            return len(source.image)

    @contextlib.contextmanager
    def in_a_thread_of_images(self) -> Iterator[None]:
        with self.lock:
            self.in_image_threads += 1
        try:
            yield
        finally:
            with self.lock:
                self.in_image_threads -= 1

    def prepare(self, sources: Sequence[gme.Source]) -> list[gme.Input]:
        if sources[0].image is None:
            return self.read_all(sources)
        with self.in_a_thread_of_images():
            return self.read_all(sources)

    def read_all(self, sources: Sequence[gme.Source]) -> list[gme.Input]:
        results: list[gme.Input] = []
        for name, source in zip(map(name_of, sources), sources, strict=True):
            self.prepared.append(name)
            if self.slow and name.startswith(self.slow):
                assert self.may_go.wait(PATIENCE)
            if fault := self.prepare_faults.get(name):
                raise fault
            results.append(read(source))
        return results

    def embed(self, inputs: Sequence[gme.Input]) -> np.ndarray:
        names, gate = [name_of(one) for one in inputs], self.gate
        self.batches.append(names)
        if not self.whole.issuperset(names):
            self.whole, costs = set(names), [one.cost for one in inputs]
            prefixes = {one.prefix for one in inputs}
            if len(costs) > 1 and (sum(costs) > self.batcher.max_tokens or len(prefixes) > 1):
                self.unlawful.append(names)
        if not gate.is_set():
            self.busy = True
            assert gate.wait(PATIENCE)
        if len(inputs) > self.room:
            raise gme.TooLargeError("it does not fit")
        vectors = np.array([identity(one) for one in inputs])
        for vector, fault in zip(vectors, map(self.model_faults.get, names), strict=True):
            if isinstance(fault, BaseException):
                raise fault
            if fault is not None:
                vector[1] = fault
        return vectors

    def ready(self) -> Counter[str]:
        """Names that are ready for the model, or with it."""
        return Counter(name_of(one.input) for one in self.batcher.ready)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)

    async def submit(self, *sources: gme.Source) -> Task:
        """A request that is in the queue, or refused, when this returns."""
        task = asyncio.create_task(self.batcher.embed(sources))
        self.requests.append((task, sources))
        await asyncio.sleep(0)
        return task

    async def submit_ready(self, *sources: gme.Source) -> Task:
        """A request of which all is ready for the model when this returns."""
        expected = self.ready() + Counter(map(name_of, sources))
        task = await self.submit(*sources)
        await self.until(lambda: self.ready() >= expected)
        return task

    async def cancel(self, *tasks: Task) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(0)

    async def cancel_all(self) -> None:
        """Within `held`: what has no answer yet goes no further."""
        await self.cancel(*(task for task, _ in self.requests if not task.done()))

    @contextlib.asynccontextmanager
    async def held(self, *sources: gme.Source) -> AsyncIterator[Task]:
        """Within the block the model is busy with the first batch of `sources`; after it, all is answered."""
        self.gate, self.busy = threading.Event(), False
        try:
            task = await self.submit(*sources or [text("plug")])
            await self.until(lambda: self.busy)
            yield task
        finally:
            self.gate.set()
        await asyncio.wait([task for task, _ in self.requests])

    async def batches_of(self, *requests: Sequence[gme.Source]) -> list[list[str]]:
        """The batches of requests that came, one after the other, while the model was busy."""
        async with self.held():
            for request in requests:
                await self.submit_ready(*request)
        return self.batches[1:]

    async def step(self) -> None:
        """Within `held`: let the model end its batch, and wait until it is busy with the next."""
        gate, self.gate, self.busy = self.gate, threading.Event(), False
        gate.set()
        await self.until(lambda: self.busy)
        await self.settle()

    async def settle(self) -> None:
        """Until the thread of texts has done all that it was given, so that steps do not race with it."""
        for _ in range(3):
            await asyncio.get_running_loop().run_in_executor(self.batcher.text_thread, int)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def check(self) -> None:
        """Every request has ended, those with an answer have their own vectors, and nothing is left of any.

        Every batch that the model got has one instruction, at most its tokens.
        """
        self.gate.set()
        self.may_go.set()
        for task, sources in self.requests:
            (answer,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(answer, tuple):
                inputs = [read(source) for source in sources]
                np.testing.assert_array_equal(answer[0], [identity(one) for one in inputs])
                assert answer[1] == sum(len(one.token_ids) for one in inputs)
        assert len(self.batcher) == 0
        assert self.unlawful == []
