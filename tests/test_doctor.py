"""What the doctor says of a machine: what works, what does not, and never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilebook
from tilebook import call
from tilebook import device as devices
from tilebook.report import doctor
from tilebook.report.doctor import Finding, findings, judged, table

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    given = {name: value for name, value in os.environ.items() if not name.startswith(("TILEBOOK", "TORCH_DEVICE"))}
    command = [sys.executable, "-m", "tilebook", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={**given, **environment}, check=False
    )


def told(*arguments, **environment):
    done = run("--format", "json", *arguments, **environment)
    assert "Traceback" not in done.stderr
    found = {each["about"]: each for each in json.loads(done.stdout)}
    assert done.returncode == int(any(each["level"] == "fault" for each in found.values()))
    return found


@pytest.mark.usefixtures("forked")
def test_a_machine_in_order_has_no_faults(tmp_path):
    found = told(XDG_DATA_HOME=str(tmp_path))
    assert {each["level"] for each in found.values()} <= {"ok", "note"}
    assert "verdicts serve" in found["registry, shipped"]["text"]
    assert found["TILEBOOK"]["text"].startswith("off")


@pytest.fixture
def turned(monkeypatch):
    """What is said of the mode in an environment."""

    def said(**environment):
        for name in ("TILEBOOK", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (found,) = doctor._turned_on()
        return found

    return said


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"TILEBOOK": "please"}, "none of 1, true, yes, on, patch"),
        ({"TILEBOOK": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
    ],
)
def test_it_says_why_tilebook_is_not_on(turned, environment, text):
    found = turned(**environment)
    assert found.level == "fault"
    assert text in found.text


@pytest.mark.parametrize("asked", ["0", "off", "no", "False"])
def test_to_ask_that_it_be_off_is_no_fault(turned, asked):
    found = turned(TILEBOOK=asked)
    assert (found.level, found.text[:3]) == ("ok", "off")


def test_it_says_that_tilebook_is_on_or_disabled(turned, monkeypatch):
    with tilebook.enabled():
        found = turned(TILEBOOK="1")
    assert found.level == "ok"
    assert "scaled_dot_product_attention, layer_norm, rms_norm, cross_entropy" in found.text
    monkeypatch.setattr(call, "_DISABLED", True)
    assert turned().about == "TILEBOOK_DISABLE"


def test_pytorch_that_was_not_told_of_tilebook_is_a_fault(turned, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [])
    found = turned(TILEBOOK="1")
    assert (found.level, found.advice) == ("fault", "install it with pip")


@pytest.mark.usefixtures("forked")
def test_a_registry_that_cannot_be_read_is_a_fault_in_one_line(tmp_path):
    (tmp_path / "letter.db").write_text("Dear registry\n")
    found = told("--registry", str(tmp_path / "letter.db"), XDG_DATA_HOME=str(tmp_path))
    assert found["registry"]["level"] == "fault"
    assert "letter.db" in found["registry"]["text"]
    assert "registry, shipped" in found


def test_what_breaks_while_it_looks_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    found = {each.about: each for each in findings(run=False)}
    assert found["Triton"].level == "fault"
    assert found["PyTorch"].level == "ok"


def test_a_gpu_that_nothing_was_measured_on_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "present", lambda: True)
    monkeypatch.setattr(devices, "current", lambda index=0: devices.find("L4"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = {each.about: each for each in findings(run=False)}
    assert "sm_89" in found["GPU"].text
    assert "no verdict for" in found["registry"].text
    assert "tilebook tune" in found["registry"].advice


def test_a_cudnn_other_than_the_installed_one_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "9.19.0.56")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/old")
    (found,) = doctor._cudnn()
    assert (found.level, "LD_LIBRARY_PATH" in found.text) == ("note", True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert [each.level for each in doctor._cudnn()] == ["ok"]


def test_known_answers_are_judged():
    right, wrong, broken = judged("attention 0.004\nmlp 0.4\n", 1, "Traceback …\nRuntimeError: no kernel image\n")
    assert (right.level, wrong.level, broken.level) == ("ok", "fault", "fault")
    assert "0.4" in wrong.text or "4.0e-01" in wrong.text
    assert "no kernel image" in broken.text


def test_what_is_wrong_comes_first():
    lines = table([Finding("ok", "a", "x"), Finding("note", "b", "y", "do"), Finding("fault", "c", "z")]).splitlines()
    assert [line.split()[0] for line in lines] == ["fault", "note", "→", "ok"]
