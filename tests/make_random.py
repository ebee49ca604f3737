"""Write a checkpoint of the published shape with random weights: `python tests/make_random.py OUT_DIR [--spell-out]`.

The published model is 8.8 GB and cannot be shipped with a test suite. Time and memory do not depend on the values of
the weights, so this stands in for it in `tests/benchmark.py`: same configuration, names, shapes, dtype and number of
shards. The tokenizer and its token ids are the toy checkpoint's, and the vectors mean nothing.

`--spell-out` writes the defaults that the published configuration leaves out, for a checkout that needs them.
"""

import argparse
import json
import math
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).parent
PUBLISHED = TESTS / "published" / "config-2B.json"
TOY = TESTS / "models" / "toy" / "shapes"
TOKENIZER_FILES = ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
SHARDS = 3
VISION_DEFAULTS = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}

Config = dict[str, Any]  # what a config.json holds
Shapes = dict[str, tuple[int, ...]]  # of the weights, by name


def published_shapes(config: Config) -> Shapes:
    """The weights of the model that a flat configuration describes, under their published names."""
    return decoder_shapes(config) | vision_shapes(VISION_DEFAULTS | config["vision_config"])


def decoder_shapes(config: Config) -> Shapes:
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (kv_width, width),
        "self_attn.k_proj.bias": (kv_width,),
        "self_attn.v_proj.weight": (kv_width, width),
        "self_attn.v_proj.bias": (kv_width,),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes |= repeated("model.layers", config["num_hidden_layers"], layer)
    return shapes | {"model.norm.weight": (width,)}


def vision_shapes(vision: Config) -> Shapes:
    width, inner = vision["embed_dim"], vision["embed_dim"] * vision["mlp_ratio"]
    block = {
        **layer_norm("norm1", width),
        **layer_norm("norm2", width),
        **linear("attn.qkv", width, 3 * width),
        **linear("attn.proj", width, width),
        **linear("mlp.fc1", width, inner),
        **linear("mlp.fc2", inner, width),
    }
    return {
        "visual.patch_embed.proj.weight": (width, 3, 2, 14, 14),
        **repeated("visual.blocks", vision["depth"], block),
        **layer_norm("visual.merger.ln_q", width),
        **linear("visual.merger.mlp.0", 4 * width, 4 * width),
        **linear("visual.merger.mlp.2", 4 * width, vision["hidden_size"]),
    }


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def repeated(stack: str, count: int, one: Shapes) -> Shapes:
    return {f"{stack}.{number}.{name}": shape for number in range(count) for name, shape in one.items()}


def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 values that keep the scale of what flows through the layer: norms at one, matrices at 1/sqrt(fan-in)."""
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name or "ln_q" in name else torch.zeros(shape)
    return torch.randn(shape) * (0.02 if "embed_tokens" in name else math.prod(shape[1:]) ** -0.5)


def configuration(spell_out: bool) -> Config:
    """The published one, with the token ids of the toy's tokenizer."""
    config = json.loads(PUBLISHED.read_text())
    toy = json.loads((TOY / "config.json").read_text())
    config |= {name: value for name, value in toy.items() if name.endswith("_token_id")}
    if spell_out:
        config["vision_config"] = VISION_DEFAULTS | config["vision_config"]
    return config


def make(out: Path, spell_out: bool = False) -> None:
    """Write config, tokenizer, preprocessor config, weight shards and their index into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, "preprocessor_config.json"):
        copy(TOY / name, out / name)
    config = configuration(spell_out)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    shapes = published_shapes(config)
    weight_map: dict[str, str] = {}
    torch.manual_seed(0)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        weights = {name: random_weight(name, shapes[name]) for name in list(shapes)[shard::SHARDS]}
        save_file(weights, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--spell-out", action="store_true", help="write the defaults into vision_config")
    given = parser.parse_args()
    make(given.out, given.spell_out)
