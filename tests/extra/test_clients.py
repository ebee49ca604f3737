"""The clients that users have already, each as deploy/CLIENTS.md has it, over a live server.

Every vector has to be the one that the service's own routes give. What programs send that do not run in a test was read
in their code: it stands in tests/requests.json, and at the end of this file.
"""

import asyncio
import base64
import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import QUIET, ROOT, TESTS, Server

openai = pytest.importorskip("openai")


def uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


PROMPT = "Find an image that matches the given text."
TEXTS = ["a red circle", "一个红色的圆形", "a blue star\nbelow a green triangle", "a red circle"]
FLAT = [text.replace("\n", " ") for text in TEXTS]  # as some clients send them
RED, BLUE = TESTS / "shapes" / "red_circle.png", TESTS / "shapes" / "blue_star.png"
URI = uri(RED)
NPM = ["openai@^6", "@langchain/openai@^1", "@langchain/core@^1", "ai@^7", "@ai-sdk/openai-compatible@^3"]
NPM += ["@cherrystudio/embedjs-openai@^0.1"]
os.environ.update(QUIET)  # nothing here asks another host

Expected = Callable[..., np.ndarray]
CLIENTS, CHINESE = ROOT / "deploy" / "CLIENTS.md", ROOT / "deploy" / "CLIENTS.zh-CN.md"
ROW = re.compile(
    r"^\| (?P<client>.+?) \| (?P<code>.+) \| (?P<prompt>.+?) \| (?P<tested>client|request) \|$", re.MULTILINE
)
ROWS = {row["client"].replace("`", ""): row for row in ROW.finditer(CLIENTS.read_text(encoding="utf-8"))}


def of_page(client: str, url: str, prompt: str | None = None, **names: object) -> object:
    """What the page's row for this client evaluates to, or skip where the client is not installed."""
    (row,) = (row for name, row in ROWS.items() if name.startswith(client))
    module = pytest.importorskip(row["client"].split("`")[1])
    code = row["code"].strip("`")
    if prompt:
        argument = row["prompt"].split("`")[1]
        code = code.removesuffix(")") + f", {argument})"
    imported = {name: getattr(module, name) for name in re.findall(r"\w+", code) if hasattr(module, name)}
    if "Secret" in code:
        imported["Secret"] = importlib.import_module("haystack.utils").Secret
    return eval(code, imported | names | {"URL": url, "PROMPT": prompt})


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


def vectors(answer: openai.types.CreateEmbeddingResponse) -> list[list[float]]:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return [entry.embedding for entry in answer.data]


def test_openai(url: str, expected: Expected) -> None:
    with of_page("OpenAI", url) as api:
        answer = api.embeddings.create(model="gme", input=[*TEXTS, URI], extra_body={"prompt": PROMPT})
        assert_same(vectors(answer), expected(*TEXTS, RED, prompt=PROMPT))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4 * 20 + 256
        (model,) = api.models.list()
        assert model.id == answer.model == "toy/shapes"
        assert_same(vectors(api.embeddings.create(model="gme", input=URI)), expected(RED))


def test_langchain(url: str, expected: Expected) -> None:
    documents, queries = of_page("LangChain ", url), of_page("LangChain ", url, PROMPT)
    assert_same(documents.embed_documents([*TEXTS, URI]), expected(*TEXTS, RED))
    assert_same(asyncio.run(documents.aembed_documents(TEXTS)), expected(*TEXTS))
    assert_same([queries.embed_query(TEXTS[0])], expected(TEXTS[0], prompt=PROMPT))


def test_llama_index(url: str, expected: Expected) -> None:
    documents, queries = of_page("LlamaIndex", url), of_page("LlamaIndex", url, PROMPT)
    documents.embed_batch_size = 3
    assert_same(documents.get_text_embedding_batch([*TEXTS, URI]), expected(*FLAT, RED))
    assert_same(asyncio.run(documents.aget_text_embedding_batch(TEXTS)), expected(*FLAT))
    assert_same([queries.get_query_embedding(TEXTS[0])], expected(TEXTS[0], prompt=PROMPT))


def test_litellm(url: str, expected: Expected) -> None:
    def embed(given: object, prompt: str | None = None) -> list[list[float]]:
        answer = of_page("LiteLLM", url, prompt, INPUT=given)
        assert answer.usage.total_tokens > 0
        return [entry["embedding"] for entry in answer.data]

    assert_same(embed(TEXTS), expected(*TEXTS))
    assert_same(embed(["a red circle", URI]), expected("a red circle", RED))
    assert_same(embed(URI), expected(RED))
    assert_same(embed(["a red circle"], PROMPT), expected("a red circle", prompt=PROMPT))
    assert_same(embed([{"text": "a red circle", "image": URI}]), expected((RED, "a red circle")))


def test_haystack(url: str, expected: Expected) -> None:
    haystack = pytest.importorskip("haystack")
    texts, documents, images = (of_page(f"Haystack, {kind}", url) for kind in ("texts", "documents", "pictures"))
    embedded = documents.run([haystack.Document(content=text) for text in TEXTS])["documents"]
    assert_same([document.embedding for document in embedded], expected(*TEXTS))
    assert_same([texts.run(TEXTS[0])["embedding"]], expected(TEXTS[0]))
    files = [haystack.Document(content=None, meta={"file_path": str(path)}) for path in (RED, BLUE)]
    assert_same([document.embedding for document in images.run(files)["documents"]], expected(RED, BLUE))


def test_chroma(url: str, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    chromadb = pytest.importorskip("chromadb")
    monkeypatch.setenv("CHROMA_OPENAI_API_KEY", "any")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    embed = of_page("Chroma", url)
    collection = chromadb.EphemeralClient().create_collection("shapes", embedding_function=embed)
    collection.add(ids=TEXTS[:2], documents=TEXTS[:2])
    collection.add(ids=["red", "blue"], embeddings=embed([uri(RED), uri(BLUE)]))
    stored = collection.get(include=["embeddings"])
    assert_same(stored["embeddings"], expected(*TEXTS[:2], RED, BLUE))
    assert collection.query(query_texts=["一个蓝色的星形"], n_results=1)["ids"] == [["blue"]]


# The page's code takes the place of $CODE
OPENAI = """
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const image = `data:image/png;base64,${readFileSync(process.env.IMAGE, "base64")}`;
const request = { model: "gme", input: ["a red circle", image], prompt: process.env.PROMPT };
const { data } = await ($CODE).embeddings.create(request);
console.log(JSON.stringify(data.map((entry) => entry.embedding)));
"""
LANGCHAIN = """
import { OpenAIEmbeddings } from "@langchain/openai";

const embeddings = $CODE;
const texts = JSON.parse(process.env.TEXTS);
console.log(JSON.stringify([...(await embeddings.embedDocuments(texts)), await embeddings.embedQuery(texts[0])]));
"""
VERCEL = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany } from "ai";

const model = $CODE;
const { embeddings } = await embedMany({ model, values: JSON.parse(process.env.TEXTS) });
console.log(JSON.stringify(embeddings));
"""
CHERRY = """
import { OpenAiEmbeddings } from "@cherrystudio/embedjs-openai";

const rows = [];
for (const dimensions of [undefined, 128]) {
    const options = { model: "gme", apiKey: "any", dimensions, configuration: { baseURL: URL } };
    rows.push(...(await new OpenAiEmbeddings(options).embedDocuments(JSON.parse(process.env.TEXTS))));
}
console.log(JSON.stringify(rows));
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

    def node(client: str, module: str, **environment: str) -> object:
        imports, _, rest = module.replace("$CODE", ROWS[client]["code"].strip("`")).rpartition("\n\n")
        (folder / "example.mjs").write_text(f"{imports}\nconst URL = process.env.SERVICE;\n{rest}")
        environment |= os.environ | {"SERVICE": f"{server.url}/v1"}
        done = subprocess.run(["node", "example.mjs"], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return node


def test_openai_in_node(node: Callable[..., object], expected: Expected) -> None:
    given = node("openai", OPENAI, IMAGE=str(RED), PROMPT=PROMPT)
    assert_same(given, expected("a red circle", RED, prompt=PROMPT))


def test_langchain_in_node(node: Callable[..., object], expected: Expected) -> None:
    given = node("@langchain/openai", LANGCHAIN, TEXTS=json.dumps([*TEXTS, URI]))
    assert_same(given, expected(*FLAT, RED, FLAT[0]))


def test_vercel_in_node(node: Callable[..., object], expected: Expected) -> None:
    given = node("@ai-sdk/openai-compatible", VERCEL, TEXTS=json.dumps([*TEXTS, URI]))
    assert_same(given, expected(*TEXTS, RED))


def test_cherry_studio(node: Callable[..., object], expected: Expected) -> None:
    given = node("Cherry Studio", CHERRY, TEXTS=json.dumps(TEXTS[:2]))
    assert_same(given, expected(*TEXTS[:2], *TEXTS[:2]))


TWO, BOTH = TEXTS[:2], [{"text": TEXTS[0]}, {"image": URI.partition(",")[2]}]
WEAVIATE = {"model": "gme", "embedding_type": "float"}
BODIES = {
    "Dify's Jina, text as jina-clip-v1": {"model": "jina-clip-v1", "input": [{"text": text} for text in TWO]},
    "Dify's Jina, images as jina-clip-v1": {"model": "jina-clip-v1", "input": BOTH},
    "Weaviate's multi2vec-jinaai, to 1.32": {"input": BOTH, **WEAVIATE, "normalized": True, "dimensions": 128},
    "nexent, text": {"model": "gme", "input": TWO},
    "one-api": {"model": "gme", "input": TWO, "encoding_format": "float", "user": "u-1"},
    "LangChain4j": {"model": "gme", "input": TWO},
    "Spring AI 1": {"input": TWO, "model": "gme"},
    "Chroma's Jina": {"model": "gme", "input": BOTH, "truncate": True, "embedding_type": "float", "normalized": True},
}


@pytest.mark.parametrize("sender", BODIES)
def test_a_body_of_others_is_answered(client: httpx.Client, expected: Expected, sender: str) -> None:
    answer = client.post("/v1/embeddings", json=BODIES[sender]).json()
    assert [(entry["object"], entry["index"]) for entry in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    image = "image" in BODIES[sender]["input"][1]
    assert_same([entry["embedding"] for entry in answer["data"]], expected(TWO[0], RED if image else TWO[1]))
    assert answer["usage"]["total_tokens"] > 0


def test_each_row_of_the_page_has_its_test() -> None:
    with_the_client = [client.split(" `")[0].split()[0] for client, row in ROWS.items() if row["tested"] == "client"]
    tested = "Cherry OpenAI LangChain LlamaIndex LiteLLM Haystack, Haystack, Haystack, Chroma"
    assert with_the_client == [*tested.split(), "openai", "@langchain/openai", "@ai-sdk/openai-compatible"]
    requests = json.loads((TESTS / "requests.json").read_text(encoding="utf-8"))
    senders = " ".join([*BODIES, *(request["client"] for request in requests)])
    for client in (client for client, row in ROWS.items() if row["tested"] == "request"):
        assert re.search(rf"\b{re.split(', | ', client)[0]}\b", senders), client


def test_the_two_pages_say_the_same_of_the_same() -> None:
    marks = re.compile(r"^(?:#+|-|\|) |`[^`]*`", re.MULTILINE)
    english, chinese = (marks.findall(page.read_text(encoding="utf-8")) for page in (CLIENTS, CHINESE))
    assert english == chinese
