"""Write a checkpoint of the published shape with random weights: `python tests/make_random.py OUT_DIR`.

The published model is 8.8 GB and cannot be shipped with a test suite. Time and memory do not depend on the values of
the weights, so this stands in for it in `tests/benchmark.py`: same names, shapes, dtype and number of shards. It uses
the toy checkpoint's tokenizer, and its vectors mean nothing.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TOY = Path(__file__).parent / "models" / "toy" / "shapes"
SHARDS = 2
DEPTHS = {"layers": 28, "blocks": 32}
SIZES = {  # of the published model, by those of the toy
    "model": {128: 1536, 256: 8960, 64: 256, 730: 151936},
    "visual": {64: 1280, 128: 1536, 192: 3840, 256: 5120},
}
CONFIG = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
CONFIG |= {"num_hidden_layers": 28, "vocab_size": 151936}
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}


def shapes() -> dict[str, tuple[int, ...]]:
    """The toy's names and shapes in the published sizes, and its first layer and block as often as there are such."""
    found = {}
    for path in sorted(TOY.glob("*.safetensors")):
        with safe_open(path, "pt") as toy:
            for name in toy.keys():  # noqa: SIM118  # a file is no mapping
                sizes = SIZES[name.partition(".")[0]]
                shape = tuple(sizes.get(size, size) for size in toy.get_slice(name).get_shape())
                stack, number = re.match(r"(?:\w+\.(layers|blocks)\.(\d+)\.)?", name).groups()
                numbers = range(DEPTHS[stack]) if number == "0" else [] if number else [None]
                found |= {name.replace(".0.", f".{one}.", 1) if stack else name: shape for one in numbers}
    return found


def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 values that keep the scale of what flows through the layer: norms at one, matrices at 1/sqrt(fan-in)."""
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name or "ln_q" in name else torch.zeros(shape)
    return torch.randn(shape) * (0.02 if "embed_tokens" in name else math.prod(shape[1:]) ** -0.5)


def make(out: Path) -> None:
    """Write config, tokenizer, preprocessor config, weight shards and their index into `out`."""
    shutil.copytree(TOY, out, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    config = json.loads((TOY / "config.json").read_text())
    config |= CONFIG | {"vision_config": config["vision_config"] | VISION}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    found, weight_map = shapes(), dict[str, str]()
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        weights = {name: random_weight(name, found[name]) for name in list(found)[shard::SHARDS]}
        save_file(weights, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}, indent=1))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
