"""Room Inputs: what clients send becomes the token ids and pixel patches of the authors' code, or a clear refusal."""

import contextlib
import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import IMAGES, TOY, Patch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
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


def prepared(source: gme.Source, preparer: gme.Preparer = prepare) -> gme.Input:
    (result,) = preparer([source])
    assert result.token_ids[: len(result.prefix)].tolist() == list(result.prefix)
    assert result.cost == len(result.token_ids) - len(result.prefix) >= 1
    return result


def refused(source: gme.Source, preparer: gme.Preparer = prepare) -> gme.ServiceError:
    with pytest.raises((gme.InputError, gme.TooLargeError)) as caught:
        preparer([replace(source, name="Input 7: ")])
    assert str(caught.value).startswith("Input 7: The image")
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


@pytest.mark.parametrize("text", ["a" * 30_000_000, "\u0301" * 15_000_000])
def test_a_30_mb_text_costs_no_more_than_its_beginning(text: str) -> None:
    started = time.process_time()
    whole = prepared(gme.Source(text))
    assert time.process_time() - started < 1
    assert whole.key == prepared(gme.Source(text[:100_000])).key


@pytest.mark.parametrize("instruction", [QUERY, SPECIAL, f"e\u0301o\u0308 {PAD}", "ᄒ\u1161\u11ab" * 20])
def test_image_tokens_are_placed_by_position(instruction: str) -> None:
    for text in ("", "a red circle", f"see {PAD} here", SPECIAL, " lead", "e\u0301" + PAD):
        one = prepared(gme.Source(text, PHOTO, instruction))
        assert one.token_ids.tolist() == ids(text, instruction, tokens(one))
        assert one.image_start == len(one.prefix) + 1
        ends = tokenizer.encode("<|vision_start|><|vision_end|>").ids
        assert one.token_ids[[one.image_start - 1, one.image_start + tokens(one)]].tolist() == ends


def test_behind_an_image_a_text_is_cut_and_the_image_is_not() -> None:
    whole = prepared(gme.Source("", PHOTO))
    end = whole.image_start + tokens(whole)
    for spare in (0, 1, 5):
        one = prepared(gme.Source("word " * 3000, PHOTO), gme.Preparer(TOY, end + spare, LIMIT))
        assert one.token_ids.tolist() == ids("word " * 3000, image_tokens=tokens(whole))[: end + spare]
    assert str(tokens(whole)) in str(refused(gme.Source("", PHOTO), gme.Preparer(TOY, end - 1, LIMIT)))
    for words in (1800, 5000, 200_000):
        assert "GME_MAX_LENGTH" in str(refused(gme.Source("", PHOTO, "word " * words)))


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        ((1, 1), (56, 56), (448, 448)),
        ((70, 98), (56, 112), (336, 644)),  # 2.5 and 3.5 round to even
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


# How an image with this EXIF orientation has to be turned: axes swapped, then flipped vertically, horizontally
UPRIGHT = [None, (0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0)]


def oriented(kind: str, *tags: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif.update(dict(tags))
    return save(picture(), kind, exif=exif)


def upright(kind: str, orientation: int) -> np.ndarray:
    """What the model sees of an image of that format that was turned by hand."""
    with Image.open(io.BytesIO(save(picture(), kind))) as image:
        pixels, (swap, y, x) = np.asarray(image.convert("RGB")), UPRIGHT[orientation]
    turned = (pixels.swapaxes(0, 1) if swap else pixels)[:: 1 - 2 * y, :: 1 - 2 * x]
    return seen(save(Image.fromarray(np.ascontiguousarray(turned)), "PNG"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_upright(kind: str, orientation: int) -> None:
    np.testing.assert_array_equal(seen(oriented(kind, (0x0112, orientation))), upright(kind, orientation))


def test_an_avif_that_says_it_twice_is_turned_once() -> None:
    data = oriented("AVIF", (0x0112, 6), (0x0113, 6))  # Pillow makes an irot of the first, and EXIF of the other
    twice = data.replace(b"\1\x13\0\3", b"\1\x12\0\3").replace(b"\x13\1\3\0", b"\x12\1\3\0")
    assert twice != data
    np.testing.assert_array_equal(seen(twice), upright("AVIF", 6))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 5000])
def test_an_image_is_not_broken_because_its_metadata_are(kind: str, exif: bytes) -> None:
    prepared(gme.Source("", save(picture(), kind, exif=exif)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "MPO"])
def test_a_named_format_is_opened_and_of_many_frames_the_first_is_seen(kind: str) -> None:
    first, second = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (60, 40), "blue")
    more = {} if kind in ("JPEG", "BMP") else {"save_all": True, "append_images": [second]}
    assert np.abs(seen(save(first, kind, **more)) - np.array([255.0, 0, 0])).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_an_image_of_any_mode_is_seen_in_rgb(mode: str) -> None:
    image = picture().convert(mode) if mode != "I;16" else Image.new("I;16", (60, 40), 1000)
    np.testing.assert_array_equal(seen(save(image, "PNG")), seen(save(image.convert("RGB"), "PNG")))


def test_what_is_no_whole_image_of_a_named_format_is_refused_and_its_neighbours_are_not() -> None:
    files = [b"", b"\xff", bytes(4096), b"<html>", b"<svg/>", b"\xff\xd8\xff\xe0<html>", b"8BPS\0\1" + bytes(64)]
    files += [save(picture(), kind) for kind in ("TIFF", "EPS", "PDF", "ICO", "PPM", "TGA", "DDS", "JPEG2000", "ICNS")]
    whole = [(IMAGES / name).read_bytes() for name in ("448x448.png", "2400x1600.jpg", "photo.webp", "mode_CMYK.jpg")]
    files += [data[: int(part * len(data))] for data in whole for part in (0.1, 0.5, 0.9)]
    for file in files:
        good, bad, other = gme.isolate(prepare, [gme.Source("", PHOTO), gme.Source("", file), gme.Source("a")])
        assert isinstance(bad, gme.InputError), file[:20]
        assert "JPEG, PNG, WEBP" in str(bad)
        assert [good.key, other.key] == [prepared(one).key for one in (gme.Source("", PHOTO), gme.Source("a"))]


@contextlib.contextmanager
def measured() -> Iterator[SimpleNamespace]:
    """How much memory the block takes at its peak, and how much time of the processor."""

    def memory(kind: str) -> float:
        return int(Path("/proc/self/status").read_text().partition(f"{kind}:")[2].split()[0]) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, started = memory("VmRSS"), time.process_time()
    yield (cost := SimpleNamespace())
    cost.seconds, cost.megabytes = time.process_time() - started, memory("VmHWM") - before


def bomb(kind: str, mark: bytes, layout: str, side: int) -> bytes:
    """A small file that says, behind the mark, that it is so large."""
    data = save(picture(), kind)
    at = data.index(mark) + len(mark)
    data = data[:at] + struct.pack(layout, side, side) + data[at + struct.calcsize(layout) :]
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:] if kind == "PNG" else data


def test_large_images_are_worked_on_one_at_a_time(monkeypatch: Patch) -> None:
    working, together, ordinary_load = [], set[int](), ImageFile.ImageFile.load

    def load(image: ImageFile.ImageFile) -> Any:
        working.append(image)
        together.add(len(working))
        time.sleep(0.01)
        try:
            return ordinary_load(image)
        finally:
            working.pop()

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    large = gme.Source("", save(Image.new("RGB", (2000, 2000), "red"), "JPEG"))
    for max_pixels, at_once in ((5_000_000, {1}), (10_000_000, {1, 2})):
        together.clear()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(prepared, [large] * 8, [gme.Preparer(TOY, 1800, max_pixels)] * 8))
        assert together == at_once


def jpeg(count: int, marker: bytes, content: bytes = b"") -> bytes:
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


def test_a_file_of_some_parts_is_seen() -> None:
    for file in (progressive(10), jpeg(500, b"\xff\xe3"), jpeg(1, b"\xff\xe1", exif(60_000))):
        prepared(gme.Source("", file))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a PNG of many pixels": lambda: bomb("PNG", b"IHDR", ">II", 50_000),
    "a GIF of many pixels": lambda: bomb("GIF", b"," + bytes(4), "<HH", 50_000),  # in a frame larger than its screen
    "a BMP of many pixels": lambda: bomb("BMP", b"\x28\0\0\0", "<ii", 50_000),
    "a JPEG of many pixels": lambda: bomb("JPEG", b"\xff\xc0\0\x11\x08", ">HH", 50_000),
    "a WEBP of many pixels": lambda: bomb("WEBP", b"\x9d\x01\x2a", "<HH", 16_000),
    "an AVIF of many pixels": lambda: bomb("AVIF", b"ispe" + bytes(4), ">II", 16_000),
    "thousands of scans": lambda: progressive(5000),
    "a million segments": lambda: jpeg(1_000_000, b"\xff\xe3"),
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 30_000_000,
    "EXIF behind what looks like a scan": lambda: (
        b"\xff\xd8\xff\xe3\0\x07\xff\xda\0\x08\x01" + jpeg(450, b"\xff\xe1", exif(65_000))[2:]
    ),
    "EXIF in small pieces": lambda: jpeg(24_000, b"\xff\xe1", exif(1300)),
    "EXIF of a PNG": lambda: save(picture(), "PNG", exif=exif(25_000_000)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_of_very_many_pixels_or_parts_is_refused_in_little_time_and_memory(kind: str) -> None:
    file = HOSTILE[kind]()
    with measured() as cost:
        error = refused(gme.Source("", file))
    assert isinstance(error, gme.TooLargeError) == ("pixels" in kind)
    assert cost.megabytes < 150
    assert cost.seconds < 3


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


def test_the_key_is_equal_where_the_model_sees_the_same() -> None:
    png, bmp = (save(picture(), kind) for kind in ("PNG", "BMP"))
    pairs = [
        (gme.Source("a"), gme.Source("a", None, "You are a helpful assistant.")),
        (gme.Source("é"), gme.Source("e\u0301")),  # composed by the tokenizer
        (gme.Source("word " * 3000), gme.Source("word " * 4000)),  # cut
        (gme.Source("a", png), gme.Source("a", bmp)),
    ]
    for one, other in pairs:
        first, _, second = prepare([one, gme.Source("a neighbour", PHOTO, QUERY), other])
        assert first.key == second.key == prepared(other).key
