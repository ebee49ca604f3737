"""Write a checkpoint of the published shape with random weights: `python tests/make_random.py OUT_DIR [--layers N]`.

The published model is 8.8 GB and cannot be shipped with a test suite. Time and memory do not depend on the values of
the weights, so this stands in for it in `tests/benchmark.py`: same names, shapes, dtype and number of shards. It uses
the toy checkpoint's tokenizer, and its vectors mean nothing. Fewer layers make a small one, to try things out with.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TOY = Path(__file__).parent / "models" / "toy" / "shapes"
SHARDS = 2
PUBLISHED = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
PUBLISHED |= {"vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
VISION = {"model_type": "qwen2_vl", "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
VISION |= {"in_chans": 3, "spatial_patch_size": 14}


def shapes(layers: int, depth: int) -> dict[str, tuple[int, ...]]:
    """The published names of the weights that the service reads, with their shapes."""
    width, inner, vision = PUBLISHED["hidden_size"], PUBLISHED["intermediate_size"], VISION["embed_dim"]
    narrow, mlp = width // PUBLISHED["num_attention_heads"] * PUBLISHED["num_key_value_heads"], 4 * vision
    plain = [("model.embed_tokens", PUBLISHED["vocab_size"], width), ("model.norm", width)]
    plain += [("visual.patch_embed.proj", vision, 3, 2, 14, 14)]
    biased = [("visual.merger.ln_q", vision), ("visual.merger.mlp.0", mlp, mlp), ("visual.merger.mlp.2", width, mlp)]
    for layer in (f"model.layers.{number}" for number in range(layers)):
        plain += [(f"{layer}.{norm}_layernorm", width) for norm in ("input", "post_attention")]
        plain += [(f"{layer}.self_attn.o_proj", width, width), (f"{layer}.mlp.down_proj", width, inner)]
        plain += [(f"{layer}.mlp.{part}_proj", inner, width) for part in ("gate", "up")]
        biased += [
            (f"{layer}.self_attn.{part}_proj", rows, width)
            for part, rows in (("q", width), ("k", narrow), ("v", narrow))
        ]
    for block in (f"visual.blocks.{number}" for number in range(depth)):
        biased += [(f"{block}.norm1", vision), (f"{block}.norm2", vision), (f"{block}.attn.qkv", 3 * vision, vision)]
        biased += [(f"{block}.attn.proj", vision, vision)]
        biased += [(f"{block}.mlp.fc1", mlp, vision), (f"{block}.mlp.fc2", vision, mlp)]
    weights = {f"{name}.weight": tuple(shape) for name, *shape in plain + biased}
    return weights | {f"{name}.bias": (rows,) for name, rows, *_ in biased}


def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 values that keep the scale of what flows through the layer: norms at one, matrices at 1/sqrt(fan-in)."""
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name or "ln_q" in name else torch.zeros(shape)
    return torch.randn(shape) * (0.02 if "embed_tokens" in name else math.prod(shape[1:]) ** -0.5)


def make(out: Path, layers: int = 28, depth: int = 32) -> None:
    """Write config, tokenizer, preprocessor config, weight shards and their index into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json"):
        shutil.copy(TOY / name, out / name)
    config = json.loads((TOY / "config.json").read_text()) | PUBLISHED
    config |= {"num_hidden_layers": layers, "max_window_layers": layers, "vision_config": VISION | {"depth": depth}}
    (out / "config.json").write_text(json.dumps(config, indent=2))

    torch.manual_seed(0)
    found = shapes(layers, depth)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        weights = {name: random_weight(name, found[name]) for name in list(found)[shard::SHARDS]}
        save_file(weights, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    index = {"metadata": {"total_size": 4 * sum(map(math.prod, found.values()))}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--layers", type=int, default=28, help="of the decoder; 28 unless given")
    arguments = parser.parse_args()
    make(arguments.out, arguments.layers, 32 if arguments.layers == 28 else arguments.layers)
