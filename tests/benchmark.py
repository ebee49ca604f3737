"""Measure this checkout, or this one beside another: `python tests/benchmark.py [--against DIR]`.

The model is one of the published shape with random weights (8.8 GB, made in the temporary directory), its texts have
numbers of tokens as they are in practice, and HTTP is measured with the toy. Each side runs in processes and with an
interpreter of its own, and its own batcher makes its batches. The sides take turns (A, B, A, B ...) and each keeps its
best, so that a machine whose speed drifts is the same for both. Run it on one that does nothing else.
"""

import argparse
import asyncio
import contextlib
import functools
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent
TOY = TESTS / "models" / "toy" / "shapes"
WORDS = ["red", "green", "blue", "yellow", "circle", "square", "triangle", "star", "ring", "picture", "of", "a"]
JPEGS = ("448x448", "800x600", "1920x1080")
MIXTURE = "mixture"  # 14 texts of 5 to 250 tokens, and two images
WORKS = ("1 short query", "32 short texts", "16 mixed texts", "64 mixed texts", *JPEGS, MIXTURE)
QUEUES = (64, 16384)  # requests that wait together
PARTS = ("prepare", "toy", "fairness", "queue", "start", "model", "products")
DTYPES = ("float32", "bfloat16", "float16")
# A line is measured turn by turn until the two best of each side agree, within these bounds.
AGREE = 0.01
LEAST_SECONDS, MOST_SECONDS = 5, 60
LOADS = 2  # how often each side loads its model: where its memory lies changes its speed
STARTS = 4
PICTURE = 8000  # pixels a side: a PNG of 64 megapixels in 8 kB

STARTED = ["start, s", "most anonymous memory at the start, MiB", "memory after a text, MiB"]
SPEED = ["32 clients, texts/s", "2,000 texts in one request, s", "longest wait of a text beside them, s"]
FAIRNESS = [
    "longest wait of a text beside 24 clients of 64 texts, s",
    "longest wait of a text beside 8 PNGs of 64 megapixels, s",
]

Row = tuple[str, list[float]]  # what with its unit, and a number for each side
Measure = Callable[[int], Coroutine[Any, Any, list[float]]]  # of a server on a port
Sources = list[tuple[str, bytes | None]]  # texts and images of one request


# ------------------------------------------------------------------------------------------------------ workloads


def jpeg(size: str, seed: int = 0) -> bytes:
    """A file of 0.2 bytes a pixel, as a photo has."""
    width, height = map(int, size.split("x"))
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 16, width // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def workload(name: str, checkpoint: Path) -> Sources:
    """One request. How long a text is, the tokenizer says."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    random = np.random.default_rng(0)

    def text(tokens: float) -> str:
        made = " ".join(random.choice(WORDS, int(tokens)))
        while len(tokenizer.encode(made).ids) > tokens:
            made = made[:-1]
        return made

    if name in JPEGS:
        return [("", jpeg(name))]
    if name == MIXTURE:
        texts = [(text(tokens), None) for tokens in (*np.linspace(5, 120, 12), 250, 250)]
        return [*texts, *(("", jpeg(JPEGS[0], seed)) for seed in range(2))]
    count, kind = int(name.split()[0]), name.split()[1]
    lengths = random.integers(8, 15, count) if kind == "short" else np.linspace(5, 120, count)
    return [(text(tokens), None) for tokens in lengths]


# ------------------------------------------------------------------------- in a process that imports the side's module


class Worker:
    """The side's own preparer, model and batcher. Each method measures a workload, in seconds."""

    def __init__(self, gme: Any, checkpoint: Path, runner: asyncio.Runner) -> None:
        self.gme = gme
        self.runner = runner
        self.checkpoint = checkpoint
        self.preparer, self.network, self.batcher = load(gme)
        self.network.embed(self.preparer([gme.Source("first")]))  # keeps the states of the default instruction
        self.known: dict[str, list[Any]] = {}  # batches by workload

    def sources(self, name: str) -> list[Any]:
        return [self.gme.Source(text, image) for text, image in workload(name, self.checkpoint)]

    def prepare(self, name: str) -> float:
        return seconds(functools.partial(self.preparer, self.sources(name)))

    def model(self, name: str) -> float:
        """Embed the batches, one after the other."""
        if name not in self.known:
            self.known[name] = self.runner.run(self.cut(self.sources(name)))
        return seconds(lambda: [self.network.embed(batch) for batch in self.known[name]])

    async def cut(self, sources: list[Any]) -> list[Any]:
        """The batches that the side's batcher hands to the model when a request arrives while the model is busy."""
        batches = []

        def compute(inputs: Sequence[Any]) -> np.ndarray:
            batches.append(list(inputs))
            time.sleep(0.3)  # so that all is prepared by the next, as beside the real model
            return np.ones((len(inputs), 4), np.float32)

        with self.computing(compute):
            async with self.batcher.running():
                busy = asyncio.create_task(self.batcher.embed([self.gme.Source("busy", None, "Another instruction.")]))
                while not batches:
                    await asyncio.sleep(0.01)
                await self.batcher.embed(sources)
                await busy
        return batches[1:]

    @contextlib.contextmanager
    def computing(self, compute: Callable[[Sequence[Any]], np.ndarray]) -> Iterator[None]:
        """Within the block the batcher's model is `compute`."""
        own = self.batcher.compute
        self.batcher.compute = compute
        try:
            yield
        finally:
            self.batcher.compute = own

    def products(self, name: str) -> float:
        """Of `model`, the products with weights alone, in the same shapes."""
        import torch
        from torch.overrides import TorchFunctionMode

        calls: list[Callable[[], Any]] = []

        @functools.cache
        def activations(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(shape, device=self.network.device).to(dtype)

        class Record(TorchFunctionMode):
            def __torch_function__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
                options = options or {}
                if "linear" in str(function):  # torch's own, and two of oneDNN, one of which multiplies two activations
                    count = 2 if "binary" in str(function) else 1
                    stand_ins = [activations(x.shape, x.dtype) for x in arguments[:count]]
                    calls.append(functools.partial(function, *stand_ins, *arguments[count:], **options))
                return function(*arguments, **options)

        with Record():
            self.network.embed(self.preparer(self.sources(name)))

        @torch.inference_mode()
        def replay() -> None:
            for call in calls:
                call()
            if self.network.device.type == "cuda":
                torch.cuda.synchronize()

        return seconds(replay)

    def queue(self, name: str) -> float:
        """A request of one text among as many that wait, all prepared and batched, with a model that costs nothing."""
        count = int(name)
        texts = [self.gme.Source(f"text {number}") for number in range(count)]

        async def answer_all() -> None:
            async with self.batcher.running():
                await asyncio.gather(*(self.batcher.embed([text]) for text in texts))

        with self.computing(lambda inputs: np.ones((len(inputs), 4), np.float32)):
            return seconds(lambda: self.runner.run(answer_all())) / count


def load(gme: Any) -> tuple[Any, Any, Any]:
    """Preparer, model and batcher, as the side's own start makes them."""
    settings = gme.Settings.load()
    if hasattr(gme, "load"):
        return gme.load(settings)
    import torch  # as bab8743 builds its app

    device, dtype = gme.choose_device(settings.device, settings.dtype)
    directory = gme.find_checkpoint(settings)
    prepare = gme.Preparer(directory, settings.max_length, settings.max_image_pixels, settings.max_image_tokens)
    model = gme.Model(directory, device, dtype)
    model.check(prepare([gme.Source("A red circle on white."), gme.Source("harbour")]))
    max_tokens = 16384 if device.type == "cuda" else min(256 * torch.get_num_threads(), 8192)
    return prepare, model, gme.Batcher(prepare, model.embed, max_tokens, settings.max_queue)


def seconds(call: Callable[[], object]) -> float:
    """Of one call, in as many as take 0.2 s."""
    count, taken = timeit.Timer(call).autorange()
    return taken / count


def work(checkpoint: Path) -> None:
    """Answer each line of stdin, which names a method of `Worker` and a workload, with a number."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    import torch

    threads = torch.get_num_threads()
    import gme_service as gme  # loads the toy, which may set the number of threads to one

    torch.set_num_threads(threads)
    os.environ.update(names(checkpoint))
    with asyncio.Runner() as runner:
        worker = Worker(gme, checkpoint, runner)
        for line in sys.stdin:
            kind, _, name = line.strip().partition(" ")
            print(getattr(worker, kind)(name), file=answers)


# ---------------------------------------------------------------------------------------------------------- sides


def names(checkpoint: Path) -> dict[str, str]:
    """The settings with which a service finds its checkpoint."""
    return {"GME_MODEL_DIR": str(checkpoint.parent.parent), "GME_MODEL_ID": "/".join(checkpoint.parts[-2:])}


@dataclass
class Side:
    """A checkout, the interpreter that has its requirements, and the checkpoint in a form that it reads."""

    directory: Path
    python: str
    checkpoint: Path

    def run(self, command: list[str], checkpoint: Path, dtype: str) -> subprocess.Popen[str]:
        """A process in which `gme_service` is this side's, and serves that checkpoint."""
        print(f"{self.directory}: {' '.join(command)}", file=sys.stderr, flush=True)
        environment = os.environ | names(checkpoint) | {"GME_DTYPE": dtype, "PYTHONPATH": str(self.directory)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([self.python, *command], cwd=self.directory, env=environment, **pipes)

    @contextlib.contextmanager
    def worker(self, dtype: str) -> Iterator[Callable[[str], float]]:
        """What `work` answers to a line."""
        with self.run([__file__, "--work", str(self.checkpoint)], TOY, dtype) as process:

            def ask(line: str) -> float:
                print(line, file=process.stdin, flush=True)
                return float(process.stdout.readline() or sys.exit(f"{self.directory} cannot measure: {line}"))

            yield ask

    @contextlib.contextmanager
    def server(self, dtype: str) -> Iterator[tuple[int, list[float]]]:
        """A port; the seconds until it was open, the most anonymous memory until then, and all memory after a text."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = ["-m", "uvicorn", "gme_service:app", "--port", str(port), "--log-level", "warning"]
        started, most = time.perf_counter(), 0.0
        with self.run(command, self.checkpoint, dtype) as process, contextlib.ExitStack() as stack:
            stack.callback(process.terminate)

            def mebibytes(field: str) -> float:
                return int(Path(f"/proc/{process.pid}/status").read_text().partition(field)[2].split()[0]) / 1024

            while process.poll() is None:  # the port opens when the model is loaded, and nothing else says so
                most = max(most, mebibytes("RssAnon:"))
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            taken = time.perf_counter() - started
            asyncio.run(exchange(port, [text_request(["first"])]))
            yield port, [taken, most, mebibytes("VmRSS:")]


def spelled_out(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint for a checkout that knows no defaults: with them in its configuration, and links for the rest."""
    copy = folder / "spelled-out" / checkpoint.name
    copy.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    defaults = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
    config["vision_config"] = defaults | config["vision_config"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


# ----------------------------------------------------------------------------------------------------------- HTTP


def request(path: str, media: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def text_request(texts: Sequence[str]) -> bytes:
    return request("/embed/text", "application/json", json.dumps({"texts": texts}).encode())


def picture_request(file: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return request("/embed/image", "multipart/form-data; boundary=x", head + file + b"\r\n--x--\r\n")


def sentences(*shape: int) -> list[Any]:
    """Lists of that shape, of texts of eight words."""
    words = np.random.default_rng(0).choice(WORDS, (*shape, 8))
    return np.apply_along_axis(" ".join, -1, words).tolist()


async def exchange(port: int, requests: Iterable[bytes], clients: int = 1) -> float:
    """Send requests over that many connections, each waiting for its answer; the seconds until the last."""
    waiting = iter(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**27)
        for message in waiting:
            writer.write(message)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            await reader.readexactly(int(answer.partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


async def beside(port: int, requests: list[bytes], clients: int) -> tuple[float, float]:
    """The seconds that `exchange` takes, and the longest that a lone text waited meanwhile."""
    bulk = asyncio.create_task(exchange(port, requests, clients))
    waits = [0.0]
    while not bulk.done():
        await asyncio.sleep(0.1)
        waits.append(await exchange(port, [text_request(["a lone query"])]))
    return await bulk, max(waits)


async def speed(port: int) -> list[float]:
    singles, bulk = sentences(2, 2000)
    taken = await exchange(port, [text_request([text]) for text in singles], 32)
    return [len(singles) / taken, *await beside(port, [text_request(bulk)], 1)]


async def fairness(port: int) -> list[float]:
    _, beside_texts = await beside(port, [text_request(texts) for texts in sentences(48, 64)], 24)
    pictures = [picture_request(large_png(number)) for number in range(8)]
    _, beside_pictures = await beside(port, pictures, 8)
    return [beside_texts, beside_pictures]


def large_png(number: int) -> bytes:
    """A black picture with a white dot, which makes it differ from those of other numbers."""
    image = Image.new("1", (PICTURE, PICTURE))
    image.putpixel((number * PICTURE // 8, 0), 1)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def nothing(_: int) -> list[float]:
    return []


# --------------------------------------------------------------------------------------------------------- tables


def bytes_of_weights(checkpoint: Path, dtype: str) -> float:
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))  # in float32
    return size if dtype == "float32" else size / 2


def outside(sides: list[Side], dtype: str, measure: Measure, whats: list[str]) -> Iterator[Row]:
    """What a start takes with the files in the page cache, and what `measure` says of the server on a port."""
    files = {file for side in sides for file in side.checkpoint.glob("*.safetensors")}
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    taken: list[list[list[float]]] = [[] for _ in sides]
    for _ in range(STARTS):
        for side, numbers in zip(sides, taken, strict=True):
            with side.server(dtype) as (port, start):
                numbers.append(start + asyncio.run(measure(port)))
    for index, what in enumerate(whats):
        # A bound has to hold in every turn.
        chosen = max if is_better_when_more(what) or what.startswith("longest wait") else min
        yield what, [chosen(turn[index] for turn in numbers) for numbers in taken]


def inside(sides: list[Side], dtype: str, lines: list[str]) -> dict[str, list[float]]:
    """The best answers of each side's worker. Models that do not fit into memory together are loaded one by one."""
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    needed = sum(bytes_of_weights(side.checkpoint, dtype) + 1e9 for side in sides)
    together = os.environ["GME_DEVICE"] == "cuda" or available > needed
    everyone = list(range(len(sides)))
    groups = [everyone] if together else [[index] for index in everyone]
    best = {line: [float("inf")] * len(sides) for line in lines}
    for group in groups * LOADS:
        with contextlib.ExitStack() as stack:
            asks = {index: stack.enter_context(sides[index].worker(dtype)) for index in group}
            for line in lines:
                for index, number in take_turns(asks, line).items():
                    best[line][index] = min(best[line][index], number)
    return best


def take_turns(asks: dict[int, Callable[[str], float]], line: str) -> dict[int, float]:
    """Ask in turns until the two best answers of each agree, or time is up; the best of each."""
    answers: dict[int, list[float]] = {index: [] for index in asks}
    started = time.perf_counter()
    while True:
        for index, ask in asks.items():
            answers[index] = sorted([*answers[index], ask(line)])
        taken = time.perf_counter() - started
        repeated = all(len(found) > 1 and found[1] < (1 + AGREE) * found[0] for found in answers.values())
        if (repeated and taken > LEAST_SECONDS) or taken > MOST_SECONDS:
            return {index: found[0] for index, found in answers.items()}


def rows(parts: list[str], works: list[str], dtypes: list[str], sides: list[Side]) -> Iterator[Row]:
    toys = [replace(side, checkpoint=TOY) for side in sides]
    if "prepare" in parts:
        for line, numbers in inside(toys, "float32", [f"prepare {size}" for size in JPEGS]).items():
            yield f"{line}, ms", [1000 * number for number in numbers]
    if "toy" in parts:
        yield from named("toy", outside(toys, "float32", speed, STARTED + SPEED))
    if "fairness" in parts:
        found = list(outside(toys, "float32", fairness, STARTED + FAIRNESS))
        yield from named("toy", found[len(STARTED) :])
    if "queue" in parts:
        few, many = inside(toys, "float32", [f"queue {count}" for count in QUEUES]).values()
        for count, numbers in zip(QUEUES, (few, many), strict=True):
            yield f"a request of one text where {count:,} wait, ms", [1000 * number for number in numbers]
        yield "the second by the first", [b / a for a, b in zip(few, many, strict=True)]
    for dtype in dtypes:
        if "start" in parts:
            yield from named(dtype, outside(sides, dtype, nothing, STARTED))
        if "model" in parts or "products" in parts:
            yield from named(dtype, computed(parts, works, dtype, sides))


def computed(parts: list[str], works: list[str], dtype: str, sides: list[Side]) -> Iterator[Row]:
    """The model's workloads, and for the images the share of the products with weights."""
    sizes = [work for work in works if work in JPEGS and "products" in parts]
    models = [f"model {work}" for work in works if "model" in parts or work in sizes]
    best = inside(sides, dtype, models + [f"products {size}" for size in sizes])
    for line, numbers in best.items():
        yield f"{line}, s", numbers
    for size in sizes:
        pairs = zip(best[f"products {size}"], best[f"model {size}"], strict=True)
        yield f"share of the products in {size}, %", [100 * products / model for products, model in pairs]


def named(name: str, found: Iterable[Row]) -> Iterator[Row]:
    for what, numbers in found:
        yield f"{name}: {what}", numbers


def is_better_when_more(what: str) -> bool:
    return what.endswith(("/s", "%"))


def table(found: Iterable[Row], sides: list[Side]) -> Iterator[str]:
    """Lines of Markdown. A ratio over 1 says that this side is better: how many times as much the other one takes."""
    yield f"| the best of each | {' | '.join(side.directory.name for side in sides)} |{' ratio |' * (len(sides) - 1)}"
    yield "| --- |" + " --- |" * (2 * len(sides) - 1)
    for what, numbers in found:
        cells = [f"{number:,.0f}" if number >= 100 else f"{number:#.3g}" for number in numbers]
        if len(numbers) == 2:
            this, other = numbers
            ratio = this / other if is_better_when_more(what) else other / this
            cells.append(f"{ratio:.2f}")
        yield f"| {what} | {' | '.join(cells)} |"


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: a list by commas, of these."""

    def read(given: str) -> list[str]:
        chosen = given.split(",")
        for one in chosen:
            if one not in known:
                raise argparse.ArgumentTypeError(f"{one!r} is none of {', '.join(known)}")
        return chosen

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made = Path(tempfile.gettempdir()) / "gme-random" / "published" / "shape"
    parser.add_argument("checkpoint", type=Path, nargs="?", default=made, help="a directory, made when it is not there")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--against-python", default=sys.executable, metavar="PYTHON", help="the interpreter for it")
    parser.add_argument("--device", default="cpu", help="as GME_DEVICE")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=["bfloat16", "float32"], help=",".join(DTYPES))
    parser.add_argument("--parts", type=some_of(PARTS), default=PARTS, help=",".join(PARTS))
    parser.add_argument("--works", type=some_of(WORKS), default=WORKS, help=",".join(WORKS))
    given = parser.parse_args()
    checkpoint = given.checkpoint.resolve()
    os.environ |= {"GME_DEVICE": given.device, "GME_CACHE_MB": "0"}
    needs_model = {"start", "model", "products"} & set(given.parts)
    if needs_model and not (checkpoint / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, TESTS / "make_random.py", checkpoint], check=True)
    checkouts = [(TESTS.parent, sys.executable)]
    if given.against:
        checkouts.append((given.against.resolve(), given.against_python))
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for number, (directory, python) in enumerate(checkouts):
            knows_defaults = "class Config" in (directory / "gme_service.py").read_text()
            if needs_model and not knows_defaults:
                sides.append(Side(directory, python, spelled_out(checkpoint, Path(folder) / str(number))))
            else:
                sides.append(Side(directory, python, checkpoint))
        for line in table(rows(given.parts, given.works, given.dtypes, sides), sides):
            print(line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        main()
