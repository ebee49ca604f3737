"""The app of gme_service on Ray Serve, for more GPUs than one process can use: `serve run deploy.ray_serve:app`.

Each replica is a process of its own that builds the app, and so loads the model, inside itself. Nothing else may
import gme_service. The settings are the environment variables of the process that runs this file, or those under
`env_vars` in deploy/ray_serve.yaml. gme_service lies at the same place on every node, where this file's parent is.
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig

ROOT = Path(__file__).resolve().parent.parent
CORES = min(4, os.cpu_count() or 1)  # of a replica: they run the model, or decode the images for a GPU that does


def build() -> FastAPI:
    """Load the model into the replica that calls it. Raises `RuntimeError` with a sentence when it cannot."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("uvicorn.error").parent = logging.getLogger("ray.serve")  # the service's log is the replica's
    try:
        from gme_service import app
    except SystemExit as stop:  # it would end the thread of the replica's event loop, and leave the replica hanging
        raise RuntimeError(str(stop.__context__ or stop)) from None
    return app


@serve.deployment(
    # Enough that a GPU has its next batches waiting, of single images too: one batch takes about 60 of them.
    max_ongoing_requests=256,
    # More wait in the proxy, whose memory they fill. Past this, 503 with Retry-After, as from the service itself.
    max_queued_requests=1024,
    backpressure_config=BackpressureConfig(retry_after_s=1),
    # A replica with 32 requests at a time is busy without a pause; with more of them for 30 s, another one is started.
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 32},
    health_check_period_s=2,
    graceful_shutdown_timeout_s=300,  # a replica that goes answers the requests that it has
)
@serve.ingress(build)
class GME:
    """A replica. Serve replaces it when its process ends, or when its device is lost."""

    async def check_health(self) -> None:
        """Runs on the event loop of the app: when that has ended with the device, Serve gets no answer."""


def has_gpus() -> bool:
    """Whether the replicas run on GPUs: those of the cluster, or with `serve run` of the machine where it is called."""
    device = os.environ.get("GME_DEVICE") or "auto"
    if device != "auto":
        return device.startswith("cuda")
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    import torch

    return torch.cuda.is_available()


def actor_options() -> dict[str, Any]:
    """What a replica gets: one GPU where there are any, cores, and the settings in this process's environment."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(("GME_", "MODELSCOPE_"))}
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {
        "num_gpus": int(has_gpus()),
        "num_cpus": CORES,
        "runtime_env": {"env_vars": settings | {"PYTHONPATH": path}},
    }


def app(_: dict[str, str]) -> serve.Application:
    """What `serve run` and `serve deploy` start."""
    return GME.options(ray_actor_options=actor_options()).bind()  # type: ignore[attr-defined]
