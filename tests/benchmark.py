"""Measure the service against the plain way, in one run: `python tests/benchmark.py [CHECKPOINT] [--out FILE]`.

Without a checkpoint it makes one of the published shape (8.8 GB, random weights) in the temporary directory. The plain
way is the model as its authors' code calls it: batches of 32 in arrival order, right-padded, the whole prompt each
time, float32 and torch's default settings. Each row is a workload with its time, its ratio to the plain way, and the
share of the floor: the floating-point operations that cannot be avoided, at the matrix-product rate of this machine.
Takes about half an hour on two cores. Run it on a machine that does nothing else.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TESTS = Path(__file__).parent
TOY = {"GME_MODEL_DIR": str(TESTS / "models"), "GME_MODEL_ID": "toy/shapes"}
WORDS = [
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "black",
    "white",
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "picture",
    "of",
    "a",
    "the",
]
PATCH_PARAMETERS = 32 * 12 * 1280**2  # matrix weights that every 14-pixel patch meets in the vision tower
TOKEN_PARAMETERS = 1.31e9  # and every token in the decoder


def real(directory: Path) -> dict[str, str]:
    """The settings that serve a checkpoint."""
    return {"GME_MODEL_DIR": str(directory.parent.parent), "GME_MODEL_ID": "/".join(directory.absolute().parts[-2:])}


def text(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def image(size: str, seed: int) -> bytes:
    width, height = map(int, size.split("x"))
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 50, width // 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def workloads() -> dict[str, list[dict[str, Any]]]:
    """Inputs by name of the workload, as {"text"} or {"image"}."""
    random = np.random.default_rng(0)
    short = [{"text": text(random, 8)} for _ in range(32)]
    mixed = [{"text": text(random, int(words))} for words in random.integers(4, 64, 64)]
    small = [{"image": image("448x448", seed)} for seed in range(8)]
    return {
        "1 short query": short[:1],
        "32 short queries": short,
        "64 texts of 4 to 63 words": mixed,
        "image 448x448": small[:1],
        "8 images 448x448": small,
        "image 800x600": [{"image": image("800x600", 8)}],
        "image 2400x1600": [{"image": image("2400x1600", 9)}],
        "mixed: 24 texts, 2 images": [*short[:16], *mixed[:8], *small[:2]],
    }


def seconds(run: Callable[[], object]) -> float:
    """The time of one call; the best of three where it is short."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 12:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


# ------------------------------------------------------------------------------------ each in a process of its own


def machine() -> dict[str, float]:
    """GFLOP/s of matrix products of the decoder's shape, and GB/s of reading memory."""
    import torch
    from torch.nn import functional

    def rate(dtype: torch.dtype) -> float:
        x, weight = torch.randn(1024, 1536).to(dtype), torch.randn(8960, 1536).to(dtype)
        times = [seconds(lambda: functional.linear(x, weight)) for _ in range(10)]
        return 2 * x.shape[0] * weight.numel() / min(times) / 1e9

    block = torch.ones(2**28)
    result = {"float32, torch's default": rate(torch.float32), "bfloat16": rate(torch.bfloat16)}
    torch.set_float32_matmul_precision("medium")
    result["float32"] = rate(torch.float32)
    result["memory GB/s"] = 4 * block.numel() / seconds(block.sum) / 1e9
    return result


def plain(directory: Path) -> dict[str, float]:
    """The plain way."""
    os.environ.update(TOY)  # importing the service loads a model: the small one; only its preparing of inputs is used
    import torch
    from torch.nn import functional
    from transformers import Qwen2VLModel

    import gme_service as gme

    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(os.cpu_count() or 1)
    model = Qwen2VLModel.from_pretrained(directory, dtype=torch.float32).eval()
    decoder, prepare = model.language_model, gme.Preparer(directory, 1800, 10**8)

    @torch.inference_mode()
    def embed(inputs: list[gme.Input]) -> torch.Tensor:
        lengths = torch.tensor([len(one.token_ids) for one in inputs])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.from_numpy(np.concatenate([one.token_ids for one in inputs]))
        embeddings = decoder.embed_tokens(ids)
        for row, one in enumerate(inputs):
            if one.pixel_values is not None:
                grid = torch.tensor([one.image_grid_thw])
                features = model.visual(torch.from_numpy(one.pixel_values), grid_thw=grid).pooler_output
                embeddings[row, one.image_start : one.image_start + len(features)] = features
        hidden = decoder(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return functional.normalize(hidden[torch.arange(len(inputs)), lengths - 1], dim=-1)

    def run(items: list[dict[str, Any]]) -> None:
        sources = [gme.Source(**item) for item in items]
        for kind in ([one for one in sources if one.image is None], [one for one in sources if one.image is not None]):
            for start in range(0, len(kind), 32):  # the authors' code takes texts and images in calls of their own
                embed(prepare(kind[start : start + 32]))

    run(workloads()["1 short query"])
    return {name: seconds(lambda items=items: run(items)) for name, items in workloads().items()}


def ours(directory: Path, dtype: str, linear: bool) -> dict[str, float]:
    """The service's rooms without HTTP, from the client's inputs to vectors; and GFLOP that cannot be avoided."""
    os.environ.update(real(directory) | {"GME_CACHE_MB": "0", "GME_DTYPE": dtype})
    import gme_service as gme

    batcher, prepare = gme.app.state.batcher, gme.Preparer(directory, 1800, 10**8)

    def run(items: list[dict[str, Any]]) -> None:
        batcher.submit([gme.Source(**item) for item in items]).result()

    times = {name: seconds(lambda items=items: run(items)) for name, items in workloads().items()}
    for name, items in workloads().items():
        inputs = prepare([gme.Source(**item) for item in items])
        patches = sum(0 if one.pixel_values is None else len(one.pixel_values) for one in inputs)
        tokens = sum(one.cost for one in inputs)
        times[f"GFLOP: {name}"] = 2 * (tokens * TOKEN_PARAMETERS + patches * PATCH_PARAMETERS) / 1e9
    if linear:
        random = np.random.default_rng(1)
        for count in (64, 512, 4096):
            items = [{"text": text(random, 8)} for _ in range(count)]
            times[f"linear: {count} short texts"] = seconds(lambda items=items: run(items))
        bulk = [{"text": text(random, 8)} for _ in range(512)]
        times["bulk: 512 short texts"] = seconds(lambda: run(bulk))
        started, waits = time.perf_counter(), []
        job = batcher.submit([gme.Source(**item) for item in bulk])
        for left in (384, 256, 128):
            while job.missing > left:
                time.sleep(0.01)
            sent = time.perf_counter()
            run([{"text": text(random, 8)}])
            waits.append(time.perf_counter() - sent)
        job.result()
        times["bulk: 512 short texts, three short queries meanwhile"] = time.perf_counter() - started
        times["bulk: longest wait of those queries"] = max(waits)
    batcher.close()
    return times


# ----------------------------------------------------------------------------------------------------------- over HTTP


@contextlib.contextmanager
def served(environment: dict[str, str]) -> Iterator[tuple[int, dict[str, float]]]:
    """A server's port, with the times of its start and its first request, and the start's highest anonymous memory."""
    port = 8123
    command = [sys.executable, "-m", "uvicorn", "gme_service:app", "--port", str(port), "--no-access-log"]
    started, anonymous = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=TESTS.parent, env=os.environ | {"GME_CACHE_MB": "0"} | environment)
    try:
        while True:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, int(status.partition("RssAnon:")[2].split()[0]))
            with contextlib.suppress(OSError):
                first = asyncio.run(exchange(port, [request([{"text": "first"}])], 1))
                break
            time.sleep(0.05)  # the port opens when the model is loaded, and nothing else says so
        start = time.perf_counter() - started - first
        yield port, {"start s": start, "start RssAnon GiB": anonymous / 2**20, "first request s": first}
    finally:
        process.terminate()
        process.wait()


def request(items: list[dict[str, Any]]) -> bytes:
    """A whole HTTP request for a workload: texts, one image, or a mixture through OpenAI's route."""
    if "image" in items[0] and len(items) == 1:
        path, kind = "/embed/image", "multipart/form-data; boundary=b"
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="i.png"\r\n\r\n'
        body = head + items[0]["image"] + b"\r\n--b--\r\n"
    elif any("image" in item for item in items):
        path, kind = "/v1/embeddings", "application/json"
        inputs = [item if "text" in item else {"image": base64.b64encode(item["image"]).decode()} for item in items]
        body = json.dumps({"input": inputs}).encode()
    else:
        path, kind = "/embed/text", "application/json"
        body = json.dumps({"texts": [item["text"] for item in items]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def exchange(port: int, requests: list[bytes], clients: int) -> float:
    """Send the requests over that many connections, each waiting for its answer; the seconds it took."""
    waiting = iter(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**27)
        for one in waiting:
            writer.write(one)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), head
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


def model_seconds(port: int) -> float:
    """What the server's model has been busy for since its start."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return float(answer.read().decode().partition("gme_model_seconds_sum ")[2].split()[0])


def over_http(environment: dict[str, str], count: int, names: list[str], bulk: int) -> dict[str, float]:
    """Workloads as one request each, `count` requests of one text from 1, 8 and 32 clients, and one of `bulk` texts."""
    random = np.random.default_rng(3)

    def single() -> bytes:
        return request([{"text": text(random, 8)}])

    with served(environment) as (port, times):
        times["second request s"] = asyncio.run(exchange(port, [single()], 1))
        for name in names:
            one = request(workloads()[name])
            times[name] = seconds(lambda one=one: asyncio.run(exchange(port, [one], 1)))
        for clients in (1, 8, 32):
            requests = [single() for _ in range(max(8, count * clients // 32))]
            times[f"{clients} clients, requests/s"] = len(requests) / asyncio.run(exchange(port, requests, clients))
        if bulk:
            one, before = request([{"text": text(random, 8)} for _ in range(bulk)]), model_seconds(port)
            took = asyncio.run(exchange(port, [one], 1))
            times[f"{bulk} texts in one request s"] = took
            times[f"{bulk} texts, share outside the model"] = 1 - (model_seconds(port) - before) / took
    return times


# --------------------------------------------------------------------------------------------------------------- table


def part(name: str, directory: Path, *flags: str) -> dict[str, float]:
    """One of the measurements above in a process of its own, so that none shares memory or settings with another."""
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, str(directory), "--part", name, *flags]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(TESTS.parent)}
    )
    return json.loads(output.stdout.splitlines()[-1])


def table(result: dict[str, dict[str, float]]) -> Iterator[str]:
    """The rows of a Markdown table: time, ratio to the plain way, share of the floor."""
    rates = result["machine"]
    yield ", ".join(f"{name}: {rate:.0f}" for name, rate in rates.items()) + " (GFLOP/s unless said)"
    names = list(workloads())
    ways = [name for name in result if name not in ("machine", "plain") and "toy" not in name]
    yield f"\n| workload | plain | {' | '.join(ways)} |\n| --- | --- |{' --- |' * len(ways)}"
    for workload in names:
        plain_time, cells = result["plain"][workload], []
        for way in ways:
            dtype, _ = way.split()
            if time_ := result[way].get(workload):
                floor = result[f"{dtype} model"][f"GFLOP: {workload}"] / rates[dtype]
                cells.append(f"{time_:.2f} s, {plain_time / time_:.1f} x, {floor / time_:.0%}")
            else:
                cells.append("")
        yield f"| {workload} | {plain_time:.2f} s | {' | '.join(cells)} |"
    yield ""
    for way, numbers in result.items():
        others = {name: value for name, value in numbers.items() if name not in names and "GFLOP" not in name}
        if way != "machine":
            yield from (f"- {way}: {name}: {value:.4g}" for name, value in others.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a directory; made when there is none")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="where the numbers go")
    parser.add_argument("--linear", action="store_true", help="also up to 4,096 texts (15 minutes more)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.checkpoint or Path(tempfile.gettempdir()) / "gme-random" / "published" / "shape"
    if arguments.part:
        way = arguments.part.split()[0]
        measure = {"machine": machine, "plain": lambda: plain(directory)}
        print(json.dumps(measure[way]() if way in measure else ours(directory, way, arguments.linear)))
        return
    if not (directory / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, TESTS / "make_random.py", directory], check=True)
    flags = ["--linear"] if arguments.linear else []
    names = list(workloads())
    result = {"machine": part("machine", directory)}
    result["toy HTTP"] = over_http(TOY, 4000, [], 2048)
    result["bfloat16 model"] = part("bfloat16 model", directory, *flags)
    result["bfloat16 HTTP"] = over_http(real(directory) | {"GME_DTYPE": "bfloat16"}, 64, names, 2048)
    result["float32 model"] = part("float32 model", directory)
    result["float32 HTTP"] = over_http(real(directory) | {"GME_DTYPE": "float32"}, 64, names[:3], 0)
    result["plain"] = part("plain", directory)
    arguments.out.write_text(json.dumps(result, indent=1))
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
