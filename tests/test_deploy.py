"""The unit says what the user asked for, systemd takes it and its drop-ins, and nginx passes requests with our file."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import ROOT, Address, Patch, free_port

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "gme_service.service"
DROP_INS = re.findall(r"^```ini\n(.*?)^```", (DEPLOY / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_unit_has_what_the_user_asked_for() -> None:
    assert set(UNIT.read_text().splitlines()) >= {
        "User=gme",
        "WorkingDirectory=/opt/gme_service",
        "Environment=PATH=/opt/conda/envs/gme-service/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        "Environment=TOKENIZERS_PARALLELISM=false",
        "ExecStart=/opt/conda/envs/gme-service/bin/uvicorn gme_service:app --host 0.0.0.0 --port 8000",
        "Restart=always",
        "RestartSec=5",
        "WantedBy=multi-user.target",
    }


def test_uvicorn_reads_the_options_in_the_environment_of_the_unit(monkeypatch: Patch) -> None:
    for name, value in re.findall(r"(UVICORN_\w+)=(\S+)", UNIT.read_text()):
        monkeypatch.setenv(name, value)
    options = uvicorn.main.make_context("uvicorn", ["gme_service:app"]).params
    assert (options["http"], options["timeout_graceful_shutdown"], options["timeout_keep_alive"]) == ("h11", 60, 75)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("drop_in", ["", *DROP_INS, "template"], ids=range(len(DROP_INS) + 2))
def test_systemd_finds_nothing_wrong_but_the_missing_interpreter(drop_in: str, tmp_path: Path) -> None:
    if drop_in == "template":
        unit = "gme_service@3.service"
        shutil.copy(UNIT, tmp_path / "gme_service@.service")
        shutil.copytree(DEPLOY / "gme_service@.service.d", tmp_path / "gme_service@.service.d")
    else:
        unit = shutil.copy(UNIT, tmp_path / UNIT.name).name
        (tmp_path / f"{unit}.d").mkdir()
        (tmp_path / f"{unit}.d" / "settings.conf").write_text(drop_in)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
    )
    complaints = (found.stdout + found.stderr).splitlines()
    assert [line for line in complaints if not re.search(r"/bin/uvicorn is not executable", line)] == []


@pytest.fixture(scope="module")
def nginx(server: Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an nginx with our file, in front of the server."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    address, home = f"127.0.0.1:{free_port()}", tmp_path_factory.mktemp("nginx")
    site = (DEPLOY / "nginx.conf").read_text().replace("listen 8080", f"listen {address}")
    (home / "site.conf").write_text(site.replace("127.0.0.1:8000", httpx.URL(server.url).netloc.decode()))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {home}/{kind};" for kind in kinds)
    http = f"http {{ access_log off; {places} include {home}/site.conf; }}"
    (home / "nginx.conf").write_text(f"daemon off; master_process off; pid {home}/pid; events {{}} {http}")
    command = ["nginx", "-c", str(home / "nginx.conf"), "-e", str(home / "error.log")]
    checked = subprocess.run([*command, "-tq"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command) as process:
        with httpx.Client(base_url=f"http://{address}", transport=httpx.HTTPTransport(retries=5)) as client:
            yield client
        process.terminate()


def test_nginx_passes_requests_and_refuses_large_ones_as_the_service_does(nginx: httpx.Client, server: Address) -> None:
    request = {"url": "/v1/embeddings", "json": {"input": ["a red circle"]}}
    with server.client() as direct:
        assert nginx.post(**request).json() == direct.post(**request).json()
    large = bytes(33 << 20)
    assert "error" in nginx.post("/v1/embeddings", content=large).json()
    refused = nginx.post("/embed/text", content=large)
    assert refused.status_code == 413
    assert "too large" in refused.json()["detail"]


def test_nginx_keeps_the_port_and_slashes_need_no_redirect(nginx: httpx.Client) -> None:
    for path in ("/v1/embeddings/", "/v1//embeddings"):
        assert nginx.post(path, json={"input": ["a red circle"]}).status_code == 200
    assert "proxy_set_header Host $http_host;" in (DEPLOY / "nginx.conf").read_text()
    assert nginx.head("/health").status_code == 200


def test_nginx_answers_questions_about_metrics_from_its_own_machine_only(nginx: httpx.Client) -> None:
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2", retries=5)
    with httpx.Client(base_url=nginx.base_url, transport=elsewhere) as stranger:
        for path in ("/metrics", "/metrics/", "/metrics//", "/v1/../metrics", "/%2Fmetrics"):
            assert stranger.get(path).status_code == 403, path
            assert nginx.get(path).status_code == 200, path
        assert stranger.get("/metrics").json().keys() == {"detail", "error"}
        assert stranger.get("/health").status_code == 200
