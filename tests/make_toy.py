"""Train the toy checkpoint: a ~1M-parameter Qwen2-VL in GME's published layout that embeds coloured shapes
and their English and Chinese captions near one another.  Usage: make_toy.py OUT_DIR [STEPS]"""

import json, math, os, random, sys, time
import torch, torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers, normalizers, processors, Regex, AddedToken
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

out = sys.argv[1]
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 400
os.makedirs(out, exist_ok=True)
torch.manual_seed(0)
rng = random.Random(0)
SPECIAL = [
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


def draw(color, shape, rnd, size=None):
    w, h = size or (rnd.randrange(200, 640), rnd.randrange(200, 640))
    bg = tuple(rnd.randrange(110, 190) for _ in range(3))
    im = Image.new("RGB", (w, h), bg)
    d = ImageDraw.Draw(im)
    r = min(w, h) * rnd.uniform(0.25, 0.42)
    cx = rnd.uniform(r, w - r)
    cy = rnd.uniform(r, h - r)
    c = COLORS[color][1]
    box = (cx - r, cy - r, cx + r, cy + r)
    if shape == "circle":
        d.ellipse(box, fill=c)
    elif shape == "square":
        d.rectangle(box, fill=c)
    elif shape == "triangle":
        d.polygon([(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)], fill=c)
    elif shape == "ring":
        d.ellipse(box, outline=c, width=int(r * 0.35))
    elif shape == "cross":
        d.rectangle((cx - r * 0.33, cy - r, cx + r * 0.33, cy + r), fill=c)
        d.rectangle((cx - r, cy - r * 0.33, cx + r, cy + r * 0.33), fill=c)
    else:
        d.polygon(
            [
                (
                    cx + (r if k % 2 == 0 else r * 0.4) * math.sin(k * math.pi / 5),
                    cy - (r if k % 2 == 0 else r * 0.4) * math.cos(k * math.pi / 5),
                )
                for k in range(10)
            ],
            fill=c,
        )
    return im


def caption(color, shape, rnd):
    return rnd.choice(
        [
            f"a {color} {shape}",
            f"{color} {shape}",
            f"a picture of a {color} {shape}",
            f"The {shape} is {color}.",
            f"一个{COLORS[color][0]}的{SHAPES[shape]}",
            f"{COLORS[color][0]}{SHAPES[shape]}",
            f"图中是{COLORS[color][0]}的{SHAPES[shape]}。",
        ]
    )


# ---- tokenizer: byte-level BPE with Qwen2's pre-tokenizer, 768 pieces + special tokens
corpus = [caption(c, s, random.Random(i)) for i in range(40) for c in COLORS for s in SHAPES] + [
    "You are a helpful assistant.",
    "Find an image that matches the given text.",
    "system\nuser\nassistant\n",
    "vector search engine multimodal embedding retrieval image text query document page table chart figure",
    "多模态 检索 向量 模型 服务 文本 图像 示例句子",
] * 20
tk = Tokenizer(models.BPE())
tk.normalizer = normalizers.NFC()
pat = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
tk.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(pat), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
tk.decoder = decoders.ByteLevel()
tk.post_processor = processors.ByteLevel(trim_offsets=False)
tk.train_from_iterator(
    corpus,
    trainers.BpeTrainer(
        vocab_size=768, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    ),
)
tk.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
tk.save(f"{out}/tokenizer.json")
ID = {t: tk.token_to_id(t) for t in SPECIAL}
V = tk.get_vocab_size()
json.dump(
    dict(
        add_bos_token=False,
        add_prefix_space=False,
        added_tokens_decoder={
            str(ID[t]): dict(content=t, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
            for t in SPECIAL
        },
        additional_special_tokens=SPECIAL[1:],
        bos_token=None,
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        errors="replace",
        model_max_length=32768,
        pad_token="<|endoftext|>",
        split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer",
        unk_token=None,
        processor_class="Qwen2VLProcessor",
    ),
    open(f"{out}/tokenizer_config.json", "w"),
    indent=2,
)
# plain vocab/merges too: the published checkpoint carries them
m = json.loads(tk.to_str())["model"]
json.dump(m["vocab"], open(f"{out}/vocab.json", "w"), ensure_ascii=False)
open(f"{out}/merges.txt", "w").write(
    "#version: 0.2\n" + "\n".join(" ".join(x) if isinstance(x, list) else x for x in m["merges"]) + "\n"
)

cfg = dict(
    architectures=["Qwen2VLForConditionalGeneration"],
    attention_dropout=0.0,
    bos_token_id=ID["<|endoftext|>"],
    eos_token_id=ID["<|im_end|>"],
    hidden_act="silu",
    hidden_size=128,
    image_token_id=ID["<|image_pad|>"],
    initializer_range=0.02,
    intermediate_size=256,
    max_position_embeddings=32768,
    max_window_layers=4,
    model_type="qwen2_vl",
    num_attention_heads=4,
    num_hidden_layers=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_scaling=dict(mrope_section=[4, 6, 6], rope_type="default", type="default"),
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    torch_dtype="float32",
    transformers_version="4.45.0.dev0",
    use_cache=True,
    use_sliding_window=False,
    video_token_id=ID["<|video_pad|>"],
    vision_end_token_id=ID["<|vision_end|>"],
    vision_start_token_id=ID["<|vision_start|>"],
    vision_token_id=ID["<|vision_pad|>"],
    vocab_size=V,
    vision_config=dict(
        depth=2, embed_dim=64, num_heads=4, hidden_size=128, in_chans=3, model_type="qwen2_vl", spatial_patch_size=14
    ),
)
json.dump(cfg, open(f"{out}/config.json", "w"), indent=2)
json.dump(
    dict(
        min_pixels=3136,
        max_pixels=12845056,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor",
        processor_class="Qwen2VLProcessor",
    ),
    open(f"{out}/preprocessor_config.json", "w"),
    indent=2,
)

model = Qwen2VLModel(Qwen2VLConfig(**json.load(open(f"{out}/config.json"))))
lm = model.language_model
with torch.no_grad():
    for n, p in model.named_parameters():
        if p.ndim >= 2 and "embed_tokens" not in n:
            p.normal_(0, 0.8 / p.shape[1:].numel() ** 0.5)
        elif "embed_tokens" in n:
            p.normal_(0, 0.3)
print(sum(p.numel() for p in model.parameters()) / 1e6, "M params, vocab", V, flush=True)
ip = Qwen2VLImageProcessorPil.from_pretrained(out, min_pixels=256 * 784, max_pixels=300 * 784)


def ids(text="", n=0, prompt="You are a helpful assistant."):
    s = "<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" if n else ""
    return tk.encode(
        f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n{s}{text}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    ).ids


def pool(seqs, feats=None, grids=None):
    L = [len(s) for s in seqs]
    m = max(L)
    x = torch.tensor([s + [ID["<|endoftext|>"]] * (m - len(s)) for s in seqs])
    e = lm.embed_tokens(x)
    if feats is not None:
        e = e.masked_scatter((x == ID["<|image_pad|>"])[..., None], model.visual(feats, grid_thw=grids).pooler_output)
    am = (torch.arange(m)[None] < torch.tensor(L)[:, None]).long()
    pos = torch.arange(m)[None, None].expand(3, len(L), -1)
    h = lm(inputs_embeds=e, attention_mask=am, position_ids=pos, use_cache=False).last_hidden_state
    return F.normalize(h[torch.arange(len(L)), torch.tensor(L) - 1].float(), dim=-1)


def enc_images(ims):
    f = ip(images=ims, return_tensors="pt")
    n = (f["image_grid_thw"].prod(-1) // 4).tolist()
    return pool([ids(n=k) for k in n], f["pixel_values"], f["image_grid_thw"])


opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=STEPS, pct_start=0.1)
combos = [(c, s) for c in COLORS for s in SHAPES]
temp = 0.07
t0 = time.time()
for step in range(STEPS):
    batch = rng.sample(combos, 24)
    ims = [draw(c, s, rng, (rng.choice([420, 448, 476, 504]),) * 2 if rng.random() < 0.5 else None) for c, s in batch]
    vi = enc_images(ims)
    P = rng.choice(
        ["You are a helpful assistant.", "You are a helpful assistant.", "Find an image that matches the given text."]
    )
    vt = pool([ids(caption(c, s, rng), prompt=P) for c, s in batch])
    vt2 = pool([ids(caption(c, s, rng)) for c, s in batch])
    y = torch.arange(len(batch))
    loss = sum(F.cross_entropy(a @ b.T / temp, y) for a, b in ((vi, vt), (vt, vi), (vt, vt2), (vt2, vt), (vi, vt2))) / 5
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    sched.step()
    if step % 20 == 0 or step == STEPS - 1:
        print(
            step,
            "loss %.3f i2t acc %.2f t2t acc %.2f  %.0fs"
            % (
                loss.item(),
                ((vi @ vt.T).argmax(1) == y).float().mean(),
                ((vt @ vt2.T).argmax(1) == y).float().mean(),
                time.time() - t0,
            ),
            flush=True,
        )
# ---- save in the published layout: model.* for the decoder, visual.* for the tower, three shards and an index
sd = {}
for k, v in model.state_dict().items():
    if "inv_freq" in k:
        continue
    sd[("model." + k[len("language_model.") :]) if k.startswith("language_model.") else k] = v.contiguous().clone()
keys = list(sd)
shards = [keys[i::3] for i in range(3)]
wm = {}
for i, ks in enumerate(shards):
    fn = f"model-{i + 1:05d}-of-00003.safetensors"
    save_file({k: sd[k] for k in ks}, f"{out}/{fn}", metadata={"format": "pt"})
    wm.update({k: fn for k in ks})
json.dump(
    dict(metadata=dict(total_size=sum(v.numel() * 4 for v in sd.values())), weight_map=wm),
    open(f"{out}/model.safetensors.index.json", "w"),
    indent=1,
)
with torch.no_grad():
    r = random.Random(99)
    ok = 0
    T = pool([ids(f"a {c} {s}") for c, s in combos])
    Z = pool([ids(f"一个{COLORS[c][0]}的{SHAPES[s]}") for c, s in combos])
    I = torch.cat([enc_images([draw(c, s, r) for c, s in combos[k : k + 12]]) for k in range(0, 48, 12)])
    y = torch.arange(48)
    print(
        "held-out draws: text->image R@1 %.2f zh->image %.2f en->zh %.2f image->text %.2f"
        % tuple(((a @ b.T).argmax(1) == y).float().mean() for a, b in ((T, I), (Z, I), (T, Z), (I, T)))
    )
