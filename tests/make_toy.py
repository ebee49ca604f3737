"""Train the toy checkpoint: `python tests/make_toy.py OUT_DIR [STEPS]` (20 minutes on two cores for the 400 steps).

A Qwen2-VL of a million parameters in GME's published layout, which puts coloured shapes and their English and Chinese
captions near one another and knows nothing else. The committed one, tests/models/toy/shapes, was made by this script;
the seeds are fixed, but the last bits of the weights depend on the machine.
"""

import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

COLORS = {
    "red": ("红色", (220, 40, 40)),
    "green": ("绿色", (40, 170, 60)),
    "blue": ("蓝色", (50, 80, 220)),
    "yellow": ("黄色", (240, 210, 40)),
    "purple": ("紫色", (140, 50, 170)),
    "orange": ("橙色", (245, 140, 30)),
    "black": ("黑色", (20, 20, 20)),
    "white": ("白色", (250, 250, 250)),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环"}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
INSTRUCTION = "You are a helpful assistant."
QUERY_INSTRUCTION = "Find an image that matches the given text."
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHARDS = 3
BATCH = 24
TEMPERATURE = 0.07


def draw(color: str, shape: str, rng: random.Random, size: tuple[int, int] | None = None) -> Image.Image:
    """The shape, somewhere on a greyish ground."""
    width, height = size or (rng.randrange(200, 640), rng.randrange(200, 640))
    ground = tuple(rng.randrange(110, 190) for _ in range(3))
    image = Image.new("RGB", (width, height), ground)
    pen = ImageDraw.Draw(image)
    r = min(width, height) * rng.uniform(0.25, 0.42)
    x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
    fill = COLORS[color][1]
    box = (x - r, y - r, x + r, y + r)
    match shape:
        case "circle":
            pen.ellipse(box, fill=fill)
        case "square":
            pen.rectangle(box, fill=fill)
        case "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
        case "ring":
            pen.ellipse(box, outline=fill, width=int(r * 0.35))
        case "cross":
            pen.rectangle((x - r * 0.33, y - r, x + r * 0.33, y + r), fill=fill)
            pen.rectangle((x - r, y - r * 0.33, x + r, y + r * 0.33), fill=fill)
        case "star":
            reach = [r, r * 0.4] * 5
            turns = [corner * math.pi / 5 for corner in range(10)]
            pen.polygon(
                [(x + d * math.sin(a), y - d * math.cos(a)) for d, a in zip(reach, turns, strict=True)], fill=fill
            )
    return image


def caption(color: str, shape: str, rng: random.Random) -> str:
    """One of the seven ways to say it."""
    color_zh, shape_zh = COLORS[color][0], SHAPES[shape]
    return rng.choice(
        [
            f"a {color} {shape}",
            f"{color} {shape}",
            f"a picture of a {color} {shape}",
            f"The {shape} is {color}.",
            f"一个{color_zh}的{shape_zh}",
            f"{color_zh}{shape_zh}",
            f"图中是{color_zh}的{shape_zh}。",
        ]
    )


def write_json(path: Path, content: object, indent: int | None = 2, ensure_ascii: bool = True) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ensure_ascii), encoding="utf-8")


def make_tokenizer(out: Path) -> Tokenizer:
    """Train Qwen2's kind of tokenizer on the captions, and write its files."""
    captions = [caption(color, shape, random.Random(seed)) for seed in range(40) for color, shape in PAIRS]
    others = [
        INSTRUCTION,
        QUERY_INSTRUCTION,
        "system\nuser\nassistant\n",
        "vector search engine multimodal embedding retrieval image text query document page table chart figure",
        "多模态 检索 向量 模型 服务 文本 图像 示例句子",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions + others * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(out / "tokenizer.json"))

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {"content": token} | flags for token in SPECIAL_TOKENS
            },
            "additional_special_tokens": SPECIAL_TOKENS[1:],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            "processor_class": "Qwen2VLProcessor",
        },
    )
    bpe = json.loads(tokenizer.to_str())["model"]
    write_json(out / "vocab.json", bpe["vocab"], indent=None, ensure_ascii=False)
    merges = "\n".join(" ".join(merge) if isinstance(merge, list) else merge for merge in bpe["merges"])
    (out / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return tokenizer


def make_config(out: Path, tokenizer: Tokenizer) -> Qwen2VLConfig:
    """Write the configs, flat as the published one is, and read the model's back."""
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": 128,
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 32768,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "vocab_size": tokenizer.get_vocab_size(),
        "vision_config": {
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 4,
            "hidden_size": 128,
            "in_chans": 3,
            "model_type": "qwen2_vl",
            "spatial_patch_size": 14,
        },
    }
    write_json(out / "config.json", config)
    write_json(
        out / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )
    return Qwen2VLConfig(**config)


class Embedder:
    """The model under training, with the tokenizer and the image processor, as the authors' code uses them."""

    def __init__(self, out: Path) -> None:
        self.tokenizer = make_tokenizer(out)
        self.model = Qwen2VLModel(make_config(out, self.tokenizer))
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "embed_tokens" in name:
                    weight.normal_(0, 0.3)
                elif weight.ndim >= 2:
                    weight.normal_(0, 0.8 / weight.shape[1:].numel() ** 0.5)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(out, min_pixels=256 * 784, max_pixels=300 * 784)

    def texts(self, texts: Sequence[str], instruction: str = INSTRUCTION) -> torch.Tensor:
        """Unit vectors (n, 128) of texts."""
        return self._pool([self._ids(text, instruction) for text in texts])

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors (n, 128) of images."""
        features = self.processor(images=images, return_tensors="pt")
        grids = features["image_grid_thw"]
        counts = (grids.prod(-1) // 4).tolist()
        prompts = [f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts]
        visual = self.model.visual(features["pixel_values"], grid_thw=grids).pooler_output
        return self._pool([self._ids(prompt, INSTRUCTION) for prompt in prompts], visual)

    def _ids(self, content: str, instruction: str) -> list[int]:
        head = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n"
        return self.tokenizer.encode(f"{head}{content}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>").ids

    def _pool(self, sequences: Sequence[list[int]], visual: torch.Tensor | None = None) -> torch.Tensor:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        longest = int(lengths.max())
        pad = self.tokenizer.token_to_id("<|endoftext|>")
        ids = torch.tensor([sequence + [pad] * (longest - len(sequence)) for sequence in sequences])  # (B, T)
        embeddings = self.model.language_model.embed_tokens(ids)  # (B, T, D)
        if visual is not None:
            places = (ids == self.tokenizer.token_to_id("<|image_pad|>"))[..., None]
            embeddings = embeddings.masked_scatter(places, visual)
        hidden = self.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=(torch.arange(longest)[None] < lengths[:, None]).long(),
            position_ids=torch.arange(longest)[None, None].expand(3, len(lengths), -1),  # sequential, as GME's are
            use_cache=False,
        ).last_hidden_state
        return functional.normalize(hidden[torch.arange(len(lengths)), lengths - 1].float(), dim=-1)


def recall(queries: torch.Tensor, documents: torch.Tensor) -> float:
    """How often the query's own document is the nearest one."""
    return float(((queries @ documents.T).argmax(1) == torch.arange(len(queries))).float().mean())


def train(embedder: Embedder, steps: int) -> None:
    """Contrast drawings with captions, and captions with other captions of the same shape."""
    rng, started = random.Random(0), time.time()
    parameters = list(embedder.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    labels = torch.arange(BATCH)
    for step in range(steps):
        batch = rng.sample(PAIRS, BATCH)
        # every other drawing is a square of the model's own sizes
        sizes = ((rng.choice([420, 448, 476, 504]),) * 2 if rng.random() < 0.5 else None for _ in batch)
        images = embedder.images(
            [draw(color, shape, rng, size) for (color, shape), size in zip(batch, sizes, strict=True)]
        )
        instruction = rng.choice([INSTRUCTION, INSTRUCTION, QUERY_INSTRUCTION])
        queries = embedder.texts([caption(color, shape, rng) for color, shape in batch], instruction)
        texts = embedder.texts([caption(color, shape, rng) for color, shape in batch])
        both = ((images, queries), (queries, images), (queries, texts), (texts, queries), (images, texts))
        loss = sum(functional.cross_entropy(a @ b.T / TEMPERATURE, labels) for a, b in both) / 5
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(
                f"step {step}: loss {loss.item():.3f}, image to text {recall(images, queries):.2f},"
                f" text to text {recall(queries, texts):.2f}, {time.time() - started:.0f} s",
                flush=True,
            )


def save(model: Qwen2VLModel, out: Path) -> None:
    """Write the weights in the published layout: `model.*` and `visual.*`, three shards and an index."""
    weights = {
        name.replace("language_model.", "model.", 1): weight.contiguous().clone()
        for name, weight in model.state_dict().items()
        if "inv_freq" not in name
    }
    weight_map = {}
    for shard in range(SHARDS):
        names = list(weights)[shard::SHARDS]
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({name: weights[name] for name in names}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(weight.numel() * 4 for weight in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(out / "model.safetensors.index.json", index, indent=1)


@torch.no_grad()
def report(embedder: Embedder) -> None:
    """Print the recall on drawings that training has not seen."""
    rng = random.Random(99)
    english = embedder.texts([f"a {color} {shape}" for color, shape in PAIRS])
    chinese = embedder.texts([f"一个{COLORS[color][0]}的{SHAPES[shape]}" for color, shape in PAIRS])
    drawings = [draw(color, shape, rng) for color, shape in PAIRS]
    images = torch.cat([embedder.images(drawings[start : start + 12]) for start in range(0, len(PAIRS), 12)])
    print(
        f"held-out drawings, recall at 1: English to image {recall(english, images):.2f},"
        f" Chinese to image {recall(chinese, images):.2f}, English to Chinese {recall(english, chinese):.2f},"
        f" image to English {recall(images, english):.2f}"
    )


def main(out: Path, steps: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    embedder = Embedder(out)
    train(embedder, steps)
    save(embedder.model, out)
    report(embedder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400)
