"""Room Batcher: its policy, shown with functions that record what reaches them and stop where a test wants them to."""

import asyncio
import contextlib
import gc
import itertools
import math
import random
import sys
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest
from batcher_rig import Rig, image, name_of, read, text

import gme_service as gme

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
Make = Callable[..., Awaitable[Rig]]

POLICY = {  # the most tokens of a batch; what comes while the model is busy; the batches that it gets then
    "concurrent requests share a batch": (1000, ["a", "b", "c"], ["a b c"]),
    "a batch may be as full as the limit": (100, ["a b c d e f g h i j k"], ["a b c d e f g h i j", "k"]),
    "a longer input than a batch goes alone": (100, ["a:150", "b:150", "c:90", "d"], ["a", "b", "c d"]),
    "length decides nothing": (1000, ["a:100", "b:9", "c:800"], ["a b c"]),
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


# ---------------------------------------------------------------------------------------------------------- fairness


@pytest.mark.parametrize("bulk_clients", [1, 8, 32])
async def test_a_lone_query_waits_for_one_turn_of_each_bulk_client(make: Make, bulk_clients: int) -> None:
    inputs_in_a_batch = 10
    rig = await make(max_tokens=10 * inputs_in_a_batch)
    async with rig.held():
        for client in range(bulk_clients):
            await rig.submit(*(text(f"{client} {number}") for number in range(64)))
        for _ in range(5):
            await rig.step()
        await rig.submit(text("query"))
        await rig.settle()
        before = len(rig.batches)
        while "query" not in rig.batches[-1]:
            await rig.step()
        waited = len(rig.batches) - before
        await rig.cancel_all()
    assert waited <= math.ceil((bulk_clients + 1) / inputs_in_a_batch) + 1


async def test_a_bulk_job_beside_endless_lone_queries_gets_its_share_and_so_do_they(make: Make) -> None:
    clients = 24
    rig = await make(max_tokens=100)
    async with rig.held():
        await rig.submit(*(text(f"bulk {number}") for number in range(200)))
        queries = [await rig.submit(text(f"{client} 0")) for client in range(clients)]
        answered = [0] * clients
        for _ in range(60):
            await rig.step()
            for client, query in enumerate(queries):
                if query.done():
                    answered[client] += 1
                    queries[client] = await rig.submit_ready(text(f"{client} {answered[client]}"))
        await rig.cancel_all()
    fair = 60 * 10 / (clients + 1)
    bulk = sum(name.startswith("bulk") for names in rig.batches for name in names)
    assert 0.7 * fair <= bulk <= 1.5 * fair
    assert min(answered) >= 0.7 * fair


async def test_what_a_bulk_job_took_while_nobody_wanted_it_is_not_counted_against_it(make: Make) -> None:
    rig = await make(max_tokens=100)
    async with rig.held():
        await rig.submit(*(text(f"old {number}") for number in range(400)))
        for number in range(20):
            await rig.submit(text(f"query {number}"))
            await rig.step()
        await rig.submit(*(text(f"new {number}") for number in range(400)))
        before = len(rig.batches)
        for _ in range(30):
            await rig.step()
        await rig.cancel_all()
    taken = [name[:3] for names in rig.batches[before:] for name in names]
    assert 0.7 <= taken.count("old") / taken.count("new") <= 1.5


async def test_pictures_that_are_late_do_not_go_before_all_others_once_they_are_ready(make: Make) -> None:
    rig = await make(max_tokens=100)
    rig.slow = "late"
    async with rig.held(*(text(f"bulk {number:03}") for number in range(600))):
        await rig.submit(*(image(f"late {number}") for number in range(100)))
        for _ in range(20):
            await rig.step()
        rig.may_go.set()
        await rig.until(lambda: sum(name.startswith("late") for name in rig.ready()) >= 20)
        await rig.submit_ready(text("query"))
        before = len(rig.batches)
        while "query" not in rig.batches[-1]:
            await rig.step()
        waited = len(rig.batches) - before
        await rig.cancel_all()
    assert waited <= 2


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

    limits = {"max_tokens": 1000, "max_pixels": 1000, "cache_entries": 50}
    batcher = gme.Batcher(prepare, lambda source: 1, compute, **limits)
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


async def test_a_refused_file_is_freed_at_once(rig: Rig) -> None:
    rig.prepare_faults["bad"] = gme.InputError  # a new one each time
    source = image("bad")
    before = sys.getrefcount(source)
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            with contextlib.suppress(gme.InputError):
                await rig.batcher.embed([source])
        await rig.until(lambda: sys.getrefcount(source) == before)  # threads let go of it when they like
    finally:
        gc.enable()


async def test_a_request_cancelled_when_ready_does_not_reach_the_model_and_leaves_the_others(rig: Rig) -> None:
    async with rig.held():
        gone, stays = await rig.submit_ready(text("gone"), text("same")), await rig.submit_ready(text("same"))
        assert len(rig.batcher) == 4
        await rig.cancel(gone)
        assert len(rig.batcher) == 2
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
    assert len(rig.batcher) == 0
    rig.may_go.set()
    await (await rig.submit(text("stays")))
    assert rig.batches == [["stays"]]


async def test_preparing_stays_a_few_batches_ahead_and_what_is_cancelled_makes_room_for_what_waits(make: Make) -> None:
    rig = await make(max_tokens=10)
    async with rig.held():
        *gone, stays = [await rig.submit(image(f"{number}")) for number in range(100)]
        await rig.until(lambda: len(rig.prepared) == rig.ready().total() > gme.AHEAD_BATCHES)
        await rig.cancel(*gone)
        assert len(rig.batcher) == 2
        await rig.until(lambda: rig.ready()["99"])
    await stays
    assert rig.batches == [["plug"], ["99"]]
    assert len(rig.prepared) < 20


async def test_texts_never_wait_behind_pictures(rig: Rig) -> None:
    rig.slow = "picture"
    more_than_threads = rig.batcher.image_loops + 10
    pictures = [await rig.submit(image(f"picture {number}", 12)) for number in range(more_than_threads)]
    await (await rig.submit(text("query")))
    assert not any(picture.done() for picture in pictures)


async def test_a_picture_waits_for_its_share_of_the_pixels_and_holds_no_thread_meanwhile(rig: Rig) -> None:
    rig.slow = "large"
    large = await rig.submit(image("large", gme_pixels := 700))
    await rig.until(lambda: "large" in rig.prepared)
    others = [await rig.submit(image(f"other {number}", gme_pixels)) for number in range(50)]
    await rig.until(lambda: len(rig.counted) == 2 and rig.in_image_threads == 1)
    await (await rig.submit(text("query")))
    assert rig.prepared == ["large", "query"]  # 1000 pixels may be decoded at a time
    assert rig.counted == ["large", "other 0"]  # and one waits for its share of them
    rig.may_go.set()
    await asyncio.gather(large, *others)


async def test_a_request_costs_no_more_when_thousands_wait(make: Make) -> None:
    async def lines_per_request(count: int) -> float:
        """Lines of the module that the event loop runs for requests of one text which all wait together."""
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != gme.__file__:
                return None
            lines += event == "line"
            return trace

        rig = await make(max_tokens=1000)
        async with rig.held():
            sys.settrace(trace)
            try:
                for number in range(count):
                    await rig.submit(text(f"{number}"))
                    # What a preparation costs the loop, each request pays at once, or none does.
                    await rig.settle()
            finally:
                sys.settrace(None)
        return lines / count

    assert await lines_per_request(2048) < 1.5 * await lines_per_request(64)


async def test_a_long_instruction_makes_batches_smaller(make: Make) -> None:
    rig = await make(max_tokens=60)
    sources = [text(name, 10, "i" * 32 * 10) for name in "abcd"]  # which costs 10 tokens more for each
    assert await rig.batches_of(sources) == [["a", "b", "c"], ["d"]]


async def test_no_inputs_are_refused(rig: Rig) -> None:
    with pytest.raises(gme.InputError):
        await rig.batcher.embed([])


async def test_when_the_context_ends_nothing_of_it_runs(rig: Rig) -> None:
    before = asyncio.all_tasks()
    batcher = gme.Batcher(rig.prepare, rig.count_pixels, rig.embed, max_tokens=10, max_pixels=10)
    with contextlib.suppress(RuntimeError):
        async with batcher.running():
            await asyncio.sleep(0)
            raise RuntimeError
    assert asyncio.all_tasks() == before


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
        assert len(rig.batcher) == 4
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
            assert len(rig.batcher) == 3
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


# ---------------------------------------------------------------------------------------------------------- the rig


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
