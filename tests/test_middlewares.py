"""The ASGI middlewares of room HTTP, each with an app and a client of a few lines; over HTTP, test_http.py has them."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import gme_service as gme

FOREVER = 3600.0  # seconds that no test lasts
POST = [(b"content-length", b"1000")]


def call(app: ASGIApp, receive: Receive, headers: Sequence[tuple[bytes, bytes]] = POST, **scope: Any) -> list[Message]:
    """What the app sends."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    request = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)} | scope
    asyncio.run(app(request, receive, send))
    return sent


def body(*chunks: bytes, ends: bool = True) -> Receive:
    """A client that sends these, and then says nothing for an hour."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if ends:
        messages[-1]["more_body"] = False
    left = iter(messages)

    async def receive() -> Message:
        for message in left:
            return message
        await asyncio.sleep(FOREVER)
        raise AssertionError

    return receive


def app_of(read: Callable[[Receive], Awaitable[object]]) -> ASGIApp:
    """An app that does that, and answers 200, or with the status of the error that it raises."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        status = 200
        try:
            await read(receive)
        except gme.ServiceError as error:
            status = error.status
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})

    return app


async def read_all(receive: Receive) -> None:
    chunks = []
    while (message := await receive()).get("more_body"):
        chunks.append(message["body"])  # as Starlette does


async def read_nothing(receive: Receive) -> None: ...


def status_of(sent: list[Message]) -> int:
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"]


# ------------------------------------------------------------------------------------------------- paths and methods


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [
        ("/", "", "/"),
        ("//", "", "/"),
        ("/v1/embeddings", "", "/v1/embeddings"),
        ("/v1/embeddings/", "", "/v1/embeddings"),
        ("//v1///embeddings//", "", "/v1/embeddings"),
        ("/gme/", "/gme", "/gme/"),
        ("/gme//v1/embeddings/", "/gme", "/gme/v1/embeddings"),
    ],
)
def test_slashes_name_the_same_route(path: str, root: str, route: str) -> None:
    paths = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        paths.append(scope["path"])

    call(gme.NormalizePath(app), body(b""), path=path, root_path=root)
    assert paths == [route]


def test_head_is_get_without_a_body() -> None:
    methods = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        methods.append(scope["method"])
        await app_of(read_nothing)(scope, receive, send)

    bodies = [call(gme.AnswerHead(app), body(b""), method=method)[1]["body"] for method in ("GET", "HEAD", "POST")]
    assert (methods, bodies) == (["GET", "GET", "POST"], [b"answer", b"", b"answer"])


# ------------------------------------------------------------------------------------------------------ size and time


def limited(read: Callable[[Receive], Awaitable[object]]) -> ASGIApp:
    return gme.LimitBodies(app_of(read), max_body=1000)


def test_a_body_may_be_as_large_as_the_limit() -> None:
    assert status_of(call(limited(read_all), body(bytes(400), bytes(600)))) == 200
    assert status_of(call(limited(read_all), body(bytes(400), bytes(601)))) == 413


def test_a_declared_length_over_the_limit_is_refused_before_any_of_it_is_read() -> None:
    client = body(ends=False)
    assert status_of(call(limited(read_all), client, headers=[(b"content-length", b"1001")])) == 413
    assert status_of(call(limited(read_nothing), client, headers=[(b"content-length", b"1001")])) == 200


def timed(max_seconds: float, max_idle: float) -> ASGIApp:
    return gme.LimitBodyTime(app_of(read_all), max_seconds, max_idle)


def test_a_body_that_does_not_come_is_a_408() -> None:
    assert status_of(call(timed(FOREVER, 0.01), body(b"a", ends=False))) == 408
    assert status_of(call(timed(0.01, FOREVER), body(b"a", ends=False))) == 408
    assert status_of(call(timed(FOREVER, FOREVER), body(b"a", b"b"))) == 200


def test_a_body_that_never_stops_coming_is_a_408() -> None:
    async def drip() -> Message:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"a", "more_body": True}

    assert status_of(call(timed(0.05, FOREVER), drip)) == 408


def test_who_has_sent_the_body_may_wait_for_the_answer() -> None:
    async def read(receive: Receive) -> None:
        await read_all(receive)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(receive(), 0.05)  # until the client leaves, which it does not

    assert status_of(call(gme.LimitBodyTime(app_of(read), 0.01, 0.01), body(b"a"))) == 200


# --------------------------------------------------------------------------------------- a refusal reaches the client


def test_what_still_comes_is_read_before_the_answer() -> None:
    events = []

    def counted(receive: Receive) -> Receive:
        async def receive_counted() -> Message:
            events.append("read")
            return await receive()

        return receive_counted

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            events.append("sent")
            await send(message)

        await gme.ReadBeforeAnswering(app_of(read_nothing), 10**6, FOREVER)(scope, receive, send_counted)

    assert call(app, counted(body(b"a", b"b", b"c")))[0]["headers"] == []
    assert events == ["read", "read", "read", "sent", "sent"]


def dropped(receive: Receive, max_dropped: float, max_idle: float, headers: Any = POST) -> list[Message]:
    return call(gme.ReadBeforeAnswering(app_of(read_nothing), max_dropped, max_idle), receive, headers)


def test_not_more_is_read_than_the_limit_nor_for_longer_than_something_comes() -> None:
    async def flood() -> Message:
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    for sent in (
        dropped(flood, 8000, FOREVER),
        dropped(body(b"a", ends=False), 8000, 0.01),
        dropped(body(ends=False), 8000, FOREVER, headers=[*POST, (b"expect", b"100-continue")]),
    ):
        assert status_of(sent) == 200
        assert sent[0]["headers"] == [(b"connection", b"close")]


def test_nothing_is_awaited_where_there_is_no_body() -> None:
    for headers in ([], [(b"content-length", b"0")]):
        assert dropped(body(ends=False), 8000, FOREVER, headers)[0]["headers"] == []


def test_a_body_that_came_too_slowly_is_not_awaited_again() -> None:
    reading = gme.ReadBeforeAnswering(app_of(read_all), 8000, FOREVER)
    sent = call(gme.LimitBodyTime(reading, FOREVER, 0.01), body(b"a", ends=False))
    assert (status_of(sent), sent[0]["headers"]) == (408, [(b"connection", b"close")])


def test_a_refused_body_is_not_kept_while_the_rest_is_read() -> None:
    chunk = b"a" * 600
    references = []

    async def read_with_starlette(receive: Receive) -> None:
        await gme.Request({"type": "http", "headers": []}, receive).body()

    async def send_on() -> Message:
        references.append(sys.getrefcount(chunk))
        return {"type": "http.request", "body": chunk, "more_body": len(references) < 6}

    app = gme.ReadBeforeAnswering(gme.LimitBodies(app_of(read_with_starlette), max_body=2000), 10**6, FOREVER)
    chunked = [(b"transfer-encoding", b"chunked")]
    assert status_of(call(app, send_on, headers=chunked)) == 413
    assert len(references) == 6
    assert max(references[:4]) == references[3] > references[0] == references[5]
