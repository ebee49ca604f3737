"""deploy/Dockerfile and deploy/kubernetes.yaml say what the systemd unit says, and Kubernetes would take the latter."""

import re
import shlex
import tomllib
from typing import Any

import pytest
from conftest import ROOT

from gme_service import Settings, app

kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
UNIT = (ROOT / "deploy" / "gme_service.service").read_text()
OBJECTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))


def pod() -> dict[str, Any]:
    (deployment,) = (one for one in OBJECTS if one["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]


@pytest.mark.parametrize("described", OBJECTS, ids=lambda one: one["kind"])
def test_kubernetes_takes_it(described: dict[str, Any]) -> None:
    kubernetes_validate.validate(described, "1.37", strict=True)


def test_the_container_runs_what_the_unit_runs() -> None:
    (command,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    (unit_command,) = re.findall(r"^ExecStart=\S*/(.*)$", UNIT, re.MULTILINE)
    assert tomllib.loads(f"command = {command}")["command"] == shlex.split(unit_command)
    assert set(re.findall(r"(?:UVICORN|TOKENIZERS)_\w+=\S+", DOCKERFILE)) == set(
        re.findall(r"(?:UVICORN|TOKENIZERS)_\w+=\S+", UNIT)
    )


def test_a_stop_is_given_the_time_that_it_may_take() -> None:
    (seconds,) = re.findall(r"UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN=(\d+)", DOCKERFILE)
    assert pod()["terminationGracePeriodSeconds"] > int(seconds)


def test_user_volume_variables_and_routes_are_those_of_the_image_and_the_service() -> None:
    (user,) = re.findall(r"--uid (\d+)", DOCKERFILE)
    (container,) = pod()["containers"]
    assert pod()["securityContext"]["runAsUser"] == int(user)
    (volume,) = re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [volume]
    assert not pod()["enableServiceLinks"]
    settings = {name.removeprefix("GME_").lower() for name in re.findall(r"\bGME_\w+", DOCKERFILE)}
    assert settings <= set(Settings.model_fields)
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert set(probes) <= {getattr(route, "path", None) for route in app.routes}
