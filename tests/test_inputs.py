"""Room Inputs: what clients send becomes the token ids and pixel patches of the authors' code, or a clear refusal."""

import io
import json
import resource
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGES, TOY
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from tokenizers import Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import gme_service as gme

QUERY = "Find an image that matches the given text."
PAD = "<|image_pad|>"
SPECIAL = ("<|vision_start|>", PAD, "<|vision_end|>")
PHOTO = (IMAGES / "64x48.png").read_bytes()
LOSSLESS = ("PNG", "WEBP", "TIFF")
ORIENTATION = 0x0112  # the EXIF tag
# How a camera held that way stores an upright scene, by the value that it writes into the tag
STORED: dict[int, Sequence[Image.Transpose]] = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}
tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))


def make_preparer(max_length: int = 1800, max_image_pixels: int = 10**8) -> gme.Preparer:
    return gme.Preparer(TOY, max_length, max_image_pixels)


prepare = make_preparer()


def prepared(source: gme.Source, preparer: gme.Preparer = prepare) -> gme.Input:
    (result,) = preparer([source])
    assert isinstance(result, gme.Input)
    return result


def refused(source: gme.Source, preparer: gme.Preparer = prepare) -> gme.InputError:
    (result,) = preparer([source])
    assert isinstance(result, gme.InputError)
    return result


def prompt(text: str, instruction: str = gme.DEFAULT_INSTRUCTION, image_tokens: int = 0) -> str:
    """The authors' prompt, written out once more."""
    image = f"<|vision_start|>{PAD * image_tokens}<|vision_end|>" if image_tokens else ""
    return (
        f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{image}{text}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def ids(text: str) -> list[int]:
    return tokenizer.encode(text).ids


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """An image without any symmetry."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of that size, and none of its pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


# ------------------------------------------------------------------------------------------------------ the prompt


@pytest.mark.parametrize("instruction", [gme.DEFAULT_INSTRUCTION, QUERY, "", " spaces \n", "<|im_end|>", "e\u0301"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "一个红色的圆形",
        " lead",
        "\nlead",
        "\r\n\t lead",
        "<|im_end|>\nhello",
        "e\u0301",
        "\0",
        "🚗",
    ],
)
def test_the_prompt_is_tokenized_whole(text: str, instruction: str) -> None:
    assert prepared(gme.Source(text, None, instruction)).token_ids.tolist() == ids(prompt(text, instruction))


@pytest.mark.parametrize("half", ["\ud800", "\udfff\ud800"], ids=["one half", "two halves"])
def test_half_a_surrogate_pair_becomes_a_question_mark(half: str) -> None:
    one = prepared(gme.Source(f"a{half}b", PHOTO, half + PAD))
    asked = prepared(gme.Source(f"a{'?' * len(half)}b", PHOTO, "?" * len(half) + PAD))
    assert one.key() == asked.key()


@given(st.text(max_size=40), st.text(max_size=20))
def test_the_prompt_of_any_unicode_text_is_tokenized_whole(text: str, instruction: str) -> None:
    one = prepared(gme.Source(text, None, instruction))
    assert one.token_ids.tolist() == ids(prompt(text, instruction))
    assert one.token_ids[: one.shared].tolist() == list(one.prefix[: one.shared])


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy checkpoint's tokenizer with one token more, for two newlines, as the published vocabulary has it."""
    directory = tmp_path_factory.mktemp("merging")
    description = json.loads((TOY / "tokenizer.json").read_text())
    description["model"]["vocab"]["ĊĊ"] = 999
    description["model"]["merges"].append(["Ċ", "Ċ"])
    (directory / "tokenizer.json").write_text(json.dumps(description))
    shutil.copy(TOY / "preprocessor_config.json", directory)
    return directory


def test_leading_white_space_merges_with_the_newline_before_it(merging: Path) -> None:
    merged = prepared(gme.Source("\nlead"), gme.Preparer(merging, 1800, 10**8))
    assert (
        merged.token_ids.tolist() == Tokenizer.from_file(str(merging / "tokenizer.json")).encode(prompt("\nlead")).ids
    )
    assert merged.token_ids[len(merged.prefix) - 1] == 999


def test_the_shared_prefix_is_found_by_token_ids(merging: Path) -> None:
    preparer = gme.Preparer(merging, 1800, 10**8)
    plain, merged = prepared(gme.Source("lead"), preparer), prepared(gme.Source("\nlead"), preparer)
    assert plain.prefix == merged.prefix
    assert plain.shared == len(plain.prefix)
    assert merged.shared == len(merged.prefix) - 1  # its last newline has become part of another token


def test_an_image_keeps_the_whole_prefix(merging: Path) -> None:
    one = prepared(gme.Source("\nlead", PHOTO), gme.Preparer(merging, 1800, 10**8))
    assert one.shared == len(one.prefix)
    assert one.image_start == one.shared + 1


def test_the_cost_is_what_the_prefix_does_not_hold() -> None:
    one = prepared(gme.Source("a red circle"))
    assert one.cost == len(ids(prompt("a red circle"))) - len(one.prefix)


def test_instructions_of_one_call_keep_their_own_prefixes() -> None:
    instructions = [QUERY, gme.DEFAULT_INSTRUCTION, QUERY]
    together = prepare([gme.Source("a", None, instruction) for instruction in instructions])
    for instruction, one in zip(instructions, together, strict=True):
        assert isinstance(one, gme.Input)
        assert one.token_ids.tolist() == ids(prompt("a", instruction))
        assert one.prefix == tuple(ids(gme.HEAD.format(instruction)))


# ------------------------------------------------------------------------------------------------------ truncation


@pytest.mark.parametrize("text", ["word " * 3000, "多模态检索" * 1500, f"{PAD}" * 2000, "\n" * 4000])
def test_a_long_text_is_cut_on_the_right_with_its_suffix(text: str) -> None:
    token_ids = prepared(gme.Source(text)).token_ids.tolist()
    assert len(token_ids) == 1800
    assert token_ids == ids(prompt(text))[:1800]


@pytest.mark.parametrize("over", range(-1, 8))
def test_the_suffix_counts_and_is_cut_first(over: int) -> None:
    preparer = make_preparer(max_length=64)
    text = "a" + " a" * (63 - len(ids(prompt("a"))) + over)
    whole = ids(prompt(text))
    assert len(whole) == 63 + over
    assert prepared(gme.Source(text), preparer).token_ids.tolist() == whole[:64]


def test_an_instruction_past_the_limit_leaves_one_token_to_compute() -> None:
    one = prepared(gme.Source("a", None, "word " * 5000))
    assert len(one.token_ids) == len(one.prefix) == 1800
    assert one.cost == 1


LONGEST = max(map(len, tokenizer.get_vocab()))  # of a token, in characters


@pytest.mark.parametrize(
    "piece", ["a", " ", "\n", "word ", "multimodal ", "<|object_ref_start|>", "é", "u\u0308\u0304", "ᄒ\u1161\u11ab"]
)
@pytest.mark.parametrize("around", [-3, 0, 1, 50])
def test_a_text_too_long_to_matter_is_cut_where_no_token_changes(piece: str, around: int) -> None:
    preparer = make_preparer(max_length=64)
    text = (piece * (64 * LONGEST))[: 64 * LONGEST + around]
    assert prepared(gme.Source(text), preparer).token_ids.tolist() == ids(prompt(text))[:64]


@pytest.mark.parametrize("text", ["", "a", " lead", "\n\n lead", "\u0301", "<|im_end|>", "word " * 20])
@pytest.mark.parametrize("words", [*range(40, 60), 63, 64, 65, 1000])
def test_an_instruction_that_takes_all_tokens_is_cut_as_the_whole_prompt_is(words: int, text: str) -> None:
    preparer = make_preparer(max_length=64)
    instruction = "a " * words
    alone = prepared(gme.Source(text, None, instruction), preparer)
    assert alone.token_ids.tolist() == ids(prompt(text, instruction))[:64]
    assert list(alone.prefix[: alone.shared]) == alone.token_ids[: alone.shared].tolist()


def test_an_image_behind_an_instruction_that_takes_all_tokens_is_refused() -> None:
    assert "does not fit behind the prompt" in str(refused(gme.Source("", PHOTO, "a " * 5000)))


@pytest.mark.parametrize("text", ["a" * 30_000_000, "word " * 6_000_000, "\u0301" * 15_000_000])
def test_a_30_mb_text_is_the_same_as_its_beginning(text: str) -> None:
    whole, beginning = prepare([gme.Source(text), gme.Source(text[:100_000])])
    assert isinstance(whole, gme.Input)
    assert isinstance(beginning, gme.Input)
    assert whole.token_ids.tolist() == beginning.token_ids.tolist()


# ---------------------------------------------------------------------------------------------------- image tokens


@pytest.mark.parametrize("text", ["", "a red circle", f"see {PAD} here", "".join(SPECIAL), " lead", "e\u0301" + PAD])
@pytest.mark.parametrize(
    "instruction",
    [gme.DEFAULT_INSTRUCTION, PAD, "".join(SPECIAL), f"e\u0301o\u0308 {PAD}", "ᄒ\u1161\u11ab" * 20, "🚗" + PAD * 3],
)
def test_image_tokens_are_placed_by_position(text: str, instruction: str) -> None:
    one = prepared(gme.Source(text, PHOTO, instruction))
    assert one.image_grid_thw is not None
    count = one.image_grid_thw[1] * one.image_grid_thw[2] // 4
    assert one.token_ids.tolist() == ids(prompt(text, instruction, count))
    before = prompt("", instruction, 1).partition("<|im_start|>user")[0] + "<|im_start|>user\n<|vision_start|>"
    if "<|im_end|>" not in instruction:
        assert one.image_start == len(ids(before))
    assert one.token_ids[one.image_start - 1] == tokenizer.token_to_id("<|vision_start|>")
    assert one.token_ids[one.image_start + count] == tokenizer.token_to_id("<|vision_end|>")


def test_a_text_that_shows_image_tokens_has_no_image() -> None:
    one = prepared(gme.Source(SPECIAL[0] + PAD * 256 + SPECIAL[2]))
    assert one.pixel_values is None
    assert one.token_ids.tolist() == ids(prompt("", image_tokens=256))


def test_a_long_text_behind_an_image_is_cut_and_the_image_is_not() -> None:
    one = prepared(gme.Source("word " * 3000, PHOTO))
    assert one.token_ids.tolist() == ids(prompt("word " * 3000, image_tokens=tokens(one)))[:1800]


def tokens(one: gme.Input) -> int:
    """How many tokens the image of an input takes."""
    assert one.pixel_values is not None
    return len(one.pixel_values) // 4


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_an_image_that_just_fits_behind_the_prompt_is_taken(spare: int) -> None:
    start = prepared(gme.Source("", PHOTO)).image_start
    one = prepared(gme.Source("text", PHOTO), make_preparer(start + tokens(prepared(gme.Source("", PHOTO))) + spare))
    assert one.image_start + tokens(one) + spare == len(one.token_ids)


def test_an_image_that_does_not_fit_behind_the_prompt_is_refused() -> None:
    start = prepared(gme.Source("", PHOTO)).image_start
    count = tokens(prepared(gme.Source("", PHOTO)))
    error = refused(gme.Source("", PHOTO), make_preparer(start + count - 1))
    assert f"takes {count} tokens" in str(error)
    assert "send a shorter prompt" in str(error)


@pytest.mark.parametrize("characters", [9_000, 1_000_000])
def test_an_image_behind_a_prompt_past_the_limit_is_refused(characters: int) -> None:
    assert "send a shorter prompt" in str(refused(gme.Source("", PHOTO, "word " * (characters // 5))))


# ---------------------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1, 1), (56, 56)),
        ((28, 28), (56, 56)),
        ((64, 48), (56, 56)),
        ((448, 448), (448, 448)),
        ((800, 600), (812, 588)),
        ((14, 14), (56, 56)),
        ((70, 70), (56, 56)),  # 2.5 rounds to even
        ((98, 98), (112, 112)),  # 3.5 too
        ((2400, 1600), (2408, 1596)),
        ((1, 600), (28, 588)),
        ((3, 1200), (28, 1204)),
        ((10_000, 10_000), (3556, 3556)),  # 3584 but for the last bit of a float, as theirs
        ((1, 20_000_000), (28, 5600)),
        ((20_000_000, 1), (5600, 28)),
        ((100, 65_500), (112, 22_400)),
    ],
)
def test_the_first_resize(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert gme.first_resize(*size) == resized


@given(st.integers(28, 10**5), st.integers(28, 10**5))
def test_the_first_resize_is_qwens_own_where_no_side_is_tiny(width: int, height: int) -> None:
    assume(max(width, height) <= 150 * min(width, height))
    h, w = smart_resize(height, width, 28, 4 * 28**2, 16384 * 28**2)
    assert gme.first_resize(width, height) == (w, h)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_first_resize_keeps_its_bounds(width: int, height: int) -> None:
    w, h = gme.first_resize(width, height)
    assert w % 28 == h % 28 == 0
    assert min(w, h) >= 28
    assert 4 * 28**2 <= w * h <= 16384 * 28**2
    assert max(w, h) <= 200 * min(w, h)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_first_resize_knows_no_upright(width: int, height: int) -> None:
    assert gme.first_resize(width, height) == gme.first_resize(height, width)[::-1]


@pytest.mark.parametrize("size", [(1, 1), (1, 600), (600, 1), (1, 100_000), (100_000, 1), (5000, 3000)])
def test_an_image_of_any_shape_is_seen_with_256_to_1280_tokens(size: tuple[int, int]) -> None:
    one = prepared(gme.Source("", save(Image.new("RGB", size, "red"), "PNG")))
    assert one.image_grid_thw is not None
    assert one.pixel_values is not None
    assert one.pixel_values.shape == (one.image_grid_thw[1] * one.image_grid_thw[2], 1176)
    assert 256 <= tokens(one) <= 1280


# ----------------------------------------------------------------------------------------------- EXIF orientation


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("value", STORED)
def test_an_image_is_embedded_upright(value: int, kind: str) -> None:
    upright = picture()
    stored = upright
    for step in STORED[value]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION] = value
    seen = prepared(gme.Source("", save(stored, kind, exif=exif, lossless=True)))
    expected = prepared(gme.Source("", save(upright, "PNG")))
    assert seen.image_grid_thw == expected.image_grid_thw
    np.testing.assert_array_equal(seen.pixel_values, expected.pixel_values)


@pytest.mark.parametrize("value", STORED)
def test_a_phone_photo_is_embedded_upright(value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    jpeg = save(picture(), "JPEG", exif=exif)
    upright = Image.open(io.BytesIO(jpeg)).convert("RGB")
    for step in STORED[{6: 8, 8: 6}.get(value, value)]:  # the way back
        upright = upright.transpose(step)
    expected = prepared(gme.Source("", save(upright, "BMP")))
    np.testing.assert_array_equal(prepared(gme.Source("", jpeg)).pixel_values, expected.pixel_values)


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_means_nothing_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    seen = prepared(gme.Source("", save(picture(), "PNG", exif=exif)))
    np.testing.assert_array_equal(seen.pixel_values, prepared(gme.Source("", save(picture(), "PNG"))).pixel_values)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_broken_metadata_is_an_image_or_a_refusal(exif: bytes) -> None:
    (result,) = prepare([gme.Source("", save(picture(), "JPEG", exif=exif))])
    assert isinstance(result, gme.Input | gme.InputError)


# --------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_a_named_format_is_opened(kind: str) -> None:
    options = {"save_all": True, "append_images": [picture()]} if kind == "MPO" else {}
    assert tokens(prepared(gme.Source("", save(picture(), kind, **options)))) == 280


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "MPO", "AVIF"])
def test_of_many_frames_the_first_is_seen(kind: str) -> None:
    first, second = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (60, 40), "blue")
    moving = prepared(gme.Source("", save(first, kind, save_all=True, append_images=[second], lossless=True)))
    still = prepared(gme.Source("", save(first, kind, lossless=True)))
    np.testing.assert_array_equal(moving.pixel_values, still.pixel_values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_an_image_of_any_mode_is_seen_in_rgb(mode: str) -> None:
    image = picture().convert(mode) if mode != "I;16" else Image.new("I;16", (60, 40), 1000)
    seen = prepared(gme.Source("", save(image, "PNG")))
    expected = prepared(gme.Source("", save(image.convert("RGB"), "PNG")))
    np.testing.assert_array_equal(seen.pixel_values, expected.pixel_values)


OTHERS = {
    **{kind: save(picture(), kind) for kind in ("EPS", "PDF", "ICO", "PPM", "TGA", "DDS", "PCX", "JPEG2000", "ICNS")},
    "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(64),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    "HTML as JPEG": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "JPEG with HTML in it": b"\xff\xd8\xff\xe0<html>" + b" " * 100,
    "zero bytes": b"",
    "one byte": b"\xff",
    "zeros": bytes(4096),
    "text": "示例句子".encode(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_image_is_refused(name: str) -> None:
    error = refused(gme.Source("", OTHERS[name]))
    assert "send a whole file in one of the formats JPEG, PNG" in str(error)
    assert "KeyError" not in str(error)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["448x448.png", "2400x1600.jpg", "photo.webp", "mode_CMYK.jpg"])
def test_a_file_that_was_cut_short_is_refused(name: str, part: float) -> None:
    data = (IMAGES / name).read_bytes()
    refused(gme.Source("", data[: int(part * len(data))]))


def test_a_refused_input_leaves_its_neighbours_alone() -> None:
    good, bad, other = prepare([gme.Source("", PHOTO), gme.Source("", b"<html>"), gme.Source("a")])
    assert isinstance(bad, gme.InputError)
    assert isinstance(good, gme.Input)
    assert good.key() == prepared(gme.Source("", PHOTO)).key()
    assert isinstance(other, gme.Input)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` in front of every other, which leaves a trace; the path of the trace."""
    trace, program = tmp_path / "trace", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return trace


def test_eps_never_reaches_ghostscript(ghostscript: Path) -> None:
    refused(gme.Source("", OTHERS["EPS"]))
    assert not ghostscript.exists()
    with pytest.raises(OSError, match=r".*"), Image.open(io.BytesIO(OTHERS["EPS"])) as image:
        image.load()
    assert ghostscript.exists()  # so that is what Pillow would have done


# ----------------------------------------------------------------------------------------------------- pixel limit


def gif(screen: tuple[int, int], frame: tuple[int, int], disposal: int = 0) -> bytes:
    return (
        b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
        + b"!\xf9\x04" + bytes([disposal << 2, 0, 0, 0, 0])
        + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"
    )  # fmt: skip


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def jpeg(width: int, height: int) -> bytes:
    data = save(picture(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def tiff(width: int, height: int, tile: int) -> bytes:
    """A TIFF in one deflated tile, which is read as a whole however small the image in its corner is."""
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, tile),
        (323, tile),
        (324, 8),
        (325, 0),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        png_header(50_000, 50_000),
        png_header(2**31 - 1, 2**31 - 1),
        gif((50_000, 50_000), (1, 1)),
        gif((1, 1), (50_000, 50_000)),  # a frame larger than its screen
        gif((1, 1), (50_000, 50_000), disposal=2),  # for which Pillow makes an image before it is asked to
        bmp(50_000, 50_000),
        bmp(50_000, -50_000),
        jpeg(50_000, 50_000),
        tiff(50_000, 50_000, 64),
        tiff(64, 48, 40_000),
    ],
    ids=[
        "png",
        "largest png",
        "gif screen",
        "gif frame",
        "gif disposal",
        "bmp",
        "bmp top down",
        "jpeg",
        "tiff",
        "tiff tile",
    ],
)
def test_too_many_pixels_are_refused_from_the_header(data: bytes) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(gme.Source("", data))  # none of these has the pixels, so that decoding would fail otherwise
    assert isinstance(error, gme.ImageTooLargeError)
    assert "more than the 100000000 pixels that are accepted: scale it down" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB


def test_the_pixel_limit_is_inclusive() -> None:
    prepared(gme.Source("", PHOTO), make_preparer(max_image_pixels=64 * 48))
    assert isinstance(
        refused(gme.Source("", PHOTO), make_preparer(max_image_pixels=64 * 48 - 1)), gme.ImageTooLargeError
    )


def progressive(scans: int) -> bytes:
    """A JPEG that repeats its last scan. Each costs a pass over all pixels, and takes but some bytes of the file."""
    data = save(picture(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_and_one_of_some_is_not() -> None:
    prepared(gme.Source("", progressive(0)))
    prepared(gme.Source("", progressive(20)))
    refused(gme.Source("", progressive(5000)))


@pytest.mark.parametrize(
    ("kind", "at", "part"),
    [
        ("JPEG", 2, b"\xff\xe1\x00\x0cExif\0\0abcd"),
        ("JPEG", 2, b"\xff\xe3\x00\x02"),
        ("PNG", 33, struct.pack(">I4sI", 0, b"abCd", zlib.crc32(b"abCd"))),
    ],
    ids=["exif", "application", "chunk"],
)
def test_a_file_of_a_million_parts_is_refused_and_one_of_hundreds_is_not(kind: str, at: int, part: bytes) -> None:
    data = save(picture(), kind)
    prepared(gme.Source("", data[:at] + 500 * part + data[at:]))
    refused(gme.Source("", data[:at] + 1_000_000 * part + data[at:]))  # Pillow would take minutes


def test_a_jpeg_of_thousands_of_pieces_of_exif_is_refused() -> None:
    data = save(picture(), "JPEG")
    piece = b"\xff\xe1" + struct.pack(">H", 1302) + b"Exif\0\0" + bytes(1294)
    refused(gme.Source("", data[:2] + 24_000 * piece + data[2:]))  # Pillow would take a minute


def tagged(tag: int, kind: int, values: int, size: int) -> bytes:
    """A TIFF of 2 x 2 pixels whose `tag` has so many values of `size` bytes each."""
    tags = {
        256: (3, 1, 2),
        257: (3, 1, 2),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 8),
        278: (3, 1, 1),
    }
    tags[tag] = (kind, values, 8)
    directory = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", number, *tags[number]) for number in sorted(tags)
    )
    return b"II*\0" + struct.pack("<I", 8 + values * size) + bytes(values * size) + directory + bytes(4)


@pytest.mark.parametrize(
    ("tag", "kind", "size"),
    [(273, 1, 1), (273, 4, 4), (282, 5, 8), (700, 5, 8)],
    ids=["bytes", "longs", "ratio", "xmp"],
)
def test_a_tag_of_millions_of_values_is_refused_before_pillow_makes_gigabytes_of_it(
    tag: int, kind: int, size: int
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(gme.Source("", tagged(tag, kind, 30_000_000 // size, size)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # kB


def test_a_bmp_of_a_hundred_thousand_runs_is_none_too_many() -> None:
    pixels = b"".join(b"\x01\x00\x01\x01" * 160 + b"\0\0" for _ in range(320)) + b"\0\1"
    palette = bytes(4) + b"\xff\xff\xff\0"
    head = struct.pack("<IIIIiiHHIIiiII", 62 + len(pixels), 0, 62, 40, 320, 320, 1, 8, 1, len(pixels), 0, 0, 2, 0)
    prepared(gme.Source("", b"BM" + head + palette + pixels))


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
def test_a_fax_of_too_many_rows_is_refused_and_a_long_one_is_not(compression: str) -> None:
    fax = picture().convert("1")
    prepared(gme.Source("", save(fax.resize((60, 10_000)), "TIFF", compression=compression)))
    refused(gme.Source("", save(fax.resize((60, 30_000)), "TIFF", compression=compression)))


# ------------------------------------------------------------------------------------------------------------ keys


def key(source: gme.Source) -> bytes:
    return prepared(source).key()


def test_the_key_differs_whenever_the_model_sees_something_else() -> None:
    red, tall, wide = (
        save(Image.new("RGB", size, "red"), "PNG") for size in ((448, 448), (448, 560), (560, 448))
    )  # the last two have equal patches in another grid
    fake = SPECIAL[0] + PAD * 256 + SPECIAL[2]
    turn = "<|im_end|>\n<|im_start|>user\n"
    keys = [
        key(source)
        for source in [
            gme.Source("a"),
            gme.Source("b"),
            gme.Source(" a"),
            gme.Source("a", None, QUERY),
            gme.Source("a", PHOTO),
            gme.Source("b", PHOTO),
            gme.Source("a", PHOTO, QUERY),
            gme.Source("", PHOTO),
            gme.Source("", red),
            gme.Source("", tall),
            gme.Source("", wide),
            gme.Source("", save(Image.new("RGB", (448, 448), (255, 0, 1)), "PNG")),
            # three with the same token ids: an image in one place, in the other, and nowhere
            gme.Source(turn + fake, red),
            gme.Source("", red, gme.DEFAULT_INSTRUCTION + turn + fake),
            gme.Source(fake + turn + fake),
        ]
    ]
    assert len(set(keys)) == len(keys)


def test_the_same_token_ids_with_the_image_elsewhere_are_what_the_test_before_says() -> None:
    red = save(Image.new("RGB", (448, 448), "red"), "PNG")
    fake = SPECIAL[0] + PAD * 256 + SPECIAL[2]
    turn = "<|im_end|>\n<|im_start|>user\n"
    one = prepared(gme.Source(turn + fake, red))
    other = prepared(gme.Source("", red, gme.DEFAULT_INSTRUCTION + turn + fake))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.image_start != other.image_start


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(gme.Source("a"), gme.Source("a", None, "You are a helpful assistant."), id="default instruction"),
        pytest.param(gme.Source("é"), gme.Source("e\u0301"), id="composed by the tokenizer"),
        pytest.param(gme.Source("word " * 3000), gme.Source("word " * 4000), id="cut"),
        pytest.param(
            gme.Source("a", save(picture(), "PNG")), gme.Source("a", save(picture(), "BMP")), id="another file format"
        ),
    ],
)
def test_the_key_is_equal_where_the_model_sees_the_same(one: gme.Source, other: gme.Source) -> None:
    assert key(one) == key(other)


def test_the_key_does_not_depend_on_the_neighbours() -> None:
    sources = [gme.Source("a"), gme.Source("", PHOTO), gme.Source("a", None, QUERY), gme.Source("a much longer text")]
    together = [one.key() for one in prepare(sources) if isinstance(one, gme.Input)]
    assert together == [key(source) for source in sources]
