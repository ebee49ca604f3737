"""Room Checkpoint: what a configuration may say, and the real ModelScope client against a hub on loopback."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TESTS, TOY, WIDE, Patch, Start, free_port, golden, run
from hub import Hub, Stall, serve_hub
from make_random import configuration, published_shapes
from safetensors import safe_open
from tokenizers import Tokenizer, models

import gme_service as gme

SHARDS = sorted(path.name for path in TOY.glob("*.safetensors"))
PORT = free_port()  # of the hub of every test: in a process, the client keeps the first that it is told
CLOSED_PORT = "http://127.0.0.1:9"
UVICORN = ("-m", "uvicorn", "gme_service:app", "--port", "0")
LOAD = ("-c", "import gme_service")  # what uvicorn does before it opens the port
READ_FILES = ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors.index.json", SHARDS[-1]]
# Of the published models, where both have them: layers, heads of vision, and so on.
VISION = {"vision_width": 1280, "vision_layers": 32, "vision_heads": 16, "vision_inner": 5120}
PUBLISHED = {
    "2B": {"width": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "inner": 8960, "vocabulary": 151936, **VISION},
    "7B": {"width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "inner": 18944, "vocabulary": 152064, **VISION},
}
PARAMETERS = {"2B": 2_208_985_600, "7B": 7_746_378_240}  # without the `lm_head` that the 7B has, and nothing reads


def published(size: str, directory: Path) -> Path:
    """A directory that has the configuration of a published model, and no weights."""
    shutil.copy(TESTS / "published" / f"config-{size}.json", directory / "config.json")
    shutil.copy(TOY / "preprocessor_config.json", directory)
    return directory


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_configuration_gives_the_published_network(tmp_path: Path, size: str) -> None:
    config = gme.Config.read(published(size, tmp_path))
    assert PUBLISHED[size].items() <= vars(config).items()
    assert (config.theta, config.eps) == (1e6, 1e-6)
    with torch.device("meta"):
        network = gme.Qwen2VL(config)
    shapes = published_shapes(json.loads((tmp_path / "config.json").read_text()))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[size]
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[size]


def test_the_defaults_are_those_of_the_class_that_the_published_file_was_saved_by(tmp_path: Path) -> None:
    published("2B", tmp_path)
    left_out = gme.Config.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configuration(spell_out=True)))
    assert gme.Config.read(tmp_path) == left_out
    fields = configuration(spell_out=False)
    del fields["rope_theta"], fields["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    least = gme.Config.read(tmp_path)
    assert (least.theta, least.eps) == (1e6, 1e-5)


def test_the_names_and_shapes_of_weights_are_those_that_the_authors_code_saved() -> None:
    saved = {}
    for path in TOY.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert published_shapes(json.loads((TOY / "config.json").read_text())) == saved


def test_a_nested_configuration_is_read_as_a_flat_one(tmp_path: Path) -> None:
    fields = json.loads((WIDE / "config.json").read_text())
    text = fields.pop("text_config")
    theta = text.pop("rope_parameters")["rope_theta"]
    shutil.copy(WIDE / "preprocessor_config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**fields, **text, "rope_theta": theta}))
    assert gme.Config.read(tmp_path) == gme.Config.read(WIDE)


NO_CONFIGURATION = [
    # The fields that are changed in the 2B's, and what the sentence has to name.
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": "12"}, "num_attention_heads"),
    ({"num_key_value_heads": True}, "num_key_value_heads"),
    ({"intermediate_size": -8960}, "intermediate_size"),
    ({"vocab_size": 151936.5}, "vocab_size"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rope_theta": math.nan}, "rope_theta"),
    ({"rope_theta": None}, "rope_theta"),
    ({"num_attention_heads": 11}, "num_attention_heads"),
    ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ({"hidden_size": 12 * 127}, "odd"),
    ({"vision_config": None}, "vision_config"),
    ({"vision_config": {"depth": 0}}, "vision_config.depth"),
    ({"vision_config": {"embed_dim": 1281}}, "embed_dim"),
    ({"vision_config": {"embed_dim": 16 * 78}}, "multiple of 4"),
    ({"text_config": {"hidden_size": 1536}}, "text_config.num_hidden_layers"),
    ({"text_config": []}, "text_config"),
    # With these, the authors' code computes other vectors.
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
    ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act"),
    ({"vision_config": {"patch_size": 16}}, "vision_config.patch_size"),
    ({"vision_config": {"spatial_merge_size": 1}}, "vision_config.spatial_merge_size"),
    ({"vision_config": {"temporal_patch_size": 1}}, "vision_config.temporal_patch_size"),
]


def refusal_of_config(directory: Path) -> str:
    with pytest.raises(gme.StartError) as stop:
        gme.Config.read(directory)
    assert stop.value.exit_code == 78
    return str(stop.value)


@pytest.mark.parametrize(("changed", "named"), NO_CONFIGURATION)
def test_a_configuration_that_cannot_be_is_refused_with_the_field(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    path = published("2B", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    sentence = refusal_of_config(tmp_path)
    assert sentence.startswith(f"{path} does not describe a Qwen2-VL: ")
    assert named in sentence


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "vision_config"])
def test_what_has_no_default_may_not_be_left_out(tmp_path: Path, name: str) -> None:
    path = published("2B", tmp_path) / "config.json"
    fields = json.loads(path.read_text())
    del fields[name]
    path.write_text(json.dumps(fields))
    assert name in refusal_of_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "{", ""])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (published("2B", tmp_path) / "config.json").write_text(text)
    assert refusal_of_config(tmp_path).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("numbers", [None, "0.5", [0.5, 0.5], [0.5] * 4, [0.5, 0.5, "0.5"], [0.5, 0.5, 0]])
def test_a_preprocessor_that_cannot_normalise_is_refused(tmp_path: Path, numbers: object) -> None:
    path = published("2B", tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": numbers}))
    sentence = refusal_of_config(tmp_path)
    assert str(path) in sentence
    assert "image_std" in sentence


def test_an_error_of_our_own_is_not_told_as_another_model(monkeypatch: Patch) -> None:
    def fault(self: gme.Config, **fields: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(gme.Config, "__init__", fault)
    with pytest.raises(KeyError, match="ours"):
        gme.Config.read(TOY)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub(TOY, "toy/shapes", PORT) as hub:
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path, monkeypatch: Patch) -> dict[str, str]:
    """The hub and the model directory. HOME can hold nothing, as under the systemd unit, where it is read-only."""
    environment = {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # the client would try for 7 s
        "GME_MODEL_DIR": str(tmp_path / "models"),
        "HOME": "/dev/null",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def checkpoint(environment: dict[str, str]) -> Path:
    """Where the service expects the checkpoint; nothing is there yet."""
    return Path(environment["GME_MODEL_DIR"]) / "toy" / "shapes"


@pytest.fixture
def by_hand(checkpoint: Path) -> Path:
    """The checkpoint, put there by hand."""
    return Path(shutil.copytree(TOY, checkpoint))


def contents(directory: Path) -> dict[str, bytes]:
    """The files of the checkpoint that are there, and no others that may lie beside them."""
    names = [path.name for path in TOY.iterdir() if (directory / path.name).exists()]
    return {name: (directory / name).read_bytes() for name in names}


def without_privileges() -> list[str]:
    """Before a command, makes it one of an ordinary user, for whom permissions hold."""
    prefix = ["unshare", "--user", "--map-user=54321"]
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system gives no user namespaces")
    return prefix


def test_the_first_start_downloads_the_checkpoint_and_serves_it(
    hub: Hub, environment: dict[str, str], checkpoint: Path, start: Start
) -> None:
    hub.cuts[SHARDS[1]] = 500_000  # the connection breaks once
    case = golden()[0]
    server = start(**environment)
    with server.client() as client:
        answer = client.post("/embed/text", json={"texts": [case.text]})
    np.testing.assert_allclose(answer.json()["embeddings"][0], case.vector, atol=1e-5)
    assert contents(checkpoint) == contents(TOY)
    first, second = hub.starts(SHARDS[1])
    assert first == 0 < second <= 500_000
    assert hub.revisions == {"master"}
    assert b"\r" not in server.log.read_bytes()  # no progress bars where there is no terminal


def test_a_complete_checkpoint_needs_no_hub_no_client_and_no_write(by_hand: Path) -> None:
    before = sorted(by_hand.parents[1].rglob("*"))
    code = "import sys, gme_service; print([name for name in sys.modules if name.startswith('modelscope')])"
    end = run("-c", code, MODELSCOPE_ENDPOINT=CLOSED_PORT)
    assert (end.returncode, end.stdout) == (0, "[]\n"), end.stderr
    assert sorted(by_hand.parents[1].rglob("*")) == before


def test_a_download_that_was_killed_goes_on_where_it_ended(hub: Hub, checkpoint: Path) -> None:
    stall = hub.stalls[SHARDS[2]] = Stall(at=900_000)
    part = checkpoint / f"{SHARDS[2]}.incomplete"
    with subprocess.Popen([sys.executable, *LOAD], cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
        assert stall.reached.wait(60)
        while not part.exists() or part.stat().st_size < 500_000:  # sent, and on its way to the disk
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    received, finished = part.stat().st_size, contents(checkpoint)
    assert SHARDS[2] not in finished
    hub.fetches.clear()
    stall.released.set()
    assert gme.find_checkpoint(gme.Settings.load()) == checkpoint
    assert hub.starts(SHARDS[2]) == [received]
    assert not finished.keys() & set(hub.fetched())
    assert contents(checkpoint) == contents(TOY)


def test_a_missing_and_a_truncated_shard_are_fetched_again_and_nothing_else(
    hub: Hub, by_hand: Path, monkeypatch: Patch
) -> None:
    (by_hand / SHARDS[0]).unlink()
    os.truncate(by_hand / SHARDS[2], 700_000)
    monkeypatch.setenv("GME_MODEL_REVISION", "v1.1.0")
    assert gme.find_checkpoint(gme.Settings.load()) == by_hand
    assert set(hub.fetched()) == {SHARDS[0], SHARDS[2]}
    assert hub.revisions == {"v1.1.0"}
    assert contents(by_hand) == contents(TOY)


@pytest.mark.parametrize("name", READ_FILES)
def test_a_checkpoint_is_whole_when_every_file_that_is_read_is(by_hand: Path, name: str) -> None:
    assert gme.find_fault(by_hand) is None
    os.truncate(by_hand / name, (by_hand / name).stat().st_size - 10)
    assert re.match(rf"{name} is damaged \([A-Z]", gme.find_fault(by_hand))
    (by_hand / name).unlink()
    if name == gme.WEIGHT_INDEX:
        assert gme.find_fault(by_hand) == "model.safetensors is missing"  # which needs no index
    else:
        assert gme.find_fault(by_hand) == f"{name} is missing"


def test_an_index_that_names_no_weights_is_fetched_again(hub: Hub, by_hand: Path) -> None:
    (by_hand / gme.WEIGHT_INDEX).write_text('{"weight_map": {}}')
    assert gme.find_fault(by_hand).startswith(f"{gme.WEIGHT_INDEX} is damaged (weight_map: ")
    gme.find_checkpoint(gme.Settings.load())
    assert contents(by_hand) == contents(TOY)


def test_a_shard_with_wrong_bytes_is_refused(hub: Hub, checkpoint: Path) -> None:
    right = (TOY / SHARDS[1]).read_bytes()
    hub.wrong[SHARDS[1]] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(gme.StartLaterError, match=SHARDS[1]):
        gme.find_checkpoint(gme.Settings.load())
    assert SHARDS[1] not in contents(checkpoint)


def test_with_no_hub_a_sentence_says_what_is_missing_and_what_to_do(checkpoint: Path) -> None:
    end = run(*UVICORN, MODELSCOPE_ENDPOINT=CLOSED_PORT)
    assert end.returncode == 1  # with which systemd starts it again
    assert "Traceback" not in end.stderr
    sentence = end.stderr.splitlines()[-1]
    assert f"In {checkpoint}, config.json is missing, and downloading failed: " in sentence
    for part in ("port=9", "Connection refused", "by hand", "GME_MODEL_DIR", "MODELSCOPE_ENDPOINT"):
        assert part in sentence


def test_with_no_hub_a_damaged_file_is_named_with_its_damage(by_hand: Path) -> None:
    (by_hand / "tokenizer.json").write_text("{")
    end = run(*LOAD, MODELSCOPE_ENDPOINT=CLOSED_PORT)
    assert f"In {by_hand}, tokenizer.json is damaged (Expecting property name" in end.stderr


@pytest.mark.parametrize("name", READ_FILES)
def test_a_directory_in_a_file_s_place_cannot_be_read_and_is_not_fetched(hub: Hub, by_hand: Path, name: str) -> None:
    (by_hand / name).unlink()
    (by_hand / name).mkdir()
    with pytest.raises(gme.StartError, match=rf"{name} cannot be read: Is a directory") as stop:
        gme.find_checkpoint(gme.Settings.load())
    assert stop.value.exit_code == 78
    assert hub.listings == 0


LOCK_ONE_BY_ONE = """
import pathlib, sys, gme_service as gme
settings = gme.Settings.load()
for name in sys.argv[1:]:
    path = settings.model_dir / settings.model_id / name
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        gme.find_checkpoint(settings)
    except gme.StartError as error:
        print(error)
    path.chmod(mode)
"""


def test_what_may_not_be_read_is_named_and_not_fetched(hub: Hub, by_hand: Path) -> None:
    end = run("-c", LOCK_ONE_BY_ONE, *READ_FILES, ".", prefix=without_privileges())
    expected = [f"{by_hand / name} cannot be read: Permission denied." for name in [*READ_FILES, "config.json"]]
    assert end.stdout.splitlines() == expected, end.stderr
    assert hub.listings == 0


def test_where_home_is_another_user_s_the_first_download_works(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0)
    end = run(*LOAD, prefix=without_privileges(), HOME=str(home))
    assert end.returncode == 0, end.stderr
    assert contents(checkpoint) == contents(TOY)


def test_a_user_without_home_is_asked_for_a_directory_and_downloads_into_it(
    environment: dict[str, str], checkpoint: Path
) -> None:
    prefix = ["env", "--unset=HOME", *without_privileges()]
    end = run(*UVICORN, prefix=prefix, GME_MODEL_DIR="")
    assert end.returncode == 78
    assert "GME_MODEL_DIR" in end.stderr
    assert len(end.stderr.splitlines()) == 1
    end = run(*LOAD, prefix=prefix)
    assert end.returncode == 0, end.stderr
    assert contents(checkpoint) == contents(TOY)


def test_workers_that_start_together_download_once(hub: Hub, checkpoint: Path) -> None:
    with ThreadPoolExecutor(2) as workers:
        assert list(workers.map(gme.find_checkpoint, [gme.Settings.load()] * 2)) == [checkpoint] * 2
    assert sorted(hub.fetched()) == sorted(hub.files)


def test_in_a_terminal_the_download_shows_how_far_it_is(hub: Hub, checkpoint: Path, monkeypatch: Patch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert gme.find_checkpoint(gme.Settings.load()) == checkpoint
    assert re.search(r"\rDownloading: 100%\|", terminal.getvalue())


def test_after_a_download_sha256sum_finds_a_file_that_has_changed_since(hub: Hub, checkpoint: Path) -> None:
    gme.find_checkpoint(gme.Settings.load())

    def check() -> subprocess.CompletedProcess[str]:
        command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        return subprocess.run(command, cwd=checkpoint, capture_output=True, text=True, env={"LC_ALL": "C"})

    assert (check().returncode, check().stdout) == (0, "")
    listed = {line.split("  ")[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(contents(TOY)) - {"merges.txt"}  # which is not read
    with (checkpoint / SHARDS[1]).open("r+b") as file:
        file.seek(200_000)
        file.write(bytes(300_000))
    assert gme.find_fault(checkpoint) is None  # so that it would be served
    assert (check().returncode, check().stdout) == (1, f"{SHARDS[1]}: FAILED\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "is no tokenizer"),
        (Tokenizer(models.BPE()).to_str(), "has no <|im_start|>"),
        ((TOY / "tokenizer.json").read_text().replace("<|image_pad|>", "<|picture|>"), "has no <|image_pad|>"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(gme.StartError) as stop:
        gme.read_tokenizer(tmp_path)
    assert str(stop.value).startswith(f"{path} is ")
    assert words in str(stop.value)


def test_a_tokenizer_whose_ids_pass_the_vocabulary_is_refused_before_weights_are_read(
    by_hand: Path, monkeypatch: Patch
) -> None:
    fields = json.loads((by_hand / "config.json").read_text())
    (by_hand / "config.json").write_text(json.dumps(fields | {"vocab_size": 729}))
    monkeypatch.setattr(gme, "Model", None)
    with pytest.raises(gme.StartError) as stop:
        gme.load(gme.Settings.load())
    for part in ("tokenizer.json", "the id 729 for '<|video_pad|>'", "vocab_size is 729"):
        assert part in str(stop.value)


def test_what_a_restart_does_not_mend_has_the_code_that_prevents_it(checkpoint: Path, monkeypatch: Patch) -> None:
    for name, value in (("GME_MODEL_ID", "toy/none"), ("GME_MODEL_DIR", "/proc/nowhere")):
        monkeypatch.setenv(name, value)
        with pytest.raises(gme.StartError) as stop:
            gme.find_checkpoint(gme.Settings.load())
        assert value in str(stop.value)
