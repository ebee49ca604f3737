"""The clients that users have already, each as they would write it, over a live server.

Every vector has to be the one that the service's own routes give. What Dify and Weaviate send was read in their code.
"""

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import QUIET, TESTS, Server

openai = pytest.importorskip("openai")


def uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


PROMPT = "Find an image that matches the given text."
TEXTS = ["a red circle", "一个红色的圆形", "a blue star\nbelow a green triangle", "a red circle"]
FLAT = [text.replace("\n", " ") for text in TEXTS]  # as some clients send them
RED, BLUE = TESTS / "shapes" / "red_circle.png", TESTS / "shapes" / "blue_star.png"
URI = uri(RED)
NPM = ["openai@^6", "@langchain/openai@^1", "@langchain/core@^1"]
os.environ.update(QUIET)  # nothing here asks another host

Expected = Callable[..., np.ndarray]


@pytest.fixture
def url(server: Server) -> str:
    return f"{server.url}/v1"


@pytest.fixture
def expected(client: httpx.Client) -> Expected:
    """The vectors of texts, of image files, and of files with a text, through the service's own routes."""

    def expected(*inputs: str | Path | tuple[Path, str], prompt: str | None = None) -> np.ndarray:
        rows = []
        for given in inputs:
            if isinstance(given, str):
                answer = client.post("/embed/text", json={"texts": [given], "prompt": prompt})
            else:
                file, text = given if isinstance(given, tuple) else (given, "")
                form = {"prompt": prompt or "", "text": text}
                answer = client.post("/embed/image", files={"file": file.read_bytes()}, data=form)
            rows += answer.json()["embeddings"]
        return np.array(rows, np.float32)

    return expected


def assert_same(given: object, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(given, np.float32), wanted, rtol=0, atol=1e-5)


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="any") as api:
        yield api


def vectors(answer: openai.types.CreateEmbeddingResponse) -> list[list[float]]:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return [entry.embedding for entry in answer.data]


def test_openai(api: openai.OpenAI, expected: Expected) -> None:
    answer = api.embeddings.create(model="gme", input=[*TEXTS, URI], extra_body={"prompt": PROMPT})
    assert_same(vectors(answer), expected(*TEXTS, RED, prompt=PROMPT))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4 * 20 + 256
    (model,) = api.models.list()
    assert model.id == answer.model == "toy/shapes"
    assert_same(vectors(api.embeddings.create(model="gme", input=URI)), expected(RED))


def test_langchain(url: str, expected: Expected) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    options = {"base_url": url, "api_key": "any", "model": "gme", "check_embedding_ctx_length": False}
    documents = langchain_openai.OpenAIEmbeddings(**options)
    queries = langchain_openai.OpenAIEmbeddings(**options, model_kwargs={"extra_body": {"prompt": PROMPT}})
    assert_same(documents.embed_documents([*TEXTS, URI]), expected(*TEXTS, RED))
    assert_same(asyncio.run(documents.aembed_documents(TEXTS)), expected(*TEXTS))
    assert_same([queries.embed_query(TEXTS[0])], expected(TEXTS[0], prompt=PROMPT))


def test_llama_index(url: str, expected: Expected) -> None:
    openai_like = pytest.importorskip("llama_index.embeddings.openai_like")
    options = {"model_name": "gme", "api_base": url, "api_key": "any"}
    documents = openai_like.OpenAILikeEmbedding(**options, embed_batch_size=3)
    queries = openai_like.OpenAILikeEmbedding(**options, additional_kwargs={"extra_body": {"prompt": PROMPT}})
    assert_same(documents.get_text_embedding_batch([*TEXTS, URI]), expected(*FLAT, RED))
    assert_same(asyncio.run(documents.aget_text_embedding_batch(TEXTS)), expected(*FLAT))
    assert_same([queries.get_query_embedding(TEXTS[0])], expected(TEXTS[0], prompt=PROMPT))


def test_litellm(url: str, expected: Expected) -> None:
    litellm = pytest.importorskip("litellm")

    def embed(given: object, **more: object) -> list[list[float]]:
        answer = litellm.embedding("jina_ai/gme", input=given, api_base=url, api_key="any", **more)
        assert answer.usage.total_tokens > 0
        return [entry["embedding"] for entry in answer.data]

    assert_same(embed(TEXTS), expected(*TEXTS))
    assert_same(embed(["a red circle", URI]), expected("a red circle", RED))
    assert_same(embed(URI), expected(RED))
    assert_same(embed(["a red circle"], prompt=PROMPT), expected("a red circle", prompt=PROMPT))
    assert_same(embed([{"text": "a red circle", "image": URI}]), expected((RED, "a red circle")))


def test_haystack(url: str, expected: Expected) -> None:
    haystack = pytest.importorskip("haystack")
    embedders = pytest.importorskip("haystack.components.embedders")
    options = {"api_key": haystack.utils.Secret.from_token("any"), "model": "gme"}
    texts = embedders.OpenAITextEmbedder(api_base_url=url, **options)
    documents = embedders.OpenAIDocumentEmbedder(api_base_url=url, progress_bar=False, **options)
    embedded = documents.run([haystack.Document(content=text) for text in TEXTS])["documents"]
    assert_same([document.embedding for document in embedded], expected(*TEXTS))
    assert_same([texts.run(TEXTS[0])["embedding"]], expected(TEXTS[0]))
    jina = pytest.importorskip("haystack_integrations.components.embedders.jina")
    images = jina.JinaDocumentImageEmbedder(base_url=f"{url}/embeddings", **options)
    files = [haystack.Document(content=None, meta={"file_path": str(path)}) for path in (RED, BLUE)]
    assert_same([document.embedding for document in images.run(files)["documents"]], expected(RED, BLUE))


def test_chroma(url: str, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    chromadb = pytest.importorskip("chromadb")
    functions = pytest.importorskip("chromadb.utils.embedding_functions")
    monkeypatch.setenv("CHROMA_OPENAI_API_KEY", "any")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    embed = functions.OpenAIEmbeddingFunction(api_base=url, model_name="gme")
    collection = chromadb.EphemeralClient().create_collection("shapes", embedding_function=embed)
    collection.add(ids=TEXTS[:2], documents=TEXTS[:2])
    collection.add(ids=["red", "blue"], embeddings=embed([uri(RED), uri(BLUE)]))
    stored = collection.get(include=["embeddings"])
    assert_same(stored["embeddings"], expected(*TEXTS[:2], RED, BLUE))
    assert collection.query(query_texts=["一个蓝色的星形"], n_results=1)["ids"] == [["blue"]]


OPENAI = """
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.SERVICE, apiKey: "any" });
const image = `data:image/png;base64,${readFileSync(process.env.IMAGE, "base64")}`;
const request = { model: "gme", input: ["a red circle", image], prompt: process.env.PROMPT };
const { data } = await client.embeddings.create(request);
console.log(JSON.stringify(data.map((entry) => entry.embedding)));
"""
LANGCHAIN = """
import { OpenAIEmbeddings } from "@langchain/openai";

const configuration = { baseURL: process.env.SERVICE };
const embeddings = new OpenAIEmbeddings({ model: "gme", apiKey: "any", configuration });
const texts = JSON.parse(process.env.TEXTS);
console.log(JSON.stringify([...(await embeddings.embedDocuments(texts)), await embeddings.embedQuery(texts[0])]));
"""


@pytest.fixture(scope="module")
def node(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """Run a module with the packages of npm, and read the JSON that it prints."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", *NPM]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm cannot install: {installed.stderr[:200]}")

    def node(module: str, **environment: str) -> object:
        (folder / "example.mjs").write_text(module)
        environment |= os.environ | {"SERVICE": f"{server.url}/v1"}
        done = subprocess.run(["node", "example.mjs"], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return node


def test_openai_in_node(node: Callable[..., object], expected: Expected) -> None:
    assert_same(node(OPENAI, IMAGE=str(RED), PROMPT=PROMPT), expected("a red circle", RED, prompt=PROMPT))


def test_langchain_in_node(node: Callable[..., object], expected: Expected) -> None:
    given = json.dumps([*TEXTS, URI])
    assert_same(node(LANGCHAIN, TEXTS=given), expected(*FLAT, RED, FLAT[0]))


TWO, BOTH = TEXTS[:2], [{"text": TEXTS[0]}, {"image": URI.partition(",")[2]}]
WEAVIATE = {"model": "gme", "embedding_type": "float"}
BODIES = {
    "Dify's Jina, text as jina-clip-v1": {"model": "jina-clip-v1", "input": [{"text": text} for text in TWO]},
    "Dify's Jina, images as jina-clip-v1": {"model": "jina-clip-v1", "input": BOTH},
    "Dify's OpenAI-compatible": {"model": "gme", "input": TWO, "encoding_format": "float"},
    "Weaviate's multi2vec-jinaai, to 1.32": {"input": BOTH, **WEAVIATE, "normalized": True, "dimensions": 128},
    "Chroma's Jina": {"model": "gme", "input": BOTH, "truncate": True, "embedding_type": "float", "normalized": True},
}


@pytest.mark.parametrize("sender", BODIES)
def test_a_body_of_others_is_answered(client: httpx.Client, expected: Expected, sender: str) -> None:
    answer = client.post("/v1/embeddings", json=BODIES[sender]).json()
    assert [(entry["object"], entry["index"]) for entry in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    image = "image" in BODIES[sender]["input"][1]
    assert_same([entry["embedding"] for entry in answer["data"]], expected(TWO[0], RED if image else TWO[1]))
    assert answer["usage"]["total_tokens"] > 0
