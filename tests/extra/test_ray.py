"""deploy/ray_serve.py on a real local Ray: the HTTP tests by address, scaling, replicas that end."""

import collections
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, STRICT, Address, free_port, golden

ray = pytest.importorskip("ray", reason="deploy/requirements.txt is not installed")
yaml = pytest.importorskip("yaml")

from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from deploy import ray_serve  # noqa: E402

pytestmark = pytest.mark.timeout(600)
PATIENCE = 120  # seconds after which a test that hangs fails
CORES = 2 * ray_serve.CORES  # that Ray thinks a node has: room for two replicas
CASES = [case for case in golden() if case.image is None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A node with Serve's proxy. Its processes know nothing of the settings in this one's environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.delenv(name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        running = Cluster(True, head_node_args={"num_cpus": CORES, "include_dashboard": False})
    ray.init(running.address, log_to_driver=False)
    yield running
    serve.shutdown()
    ray.shutdown()
    running.shutdown()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Address:
    """Where Serve listens. The proxies of nodes that share a machine share the port."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "EveryNode"})
    return Address(f"http://127.0.0.1:{port}")


@pytest.fixture(autouse=True)
def nothing_is_left(service: Address) -> Iterator[None]:
    yield
    for name in serve.status().applications:
        serve.delete(name)


@pytest.fixture
def deploy(service: Address) -> Callable[..., None]:
    """Replace what runs by a variant of the deployment."""

    def deploy(**options: Any) -> None:
        serve.run(ray_serve.GME.options(**{"ray_actor_options": ray_serve.actor_options()} | options).bind())

    return deploy


def serve_run(cluster: Cluster, target: str, **environment: str) -> None:
    """The command of the README, which comes back when the app runs."""
    serve_command = str(Path(sys.executable).with_name("serve"))
    command = [serve_command, "run", "--address", cluster.address, "--non-blocking", target]
    options = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr


def replicas(cluster: Cluster) -> dict[int, int]:
    """The process id of each node's Ray daemon by those of the replicas on the node."""
    daemons = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            parent = int(re.search(r"^PPid:\s*(\d+)", status.read_text(), re.MULTILINE)[1])
            if parent in daemons and (status.parent / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                found[int(status.parent.name)] = parent
    return found


def answering(service: Address) -> set[str]:
    """The replicas that answer one of twenty requests, each by the time of its start."""
    found = set()
    for _ in range(20):
        with contextlib.suppress(httpx.TransportError):
            metrics = httpx.get(f"{service.url}/metrics", timeout=5).text
            found |= set(re.findall(r"^process_start_time_seconds (.*)$", metrics, re.MULTILINE))
    return found


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Nothing says when; poll."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE, f"It never came to this: {what}"
        time.sleep(0.1)


class Load:
    """Clients that send one text after the other within the block, and compare each vector with the authors'."""

    def __init__(self, service: Address, clients: int) -> None:
        self.url, self.outcomes, self.ended = service.url, collections.Counter[str](), threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def client(self, number: int) -> None:
        cases = itertools.islice(itertools.cycle(CASES), number, None)
        with httpx.Client(base_url=self.url, timeout=PATIENCE) as http:
            while not self.ended.is_set():
                case, outcome = next(cases), "no answer"
                with contextlib.suppress(httpx.TransportError):
                    answer = http.post("/embed/text", json={"texts": [case.text], "prompt": case.prompt})
                    outcome = str(answer.status_code)
                    if outcome == "200" and np.allclose(answer.json()["embeddings"], [case.vector], atol=1e-5):
                        outcome = "the vector"
                self.outcomes[outcome] += 1

    def await_more(self, number: int) -> None:
        """Wait until so many more requests have an answer."""
        enough = self.outcomes.total() + number
        wait_until(lambda: self.outcomes.total() >= enough, f"{number} more answers")


@pytest.mark.parametrize(("option", "more", "least"), [("--url", {}, 40), ("--strict-url", STRICT, 10)])
def test_the_http_tests_pass_through_serve_run(
    cluster: Cluster, service: Address, option: str, more: dict[str, str], least: int
) -> None:
    serve_run(cluster, "deploy.ray_serve:app", **ENVIRONMENT, **more)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_http.py", option]
    done = subprocess.run([*command, service.url], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least


def test_a_setting_that_cannot_be_used_is_a_sentence_and_no_hanging_replica(deploy: Callable[..., None]) -> None:
    options = ray_serve.actor_options()
    options["runtime_env"]["env_vars"]["GME_MAX_LENGTH"] = "long"
    with pytest.raises(RuntimeError):
        deploy(ray_actor_options=options)
    (application,) = serve.status().applications.values()
    assert "GME_MAX_LENGTH" in str(application.deployments["GME"].message)


def test_a_hub_that_is_down_is_a_sentence_too(tmp_path: Path) -> None:
    hub = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
    options = {"env": os.environ | hub | {"GME_MODEL_DIR": str(tmp_path)}, "capture_output": True, "text": True}
    command = [sys.executable, "-c", "from deploy import ray_serve; ray_serve.build()"]
    done = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, **options)
    assert "RuntimeError: In " in done.stderr
    assert "downloading failed" in done.stderr


def test_the_config_file_scales_to_two_under_load_and_back_and_no_request_fails(
    cluster: Cluster, service: Address, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"] |= {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "GME_CACHE_MB": "0"}
    quick = {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 1}
    application["deployments"][0]["autoscaling_config"] |= quick | {"metrics_interval_s": 1, "look_back_period_s": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    serve_run(cluster, str(tmp_path / "config.yaml"))
    wait_until(lambda: serve.status().applications["gme"].status == "RUNNING", "the app runs")
    with Load(service, clients=1) as light:
        with Load(service, clients=8) as heavy:
            wait_until(lambda: len(answering(service)) == 2, "two replicas answer")
            heavy.await_more(50)
        wait_until(lambda: len(replicas(cluster)) == 1, "one replica is left")
        light.await_more(10)
    assert set(light.outcomes | heavy.outcomes) == {"the vector"}


def test_a_replica_that_is_killed_costs_retryable_errors_and_is_replaced(
    cluster: Cluster, service: Address, deploy: Callable[..., None]
) -> None:
    deploy(autoscaling_config=None, num_replicas=2)
    with Load(service, clients=8) as load:
        wait_until(lambda: len(answering(service)) == 2, "both replicas answer")
        before = answering(service)
        os.kill(next(iter(replicas(cluster))), signal.SIGKILL)
        wait_until(lambda: len(answering(service) - before) == 1 and len(replicas(cluster)) == 2, "both answer again")
        load.await_more(50)
    assert load.outcomes["the vector"] > 50
    assert {what for what in load.outcomes if not what.startswith("5")} <= {"the vector", "no answer"}
