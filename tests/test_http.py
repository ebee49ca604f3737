"""Room HTTP: every route over a real server, what it refuses and how, its limits, its page, its metrics."""

import base64
import codecs
import contextlib
import http.client
import io
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import requests
from conftest import (
    IMAGES,
    ROOT,
    STRICT,
    TESTS,
    Address,
    Server,
    Start,
    golden,
    serve,
    serve_or_use,
    skip_with_an_address,
)
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

KEY = STRICT["GME_API_KEY"]
HOLDER = {"Authorization": f"Bearer {KEY}"}
PHOTO = (IMAGES / "64x48.png").read_bytes()
RED = (TESTS / "shapes" / "red_circle.png").read_bytes()
BASE64 = base64.b64encode(RED).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"
QUERY = "Find an image that matches the given text."
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=limit"}
PART = b'--limit\r\ncontent-disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
END = b"\r\n--limit--\r\n"
LATIN = b'\r\n--limit\r\ncontent-disposition: form-data; name="text"\r\n\r\n\xff' + END
EXTENDED = PART.replace(b'filename="a.png"', b"filename*=UTF-8''a.png")
TEXT, IMAGE, OPENAI = "/embed/text", "/embed/image", "/v1/embeddings"
PAGE = ROOT / "gme_service.html"
PATIENCE = 60  # seconds after which a test that hangs fails


@pytest.fixture(scope="module")
def strict(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A server with an API key and small limits."""
    with serve_or_use(pytestconfig, "--strict-url", tmp_path_factory.mktemp("strict") / "log", **STRICT) as running:
        yield running


@pytest.fixture
def direct(strict: Address) -> Address:
    """The strict server, when no proxy is in between."""
    if not isinstance(strict, Server):
        pytest.skip("a proxy is in between")
    return strict


@pytest.fixture
def stranger(strict: Address) -> Iterator[httpx.Client]:
    """A client of the strict server that has no key."""
    with strict.client() as client:
        yield client


@pytest.fixture
def holder(strict: Address) -> Iterator[httpx.Client]:
    """A client of the strict server that has the key."""
    with strict.client(headers=HOLDER) as client:
        yield client


@pytest.fixture(scope="module")
def busy(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that one request of 2,000 texts keeps busy for a while, and whose queue is full with them."""
    skip_with_an_address(pytestconfig, "it starts a server of its own")
    log = tmp_path_factory.mktemp("busy") / "log"
    with serve(log, GME_MAX_QUEUE="2000", GME_MAX_INPUTS="2000", GME_CACHE_MB="0") as running:
        yield running


def vectors(response: httpx.Response) -> np.ndarray:
    """The vectors of an answer of any route."""
    assert response.status_code == 200, response.text
    answer = response.json()
    rows = answer["embeddings"] if "embeddings" in answer else [entry["embedding"] for entry in answer["data"]]
    return np.array([np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows])


def detail(response: Any, status: int) -> str:
    """The sentence of an error with that status: in the shape of OpenAI's clients too, Jina's read ours."""
    assert response.status_code == status, response.text
    body = response.json()
    sentence = body.pop("detail")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert body == {"error": {"message": sentence, "type": kind}}
    return sentence


def embed_texts(client: httpx.Client, *texts: str, **more: object) -> np.ndarray:
    return vectors(client.post(TEXT, json={"texts": texts, **more}))


def embed_image(client: httpx.Client, *files: bytes, **fields: str) -> np.ndarray:
    return vectors(client.post(IMAGE, files=[("file", file) for file in files], data=fields))


def create(client: httpx.Client, given: object, **more: object) -> np.ndarray:
    return vectors(client.post(OPENAI, json={"model": "gme", "input": given} | more))


# --------------------------------------------------------------------------------------------------------- vectors

PROMPTS = sorted({case.prompt for case in golden()}, key=str)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_route_answers_with_the_authors_vectors_in_order(client: httpx.Client, prompt: str | None) -> None:
    cases = [case for case in golden() if case.prompt == prompt]
    items: list[object] = []
    for case in cases:
        encoded = base64.b64encode(case.data or b"").decode()
        both = {"text": case.text, "image": encoded}
        items.append(case.text if not case.data else both if case.text else f"data:image/png;base64,{encoded}")
    expected = [case.vector for case in cases]
    np.testing.assert_allclose(create(client, items, prompt=prompt), expected, atol=1e-5)
    np.testing.assert_allclose(create(client, items, prompt=prompt, encoding_format="base64"), expected, atol=1e-5)
    texts = [case for case in cases if not case.data]
    answer = embed_texts(client, *(case.text for case in texts), prompt=prompt) if texts else []
    np.testing.assert_allclose(answer, [case.vector for case in texts], atol=1e-5)
    for case in cases:
        if case.data:
            answer = embed_image(client, case.data, text=case.text, prompt=prompt or "")
            np.testing.assert_allclose(answer, [case.vector], atol=1e-5, err_msg=f"case {case.number}")


def test_no_prompt_is_the_default_one(client: httpx.Client) -> None:
    for prompt in ("", "You are a helpful assistant."):
        np.testing.assert_array_equal(embed_texts(client, "a", prompt=prompt), embed_texts(client, "a"))
    np.testing.assert_array_equal(embed_image(client, PHOTO, prompt=""), embed_image(client, PHOTO))


def test_many_files_have_a_vector_each_with_text_and_prompt_for_all(client: httpx.Client) -> None:
    together = embed_image(client, PHOTO, RED, PHOTO, text="a circle", prompt=QUERY)
    alone = [embed_image(client, file, text="a circle", prompt=QUERY)[0] for file in (PHOTO, RED, PHOTO)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_an_image_may_be_a_data_uri_in_place_of_a_text_or_base64_in_lines(client: httpx.Client) -> None:
    red, text = embed_image(client, RED)[0], embed_texts(client, "a")[0]
    np.testing.assert_array_equal(create(client, DATA_URI), [red])
    np.testing.assert_array_equal(create(client, ["a", DATA_URI, "a"]), [text, red, text])
    np.testing.assert_array_equal(create(client, [{"image": base64.encodebytes(RED).decode()}]), [red])
    np.testing.assert_array_equal(create(client, [{"image": f"DATA:Image/PNG;base64,{BASE64}"}]), [red])
    for head in (' data:image/png;name="a.png";base64', "data:image/png; base64", f"data:image/png;{300 * 'a'};base64"):
        np.testing.assert_array_equal(create(client, f"{head},{BASE64}"), [red])


def test_any_other_string_is_a_text(client: httpx.Client) -> None:
    texts = ["http://127.0.0.1/a.png", "data:image/png", "data: a, b", "", "\0\x1b\ufffe\U0010ffff"]
    np.testing.assert_array_equal(create(client, texts), embed_texts(client, *texts))


def test_the_answer_is_openais_list_object_with_the_tokens_that_the_model_read(client: httpx.Client) -> None:
    long = "long " * 5000  # cut at 1,800 tokens, an image's among them
    given = [long, long, {"text": long, "image": BASE64}]
    usage = {"prompt_tokens": 3 * 1800, "total_tokens": 3 * 1800}
    for _ in ("computed", "from the cache"):
        answer = client.post(OPENAI, json={"input": given}).json()
        for index, entry in enumerate(answer.pop("data")):
            assert len(entry.pop("embedding")) == 128
            assert entry == {"object": "embedding", "index": index}
        assert answer == {"object": "list", "model": "toy/shapes", "usage": usage}


def test_models_and_health_say_what_runs_where(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model.items() >= {"id": "toy/shapes", "object": "model", "dimension": 128, "max_length": 1800}.items()
    assert model["model_type"] == "embedding"  # without it, Xinference's client ends in a KeyError
    health = client.get("/health").json()
    assert re.fullmatch(r"\d+\.\d+\.\d+", health.pop("version"))
    where = {"model": "toy/shapes", "device": "cpu", "dtype": "float32", "dimension": 128}
    assert health == {"status": "ok", **where, "queue_depth": 0}


def test_a_model_is_found_by_its_id(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    for path in ("/v1/models/toy/shapes", "/v1/models/toy%2Fshapes", "/v1/models/toy/shapes/"):
        assert client.get(path).json() == model


def test_head_is_answered_wherever_get_is(client: httpx.Client) -> None:
    for path in ("/health", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/models/toy/shapes", "/nothing"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]


def test_slashes_too_many_name_the_same_route_without_a_redirect(client: httpx.Client) -> None:
    expected = create(client, "a")
    for path in ("/v1/embeddings/", "//v1/embeddings", "/v1//embeddings"):
        answer = client.post(httpx.URL(f"{client.base_url}".rstrip("/") + path), json={"input": "a"})
        np.testing.assert_array_equal(vectors(answer), expected)
    assert client.get("/docs/").status_code == client.get("/health//").status_code == 200


def test_the_page_is_served_as_it_is_or_is_404(client: httpx.Client) -> None:
    page = client.get("/")
    if not PAGE.is_file():
        assert PAGE.name in detail(page, 404)
        return
    assert (page.status_code, page.content) == (200, PAGE.read_bytes())
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.head("/").headers["content-length"] == str(len(page.content))


def test_without_its_file_the_page_is_404_and_all_else_works(start: Start, tmp_path: Path) -> None:
    (tmp_path / "gme_service.py").write_bytes((ROOT / "gme_service.py").read_bytes())
    with start("--app-dir", str(tmp_path)).client() as client:
        assert "gme_service.html" in detail(client.get("/"), 404)
        assert embed_texts(client, "a").shape == (1, 128)
        (tmp_path / "gme_service.html").write_text("<title>a page</title>")
        assert client.get("/").text == "<title>a page</title>"


def test_json_is_read_as_browsers_and_windows_write_it(client: httpx.Client) -> None:
    for body, text in (
        (b'\xef\xbb\xbf{"texts": ["a"]}', "a"),
        (b'{"texts": ["a\\ud800"]}', "a\ufffd"),
        (b'{"texts": ["\\ud83d\\ude00"]}', "😀"),
    ):
        answer = client.post(TEXT, content=body, headers=JSON | {"content-encoding": "identity"})
        np.testing.assert_array_equal(vectors(answer), embed_texts(client, text))


def test_what_changes_nothing_is_accepted(client: httpx.Client) -> None:
    items = [{"text": None, "image": DATA_URI}, {"text": "a", "image": None}]
    for more in (
        dict.fromkeys(["model", "encoding_format", "dimensions", "user", "prompt", "task", "messages"]),
        {"model": "jina-clip-v1", "normalized": True, "embedding_type": "float", "truncate": True},
        {"dimensions": 128, "user": "user-1", "encoding_format": "float"},
    ):
        np.testing.assert_array_equal(create(client, items, **more), create(client, [{"image": BASE64}, "a"]))


# --------------------------------------------------------------------------------------------------------- refusals


def form(*files: bytes, **fields: object) -> dict[str, object]:
    return {"files": [("file", (f"{n}.png", file)) for n, file in enumerate(files)], "data": fields}


def raw(content: bytes, headers: dict[str, str] = JSON) -> dict[str, object]:
    return {"content": content, "headers": headers}


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {  # a request, its status, and what the sentence names
    "no texts": (TEXT, {"json": {"texts": []}}, 400, "input"),
    "an empty image": (IMAGE, form(b""), 400, "File 1"),
    "a broken one of many files": (IMAGE, form(PHOTO, PHOTO, b"<html>", PHOTO), 400, "File 3 (2.png)"),
    "an image behind a long prompt": (IMAGE, form(PHOTO, prompt="word " * 2000), 400, "prompt"),
    "an image's URL": (OPENAI, {"json": {"input": [{"image": "http://127.0.0.1:9/a.png"}]}}, 400, "no URL is fetched"),
    "an image's name": (OPENAI, {"json": {"input": ["a", {"image": "red.png"}]}}, 400, "Input 2"),
    "a data URI of no image": (OPENAI, {"json": {"input": ["a", "data:image/png;base64,aGFsbG8="]}}, 400, "Input 2"),
    "a data URI of a sound": (OPENAI, {"json": {"input": ["a", "data:audio/wav;base64,aGFsbG8="]}}, 400, "Input 2"),
    "a data URI that is not base64": (OPENAI, {"json": {"input": ["a", "data:image/svg+xml,<svg/>"]}}, 400, "Input 2"),
    "an object of nothing": (OPENAI, {"json": {"input": ["a", {}]}}, 400, "Input 2"),
    "lists of token ids": (OPENAI, {"json": {"input": [[1, 2], [3]]}}, 400, "check_embedding_ctx_length=False"),
    "other dimensions": (OPENAI, {"json": {"input": "a", "dimensions": 64}}, 400, "128"),
    "messages": (OPENAI, {"json": {"input": "a", "messages": []}}, 422, "messages"),
    "input_type": (OPENAI, {"json": {"input": "a", "input_type": "query"}}, 400, "GME_QUERY_PROMPT"),
    "an instruction": (OPENAI, {"json": {"input": "a", "instruction": "b"}}, 422, "instruction as `prompt`"),
    "a typing error": (OPENAI, {"json": {"input": "a", "promt": "b"}}, 422, "did you mean `prompt`"),
    "normalized: false": (OPENAI, {"json": {"input": "a", "normalized": False}}, 422, "normalized"),
    "a wrong name": (TEXT, {"json": {"texts": ["a"], "promt": "b"}}, 422, "`texts`"),
    "another encoding": (OPENAI, {"json": {"input": "a", "encoding_format": "int8"}}, 422, "encoding_format"),
    "OpenAI's chat's image": (OPENAI, {"json": {"input": ["a", {"image": {"url": DATA_URI}}]}}, 400, "Input 2"),
    "an item of another field": (OPENAI, {"json": {"input": ["a", {"text": "a", "image_url": ""}]}}, 400, "Input 2"),
    "a text in place of texts": (TEXT, {"json": {"texts": "a"}}, 422, "texts"),
    "a number as input": (OPENAI, {"json": {"input": 1}}, 400, "send a text"),
    "many faults": (TEXT, {"json": {"texts": [{"secret": 1}] * 1000, "prompt": 1}}, 422, "texts.1"),
    "no body": (TEXT, raw(b""), 422, "body"),
    "deep lists": (TEXT, raw(b'{"texts": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"), 422, "body"),
    "no UTF-8": (TEXT, raw(b'{"texts": ["\xff"]}'), 422, "byte 13 is not UTF-8"),
    "no UTF-8 behind a mark of it": (TEXT, raw(codecs.BOM_UTF8 + b'{"texts": ["\xff"]}'), 422, "byte 16 is not UTF-8"),
    "a compressed body": (TEXT, raw(b"", JSON | {"content-encoding": "gzip"}), 415, "gzip"),
    "JSON in place of a form": (IMAGE, {"json": {"file": "a.png"}}, 422, "-F file=@photo.jpg"),
    "a form that is not multipart": (IMAGE, {"data": {"text": "a"}}, 422, "this is no multipart form"),
    "a form without a file": (IMAGE, {"files": {"text": (None, "a")}}, 422, "-F file=@photo.jpg"),
    "a file of another name": (IMAGE, {"files": {"image": PHOTO}}, 422, "image: this part is a file"),
    "a file of PHP's name": (IMAGE, {"files": {"file[]": PHOTO}}, 422, "file[]"),
    "a file of no name": (IMAGE, raw(EXTENDED + PHOTO + END, FORM), 422, "filename*"),
    "a field of another name": (IMAGE, form(PHOTO, instruction="a"), 422, "instruction"),
    "a text twice": (IMAGE, form(PHOTO, text=["a", "b"]), 422, "text: there are two"),
    "a part of no name": (IMAGE, raw(PART.replace(b' name="file";', b"") + PHOTO + END, FORM), 422, "multipart"),
    "a form that does not end": (IMAGE, raw(PART + PHOTO, FORM), 422, "no end"),
    "a part of endless headers": (IMAGE, raw(b"--limit\r\n" + b"a: b\r\n" * 9999, FORM), 422, "body"),
    "a field in another charset": (IMAGE, raw(PART + PHOTO + LATIN, FORM), 422, "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_a_sentence_that_says_what_to_change(client: httpx.Client, name: str) -> None:
    path, request, status, words = REFUSED[name]
    sentence = detail(client.post(path, **request), status)
    assert words in sentence
    assert "secret" not in sentence
    assert 0 < len(sentence) < 300


def test_another_route_model_or_method_is_404_or_405(client: httpx.Client) -> None:
    assert "/v1/chat/completions" in detail(client.get("/v1/chat/completions"), 404)
    assert "gpt-4/x is not served, but toy/shapes is" in detail(client.get("/v1/models/gpt-4/x"), 404)
    refused = client.get(TEXT)
    assert "use POST" in detail(refused, 405)
    assert refused.headers["allow"] == "POST"


# ---------------------------------------------------------------------------------------------------------- limits


def test_a_body_as_large_as_allowed_is_taken_and_no_larger_one(holder: httpx.Client) -> None:
    full = b'{"texts": ["%s"]}' % (b"a" * (2**20 - 15))
    assert vectors(holder.post(TEXT, content=full, headers=JSON)).shape == (1, 128)
    assert "1 MB" in detail(holder.post(TEXT, content=full + b" ", headers=JSON), 413)
    assert "1 MB" in detail(holder.post(TEXT, content=iter([full, b" "]), headers=JSON), 413)
    assert "1 MB" in detail(holder.post(IMAGE, content=iter([PART, full]), headers=FORM), 413)


def test_too_many_inputs_or_pixels_are_413(holder: httpx.Client) -> None:
    assert embed_texts(holder, "a", "b", "c").shape == embed_image(holder, PHOTO, PHOTO, PHOTO).shape == (3, 128)
    for path, request, limit in (
        (TEXT, {"json": {"texts": ["a"] * 4}}, "3"),
        (OPENAI, {"json": {"input": ["a"] * 4}}, "3"),
        (IMAGE, form(*[PHOTO] * 4), "3"),
        (IMAGE, form(PHOTO, (IMAGES / "448x448.png").read_bytes()), "50000 pixels"),
    ):
        assert limit in detail(holder.post(path, **request), 413)


MB31 = 31 * 2**20
HOSTILE = {  # nearly all that a body may have, and the statuses that it may get
    "numbers": (b'{"texts": [%s0]}' % (b"1," * (MB31 // 2)), {413, 422}),
    "unknown keys": (b'{"texts": ["a"], %s"b": 1}' % b"".join(b'"%07d":0,' % n for n in range(MB31 // 12)), {413, 422}),
    "empty texts": (b'{"texts": [%s""]}' % (b'"",' * (MB31 // 3)), {413}),
    "escapes": (b'{"texts": ["%s"]}' % (b"\\u0041" * (MB31 // 6)), {200}),
    "escaped quotes": (b'{"texts": ["%s"]}' % (b'\\"' * (MB31 // 2)), {200}),
    "backslashes": (b'{"texts": ["%s"]}' % (b"\\\\" * (MB31 // 2)), {200}),
    "one key": (b'{"%s": 1}' % (b"a" * MB31), {422}),
    "one key beside a text": (b'{"input": "a", "%s": 1}' % (b"ab" * (MB31 // 2)), {422}),
    "base64 of letters alone": (b'{"input": [{"image": "%s"}]}' % (b"A" * MB31), {400}),
    "base64 in pieces": (b'{"input": [{"image": "%s"}]}' % (b"aa " * (MB31 // 3)), {400}),
    "base64 in percents": (b'{"input": [{"image": "%s"}]}' % (b"%41" * (MB31 // 3)), {400}),
    "half pairs": (b'{"texts": ["%s"]}' % (b"\\ud83d" * (MB31 // 6)), {200}),
    "half pairs between letters": (b'{"texts": ["%s"]}' % (b"\\ud83da" * (MB31 // 7)), {200}),
    "parameters": (b'{"input": "data:a/b%s"}' % (b";" * MB31), {200}),
    "texts in a message": (
        b'{"input": 1, "messages": [{"role": "user", "content": [%s{}]}]}'
        % (b'{"type":"text","text":"a"},' * (MB31 // 27)),
        {413},
    ),
}  # fmt: skip


@pytest.fixture
def quick(server: Address) -> Iterator[None]:
    """Within the test, /health is asked without a pause, and no answer takes the server two seconds of work.

    That is the processor's time of all its threads: the wall's is that of all that this machine does meanwhile.
    """
    spent, done = [0.0], threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not done.is_set():
                before = processor_seconds(server)
                assert client.get("/health").status_code == 200
                spent.append(processor_seconds(server) - before)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        yield
        done.set()
        asking.result()
    assert len(spent) > 1
    assert max(spent) < 2


def processor_seconds(server: Address) -> float:
    """What all threads of a server have used so far; of one that is not ours, nothing is known."""
    if not isinstance(server, Server):
        return 0.0
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_keeps_nobody_waiting(client: httpx.Client, name: str) -> None:
    body, statuses = HOSTILE[name]
    response = client.post(OPENAI if b"input" in body else TEXT, content=body, headers=JSON)
    assert response.status_code in statuses
    assert len(response.content) < 10_000


@pytest.mark.usefixtures("quick")
def test_an_honest_body_of_31_mb_is_embedded(client: httpx.Client) -> None:
    file = io.BytesIO()
    Image.open(IMAGES / "448x448.png").convert("RGB").resize((2800, 2800)).save(file, "BMP")
    image = {"image": base64.b64encode(file.getvalue()).decode()}
    body = json.dumps({"input": [image, *[{"text": 'a "quoted\\" [text]', "image": None}] * 2000]}, indent=4)
    assert len(body) > 31_000_000
    assert vectors(client.post(OPENAI, content=body, headers=JSON)).shape == (2001, 128)


# ----------------------------------------------------------------------- clients that leave, wait, or do not listen


def connect(server: Address) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), PATIENCE)


def await_depth(client: httpx.Client, condition: Callable[[int], bool]) -> None:
    """Wait until the number of inputs without an answer is as it should be."""
    deadline = time.monotonic() + PATIENCE
    while not condition(depth := client.get("/health").json()["queue_depth"]):
        assert time.monotonic() < deadline, depth


def test_a_full_queue_refuses_at_once_and_the_work_of_a_client_that_left_never_reaches_the_model(busy: Server) -> None:
    body = json.dumps({"texts": [f"left {number}" for number in range(2000)]}).encode()
    with busy.client() as client:
        before = metrics(client)["gme_batch_inputs_sum"]
        with connect(busy) as leaving:
            leaving.sendall(b"POST /embed/text HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await_depth(client, lambda depth: depth > 0)
            refused = client.post(TEXT, json={"texts": ["a"] * 2000})
            assert detail(refused, 503)
            assert int(refused.headers["Retry-After"]) > 0
        await_depth(client, lambda depth: depth == 0)
        assert embed_texts(client, "stays").shape == (1, 128)
        assert metrics(client)["gme_batch_inputs_sum"] - before < 2000


def test_clients_that_leave_in_the_midst_or_send_slowly_harm_nobody(busy: Server) -> None:
    body = PART + bytes(3_000_000)
    head = b"POST /embed/image HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=limit\r\n"
    with busy.client() as client, contextlib.ExitStack() as stack:
        for size in [10, len(head), 300_000] * 20:
            stack.enter_context(connect(busy)).sendall((head + b"Content-Length: 4000000\r\n\r\n" + body)[:size])
        assert embed_texts(client, "quick").shape == (1, 128)
        stack.close()
        assert embed_texts(client, "quick").shape == (1, 128)
        assert client.get("/health").json()["queue_depth"] == 0
    assert "Traceback" not in busy.log.read_text()


def test_stalled_uploads_lock_nobody_out(direct: Address, holder: httpx.Client) -> None:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {2**20}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(40):  # each has sent nearly all that a body may have
            stack.enter_context(connect(direct)).sendall(head.encode() + bytes(2**20 - 10))
        assert embed_texts(holder, "a" * (2**20 - 20)).shape == (1, 128)


def test_a_body_that_does_not_come_is_told_so_and_its_connection_ends(start: Start, tmp_path: Path) -> None:
    impatient = "\napp = LimitBodyTime(app, max_seconds=60, max_idle=0.2)\n"
    (tmp_path / "gme_service.py").write_text((ROOT / "gme_service.py").read_text() + impatient)
    with connect(start("--app-dir", str(tmp_path))) as stalled, stalled.makefile("rb") as answer:
        stalled.sendall(f'POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{"texts":'.encode())
        head, _, body = answer.read().partition(b"\r\n\r\n")  # until the server ends the connection
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert "did not come" in json.loads(body)["detail"]


def by_http_client(url: str, body: Any, headers: dict[str, str]) -> httpx.Response:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    connection.request("POST", urlsplit(url).path, body, headers, encode_chunked=not isinstance(body, bytes))
    with contextlib.closing(connection), connection.getresponse() as answer:
        return httpx.Response(answer.status, content=answer.read())


def by_urllib(url: str, body: Any, headers: dict[str, str]) -> httpx.Response:
    with pytest.raises(urllib.error.HTTPError) as refused:  # it asks for the end of the connection
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE)
    return httpx.Response(refused.value.code, content=refused.value.read())


SENDERS = {
    "http.client": by_http_client,
    "urllib": by_urllib,
    "httpx": lambda url, body, headers: httpx.post(url, content=body, headers=headers, timeout=PATIENCE),
    "requests": lambda url, body, headers: requests.post(url, data=body, headers=headers, timeout=PATIENCE),
}


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("status", "key"), [(401, {}), (413, HOLDER)])
def test_a_client_that_still_sends_reads_why_it_is_refused(
    direct: Address, sender: str, chunked: bool, status: int, key: dict[str, str]
) -> None:
    headers = JSON | key | ({"Transfer-Encoding": "chunked"} if chunked else {})
    for _ in range(10):
        body: Any = (bytes(2**16) for _ in range(5 * 16)) if chunked else bytes(5 * 2**20)
        answer = SENDERS[sender](f"{direct.url}{TEXT}", body, headers)
        assert (answer.status_code, bool(answer.json()["detail"])) == (status, True)


def test_who_asks_before_sending_is_told_to_go_on_or_why_not(direct: Address) -> None:
    body = b'{"texts": ["a"]}'
    for key, size, answer in ((KEY, len(body), b"100"), ("wrong", len(body), b"401")):
        with connect(direct) as asking, asking.makefile("rb") as answers:
            head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: {size}\r\n"
            asking.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert answers.readline().split()[1] == answer
            if answer == b"100":
                asking.sendall(body)
                assert answers.readline() == b"\r\n"
                assert answers.readline().split()[1] == b"200"


def test_a_body_behind_javas_offer_of_http_2_is_read(direct: Address, holder: httpx.Client) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABk"}
    assert vectors(holder.post(TEXT, json={"texts": ["a"]}, headers=offer)).shape == (1, 128)


# ------------------------------------------------------------------------------------------------------------- key

WRONG = {
    "none": {},
    "beginning": {"Authorization": f"Bearer {KEY[:-1]}"},
    "no scheme": {"Authorization": KEY},
    "basic": {"Authorization": f"Basic {KEY}"},
    "no ASCII": {"Authorization": b"Bearer \xff"},
}


@pytest.mark.parametrize("name", WRONG)
def test_without_the_right_key_every_route_is_401_and_no_method_is_let_through(
    stranger: httpx.Client, name: str
) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"):
        for path in (TEXT, IMAGE, OPENAI, "/v1/models", "/v1/models/toy/shapes", "/v1//embeddings", f"{TEXT}/"):
            response = stranger.request(method, path, headers=WRONG[name])
            served = method in (("GET", "HEAD") if path.startswith("/v1/models") else ("POST",))
            assert response.status_code == (401 if served else 405), (method, path)
            assert response.headers.get("www-authenticate") == ("Bearer" if served else None)
            assert KEY not in response.text
    assert "Authorization: Bearer" in detail(stranger.post(OPENAI, headers=WRONG[name]), 401)
    assert detail(stranger.post(TEXT, headers=WRONG[name] | {"Content-Encoding": "gzip"}), 401)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Bearer "])
def test_the_right_key_opens_every_route(stranger: httpx.Client, scheme: str) -> None:
    stranger.headers["Authorization"] = f"{scheme} {KEY}"
    assert embed_texts(stranger, "a").shape == (1, 128)
    assert stranger.get("/v1/models").status_code == 200
    assert [stranger.post(path).status_code for path in (IMAGE, OPENAI)] == [422, 422]


def test_some_routes_need_no_key_and_without_a_key_set_none_does(client: httpx.Client, stranger: httpx.Client) -> None:
    for path in ("/health", "/metrics", "/docs", "/openapi.json", *(["/"] if PAGE.is_file() else [])):
        assert stranger.get(path, follow_redirects=True).status_code == 200
    client.headers["Authorization"] = "Bearer whatever"
    assert embed_texts(client, "a").shape == (1, 128)


# ------------------------------------------------------------------------------------------------------------ docs


def test_docs_load_nothing_from_elsewhere_and_need_no_key(stranger: httpx.Client) -> None:
    page = stranger.get("/docs")
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert len(links) >= 2
    for link in links:
        assert link.startswith("/static-offline-docs/")
        assert stranger.get(link).status_code == 200
    assert "https://" not in page.text.replace("https://fastapi.tiangolo.com", "")


def test_every_route_is_in_a_named_group_and_described_with_an_example_of_each_answer(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    assert description["info"]["version"] == client.get("/health").json()["version"]
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert all(operation[what] for what in ("summary", "description", "tags")), path
    for path in (TEXT, IMAGE, OPENAI):
        answers = description["paths"][path]["post"]["responses"]
        assert answers.keys() >= {"200", "400", "401", "408", "413", "415", "422", "500", "503"}
        examples = {json.dumps(answer["content"]["application/json"]["example"]) for answer in answers.values()}
        assert len(examples) == len(answers)
        errors = [answers[status]["content"]["application/json"]["example"] for status in answers if status != "200"]
        assert all(error.keys() == {"detail"} for error in errors)


def test_only_where_a_key_is_needed_there_is_a_padlock(client: httpx.Client, stranger: httpx.Client) -> None:
    locked = {}
    for asked in (client, stranger):
        paths = asked.get("/openapi.json").json()["paths"]
        locked[asked] = {path for path in paths for operation in paths[path].values() if operation.get("security")}
    assert locked == {client: set(), stranger: {TEXT, IMAGE, OPENAI, "/v1/models", "/v1/models/{model_id}"}}
    (key,) = stranger.get("/openapi.json").json()["components"]["securitySchemes"].values()
    assert (key["type"], key["scheme"]) == ("http", "bearer")


def test_the_requests_of_the_description_are_answered_with_an_image_among_them(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in (TEXT, OPENAI):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        examples = {name: field["examples"][0] for name, field in schema["properties"].items() if "examples" in field}
        assert "image" in str(examples) or path == TEXT
        assert vectors(client.post(path, json=examples)).shape[1] == 128
    form = paths[IMAGE]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    one, several = form["properties"]["file"]["anyOf"]
    assert one == several["items"] == {"type": "string", "format": "binary"}
    assert form["required"] == ["file"]


def test_the_description_has_each_field_of_openais_route_in_its_kind(client: httpx.Client) -> None:
    route = client.get("/openapi.json").json()["paths"][OPENAI]["post"]
    for name in ("input", "messages", "truncate_prompt_tokens", "input_type", "task", "user", "metadata", "normalized"):
        assert f"`{name}" in route["description"]
        assert name in route["requestBody"]["content"]["application/json"]["schema"]["properties"]


# --------------------------------------------------------------------------------------------------------- metrics


def metrics(client: httpx.Client) -> dict[str, float]:
    """The value of every sample, by its name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        " ".join([sample.name, *sorted(f"{name}={value}" for name, value in sample.labels.items())]): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_was_answered_and_what_was_cut(client: httpx.Client) -> None:
    before = metrics(client)
    embed_texts(client, "counted once", "counted twice", "word " * 2000, "counted once")
    embed_image(client, PHOTO, prompt="Not in the cache.")
    embed_image(client, PHOTO, text="counted")
    client.post(TEXT, json={"texts": []})
    after = metrics(client)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert [grown[f"gme_inputs_total kind={kind}"] for kind in ("text", "image", "fused")] == [4, 1, 1]
    assert grown["gme_truncated_inputs_total"] == 1
    assert grown["gme_tokens_total"] > 1800 + 2 * 256
    assert grown["gme_queue_seconds_count"] >= grown["gme_batch_inputs_sum"] == 5
    assert grown["gme_model_seconds_count"] == grown["gme_batch_inputs_count"]
    assert grown["gme_model_seconds_sum"] > 0
    assert grown["http_requests_total handler=/embed/text method=POST status=200"] == 1
    assert grown["http_requests_total handler=/embed/text method=POST status=400"] == 1
    assert any("handler=/embed/text le=256.0" in name for name in after if "duration_seconds_bucket" in name)
    embed_texts(client, "counted once")
    assert metrics(client)["gme_cache_hits_total"] == after["gme_cache_hits_total"] + 1
    info = {"model=toy/shapes", "device=cpu", "dtype=float32", f"version={client.get('/health').json()['version']}"}
    assert [set(name.split()[1:]) for name in after if name.startswith("gme_info")] == [info]
    assert after["gme_queue_inputs"] == 0


def test_metrics_have_no_label_that_a_client_can_choose(client: httpx.Client) -> None:
    before = metrics(client)
    for number in range(3):
        client.get(f"/no/such/route/{number}")
        client.request(f"BREW{number}", TEXT)
    assert len(metrics(client)) - len(before) < 100
    assert not [name for name in metrics(client) if "/no/such/route" in name or "BREW" in name]
