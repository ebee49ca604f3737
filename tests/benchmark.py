"""Measure this checkout, or this one beside another: `python tests/benchmark.py [--against DIR] [--out FILE]`.

The model is one of the published shape with random weights (8.8 GB, made in the temporary directory unless CHECKPOINT is
given), and its texts have numbers of tokens as they are in practice. HTTP is measured with the toy checkpoint. Each
side runs in processes and with an interpreter of its own; they take turns (A, B, A, B ...) and each keeps its best, so
that a machine whose speed drifts is the same for both. Run it on a machine that does nothing else: on two cores it takes
a quarter of an hour, and twice as long with another checkout beside this one.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent
TOY = TESTS / "models" / "toy" / "shapes"
WORDS = (
    "red green blue yellow purple orange black white circle square triangle star cross ring picture of a the".split()
)
JPEGS = ("448x448", "800x600", "1920x1080")
TEXTS = ("1 short query", "32 short queries", "16 mixed texts", "64 mixed texts")
MIXTURE = "12 mixed texts, 2 images with a long text each"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
UNITS = {"model": "s", "product": "ms", "prepare": "ms", "bytes": "kB"}  # by kind of measurement
SECONDS = 1  # a turn of a side is one call, or as many as fit into this
Row = tuple[str, list[float]]  # what with its unit, and a number for each side


def jpeg(size: str) -> bytes:
    """A file of about the size that a photo's has."""
    width, height = map(int, size.split("x"))
    coarse, file = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def workload(name: str, checkpoint: Path, max_tokens: int) -> list[list[tuple[str, bytes | None]]]:
    """The batches of a workload, as the service would make them. How long a text is, the tokenizer says."""
    from tokenizers import Tokenizer

    tokenizer, random = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), np.random.default_rng(0)

    def text(tokens: int) -> tuple[str, None]:
        made = " ".join(random.choice(WORDS, tokens))
        while len(tokenizer.encode(made).ids) > tokens:
            made = made[:-1]
        return made, None

    if name in JPEGS:
        return [[("", jpeg(name))]]
    count = int(name.split()[0])
    batches: list[list[int]] = []
    for length in sorted(random.integers(8, 15, count) if "short" in name else np.linspace(5, 120, count))[::-1]:
        # the first is the longest, to which the others are padded
        if not batches or length < 0.8 * batches[-1][0] or (len(batches[-1]) + 1) * batches[-1][0] > max_tokens:
            batches.append([])
        batches[-1].append(int(length))
    images = [[("", jpeg(JPEGS[0])), text(250)]] * 2 if name == MIXTURE else []  # which has 256 tokens
    return [[text(length) for length in batch] for batch in batches] + images


def work(checkpoint: Path, device: str, dtype: str) -> None:
    """In a process of the side's own: answer each line of stdin, which says what to measure, with a number."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    import torch

    threads = torch.get_num_threads()
    import gme_service as gme  # loads the toy, which may set the number of threads to one

    torch.set_num_threads(threads)
    prepare, model = gme.Preparer(checkpoint, 1800, 10**8), None
    max_tokens = 16384 if device == "cuda" else min(256 * threads, 8192)

    def best(run: Callable[[], object]) -> float:
        times: list[float] = []
        while sum(times) < SECONDS:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return min(times)

    for line in sys.stdin:
        kind, _, name = line.strip().partition(" ")
        if kind == "product":
            rows, columns, width = map(int, name.split("x"))
            a, b = (torch.randn(size, width).to(device, getattr(torch, dtype)) for size in (rows, columns))
            answer = 1000 * best(lambda a=a, b=b: (a @ b.T)[0, 0].item())
        elif kind in ("prepare", "bytes"):
            sources = [gme.Source("", jpeg(name))]
            (one,) = prepare(sources)
            arrays = (getattr(one, field.name) for field in dataclasses.fields(one))
            size = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
            answer = size / 1000 if kind == "bytes" else 1000 * best(lambda sources=sources: prepare(sources))
        else:
            inputs = [prepare([gme.Source(*one) for one in batch]) for batch in workload(name, checkpoint, max_tokens)]
            if model is None:
                model = gme.Model(checkpoint, torch.device(device), getattr(torch, dtype))
                model.embed(inputs[0])
            answer = best(lambda inputs=inputs: [model.embed(batch) for batch in inputs])
        print(answer, file=answers)


@dataclasses.dataclass
class Side:
    """A checkout, and the interpreter that has its requirements."""

    directory: Path
    python: str
    device: str

    def run(self, command: list[str], checkpoint: Path, dtype: str, **options: int) -> subprocess.Popen[str]:
        """A process in which `gme_service` is this side's, and serves the checkpoint."""
        print(f"{self.directory}: {' '.join(command)}", file=sys.stderr, flush=True)
        model = {"GME_MODEL_DIR": str(checkpoint.parent.parent), "GME_MODEL_ID": "/".join(checkpoint.parts[-2:])}
        settings = {"GME_DEVICE": self.device, "GME_DTYPE": dtype, "GME_CACHE_MB": "0"}
        environment = os.environ | model | settings | {"PYTHONPATH": str(self.directory)}
        return subprocess.Popen([self.python, *command], cwd=self.directory, env=environment, text=True, **options)

    @contextlib.contextmanager
    def worker(self, checkpoint: Path, dtype: str) -> Iterator[Callable[[str], float]]:
        """What `work` answers to a line."""
        command = [__file__, str(checkpoint), "--device", self.device, "--dtypes", dtype, "--work"]
        with self.run(command, TOY, dtype, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

            def ask(line: str) -> float:
                print(line, file=process.stdin, flush=True)
                return float(process.stdout.readline() or sys.exit(f"{self.directory} cannot measure: {line}"))

            yield ask
            process.stdin.close()

    @contextlib.contextmanager
    def server(self, checkpoint: Path, dtype: str) -> Iterator[tuple[int, tuple[float, ...]]]:
        """A port; the seconds until it was open, the most anonymous memory until then, and all memory after a text."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["-m", "uvicorn", "gme_service:app", "--port", str(port), "--log-level", "warning"]
        started, most = time.perf_counter(), 0.0
        with self.run(command, checkpoint, dtype) as process:

            def mebibytes(field: str) -> float:
                return int(Path(f"/proc/{process.pid}/status").read_text().partition(field)[2].split()[0]) / 1024

            while process.poll() is None:  # the port opens when the model is loaded, and nothing else says so
                most = max(most, mebibytes("RssAnon:"))
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            asyncio.run(exchange(port, [["first"]], 1))
            yield port, (seconds, most, mebibytes("VmRSS:"))
            process.terminate()


async def exchange(port: int, requests: list[list[str]], clients: int) -> float:
    """Send requests of texts over that many connections, each waiting for its answer; the seconds it took."""
    waiting = iter([json.dumps({"texts": texts}) for texts in requests])
    head = "POST /embed/text HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**27)
        for body in waiting:
            writer.write(f"{head}{len(body)}\r\n\r\n{body}".encode())
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            await reader.readexactly(int(answer.partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


async def http(port: int) -> tuple[float, float, float]:
    """Seconds of 2,000 texts from 32 clients, of as many in one request, and the longest wait of a lone query beside it."""
    words, waits = np.random.default_rng(0).choice(WORDS, (2, 2000, 8)), [0.0]
    texts, others = ([" ".join(row) for row in block] for block in words)
    single = await exchange(port, [[text] for text in texts], 32)
    bulk = asyncio.create_task(exchange(port, [others], 1))
    while not bulk.done():
        await asyncio.sleep(0.1)
        waits.append(await exchange(port, [texts[:1]], 1))
    return single, await bulk, max(waits)


def outside(sides: list[Side], checkpoint: Path, dtype: str, rounds: int) -> Iterator[Row]:
    """What a service takes to start, from the page cache, and with the toy what HTTP does."""
    files, name = list(checkpoint.glob("*.safetensors")), "toy" if checkpoint == TOY else dtype
    taken: list[list[tuple[float, ...]]] = [[] for _ in sides]
    for file in files:
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
    for side, numbers in [*zip(sides, taken, strict=True)] * rounds:
        with side.server(checkpoint, dtype) as (port, start):
            numbers.append(start + (asyncio.run(http(port)) if checkpoint == TOY else ()))
    weights = sum(file.stat().st_size for file in files) / 4 * BYTES.get(dtype, 4) / 2**20
    what = ("start, s", f"most anonymous memory (weights {weights:,.0f}), MiB", "memory after a text, MiB")
    what += (
        "2,000 texts from 32 clients, s",
        "2,000 texts in one request, s",
        "longest wait of a query beside them, s",
    )
    for index in range(len(taken[0][0])):
        yield f"{name}: {what[index]}", [min(one[index] for one in numbers) for numbers in taken]


def inside(sides: list[Side], checkpoint: Path, dtype: str, lines: list[str], rounds: int) -> Iterator[Row]:
    """What workers answer. They load their models by turns, twice, where there is no memory for all."""
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 4 * BYTES[dtype]
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    everyone, best = range(len(sides)), {line: [float("inf") for _ in sides] for line in lines}
    together = sides[0].device == "cuda" or available > len(sides) * (weights + 1e9)
    for group in [everyone] * 2 if together else [[index] for index in everyone] * 2:
        with contextlib.ExitStack() as stack:
            asks = [(index, stack.enter_context(sides[index].worker(checkpoint, dtype))) for index in group]
            for line, (index, ask) in ((line, one) for line in lines for one in asks * (rounds // 2)):
                best[line][index] = min(best[line][index], ask(line))
    for line, numbers in best.items():
        yield f"{dtype}: {line}, {UNITS[line.split()[0]]}", numbers


def table(rows: Iterable[Row], names: list[str]) -> Iterator[str]:
    yield f"| best of each | {' | '.join(names)} |{' how much less |' if len(names) == 2 else ''}"
    yield "| --- |" + " --- |" * (2 * len(names) - 1)
    for what, numbers in rows:
        cells = [f"{number:,.0f}" if number >= 1000 else f"{number:#.3g}".rstrip(".") for number in numbers]
        ratio = [f"{numbers[1] / numbers[0]:.2f} x"] if len(numbers) == 2 else []
        yield f"| {what} | {' | '.join(cells + ratio)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "gme-random" / "published" / "shape"
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=default, help="a directory; made when there is none"
    )
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--against-python", default=sys.executable, metavar="PYTHON", help="the interpreter for it")
    parser.add_argument("--device", default="cpu", help="as GME_DEVICE")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="as GME_DTYPE")
    parser.add_argument("--parts", default="prepare,toy,model,start", help="what to measure")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--out", type=Path, help="where the table goes too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint, rounds, dtypes = arguments.checkpoint.resolve(), arguments.rounds, arguments.dtypes.split(",")
    if arguments.work:
        return work(checkpoint, arguments.device, dtypes[0])
    if not (checkpoint / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, TESTS / "make_random.py", checkpoint], check=True)
    sides = [Side(TESTS.parent, sys.executable, arguments.device)]
    if arguments.against:
        sides.append(Side(arguments.against.resolve(), arguments.against_python, arguments.device))
    ...
