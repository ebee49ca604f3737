"""Write the vectors of the authors' own code: `python tests/make_golden.py CHECKPOINT FOLDER AUTHORS [PREFIX]`.

FOLDER holds `cases.json` and `images/`, and gets `vectors.npy`; with the PREFIX `wide_` it gets `wide_vectors.npy`, of
the cases whose numbers stand in `wide_cases.json`. AUTHORS is a folder with the authors' `modeling_gme_qwen2vl.py`,
which comes with the published model: it is run there, and is no part of this project.

Needs an environment of its own, as their code works with no newer one: transformers==4.51.3, torch, Pillow, numpy. The
committed vectors are from torch 2.13.0 and Pillow 13.0.0 on a CPU, in float32, one input at a time. Their code is given
what a person sees of a picture: what is transparent lies on white, and 16-bit grey has its high byte.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def publish(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint to `out`; one that a current transformers wrote, in the layout that the authors' code reads."""
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    if "text_config" not in config:
        return
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= text | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "model_type": "qwen2_vl"}
    (out / "config.json").write_text(json.dumps(config))
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight.float()
        for name, weight in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def open_as_seen(path: Path) -> Image.Image:
    image = Image.open(path)
    if image.mode == "I;16":
        return Image.fromarray((np.array(image) // 256).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
    return white


def main(checkpoint: str, folder: Path, authors: str, prefix: str = "") -> None:
    sys.path.insert(0, authors)
    from modeling_gme_qwen2vl import GmeQwen2VL, GmeQwen2VLConfig

    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    if prefix:
        cases = [cases[number] for number in json.loads((folder / f"{prefix}cases.json").read_text())]
    vectors = []
    with tempfile.TemporaryDirectory() as copy:
        publish(Path(checkpoint), Path(copy))
        config = GmeQwen2VLConfig.from_pretrained(copy)
        model = GmeQwen2VL.from_pretrained(copy, config=config, torch_dtype=torch.float32, attn_implementation="sdpa")
        for case in cases:
            image = open_as_seen(folder / "images" / case["image"]) if "image" in case else None
            vectors.append(model.embed([case.get("text")], [image], instruction=case.get("prompt"))[0].numpy())
    np.save(folder / f"{prefix}vectors.npy", np.stack(vectors))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
