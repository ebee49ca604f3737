"""Room HTTP: the `/v1` routes over a real server, with requests in the shapes that the clients of others send."""

import base64
import socket
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from conftest import TESTS, TOY, Server, serve
from tokenizers import Tokenizer

RED = (TESTS / "shapes" / "red_circle.png").read_bytes()
BASE64 = base64.b64encode(RED).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"
IMAGE_TOKENS = 16 * 16  # 448 x 448 pixels, 28 x 28 a token
CAPTION = "一个红色的圆形"
QUERY = "Find an image that matches the given text."
DEFAULT = "You are a helpful assistant."


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that computes every vector anew."""
    with serve(tmp_path_factory.mktemp("uncached") / "log", GME_CACHE_MB="0") as server, server.client() as client:
        yield client


def create(client: httpx.Client, given: object, **more: object) -> dict[str, object]:
    response = client.post("/v1/embeddings", json={"model": "gme", "input": given} | more)
    assert response.status_code == 200, response.text
    return response.json()


def vectors(answer: dict[str, object]) -> np.ndarray:
    """The vectors of OpenAI's list object, or those of an answer of the other routes."""
    rows = answer["embeddings"] if "embeddings" in answer else [entry["embedding"] for entry in answer["data"]]
    rows = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]
    return np.array(rows, np.float32)


def refused(client: httpx.Client, status: int, **body: object) -> str:
    """The sentence of a refusal in OpenAI's shape."""
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert list(response.json()) == ["error"]
    assert (error.pop("type"), error.pop("code")) == ("invalid_request_error", None)
    return error.pop("message")


def test_the_answer_is_openais_list_object(client: httpx.Client) -> None:
    answer = create(client, ["a red circle", CAPTION])

    for index, entry in enumerate(answer.pop("data")):
        assert len(entry.pop("embedding")) == 128
        assert entry == {"object": "embedding", "index": index}
    assert answer.pop("usage").keys() == {"prompt_tokens", "total_tokens"}
    assert answer == {"object": "list", "model": "toy/shapes"}


def test_the_models_are_openais_list_of_the_one(client: httpx.Client) -> None:
    model = {"id": "toy/shapes", "object": "model", "created": 0, "owned_by": "toy"}
    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}


def test_inputs_of_all_kinds_are_answered_in_their_order(client: httpx.Client) -> None:
    mixed = [CAPTION, {"image": BASE64}, {"text": "a blue star"}, {"text": CAPTION, "image": BASE64}]

    answer = vectors(create(client, mixed))

    alone = [vectors(create(client, [item])) for item in mixed]
    np.testing.assert_array_equal(answer, np.concatenate(alone))
    assert len(np.unique(answer, axis=0)) == 4


@pytest.mark.parametrize("prompt", [None, QUERY])
def test_the_vector_of_a_text_is_the_same_through_every_route(uncached: httpx.Client, prompt: str | None) -> None:
    expected = vectors(uncached.post("/embed/text", json={"texts": [CAPTION], "prompt": prompt}).json())

    for given in (CAPTION, [CAPTION], [{"text": CAPTION}]):
        for encoding in ("float", "base64"):
            answer = create(uncached, given, prompt=prompt, encoding_format=encoding)
            np.testing.assert_array_equal(vectors(answer), expected)


@pytest.mark.parametrize("text", ["", CAPTION], ids=["image", "fused"])
def test_the_vector_of_an_image_is_the_same_through_every_route(uncached: httpx.Client, text: str) -> None:
    form = {"text": text, "prompt": QUERY}
    expected = vectors(uncached.post("/embed/image", files={"file": RED}, data=form).json())

    for image in (BASE64, DATA_URI):
        answer = create(uncached, [{"image": image} | ({"text": text} if text else {})], prompt=QUERY)
        np.testing.assert_array_equal(vectors(answer), expected)


# --------------------------------------------------------------------------------------------------- clients of others

SGLANG = {"model": "gme-qwen2-vl", "input": [{"text": CAPTION}, {"image": DATA_URI}]}
JINA = {
    "model": "jina-clip-v2",
    "task": "retrieval.query",
    "normalized": True,
    "embedding_type": "float",
    "truncate": True,
    "input": [{"text": CAPTION}, {"image": BASE64}],
}
QIANFAN = {
    "model": "gme-qwen2-vl-2b-instruct",
    "encoding_format": "float",
    "user": "user-1",
    "input": [{"text": CAPTION, "image": DATA_URI}],
}


@pytest.mark.parametrize("body", [SGLANG, JINA], ids=["SGLang", "Jina"])
def test_texts_and_images_as_others_send_them(client: httpx.Client, body: dict[str, object]) -> None:
    answer = client.post("/v1/embeddings", json=body)

    text = client.post("/embed/text", json={"texts": [CAPTION]}).json()
    image = client.post("/embed/image", files={"file": RED}).json()
    np.testing.assert_array_equal(vectors(answer.json()), np.concatenate([vectors(text), vectors(image)]))


def test_a_text_with_its_image_as_qianfan_sends_them(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json=QIANFAN)

    fused = client.post("/embed/image", files={"file": RED}, data={"text": CAPTION})
    np.testing.assert_array_equal(vectors(answer.json()), vectors(fused.json()))


# --------------------------------------------------------------------------------------------------------------- usage


def count(text: str, prompt: str = DEFAULT) -> int:
    """Tokens of the whole sequence, as the authors' code writes it."""
    system, user = f"<|im_start|>system\n{prompt}<|im_end|>\n", f"<|im_start|>user\n{text}<|im_end|>\n"
    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    return len(tokenizer.encode(f"{system}{user}<|im_start|>assistant\n<|endoftext|>").ids)


def test_usage_counts_the_tokens_that_the_model_read(client: httpx.Client) -> None:
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    image = count(pad, QUERY) - 1 + IMAGE_TOKENS
    fused = count(pad + CAPTION, QUERY) - 1 + IMAGE_TOKENS
    given = ["a red circle", "a red circle", {"image": BASE64}, {"text": CAPTION, "image": BASE64}]

    usage = create(client, given, prompt=QUERY)["usage"]

    total = 2 * count("a red circle", QUERY) + image + fused
    assert usage == {"prompt_tokens": total, "total_tokens": total}
    assert create(client, given, prompt=QUERY)["usage"] == usage  # from the cache


def test_usage_does_not_count_what_is_cut_off(client: httpx.Client) -> None:
    assert create(client, "word " * 5000)["usage"]["prompt_tokens"] == 1800


# ------------------------------------------------------------------------------------------------------------ refusals


def test_the_models_own_dimensions_are_taken(client: httpx.Client) -> None:
    np.testing.assert_array_equal(vectors(create(client, CAPTION, dimensions=128)), vectors(create(client, CAPTION)))


@pytest.mark.parametrize("dimensions", [0, 64, 1536])
def test_other_dimensions_are_400(client: httpx.Client, dimensions: int) -> None:
    sentence = refused(client, 400, input=CAPTION, dimensions=dimensions)
    assert sentence == "dimensions can only be 128: this model was not trained to be cut."


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_400_with_what_to_do_in_langchain(client: httpx.Client, tokens: object) -> None:
    assert "check_embedding_ctx_length=False" in refused(client, 400, input=tokens)


@pytest.mark.parametrize("scheme", ["http", "HTTP", "https"])
def test_an_image_url_is_400_and_never_fetched(client: httpx.Client, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        url = f"{scheme}://127.0.0.1:{elsewhere.getsockname()[1]}/image.png"

        sentence = refused(client, 400, input=[CAPTION, {"image": url}])

        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    assert sentence == "Input 1: an image URL is never fetched: send the image itself, as a data URI or base64."


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({}, "neither text nor image"),
        ({"text": ""}, "neither text nor image"),
        ({"image": "red_circle.png"}, "neither base64 nor a data URI"),
        ({"image": "data:image/png,raw"}, "cannot be decoded"),
        ({"image": base64.b64encode(b"text").decode()}, "cannot be decoded"),
    ],
    ids=["nothing", "empty text", "name", "plain data URI", "no image"],
)
def test_an_object_that_cannot_be_embedded_is_400(client: httpx.Client, item: dict[str, str], words: str) -> None:
    sentence = refused(client, 400, input=[CAPTION, item])
    assert sentence.startswith("Input 1: ")
    assert words in sentence


def test_no_input_is_400(client: httpx.Client) -> None:
    assert refused(client, 400, input=[]) == "input is empty: send at least one."


@pytest.mark.parametrize("body", [{}, {"input": None}, {"input": [None]}, {"input": "a", "encoding_format": "int8"}])
def test_a_malformed_request_is_422(client: httpx.Client, body: dict[str, object]) -> None:
    assert refused(client, 422, **body).startswith("body.")


@pytest.mark.parametrize("item", [None, {"image": {"url": DATA_URI}}, {"text": "a", "image_url": DATA_URI}])
def test_an_item_of_another_shape_is_a_sentence_on_what_to_send(client: httpx.Client, item: object) -> None:
    sentence = "body.input: send a text, or a list of texts or of objects with `text`, `image` or both."
    assert refused(client, 422, input=["a", item]) == sentence


def test_null_is_the_same_as_absent(client: httpx.Client) -> None:
    nulls = dict.fromkeys(["model", "encoding_format", "dimensions", "user", "prompt"])
    item = {"text": None, "image": DATA_URI}
    np.testing.assert_array_equal(
        vectors(create(client, [item], **nulls)), vectors(create(client, [{"image": BASE64}]))
    )


def test_base64_may_have_line_breaks(client: httpx.Client) -> None:
    broken = base64.encodebytes(RED).decode()
    assert "\n" in broken
    np.testing.assert_array_equal(
        vectors(create(client, [{"image": broken}])), vectors(create(client, [{"image": BASE64}]))
    )


def test_no_such_route_is_an_error_in_openais_shape(server: Server) -> None:
    response = httpx.get(f"{server.url}/v1/nothing")
    assert response.status_code == 404
    assert response.json() == {"error": {"message": "Not Found", "type": "invalid_request_error", "code": None}}
