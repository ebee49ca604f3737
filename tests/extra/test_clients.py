"""The clients that users already have, over a live server: the packages openai, langchain-openai and LlamaIndex."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Server, serve, wait_until_open
from test_failure import PATIENCE, Faulty

openai = pytest.importorskip("openai")
langchain_openai = pytest.importorskip("langchain_openai")
openai_like = pytest.importorskip("llama_index.embeddings.openai_like")

KEY = "a-long-and-secret-key"
QUERY = "Find an image that matches the given text."
TEXTS = ["a red circle", "一个红色的圆形", "a blue star\nbelow a green triangle", "a red circle"]
REFUSED = 'http_requests_total{handler="/v1/embeddings",method="POST",status="503"}'


def connect(server: Server, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", **options)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


@pytest.fixture
def expected(server: Server) -> Callable[..., np.ndarray]:
    """The vectors of texts through the service's own route."""

    def expected(*texts: str, prompt: str | None = None) -> np.ndarray:
        with server.client() as plain:
            answer = plain.post("/embed/text", json={"texts": texts, "prompt": prompt})
        return np.array(answer.json()["embeddings"], np.float32)

    return expected


def vectors(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return np.array([entry.embedding for entry in answer.data], np.float32)


# -------------------------------------------------------------------------------------------------------------- openai


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_openai_gets_the_vectors_of_a_batch(
    client: openai.OpenAI, expected: Callable[..., np.ndarray], encoding: dict[str, str]
) -> None:
    answer = client.embeddings.create(model="gme", input=TEXTS, **encoding)

    np.testing.assert_array_equal(vectors(answer), expected(*TEXTS))
    assert answer.model == "toy/shapes"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4 * 20


def test_openai_asks_for_base64_by_itself_and_the_service_sends_it(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model="gme", input="a red circle")

    assert b'"encoding_format":"base64"' in raw.http_request.content.replace(b" ", b"")
    assert isinstance(raw.http_response.json()["data"][0]["embedding"], str)
    assert len(raw.parse().data[0].embedding) == 128


def test_openai_passes_the_prompt_on(client: openai.OpenAI, expected: Callable[..., np.ndarray]) -> None:
    answer = client.embeddings.create(model="gme", input="a red circle", extra_body={"prompt": QUERY})

    np.testing.assert_array_equal(vectors(answer), expected("a red circle", prompt=QUERY))
    assert not np.array_equal(vectors(answer), expected("a red circle"))


def test_openai_sends_a_large_batch(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="gme", input=[f"text {number}" for number in range(2048)])

    assert vectors(answer).shape == (2048, 128)


def test_openai_async_gets_the_same(server: Server, expected: Callable[..., np.ndarray]) -> None:
    async def create() -> list[openai.types.CreateEmbeddingResponse]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(client.embeddings.create(model="gme", input=[text]) for text in TEXTS))

    answers = asyncio.run(create())

    np.testing.assert_array_equal(np.concatenate([vectors(answer) for answer in answers]), expected(*TEXTS))


def test_openai_lists_the_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("toy/shapes", "toy")


# ------------------------------------------------------------------------------------------------------ openai's errors


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an API key and small limits."""
    limits = {"GME_MAX_INPUTS": "3", "GME_MAX_BODY_MB": "1"}
    with serve(tmp_path_factory.mktemp("strict") / "log", GME_API_KEY=KEY, **limits) as running:
        yield running


def test_openai_raises_bad_request_for_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="dimensions can only be 128") as raised:
        client.embeddings.create(model="gme", input="a red circle", dimensions=64)

    assert raised.value.type == "invalid_request_error"
    assert raised.value.body["message"].startswith("dimensions can only be 128")


def test_openai_raises_authentication_error_for_401(strict: Server) -> None:
    with connect(strict) as client, pytest.raises(openai.AuthenticationError, match="API key") as raised:
        client.models.list()

    assert raised.value.type == "authentication_error"
    with connect(strict).with_options(api_key=KEY) as client:
        assert len(client.models.list().data) == 1


@pytest.mark.parametrize(
    ("given", "words"), [(["a"] * 4, "send at most 3 in one request"), ("word " * 2_000_000, "larger than 1 MB")]
)
def test_openai_raises_a_status_error_for_413(strict: Server, given: object, words: str) -> None:
    with (
        connect(strict).with_options(api_key=KEY) as client,
        pytest.raises(openai.APIStatusError, match=words) as raised,
    ):
        client.embeddings.create(model="gme", input=given)

    assert raised.value.status_code == 413


def test_openai_raises_unprocessable_for_422(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="encoding_format"):
        client.embeddings.create(model="gme", input="a red circle", encoding_format="int8")


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Faulty]:
    """A server with room for two inputs, whose model the test can hold."""
    server = Faulty(tmp_path, GME_MAX_QUEUE="2")
    try:
        wait_until_open(server)
        yield server
    finally:
        server.end()


def test_openai_tries_a_503_again_after_the_seconds_that_it_names(busy: Faulty) -> None:
    sent: list[float] = []
    hooks = {"request": [lambda _: sent.append(time.monotonic())]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks)
    with connect(busy, http_client=http_client, max_retries=10) as client, ThreadPoolExecutor() as threads:
        with busy.held():
            plug = threads.submit(busy.post, "a", "b")
            busy.await_depth(2)
            with pytest.raises(openai.InternalServerError, match="Too many inputs wait") as raised:
                client.with_options(max_retries=0).embeddings.create(model="gme", input="a red circle")
            sent.clear()
            answer = threads.submit(client.embeddings.create, model="gme", input="a red circle")
            while busy.metric(REFUSED) < 2:
                assert not answer.done()

        assert len(answer.result(PATIENCE).data) == 1
        assert plug.result(PATIENCE).status_code == 200
    assert raised.value.status_code == 503
    seconds = int(raised.value.response.headers["Retry-After"])
    assert sent[1] - sent[0] >= seconds >= 1  # by itself it would wait half a second at most


# ----------------------------------------------------------------------------------------------------------- LangChain


def langchain(server: Server, **options: object) -> langchain_openai.OpenAIEmbeddings:
    return langchain_openai.OpenAIEmbeddings(base_url=f"{server.url}/v1", api_key="any", model="gme", **options)


def test_langchain_gets_the_vectors(server: Server, expected: Callable[..., np.ndarray]) -> None:
    embeddings = langchain(server, check_embedding_ctx_length=False, chunk_size=3)

    np.testing.assert_array_equal(np.array(embeddings.embed_documents(TEXTS), np.float32), expected(*TEXTS))
    np.testing.assert_array_equal(np.array([embeddings.embed_query(TEXTS[0])], np.float32), expected(TEXTS[0]))
    answer = asyncio.run(embeddings.aembed_documents(TEXTS))
    np.testing.assert_array_equal(np.array(answer, np.float32), expected(*TEXTS))


def test_langchain_passes_the_prompt_on(server: Server, expected: Callable[..., np.ndarray]) -> None:
    extra = {"extra_body": {"prompt": QUERY}}
    queries = langchain(server, check_embedding_ctx_length=False, model_kwargs=extra)

    answer = np.array([queries.embed_query(TEXTS[0])], np.float32)
    np.testing.assert_array_equal(answer, expected(TEXTS[0], prompt=QUERY))


def test_langchain_without_the_argument_is_told_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_index.core

    # LlamaIndex brings the vocabulary that tiktoken would download
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))
    embeddings = langchain(server, tiktoken_model_name="gpt-4")

    with pytest.raises(openai.BadRequestError, match="in LangChain, check_embedding_ctx_length=False"):
        embeddings.embed_documents(TEXTS)


# ---------------------------------------------------------------------------------------------------------- LlamaIndex


def llama_index(server: Server, **options: object) -> openai_like.OpenAILikeEmbedding:
    return openai_like.OpenAILikeEmbedding(model_name="gme", api_base=f"{server.url}/v1", api_key="any", **options)


def test_llama_index_gets_the_vectors(server: Server, expected: Callable[..., np.ndarray]) -> None:
    embedding = llama_index(server, embed_batch_size=3)
    flat = [text.replace("\n", " ") for text in TEXTS]  # as LlamaIndex sends them

    alone = [embedding.get_text_embedding(TEXTS[0]), embedding.get_query_embedding(TEXTS[0])]
    np.testing.assert_array_equal(np.array(alone, np.float32), expected(TEXTS[0], TEXTS[0]))
    batch = embedding.get_text_embedding_batch(TEXTS)
    np.testing.assert_array_equal(np.array(batch, np.float32), expected(*flat))
    batch = asyncio.run(embedding.aget_text_embedding_batch(TEXTS))
    np.testing.assert_array_equal(np.array(batch, np.float32), expected(*flat))


def test_llama_index_passes_the_prompt_on(server: Server, expected: Callable[..., np.ndarray]) -> None:
    queries = llama_index(server, additional_kwargs={"extra_body": {"prompt": QUERY}})

    answer = np.array([queries.get_query_embedding(TEXTS[0])], np.float32)
    np.testing.assert_array_equal(answer, expected(TEXTS[0], prompt=QUERY))
