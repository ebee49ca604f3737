"""What clients send: each request of requests.json over a real server, and the functions that read them, without one.

`requests.json` has one request a line, as the named client sends it by default. `$URI` is the data URI of a picture,
`$FILE` the picture, `$QUERY_PROMPT` the value of GME_QUERY_PROMPT. `same_as`: the vectors are, number for number,
those of /embed/text or /embed/image. `refused`: 400 or 422, and a sentence in which this word stands.
"""

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import httpx
import numpy as np
import pytest
from conftest import TESTS, Address, serve, skip_with_an_address
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import gme_service as gme

QUERY_PROMPT = "Find an image that matches the given text."
FILE = (TESTS / "shapes" / "red_circle.png").read_bytes()
ENCODED = base64.b64encode(FILE).decode()
URI = f"data:image/png;base64,{ENCODED}"
PARTS = [{"type": "text", "text": "drawn"}, {"type": "image_url", "image_url": {"url": URI}}]
CLIENTS: list[dict[str, Any]] = json.loads((TESTS / "requests.json").read_text(encoding="utf-8").replace("$URI", URI))
SET = [sent for sent in CLIENTS if sent.get("refused") != "GME_QUERY_PROMPT"]  # those for a server that has it


# ---------------------------------------------------------------------------------------------------- over a server


@pytest.fixture(scope="module")
def prompted(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A server with GME_QUERY_PROMPT."""
    skip_with_an_address(pytestconfig, "it starts a server of its own")
    with serve(tmp_path_factory.mktemp("prompted") / "log", GME_QUERY_PROMPT=QUERY_PROMPT) as running:
        yield running


def own_routes(client: httpx.Client, wanted: dict[str, Any]) -> list[list[float]]:
    """The vectors that the service's own routes give."""
    prompt = wanted.get("prompt", "").replace("$QUERY_PROMPT", QUERY_PROMPT)
    if "texts" in wanted:
        answer = client.post("/embed/text", json={"texts": wanted["texts"], "prompt": prompt})
    else:
        form = {"text": wanted["text"], "prompt": prompt}
        answer = client.post("/embed/image", files={"file": FILE}, data=form)
    return answer.json()["embeddings"]


def check(client: httpx.Client, sent: dict[str, Any], refused: str | None) -> None:
    answer = client.request(sent["method"], sent["path"], json=sent["body"])
    if refused:
        assert answer.status_code in (400, 422), answer.text
        assert refused in answer.json()["detail"]
        return
    assert answer.status_code == 200, answer.text
    wanted = sent["same_as"] if isinstance(sent["same_as"], list) else [sent["same_as"]]
    expected = [vector for one in wanted for vector in own_routes(client, one)]
    np.testing.assert_array_equal([entry["embedding"] for entry in answer.json()["data"]], expected)


@pytest.mark.parametrize("sent", CLIENTS, ids=[sent["client"] for sent in CLIENTS])
def test_a_client_is_answered_as_by_the_own_routes_or_refused_by_name(
    client: httpx.Client, sent: dict[str, Any]
) -> None:
    needs_setting = "$QUERY_PROMPT" in str(sent)
    check(client, sent, "GME_QUERY_PROMPT" if needs_setting else sent.get("refused"))


@pytest.mark.parametrize("sent", SET, ids=[sent["client"] for sent in SET])
def test_a_client_is_answered_where_the_query_prompt_is_set(prompted: Address, sent: dict[str, Any]) -> None:
    with prompted.client() as client:
        check(client, sent, sent.get("refused"))


def test_a_text_is_cut_where_the_request_says_and_the_cache_knows(client: httpx.Client) -> None:
    def ask(**fields: object) -> httpx.Response:
        return client.post("/v1/embeddings", json={"input": ["a", 100 * "word "]} | fields)

    whole, cut = ask().json(), ask(truncate_prompt_tokens=40).json()
    assert cut["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"]
    assert cut["data"][0] == whole["data"][0]
    assert cut["data"][1] != whole["data"][1]
    assert ask(truncate_prompt_tokens=-1).json() == ask(truncate_prompt_tokens=10**9).json() == whole
    assert ask(truncate_prompt_tokens=40, truncate="END").json() == cut


def test_a_text_that_may_not_be_cut_is_refused_by_its_number(client: httpx.Client) -> None:
    for fields in ({"truncate": False}, {"truncate": "NONE"}, {"truncation": False}):
        for texts, status in ((["a", "b"], 200), (["a", 2000 * "word "], 400)):
            answer = client.post("/v1/embeddings", json={"input": texts} | fields)
            assert answer.status_code == status, answer.text
        assert answer.json()["detail"].startswith("Input 2: ")


# ---------------------------------------------------------------------------------------------- what there is to embed


@pytest.mark.parametrize(
    ("item", "content"),
    [
        ("a red circle", ("a red circle", None)),
        ("", ("", None)),
        (URI, ("", FILE)),
        ({"text": "drawn"}, ("drawn", None)),
        ({"image": ENCODED, "video": None}, ("", FILE)),
        ({"text": "drawn", "image": URI}, ("drawn", FILE)),
        ({"type": "text", "text": "drawn"}, ("drawn", None)),
        ({"type": "image_url", "image_url": URI}, ("", FILE)),
        ({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, ("", FILE)),
        ({"content": PARTS}, ("drawn", FILE)),
        ({"content": [*PARTS, {"type": "text", "text": "by hand"}]}, ("drawn\nby hand", FILE)),
        ({"content": [{"type": "text", "text": ""}, *PARTS[1:]]}, ("", FILE)),
        ({"content": [{"type": "text", "text": ""}]}, ("", None)),
        ({"content": "drawn"}, ("drawn", None)),
        ({"type": "text", "text": "drawn", "cache_control": {"type": "ephemeral"}}, ("drawn", None)),
    ],
)
def test_an_item_is_a_text_an_image_or_both(item: object, content: gme.Content) -> None:
    assert gme.read_item(item, "Input 1: ") == content


@pytest.mark.parametrize(
    ("item", "word"),
    [
        (None, "send a text"),
        ({}, "send a text"),
        (["a"], "send a text"),
        (1, "token"),
        ([1, 2], "check_embedding_ctx_length=False"),
        ({"video": "a.mp4"}, "video"),
        ({"text": "a", "audio": "b"}, "audio"),
        ({"text": 1}, "text"),
        ({"image": {"url": URI}}, "image"),
        ({"image_url": {"url": URI}}, "image_url"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "video_url", "video_url": {"url": URI}}, "video_url"),
        ({"type": "text", "text": "a", "image": URI}, "image"),
        ({"type": "text"}, "text"),
        ({"type": ["text"]}, "type"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": {"url": URI, "pages": 2}}, "pages"),
        ({"content": []}, "content"),
        ({"content": {}}, "content"),
        ({"content": ["a"]}, "Input 1: content: "),
        ({"content": PARTS, "role": "user"}, "role"),
        ({"content": [PARTS[1], PARTS[1]]}, "two images"),
        ({"image": "https://example.com/a.png"}, "no URL is fetched"),
        ({"type": "image_url", "image_url": {"url": "s3://bucket/a.png"}}, "no URL is fetched"),
        ({"image": "red.png"}, "not base64"),
        ("data:audio/wav;base64,aGFsbG8=", "audio/wav"),
        ({"image": "data:video/mp4;base64,aGFsbG8="}, "video/mp4"),
        ("data:image/svg+xml,<svg/>", "not base64"),
        ("data:image/png;base64,a", "not base64"),
    ],
)
def test_what_is_neither_is_refused_by_the_name_that_was_sent(item: object, word: str) -> None:
    with pytest.raises(gme.InputError, match=word) as refused:
        gme.read_item(item, "Input 1: ")
    assert str(refused.value).startswith("Input 1: ")
    assert word in ("token", "check_embedding_ctx_length=False") or "token" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        URI,
        f" \n{URI.replace('data:image/png;base64', 'DATA:Image/PNG;Base64')}",
        f"data:;base64,{ENCODED}",
        f"data:image;base64,{ENCODED}",
        f"data:image/png,{ENCODED}",
        f"data:application/octet-stream;base64,{ENCODED}",
        f'data:image/png;name="a, b.png";base64,{ENCODED}',
        f'data:text/x;name="a, b.png"; base64 ,{ENCODED}',
        "data:image/svg+xml,<svg/>",
        "data:audio/wav;base64,aGFsbG8=",
    ],
)
def test_a_data_uri_in_base64_or_of_an_image_is_an_image(text: str) -> None:
    assert gme.is_image(text)


@pytest.mark.parametrize(
    "text",
    [
        "data:audio/video, mixed corpora",
        "data:text/plain, and more",
        "data: a, b",
        "data:, a",
        "data:image/png",
        "data:image, video",
        "data:;" + 10_000_000 * '"',
        "data:a/b;" + 10_000_000 * ";",
        "see data:image/png;base64,AAAA",
        "https://example.com/a.png",
    ],
)
def test_any_other_string_is_a_text(text: str) -> None:
    assert gme.read_item(text, "Input 1: ") == (text, None)


@pytest.mark.parametrize(
    "encoded",
    [
        base64.encodebytes(FILE).decode(),
        ENCODED.rstrip("="),
        quote(ENCODED, safe=""),
        quote(base64.encodebytes(FILE)),
        "".join(f"%{byte:02x}" for byte in ENCODED.encode()),
        f" {ENCODED[:8]}\f\t{ENCODED[8:]} ",
    ],
)
def test_base64_is_read_as_browsers_do(encoded: str) -> None:
    assert gme.decode_base64(encoded) == FILE


@given(st.text(st.sampled_from("AZaz09+/=%4b2B \n"), max_size=12))
def test_percent_encoding_is_read_as_by_urllib(text: str) -> None:
    def decode(encoded: str) -> bytes | None:
        try:
            return gme.decode_base64(encoded)
        except ValueError:
            return None

    plain = text.translate({ord(character): None for character in " \n"})
    assert decode(text) == decode(unquote_to_bytes(plain).decode("latin-1"))


# ------------------------------------------------------------------------------------------------------ conversations

SYSTEM = {"role": "system", "content": QUERY_PROMPT}
USER = {"role": "user", "content": PARTS, "name": "me"}


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        ([USER], ("", ("drawn", FILE))),
        ([{"role": "user", "content": "a"}], ("", ("a", None))),
        ([{"role": "user", "content": URI}], ("", ("", FILE))),
        ([SYSTEM, USER], (QUERY_PROMPT, ("drawn", FILE))),
        *(([{"role": "system", "content": nothing}, USER], ("", ("drawn", FILE))) for nothing in (None, "", [])),
        ([{"role": "system", "content": [{"type": "text", "text": "Find."}]}, USER], ("Find.", ("drawn", FILE))),
        *(
            ([USER, {"role": "assistant", "content": nothing, "tool_calls": None}], ("", ("drawn", FILE)))
            for nothing in (None, "", " \n", [], [{"type": "text", "text": ""}])
        ),
    ],
)
def test_a_conversation_of_one_turn_is_an_item(messages: object, read: tuple[str, gme.Content]) -> None:
    assert gme.read_messages(messages) == read


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "messages"),
        ("a", "messages"),
        (["a"], "messages"),
        ([[USER]], "messages"),
        ([SYSTEM], "messages"),
        ([USER, USER], "messages"),
        ([SYSTEM, SYSTEM, USER], "messages"),
        ([{"role": "assistant", "content": ""}, USER], "assistant"),
        ([USER, {"role": "assistant", "content": "b"}], "assistant"),
        ([USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": URI}]}], "assistant"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}], "tool_calls"),
        ([USER, {"role": "tool", "content": "b"}], "tool"),
        ([{"role": ["user"], "content": "b"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 1}], "content"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "input_audio"),
        ([{"role": "user", "content": [PARTS[1], PARTS[1]]}], "image_url"),
        ([{"role": "system", "content": PARTS}, USER], "image_url"),
        ([{"role": "system", "content": URI}, USER], "image_url"),
    ],
)
def test_another_conversation_is_refused_by_name(messages: object, word: str) -> None:
    with pytest.raises((gme.InputError, gme.MalformedError), match=word) as refused:
        gme.read_messages(messages)
    assert str(refused.value).startswith("messages: ")


# ------------------------------------------------------------------------------------------------ what changes a vector


def read(**fields: object) -> list[gme.Source]:
    kept = gme.drop_neutral_fields(fields)
    return gme.read_sources(gme.OpenAIRequest.model_validate(kept), QUERY_PROMPT)


def instruction(**fields: object) -> str:
    (source,) = read(**({"input": "a"} | fields))
    return source.instruction


def test_documents_have_no_prompt_and_queries_that_of_the_setting() -> None:
    for kind in ("passage", "document", "search_document", "retrieval.passage", "RETRIEVAL_DOCUMENT", "image"):
        assert instruction(input_type=kind) == instruction(task=kind) == gme.DEFAULT_INSTRUCTION
    for kind in ("query", "search_query", "retrieval.query", "RETRIEVAL_QUERY"):
        assert instruction(input_type=kind) == instruction(task=kind) == QUERY_PROMPT
    assert instruction(input_type=None, task="") == gme.DEFAULT_INSTRUCTION
    assert instruction(input_type="query", task="retrieval.query", prompt="") == QUERY_PROMPT


def test_a_prompt_or_a_system_text_goes_first() -> None:
    assert instruction(input_type="query", prompt="Find.") == "Find."
    assert instruction(task="retrieval.query", input=None, messages=[SYSTEM | {"content": "Find."}, USER]) == "Find."
    assert instruction(input_type="passage", prompt="Find.") == "Find."


def test_a_text_is_cut_where_the_request_says() -> None:
    (source,) = read(input="a")
    assert (source.max_tokens, source.may_cut) == (None, True)
    for sent, max_tokens in ((1, 1), (511, 511), (10**30, 10**30), (-1, None), (None, None)):
        assert read(input="a", truncate_prompt_tokens=sent)[0].max_tokens == max_tokens
    for fields, may_cut in (
        ({"truncate": True}, True),
        ({"truncate": "END"}, True),
        ({"truncation": True}, True),
        ({"truncate": False}, False),
        ({"truncate": "NONE"}, False),
        ({"truncation": False}, False),
    ):
        assert read(input="a", **fields)[0].may_cut is may_cut


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"input": "a", "messages": []}, "messages"),
        ({}, "input"),
        ({"input": "a", "input_type": "classification"}, "input_type"),
        ({"input": "a", "task": "text-matching"}, "task"),
        ({"input": "a", "task": "text-matching", "prompt": "Find."}, "task"),
        ({"input": "a", "input_type": "query", "task": "retrieval.passage"}, "task"),
        ({"messages": [SYSTEM, USER], "prompt": "Find."}, "prompt"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate": "START"}, "truncate"),
        ({"input": "a", "instruction": "Find."}, "instruction"),
        ({"input": "a", "max_tokens": 8}, "max_tokens"),
        ({"input": "a", "tools": []}, "tools"),
        ({"input": "a", "normalized": False}, "normalized"),
        ({"input": "a", "normalized": 1}, "normalized"),
        ({"input": "a", "stream": True}, "stream"),
        ({"input": "a", "output_dtype": "int8"}, "output_dtype"),
        ({"input": "a", "options": {"num_ctx": 64}}, "options"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, object], word: str) -> None:
    with pytest.raises((gme.InputError, gme.MalformedError, ValidationError), match=word):
        read(**fields)


OTHERS: dict[str, dict[str, object]] = {  # what clients of other servers send besides, by default or by habit
    "Voyage": {"input_type": None, "truncation": True, "output_dtype": "float", "output_dimension": None},
    "Jina": {"late_chunking": False, "embedding_type": "float", "return_multivector": False, "normalized": True},
    "Mistral": {"output_dtype": "float", "encoding_format": "float"},
    "Cohere": {"input_type": "search_document", "embedding_types": ["float"], "truncate": "END"},
    "vLLM": {"add_special_tokens": True, "priority": 0, "request_id": "1", "normalize": True, "embed_dtype": "float32"},
    "Ollama": {"keep_alive": "5m", "options": {}, "truncate": True},
    "LiteLLM": {"drop_params": True, "timeout": 600, "user": None},
    "gateways": {"stream": False, "n": 1, "stop": None, "top_k": 40, "logit_bias": {}, "store": False},
}


@pytest.mark.parametrize("sender", OTHERS)
def test_what_other_servers_clients_send_besides_changes_nothing(sender: str) -> None:
    assert read(input="a", **OTHERS[sender]) == read(input="a")


def test_each_field_is_on_one_list() -> None:
    served, past, past_as = map(set, (gme.OpenAIRequest.model_fields, gme.READ_PAST, gme.READ_PAST_AS))
    assert not served & past | served & past_as | past & past_as


# --------------------------------------------------------------------------------------------------------------- JSON

parse: Callable[[bytes], dict[str, Any]] = gme.parse_object


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse(b'\xef\xbb\xbf{"a": "\xe4\xb8\x80"}') == {"a": "一"}


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (rb"\ud83d", "\ufffd"),
        (rb"\uDE00", "\ufffd"),
        (rb"\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
        (rb"a\ud83db\u00e9", "a\ufffdbé"),
        (rb"\\ud83d\ud83d", "\\ud83d\ufffd"),
        (rb"\\\ud83d\\\\\"", '\\\ufffd\\\\"'),
    ],
)
def test_half_a_surrogate_pair_is_the_replacement_character(escaped: bytes, text: str) -> None:
    assert parse(b'{"a": "%s"}' % escaped) == {"a": text}


@given(st.text(st.sampled_from('\ud83d\ude00\\"ua😀é\n'), max_size=8))
def test_any_string_is_read_as_browsers_encode_it(text: str) -> None:
    utf16 = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert parse(json.dumps({"a": text}).encode()) == {"a": utf16}
