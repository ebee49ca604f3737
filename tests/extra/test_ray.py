"""deploy/ray_serve.py on a real local Ray: HTTP tests by address, replicas and a node that are killed, scaling."""

import collections
import contextlib
import fcntl
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, Address, golden
from test_failure import FAULTY
from test_http import STRICT

ray = pytest.importorskip("ray", reason="deploy/requirements.txt is not installed")
yaml = pytest.importorskip("yaml")

from ray import cloudpickle, serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from deploy import ray_serve  # noqa: E402

pytestmark = pytest.mark.timeout(600)
PATIENCE = 120  # seconds after which a test that hangs fails
EXAMPLES = ("tests/test_readme.py::test_shell_example", "tests/test_readme.py::test_python_example")
CORES = 2 * ray_serve.CORES  # that Ray thinks a node has: room for two replicas
CASES = [case for case in golden() if case.image is None]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the replicas cannot import this file


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
    command = [str(Path(sys.executable).with_name("serve")), "run", "--address", cluster.address, "--non-blocking"]
    done = subprocess.run(
        [*command, target], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE
    )
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


def answering(service: Address, what: str = "") -> set[str]:
    """The replicas that answer one of twenty requests with metrics that match, each by the time of its start."""
    found = set()
    for _ in range(20):
        with contextlib.suppress(httpx.TransportError):
            metrics = httpx.get(f"{service.url}/metrics", timeout=5).text
            if re.search(what, metrics, re.MULTILINE):
                found |= set(re.findall(r"^process_start_time_seconds (.*)$", metrics, re.MULTILINE))
    return found


def wait_until(condition: Callable[[], object], what: str) -> float:
    """Nothing says when; poll. Returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE, f"It never came to this: {what}"
        time.sleep(0.1)
    return time.monotonic() - started


def pass_tests(*arguments: str) -> str:
    """Run tests of the suite against an address; returns pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    print(done.stdout.splitlines()[-1])
    return done.stdout.splitlines()[-1]


@dataclass
class Outcome:
    """What a client got at what time: a vector, or a status or an exception's name."""

    when: float
    what: str


class Load:
    """Clients that send one text after the other within the block, and compare each vector with the authors'."""

    def __init__(self, service: Address, clients: int) -> None:
        self.url, self.outcomes = service.url, list[Outcome]()
        self.ended = threading.Event()
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
        with httpx.Client(base_url=self.url, timeout=PATIENCE) as http:
            for case in itertools.islice(itertools.cycle(CASES), number, None):
                if self.ended.is_set():
                    return
                try:
                    answer = http.post("/embed/text", json={"texts": [case.text], "prompt": case.prompt})
                except httpx.TransportError as error:
                    what = type(error).__name__
                    self.ended.wait(0.05)
                else:
                    what = str(answer.status_code)
                    if what == "200":
                        right = np.allclose(answer.json()["embeddings"], [case.vector], atol=1e-5)
                        what = "the vector" if right else "a wrong vector"
                self.outcomes.append(Outcome(time.monotonic(), what))

    def count(self, since: float = 0) -> collections.Counter[str]:
        return collections.Counter(outcome.what for outcome in self.outcomes if outcome.when >= since)

    def await_more(self, number: int) -> None:
        """Wait until so many more requests have an answer."""
        enough = len(self.outcomes) + number
        wait_until(lambda: len(self.outcomes) >= enough, f"{number} more answers")


def assert_retryable(outcomes: collections.Counter[str]) -> None:
    """Whatever is no vector is an answer after which clients try again: a 5xx, or none."""
    print(dict(outcomes))
    for what in outcomes:
        # 404 is what a node that has just joined answers, until it knows the app
        assert (
            what in ("the vector", "404")
            or what.startswith("5")
            or issubclass(getattr(httpx, what), httpx.TransportError)
        )


# -------------------------------------------------------------------------------------------------- the same service


def test_the_http_tests_pass_through_serve_run(cluster: Cluster, service: Address) -> None:
    serve_run(cluster, "deploy.ray_serve:app", **ENVIRONMENT)

    summary = pass_tests("tests/test_http.py", "tests/test_retrieval.py", *EXAMPLES, "--url", service.url)

    assert int(re.search(r"(\d+) passed", summary)[1]) > 80


def test_the_http_tests_of_key_and_limits_pass_with_these_settings(cluster: Cluster, service: Address) -> None:
    serve_run(cluster, "deploy.ray_serve:app", **ENVIRONMENT, **STRICT)

    summary = pass_tests("tests/test_http.py", "--strict-url", service.url)

    assert int(re.search(r"(\d+) passed", summary)[1]) > 60


def test_a_setting_that_cannot_be_used_is_a_sentence_and_no_hanging_replica(deploy: Callable[..., None]) -> None:
    options = ray_serve.actor_options()
    options["runtime_env"]["env_vars"]["GME_MAX_LENGTH"] = "long"

    with pytest.raises(RuntimeError):
        deploy(ray_actor_options=options)

    (application,) = serve.status().applications.values()
    assert "GME_MAX_LENGTH='long' cannot be used" in str(application.deployments["GME"].message)


# ------------------------------------------------------------------------------------------------------------ scaling


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
            up = wait_until(lambda: len(answering(service)) == 2, "two replicas answer")
            heavy.await_more(50)
        down = wait_until(lambda: len(replicas(cluster)) == 1, "one replica is left")
        light.await_more(10)

    print(f"up after {up:.1f} s, down after {down:.1f} s")
    assert set(light.count() | heavy.count()) == {"the vector"}


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def two_nodes(cluster: Cluster, deploy: Callable[..., None]) -> Iterator[Any]:
    """A second node beside the first, and a replica on each of them; the second node, which a test may kill."""
    second = cluster.add_node(num_cpus=CORES)
    deploy(autoscaling_config=None, num_replicas=2, max_replicas_per_node=1)
    yield second
    with contextlib.suppress(Exception):
        cluster.remove_node(second)


def test_a_replica_and_then_a_node_killed_under_load_cost_retryable_errors_and_come_back(
    cluster: Cluster, service: Address, two_nodes: Any
) -> None:
    with Load(service, clients=16) as load:  # enough that each of the two proxies has some, and so its replica
        wait_until(lambda: len(answering(service, r"^gme_inputs_total.* [1-9]")) == 2, "both replicas have load")
        before, killed = answering(service), time.monotonic()
        os.kill(next(iter(replicas(cluster))), signal.SIGKILL)
        back = wait_until(lambda: len(answering(service) - before) == 1 and len(replicas(cluster)) == 2, "both answer")
        load.await_more(50)
        print(f"replica killed: both serve again after {back:.1f} s")
        assert_retryable(load.count(since=killed))

        before, killed = answering(service), time.monotonic()
        cluster.remove_node(two_nodes, allow_graceful=False)
        load.await_more(50)
        third = cluster.add_node(num_cpus=CORES)
        back = wait_until(lambda: len(answering(service) - before) == 1, "a replica on the new node answers")
        settled = time.monotonic()
        load.await_more(50)
    print(f"node killed: both serve again after {back:.1f} s from when another node is there")
    assert_retryable(load.count(since=killed))
    assert set(load.count(since=settled)) == {"the vector"}
    cluster.remove_node(third)


class Faulty(ray_serve.GME.func_or_class):
    """A replica whose model obeys test_failure's file CONTROL."""

    async def __init__(self) -> None:
        await super().__init__()
        import faulty  # noqa: F401


@dataclass
class Control:
    """The file with the order that the models of all replicas obey."""

    file: Path

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the models wait, if they have anything to do."""
        with self.file.open() as control:
            fcntl.flock(control, fcntl.LOCK_EX)
            yield


@pytest.fixture
def control(tmp_path: Path) -> Control:
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "control").write_text("none")
    return Control(tmp_path / "control")


@pytest.fixture
def faulty(control: Control) -> dict[str, Any]:
    """The options of a deployment of `Faulty` replicas."""
    options = ray_serve.actor_options()
    options["runtime_env"]["env_vars"] |= {
        "PYTHONPATH": f"{control.file.parent}:{ROOT}",
        "CONTROL": str(control.file),
        "GME_CACHE_MB": "0",
    }
    return {"func_or_class": Faulty, "ray_actor_options": options, "autoscaling_config": None}


def test_a_replica_that_is_stopped_finishes_what_it_has_and_a_dead_model_thread_is_replaced(
    cluster: Cluster, service: Address, deploy: Callable[..., None], faulty: dict[str, Any], control: Control
) -> None:
    deploy(**faulty, num_replicas=2)

    def post(text: str) -> httpx.Response:
        return httpx.post(f"{service.url}/embed/text", json={"texts": [text]}, timeout=PATIENCE)

    with ThreadPoolExecutor(100) as clients:
        with control.held():
            waiting = list[Future[httpx.Response]]()

            def both_have_something_to_do() -> bool:
                # Serve gives a request to the replica with the least to do: sooner or later to the one with nothing
                waiting.append(clients.submit(post, f"text {len(waiting)}"))
                return len(answering(service, r"^gme_queue_inputs [1-9]")) == 2

            wait_until(both_have_something_to_do, "both replicas have something to do")
            deployed = clients.submit(deploy, **faulty, num_replicas=1)
            wait_until(lambda: "STOPPING" in states(), "a replica is about to end")
            assert len(replicas(cluster)) == 2
        assert {future.result(PATIENCE).status_code for future in waiting} == {200}
        deployed.result(PATIENCE)
        wait_until(lambda: len(replicas(cluster)) == 1, "one replica is left")

        (dying,) = replicas(cluster)
        vector = post("text").json()
        control.file.write_text("AcceleratorError")
        answer = post("text")
        control.file.write_text("none")
        assert answer.status_code >= 500
        print(f"the model thread ended: {answer.status_code} {answer.text}")
        seconds = wait_until(lambda: set(replicas(cluster)) - {dying} and answering(service), "it is replaced")
        print(f"replaced after {seconds:.1f} s")
        assert post("text").json() == vector


def states() -> dict[str, int]:
    """How many replicas are in which state."""
    return serve.status().applications["default"].deployments["GME"].replica_states
