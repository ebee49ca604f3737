"""Room Model: the vectors are those of the authors' own code, whatever shares a batch, or there are none."""

import json
import math
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TOY, WIDE, Patch, golden
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

import gme_service as gme

CPU = torch.device("cpu")
MODEL = gme.Model(TOY, gme.Config.read(TOY), CPU, torch.float32)
LARGE = "1008x1008.png"  # 1,260 tokens
FEW = 270  # tokens: a CPU computes float16 many times slower than the others
PROBES = [gme.Source("a red circle, and then nothing"), gme.Source("a text of another length than the one before it")]
attention = functional.scaled_dot_product_attention
rotary_angles = gme.rotary_angles


def prepare(sources: Sequence[gme.Source], max_length: int = 1800) -> list[gme.Input]:
    return gme.Preparer(TOY, max_length, 10**8)(sources)  # the wide checkpoint has the same tokenizer


GOLDEN = prepare([gme.Source(case.text, case.data, case.prompt or gme.DEFAULT_INSTRUCTION) for case in golden()])


def inputs(*numbers: int) -> list[gme.Input]:
    return [GOLDEN[number] for number in numbers]


def assert_golden(model: gme.Model, *numbers: int, least: float | None = None, wide: bool = False) -> None:
    """In one batch, these cases have the authors' vectors; or vectors as near as the least cosine."""
    expected = {case.number: case.vector for case in golden(wide)}
    vectors = model.embed(inputs(*numbers))
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(numbers), model.dimension))
    for number, vector in zip(numbers, vectors, strict=True):
        if least is None:
            np.testing.assert_allclose(vector, expected[number], atol=1e-5, rtol=0, err_msg=f"case {number}")
        else:
            assert vector @ expected[number] > least, f"case {number}"


def mixed_batches(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Each of the cases in one random batch of those with its instruction, the shortest of each batch twice."""
    chance = random.Random(0)
    for prefix in sorted({one.prefix for one in inputs(*numbers)}):
        group = [number for number in numbers if GOLDEN[number].prefix == prefix]
        chance.shuffle(group)
        for start in range(0, len(group), 4):
            batch = group[start : start + 4]
            yield [*batch, min(batch, key=lambda number: GOLDEN[number].own_tokens)]


# --------------------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "least"),
    [
        (TOY, torch.float32, None),
        (TOY, torch.bfloat16, 0.998),
        (TOY, torch.float16, 0.999),
        (WIDE, torch.float32, None),  # of the 7B's shape
        (WIDE, torch.bfloat16, 0.99),  # of random weights
    ],
)
def test_alone_and_in_a_mixed_batch_an_input_has_the_authors_vector(
    checkpoint: Path, dtype: torch.dtype, least: float | None
) -> None:
    model, wide = gme.Model(checkpoint, gme.Config.read(checkpoint), CPU, dtype), checkpoint == WIDE
    few = FEW if checkpoint == TOY and dtype != torch.float32 else 10_000
    numbers = [case.number for case in golden(wide) if GOLDEN[case.number].own_tokens <= few]
    # Alone the long ones take most of the time, and one of them shows how rotary angles are rounded.
    alone = [number for number in numbers if GOLDEN[number].own_tokens <= FEW or golden()[number].image == LARGE]
    for batch in [*mixed_batches(numbers), *([number] for number in alone)]:
        assert_golden(model, *batch, least=least, wide=wide)


def test_images_that_share_a_call_of_the_vision_tower_have_the_same_vectors() -> None:
    """As on a GPU: up to so many patches, in which the third image begins another call."""
    model = gme.Model(TOY, gme.Config.read(TOY), CPU, torch.float32)
    images = [case.number for case in golden() if case.image and GOLDEN[case.number].own_tokens <= FEW]
    for batch in mixed_batches(images):
        patches = [len(item.patches) for item in inputs(*batch) if item.patches is not None]
        for together in (sum(patches), sum(patches[:2])):
            model.kernels = replace(model.kernels, patches_together=together)
            assert_golden(model, *batch)


@example([7, 7, 10])  # exactly as full as it has to be
@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_calls_of_attention_take_each_token_once_and_little_padding(lengths: list[int]) -> None:
    lengths.sort()
    spans = MODEL.spans(np.array(lengths))
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == sum(lengths)
    assert sum(span.count for span in spans) == len(lengths)
    tokens = torch.arange(float(sum(lengths)))[:, None]
    for span in spans:
        assert span.stop - span.start >= gme.MIN_FILL * (span.count * span.longest)
        torch.testing.assert_close(span.unpad(span.pad(tokens)), tokens[span.start : span.stop])


def test_an_instruction_is_computed_once_until_others_take_its_place(monkeypatch: Patch) -> None:
    computed: list[int] = []  # how many tokens the decoder reads, each time
    plain = functional.embedding
    monkeypatch.setattr(functional, "embedding", lambda ids, *rest: computed.append(ids.numel()) or plain(ids, *rest))
    model = gme.Model(TOY, gme.Config.read(TOY), CPU, torch.float32)
    (one,), others = inputs(16), prepare([gme.Source("a", None, f"Instruction {n}.") for n in range(20)])
    (long,) = prepare([gme.Source("a", None, "a " * 400)])  # of which only the last is kept
    (endless,) = prepare([gme.Source("a", None, "a " * 3000)], max_length=4000)  # which is never kept
    expected = {other.key: model.embed([replace(other, prefix=())]) for other in [one, *others, long, endless]}

    def prefix_tokens(one: gme.Input) -> int:
        computed.clear()
        np.testing.assert_allclose(model.embed([one]), expected[one.key], atol=1e-6)
        return sum(computed) - one.own_tokens

    assert [prefix_tokens(x) for x in (one, long)] == [len(x.prefix) for x in (one, long)]
    assert [prefix_tokens(x) for x in (endless, endless)] == [len(endless.prefix)] * 2
    assert [prefix_tokens(x) for x in (one, long)] == [0, 0]
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in model.prefix_states(one.prefix))
    assert [prefix_tokens(x) for x in others] == [len(x.prefix) for x in others]
    assert [prefix_tokens(x) for x in (others[-1], one)] == [0, len(one.prefix)]


# ------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "visual.patch_embed.proj.weight"])
@pytest.mark.parametrize("misshapen", [False, True])
def test_a_missing_and_a_misshapen_weight_are_named(tmp_path: Path, name: str, misshapen: bool) -> None:
    checkpoint = Path(shutil.copytree(TOY, tmp_path / "checkpoint"))
    shard = checkpoint / json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(shard)
    weight = weights.pop(name)
    save_file(weights | {name: weight[1:].clone()} if misshapen else weights, shard)
    with pytest.raises(gme.StartError) as stop:
        gme.Model(checkpoint, gme.Config.read(checkpoint), CPU, torch.float32).check(prepare(PROBES))
    assert name in str(stop.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_blamed_and_not_torch(tmp_path: Path, value: float) -> None:
    directory = Path(shutil.copytree(TOY, tmp_path / "toy" / "shapes"))
    for path in directory.glob("*.safetensors"):
        weights = load_file(path)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"][0] = value
            save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(gme.StartError) as stop:
        gme.load(gme.Settings(model_dir=tmp_path))
    assert "weights" in str(stop.value)
    assert "requirements" not in str(stop.value)


# ---------------------------------------------------------------------------------------------- the probe at start


def cache_ignored(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Tensor:
    own = query.shape[-2]
    mask = None if mask is None else mask[:, -own:]
    return attention(query, key[..., -own:, :], value[..., -own:, :], mask, **options)


def positions_from_zero(positions: Tensor, pairs: int, theta: float) -> Tensor:
    return rotary_angles(positions - positions.min(), pairs, theta)


def mask_ignored(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return attention(query, key, value)


def not_numbers(query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query * float("nan")


BREAKS = [
    (functional, attention.__name__, cache_ignored, "not torch"),
    (functional, attention.__name__, mask_ignored, "not torch"),
    (functional, attention.__name__, not_numbers, "not finite"),
    (gme, "rotary_angles", positions_from_zero, "not torch"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_at_start_refuses_wrong_vectors_and_no_others(monkeypatch: Patch, dtype: torch.dtype) -> None:
    gme.Model(WIDE, gme.Config.read(WIDE), CPU, dtype).check(prepare(PROBES))
    gme.Model(TOY, gme.Config.read(TOY), CPU, dtype).check(prepare(PROBES))
    for target, name, wrong, sentence in BREAKS:
        model = gme.Model(TOY, gme.Config.read(TOY), CPU, dtype)
        with monkeypatch.context() as broken:
            broken.setattr(target, name, wrong)
            with pytest.raises(gme.StartError, match=sentence):
                model.check(prepare(PROBES))


# --------------------------------------------------------------------------------------------------------- devices

OTHER = SimpleNamespace(
    _reorder_linear_weight=lambda weight, *_: weight,
    _linear_pointwise=SimpleNamespace(
        default=lambda x, weight, *_: x @ weight.T + 1, binary=lambda x, other, weight, *_: x @ weight.T + other
    ),
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch may have them for this machine only")
@pytest.mark.parametrize("operators", [SimpleNamespace(), OTHER], ids=["missing", "other"])
def test_without_onednns_operators_the_vectors_are_the_same(
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture, operators: SimpleNamespace
) -> None:
    caplog.set_level("INFO")
    gme.Model(TOY, gme.Config.read(TOY), CPU, torch.float32)
    assert not caplog.messages
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    other = gme.Model(TOY, gme.Config.read(TOY), CPU, torch.float32)
    for number in (3, 7, 16, 26, 43):  # text, white space, instruction, image, fused
        assert_golden(other, number)
    assert "oneDNN" in caplog.text


@pytest.mark.parametrize("has_amx", [False, True])
def test_attention_of_an_image_in_bfloat16_suits_the_processor(monkeypatch: Patch, has_amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": has_amx})
    monkeypatch.setattr(torch, "set_float32_matmul_precision", Mock())
    attend = gme.cpu_kernels(torch.bfloat16, 1536).attend
    assert attend is (attention if has_amx else gme.attend_in_chunks)
    seeded = torch.Generator().manual_seed(0)
    qkv = torch.randn((1100, 3 * 2, 80), generator=seeded).bfloat16()  # the last chunk is not full
    heads_first = [x.transpose(0, 1)[None] for x in qkv.split(2, dim=1)]
    exact = attention(*(x.double() for x in heads_first))
    torch.testing.assert_close(attend(*heads_first).double(), exact, atol=0.01, rtol=0)


class WithoutGuards(TorchFunctionMode):
    """What a build of torch for CPUs cannot do with fake CUDA tensors: indexing, `copy_`, `tensor`, `asarray`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is Tensor.__getitem__:
            return self.index(*arguments)
        if function is Tensor.__setitem__:
            return self.index(*arguments[:2]).add_(arguments[2])
        if function is Tensor.copy_:
            return arguments[0].add_(arguments[1])
        if function is Tensor.pin_memory:
            return torch.empty(arguments[0].shape, dtype=arguments[0].dtype)
        if getattr(function, "__name__", "") not in ("tensor", "asarray"):  # the last is safetensors' own
            return function(*arguments, **options)
        device = options.pop("device", None)
        with _disable_current_modes():
            made = function(*arguments, **options)
        return torch.empty_like(made, device=device) if device else made

    def index(self, x: Tensor, key: Any) -> Tensor:
        dimension, tensors = 0, []
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, int):
                x, dimension = x.select(dimension, part), dimension - 1
            elif part is None:
                x = x.unsqueeze(dimension)
            elif isinstance(part, slice):
                x = torch.ops.aten.slice(x, dimension, part.start, part.stop)
            else:
                tensors.append(part)
            dimension += 1
        return torch.ops.aten.index(x, tensors) if tensors else x


def test_on_cuda_no_operation_mixes_devices(monkeypatch: Patch) -> None:
    monkeypatch.setattr(gme, "inverse_frequencies", gme.inverse_frequencies.__wrapped__)  # it would keep fakes
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutGuards():  # no content: shapes, dtypes and devices alone
        model = gme.Model(TOY, gme.Config.read(TOY), torch.device("cuda:0"), torch.float16)
        batch = [*inputs(0, 26, 43), *prepare([gme.Source("two of nearly the same length")])]
        lengths = sorted(item.own_tokens for item in batch)
        assert any(span.slots is not None for span in model.spans(np.array(lengths)))
        vectors, _ = model.forward(batch)
    assert (vectors.device.type, vectors.dtype, vectors.shape) == ("cuda", torch.float32, (4, MODEL.dimension))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, None), (torch.float16, 0.999)])
def test_on_a_gpu_the_vectors_are_the_authors(dtype: torch.dtype, least: float | None) -> None:
    model = gme.Model(TOY, gme.Config.read(TOY), torch.device("cuda"), dtype)
    model.check(prepare(PROBES))
    for batch in mixed_batches(range(len(GOLDEN))):
        assert_golden(model, *batch, least=least)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), gme.TooLargeError),
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB."), gme.TooLargeError),
        (lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8), gme.TooLargeError),  # which no CPU has
        (torch.AcceleratorError("CUDA error: out of memory"), gme.TooLargeError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), gme.DeviceLostError),
        (RuntimeError("The size of tensor a must match"), RuntimeError),
    ],
    ids=["GPU", "GPU in other words", "CPU", "memory of CUDA itself", "device lost", "another fault"],
)
def test_what_fails_is_told_apart_and_the_next_batch_works(
    monkeypatch: Patch, fault: Exception | Callable[..., Tensor], kind: type[Exception]
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(functional, "normalize", Mock(side_effect=fault))
        with pytest.raises(kind) as raised:
            MODEL.embed(inputs(0))
    assert raised.type is kind
    assert_golden(MODEL, 0)
