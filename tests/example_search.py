"""Find images by what they show: the service makes the vectors, and the vector database Qdrant searches in them.

python tests/example_search.py [URL of the service]
"""

import sys
from pathlib import Path

import requests
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
PROMPT = "Find an image that matches the given text."


def embed_image(path: Path) -> list[float]:
    with path.open("rb") as file:
        answer = requests.post(f"{URL}/embed/image", files={"file": file}, timeout=600)
    answer.raise_for_status()
    return answer.json()["embeddings"][0]


def embed_query(text: str) -> list[float]:
    answer = requests.post(f"{URL}/embed/text", json={"texts": [text], "prompt": PROMPT}, timeout=600)
    answer.raise_for_status()
    return answer.json()["embeddings"][0]


images = sorted((Path(__file__).parent / "shapes").glob("*.png"))
vectors = [embed_image(path) for path in images]

database = QdrantClient(":memory:")  # path="index" keeps it on disk, url="http://localhost:6333" in a server
database.create_collection("images", vectors_config=VectorParams(size=len(vectors[0]), distance=Distance.DOT))
points = zip(images, vectors, strict=True)
database.upsert(
    "images", [PointStruct(id=n, vector=vector, payload={"file": path.name}) for n, (path, vector) in enumerate(points)]
)

for query in ("a red circle", "一个蓝色的星形"):
    (best,) = database.query_points("images", query=embed_query(query), limit=1).points
    print(f"{query}: {best.payload['file']}")
