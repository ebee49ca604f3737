"""The systemd units: the values that the user gave, and what systemd itself says of them."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import uvicorn
from conftest import ROOT

UNIT = ROOT / "deploy" / "gme_service.service"
TEMPLATE = ROOT / "deploy" / "gme_service@.service"
UVICORN = "/opt/conda/envs/gme-service/bin/uvicorn"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")

Settings = dict[str, list[str]]


def parse(path: Path) -> dict[str, Settings]:
    """The settings of each section; one that stands more than once has more than one value."""
    sections: dict[str, Settings] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = sections[line.strip("[]")] = defaultdict(list)
        elif line and not line.startswith("#"):
            name, value = line.split("=", 1)
            section[name].append(value)
    return sections


def environment(service: Settings) -> dict[str, str]:
    return dict(value.split("=", 1) for value in service["Environment"])


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("Unit", "After", "network.target"),
        ("Service", "Type", "simple"),
        ("Service", "User", "gme"),
        ("Service", "Group", "gme"),
        ("Service", "WorkingDirectory", "/opt/gme_service"),
        ("Service", "ExecStart", f"{UVICORN} gme_service:app --host 0.0.0.0 --port 8000"),
        ("Service", "Restart", "always"),
        ("Service", "RestartSec", "5"),
        ("Install", "WantedBy", "multi-user.target"),
    ],
)
def test_the_unit_has_the_values_that_the_user_gave(section: str, name: str, value: str) -> None:
    assert parse(UNIT)[section][name] == [value]


def test_the_environment_is_the_one_that_the_user_gave() -> None:
    variables = environment(parse(UNIT)["Service"])

    assert variables["PATH"] == "/opt/conda/envs/gme-service/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"


def test_a_stop_ends_before_systemd_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn reads the variable, and 60 s leave room in the 90 s after which systemd kills."""
    for name, value in environment(parse(UNIT)["Service"]).items():
        monkeypatch.setenv(name, value)

    options = uvicorn.main.make_context("uvicorn", ["gme_service:app"]).params

    assert options["timeout_graceful_shutdown"] == 60


def test_only_the_model_directory_is_writable_and_the_devices_of_cuda_are_there() -> None:
    service = parse(UNIT)["Service"]

    assert service["NoNewPrivileges"] == service["PrivateTmp"] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["ProtectHome"] == ["read-only"]
    assert service["ReadWritePaths"] == ["-/home/gme/gme_models -/var/lib/gme/gme_models"]
    assert not {"PrivateDevices", "DeviceAllow", "ProtectClock", "ProcSubset", "MemoryDenyWriteExecute"} & set(service)


def test_the_template_is_the_unit_with_a_gpu_and_a_port_for_each_instance() -> None:
    lines, others = UNIT.read_text().splitlines(), TEMPLATE.read_text().splitlines()

    assert [line for line in lines if line not in others] == [
        "Description=GME Service: multimodal embeddings over HTTP",
        "ExecStartPre=-+/bin/sh -c 'test ! -x /usr/bin/nvidia-modprobe || exec /usr/bin/nvidia-modprobe -c 0 -u'",
        f"ExecStart={UVICORN} gme_service:app --host 0.0.0.0 --port 8000",
    ]
    assert [line for line in others if line not in lines and not line.startswith("#")] == [
        "Description=GME Service on GPU %i: multimodal embeddings over HTTP",
        "Environment=CUDA_DEVICE_ORDER=PCI_BUS_ID",
        "Environment=CUDA_VISIBLE_DEVICES=%i",
        "ExecStartPre=-+/bin/sh -c 'test ! -x /usr/bin/nvidia-modprobe || exec /usr/bin/nvidia-modprobe -c %i -u'",
        f"ExecStart={UVICORN} gme_service:app --host 0.0.0.0 --port 800%i",
    ]


@needs_systemd
@pytest.mark.parametrize("unit", [UNIT, TEMPLATE], ids=["unit", "template"])
def test_systemd_finds_nothing_wrong_but_the_missing_interpreter(unit: Path) -> None:
    found = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)

    complaints = (found.stdout + found.stderr).splitlines()
    assert [line for line in complaints if f"{UVICORN} is not executable" not in line] == []


@needs_systemd
@pytest.mark.parametrize("unit", [UNIT, TEMPLATE], ids=["unit", "template"])
def test_systemd_rates_the_exposure_at_four_of_ten_at_most(unit: Path) -> None:
    rated = subprocess.run(["systemd-analyze", "security", "--offline=yes", unit], capture_output=True, text=True)

    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", rated.stdout)
    assert exposure is not None, rated.stderr
    assert float(exposure[1]) <= 4
