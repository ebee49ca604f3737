"""Room Model: the vectors are those of the authors' own code, whatever shares a batch, or there are none."""

import functools
import json
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOY, WIDE, Case, golden, run
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

import gme_service as gme

CPU = torch.device("cpu")
SOME = (3, 7, 16, 26, 43)  # cases of every kind that take little time: text, white space, instruction, image, fused
MANY = 270  # tokens: a CPU computes float16 many times slower than the others


def prepare(directory: Path, sources: Sequence[gme.Source]) -> list[gme.Input]:
    inputs = gme.Preparer(directory, 1800, 10**8)(sources)
    assert all(isinstance(one, gme.Input) for one in inputs)
    return inputs  # type: ignore[return-value]


def prepare_cases(directory: Path, cases: Sequence[Case]) -> list[gme.Input]:
    sources = [gme.Source(case.text, case.data, case.prompt or gme.DEFAULT_INSTRUCTION) for case in cases]
    return prepare(directory, sources)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The checkpoints are too small to gain from more, and they lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return golden()


@pytest.fixture(scope="module")
def inputs(cases: list[Case]) -> list[gme.Input]:
    return prepare_cases(TOY, cases)


@pytest.fixture(scope="module")
def model() -> gme.Model:
    return gme.Model(TOY, CPU, torch.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the toy checkpoint, for the test to change."""
    return Path(shutil.copytree(TOY, tmp_path / "checkpoint"))


def assert_golden(vectors: np.ndarray | Sequence[np.ndarray], cases: Sequence[Case]) -> None:
    for vector, case in zip(vectors, cases, strict=True):
        np.testing.assert_allclose(vector, case.vector, atol=1e-5, rtol=0, err_msg=f"case {case.number}")


def assert_serves_the_golden_vectors(directory: Path, cases: list[Case]) -> None:
    some = [cases[number] for number in SOME]
    model = gme.Model(directory, CPU, torch.float32)
    assert_golden([model.embed([one])[0] for one in prepare_cases(directory, some)], some)


def by_instruction(inputs: list[gme.Input]) -> list[list[int]]:
    """The numbers of the inputs that may share a batch."""
    return [[n for n, one in enumerate(inputs) if one.prefix == prefix] for prefix in {one.prefix for one in inputs}]


# -------------------------------------------------------------------------------------------------- golden vectors


def test_each_input_alone_has_the_authors_vector(model: gme.Model, inputs: list[gme.Input], cases: list[Case]) -> None:
    vectors = [model.embed([one]) for one in inputs]
    assert {(vector.dtype, vector.shape) for vector in vectors} == {(np.dtype(np.float32), (1, model.dimension))}
    assert_golden([vector[0] for vector in vectors], cases)


def test_each_input_in_a_mixed_batch_has_the_authors_vector(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case]
) -> None:
    chance = random.Random(0)
    for group in by_instruction(inputs):
        chance.shuffle(group)
        while group:
            batch = [group.pop() for _ in range(min(len(group), chance.randint(2, 6)))]
            batch.append(batch[0])  # the same input twice
            assert_golden(model.embed([inputs[n] for n in batch]), [cases[n] for n in batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_authors_vectors(
    dtype: torch.dtype, inputs: list[gme.Input], cases: list[Case]
) -> None:
    half = gme.Model(TOY, CPU, dtype)
    few = [n for n, one in enumerate(inputs) if one.cost <= MANY]
    alone = [half.embed([inputs[n]])[0] for n in few]
    batch = [n for n in few if inputs[n].prefix == inputs[0].prefix][::2]
    for n, vector in [*zip(few, alone, strict=True), *zip(batch, half.embed([inputs[n] for n in batch]), strict=True)]:
        assert vector @ cases[n].vector > 0.999, f"case {n}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_the_7bs_shape_has_the_authors_vectors(dtype: torch.dtype) -> None:
    cases = golden(wide=True)
    wide, inputs = gme.Model(WIDE, CPU, dtype), prepare_cases(WIDE, cases)
    alone = np.stack([wide.embed([one])[0] for one in inputs])
    for group in by_instruction(inputs):
        together = wide.embed([inputs[n] for n in group])
        if dtype == torch.float32:
            assert_golden(together, [cases[n] for n in group])
        else:
            assert (together * alone[group]).sum(1).min() > 0.99
    if dtype == torch.float32:
        assert_golden(alone, cases)


# ------------------------------------------------------------------------------------------------ the prefix cache


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each run of the decoder, how many tokens it reads."""
    counts: list[int] = []
    embedding = functional.embedding

    def count(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(token_ids.numel())
        return embedding(token_ids, *rest)

    monkeypatch.setattr(functional, "embedding", count)
    return counts


def test_an_instruction_is_computed_once_until_others_take_its_place(
    computed: list[int], inputs: list[gme.Input], cases: list[Case]
) -> None:
    model = gme.Model(TOY, CPU, torch.float32)
    one, first = inputs[16], len(inputs[16].prefix)
    others = prepare(TOY, [gme.Source("a", None, f"Instruction {n}: " + "word " * 300) for n in range(10)])
    expected = [model.embed([replace(other, shared=0)]) for other in others]

    def tokens(one: gme.Input) -> int:
        computed.clear()
        model.embed([one])
        return sum(computed)

    assert [tokens(one), tokens(one)] == [one.cost + first, one.cost]
    assert_golden(model.embed([one]), [cases[16]])
    np.testing.assert_allclose([model.embed([other]) for other in others], expected, atol=1e-6)
    assert tokens(others[-1]) == others[-1].cost
    assert tokens(one) == one.cost + first  # its keys and values are not kept for ever
    assert_golden(model.embed([one]), [cases[16]])


def test_an_instruction_too_long_to_keep_takes_the_place_of_no_other(
    computed: list[int], inputs: list[gme.Input]
) -> None:
    model = gme.Model(TOY, CPU, torch.float32)
    (long,) = gme.Preparer(TOY, 32768, 10**8)([gme.Source("a", None, "a " * 6000)])
    model.embed([inputs[16]])
    first = model.embed([long])
    computed.clear()
    np.testing.assert_allclose(model.embed([long]), first, atol=1e-6)
    model.embed([inputs[16]])
    assert sum(computed) == len(long.prefix) + long.cost + inputs[16].cost


def test_inputs_that_share_the_prefix_to_different_lengths_share_a_batch(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case]
) -> None:
    for shared in (0, 1, 9, inputs[26].shared - 1):
        assert_golden(
            model.embed([replace(inputs[26], shared=shared), inputs[1], replace(inputs[2], shared=3)]),
            [cases[26], cases[1], cases[2]],
        )


# ------------------------------------------------------------------------------------------------- the checkpoint


def rename(name: str) -> str:
    """The name of a weight as a current transformers saves it."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("renamed", [False, True])
def test_current_and_published_names_and_configs_have_the_same_vectors(
    checkpoint: Path, cases: list[Case], renamed: bool, nested: bool
) -> None:
    weights: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        weights |= load_file(shard)
        shard.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    weights = {rename(name) if renamed else name: weight for name, weight in weights.items()}
    save_file(weights, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    if nested:
        rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
        vision = config.pop("vision_config")
        config = {"text_config": config | {"rope_parameters": rope}, "vision_config": vision}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert_serves_the_golden_vectors(checkpoint, cases)


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("kind", [{"type": "mrope"}, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}, None])
def test_rope_scaling_changes_nothing(checkpoint: Path, cases: list[Case], kind: dict[str, object] | None) -> None:
    edit(checkpoint / "config.json", rope_scaling=kind and kind | {"mrope_section": [4, 6, 6]})
    assert_serves_the_golden_vectors(checkpoint, cases)


def change(checkpoint: Path, name: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a weight of the checkpoint, or take it out."""
    shard = checkpoint / json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(shard)
    weight = new(weights.pop(name))
    save_file(weights if weight is None else weights | {name: weight}, shard)


@pytest.mark.parametrize(
    "fault", [lambda weight: None, lambda weight: weight[1:].clone()], ids=["missing", "misshapen"]
)
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "visual.merger.mlp.0.bias", "visual.patch_embed.proj.weight"]
)
def test_a_missing_and_a_misshapen_weight_are_named(
    checkpoint: Path, name: str, fault: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    change(checkpoint, name, fault)
    with pytest.raises(gme.StartError) as stop:
        gme.Model(checkpoint, CPU, torch.float32)
    assert name in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_missing_weight_ends_the_start_with_a_sentence(checkpoint: Path) -> None:
    change(checkpoint, "model.norm.weight", lambda weight: None)
    end = run("-c", "import gme_service", GME_MODEL_DIR=str(checkpoint.parent), GME_MODEL_ID="checkpoint")
    assert end.returncode not in (0, None)
    assert "model.norm.weight" in end.stderr
    assert len(end.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------- the probe at start

PROBES = ("a red circle on a grey ground, and nothing else", "an orange star, and a text of another length than that")
attention = functional.scaled_dot_product_attention
arange = torch.arange


def cache_ignored(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **options: Any) -> Any:
    own = query.shape[-2]
    return attention(
        query, key[..., -own:, :], value[..., -own:, :], None if mask is None else mask[:, -own:], **options
    )


def padding_seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return attention(query, key, value)


def not_a_number(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query * float("nan")


def positions_shifted(start: int, end: int | None = None, **options: Any) -> torch.Tensor:
    """Every sequence begins at position 0, that behind a cached prefix too."""
    return arange(start if end is None else end - start, **options)


BREAKS = {
    "cache ignored": (functional, "scaled_dot_product_attention", cache_ignored),
    "padding seen": (functional, "scaled_dot_product_attention", padding_seen),
    "not a number": (functional, "scaled_dot_product_attention", not_a_number),
    "positions shifted": (torch, "arange", positions_shifted),
}


@pytest.mark.parametrize("directory", [TOY, WIDE], ids=["toy", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_at_start_passes_a_model_that_works(directory: Path, dtype: torch.dtype) -> None:
    gme.Model(directory, CPU, dtype).check(prepare(directory, [gme.Source(text) for text in PROBES]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", BREAKS)
def test_the_probe_at_start_refuses_wrong_vectors(
    monkeypatch: pytest.MonkeyPatch, part: str, dtype: torch.dtype
) -> None:
    model, probes = gme.Model(TOY, CPU, dtype), prepare(TOY, [gme.Source(text) for text in PROBES])
    monkeypatch.setattr(*BREAKS[part])
    with pytest.raises(gme.StartError, match=r"torch"):
        model.check(probes)


# ------------------------------------------------------------------------------------------------------ devices


OTHER = SimpleNamespace(
    _reorder_linear_weight=lambda weight, *_: weight,
    _linear_pointwise=SimpleNamespace(
        default=lambda x, weight, *_: x @ weight.T + 1, binary=lambda x, other, weight, *_: x @ weight.T + other
    ),
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch has them for this machine only")
@pytest.mark.parametrize("operators", [SimpleNamespace(), OTHER], ids=["missing", "other"])
def test_without_onednns_operators_the_vectors_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cases: list[Case], operators: SimpleNamespace
) -> None:
    caplog.set_level("INFO")
    gme.Model(TOY, CPU, torch.float32)
    assert not caplog.messages
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert_serves_the_golden_vectors(TOY, cases)
    assert "oneDNN" in caplog.text


class WithoutGuards(TorchFunctionMode):
    """What a build of torch for CPUs lacks to compute with fake CUDA tensors: indexing, `tensor` and `asarray`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is torch.Tensor.__getitem__:
            return self.index(*arguments)
        if function is torch.Tensor.__setitem__:
            return self.index(*arguments[:2]).add_(arguments[2])
        if getattr(function, "__name__", "") not in ("tensor", "asarray"):  # the last is safetensors' own
            return function(*arguments, **options)
        device = options.pop("device", None)
        with _disable_current_modes():
            made = function(*arguments, **options)
        return torch.empty_like(made, device=device) if device else made

    def index(self, x: torch.Tensor, key: Any) -> torch.Tensor:
        dimension, tensors = 0, []
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, int):
                x = x.select(dimension, part)
                continue
            if part is None:
                x = x.unsqueeze(dimension)
            elif isinstance(part, slice):
                x = torch.ops.aten.slice(x, dimension, part.start, part.stop)
            else:
                tensors.append(part)
            dimension += 1
        return torch.ops.aten.index(x, tensors) if tensors else x


def on_a_fake_gpu(inputs: Sequence[gme.Input]) -> torch.Tensor:
    """The forward pass on CUDA tensors that have a shape, a dtype and a device, and no content."""
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutGuards():
        return gme.Model(TOY, torch.device("cuda:0"), torch.float16).forward([inputs[n] for n in (0, 26, 43)])


def test_on_cuda_no_operation_mixes_devices(inputs: list[gme.Input]) -> None:
    vectors = on_a_fake_gpu(inputs)
    assert (vectors.device.type, vectors.dtype, vectors.shape[0]) == ("cuda", torch.float32, 3)


@pytest.mark.parametrize("name", ["arange", "tensor"])
def test_a_tensor_left_on_the_cpu_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, inputs: list[gme.Input], name: str
) -> None:
    made = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *arguments, device=None, **options: made(*arguments, **options))
    with pytest.raises(RuntimeError, match=r"found (at least )?two"):
        on_a_fake_gpu(inputs)


# ---------------------------------------------------------------------------------------------------------- faults


def fail(error: Exception, *_: object, **__: object) -> None:
    raise error


@pytest.mark.parametrize(
    "normalize",
    [
        functools.partial(fail, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
        lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8),  # which no CPU has
    ],
    ids=["cuda", "cpu"],
)
def test_memory_that_runs_out_is_a_memory_error_and_the_next_batch_works(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case], monkeypatch: pytest.MonkeyPatch,
    normalize: Callable[..., Any],
) -> None:  # fmt: skip
    with monkeypatch.context() as broken:
        broken.setattr(functional, "normalize", normalize)
        with pytest.raises(MemoryError):
            model.embed([inputs[0]])
    assert_golden(model.embed([inputs[0]]), [cases[0]])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), gme.DeviceError),
        (RuntimeError("The size of tensor a must match"), RuntimeError),
    ],
    ids=["device lost", "another fault"],
)
def test_a_device_that_is_lost_is_told_from_other_faults(
    model: gme.Model, inputs: list[gme.Input], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    monkeypatch.setattr(functional, "normalize", functools.partial(fail, error))
    with pytest.raises(kind) as raised:
        model.embed([inputs[0]])
    assert raised.type is kind
    assert str(error) in str(raised.value)
