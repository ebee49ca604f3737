"""Room Batcher: its policy, shown with functions that record what reaches them and stop where a test wants them to."""

import asyncio
import contextlib
import gc
import hashlib
import itertools
import random
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import numpy as np
import pytest

import gme_service as gme

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(20)]
Make = Callable[..., Awaitable["Rig"]]
Task = asyncio.Task[tuple[np.ndarray, int]]
PATIENCE = 10  # seconds after which a thread or a test that hangs gives up


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
        self.batches: list[list[str]] = []  # names, as the model got them
        self.whole = set[str]()  # the last batch that was no half of the one before it
        self.unlawful: list[list[str]] = []  # batches against the rules
        self.prepare_faults: dict[str, BaseException] = {}
        self.model_faults: dict[str, BaseException | float] = {}  # raised, or put into the vector
        self.room = 1 << 30  # inputs for which there is memory
        self.gate, self.busy = threading.Event(), False  # the model waits at a closed gate
        self.slow, self.may_go = "", threading.Event()  # whose preparation lasts until `may_go`
        self.gate.set()
        self.requests: list[tuple[Task, Sequence[gme.Source]]] = []
        self.batcher = gme.Batcher(self.prepare, self.embed, max_tokens, max_queue, cache_entries)

    def prepare(self, sources: Sequence[gme.Source]) -> list[gme.Input]:
        results: list[gme.Input] = []
        for name, source in zip(map(name_of, sources), sources, strict=True):
            self.prepared.append(name)
            if name == self.slow:
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
            area, prefixes = len(costs) * max(costs), {one.prefix for one in inputs}
            if len(costs) > 1 and (area > self.batcher.max_tokens or sum(costs) < 0.79 * area or len(prefixes) > 1):
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
        return Counter(name_of(one.input) for one in self.batcher.waiting if one.input)

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

    async def check(self) -> None:
        """Every request has ended, those with an answer have their own vectors, and nothing is left of any.

        Every batch that the model got has one instruction, at most its tokens and a fifth of padding.
        """
        self.gate.set()
        self.may_go.set()
        for task, sources in self.requests:
            (answer,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(answer, tuple):
                inputs = [read(source) for source in sources]
                np.testing.assert_array_equal(answer[0], [identity(one) for one in inputs])
                assert answer[1] == sum(len(one.token_ids) for one in inputs)
        assert len(self.batcher.waiting) == 0
        assert self.unlawful == []


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with contextlib.AsyncExitStack() as stack:

        async def make_one(**options: int) -> Rig:
            rig = Rig(**options)
            await stack.enter_async_context(rig.batcher.running())
            stack.push_async_callback(rig.check)
            return rig

        yield make_one


@pytest.fixture
async def rig(make: Make) -> Rig:
    return await make()


POLICY = {  # the most tokens of a batch; what comes while the model is busy; the batches that it gets then
    "concurrent requests share a batch": (1000, ["a", "b", "c"], ["a b c"]),
    "a batch may be as full as the limit": (100, ["a b c d e f g h i j k"], ["a b c d e f g h i j", "k"]),
    "a longer input than a batch goes alone": (100, ["a:150", "b:150", "c:90", "d"], ["a", "b", "c", "d"]),
    "a fifth of a batch may be padding": (1000, ["a:100", "b:61", "c:100"], ["a b c"]),
    "and no more than a fifth": (1000, ["a:100", "b:39", "c:100"], ["a c", "b"]),
    "the oldest goes first among equals": (10, ["a", "b", "c"], ["a", "b", "c"]),
    "the shortest of a request goes first": (30, ["c:28 a:16 b:18"], ["a", "b", "c"]),
    "what fits worse is not displaced by what is later": (30, ["a", "b:9", "c:9", "d", "e"], ["a b c", "d e"]),
    "requests of many inputs take turns": (10, ["a b c", "d e f"], ["a", "d", "b", "e", "c", "f"]),
    "a lone query overtakes the rest of an older request": (10, ["a b c", "d"], ["a", "d", "b", "c"]),
    "equal inputs are computed once": (1000, ["a b b", "a", "b a"], ["a b"]),
    "an equal lone query brings an input forward": (10, ["a b c d", "d"], ["a", "d", "b", "c"]),
}


@pytest.mark.parametrize("name", POLICY)
async def test_the_policy(make: Make, name: str) -> None:
    max_tokens, requests, batches = POLICY[name]
    rig = await make(max_tokens=max_tokens)
    given = [[item.partition(":") for item in request.split()] for request in requests]
    sources = [[text(name, int(length or 10)) for name, _, length in items] for items in given]
    assert [sorted(names) for names in await rig.batches_of(*sources)] == [names.split() for names in batches]


async def test_different_instructions_never_share_a_batch_and_texts_and_images_do(rig: Rig) -> None:
    sources = [text("a"), text("b", 10, "j"), image("c"), image("d", 10, "j")]
    assert await rig.batches_of(*([source] for source in sources)) == [["a", "c"], ["b", "d"]]


async def test_a_later_bulk_job_shares_with_one_that_is_far_along(make: Make) -> None:
    rig = await make(max_tokens=100)
    async with rig.held(*(text(f"old {number}") for number in range(300))):
        for _ in range(10):
            await rig.step()
        await rig.submit_ready(*(text(f"new {number}") for number in range(30)))
    taken = [name[:3] for names in rig.batches[11:15] for name in names]
    assert 12 < taken.count("old") < 28  # of 40


async def test_a_bulk_job_goes_on_while_more_queries_come_than_a_batch_takes(make: Make) -> None:
    rig = await make(max_tokens=100)
    async with rig.held(*(text(f"bulk {number:02}") for number in range(90))):
        for turn in range(15):
            for number in range(11):
                await rig.submit_ready(text(f"{turn} {number}"))
            await rig.step()
    taken = [sum(name.startswith("bulk") for name in names) for names in rig.batches[1:16]]
    assert 5 <= sum(taken) <= 20  # about one a batch


async def test_an_input_equal_to_one_that_is_being_computed_waits_for_that(rig: Rig) -> None:
    async with rig.held(text("same")):
        await rig.submit_ready(text("same"), text("other"))
    assert rig.batches == [["same"], ["other"]]


async def test_the_cache_forgets_what_was_not_asked_for_the_longest(make: Make) -> None:
    for entries, batches in ((2, "ab c b"), (0, "ab ab c a b")):
        rig = await make(cache_entries=entries)
        for names in ["ab", "bba", "c", "a", "b"]:  # c takes the place of b, which a was asked for after
            await (await rig.submit(*map(text, names)))
        assert ["".join(sorted(names)) for names in rig.batches] == batches.split()


async def test_what_was_answered_is_freed_at_once_and_the_cache_keeps_no_batch_and_nothing_of_a_clients() -> None:
    arrays = list[weakref.ref[np.ndarray]]()

    def prepare(sources: Sequence[gme.Source]) -> list[gme.Input]:
        inputs = [read(source) for source in sources]
        arrays.extend(weakref.ref(one.patches) for one in inputs)
        return inputs

    def compute(inputs: Sequence[gme.Input]) -> np.ndarray:
        vectors = np.ones((len(inputs), 4), np.float32)
        arrays.append(weakref.ref(vectors))
        if name_of(inputs[0]) == "huge":
            raise gme.TooLargeError("It is huge.")
        return vectors

    batcher = gme.Batcher(prepare, compute, max_tokens=1000, cache_entries=50)
    gc.collect()
    gc.disable()
    try:
        async with batcher.running():
            for number in range(100):
                embeddings, _ = await batcher.embed([image(f"{number // 2}")])
                assert (embeddings == 1).all()
                embeddings[:] = 0
            for _ in range(20):
                with contextlib.suppress(gme.TooLargeError):
                    await batcher.embed([image("huge")])
            alive = sum(array() is not None for array in arrays)
    finally:
        gc.enable()
    assert alive < 15 < len(arrays)  # the last batch, and the last of each thread


async def test_a_request_cancelled_when_ready_does_not_reach_the_model_and_leaves_the_others(rig: Rig) -> None:
    async with rig.held():
        gone, stays = await rig.submit_ready(text("gone"), text("same")), await rig.submit_ready(text("same"))
        assert len(rig.batcher.waiting) == 4
        await rig.cancel(gone)
        assert len(rig.batcher.waiting) == 2
        await rig.step()
        other = await rig.submit_ready(text("same"))
        await rig.cancel(stays)
    await other
    assert rig.batches == [["plug"], ["same"]]


async def test_a_request_cancelled_while_it_is_prepared_does_not_reach_the_model(rig: Rig) -> None:
    rig.slow = "gone"
    gone = await rig.submit(text("gone"), text("also gone", 11))
    await rig.until(lambda: "gone" in rig.prepared)
    await rig.cancel(gone)
    assert len(rig.batcher.waiting) == 0
    rig.may_go.set()
    await (await rig.submit(text("stays")))
    assert rig.batches == [["stays"]]


async def test_preparing_stays_a_few_batches_ahead_and_what_is_cancelled_makes_room_for_what_waits(make: Make) -> None:
    rig = await make(max_tokens=10)
    async with rig.held():
        *gone, stays = [await rig.submit(image(f"{number}")) for number in range(100)]
        await rig.until(lambda: len(rig.prepared) == rig.ready().total() > gme.AHEAD_BATCHES)
        await rig.cancel(*gone)
        assert len(rig.batcher.waiting) == 2
        await rig.until(lambda: rig.ready()["99"])
    await stays
    assert rig.batches == [["plug"], ["99"]]
    assert len(rig.prepared) < 20


async def test_a_text_does_not_wait_until_an_image_is_prepared(rig: Rig) -> None:
    rig.slow = "image"
    picture = await rig.submit(image("image"))
    await (await rig.submit(text("query")))
    assert not picture.done()


async def test_past_the_queues_limit_requests_are_refused_until_there_is_room(make: Make) -> None:
    rig = await make(max_queue=4)
    rig.model_faults["bad"] = RuntimeError("boom")
    async with rig.held():
        gone = await rig.submit(text("a"), text("bad"))
        with pytest.raises(gme.BusyError):
            await (await rig.submit(text("c"), text("d")))
        last = await rig.submit(text("c"))
        with pytest.raises(gme.BusyError):
            await (await rig.submit(text("d")))
        await rig.cancel(gone)
        await rig.submit(text("d"), text("bad"))
        assert len(rig.batcher.waiting) == 4
    await last
    await rig.check()
    await (await rig.submit(*map(text, "efgh")))


@pytest.mark.parametrize(
    "fault", [gme.InputError("it is bad"), RuntimeError("boom"), BaseException("a panic of the tokenizer's")]
)
async def test_an_input_that_cannot_be_prepared_fails_its_own_request_at_once(rig: Rig, fault: BaseException) -> None:
    rig.prepare_faults["bad"] = fault
    for _ in range(10):  # more often than there are threads
        async with rig.held():
            await rig.submit(text("a"))
            with pytest.raises(gme.ServiceError) as caught:
                await (await rig.submit(text("b", 20), text("c", 30), text("bad", 10)))
            await rig.submit(text("d"))
            assert len(rig.batcher.waiting) == 3
        assert type(caught.value) is (gme.InputError if isinstance(fault, gme.InputError) else gme.ServiceError)
    assert Counter(itertools.chain(*rig.batches)) == {"plug": 10, "a": 10, "d": 10}


@pytest.mark.parametrize("fault", [gme.TooLargeError("it does not fit"), RuntimeError("boom"), float("nan")])
async def test_an_input_that_the_model_fails_on_fails_alone_and_is_not_remembered(
    make: Make, fault: BaseException | float
) -> None:
    rig = await make(cache_entries=100)
    rig.model_faults["bad"] = fault
    async with rig.held():
        others = [await rig.submit_ready(text(name)) for name in "ab"]
        bad = [await rig.submit_ready(text("c"), text("bad")), await rig.submit_ready(text("bad"))]
        others += [await rig.submit_ready(text(name)) for name in "de"]
    await asyncio.gather(*others)
    for task in bad:
        with pytest.raises(ArithmeticError if isinstance(fault, float) else gme.ServiceError):
            await task
    if not isinstance(fault, float):  # which is the model's answer, as often as it is asked
        del rig.model_faults["bad"]
        await (await rig.submit(text("bad")))


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_each_request_ends_as_it_should(make: Make, seed: int) -> None:
    """Clients submit, cancel and wait, among inputs that fail in every way, with a cache that is always too small."""
    rig = await make(max_tokens=120, cache_entries=20, max_queue=250)
    rig.room = 5 if seed % 2 else 100
    rig.prepare_faults = {"bad": gme.InputError("it is bad"), "worse": RuntimeError("in preparing")}
    rig.model_faults = {"poison": RuntimeError("in the model"), "huge": gme.TooLargeError("it is"), "nan": float("nan")}
    faults = [*rig.prepare_faults, *rig.model_faults]

    async def client(chance: random.Random) -> None:
        for _ in range(30):
            names = chance.choices([*map(str, range(100)), *faults], k=chance.choice([1, 1, 1, 5, 30]))
            kind, instruction = chance.choice([text, text, image]), chance.choice("ij")
            task = await rig.submit(*(kind(name, chance.randrange(8, 40), instruction=instruction) for name in names))
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                task.cancel()
            elif chance.random() < 0.7:
                await asyncio.wait([task])

    await asyncio.gather(*(client(random.Random(100 * seed + number)) for number in range(12)))
    await rig.check()
    ends = Counter[type]()
    for task, sources in rig.requests:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        ends[type(error)] += 1
        if not isinstance(error, asyncio.CancelledError | gme.BusyError):
            assert bool(error) == bool({name_of(source) for source in sources} & set(faults))
    assert min(ends[kind] for kind in (asyncio.CancelledError, type(None), gme.ServiceError, gme.InputError)) > 0, ends
