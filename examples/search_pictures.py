"""Search in your own folder of pictures by sentences.

The service makes the vectors, and the vector database Qdrant searches in them:

    pip install qdrant-client requests tqdm
    python examples/search_pictures.py ~/Pictures "a dog on a beach" "海边的日落"
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from tqdm import tqdm

PROMPT = "Find an image that matches the given text."
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
AT_A_TIME = 8  # requests, which the service puts into common batches


def main() -> None:
    options = read_options()
    service = Service(options.url, options.key)
    pictures = find_pictures(options.folder)
    try:
        queries = service.embed_texts(options.sentences, PROMPT)
        database = build_database(service, pictures, len(queries[0]))
    except ServiceError as error:
        sys.exit(str(error))

    for sentence, query in zip(options.sentences, queries, strict=True):
        print(sentence)
        for found in database.query_points("pictures", query=query, limit=options.top).points:
            print(f"  {found.score:.3f}  {found.payload['file']}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search in a folder of pictures by sentences.")
    parser.add_argument("folder", type=Path, help="pictures are searched for in its subfolders too")
    parser.add_argument("sentences", nargs="+", metavar="sentence", help="what to search for")
    parser.add_argument("--top", type=int, default=3, help="how many pictures to print for each sentence (%(default)s)")
    parser.add_argument("--url", default="http://localhost:8000", help="where the service is (%(default)s)")
    parser.add_argument("--key", default=os.environ.get("GME_API_KEY"), help="its API key (GME_API_KEY, if set)")
    return parser.parse_args()


def find_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        sys.exit(f"There is no folder {folder}.")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not pictures:
        sys.exit(f"There is no picture in {folder}: I look for files that end with {', '.join(sorted(ENDINGS))}.")
    return pictures


def build_database(service: "Service", pictures: list[Path], dimension: int) -> QdrantClient:
    """A database in memory. `path="index"` would keep it on disk, `url="http://localhost:6333"` in a server."""
    database = QdrantClient(":memory:")
    vectors = VectorParams(size=dimension, distance=Distance.DOT)
    database.create_collection("pictures", vectors_config=vectors)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        embeddings = tqdm(pool.map(service.embed_picture, pictures), total=len(pictures), unit=" pictures")
        for number, (path, embedding) in enumerate(zip(pictures, embeddings, strict=True)):
            if embedding:
                point = PointStruct(id=number, vector=embedding, payload={"file": str(path)})
                database.upsert("pictures", [point])
    return database


class ServiceError(Exception):
    """Why there are no vectors, in a sentence."""


class Service:
    """GME Service, as a client sees it."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def embed_texts(self, texts: list[str], prompt: str) -> list[list[float]]:
        answer = self.post("/embed/text", json={"texts": texts, "prompt": prompt})
        if not answer.ok:
            raise ServiceError(answer.json()["detail"])
        return answer.json()["embeddings"]

    def embed_picture(self, path: Path) -> list[float] | None:
        """None for a file that the service refuses, with a line that says why."""
        answer = self.post("/embed/image", files={"file": (path.name, path.read_bytes())})
        if not answer.ok:
            tqdm.write(f"{path}: {answer.json()['detail']}", file=sys.stderr)
            return None
        return answer.json()["embeddings"][0]

    def post(self, route: str, **content: object) -> requests.Response:
        try:
            answer = requests.post(self.url + route, headers=self.headers, timeout=600, **content)
            answer.json()
        except requests.RequestException:
            raise ServiceError(f"No GME Service answers at {self.url}: start it, or name another with --url.") from None
        return answer


if __name__ == "__main__":
    main()
