"""Room HTTP: the two `/embed` routes and `/health` over a real server, what they refuse, and who may ask."""

import html.parser
import http.client
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from conftest import IMAGES, Address, Case, golden, serve_or_use
from prometheus_client.parser import text_string_to_metric_families

KEY = "a-long-and-secret-key"
STRICT = {"GME_API_KEY": KEY, "GME_MAX_INPUTS": "3", "GME_MAX_BODY_MB": "0.25", "GME_MAX_IMAGE_PIXELS": "50000"}
OPEN_ROUTES = ("/health", "/metrics", "/docs", "/", "/openapi.json")
PHOTO = (IMAGES / "64x48.png").read_bytes()
TEXTS = ["a red circle", "一个红色的圆形", "a blue star", "a red circle", ""]
JSON = {"content-type": "application/json"}
MULTIPART = {"content-type": "multipart/form-data; boundary=limit"}
PART = b'--limit\r\ncontent-disposition: form-data; name="file"; filename="a.png"\r\n\r\n'


@pytest.fixture(scope="module")
def strict(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A server with an API key and small limits."""
    with serve_or_use(pytestconfig, "--strict-url", tmp_path_factory.mktemp("strict") / "log", **STRICT) as running:
        yield running


@pytest.fixture
def stranger(strict: Address) -> Iterator[httpx.Client]:
    """A client of the strict server that has no key."""
    with strict.client() as client:
        yield client


@pytest.fixture
def holder(strict: Address) -> Iterator[httpx.Client]:
    """A client of the strict server that has the key."""
    with strict.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["embeddings"]
    return np.array(response.json()["embeddings"])


def detail(response: httpx.Response, status: int) -> str:
    """The sentence of an error with that status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["detail"]
    assert isinstance(response.json()["detail"], str)
    return response.json()["detail"]


def embed_texts(client: httpx.Client, *texts: str, **more: object) -> np.ndarray:
    return vectors(client.post("/embed/text", json={"texts": texts, **more}))


def embed_image(client: httpx.Client, data: bytes, **fields: str) -> np.ndarray:
    return vectors(client.post("/embed/image", files={"file": data}, data=fields))


# --------------------------------------------------------------------------------------------------------- vectors


def text_cases() -> list[Case]:
    return [case for case in golden() if case.image is None]


@pytest.mark.parametrize("prompt", sorted({case.prompt for case in text_cases()}, key=str))
def test_texts_are_answered_in_their_order_with_the_authors_vectors(client: httpx.Client, prompt: str | None) -> None:
    cases = [case for case in text_cases() if case.prompt == prompt]
    answer = embed_texts(client, *(case.text for case in cases), prompt=prompt)
    np.testing.assert_allclose(answer, [case.vector for case in cases], atol=1e-5)


def test_a_text_alone_has_the_authors_vector(client: httpx.Client) -> None:
    for case in text_cases()[:10]:
        np.testing.assert_allclose(embed_texts(client, case.text), [case.vector], atol=1e-5)


def test_images_are_answered_with_the_authors_vectors(client: httpx.Client) -> None:
    for case in golden():
        if case.data is not None:
            fields = {name: value for name in ("text", "prompt") if (value := getattr(case, name))}
            answer = embed_image(client, case.data, **fields)
            np.testing.assert_allclose(answer, [case.vector], atol=1e-5, err_msg=f"case {case.number}")


def test_a_text_repeated_is_answered_each_time(client: httpx.Client) -> None:
    answer = embed_texts(client, *TEXTS)
    assert answer.shape == (5, 128)
    np.testing.assert_array_equal(answer[0], answer[3])
    np.testing.assert_allclose(embed_texts(client, *reversed(TEXTS)), answer[::-1], atol=1e-6)


@pytest.mark.parametrize("prompt", [None, "", "You are a helpful assistant."])
def test_no_prompt_is_the_default_one(client: httpx.Client, prompt: str | None) -> None:
    default = embed_texts(client, "a red circle")
    np.testing.assert_allclose(embed_texts(client, "a red circle", prompt=prompt), default, atol=1e-6)
    default = embed_image(client, PHOTO, text="a red circle")
    np.testing.assert_allclose(embed_image(client, PHOTO, text="a red circle", prompt=prompt or ""), default, atol=1e-6)


def test_a_text_of_a_form_may_be_as_long_as_any_other(client: httpx.Client) -> None:
    beginning = embed_image(client, PHOTO, text="word " * 5_000)
    np.testing.assert_allclose(embed_image(client, PHOTO, text="word " * 500_000), beginning, atol=1e-6)


@pytest.mark.parametrize(
    "text", ["\0", "\x1b[31m", "a" + "\u0301" * 10_000, "\u202eright to left", "\ufffe\uffff", "\U0010ffff", "👩‍👩‍👧‍👧"]
)
def test_a_text_of_any_unicode_is_embedded(client: httpx.Client, text: str) -> None:
    assert np.isfinite(embed_texts(client, text)).all()
    assert np.isfinite(embed_image(client, PHOTO, text=text, prompt=text[:10])).all()


# ---------------------------------------------------------------------------------------------------------- health


def test_health_says_what_runs_where(client: httpx.Client) -> None:
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "toy/shapes",
        "device": "cpu",
        "dtype": "float32",
        "dimension": 128,
        "queue_depth": 0,
    }


# ---------------------------------------------------------------------------------------------------------- errors


def test_no_texts_are_400(client: httpx.Client) -> None:
    sentence = detail(client.post("/embed/text", json={"texts": []}), 400)
    assert sentence == "texts is empty: send at least one."


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404</html>", PHOTO[:200], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 1000],
    ids=["empty", "html", "cut", "eps", "zeros"],
)
def test_an_image_that_cannot_be_decoded_is_400(client: httpx.Client, data: bytes) -> None:
    assert "cannot be decoded" in detail(client.post("/embed/image", files={"file": data}), 400)


def test_an_image_that_does_not_fit_behind_the_prompt_is_400(client: httpx.Client) -> None:
    response = client.post("/embed/image", files={"file": PHOTO}, data={"prompt": "word " * 2000})
    assert "send a shorter prompt" in detail(response, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"texts": ["a"]',
        b'{"texts": ["\xff"]}',
        b'{"texts": [' + b"9" * 5000 + b"]}",
        b'{"texts": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"texts": [NaN]}',
        b"texts=a",
        b'"a"',
        b"[]",
        b"null",
        b"{}",
        b'{"texts": "a"}',
        b'{"texts": null}',
        b'{"texts": [null]}',
        b'{"texts": [1]}',
        b'{"texts": [["a"]]}',
        b'{"texts": {"0": "a"}}',
        b'{"texts": ["a"], "prompt": 1}',
        b'{"texts": ["a"], "prompt": ["a"]}',
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_a_malformed_body_is_422(client: httpx.Client, body: bytes) -> None:
    sentence = detail(client.post("/embed/text", content=body, headers=JSON), 422)
    assert sentence.startswith("body")
    assert len(sentence) < 200


def test_of_many_faults_a_few_are_named_and_nothing_is_echoed(client: httpx.Client) -> None:
    sentence = detail(client.post("/embed/text", json={"texts": [{"secret": 1}] * 1000}), 422)
    assert "secret" not in sentence
    assert len(sentence) < 1000


@pytest.mark.parametrize("body", [b'{"texts": ["\\ud800"]}', b'{"texts": ["a"], "prompt": "\\udfff\\ud800"}'])
def test_half_a_surrogate_pair_is_a_vector_or_a_clear_refusal(client: httpx.Client, body: bytes) -> None:
    response = client.post("/embed/text", content=body, headers=JSON)
    assert response.status_code in (200, 422)
    if response.status_code == 200:
        assert np.isfinite(vectors(response)).all()
    else:
        assert "surrogate" in detail(response, 422)


@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_a_form_may_say_its_charset(client: httpx.Client, charset: str) -> None:
    headers = {"content-type": f"{MULTIPART['content-type']}; charset={charset}"}
    assert vectors(client.post("/embed/image", content=PART + PHOTO + b"\r\n--limit--\r\n", headers=headers)).shape == (
        1,
        128,
    )


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "undefined", "utf-16", "punycode", "idna"])
def test_a_form_in_a_strange_charset_is_422(client: httpx.Client, charset: str) -> None:
    text = b'\r\n--limit\r\ncontent-disposition: form-data; name="text"\r\n\r\n\\ud800 +2AA-\r\n--limit--\r\n'
    headers = {"content-type": f"{MULTIPART['content-type']}; charset={charset}"}
    response = client.post("/embed/image", content=PART + PHOTO + text, headers=headers)
    assert detail(response, 422) == "body: the charset of the form has to be UTF-8."


@pytest.mark.parametrize("fields", [{}, {"text": "a"}, {"file": "not a file"}], ids=["nothing", "text", "field"])
def test_an_absent_file_is_422(client: httpx.Client, fields: dict[str, str]) -> None:
    assert detail(client.post("/embed/image", data=fields), 422).startswith("body.file: ")


@pytest.mark.parametrize(
    ("body", "headers"),
    [(b"garbage", MULTIPART), (b"garbage", {"content-type": "multipart/form-data"}), (b"{}", JSON), (PART, MULTIPART)],
    ids=["garbage", "no boundary", "json", "no end"],
)
def test_a_malformed_form_is_422(client: httpx.Client, body: bytes, headers: dict[str, str]) -> None:
    detail(client.post("/embed/image", content=body, headers=headers), 422)


def test_more_than_one_file_is_refused(client: httpx.Client) -> None:
    response = client.post("/embed/image", files=[("file", PHOTO), ("file", PHOTO)])
    assert "files" in detail(response, response.status_code)
    assert response.status_code in (400, 422)


@pytest.mark.parametrize("path", ["/embed", "/v1", "/redoc", "/docs/static/nothing.js", "/docs/static/../../README.md"])
def test_no_such_route_is_404(client: httpx.Client, path: str) -> None:
    detail(client.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/embed/text", "POST"),
        ("PUT", "/embed/image", "POST"),
        ("DELETE", "/embed/text", "POST"),
        ("POST", "/health", "GET"),
    ],
)
def test_another_method_is_405(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)
    detail(response, 405)
    assert response.headers["allow"] == allowed


# ---------------------------------------------------------------------------------------------------------- limits


def blocks(start: bytes) -> Iterator[bytes]:
    """A body of 2 MB after `start`; httpx sends it in chunks, with no Content-Length."""
    yield start
    for _ in range(32):
        yield b" " * 65536


@pytest.mark.parametrize(
    ("path", "start", "headers"),
    [("/embed/text", b'{"texts": ["', JSON), ("/embed/image", PART, MULTIPART)],
    ids=["text", "image"],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_413(
    holder: httpx.Client, path: str, start: bytes, headers: dict[str, str], chunked: bool
) -> None:
    body = blocks(start) if chunked else b"".join(blocks(start))
    response = holder.post(path, content=body, headers=headers)
    assert detail(response, 413) == "The body is larger than 0.25 MB: send less in one request."
    assert vectors(holder.post("/embed/text", json={"texts": ["a"]})).shape == (1, 128)  # the next is answered


def test_a_body_as_large_as_allowed_is_taken(holder: httpx.Client) -> None:
    body = b'{"texts": ["a"]}'
    full = body.ljust(2**18)
    assert vectors(holder.post("/embed/text", content=full, headers=JSON)).shape == (1, 128)
    detail(holder.post("/embed/text", content=full + b" ", headers=JSON), 413)


def test_too_many_inputs_are_413(holder: httpx.Client) -> None:
    assert embed_texts(holder, "a", "b", "c").shape == (3, 128)
    sentence = detail(holder.post("/embed/text", json={"texts": ["a", "b", "c", "d"]}), 413)
    assert sentence == "texts has 4 inputs: send at most 3 in one request."


@pytest.mark.parametrize("values", [b"[],", b"1,", b'"",', b'"a": 0,'], ids=["lists", "numbers", "strings", "keys"])
@pytest.mark.parametrize(("path", "name"), [("/embed/text", b"texts"), ("/v1/embeddings", b"input")])
def test_too_many_values_are_413_before_they_are_parsed(
    client: httpx.Client, path: str, name: bytes, values: bytes
) -> None:
    body = b'{"%b": ["a"], ' % name if b":" in values else b'{"%b": [' % name
    response = client.post(path, content=body + 200_000 * values, headers=JSON)
    assert response.status_code == 413
    assert "The body has too many values" in response.text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_another_encoding_is_422(client: httpx.Client, encoding: str) -> None:
    body = '{"texts": ["a"]}'.encode(encoding)
    assert detail(client.post("/embed/text", content=body, headers=JSON), 422) == "body: it is not JSON in UTF-8."


def test_as_many_values_as_the_largest_request_has_are_taken(client: httpx.Client) -> None:
    objects = [{"text": 'a "quoted\\" [text]', "image": None}] * 2048
    body = json.dumps({"model": "gme", "input": objects}, indent=4)
    response = client.post("/v1/embeddings", content=body, headers=JSON)
    assert (response.status_code, len(response.json()["data"])) == (200, 2048)


def test_a_form_that_is_not_multipart_is_422(client: httpx.Client) -> None:
    sentence = detail(client.post("/embed/image", data={"text": "a"}), 422)
    assert sentence == "body.file: send the image as a file in a multipart form (with curl: -F file=@photo.jpg)."


def test_too_many_pixels_are_413(holder: httpx.Client) -> None:
    assert embed_image(holder, PHOTO).shape == (1, 128)
    response = holder.post("/embed/image", files={"file": (IMAGES / "448x448.png").read_bytes()})
    sentence = detail(response, 413)
    assert "more than the 50000 pixels that are accepted" in sentence


def test_too_many_fields_of_a_form_are_422(client: httpx.Client) -> None:
    response = client.post("/embed/image", files={"file": PHOTO}, data={f"field {n}": "a" for n in range(20)})
    assert "Too many fields" in detail(response, 422)


# ------------------------------------------------------------------------------------------------------------- key


def guarded_routes(client: httpx.Client) -> list[tuple[str, str]]:
    """Every (method, path) that needs the key."""
    paths = client.get("/openapi.json").json()["paths"]
    routes = [(method.upper(), path) for path in paths for method in paths[path] if path not in OPEN_ROUTES]
    assert {("POST", "/embed/text"), ("POST", "/embed/image"), ("POST", "/v1/embeddings")} <= set(routes)
    return routes


WRONG = {
    "none": {},
    "another": {"Authorization": "Bearer another"},
    "beginning": {"Authorization": f"Bearer {KEY[:-1]}"},
    "longer": {"Authorization": f"Bearer {KEY}s"},
    "no scheme": {"Authorization": KEY},
    "basic": {"Authorization": f"Basic {KEY}"},
    "scheme alone": {"Authorization": "Bearer"},
    "another header": {"X-API-Key": KEY},
    "case": {"Authorization": f"Bearer {KEY.upper()}"},
}


@pytest.mark.parametrize("name", WRONG)
def test_without_the_right_key_every_route_is_401(stranger: httpx.Client, name: str) -> None:
    for method, path in guarded_routes(stranger):
        response = stranger.request(method, path, headers=WRONG[name], json={"texts": ["a"], "input": ["a"]})
        assert response.status_code == 401, (method, path)
        assert response.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer" in response.text
        assert KEY not in response.text


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "PATCH", "DELETE", "TRACE"])
def test_no_other_method_leaks_anything_without_the_key(stranger: httpx.Client, method: str) -> None:
    for path in ("/embed/text", "/embed/image", "/v1/embeddings", "/v1/models", "/nothing/here"):
        assert stranger.request(method, path).status_code == 401, path


@pytest.mark.parametrize(
    "path",
    [
        "/docs/../embed/text",
        "/docs/static/../../embed/text",
        "/docs/static/%2e%2e/%2e%2e/embed/text",
        "/docs/static%2f..%2f..%2fembed%2ftext",
        "/health/../embed/text",
        "//embed/text",
        "/embed/text/",
        "/embed%2ftext",
        "/embed/text?/health",
        "/embed/text#/health",
        "/embed/text;/health",
        "/%2fembed/text",
        "http://localhost/health/../embed/text",
    ],
)
@pytest.mark.parametrize("host", ["localhost", "localhost/health?", "localhost/docs/static/#"])
def test_no_spelling_of_a_path_leads_past_the_key(strict: Address, path: str, host: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(strict.url).netloc, timeout=30)
    connection.putrequest("POST", path, skip_host=True)  # httpx would tidy the path
    body = json.dumps({"texts": ["a"]}).encode()
    for header, value in (("Host", host), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
        connection.putheader(header, value)
    connection.endheaders(body)
    response = connection.getresponse()
    assert response.status in (400, 401, 404, 405)
    assert b"embeddings" not in response.read()
    connection.close()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_right_key_opens_every_route(stranger: httpx.Client, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {KEY}"}
    response = stranger.post("/embed/text", json={"texts": ["a"]}, headers=headers)
    assert vectors(response).shape == (1, 128)
    for method, path in guarded_routes(stranger):
        assert stranger.request(method, path, headers=headers).status_code in (200, 422), path


@pytest.mark.parametrize("path", OPEN_ROUTES)
def test_some_routes_need_no_key(stranger: httpx.Client, path: str) -> None:
    assert stranger.get(path, follow_redirects=True).status_code == 200


def test_without_a_key_set_none_is_asked_for(client: httpx.Client) -> None:
    client.headers["Authorization"] = "Bearer whatever"
    assert embed_texts(client, "a").shape == (1, 128)


# ------------------------------------------------------------------------------------------------------------ docs


class Links(html.parser.HTMLParser):
    """Gathers what a page loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attributes if name in ("src", "href") and value]


def test_docs_load_nothing_from_elsewhere_and_need_no_key(stranger: httpx.Client) -> None:
    page = stranger.get("/", follow_redirects=True)
    assert page.url.path == "/docs"
    links = Links(page.text).found
    assert len(links) >= 2
    for link in links:
        assert link.startswith("/docs/")
        assert stranger.get(link).status_code == 200
    assert "https://" not in page.text.replace("https://fastapi.tiangolo.com", "")


@pytest.fixture
def description(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def test_every_operation_is_described_with_its_answers(description: dict[str, Any]) -> None:
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert operation["description"], path
            for answer in operation["responses"].values():
                assert answer["description"], path
                for kind, content in answer["content"].items():
                    assert kind == "text/plain" or "$ref" in content.get("schema", ()) or content["example"], path


def test_every_model_and_field_has_a_sentence_and_an_example(description: dict[str, Any]) -> None:
    for name, model in description["components"]["schemas"].items():
        assert model["description"], name
        for field, schema in model["properties"].items():
            assert schema["description"], (name, field)
            of_models = {"$ref", "contentMediaType"} & (schema | schema.get("items", {})).keys()  # or it is a file
            assert of_models or schema["examples"], (name, field)


def test_the_requests_of_the_description_are_answered(client: httpx.Client, description: dict[str, Any]) -> None:
    models = description["components"]["schemas"]
    texts = {name: schema["examples"][0] for name, schema in models["Texts"]["properties"].items()}
    assert len(embed_texts(client, **texts)) == 2
    for request in models["OpenAIRequest"]["examples"]:
        assert client.post("/v1/embeddings", json=request).status_code == 200


def test_every_status_is_described_with_the_error_that_is_sent(description: dict[str, Any]) -> None:
    for path in ("/embed/text", "/embed/image", "/v1/embeddings"):
        answers = description["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "413", "422", "500", "503"}
        for status in set(answers) - {"200"}:
            content = answers[status]["content"]["application/json"]
            if path == "/v1/embeddings":
                assert {"message", "type"} <= content["example"]["error"].keys()
            else:
                assert content["schema"]["$ref"].endswith("/Error")
    dead = description["paths"]["/health"]["get"]["responses"]["503"]
    assert dead["content"]["application/json"]["schema"]["$ref"].endswith("/Health")


def test_the_file_is_described_as_one_and_the_key_as_a_bearer_token(description: dict[str, Any]) -> None:
    (content,) = description["paths"]["/embed/image"]["post"]["requestBody"]["content"].items()
    assert content[0] == "multipart/form-data"
    form = description["components"]["schemas"][content[1]["schema"]["$ref"].rpartition("/")[2]]
    assert form["properties"]["file"]["contentMediaType"] == "application/octet-stream"
    (key,) = description["components"]["securitySchemes"].values()
    assert (key["type"], key["scheme"]) == ("http", "bearer")


# --------------------------------------------------------------------------------------------------------- metrics


def metrics(client: httpx.Client) -> dict[str, float]:
    """The value of every sample, by its name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        " ".join([sample.name, *sorted(f"{name}={value}" for name, value in sample.labels.items())]): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_was_answered(client: httpx.Client) -> None:
    before = metrics(client)
    embed_texts(client, "counted once", "counted twice")
    embed_image(client, PHOTO, prompt="Not in the cache.")
    embed_image(client, PHOTO, text="counted")
    client.post("/embed/text", json={"texts": []})
    after = metrics(client)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["gme_inputs_total kind=text"] == 2
    assert grown["gme_inputs_total kind=image"] == 1
    assert grown["gme_inputs_total kind=fused"] == 1
    assert grown["gme_tokens_total"] > 2 * 256
    assert grown["gme_queue_seconds_count"] == 4
    assert 2 <= grown["gme_batch_inputs_count"] <= 4
    assert grown["gme_batch_inputs_sum"] == 4
    assert grown["gme_batch_padding_ratio_count"] == grown["gme_model_seconds_count"] == grown["gme_batch_inputs_count"]
    assert grown["gme_model_seconds_sum"] > 0
    assert grown["http_requests_total handler=/embed/text method=POST status=200"] == 1
    assert grown["http_requests_total handler=/embed/text method=POST status=400"] == 1
    assert grown["http_requests_total handler=/embed/image method=POST status=200"] == 2
    assert after["gme_queue_inputs"] == 0


def test_latency_by_route_is_counted_up_to_minutes(client: httpx.Client) -> None:
    embed_texts(client, "timed")
    assert any("handler=/embed/text le=256.0" in name for name in metrics(client) if "duration_seconds_bucket" in name)


MALFORMED = {
    "no content type": ({"content": b'{"texts": ["a"]}'}, "with the header `Content-Type: application/json`."),
    "a list": ({"json": ["a"]}, "body: send a JSON object"),
    "broken JSON": (
        {"content": b'{"texts": [', "headers": {"Content-Type": "application/json"}},
        "it is not JSON, from",
    ),
    "a wrong name": ({"json": {"texts": ["a"], "promt": "b"}}, "body.promt: Extra inputs are not permitted."),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_is_a_sentence_that_says_what_to_send(client: httpx.Client, name: str) -> None:
    request, words = MALFORMED[name]
    response = client.post("/embed/text", **request)
    assert response.status_code == 422
    assert words in response.json()["detail"]


def test_an_image_that_is_no_file_is_a_sentence_that_says_how_to_send_one(client: httpx.Client) -> None:
    response = client.post("/embed/image", json={"file": "a.png"})
    assert response.status_code == 422
    assert "body.file: send the image as a file in a multipart form" in response.json()["detail"]


def test_metrics_have_no_label_that_a_client_can_choose(client: httpx.Client) -> None:
    before = metrics(client)
    for number in range(3):
        client.get(f"/no/such/route/{number}")
        client.request(f"BREW{number}", "/embed/text")
    assert len(metrics(client)) - len(before) < 100
    assert not [name for name in metrics(client) if "/no/such/route" in name or "BREW" in name]


EXPECTED = {  # by family: its type and its labels
    "http_requests": ("counter", {"handler", "method", "status"}),
    "http_request_duration_seconds": ("histogram", {"handler", "method"}),
    "gme_inputs": ("counter", {"kind"}),
    "gme_tokens": ("counter", set()),
    "gme_batch_inputs": ("histogram", set()),
    "gme_batch_padding_ratio": ("histogram", set()),
    "gme_queue_inputs": ("gauge", set()),
    "gme_queue_seconds": ("histogram", set()),
    "gme_model_seconds": ("histogram", set()),
    "gme_cache_hits": ("counter", set()),
}


def test_every_metric_is_there_and_named_as_prometheus_asks(client: httpx.Client) -> None:
    embed_image(client, PHOTO)
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}

    for name, (kind, labels) in EXPECTED.items():
        assert families[name].type == kind, name
        assert {label for sample in families[name].samples for label in sample.labels} - {"le"} == labels, name
    for family in families.values():
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert not re.search(r"_(total|count|sum|bucket|ms|milliseconds|minutes|kb|mb|percent)$", family.name)
        if family.type == "counter":
            assert {sample.name.removeprefix(family.name) for sample in family.samples} == {"_total"}
