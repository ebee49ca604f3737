"""Find the pages of a PDF that answer a question, by how they look: tables, figures and scans too, and no text is read.

python tests/example_pages.py FILE.pdf QUESTION [URL of the service]
"""

import io
import sys

import pypdfium2
import requests
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

FILE, QUESTION = sys.argv[1:3]
URL = sys.argv[3] if len(sys.argv) > 3 else "http://localhost:8000"
PROMPT = "Find a screenshot that relevant to the user's question."  # word for word as in the benchmark ViDoRe
LONG_SIDE = 1500  # pixels: of an A4 page somewhat more than the model looks at
BATCH = 8  # pages in one request


def render(page: pypdfium2.PdfPage) -> bytes:
    file = io.BytesIO()
    image = page.render(scale=LONG_SIDE / max(page.get_size())).to_pil()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()


def embed_pages(pages: list[bytes]) -> list[list[float]]:
    answer = requests.post(f"{URL}/embed/image", files=[("file", page) for page in pages], timeout=600)
    answer.raise_for_status()
    return answer.json()["embeddings"]


def embed_question(text: str) -> list[float]:
    answer = requests.post(f"{URL}/embed/text", json={"texts": [text], "prompt": PROMPT}, timeout=600)
    answer.raise_for_status()
    return answer.json()["embeddings"][0]


question = embed_question(QUESTION)

database = QdrantClient(":memory:")  # path="index" keeps it on disk, url="http://localhost:6333" in a server
database.create_collection("pages", vectors_config=VectorParams(size=len(question), distance=Distance.DOT))
pdf = pypdfium2.PdfDocument(FILE)
for start in range(0, len(pdf), BATCH):
    numbers = range(start, min(start + BATCH, len(pdf)))
    vectors = embed_pages([render(pdf[number]) for number in numbers])
    points = zip(numbers, vectors, strict=True)
    database.upsert("pages", [PointStruct(id=n, vector=vector, payload={"page": n + 1}) for n, vector in points])

for best in database.query_points("pages", query=question, limit=3).points:
    print(f"page {best.payload['page']}: {best.score:.3f}")
