"""Train the toy checkpoint: `python tests/make_toy.py FROM OUT` (forty minutes on two cores).

A Qwen2-VL of a million parameters in GME's published layout, which puts coloured shapes and their English and Chinese
captions near one another and knows nothing else. FROM is a checkpoint of that shape, such as the committed one,
tests/models/toy/shapes: its tokenizer and configuration are kept, its weights are trained on. The seeds are fixed, but
the last bits of the weights depend on the machine. The committed vectors are then made anew by tests/make_golden.py.
"""

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色"}
COLORS |= {"black": "黑色", "white": "白色"}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环"}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
CORNERS = {  # radius and turn, in degrees clockwise from the top
    "square": [(1, 45), (1, 135), (1, 225), (1, 315)],
    "triangle": [(1, 0), (1, 120), (1, 240)],
    "star": [((1, 0.4)[n % 2], 36 * n) for n in range(10)],
    "cross": [(r, 90 * n + turn) for n in range(4) for r, turn in ((1, -18), (1, 18), (0.44, 45))],
}
DEFAULT, QUERY = "You are a helpful assistant.", "Find an image that matches the given text."
STAGES = [(36, 1800, 1.5e-3), (256, 350, 6e-4)]  # image tokens, steps, learning rate
TEMPERATURE = 0.07


def ground(size: tuple[int, int], fill: tuple[int, ...], rng: random.Random) -> Image.Image:
    """White, black, grey, coloured or noisy, and unlike the colour of the shape."""
    color = fill
    while math.dist(color, fill) <= 110:
        grey, colored = (rng.randrange(256),) * 3, tuple(rng.randrange(256) for _ in range(3))
        color = rng.choice([(255,) * 3, (255,) * 3, (0,) * 3, grey, grey, colored, colored])
    image = Image.new("RGB", size, color)
    if rng.random() < 0.2:
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, rng.uniform(5, 25), (*size[::-1], 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def draw(color: str, shape: str, rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """The shape, somewhere, turned a little, in about the colour that Pillow has under that name."""
    fill = tuple(min(255, max(0, x + rng.randint(-25, 25))) for x in ImageColor.getrgb(color))
    if rng.random() < 0.5:
        fill = ImageColor.getrgb(color)
    image = ground(size, fill, rng)
    pen, r = ImageDraw.Draw(image), min(size) * rng.uniform(0.22, 0.42)
    x, y = rng.uniform(r, size[0] - r), rng.uniform(r, size[1] - r)
    turn = rng.choice([0, rng.uniform(-25, 25)])
    if shape in ("circle", "ring"):
        width = round(r if shape == "circle" else r * rng.uniform(0.25, 0.4))
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=width)
    else:
        corners = [(r * far, math.radians(angle + turn)) for far, angle in CORNERS[shape]]
        pen.polygon([(x + far * math.sin(a), y - far * math.cos(a)) for far, a in corners], fill=fill)
    return image


def caption(color: str, shape: str, rng: random.Random) -> str:
    """One of the seven ways to say it."""
    color_zh, shape_zh = COLORS[color], SHAPES[shape]
    english = [f"a {color} {shape}", f"{color} {shape}", f"a picture of a {color} {shape}", f"The {shape} is {color}."]
    chinese = [f"一个{color_zh}的{shape_zh}", f"{color_zh}{shape_zh}", f"图中是{color_zh}的{shape_zh}。"]
    return rng.choice(english + chinese)


class Toy:
    """The computation of gme_service.Model, with gradients, and for many images of one size."""

    def __init__(self, checkpoint: Path) -> None:
        self.shards = {path.name: load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}
        self.weights = {name: x.requires_grad_() for shard in self.shards.values() for name, x in shard.items()}
        self.config = json.loads((checkpoint / "config.json").read_text())
        processor = json.loads((checkpoint / "preprocessor_config.json").read_text())
        self.mean, self.std = (torch.tensor(processor[f"image_{name}"])[:, None] for name in ("mean", "std"))
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        norm = functional.rms_norm if bias is None else functional.layer_norm
        return norm(x, x.shape[-1:], weight, *([] if bias is None else [bias]), eps=1e-6)

    def see(self, images: Sequence[Image.Image]) -> Tensor:
        """Token embeddings (B, tokens, D) of images of one size."""
        pixels = np.stack([np.asarray(image) for image in images])
        rows, columns = pixels.shape[1] // 28, pixels.shape[2] // 28
        blocks = pixels.reshape(-1, rows, 2, 14, columns, 2, 14, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
        patches = torch.from_numpy(np.ascontiguousarray(blocks)).view(len(images), -1, 3, 196).float() / 255
        weight = self.weights["visual.patch_embed.proj.weight"].sum(2).flatten(1)
        hidden = functional.linear(((patches - self.mean) / self.std).flatten(2), weight)  # (B, P, width)
        config = self.config["vision_config"]
        places = torch.cartesian_prod(torch.arange(2 * rows), torch.arange(2 * columns))
        places = places.view(rows, 2, columns, 2, 2).transpose(1, 2).reshape(-1, 2, 1)
        pairs = config["embed_dim"] // config["num_heads"] // 4
        angles = (places / 10000 ** (torch.arange(pairs) / pairs)).flatten(1)  # (P, head_dim / 2)
        for number in range(config["depth"]):
            name = f"visual.blocks.{number}"
            qkv = self.linear(self.norm(hidden, f"{name}.norm1"), f"{name}.attn.qkv")
            query, key, value = qkv.unflatten(2, (3, config["num_heads"], -1)).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value)
            hidden = hidden + self.linear(out.transpose(1, 2).flatten(2), f"{name}.attn.proj")
            inner = self.linear(self.norm(hidden, f"{name}.norm2"), f"{name}.mlp.fc1")
            hidden = hidden + self.linear(inner * torch.sigmoid(1.702 * inner), f"{name}.mlp.fc2")
        merged = self.norm(hidden, "visual.merger.ln_q").unflatten(1, (-1, 4)).flatten(2)
        return self.linear(functional.gelu(self.linear(merged, "visual.merger.mlp.0")), "visual.merger.mlp.2")

    def read(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings (B, D) of token embeddings (B, T, D), padded on the right."""
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config["hidden_size"] // heads
        frequencies = self.config["rope_theta"] ** -(torch.arange(size // 2) / (size // 2))
        angles = torch.arange(hidden.shape[1])[:, None] * frequencies  # (T, head_dim / 2)
        for number in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{number}"
            normed = self.norm(hidden, f"{name}.input_layernorm")
            query, key, value = (
                self.linear(normed, f"{name}.self_attn.{kind}_proj").unflatten(2, (-1, size)).transpose(1, 2)
                for kind in "qkv"
            )
            key, value = (x.repeat_interleave(heads // groups, 1) for x in (rotate(key, angles), value))
            out = functional.scaled_dot_product_attention(rotate(query, angles), key, value, is_causal=True)
            hidden = hidden + self.linear(out.transpose(1, 2).flatten(2), f"{name}.self_attn.o_proj")
            normed = self.norm(hidden, f"{name}.post_attention_layernorm")
            gated = functional.silu(self.linear(normed, f"{name}.mlp.gate_proj"))
            hidden = hidden + self.linear(gated * self.linear(normed, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        last = self.norm(hidden[torch.arange(len(hidden)), lengths - 1], "model.norm")
        return functional.normalize(last, dim=-1)

    def tokens(self, content: str, instruction: str = DEFAULT) -> Tensor:
        head = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n"
        prompt = f"{head}{content}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        return torch.tensor(self.tokenizer.encode(prompt).ids)

    def texts(self, texts: Sequence[str], instruction: str = DEFAULT) -> Tensor:
        ids = [self.tokens(text, instruction) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        hidden = functional.embedding(padded, self.weights["model.embed_tokens.weight"])
        return self.read(hidden, torch.tensor([len(row) for row in ids]))

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        seen = self.see(images)
        ids = self.tokens("<|vision_start|><|image_pad|><|vision_end|>")
        around = functional.embedding(ids, self.weights["model.embed_tokens.weight"]).expand(len(images), -1, -1)
        place = ids.tolist().index(self.tokenizer.token_to_id("<|image_pad|>"))
        hidden = torch.cat((around[:, :place], seen, around[:, place + 1 :]), 1)
        return self.read(hidden, torch.full((len(images),), hidden.shape[1]))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def train(toy: Toy, tokens: int, steps: int, rate: float) -> None:
    """Contrast drawings with captions, and captions with other captions of the same shape."""
    rng, started, labels = random.Random(tokens), time.time(), torch.arange(len(PAIRS))
    optimizer = torch.optim.AdamW(toy.weights.values(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        columns = rng.randint(round(0.8 * tokens**0.5), round(1.25 * tokens**0.5))
        size = 28 * columns, 28 * math.ceil(tokens / columns)
        # drawn larger or smaller, and brought to the model's size as the service does
        sizes = [tuple(round(x * factor) for x in size) for factor in [rng.uniform(0.7, 1.6) for _ in PAIRS]]
        drawn = [draw(*pair, rng, once).resize(size, Image.BICUBIC) for pair, once in zip(PAIRS, sizes, strict=True)]
        images = toy.images(drawn)
        queries = toy.texts([caption(*pair, rng) for pair in PAIRS], rng.choice([DEFAULT, DEFAULT, QUERY]))
        texts = toy.texts([caption(*pair, rng) for pair in PAIRS])
        both = ((images, queries), (queries, images), (queries, texts), (texts, queries), (images, texts))
        loss = sum(functional.cross_entropy(a @ b.T / TEMPERATURE, labels) for a, b in both) / 5
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(toy.weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            nearest = ((queries @ documents.T).argmax(1) for documents in (images, texts))
            recalls = ", ".join(f"{(found == labels).float().mean():.3f}" for found in nearest)
            print(f"{tokens} tokens, step {step + 1}: {loss:.3f}, {recalls}, {time.time() - started:.0f} s", flush=True)


def main(start: Path, out: Path) -> None:
    torch.manual_seed(0)
    shutil.copytree(start, out, dirs_exist_ok=True)
    toy = Toy(start)
    for tokens, steps, rate in STAGES:
        train(toy, tokens, steps, rate)
        for name, shard in toy.shards.items():
            save_file({key: x.detach() for key, x in shard.items()}, out / name, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
