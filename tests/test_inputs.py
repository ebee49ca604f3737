"""Room Inputs: what clients send becomes the token ids and pixel patches of the authors' code, or a clear refusal.

Texts first, then what a picture shows, what is refused, and what bounds the work; the rig is at the end.
"""

import asyncio
import contextlib
import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import IMAGES, TOY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

import gme_service as gme

QUERY = "Find an image that matches the given text."
PAD = "<|image_pad|>"
SPECIAL = f"<|vision_start|>{PAD}<|vision_end|>"
PHOTO = (IMAGES / "64x48.png").read_bytes()
LIMIT = 10**8  # pixels
tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
prepare = gme.Preparer(TOY, 1800, LIMIT)
short = gme.Preparer(TOY, 64, LIMIT)


# ----------------------------------------------------------------------------------------------------------- texts

TEXTS = ["", "一个红色的圆形", " lead", "\r\n\t lead", "<|im_end|>\nhello", "e\u0301", "\0", "🚗", PAD, SPECIAL]


@given(st.sampled_from(TEXTS) | st.text(max_size=40), st.sampled_from([QUERY, *TEXTS]) | st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_the_prompt_of_any_unicode_text_is_tokenized_whole(text: str, instruction: str) -> None:
    one = prepared(gme.Source(text, None, instruction))
    assert one.token_ids.tolist() == ids(text, instruction)
    assert one.patches is None


def test_leading_white_space_merges_with_the_newline_before_it_and_shares_less(tmp_path: Path) -> None:
    description = json.loads((TOY / "tokenizer.json").read_text())
    description["model"]["vocab"]["ĊĊ"] = 999  # two newlines, as the published vocabulary has them
    description["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    merging = gme.Preparer(tmp_path, 1800, LIMIT)
    plain, merged = (prepared(gme.Source(text), merging) for text in ("lead", "\nlead"))
    assert merged.prefix == plain.prefix[:-1]
    assert merged.token_ids[len(merged.prefix)] == 999
    assert prepared(gme.Source("\nlead", PHOTO), merging).prefix == plain.prefix  # the image is between them


@pytest.mark.parametrize("instruction", [QUERY, SPECIAL, f"e\u0301o\u0308 {PAD}", "ᄒ\u1161\u11ab" * 20])
def test_image_tokens_are_placed_by_position(instruction: str) -> None:
    for text in ("", "a red circle", f"see {PAD} here", SPECIAL, " lead", "e\u0301" + PAD):
        one = prepared(gme.Source(text, PHOTO, instruction))
        assert one.token_ids.tolist() == ids(text, instruction, tokens(one))
        assert one.image_start == len(one.prefix) + 1
        ends = tokenizer.encode("<|vision_start|><|vision_end|>").ids
        assert one.token_ids[[one.image_start - 1, one.image_start + tokens(one)]].tolist() == ends


# ---------------------------------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize("most", [1, 2, 9, 20, 40])  # the first two end within the instruction
def test_a_text_is_cut_at_the_tokens_that_it_asks_for(most: int) -> None:
    text = "one two three four five six seven eight nine ten"
    one = prepared(gme.Source(text, max_tokens=most))
    assert one.token_ids.tolist() == ids(text)[:most]
    assert one.is_cut


def test_a_text_is_cut_at_the_service_s_tokens_where_it_asks_for_more_or_for_none() -> None:
    text = "word " * 100
    for most in (None, 64, 65, 10**9):
        assert prepared(gme.Source(text, max_tokens=most), short).token_ids.tolist() == ids(text)[:64]


def test_an_input_with_an_image_is_cut_at_the_service_s_tokens_alone() -> None:
    assert prepared(gme.Source("a", PHOTO, max_tokens=5)).key == prepared(gme.Source("a", PHOTO)).key


def test_an_input_that_may_not_be_cut_is_refused_with_the_number_of_its_tokens() -> None:
    whole = ids("word " * 50)
    sources = {
        gme.Source("word " * 50, max_tokens=20, may_cut=False): f"{len(whole)} tokens, over 20:",
        gme.Source("word " * 2000, may_cut=False): f"{len(ids('word ' * 2000))} tokens, over 1800:",
        gme.Source("word " * 10**6, may_cut=False): " at least ",  # whose rest nobody has counted
        gme.Source("word " * 2000, PHOTO, may_cut=False): "over 1800:",
    }
    for source, words in sources.items():
        assert words in str(refused(source, "The input"))
    fits = prepared(gme.Source("word " * 50, max_tokens=len(whole), may_cut=False))
    assert fits.token_ids.tolist() == whole
    assert not fits.is_cut


@pytest.mark.parametrize("piece", ["a", "\n", "multimodal ", "<|object_ref_start|>", "u\u0308\u0304", "ᄒ\u1161\u11ab"])
def test_a_text_too_long_to_matter_is_cut_where_no_token_changes(piece: str) -> None:
    most = 64 * max(map(len, tokenizer.get_vocab()))  # characters of 64 tokens
    for length in (most - 100, most - 3, most, most + 1, most + 50):
        text = (piece * most)[:length]
        assert prepared(gme.Source(text), short).token_ids.tolist() == ids(text)[:64]


@pytest.mark.parametrize("text", ["", " lead", "\n\n lead", "\u0301", "<|im_end|>", "word " * 20])
def test_a_prompt_that_fills_the_length_is_cut_as_the_whole_is(text: str) -> None:
    for words in (*range(40, 66), 1000):
        one = prepared(gme.Source(text, None, "a " * words), short)
        assert one.token_ids.tolist() == ids(text, "a " * words)[:64]


def test_behind_an_image_a_text_is_cut_and_the_image_is_not() -> None:
    whole = prepared(gme.Source("", PHOTO))
    assert not whole.is_cut
    end = whole.image_start + tokens(whole)
    for spare in (0, 1, 5):
        one = prepared(gme.Source("word " * 3000, PHOTO), gme.Preparer(TOY, end + spare, LIMIT))
        assert one.token_ids.tolist() == ids("word " * 3000, image_tokens=tokens(whole))[: end + spare]
        assert one.is_cut
    one_too_few = gme.Preparer(TOY, end - 1, LIMIT)
    numbers = f"has {tokens(whole)} tokens, and the prompt before it leaves {tokens(whole) - 1} of the {end - 1} "
    assert numbers in str(refused(gme.Source("", PHOTO), preparer=one_too_few))
    for words in (1800, 5000, 200_000):  # of the prompt, which leaves nothing
        assert "leaves 0 of the 1800 that this server reads" in str(refused(gme.Source("", PHOTO, "word " * words)))


# ----------------------------------------------------------------------------------------- pictures: what is seen


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"])
def test_a_named_format_is_opened_and_of_many_frames_the_first_is_seen(kind: str) -> None:
    first, second = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (60, 40), "blue")
    more = {} if kind in ("JPEG", "BMP") else {"save_all": True, "append_images": [second]}
    assert np.abs(seen(save(first, kind, **more)) - np.array([255.0, 0, 0])).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_an_opaque_image_of_any_mode_is_seen_in_rgb(mode: str) -> None:
    image = picture().convert(mode)
    np.testing.assert_array_equal(seen(save(image, "PNG")), seen(save(image.convert("RGB"), "PNG")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(mode: str, kind: str) -> None:
    image = picture().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    colours, alpha = np.split(np.asarray(image.convert("RGBA")).astype(float), [3], axis=2)
    on_white = np.rint((colours * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)
    file = save(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(seen(file), seen(save(Image.fromarray(on_white), "PNG")))


# A PNG's bits of a sample, its kind of colour, a sample that is transparent, one that is not, and what is seen of that
TRANSPARENT = [
    (1, GREY := 0, [0], [1], [255] * 3),
    (2, GREY, [1], [2], [170] * 3),
    (4, GREY, [5], [6], [102] * 3),
    (8, GREY, [5], [6], [6] * 3),
    (16, GREY, [0x0503], [0x0504], [5] * 3),
    (8, RGB := 2, [1, 2, 3], [1, 2, 4], [1, 2, 4]),
    (16, RGB, [0x0100, 0x0200, 0x0300], [0x0100, 0x0200, 0x0400], [1, 2, 4]),
    (1, PALETTE := 3, [0], [1], [7, 8, 9]),
    (8, PALETTE, [0], [1], [7, 8, 9]),
    (8, GREY_AND_ALPHA := 4, [5, 0], [6, 255], [6] * 3),
    (16, GREY_AND_ALPHA, [0x0503, 0], [0x0605, 0xFFFF], [6] * 3),
    (16, RGB_AND_ALPHA := 6, [256, 512, 768, 0], [256, 512, 1024, 0xFFFF], [1, 2, 4]),
]


@pytest.mark.parametrize(("depth", "kind", "hidden", "shown", "colour"), TRANSPARENT)
def test_a_png_s_transparent_colour_is_seen_as_white_at_every_depth(
    depth: int, kind: int, hidden: list[int], shown: list[int], colour: list[int]
) -> None:
    samples = np.array(28 * [28 * hidden + 28 * shown])
    extra = []
    if kind == PALETTE:
        extra = [chunk(b"PLTE", bytes([1, 2, 3, 7, 8, 9])), chunk(b"tRNS", b"\0")]
    elif kind in (GREY, RGB):
        extra = [chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden))]
    expected = np.array(28 * [28 * [[255] * 3] + 28 * [colour]], np.uint8)
    np.testing.assert_array_equal(seen(png(samples, depth, kind, *extra)), seen(save(Image.fromarray(expected), "PNG")))


def test_a_gif_s_transparent_colour_is_seen_as_white() -> None:
    image = Image.new("P", (56, 28))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (28, 0, 56, 28))
    expected = Image.new("RGB", (56, 28), "white")
    expected.paste((0, 0, 255), (28, 0, 56, 28))
    np.testing.assert_array_equal(seen(save(image, "GIF", transparency=0)), seen(save(expected, "PNG")))


def test_a_bmp_s_alpha_is_not_looked_at_as_it_is_often_zero_throughout() -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[:, :, :3] = np.asarray(picture())[::-1, :, ::-1]  # from the last row up, blue first
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII4I", 56, 60, 40, 1, 32, 3, 0, 0, 0, 0, 0, *masks)
    file = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 56) + header + pixels.tobytes()
    assert Image.open(io.BytesIO(file)).mode == "RGBA"
    np.testing.assert_array_equal(seen(file), seen(save(picture(), "BMP")))


def test_16_bit_grey_keeps_its_high_byte() -> None:
    samples = np.random.default_rng(0).integers(0, 1 << 16, (40, 60), np.uint16)
    high = Image.fromarray((samples // 256).astype(np.uint8))
    np.testing.assert_array_equal(seen(save(Image.fromarray(samples), "PNG")), seen(save(high, "PNG")))


# How an image with this EXIF orientation has to be turned: axes swapped, then flipped vertically, horizontally
UPRIGHT = [None, (0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_upright(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    with Image.open(io.BytesIO(save(picture(), kind))) as image:
        pixels, (swap, y, x) = np.asarray(image.convert("RGB")), UPRIGHT[orientation]
    turned = (pixels.swapaxes(0, 1) if swap else pixels)[:: 1 - 2 * y, :: 1 - 2 * x]
    by_hand = save(Image.fromarray(np.ascontiguousarray(turned)), "PNG")
    np.testing.assert_array_equal(seen(save(picture(), kind, exif=tags)), seen(by_hand))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_an_image_is_not_broken_because_its_exif_is(kind: str, exif: bytes) -> None:
    np.testing.assert_array_equal(seen(save(picture(), kind, exif=exif)), seen(save(picture(), kind)))


ODD_CHUNKS: dict[str, Callable[[], bytes]] = {
    "a long text": lambda: chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))),
    "a long international text": lambda: chunk(b"iTXt", b"XMP\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
    "a large profile": lambda: chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2_000_000))),
    "a profile in no known compression": lambda: chunk(b"iCCP", b"icc\0\7"),
    "a damaged text": lambda: chunk(b"tEXt", b"Comment\0a")[:-1] + b"?",
    "a damaged time": lambda: chunk(b"tIME", bytes(7))[:-1] + b"?",
    "a gamma cut short": lambda: chunk(b"gAMA", b"\0"),
}


@pytest.mark.parametrize("kind", ODD_CHUNKS)
def test_a_png_is_read_without_metadata_that_are_damaged_or_too_large(kind: str) -> None:
    odd = ODD_CHUNKS[kind]()
    ihdr, end = 33, PHOTO.index(b"IEND") - 4
    for file in (PHOTO[:ihdr] + odd + PHOTO[ihdr:], PHOTO[:end] + odd + PHOTO[end:]):
        np.testing.assert_array_equal(seen(file), seen(PHOTO))


def test_a_png_is_refused_where_its_header_its_transparency_or_its_exif_is_damaged() -> None:
    for kind in (b"tRNS", b"eXIf"):
        refused(gme.Source("", PHOTO[:33] + chunk(kind, bytes(6))[:-1] + b"?" + PHOTO[33:]))
    refused(gme.Source("", PHOTO[:29] + b"????" + PHOTO[33:]))


def test_of_many_pictures_in_a_file_the_first_is_seen_however_many_follow() -> None:
    tags = Image.Exif()
    tags[0x010F] = "a camera"
    frames = [picture().rotate(angle) for angle in range(40)]
    stills = [save(frame, "JPEG") for frame in frames]
    many = {
        "an MPO of 16 with EXIF each": b"".join(save(frame, "JPEG", exif=tags) for frame in frames[:16]),
        "an MPO of 40": save(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "progressive ones": b"".join(save(frame, "JPEG", progressive=True) for frame in frames[:4]),
        "MJPEG": b"".join(stills),
        "thumbnails within EXIF": with_segments(1, b"\xff\xe1", b"Exif\0\0" + progressive(40)),
    }
    for kind, file in many.items():
        first = save(frames[0], "JPEG", progressive=kind.startswith("progressive"))
        np.testing.assert_array_equal(seen(file), seen(first), err_msg=kind)


# ------------------------------------------------------------------------------------------- pictures: their size


@pytest.mark.parametrize(
    ("size", "first", "second"),  # the authors' bounds, and the image processor's: by transformers 4.51.3
    [
        ((42, 70), (56, 56), (364, 588)),
        ((70, 98), (56, 112), (392, 532)),  # 2.5 and 3.5 round to even
        ((98, 42), (112, 56), (700, 308)),
        ((448, 448), (448, 448), (448, 448)),
        ((449, 447), (448, 448), (448, 448)),
        ((800, 600), (812, 588), (812, 588)),
        ((1008, 1008), (1008, 1008), (980, 980)),
        ((1920, 1080), (1932, 1092), (1316, 728)),
        ((2400, 1600), (2408, 1596), (1204, 812)),
        ((3598, 3584), (3584, 3584), (980, 980)),
        ((65535, 976), (29344, 420), (8204, 112)),
        ((28, 5600), (28, 5600), (56, 6356)),
    ],
)
def test_the_fitted_size_is_the_published_one(
    size: tuple[int, int], first: tuple[int, int], second: tuple[int, int]
) -> None:
    assert gme.fitted_size(*size, min_tokens=4, max_tokens=16384) == first
    assert gme.fitted_size(*size, min_tokens=256, max_tokens=1280) == second


@given(st.integers(1, 65535), st.integers(1, 65535), st.integers(512, 16384))
def test_a_fitted_size_is_a_multiple_of_28_within_its_bounds(width: int, height: int, most: int) -> None:
    columns, rows = (side / 28 for side in gme.fitted_size(width, height, 256, most))
    assert columns == int(columns) >= 1
    assert rows == int(rows) >= 1
    slim = max(width, height) / min(width, height) > 200  # such an image is made less slim before
    assert slim or 256 <= columns * rows <= most


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        ((1, 1), (56, 56), (448, 448)),
        ((70, 98), (56, 112), (336, 644)),
        ((800, 600), (812, 588), (812, 588)),
        ((2400, 1600), (2408, 1596), (1204, 812)),
        ((1, 600), (28, 588), (112, 2072)),
        ((40_000, 1), (5600, 28), (6356, 56)),  # the ratio is at most 200
    ],
)
def test_an_image_is_resized_twice(size: tuple[int, int], first: tuple[int, int], second: tuple[int, int]) -> None:
    image = picture(*size)
    expected = image.resize(first, Image.Resampling.BICUBIC).resize(second, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(seen(save(image, "BMP")), np.asarray(expected))


def test_fewer_image_tokens_change_only_the_images_that_have_more() -> None:
    fewer = gme.Preparer(TOY, 1800, LIMIT, max_image_tokens=400)
    for size in ((448, 448), (560, 560), (588, 560), (1280, 960)):
        normal, one = (prepared(gme.Source("", save(picture(*size), "PNG")), which) for which in (prepare, fewer))
        if tokens(normal) <= 400:
            assert one.key == normal.key
        else:
            assert 256 <= tokens(one) <= 400
            assert one.grid[1] / one.grid[0] == pytest.approx(size[0] / size[1], rel=0.1)


# --------------------------------------------------------------------------------------- pictures: what is refused


def test_what_is_no_whole_image_of_a_named_format_is_refused_and_its_neighbours_are_not() -> None:
    files = [b"", b"\xff", bytes(4096), b"<html>", b"<svg/>", b"\xff\xd8\xff\xe0<html>", b"8BPS\0\1" + bytes(64)]
    kinds = ("TIFF", "EPS", "PDF", "ICO", "PPM", "TGA", "DDS", "JPEG2000", "ICNS", "AVIF")
    files += [save(picture(), kind) for kind in kinds]
    files += [b"\0\0\0\x18ftyp" + brand + bytes(64) for brand in (b"avif", b"avis", b"heic", b"mif1")]
    whole = [(IMAGES / name).read_bytes() for name in ("448x448.png", "2400x1600.jpg", "photo.webp", "mode_CMYK.jpg")]
    files += [data[: int(part * len(data))] for data in whole for part in (0.1, 0.5, 0.9)]
    for file in files:
        good, bad, other = gme.isolate(prepare, [gme.Source("", PHOTO), gme.Source("", file), gme.Source("a")])
        assert isinstance(bad, gme.InputError), file[:20]
        assert str(bad).endswith("send a whole file of JPEG, PNG, WEBP, GIF, BMP."), file[:20]
        assert [good.key, other.key] == [prepared(one).key for one in (gme.Source("", PHOTO), gme.Source("a"))]


def test_a_file_of_some_parts_is_seen() -> None:
    for file in (progressive(10), with_segments(500, b"\xff\xe3"), with_segments(1, b"\xff\xe1", exif(60_000))):
        prepared(gme.Source("", file))
    prepared(gme.Source("", PHOTO[:33] + 90_000 * chunk(b"tEXt", b"") + PHOTO[33:]))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a PNG of many pixels": (lambda: bomb("PNG", b"IHDR", ">II", 50_000), "pixels"),
    # in a frame larger than its screen
    "a GIF of many pixels": (lambda: bomb("GIF", b"," + bytes(4), "<HH", 50_000), "pixels"),
    "a BMP of many pixels": (lambda: bomb("BMP", b"\x28\0\0\0", "<ii", 50_000), "pixels"),
    "a JPEG of many pixels": (lambda: bomb("JPEG", b"\xff\xc0\0\x11\x08", ">HH", 50_000), "pixels"),
    "a WEBP of many pixels": (lambda: bomb("WEBP", b"\x9d\x01\x2a", "<HH", 16_000), "pixels"),
    "thousands of scans": (lambda: progressive(5000), "30 scans and EXIF segments"),
    "scans behind a marker without a length": (
        lambda: progressive(40).replace(b"\xff\xda", b"\xff\x02\xff\xff\xff\xda"),
        "30 scans and EXIF segments",
    ),
    "scans behind an early end": (lambda: b"\xff\xd8\xff\xd9" + progressive(40), "30 scans and EXIF segments"),
    "a million segments": (lambda: with_segments(1_000_000, b"\xff\xe3"), "10000 segments"),
    "a million ends": (lambda: b"\xff\xd8\xff" + b"\xff\xd9" * 1_000_000, "10000 segments"),
    "fill bytes": (lambda: b"\xff\xd8" + b"\xff" * 30_000_000, "too long"),
    "EXIF behind what looks like a scan": (
        lambda: b"\xff\xd8\xff\xe3\0\x07\xff\xda\0\x08\x01" + with_segments(450, b"\xff\xe1", exif(65_000))[2:],
        "30 scans and EXIF segments",
    ),
    "EXIF in small pieces": (lambda: with_segments(24_000, b"\xff\xe1", exif(1300)), "30 scans and EXIF segments"),
    "EXIF of a PNG": (lambda: save(picture(), "PNG", exif=exif(25_000_000)), "bytes of EXIF"),
    "EXIF of a WebP": (lambda: save(picture(), "WEBP", exif=exif(25_000_000)), "bytes of EXIF"),
    "chunks before the pixels": (lambda: PHOTO[:33] + 2_000_000 * chunk(b"tEXt", b"") + PHOTO[33:], "100000 chunks"),
    "chunks of pixels": (lambda: PHOTO[:33] + 2_000_000 * chunk(b"IDAT", b"") + PHOTO[33:], "100000 chunks"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_of_very_many_pixels_or_parts_is_refused_by_their_number(kind: str) -> None:
    make, words = HOSTILE[kind]
    file = make()
    with measured() as cost:
        error = refused(gme.Source("", file))
    assert words in str(error)
    assert isinstance(error, gme.TooLargeError) == (words == "pixels")
    assert cost.megabytes < 150


@pytest.mark.parametrize("method", ["load", "resize"])
def test_an_image_that_does_not_fit_into_the_memory_is_too_large_and_not_broken(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, method, run_out)
    image = (IMAGES / "800x600.png").read_bytes()
    with pytest.raises(gme.TooLargeError, match=r"^File 1: The image does not fit"):
        prepare([gme.Source("", image, name="File 1: ")])


def test_of_a_png_only_the_chunks_that_make_its_pixels_are_parsed() -> None:
    # 10 million lines of it, parsed as EXIF, hold the interpreter for a second
    lines = chunk(b"tEXt", b"Raw profile type exif\0" + b"ab\n" * 10_000_000)
    file = PHOTO[:33] + lines + chunk(b"acTL", bytes(8)) + PHOTO[33:] + b"WHAT FOLLOWS THE END"
    assert gme.plain_png(file) == PHOTO
    np.testing.assert_array_equal(seen(file), seen(PHOTO))


def test_the_search_for_a_marker_finds_it_at_the_edge_of_a_window() -> None:
    for position in range(gme.JPEG_WINDOW - 3, gme.JPEG_WINDOW + 3):
        data = bytes(position) + b"\xff\xd9" + bytes(9)
        marker = gme.find_marker(data, 0)
        assert marker is not None
        assert marker.start() == position


def test_a_file_is_read_until_its_time_is_over() -> None:
    file = gme.TimedFile(b"content")
    assert file.read(4) == b"cont"
    file.deadline = 0
    with pytest.raises(gme.InputError, match="too long"):
        file.read()


# ------------------------------------------------------------------------------------------- what bounds the work


def test_the_pixels_of_an_image_are_counted_by_its_header_alone() -> None:
    assert prepare.count_pixels(gme.Source("a")) == 0
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"):
        assert prepare.count_pixels(gme.Source("", save(picture(), kind))) == 60 * 40
    cut = (IMAGES / "448x448.png").read_bytes()[:1000]
    assert prepare.count_pixels(gme.Source("", cut)) == 448 * 448
    refused(gme.Source("", cut))


@pytest.mark.parametrize("kind", ["a PNG of many pixels", "thousands of scans", "chunks of pixels", "fill bytes"])
def test_what_the_header_shows_is_refused_when_the_pixels_are_counted(kind: str) -> None:
    source = gme.Source("", HOSTILE[kind][0](), name="Input 7: ")
    with pytest.raises(gme.ServiceError) as caught:
        prepare.count_pixels(source)
    assert str(caught.value) == str(refused(source))


@pytest.mark.anyio
async def test_who_comes_first_has_its_share_of_the_pixels_first() -> None:
    budget = gme.PixelBudget(10)
    working: list[str] = []
    done = {name: asyncio.Event() for name in "abcd"}

    async def decode(name: str, pixels: int) -> None:
        async with budget.share(pixels):
            working.append(name)
            await done[name].wait()
            working.remove(name)

    async def after(name: str) -> list[str]:
        done[name].set()
        return await settled(working)

    tasks = [asyncio.create_task(decode(*one)) for one in (("a", 6), ("b", 10), ("c", 4), ("d", 6))]
    assert await settled(working) == ["a"]  # c has room, and comes after b
    assert await after("a") == ["b"]
    assert await after("b") == ["c", "d"]
    assert await after("c") == ["d"]
    assert await after("d") == []
    await asyncio.gather(*tasks)
    assert budget.free == 10


@pytest.mark.anyio
async def test_who_is_cancelled_or_fails_gives_its_share_of_the_pixels_back() -> None:
    budget = gme.PixelBudget(10)
    working: list[str] = []

    async def decode(name: str, pixels: int) -> None:
        async with budget.share(pixels):
            working.append(name)
            try:
                await asyncio.Event().wait()
            finally:
                working.remove(name)

    first, second, third, fourth = (
        asyncio.create_task(decode(*one)) for one in (("a", 6), ("b", 8), ("c", 8), ("d", 2))
    )
    assert await settled(working) == ["a"]
    second.cancel()  # who is next
    third.cancel()  # who waits behind
    assert await settled(working) == ["a", "d"]
    first.cancel()
    fourth.cancel()
    assert await settled(working) == []
    with pytest.raises(ValueError, match="broken"):
        async with budget.share(10):
            raise ValueError("broken")
    assert budget.free == 10


@pytest.mark.parametrize(("words", "share"), [(1, 0), (100, 12), (400, 50)])
def test_a_long_instruction_adds_to_the_cost_of_each_input_as_attention_copies_it(words: int, share: int) -> None:
    one = prepared(gme.Source("a red circle", None, "word " * words))
    assert 32 * share <= len(one.prefix) < 32 * share + 32
    assert one.own_tokens == prepared(gme.Source("a red circle")).own_tokens
    assert one.cost == one.own_tokens + share


def test_threads_prepare_side_by_side() -> None:
    sources = [gme.Source(f"text {n}", PHOTO if n % 2 else None, f"Instruction {n % 3}.") for n in range(40)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(prepared, sources))
    assert [one.key for one in together] == [one.key for one in prepare(sources)]


@pytest.mark.parametrize("text", ["a" * 30_000_000, "\u0301" * 15_000_000])
def test_of_a_30_mb_text_only_its_beginning_is_tokenized(text: str) -> None:
    most = 1800 * max(map(len, tokenizer.get_vocab()))
    assert len(prepare.prompt(gme.Source(text, None, text))) < 2 * most + 200
    assert prepared(gme.Source(text)).key == prepared(gme.Source(text[:most])).key


def test_of_instructions_only_short_ones_are_kept_with_at_most_the_tokens_of_an_input() -> None:
    preparer = gme.Preparer(TOY, 64, LIMIT)
    tracemalloc.start()
    for number in range(16):
        preparer([gme.Source("a", None, f"{number}" + "é" * 30_000), gme.Source("a", None, f"{number} " * 1000)])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 250_000  # bytes: 16 texts of up to 4,096 characters, and 64 ids each
    assert preparer.kept_system_ids.cache_info().currsize == 16
    assert len(preparer.kept_system_ids("15 " * 1000)) == 64


# ------------------------------------------------------------------------------------------- the key of the cache


def test_the_key_differs_whenever_the_model_sees_something_else() -> None:
    sizes = ((448, 448), (448, 560), (560, 448))  # the last two have equal patches in another grid
    red, tall, wide = (save(Image.new("RGB", size, "red"), "PNG") for size in sizes)
    fake, turn = f"<|vision_start|>{PAD * 256}<|vision_end|>", "<|im_end|>\n<|im_start|>user\n"
    given = [("a",), ("b",), (" a",), ("a", None, QUERY), ("a", PHOTO), ("b", PHOTO), ("a", PHOTO, QUERY)]
    given += [("", image) for image in (PHOTO, red, tall, wide)]
    # three with the same token ids: an image in one place, in the other, and nowhere
    given += [(turn + fake, red), ("", red, gme.DEFAULT_INSTRUCTION + turn + fake), (fake + turn + fake,)]
    inputs = [prepared(gme.Source(*fields)) for fields in given]
    assert len({one.key for one in inputs}) == len(given)
    assert len({one.token_ids.tobytes() for one in inputs[-3:]}) == 1
    cuts = [prepared(gme.Source("word " * 99, max_tokens=most)).key for most in (None, 40, 20)]
    assert len(set(cuts)) == 3


def test_the_key_is_equal_where_the_model_sees_the_same() -> None:
    png, bmp = (save(picture(), kind) for kind in ("PNG", "BMP"))
    pairs = [
        (gme.Source("a"), gme.Source("a", None, "You are a helpful assistant.")),
        (gme.Source("é"), gme.Source("e\u0301")),  # composed by the tokenizer
        (gme.Source("word " * 3000), gme.Source("word " * 4000)),  # cut
        (gme.Source("word " * 30, max_tokens=20), gme.Source("word " * 40, max_tokens=20, may_cut=True)),
        (gme.Source("a", png), gme.Source("a", bmp)),
    ]
    for one, other in pairs:
        first, _, second = prepare([one, gme.Source("a neighbour", PHOTO, QUERY), other])
        assert first.key == second.key == prepared(other).key


# --------------------------------------------------------------------------------------------------------- the rig


def prepared(source: gme.Source, preparer: gme.Preparer = prepare) -> gme.Input:
    (result,) = preparer([source])
    assert result.token_ids[: len(result.prefix)].tolist() == list(result.prefix)
    assert result.own_tokens == len(result.token_ids) - len(result.prefix) >= 1
    return result


def refused(source: gme.Source, begins: str = "The image", preparer: gme.Preparer = prepare) -> gme.ServiceError:
    with pytest.raises((gme.InputError, gme.TooLargeError)) as caught:
        preparer([replace(source, name="Input 7: ")])
    assert str(caught.value).startswith(f"Input 7: {begins}")
    return caught.value


def ids(text: str, instruction: str = "You are a helpful assistant.", image_tokens: int = 0) -> list[int]:
    """The authors' prompt, written out once more."""
    image = f"<|vision_start|>{PAD * image_tokens}<|vision_end|>" if image_tokens else ""
    prompt = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{image}{text}<|im_end|>\n"
    return tokenizer.encode(f"{prompt}<|im_start|>assistant\n<|endoftext|>").ids


def tokens(one: gme.Input) -> int:
    """How many tokens the image of an input takes."""
    assert one.patches is not None
    assert (one.patches.dtype, one.patches.shape) == (np.uint8, (one.grid[0] * one.grid[1], 3 * 14 * 14))
    return len(one.patches) // 4


def seen(data: bytes) -> np.ndarray:
    """The image (height, width, 3) that the model sees, put together from its patches one by one."""
    one = prepared(gme.Source("", data))
    image = np.empty((14 * one.grid[0], 14 * one.grid[1], 3), np.uint8)
    patches = iter(one.patches.reshape(-1, 3, 14, 14))
    for row in range(0, len(image), 28):  # the four patches of a token follow one another
        for column in range(0, image.shape[1], 28):
            for y, x in ((row, column), (row, column + 14), (row + 14, column), (row + 14, column + 14)):
                image[y : y + 14, x : x + 14] = next(patches).transpose(1, 2, 0)
    return image


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """An image without any symmetry."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, depth: int, kind: int, *more: bytes) -> bytes:
    """A PNG of rows of samples, of so many bits each, with more chunks before its pixels."""
    bits = samples[..., None] >> np.arange(depth - 1, -1, -1) & 1
    rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    channels = {GREY: 1, RGB: 3, PALETTE: 1, GREY_AND_ALPHA: 2, RGB_AND_ALPHA: 4}[kind]
    header = struct.pack(">IIBBBBB", samples.shape[1] // channels, len(samples), depth, kind, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", content), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_segments(count: int, marker: bytes, content: bytes = b"") -> bytes:
    """A JPEG with so many segments of that kind."""
    data = save(picture(), "JPEG")
    return data[:2] + count * (marker + struct.pack(">H", 2 + len(content)) + content) + data[2:]


def progressive(scans: int) -> bytes:
    """A JPEG that repeats its last scan. Each costs a pass over all pixels, and takes but some bytes of the file."""
    data = save(picture(), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def exif(size: int) -> bytes:
    """EXIF of one tag with so many bytes of values."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x9286, 3, size // 2, 26) + bytes(4 + size)


def bomb(kind: str, mark: bytes, layout: str, side: int) -> bytes:
    """A small file that says, behind the mark, that it is so large."""
    data = save(picture(), kind)
    at = data.index(mark) + len(mark)
    data = data[:at] + struct.pack(layout, side, side) + data[at + struct.calcsize(layout) :]
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:] if kind == "PNG" else data


@contextlib.contextmanager
def measured() -> Iterator[SimpleNamespace]:
    """How much memory the block takes at its peak."""

    def memory(kind: str) -> float:
        return int(Path("/proc/self/status").read_text().partition(f"{kind}:")[2].split()[0]) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = memory("VmRSS")
    yield (cost := SimpleNamespace())
    cost.megabytes = memory("VmHWM") - before


async def settled(working: list[str]) -> list[str]:
    """Who works when all have done what they can."""
    for _ in range(20):
        await asyncio.sleep(0)
    return list(working)
