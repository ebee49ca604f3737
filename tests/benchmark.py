"""Measure this checkout, or this one beside another: `python tests/benchmark.py [--against DIR]`.

The model is one of the published shape with random weights (8.8 GB, made in the temporary directory), its texts have
numbers of tokens as they are in practice, and HTTP is measured with the toy. Each side runs in processes and with an
interpreter of its own; they take turns (A, B, A, B ...) and each keeps its best, so that a machine whose speed drifts
is the same for both. Run it on one that does nothing else: on two cores it takes half an hour for the two.
"""

import argparse
import asyncio
import contextlib
import dataclasses
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent
TOY = TESTS / "models" / "toy" / "shapes"
WORDS = ["red", "green", "blue", "yellow", "circle", "square", "triangle", "star", "ring", "picture", "of", "a"]
JPEGS = ("448x448", "800x600", "1920x1080")
TEXTS = ("1 short query", "32 short queries", "16 mixed texts", "64 mixed texts")
MIXTURE = "12 mixed texts, 2 images with a long text each"
UNITS = {"model": "s", "prepare": "ms"}
ROUNDS, SECONDS = 4, 10  # of turns, at least
Row = tuple[str, list[float]]  # what with its unit, and a number for each side


def jpeg(size: str) -> bytes:
    """A file of 0.2 bytes a pixel, as a photo has."""
    width, height = map(int, size.split("x"))
    coarse, file = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


@functools.cache
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
    batches: list[list[int]] = []  # of lengths; the first is the longest, to which the others are padded
    for length in sorted(random.integers(8, 15, count) if "short" in name else np.linspace(5, 120, count))[::-1]:
        if not batches or length < 0.8 * batches[-1][0] or (len(batches[-1]) + 1) * batches[-1][0] > max_tokens:
            batches.append([])
        batches[-1].append(int(length))
    images = [[("", jpeg(JPEGS[0])), text(250)]] * 2 if name == MIXTURE else []  # which has 256 tokens
    return [[text(length) for length in batch] for batch in batches] + images


def work(checkpoint: Path) -> None:
    """In a process of the side's own: answer each line of stdin, which says what to measure, with a number."""
    device, answers = os.environ["GME_DEVICE"], os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    import torch

    threads = torch.get_num_threads()
    import gme_service as gme  # loads the toy, which may set the number of threads to one

    torch.set_num_threads(threads)
    prepare, model = gme.Preparer(checkpoint, 1800, 10**8), None
    max_tokens = 16384 if device == "cuda" else min(256 * threads, 8192)

    for kind, _, name in (line.strip().partition(" ") for line in sys.stdin):
        sources = [[gme.Source(*one) for one in batch] for batch in workload(name, checkpoint, max_tokens)]
        inputs = [prepare(batch) for batch in sources]
        if kind == "model" and model is None:
            model = gme.Model(checkpoint, torch.device(device), getattr(torch, os.environ["GME_DTYPE"]))
            model.embed(prepare([gme.Source("", jpeg(JPEGS[0]))]))  # reads all weights
            model.embed(inputs[0])
        call, batches = (prepare, sources) if kind == "prepare" else (model.embed, inputs)
        run = timeit.Timer(lambda call=call, batches=batches: [call(batch) for batch in batches])
        count, seconds = run.autorange()  # as many as take 0.2 s
        print(seconds / count * (1000 if kind == "prepare" else 1), file=answers)


@dataclasses.dataclass
class Side:
    """A checkout, and the interpreter that has its requirements."""

    directory: Path
    python: str

    def run(self, command: list[str], checkpoint: Path, dtype: str) -> subprocess.Popen[str]:
        """A process in which `gme_service` is this side's, and serves the checkpoint."""
        print(f"{self.directory}: {' '.join(command)}", file=sys.stderr, flush=True)
        model = {"GME_MODEL_DIR": str(checkpoint.parent.parent), "GME_MODEL_ID": "/".join(checkpoint.parts[-2:])}
        environment = os.environ | model | {"GME_DTYPE": dtype, "PYTHONPATH": str(self.directory)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([self.python, *command], cwd=self.directory, env=environment, **pipes)

    @contextlib.contextmanager
    def worker(self, checkpoint: Path, dtype: str) -> Iterator[Callable[[str], float]]:
        """What `work` answers to a line."""
        with self.run([__file__, "--work", str(checkpoint)], TOY, dtype) as process:

            def ask(line: str) -> float:
                print(line, file=process.stdin, flush=True)
                return float(process.stdout.readline() or sys.exit(f"{self.directory} cannot measure: {line}"))

            yield ask

    @contextlib.contextmanager
    def server(self, checkpoint: Path, dtype: str) -> Iterator[tuple[int, tuple[float, ...]]]:
        """A port; the seconds until it was open, the most anonymous memory until then, and all memory after a text."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = ["-m", "uvicorn", "gme_service:app", "--port", str(port), "--log-level", "warning"]
        started, most = time.perf_counter(), 0.0
        with self.run(command, checkpoint, dtype) as process, contextlib.ExitStack() as stack:
            stack.callback(process.terminate)

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
    """Texts a second of 32 clients; seconds of a bulk request, and the longest that a lone query beside it took."""
    words, waits = np.random.default_rng(0).choice(WORDS, (2, 2000, 8)), [0.0]
    texts, others = ([" ".join(row) for row in block] for block in words)
    single = await exchange(port, [[text] for text in texts], 32)
    bulk = asyncio.create_task(exchange(port, [others], 1))
    while not bulk.done():
        await asyncio.sleep(0.1)
        waits.append(await exchange(port, [texts[:1]], 1))
    return len(texts) / single, await bulk, max(waits)


def weights(checkpoint: Path, dtype: str) -> float:
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))  # in float32
    return size / (1 if dtype == "float32" else 2)


def outside(sides: list[Side], checkpoint: Path, dtype: str) -> Iterator[Row]:
    """What a start takes with the files in the page cache, and with the toy, what HTTP does."""
    name, size = "toy" if checkpoint == TOY else dtype, weights(checkpoint, dtype) / 2**20
    taken: list[list[tuple[float, ...]]] = [[] for _ in sides]
    subprocess.run(["cat", *checkpoint.glob("*.safetensors")], stdout=subprocess.DEVNULL, check=True)
    for side, numbers in [*zip(sides, taken, strict=True)] * ROUNDS:
        with side.server(checkpoint, dtype) as (port, start):
            numbers.append(start + (asyncio.run(http(port)) if checkpoint == TOY else ()))
    what = ["start, s", f"most anonymous memory (weights: {size:,.0f}), MiB", "memory after a text, MiB"]
    what += ["32 clients, texts/s", "2,000 texts in one request, s", "longest wait of a query beside them, s"]
    for words, *values in zip(what, *(zip(*numbers, strict=True) for numbers in taken), strict=False):
        yield f"{name}: {words}", [max(value) if words.endswith("/s") else min(value) for value in values]


def inside(sides: list[Side], checkpoint: Path, dtype: str, lines: list[str]) -> Iterator[Row]:
    """What workers answer. Where there is no memory for the models of all, they load them by turns, twice."""
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    together = os.environ["GME_DEVICE"] == "cuda" or available > len(sides) * (weights(checkpoint, dtype) + 1e9)
    everyone, best = range(len(sides)), {line: [float("inf") for _ in sides] for line in lines}
    for group in [everyone] * 2 if together else [[index] for index in everyone] * 2:
        with contextlib.ExitStack() as stack:
            asks = [(index, stack.enter_context(sides[index].worker(checkpoint, dtype))) for index in group]
            for line in lines:
                turn, end = 0, time.perf_counter() + SECONDS
                while (turn := turn + 1) <= ROUNDS // 2 or time.perf_counter() < end:
                    for index, ask in asks:
                        best[line][index] = min(best[line][index], ask(line))
    for line, numbers in best.items():
        yield f"{dtype}: {line}, {UNITS[line.split()[0]]}", numbers


def table(rows: Iterable[Row], sides: list[Side]) -> Iterator[str]:
    yield f"| the best of each | {' | '.join(side.directory.name for side in sides)} |{' ratio |' * (len(sides) - 1)}"
    yield "| --- |" + " --- |" * (2 * len(sides) - 1)
    for what, numbers in rows:
        cells = [f"{number:,.0f}" if number >= 100 else f"{number:#.3g}" for number in numbers]
        if len(numbers) == 2:
            ratio = numbers[1] / numbers[0]
            cells.append(f"{1 / ratio if what.endswith('/s') else ratio:.2f}")
        yield f"| {what} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made = Path(tempfile.gettempdir()) / "gme-random" / "published" / "shape"
    parser.add_argument("checkpoint", type=Path, nargs="?", default=made, help="a directory, made when it is not there")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--against-python", default=sys.executable, metavar="PYTHON", help="the interpreter for it")
    parser.add_argument("--device", default="cpu", help="as GME_DEVICE")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="as GME_DTYPE")
    parser.add_argument("--parts", default="prepare,toy,start,model", help="what to measure")
    given = parser.parse_args()
    checkpoint, dtypes = given.checkpoint.resolve(), given.dtypes.split(",")
    os.environ |= {"GME_DEVICE": given.device, "GME_CACHE_MB": "0"}
    if not (checkpoint / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, TESTS / "make_random.py", checkpoint], check=True)
    sides = [Side(TESTS.parent, sys.executable)]
    sides += [Side(given.against.resolve(), given.against_python)] if given.against else []
    jpegs = [f"prepare {size}" for size in JPEGS]
    works = [f"model {name}" for name in (*TEXTS, *JPEGS, MIXTURE)]
    parts = [("prepare", inside(sides, TOY, "float32", jpegs)), ("toy", outside(sides, TOY, "float32"))]
    parts += [("start", outside(sides, checkpoint, dtype)) for dtype in dtypes]
    parts += [("model", inside(sides, checkpoint, dtype, works)) for dtype in dtypes]
    for line in table((row for part, found in parts if part in given.parts for row in found), sides):
        print(line, flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main()
