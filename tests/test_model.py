"""Room Model: the vectors are those of the authors' own code, whatever shares a batch."""

import functools
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TOY, Case, golden
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLModel

import gme_service as gme

CPU = torch.device("cpu")
SOME = (3, 7, 16, 26, 43)  # cases of every kind that take little time: text, white space, instruction, image, fused


def source(case: Case) -> gme.Source:
    return gme.Source(case.text, case.data, case.prompt or gme.DEFAULT_INSTRUCTION)


def prepare(directory: Path, sources: Sequence[gme.Source]) -> list[gme.Input]:
    inputs = gme.Preparer(directory, 1800, 10**8)(sources)
    assert all(isinstance(one, gme.Input) for one in inputs)
    return inputs  # type: ignore[return-value]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The toy checkpoint is too small to gain from more, and they lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return golden()


@pytest.fixture(scope="module")
def inputs(cases: list[Case]) -> list[gme.Input]:
    return prepare(TOY, [source(case) for case in cases])


@pytest.fixture(scope="module")
def model() -> gme.Model:
    return gme.Model(TOY, CPU, torch.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the toy checkpoint, for the test to change."""
    return Path(shutil.copytree(TOY, tmp_path / "checkpoint"))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_golden(vectors: np.ndarray | Sequence[np.ndarray], cases: Sequence[Case]) -> None:
    for vector, case in zip(vectors, cases, strict=True):
        np.testing.assert_allclose(vector, case.vector, atol=1e-5, rtol=0, err_msg=f"case {case.number}")


def assert_serves_the_golden_vectors(directory: Path, cases: list[Case]) -> None:
    some = [cases[number] for number in SOME]
    model = gme.Model(directory, CPU, torch.float32)
    inputs = prepare(directory, [source(case) for case in some])
    assert_golden([model.embed([one])[0] for one in inputs], some)


# -------------------------------------------------------------------------------------------------- golden vectors


def test_each_input_alone_has_the_authors_vector(model: gme.Model, inputs: list[gme.Input], cases: list[Case]) -> None:
    assert_golden([model.embed([one])[0] for one in inputs], cases)


def by_instruction(inputs: list[gme.Input]) -> list[list[int]]:
    """The numbers of the inputs that may share a batch."""
    return [[n for n, one in enumerate(inputs) if one.prefix == prefix] for prefix in {one.prefix for one in inputs}]


def test_all_inputs_of_an_instruction_in_one_batch_have_the_authors_vectors(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case]
) -> None:
    groups = by_instruction(inputs)
    assert sorted(map(len, groups)) == [1, 11, 42]
    for group in groups:
        assert_golden(model.embed([inputs[n] for n in group]), [cases[n] for n in group])


@pytest.mark.parametrize("seed", range(8))
def test_a_random_batch_in_random_order_has_the_authors_vectors(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case], seed: int
) -> None:
    chance = random.Random(seed)
    for group in by_instruction(inputs):
        batch = chance.sample(group, chance.randint(1, min(8, len(group))))
        assert_golden(model.embed([inputs[n] for n in batch]), [cases[n] for n in batch])


def test_an_input_repeated_in_a_batch_is_answered_each_time(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case]
) -> None:
    batch = [1, 26, 1, 26, 3]
    assert_golden(model.embed([inputs[n] for n in batch]), [cases[n] for n in batch])


def test_vectors_are_float32_of_unit_length(model: gme.Model, inputs: list[gme.Input]) -> None:
    vectors = model.embed(inputs[:10])
    assert vectors.dtype == np.float32
    assert vectors.shape == (10, model.dimension) == (10, 128)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1800), (torch.float16, 270)])  # slow in float16
def test_half_precision_stays_near_the_authors_vectors(
    dtype: torch.dtype, most: int, inputs: list[gme.Input], cases: list[Case]
) -> None:
    half = gme.Model(TOY, CPU, dtype)
    for case, one in zip(cases, inputs, strict=True):
        if one.cost <= most:
            assert half.embed([one])[0] @ case.vector > 0.999, f"case {case.number}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_a_batch_stays_near_the_authors_vectors(
    dtype: torch.dtype, inputs: list[gme.Input], cases: list[Case]
) -> None:
    half = gme.Model(TOY, CPU, dtype)
    batch = [0, 2, 4, 6, 9, 26, 28, 39, 43]
    cosines = (half.embed([inputs[n] for n in batch]) * np.stack([cases[n].vector for n in batch])).sum(axis=1)
    assert cosines.min() > 0.999, f"case {batch[cosines.argmin()]}"


# ------------------------------------------------------------------------------------------------ the prefix cache


def test_a_second_call_has_the_same_vector(inputs: list[gme.Input]) -> None:
    fresh = gme.Model(TOY, CPU, torch.float32)
    first, second = fresh.embed([inputs[0]]), fresh.embed([inputs[0]])
    np.testing.assert_array_equal(first, second)


def test_a_shorter_share_of_a_kept_prefix_has_the_same_vector(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case]
) -> None:
    one = inputs[26]
    for shared in (0, 1, one.shared - 1):
        less = gme.Input(one.token_ids, one.prefix, shared, one.image_start, one.image_grid_thw, one.pixel_values)
        assert_golden(model.embed([less, inputs[1]]), [cases[26], cases[1]])


def test_many_instructions_evict_each_other_and_change_no_vector(inputs: list[gme.Input], cases: list[Case]) -> None:
    fresh = gme.Model(TOY, CPU, torch.float32)
    others = prepare(TOY, [gme.Source("a", None, f"Instruction {n}: " + "word " * 300) for n in range(10)])
    expected = [fresh.embed([one]) for one in others]
    assert_golden(fresh.embed([inputs[16]]), [cases[16]])
    kept = sum(len(prefix) for prefix in fresh._prefixes)
    assert kept <= gme.PREFIX_CACHE_TOKENS < sum(len(one.prefix) for one in others)
    np.testing.assert_allclose([fresh.embed([one]) for one in others], expected, atol=1e-6)


def test_an_instruction_longer_than_all_that_is_kept_is_not_kept(inputs: list[gme.Input], cases: list[Case]) -> None:
    fresh = gme.Model(TOY, CPU, torch.float32)
    (long,) = gme.Preparer(TOY, 32768, 10**8)([gme.Source("a", None, "word " * gme.PREFIX_CACHE_TOKENS)])
    first = fresh.embed([long])
    assert not fresh._prefixes
    np.testing.assert_allclose(fresh.embed([long]), first, atol=1e-6)
    assert_golden(fresh.embed([inputs[16]]), [cases[16]])


def test_an_instruction_past_the_limit_has_the_vector_of_its_beginning(model: gme.Model) -> None:
    short, long, other = prepare(TOY, [gme.Source("a", None, "word " * n) for n in (300, 5000, 6000)])
    np.testing.assert_array_equal(model.embed([long]), model.embed([other]))
    whole = gme.Input(long.token_ids, short.prefix, 0)  # without the help of the prefix
    np.testing.assert_allclose(model.embed([long]), model.embed([whole]), atol=1e-6)


def test_inputs_that_share_the_prefix_to_different_lengths_share_a_batch(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case]
) -> None:
    parts = [
        gme.Input(inputs[n].token_ids, inputs[n].prefix, shared)
        for n, shared in ((0, 3), (1, inputs[1].shared), (2, 9))
    ]
    assert_golden(model.embed(parts), cases[:3])


# --------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "mrope", "mrope_section": [4, 6, 6]},
        {"type": "default", "mrope_section": [4, 6, 6]},
        {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
        {"rope_type": "default", "mrope_section": [4, 6, 6]},
    ],
    ids=["mrope", "default", "both", "new"],
)
def test_every_spelling_of_rope_scaling_has_the_same_vectors(
    checkpoint: Path, cases: list[Case], scaling: dict[str, object]
) -> None:
    edit(checkpoint / "config.json", rope_scaling=scaling)
    assert_serves_the_golden_vectors(checkpoint, cases)


def test_a_checkpoint_in_todays_layout_has_the_same_vectors(checkpoint: Path, cases: list[Case]) -> None:
    for shard in checkpoint.glob("model*"):
        shard.unlink()
    Qwen2VLModel.from_pretrained(TOY, local_files_only=True).save_pretrained(checkpoint)  # nested config, one file
    assert "text_config" in json.loads((checkpoint / "config.json").read_text())
    assert_serves_the_golden_vectors(checkpoint, cases)


def test_a_checkpoint_of_bfloat16_weights_is_computed_in_float32(checkpoint: Path, inputs: list[gme.Input]) -> None:
    shards = list(checkpoint.glob("*.safetensors"))
    rounded = {shard: {name: weight.bfloat16() for name, weight in load_file(shard).items()} for shard in shards}
    for shard, weights in rounded.items():
        save_file(weights, shard, {"format": "pt"})
    edit(checkpoint / "config.json", torch_dtype="bfloat16")
    of_bfloat16 = gme.Model(checkpoint, CPU, torch.float32).embed([inputs[0]])
    for shard, weights in rounded.items():
        save_file({name: weight.float() for name, weight in weights.items()}, shard, {"format": "pt"})
    edit(checkpoint / "config.json", torch_dtype="float32")
    np.testing.assert_allclose(of_bfloat16, gme.Model(checkpoint, CPU, torch.float32).embed([inputs[0]]), atol=1e-6)


@pytest.mark.parametrize(
    "weight", ["model.layers.2.mlp.up_proj.weight", "visual.merger.mlp.0.bias", "model.norm.weight"]
)
def test_a_checkpoint_without_one_of_its_weights_stops_the_start(checkpoint: Path, weight: str) -> None:
    shard = checkpoint / json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][weight]
    weights = load_file(shard)
    del weights[weight]
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        gme.Model(checkpoint, CPU, torch.float32)
    sentence = str(stop.value.code)
    assert sentence.startswith(f"{checkpoint} is not a Qwen2-VL checkpoint: it has no usable weights for ")
    assert weight.removeprefix("model.").removeprefix("visual.") in sentence


def test_a_weight_of_another_shape_stops_the_start(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", intermediate_size=260)
    with pytest.raises(SystemExit, match="is not a Qwen2-VL checkpoint: it has no usable weights for"):
        gme.Model(checkpoint, CPU, torch.float32)


# ----------------------------------------------------------------------------------------- code in the checkpoint

EVIL = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import Qwen2VLConfig as EvilConfig, Qwen2VLModel as EvilModel
class EvilProcessor: pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def planted(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint with code that leaves a trace when it is run, and the path of the trace."""
    trace = tmp_path / "trace"
    for name in ("modeling_evil", "modeling_gme_qwen2vl", "configuration_evil", "tokenization_evil", "processing_evil"):
        (checkpoint / f"{name}.py").write_text(EVIL.format(trace=str(trace)))
    (checkpoint / "__init__.py").write_text(EVIL.format(trace=str(trace)))
    models = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": "modeling_evil.EvilModel"}
    processors = {"AutoImageProcessor": "modeling_evil.EvilProcessor", "AutoProcessor": "modeling_evil.EvilProcessor"}
    tokenizers = {"AutoTokenizer": ["modeling_evil.EvilTokenizer", "modeling_evil.EvilTokenizer"]}
    edit(checkpoint / "config.json", auto_map=models)
    edit(checkpoint / "preprocessor_config.json", auto_map=processors)
    edit(checkpoint / "tokenizer_config.json", auto_map=tokenizers)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return checkpoint, trace


def test_code_in_the_checkpoint_is_not_run(planted: tuple[Path, Path], cases: list[Case]) -> None:
    checkpoint, trace = planted
    assert_serves_the_golden_vectors(checkpoint, cases)
    assert not trace.exists()


def test_the_planted_code_would_leave_a_trace_if_it_were_run(planted: tuple[Path, Path]) -> None:
    checkpoint, trace = planted
    transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert trace.exists()


# ----------------------------------------------------------------------------------------------------- positions


@torch.inference_mode()
def embed_at(model: Qwen2VLModel, one: gme.Input, positions: torch.Tensor) -> np.ndarray:
    """The vector with these positions (3, 1, T) on the rotary axes, computed with the library's parts alone."""
    embeddings = model.language_model.embed_tokens(torch.from_numpy(one.token_ids)[None])
    grid = torch.tensor([one.image_grid_thw])
    image = model.visual(torch.from_numpy(one.pixel_values), grid_thw=grid).pooler_output
    embeddings[0, one.image_start : one.image_start + len(image)] = image
    hidden = model.language_model(inputs_embeds=embeddings, position_ids=positions).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=-1).numpy()


@pytest.mark.parametrize("number", [26, 33, 44])
def test_grid_positions_would_be_caught(inputs: list[gme.Input], cases: list[Case], number: int) -> None:
    one, vector = inputs[number], cases[number].vector
    model = Qwen2VLModel.from_pretrained(TOY, dtype=torch.float32, local_files_only=True)
    token_ids = torch.from_numpy(one.token_ids)[None]
    kinds = torch.zeros_like(token_ids)  # 1 for a token of an image
    kinds[0, one.image_start :][token_ids[0, one.image_start :] == token_ids[0, one.image_start]] = 1
    grid, _ = model.get_rope_index(token_ids, kinds, torch.tensor([one.image_grid_thw]))
    sequential = torch.arange(len(one.token_ids)).expand(3, 1, -1)
    assert embed_at(model, one, sequential) @ vector > 0.999999
    assert embed_at(model, one, grid) @ vector < 0.999


# ---------------------------------------------------------------------------------------------------- out of memory


def fail(error: Exception, *_: object, **__: object) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_is_a_memory_error_and_the_next_batch_works(
    model: gme.Model, inputs: list[gme.Input], cases: list[Case], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(torch.nn.functional, "normalize", functools.partial(fail, error))
        with pytest.raises(MemoryError, match="does not fit"):
            model.embed([inputs[0]])
    assert_golden(model.embed([inputs[0]]), [cases[0]])


def test_memory_that_torch_cannot_have_is_a_memory_error(
    model: gme.Model, inputs: list[gme.Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "normalize", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(MemoryError):
        model.embed([inputs[0]])


def test_another_fault_stays_what_it_is(
    model: gme.Model, inputs: list[gme.Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("The size of tensor a must match")
    monkeypatch.setattr(torch.nn.functional, "normalize", functools.partial(fail, fault))
    with pytest.raises(RuntimeError, match="The size of tensor a must match"):
        model.embed([inputs[0]])


def test_a_device_that_cannot_go_on_ends_the_process(
    model: gme.Model, inputs: list[gme.Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.nn.functional, "normalize", functools.partial(fail, fault))
    with pytest.raises(SystemExit, match="The device cpu cannot go on"):
        model.embed([inputs[0]])
