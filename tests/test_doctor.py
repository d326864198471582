"""The doctor: what it says about a healthy installation, and about broken parts that must not take it down."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pointcept_kd import doctor, probes

ROOT = Path(__file__).resolve().parents[1]


def diagnose(*words, path=(), cwd=None, **environment):
    """Run the doctor in a process of its own: exit code, stdout, and that stderr is empty."""
    search = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run(
        [sys.executable, "-m", "pointcept_kd", "doctor", *words],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search, **environment},
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout


def findings(text):
    """By (section, name), from the JSON form."""
    return {(f["section"], f["name"]): f for f in json.loads(text)["findings"]}


def broken_package(folder, name, source, version="1.0"):
    """An installed package whose import runs `source`."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_a_healthy_installation_beside_broken_packages(tmp_path):
    site = tmp_path / "site"
    broken_package(site, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")  # fmt: skip
    broken_package(site, "timm", "raise SystemExit('no')")
    broken_package(site, "tensorboard", "import os; os._exit(11)")
    broken_package(site, "spconv", "raise ImportError('libcudart.so: cannot\\nopen')")
    broken_package(site, "transformers", "print('@@pointcept_kd is great'.replace('@@', '# '))")
    code, out = diagnose("--json", path=[site], cwd=tmp_path)
    assert code == 0, out
    assert json.loads(out)["works"] is True
    found = findings(out)
    others = ("Python", "pointcept_kd", "host", "attention", "products", "test on cpu")
    for name in (*doctor.REQUIRED, *others):
        assert found["core", name]["state"] == "ok", found["core", name]
    step = found["core", "test on cpu"]["text"]
    assert float(re.search(r"in ([\d.]+) s, loss", step)[1]) > 0
    # An untrained network over 19 classes: cross entropy near log 19 = 2.9, and Lovasz at most 1 above it.
    assert 2.5 < float(re.search(r"loss ([\d.]+)", step)[1]) < 6
    said = {name: found["optional", name] for name in ("torchvision", "timm", "tensorboard", "spconv")}  # fmt: skip
    assert {entry["state"] for entry in said.values()} == {"note"}
    assert "RuntimeError: operator torchvision::nms does not exist" in said["torchvision"]["text"]
    assert "SystemExit: no" in said["timm"]["text"]
    assert "the process died with code 11" in said["tensorboard"]["text"]
    assert "ImportError: libcudart.so: cannot open" in said["spconv"]["text"]
    assert found["optional", "transformers"]["state"] == "ok", "it only talks"
    assert all("\n" not in f["text"] + f["todo"] for f in found.values())


def test_a_broken_core(tmp_path):
    broken_package(tmp_path, "scipy", "raise ImportError('scipy was built for another numpy')", "0.9")  # fmt: skip
    code, out = diagnose(path=[tmp_path], cwd=tmp_path)
    assert code == 1
    problems = [line for line in out.splitlines() if "PROBLEM" in line]
    assert re.search(r"scipy +0.9 is older than 1.11; pip install 'scipy>=1.11'", problems[0])
    assert re.search(r"pointcept_kd +ImportError: scipy was built for another numpy; repair", problems[1])  # fmt: skip
    assert out.splitlines()[-1] == f"{len(problems)} problems, marked above."


def test_a_core_that_dies(tmp_path):
    broken_package(tmp_path, "torch", "import os; os._exit(9)", "2.9")
    code, out = diagnose("--json", path=[tmp_path], cwd=tmp_path)
    assert code == 1
    found = findings(out)
    assert found["core", "torch"]["text"] == "the process died with code 9"
    assert "install torch again" in found["core", "torch"]["todo"]


def test_the_requirements_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={least}" for name, least in doctor.REQUIRED.items()} == {*project["dependencies"]}  # fmt: skip
    assert project["requires-python"] == f">={doctor.PYTHON}"
    for package, extra, _ in doctor.OPTIONAL.values():
        listed = project["optional-dependencies"][extra]
        assert any(re.match(rf"{package}\b", entry) for entry in listed), (package, extra)


@pytest.mark.parametrize(
    ("version", "least", "expected"),
    [
        ("2.4", "2.4", False), ("2.4.0+cpu", "2.4", False), ("2.13.0", "2.4", False), ("2.3.1", "2.4", True),
        ("10.0", "9.9", False), ("2.4.0rc1", "2.4", False), ("0.2.29", "0.2.30", True), ("2", "2.4", True),
    ],
)  # fmt: skip
def test_versions(version, least, expected):
    assert doctor.older(version, least) is expected


def test_a_probe_that_hangs(tmp_path, monkeypatch):
    broken_package(tmp_path, "slow", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "SECONDS", 1.5)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    wrong = doctor.try_imports(["slow", "json", "nothing_of_this_name"])
    assert wrong == {"slow": "did not end within 2 s"}


def test_what_a_probe_says(capsys):
    probes.attempt("good", lambda: {"value": 3})
    probes.attempt("bad", lambda: {"value": 1 / 0})
    lines = capsys.readouterr().out.splitlines()
    good, bad = (json.loads(line.removeprefix(probes.MARK)) for line in lines)
    assert good.pop("seconds") >= 0
    assert good == {"key": "good", "value": 3}
    assert bad == {"key": "bad", "error": "ZeroDivisionError: division by zero"}


def machine(monkeypatch, **torch):
    report = doctor.Report()
    doctor._about_machine(report, torch)
    return {entry["name"]: entry for entry in report.entries}


def test_a_small_machine(monkeypatch):
    usage = type("Usage", (), {"total": 64 * 2**20, "free": 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(doctor, "memory", lambda: 1.5)
    monkeypatch.setattr(doctor.Path, "is_dir", lambda path: True)
    found = machine(monkeypatch, threads=64)
    assert {name: entry["state"] for name, entry in found.items()} == dict.fromkeys(
        ("cores", "memory", "/dev/shm", "disk"), "note"
    )
    assert "OMP_NUM_THREADS=2" in found["cores"]["todo"]
    assert "--shm-size" in found["/dev/shm"]["todo"]
    assert found["/dev/shm"]["text"] == "0.06 GiB"


@pytest.mark.parametrize(
    ("torch", "driver", "said"),
    [
        ({"cuda": None}, False, ("note", "no NVIDIA GPU; everything runs on the CPU")),
        ({"cuda": None}, True, ("note", "this torch cannot use the NVIDIA GPU here")),
        ({"cuda": "12.6"}, True, ("note", "nvidia-smi sees a GPU, torch with CUDA 12.6 does not")),
    ],
)
def test_gpus_that_cannot_be_used(monkeypatch, torch, driver, said):
    done = type("Done", (), {"returncode": 0 if driver else 1})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
    report = doctor.Report()
    known = {"version": "2.9", "devices": [], "bfloat16": False, "gloo": True, "nccl": False}
    doctor._about_torch(report, {**known, **torch})
    found = {entry["name"]: entry for entry in report.entries}
    assert (found["CUDA"]["state"], found["CUDA"]["text"]) == said
    assert bool(found["CUDA"]["todo"]) is driver


def test_gpus(monkeypatch):
    report = doctor.Report()
    gpu = {"name": "H100", "gigabytes": 79.1, "capability": "9.0"}
    torch = {"version": "2.9", "cuda": "12.6", "devices": [gpu], "bfloat16": True}
    doctor._about_torch(report, {**torch, "gloo": True, "nccl": False})
    found = {entry["name"]: entry for entry in report.entries}
    assert "79.1 GiB, compute capability 9.0, float16 and bfloat16" in found["cuda:0"]["text"]
    assert found["distributed"]["state"] == "note"
