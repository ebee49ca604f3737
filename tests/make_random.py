"""Write a checkpoint of the published shape with random weights: `python tests/make_random.py OUT_DIR`.

The published model is 8.8 GB and cannot be shipped with a test suite. Time and memory do not depend on the values of
the weights, so this stands in for it in `tests/benchmark.py`: same shapes, names, dtype and number of shards. It uses
the toy checkpoint's tokenizer, and its vectors mean nothing.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLModel

TOY = Path(__file__).parent / "models" / "toy" / "shapes"
SHARDS = 2
PUBLISHED = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_window_layers": 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "in_chans": 3,
        "mlp_ratio": 4,
        "model_type": "qwen2_vl",
        "num_heads": 16,
        "spatial_patch_size": 14,
    },
    "vocab_size": 151936,
}


def random_weight(name: str, shape: torch.Size) -> torch.Tensor:
    """Float32 values that keep the scale of what flows through the layer: norms at one, matrices at 1/sqrt(fan-in)."""
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name or "ln_q" in name else torch.zeros(shape)
    return torch.randn(shape) * (0.02 if "embed_tokens" in name else shape[1:].numel() ** -0.5)


def make(out: Path) -> None:
    """Write config, tokenizer, preprocessor config, weight shards and their index into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((TOY / "config.json").read_text()) | PUBLISHED
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json"):
        shutil.copy(TOY / name, out / name)
    (out / "config.json").write_text(json.dumps(config, indent=2))

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Qwen2VLModel(Qwen2VLConfig(**config)).state_dict().items()}
    torch.manual_seed(0)
    weight_map = {}
    names = list(shapes)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        weights = {
            name.replace("language_model.", "model.", 1): random_weight(name, shapes[name])
            for name in names[shard::SHARDS]
        }
        save_file(weights, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    total_size = 4 * sum(shape.numel() for shape in shapes.values())
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=1)
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
