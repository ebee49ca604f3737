"""Write the wide checkpoint, of random weights: `python tests/make_wide.py OUT_DIR`.

What the toy does not cover of what a checkpoint may look like: the config nested in `text_config` and the names
`model.language_model.*` and `model.visual.*` of a current transformers, one bfloat16 file without an index, an untied
`lm_head`, and the 7B's proportions: seven query heads to a key/value head, a decoder wider than the vision tower.
Its vectors mean nothing.

Needs torch, safetensors and transformers>=5 (the service does not need the last). The committed one,
tests/models/toy/wide, is from torch 2.13.0, safetensors 0.8.0 and transformers 5.24.0.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

TOY = Path(__file__).parent / "models" / "toy" / "shapes"


def scaled(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Random values with which the last token hears the others: weak embeddings, and attention that picks a few."""
    noise = torch.randn(weight.shape)
    if weight.ndim == 1:
        return 0.2 * noise + (1 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")) else 0)
    gain = 3 if "q_proj" in name or "k_proj" in name else 1.5
    return noise * (0.2 if "embed_tokens" in name else gain * weight[0].numel() ** -0.5)


def make(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(TOY / name, out / name)
    toy = json.loads((TOY / "config.json").read_text())
    ids = {name: value for name, value in toy.items() if name.endswith("_token_id") and name[:3] not in ("bos", "eos")}
    text = {name: toy[name] for name in ("bos_token_id", "eos_token_id", "vocab_size")} | {"dtype": "bfloat16"}
    text |= {"hidden_size": 224, "intermediate_size": 128, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    text["rope_parameters"] = {"mrope_section": [2, 3, 3], "rope_theta": 1000000.0, "rope_type": "default"}
    vision = {"depth": 2, "dtype": "bfloat16", "embed_dim": 32, "hidden_size": 224, "num_heads": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(out)
    torch.manual_seed(0)
    weights = {name: scaled(name, weight).to(torch.bfloat16) for name, weight in model.state_dict().items()}
    weights["lm_head.weight"] = weights["lm_head.weight"][:8].clone()  # never read, so a few rows will do
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
