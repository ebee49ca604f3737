"""Find the pages of a PDF that answer a question, by how they look: tables, figures and scans too. No text is read.

The service makes the vectors, and the vector database Qdrant searches in them:

    pip install pypdfium2 qdrant-client requests tqdm
    python examples/search_pdf.py report.pdf "What did sales cost?"
"""

import argparse
import io
import os
import sys
from pathlib import Path

import requests
from pypdfium2 import PdfDocument, PdfiumError, PdfPage
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from tqdm import tqdm

PROMPT = "Find a screenshot that relevant to the user's question."  # word for word as in the benchmark ViDoRe
LONG_SIDE = 1500  # pixels: of an A4 page somewhat more than the model looks at
PAGES_IN_A_REQUEST = 8


def main() -> None:
    options = read_options()
    service = Service(options.url, options.key)
    document = open_pdf(options.file)
    try:
        question = service.embed_text(options.question, PROMPT)
        database = build_database(service, document, len(question))
    except ServiceError as error:
        sys.exit(str(error))

    for found in database.query_points("pages", query=question, limit=options.top).points:
        print(f"{found.score:.3f}  page {found.payload['page']}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find the pages of a PDF that answer a question, by how they look.")
    parser.add_argument("file", type=Path, help="the PDF")
    parser.add_argument("question", help="what a page should answer")
    parser.add_argument("--top", type=int, default=3, help="how many pages to print (%(default)s)")
    parser.add_argument("--url", default="http://localhost:8000", help="where the service is (%(default)s)")
    parser.add_argument("--key", default=os.environ.get("GME_API_KEY"), help="its API key (GME_API_KEY, if set)")
    return parser.parse_args()


def open_pdf(path: Path) -> PdfDocument:
    if not path.is_file():
        sys.exit(f"There is no file {path}.")
    try:
        return PdfDocument(path)
    except PdfiumError as error:
        sys.exit(f"{path} cannot be read as a PDF: {error}")


def build_database(service: "Service", document: PdfDocument, dimension: int) -> QdrantClient:
    """A database in memory. `path="index"` would keep it on disk, `url="http://localhost:6333"` in a server."""
    database = QdrantClient(":memory:")
    vectors = VectorParams(size=dimension, distance=Distance.DOT)
    database.create_collection("pages", vectors_config=vectors)
    numbers = range(len(document))
    with tqdm(total=len(document), unit=" pages") as progress:
        for start in range(0, len(document), PAGES_IN_A_REQUEST):
            some = numbers[start : start + PAGES_IN_A_REQUEST]
            embeddings = service.embed_pictures([render(document[number]) for number in some])
            for number, embedding in zip(some, embeddings, strict=True):
                point = PointStruct(id=number, vector=embedding, payload={"page": number + 1})
                database.upsert("pages", [point])
            progress.update(len(some))
    return database


def render(page: PdfPage) -> bytes:
    """The page as the bytes of a JPEG file."""
    picture = page.render(scale=LONG_SIDE / max(page.get_size())).to_pil()
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()


class ServiceError(Exception):
    """Why there are no vectors, in a sentence."""


class Service:
    """GME Service, as a client sees it."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def embed_text(self, text: str, prompt: str) -> list[float]:
        (embedding,) = self.post("/embed/text", json={"texts": [text], "prompt": prompt})
        return embedding

    def embed_pictures(self, pictures: list[bytes]) -> list[list[float]]:
        return self.post("/embed/image", files=[("file", picture) for picture in pictures])

    def post(self, route: str, **content: object) -> list[list[float]]:
        try:
            answer = requests.post(self.url + route, headers=self.headers, timeout=600, **content)
            fields = answer.json()
        except requests.RequestException:
            raise ServiceError(f"No GME Service answers at {self.url}: start it, or name another with --url.") from None
        if not answer.ok:
            raise ServiceError(fields["detail"])
        return fields["embeddings"]


if __name__ == "__main__":
    main()
