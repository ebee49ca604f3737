"""Room Batcher: its policy, shown with functions that record what reaches them and stop where a test wants them to."""

import asyncio
import contextlib
import gc
import hashlib
import itertools
import queue
import random
import sys
import threading
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from conftest import TOY, golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

import gme_service as gme

DIMENSION = 4
PATIENCE = 30  # seconds after which a test that hangs fails
PREPARE_THREADS = gme.PREPARE_THREADS


def text(name: str, length: int = 10, instruction: str = "i") -> gme.Source:
    """A text that costs `length` tokens."""
    return gme.Source(name.ljust(length, "."), None, instruction)


def image(name: str, length: int = 10, pixel: int = 1, instruction: str = "i") -> gme.Source:
    """An image with a text, `length` tokens together."""
    return gme.Source(name, bytes([pixel]) * (length - len(name)), instruction)


def read(source: gme.Source) -> gme.Input:
    """One token for each character and pixel; the instruction is the part that a forward need not compute."""
    pixels = None if source.image is None else np.frombuffer(source.image, np.uint8).astype(np.float32)
    prefix = [ord(character) for character in source.instruction]
    ids = [*prefix, *[0] * len(source.image or b""), *map(ord, source.text)]
    return gme.Input(np.array(ids, np.int64), tuple(prefix), len(prefix), pixel_values=pixels)


def name_of(one: gme.Source | gme.Input) -> str:
    written = one.text if isinstance(one, gme.Source) else "".join(map(chr, one.token_ids[one.shared :]))
    return written.strip("\0.")


def identity(one: gme.Input) -> np.ndarray:
    """A vector that no other input has."""
    return np.frombuffer(hashlib.blake2b(one.key(), digest_size=DIMENSION).digest(), np.uint8).astype(np.float32)


class Watched(gme.Batcher):
    """A batcher that tells when inputs have become ready for the model, which does not show from outside."""

    def _make_ready(self, turn: gme.Turn, *rest: object) -> None:
        super()._make_ready(turn, *rest)
        self.watch(name_of(turn.source))

    watch: Callable[[str], None]


class Rig:
    """A batcher over `prepare` and `embed` below, which a test can stop and let fail; `check` ends every test."""

    def __init__(self, max_tokens: int = 1000, max_queue: int = 16384, cache_mb: float = 0) -> None:
        self.prepared: list[str] = []  # names, in the order in which they were prepared
        self.batches: list[list[str]] = []  # names, as the model got them
        self.fault: Callable[[str], BaseException | float | None] = lambda name: None  # raised or put into the vector
        self.most = 1 << 30  # inputs for which there is memory
        self.jobs: list[tuple[gme.Job, Sequence[gme.Source]]] = []
        self.gate, self.stopped = threading.Event(), queue.SimpleQueue[list[str]]()  # the model waits at a closed gate
        self.held_names: set[str] = set()  # whose preparation stops until `preparing_may_go`
        self.preparing_may_go, self.preparing = threading.Event(), queue.SimpleQueue[str]()
        self.ready, self.ready_changed = Counter[str](), threading.Condition()
        self.gate.set()
        limits = gme.Settings(max_queue=max_queue, cache_mb=cache_mb)
        self.batcher = Watched(self.prepare, self.embed, DIMENSION, limits, max_tokens)
        self.batcher.watch = self.note_ready

    def prepare(self, sources: Sequence[gme.Source]) -> list[gme.Input | gme.InputError]:
        results: list[gme.Input | gme.InputError] = []
        for source in sources:
            name = name_of(source)
            self.prepared.append(name)
            if name in self.held_names:
                self.preparing.put(name)
                assert self.preparing_may_go.wait(PATIENCE)
            fault = self.fault(name)
            if isinstance(fault, BaseException) and not isinstance(fault, gme.InputError) and name.startswith("p-"):
                raise fault
            results.append(fault if isinstance(fault, gme.InputError) else read(source))
        return results

    def embed(self, inputs: Sequence[gme.Input]) -> np.ndarray:
        names, gate = [name_of(one) for one in inputs], self.gate
        self.batches.append(names)
        if not gate.is_set():
            self.stopped.put(names)
            assert gate.wait(PATIENCE)
        if len(inputs) > self.most:
            raise MemoryError
        vectors = np.array([identity(one) for one in inputs])
        for row, fault in enumerate(map(self.fault, names)):
            if isinstance(fault, BaseException):
                raise fault
            if fault is not None:
                vectors[row, 1] = fault
        return vectors

    def note_ready(self, name: str) -> None:
        with self.ready_changed:
            self.ready[name] += 1
            self.ready_changed.notify_all()

    def await_ready(self, *names: str) -> None:
        """Wait until each of the names has been ready as often as it stands here."""
        with self.ready_changed:
            assert self.ready_changed.wait_for(lambda: self.ready >= Counter(names), PATIENCE), self.ready

    def submit(self, *sources: gme.Source) -> gme.Job:
        job = self.batcher.submit(sources)
        self.jobs.append((job, sources))
        return job

    def submit_ready(self, *sources: gme.Source) -> gme.Job:
        """Submit, and wait until all of it is ready for the model."""
        names = Counter(map(name_of, sources))
        before = Counter({name: self.ready[name] for name in names})
        job = self.submit(*sources)
        self.await_ready(*(names + before).elements())
        return job

    @contextlib.contextmanager
    def held(self, *sources: gme.Source) -> Iterator[gme.Job]:
        """Within the block the model is busy with the first batch of `sources`; then it goes on."""
        self.gate = threading.Event()
        try:
            job = self.submit(*sources or [text("plug")])
            self.stopped.get(timeout=PATIENCE)
            yield job
        finally:
            self.gate.set()

    def step(self) -> list[str]:
        """Within `held`: let the model end its batch, and wait until it is busy with the next; the names in that."""
        gate, self.gate = self.gate, threading.Event()
        gate.set()
        return self.stopped.get(timeout=PATIENCE)

    def batch_of(self, name: str) -> int:
        return next(number for number, names in enumerate(self.batches) if name in names)

    def check(self) -> None:
        """Every job has ended, those with an answer have their own vectors, and nothing is left of any."""
        self.gate.set()
        self.preparing_may_go.set()
        for job, sources in self.jobs:
            if not job.cancelled() and job.exception(PATIENCE) is None:
                inputs = [read(source) for source in sources]
                np.testing.assert_array_equal(job.vectors, [identity(one) for one in inputs])
                assert job.tokens == sum(len(one.token_ids) for one in inputs)
        self.batcher.close()
        assert not any(thread.is_alive() for thread in self.batcher._threads)
        assert self.batcher.depth == 0
        assert not self.batcher._open


@pytest.fixture
def make(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make_one(**options: float) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make_one
    for rig in rigs:
        rig.check()
    assert not [record for record in caplog.get_records("call") if record.name == "concurrent.futures"]


@pytest.fixture
def nervous() -> Iterator[None]:
    """Threads take turns so often that what a lock should have kept together comes apart."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def rig(make: Callable[..., Rig]) -> Rig:
    return make()


# -------------------------------------------------------------------------------------------------------------- batches


def test_an_idle_batcher_answers_a_lone_query_at_once(rig: Rig) -> None:
    job = rig.submit(text("lone"))

    assert job.exception(PATIENCE) is None
    assert rig.batches == [["lone"]]


@pytest.mark.parametrize("again", range(10))
def test_the_texts_of_a_request_are_one_batch(rig: Rig, again: int) -> None:
    names = [f"text {number}" for number in range(32)]

    rig.submit(*map(text, names)).result(PATIENCE)

    assert rig.batches == [names]


def test_concurrent_requests_share_a_batch(rig: Rig) -> None:
    names = [f"request {number}" for number in range(32)]

    with rig.held():
        for name in names:
            rig.submit_ready(text(name, 12))

    rig.jobs[-1][0].result(PATIENCE)
    assert rig.batches == [["plug"], names]


def test_the_answer_is_in_the_order_of_the_request_whatever_the_lengths(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=100)

    rig.submit(*(text(str(number), length) for number, length in enumerate([9, 50, 3, 100, 7, 300, 3])))

    rig.check()  # which compares the vectors


def test_a_longer_input_than_a_batch_may_be_goes_alone(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=100)

    with rig.held():
        rig.submit_ready(text("long", 150))
        rig.submit_ready(text("as long", 150))
        last = rig.submit_ready(text("short", 100))

    last.result(PATIENCE)
    assert rig.batches == [["plug"], ["long"], ["as long"], ["short"]]


def test_a_batch_may_be_as_full_as_the_limit(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=100)

    with rig.held():
        last = rig.submit_ready(*(text(str(number)) for number in range(11)))

    last.result(PATIENCE)
    assert list(map(len, rig.batches)) == [1, 10, 1]


def test_a_batch_has_at_most_a_fifth_of_padding(rig: Rig) -> None:
    with rig.held():
        rig.submit_ready(text("a", 100))
        rig.submit_ready(text("b", 61))  # 39 of 200 are padding
        rig.submit_ready(text("c", 55))  # 84 of 300 would be
        last = rig.submit_ready(text("d", 100))

    last.result(PATIENCE)
    assert list(map(sorted, rig.batches)) == [["plug"], ["a", "b", "d"], ["c"]]


def test_different_instructions_never_share_a_batch(rig: Rig) -> None:
    with rig.held():
        for number in range(6):
            last = rig.submit_ready(text(f"{number}", 10, "a query" if number % 2 else "a document"))

    last.result(PATIENCE)
    assert rig.batches == [["plug"], ["0", "2", "4"], ["1", "3", "5"]]


def test_texts_and_images_share_a_batch(rig: Rig) -> None:
    with rig.held():
        rig.submit_ready(text("text", 20))
        last = rig.submit_ready(image("image", 20))

    last.result(PATIENCE)
    assert rig.batches == [["plug"], ["text", "image"]]


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(3, 150), min_size=1, max_size=20), st.sampled_from(["i", "another"])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(REQUESTS)
def test_every_batch_keeps_the_rules(requests: list[tuple[list[int], str]]) -> None:
    rig, numbers = Rig(max_tokens=100), itertools.count()
    sources = [
        [text(str(next(numbers)), length, instruction) for length in lengths] for lengths, instruction in requests
    ]

    with rig.held():
        for request in sources:
            rig.submit(*request)
    rig.check()

    by_name = {name_of(source): source for request in sources for source in request}
    assert sorted(itertools.chain(*rig.batches)) == sorted([*by_name, "plug"])
    for names in rig.batches[1:]:
        lengths = [len(by_name[name].text) for name in names]
        area = len(names) * max(lengths)
        assert area <= 100 or len(names) == 1
        assert sum(lengths) >= 0.8 * area - 1e-9
        assert len({by_name[name].instruction for name in names}) == 1


# ------------------------------------------------------------------------------------------------------------- fairness


def test_oldest_first_among_equals(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)

    with rig.held():
        for name in "abcd":
            last = rig.submit_ready(text(name))

    last.result(PATIENCE)
    assert rig.batches == [["plug"], ["a"], ["b"], ["c"], ["d"]]


def test_a_later_input_does_not_displace_an_earlier_one_that_fits_less_well(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=30)

    with rig.held():
        for name, length in {"a": 10, "b": 9, "c": 9, "d": 10, "e": 10}.items():
            last = rig.submit_ready(text(name, length))

    last.result(PATIENCE)
    assert list(map(sorted, rig.batches)) == [["plug"], ["a", "b", "c"], ["d", "e"]]


def test_the_first_of_a_new_request_overtakes_the_rest_of_an_old_one(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)

    with rig.held():
        rig.submit_ready(text("old 0"), text("old 1"), text("old 2"))
        new = rig.submit_ready(text("new 0"))

    new.result(PATIENCE)
    assert rig.batches[:3] == [["plug"], ["old 0"], ["new 0"]]


def test_requests_of_many_inputs_take_turns(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)

    with rig.held():
        rig.submit(text("a0"), text("a1"), text("a2"))
        last = rig.submit(text("b0"), text("b1"), text("b2"))
        rig.await_ready("a0", "b0", "a1", "b1")

    last.result(PATIENCE)
    assert rig.batches[1:5] == [["a0"], ["b0"], ["a1"], ["b1"]]
    assert sorted(itertools.chain(*rig.batches[5:])) == ["a2", "b2"]


def test_the_shortest_of_a_request_goes_first(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=30)

    with rig.held():
        last = rig.submit_ready(text("c", 28), text("a", 10), text("b", 18))

    last.result(PATIENCE)
    assert rig.batches == [["plug"], ["a"], ["b"], ["c"]]


def test_a_lone_query_during_a_bulk_job_is_in_the_next_batch(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=200)

    with rig.held(*(text(f"bulk {number}") for number in range(2000))):
        rig.await_ready(*(f"bulk {number}" for number in range(60)))
        rig.submit_ready(text("lone"))

    rig.jobs[0][0].result(PATIENCE)
    assert rig.batch_of("lone") == 1
    assert len(rig.batches[1]) == 20  # and the bulk job fills it


def test_lone_queries_that_come_one_after_the_other_are_all_in_the_next_batch(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=200)

    with rig.held(*(text(f"bulk {number}") for number in range(500))):
        rig.await_ready(*(f"bulk {number}" for number in range(60)))
        for number in range(10):
            rig.submit_ready(text(f"lone {number}"))

    rig.jobs[0][0].result(PATIENCE)
    assert {rig.batch_of(f"lone {number}") for number in range(10)} == {1}


def test_a_small_request_during_a_bulk_job_is_in_the_next_batch(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=400)

    with rig.held(*(text(f"bulk {number}") for number in range(500))):
        rig.await_ready(*(f"bulk {number}" for number in range(200)))
        rig.submit_ready(*(text(f"small {number}") for number in range(16)))

    rig.jobs[0][0].result(PATIENCE)
    assert {rig.batch_of(f"small {number}") for number in range(16)} == {1}


def test_a_bulk_job_goes_on_while_more_lone_queries_keep_coming_than_a_batch_takes(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=100)
    with rig.held(*(text(f"bulk {number:02}") for number in range(90))):
        for _ in range(5):
            rig.step()
        before = len(rig.batches)
        for turn in range(30):
            for number in range(12):
                rig.submit(text(f"{turn} {number}"))
            rig.step()

    taken = [sum(name.startswith("bulk") for name in names) for names in rig.batches[before : before + 30]]
    assert 10 <= sum(taken) <= 30 + 10  # about one a batch, and what was ready before the first lone query


def cache_mb(vectors: int) -> float:
    return vectors * (4 * DIMENSION + gme.CACHE_ENTRY_BYTES) / 2**20


def hits() -> float:
    return REGISTRY.get_sample_value("gme_cache_hits_total") or 0


def test_equal_inputs_that_wait_together_are_computed_once(rig: Rig) -> None:
    with rig.held():
        rig.submit_ready(text("same"), text("other"), text("same"))
        rig.submit_ready(text("same"))
        last = rig.submit_ready(image("same"), image("same"))

    last.result(PATIENCE)
    assert Counter(itertools.chain(*rig.batches)) == {"plug": 1, "same": 2, "other": 1}  # the text and the image


def test_inputs_that_differ_in_anything_are_computed_apart(rig: Rig) -> None:
    with rig.held():
        rig.submit_ready(text("same"), text("same", 11))
        rig.submit_ready(text("same", 10, "another instruction"))
        rig.submit_ready(image("same", 10, pixel=1), image("same", 10, pixel=2))

    rig.check()
    assert Counter(itertools.chain(*rig.batches)) == {"plug": 1, "same": 5}


def test_an_equal_lone_query_brings_the_bulk_jobs_input_forward(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)

    with rig.held():
        rig.submit_ready(text("a"), text("b"), text("c"), text("d"))
        lone = rig.submit_ready(text("d"))

    lone.result(PATIENCE)
    assert rig.batches[:3] == [["plug"], ["a"], ["d"]]


def test_cancelling_one_of_two_equal_inputs_leaves_the_other(rig: Rig) -> None:
    with rig.held():
        left = rig.submit_ready(text("same"))
        stays = rig.submit_ready(text("same"))
        left.cancel()

    assert stays.exception(PATIENCE) is None


def test_a_repeated_input_is_answered_without_the_model(make: Callable[..., Rig]) -> None:
    rig, before = make(cache_mb=1), hits()

    rig.submit(text("a"), text("b")).result(PATIENCE)
    rig.submit(text("b"), text("a"), text("a")).result(PATIENCE)

    assert rig.batches == [["a", "b"]]
    assert hits() - before == 3


def test_the_cache_does_not_confuse_what_differs(make: Callable[..., Rig]) -> None:
    rig, before = make(cache_mb=1), hits()

    for source in (
        text("same"),
        text("same", 11),
        text("same", 10, "another"),
        image("same"),
        image("same", 10, pixel=2),
    ):
        rig.submit(source).result(PATIENCE)

    assert rig.batches == [["same"]] * 5
    assert hits() == before


def test_the_cache_forgets_the_one_not_asked_for_the_longest(make: Callable[..., Rig]) -> None:
    rig = make(cache_mb=cache_mb(2))

    for name in ["a", "b", "a", "c", "a", "b"]:  # c takes the place of b, not of a
        rig.submit(text(name)).result(PATIENCE)

    assert list(itertools.chain(*rig.batches)) == ["a", "b", "c", "b"]


def test_the_cache_is_bounded_in_bytes() -> None:
    """Also when what it keeps has been computed in batches with what it has forgotten."""
    dimension, megabytes, kept = 1024, 4, []
    limits = gme.Settings(cache_mb=megabytes)
    batcher = gme.Batcher(
        lambda sources: list(map(read, sources)),
        lambda inputs: np.ones((len(inputs), dimension), np.float32),
        dimension,
        limits,
        max_tokens=1000,
    )

    tracemalloc.start()
    try:
        for number in range(200):
            fresh = [text(f"{number} {i}") for i in range(20)]
            kept.append(fresh[0])
            batcher.submit(fresh).result(PATIENCE)
            if number % 20 == 0:
                batcher.submit(kept).result(PATIENCE)
        for number in range(20):  # so that no thread holds an answer of before
            batcher.submit([text(f"last {number}")]).result(PATIENCE)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        batcher.close()

    assert 0.9 * megabytes < taken / 2**20 < 1.4 * megabytes


def test_a_cached_vector_is_not_the_clients(make: Callable[..., Rig]) -> None:
    rig = make(cache_mb=1)
    answered = [rig.submit(text("a")), rig.submit(text("a"))]
    for job in answered:
        job.result(PATIENCE)
        job.vectors[:] = 0
    rig.jobs.clear()

    rig.submit(text("a")).result(PATIENCE)

    rig.check()  # which compares the vectors


def test_a_cache_of_no_size_is_off(make: Callable[..., Rig]) -> None:
    rig, before = make(cache_mb=0), hits()

    for _ in range(2):
        rig.submit(text("a")).result(PATIENCE)

    assert rig.batches == [["a"], ["a"]]
    assert hits() == before


# -------------------------------------------------------------------------------------------------- cancelled, too much


def test_a_job_cancelled_when_ready_does_not_reach_the_model(rig: Rig) -> None:
    with rig.held():
        gone = rig.submit_ready(text("gone 0"), text("gone 1"))
        stays = rig.submit_ready(text("stays"))
        assert rig.batcher.depth == 4
        gone.cancel()
        assert rig.batcher.depth == 2

    stays.result(PATIENCE)
    assert rig.batches == [["plug"], ["stays"]]


def test_a_job_cancelled_before_it_is_prepared_is_not_prepared(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)

    with rig.held():
        for number in range(gme.AHEAD_BATCHES):
            rig.submit_ready(text(f"{number}"))
        gone = rig.submit(text("gone 0"), text("gone 1"))  # enough is ready before it
        gone.cancel()
        stays = rig.submit(text("stays"))
        assert rig.batcher.depth == 1 + gme.AHEAD_BATCHES + 1

    stays.result(PATIENCE)
    assert not [name for name in rig.prepared if name.startswith("gone")]


def test_a_job_cancelled_while_it_is_prepared_does_not_reach_the_model(rig: Rig) -> None:
    rig.held_names = {"gone"}
    gone = rig.submit(text("gone"), text("also gone", 11))
    rig.preparing.get(timeout=PATIENCE)

    gone.cancel()
    assert rig.batcher.depth == 0
    rig.preparing_may_go.set()
    rig.submit(text("stays")).result(PATIENCE)

    rig.check()
    assert rig.batches == [["stays"]]


def test_a_job_cancelled_in_the_batch_under_way_leaves_the_others(rig: Rig) -> None:
    with rig.held():
        gone, stays = rig.submit_ready(text("gone")), rig.submit_ready(text("stays"))
        assert rig.step() == ["gone", "stays"]
        gone.cancel()
        assert rig.batcher.depth == 1

    assert stays.exception(PATIENCE) is None


@pytest.mark.parametrize("fault", [None, RuntimeError("boom"), SystemExit()])
def test_a_job_cancelled_just_as_it_ends_leaves_the_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, fault: BaseException | None
) -> None:
    rig.fault = lambda name: fault if name == "gone" else None
    died = threading.Event()
    rig.batcher.on_death = died.set

    with rig.held():
        gone, stays = rig.submit_ready(text("gone")), rig.submit_ready(text("stays"))
        end = gone.set_running_or_notify_cancel
        monkeypatch.setattr(gone, "set_running_or_notify_cancel", lambda: gone.cancel() and end())

    if isinstance(fault, SystemExit):
        assert died.wait(PATIENCE)
        assert isinstance(stays.exception(PATIENCE), gme.UnavailableError)
    else:
        assert stays.exception(PATIENCE) is None
        assert rig.batcher.alive
    assert gone.cancelled()


def test_cancelling_a_bulk_job_drops_the_rest_of_it(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=100)

    with rig.held(*(text(f"{number}") for number in range(10_000))) as bulk:
        assert rig.batcher.depth == 10_000
        bulk.cancel()
        assert rig.batcher.depth == 0

    rig.submit(text("next")).result(PATIENCE)
    assert rig.batches[1:] == [["next"]]
    assert len(rig.prepared) < 10_000


def test_work_goes_on_when_all_that_was_ready_is_cancelled(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)

    with rig.held() as plug:
        ready = [rig.submit_ready(text(f"{number}")) for number in range(gme.AHEAD_BATCHES)]
        waits = rig.submit(text("waits"))  # to be prepared
        for job in [plug, *ready]:
            job.cancel()
        assert not wait([waits], 0.1).done

    assert waits.exception(PATIENCE / 10) is None
    assert rig.batches == [["plug"], ["waits"]]


def test_past_the_queues_limit_requests_are_refused_until_there_is_room(make: Callable[..., Rig]) -> None:
    rig = make(max_queue=4)

    with rig.held():
        gone = rig.submit_ready(text("a"), text("b"))
        with pytest.raises(gme.UnavailableError, match="wait"):
            rig.submit(text("c"), text("d"))
        last = rig.submit(text("c"))
        with pytest.raises(gme.UnavailableError, match="wait"):
            rig.submit(text("d"))
        gone.cancel()
        rig.submit(text("d"), text("e"))
        assert rig.batcher.depth == 4

    last.result(PATIENCE)
    for job, _ in rig.jobs:
        if not job.cancelled():
            job.result(PATIENCE)
    rig.submit(*map(text, "fghi")).result(PATIENCE)


def test_a_failed_request_gives_its_room_back(make: Callable[..., Rig]) -> None:
    rig = make(max_queue=3)
    rig.fault = lambda name: gme.InputError("it is bad") if name == "bad" else None

    for _ in range(3):
        assert rig.submit(text("bad"), text("a"), text("b")).exception(PATIENCE)

    rig.submit(text("a"), text("b"), text("c")).result(PATIENCE)


# ------------------------------------------------------------------------------------------------------------ preparing


def test_preparing_stays_a_few_batches_ahead(make: Callable[..., Rig]) -> None:
    rig, too_many = make(max_tokens=10), threading.Event()
    most = 1 + gme.AHEAD_BATCHES + PREPARE_THREADS  # under way, ready, and one per thread that saw room for it

    def watch(name: str) -> None:
        if len(rig.prepared) > most:
            too_many.set()

    rig.fault = watch
    with rig.held(*(image(f"{number}") for number in range(100))):
        rig.await_ready(*(f"{number}" for number in range(1 + gme.AHEAD_BATCHES)))
        assert not too_many.wait(0.2)
        assert len(rig.prepared) >= 1 + gme.AHEAD_BATCHES

    rig.jobs[0][0].result(PATIENCE)
    assert len(rig.batches) == 100


def test_the_next_batch_is_prepared_while_the_model_is_busy(rig: Rig) -> None:
    with rig.held():
        rig.submit(text("next"))
        rig.await_ready("next")


def test_a_text_does_not_wait_until_an_image_is_prepared(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=10)
    rig.held_names = {"image"}

    with rig.held():
        for number in range(gme.AHEAD_BATCHES):
            rig.submit_ready(text(f"{number}"))
        query, picture = rig.submit(text("query")), rig.submit(image("image"))  # both wait to be prepared

    assert query.exception(PATIENCE / 10) is None
    assert not picture.done()


# --------------------------------------------------------------------------------------------------------------- faults


def test_an_input_that_cannot_be_prepared_fails_its_own_request_with_its_position(rig: Rig) -> None:
    error = gme.InputError("it is bad")
    rig.fault = lambda name: error if name == "bad" else None

    with rig.held():
        others = [rig.submit(text("a"))]
        bad = rig.submit(text("b", 20), text("c", 30), text("bad", 10))
        others.append(rig.submit(text("d")))

    assert bad.exception(PATIENCE) is error
    assert bad.failed == 2
    assert [job.exception(PATIENCE) for job in others] == [None, None]


@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError(), BaseException("a panic of the tokenizer's")])
def test_an_input_that_nobody_expected_to_fail_in_preparing_fails_alone(rig: Rig, fault: BaseException) -> None:
    rig.fault = lambda name: fault if name == "p-bad" else None

    for _ in range(PREPARE_THREADS + 1):
        with rig.held():
            before = rig.submit(text("a"), text("b"))
            bad = rig.submit(text("c"), text("p-bad"))
            after = rig.submit(text("d"))
        assert bad.exception(PATIENCE / 10)
        assert bad.failed == 1
        assert before.exception(PATIENCE) is after.exception(PATIENCE) is None


def test_a_batch_that_does_not_fit_is_halved(rig: Rig) -> None:
    rig.most = 3

    rig.submit(*map(text, "abcdefgh")).result(PATIENCE)

    assert list(map(len, rig.batches)) == [8, 4, 2, 2, 4, 2, 2]


def test_an_input_that_does_not_fit_even_alone_fails_alone(rig: Rig) -> None:
    rig.fault = lambda name: MemoryError() if name == "huge" else None

    with rig.held():
        others = [rig.submit_ready(text("a")), rig.submit_ready(text("b"))]
        huge = rig.submit_ready(text("c"), text("huge"))
        others.append(rig.submit_ready(text("d")))

    assert isinstance(huge.exception(PATIENCE), MemoryError)
    assert huge.failed == 1
    assert [job.exception(PATIENCE) for job in others] == [None] * 3


def test_a_poisoned_input_fails_alone(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.fault = lambda name: RuntimeError("boom") if name == "poison" else None

    with rig.held():
        others = [rig.submit_ready(text(name)) for name in "ab"]
        poisoned = rig.submit_ready(text("poison"))
        others += [rig.submit_ready(text(name)) for name in "cd"]

    assert str(poisoned.exception(PATIENCE)) == "boom"
    assert poisoned.failed == 0
    assert [job.exception(PATIENCE) for job in others] == [None] * 4
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]  # logged once


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_fails_alone_and_is_not_remembered(make: Callable[..., Rig], number: float) -> None:
    rig = make(cache_mb=1)
    rig.fault = lambda name: number if name == "overflows" else None

    for _ in range(2):
        bad, good = rig.submit(text("a"), text("overflows")), rig.submit(text("b"))
        assert isinstance(bad.exception(PATIENCE), FloatingPointError)
        assert bad.failed == 1
        assert good.exception(PATIENCE) is None

    assert list(itertools.chain(*rig.batches)).count("overflows") == 2


def test_equal_inputs_that_fail_fail_every_request(rig: Rig) -> None:
    rig.fault = lambda name: RuntimeError("boom") if name == "poison" else None

    with rig.held():
        jobs = [rig.submit_ready(text("poison")), rig.submit_ready(text("a"), text("poison"))]

    assert [str(job.exception(PATIENCE)) for job in jobs] == ["boom", "boom"]
    assert [job.failed for job in jobs] == [0, 1]


@pytest.mark.parametrize("end", [SystemExit("the device cannot go on"), SystemExit()])
def test_when_the_model_thread_ends_every_open_job_does(make: Callable[..., Rig], end: BaseException) -> None:
    rig, died = make(max_tokens=10), queue.SimpleQueue[bool]()
    rig.fault = lambda name: end if name == "fatal" else None
    rig.batcher.on_death = lambda: died.put(rig.batcher.alive)

    with rig.held(text("fatal"), text("rest")) as under_way:
        ready = rig.submit_ready(text("ready"))
        waiting = rig.submit(*(text(f"{number}") for number in range(50)))
        left = rig.submit(text("left"))
        left.cancel()

    assert died.get(timeout=PATIENCE) is False
    for job in (under_way, ready, waiting):
        assert isinstance(job.exception(PATIENCE), gme.UnavailableError)
        assert job.failed is None
    with pytest.raises(gme.UnavailableError, match="ended"):
        rig.submit(text("later"))
    assert rig.batcher.depth == 0
    assert died.empty()
    assert rig.batches == [["fatal"]]


def test_when_a_preparing_thread_ends_every_open_job_does(make: Callable[..., Rig]) -> None:
    rig, died = make(), queue.SimpleQueue[bool]()
    rig.fault = lambda name: SystemExit() if name == "p-fatal" else None
    rig.batcher.on_death = lambda: died.put(rig.batcher.alive)

    with rig.held() as under_way:
        jobs = [under_way, rig.submit_ready(text("ready")), rig.submit(text("p-fatal"))]
        assert died.get(timeout=PATIENCE) is False

    assert all(isinstance(job.exception(PATIENCE), gme.UnavailableError) for job in jobs)


def test_closing_ends_the_batch_under_way_and_the_jobs_behind_it(make: Callable[..., Rig]) -> None:
    rig, died = make(max_tokens=10), threading.Event()
    rig.batcher.on_death = died.set

    with rig.held() as under_way:
        ready = rig.submit_ready(text("ready"))
        waiting = rig.submit(*(text(f"{number}") for number in range(50)))
        closing = threading.Thread(target=rig.batcher.close)
        closing.start()
    closing.join(PATIENCE)

    assert not closing.is_alive()
    assert under_way.exception(PATIENCE) is None
    with pytest.raises(gme.UnavailableError):
        rig.submit(text("later"))
    assert rig.batcher.depth == 0
    for job in (ready, waiting):
        assert job.exception(0) is None or isinstance(job.exception(0), gme.UnavailableError)
    assert not died.is_set()


def test_closing_an_idle_batcher_twice_is_fine(rig: Rig) -> None:
    rig.batcher.close()
    rig.batcher.close()


# ---------------------------------------------------------------------------------------- from an event loop, at length


def test_ended_jobs_are_freed_without_a_garbage_collection(rig: Rig) -> None:
    async def answer(name: str) -> weakref.ref[gme.Job]:
        job = rig.batcher.submit([text(name)])
        await asyncio.wrap_future(job)
        return weakref.ref(job)

    gc.collect()
    gc.disable()
    try:
        ended = [asyncio.run(answer(f"{number}")) for number in range(30)]
        alive = sum(job() is not None for job in ended)
    finally:
        gc.enable()

    assert alive <= 1 + PREPARE_THREADS  # a thread may still hold the last that it saw


def test_an_event_loop_that_submits_and_cancels_never_waits_for_ever(make: Callable[..., Rig]) -> None:
    rig = make(max_tokens=50)

    async def client(number: int, rng: random.Random) -> int:
        answered = 0
        for turn in range(20):
            answer = asyncio.wrap_future(
                rig.submit(*(text(f"{number} {turn} {i}") for i in range(rng.randrange(1, 6))))
            )
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                answer.cancel()
            else:
                await answer
                answered += 1
        return answered

    async def clients() -> list[int]:
        return await asyncio.gather(*(client(number, random.Random(number)) for number in range(20)))

    assert sum(asyncio.run(asyncio.wait_for(clients(), PATIENCE))) > 100


def run_together(client: Callable[[random.Random], None], threads: int = 3, seed: int = 0) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(client, random.Random(100 * seed + number)) for number in range(threads)]:
            done.result(PATIENCE)


def test_one_thread_at_a_time_changes_the_queue(rig: Rig) -> None:
    met = queue.SimpleQueue[bool]()

    with rig.held() as under_way:

        def let_the_model_end_its_batch(_: str) -> None:
            rig.gate.set()
            met.put(bool(wait([under_way], 0.1).done))

        rig.batcher.watch = let_the_model_end_its_batch  # called in the midst of making an input ready
        rig.submit(text("next"))
        assert not met.get(timeout=PATIENCE)


@pytest.mark.usefixtures("nervous")
def test_cancelling_at_the_last_moment_harms_nobody(make: Callable[..., Rig]) -> None:
    rig, computed = make(max_tokens=100), set[str]()
    rig.fault = computed.add

    def client(rng: random.Random) -> None:
        for _ in range(300):
            name = str(rng.random())[:9]
            job = rig.submit(text(name))
            while name not in computed:
                pass
            for _ in range(rng.randrange(1500)):
                pass
            job.cancel()

    run_together(client)
    assert rig.batcher.alive


@pytest.mark.usefixtures("nervous")
def test_a_cache_that_is_always_too_small_harms_nobody(make: Callable[..., Rig]) -> None:
    rig = make(cache_mb=cache_mb(2), max_tokens=20)

    def client(rng: random.Random) -> None:
        for _ in range(200):
            rig.submit(*map(text, rng.choices("abcd", k=4))).result(PATIENCE)

    run_together(client)


@pytest.mark.usefixtures("nervous")
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_each_job_ends_as_it_should(make: Callable[..., Rig], seed: int) -> None:
    """Threads submit, cancel and wait, among inputs that fail in every way, with a cache that is always too small."""
    rig = make(max_tokens=120, cache_mb=cache_mb(20), max_queue=300)
    rig.most = 5
    faults: dict[str, BaseException | float] = {
        "bad": gme.InputError("it is bad"),
        "p-bad": RuntimeError("in preparing"),
        "poison": RuntimeError("in the model"),
        "huge": MemoryError(),
        "nan": float("nan"),
    }
    rig.fault = faults.get
    refused = []

    def client(rng: random.Random) -> None:
        for _ in range(60):
            sources = [
                make_source(name, rng.randrange(8, 40), instruction=instruction)
                for instruction in [rng.choice("ij")]
                for make_source in rng.choices([text, image], weights=[4, 1], k=rng.choice([1, 1, 1, 5, 30]))
                for name in [rng.choice([*faults]) if rng.random() < 0.01 else f"{rng.randrange(100)}"]
            ]
            try:
                job = rig.submit(*sources)
            except gme.UnavailableError:
                refused.append(sources)
                continue
            action = rng.random()
            if action < 0.3:
                job.cancel()
            elif action < 0.8:
                with contextlib.suppress(asyncio.CancelledError):
                    job.exception(PATIENCE)

    run_together(client, 8, seed)

    rig.check()
    assert len(rig.jobs) > 200
    for job, sources in rig.jobs:
        names = [name_of(source) for source in sources]
        if job.cancelled():
            continue
        if (raised := job.exception()) is None:
            assert not set(names) & set(faults)
        else:
            assert job.failed is not None
            expected = faults[names[job.failed]]
            assert type(raised) is (FloatingPointError if isinstance(expected, float) else type(expected))


# ------------------------------------------------------------------------------------------- with the model's own rooms


@pytest.fixture(scope="module")
def prepare() -> gme.Preparer:
    return gme.Preparer(TOY, 1800, 10**8)


@pytest.fixture(scope="module")
def model() -> gme.Model:
    return gme.Model(TOY, torch.device("cpu"), torch.float32)


def test_the_vectors_are_the_authors_whoever_shares_the_batch(prepare: gme.Preparer, model: gme.Model) -> None:
    small = (None, "64x48.png", "448x448.png", "photo.webp")
    cases = [case for case in golden() if case.image in small and len(case.text) < 1000] * 2
    random.Random(0).shuffle(cases)
    batcher = gme.Batcher(prepare, model.embed, model.dimension, gme.Settings(), 512)
    requests = [cases[start : start + 3] for start in range(0, len(cases), 3)]

    jobs = [
        batcher.submit([gme.Source(case.text, case.data, case.prompt or gme.DEFAULT_INSTRUCTION) for case in request])
        for request in requests
    ]

    for job, request in zip(jobs, requests, strict=True):
        job.result(PATIENCE)
        np.testing.assert_allclose(job.vectors, [case.vector for case in request], atol=1e-5)
    batcher.close()
    assert batcher.depth == 0


def test_a_broken_image_fails_with_its_position_and_no_other(prepare: gme.Preparer, model: gme.Model) -> None:
    batcher = gme.Batcher(prepare, model.embed, model.dimension, gme.Settings(), 512)
    good = next(case for case in golden() if case.data and not case.text and not case.prompt)
    source = gme.Source(image=good.data)

    bad = batcher.submit([source, gme.Source("a text"), gme.Source(image=b"<html>")])
    other = batcher.submit([source])

    assert isinstance(bad.exception(PATIENCE), gme.InputError)
    assert bad.failed == 2
    other.result(PATIENCE)
    np.testing.assert_allclose(other.vectors, [good.vector], atol=1e-5)
    batcher.close()
