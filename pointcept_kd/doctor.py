"""What is installed, what is missing, and what that costs: `pointcept-kd doctor`, `python -m pointcept_kd doctor`.

Exit code 0 when the core works, 1 when it does not. Everything that could fail is imported in processes of its own,
which run `probes.py`, so that a broken package, even one that takes its process down, is a line of the report and not
the end of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from pointcept_kd.probes import MARK

PACKAGE = Path(__file__).resolve().parent
PYTHON = "3.10"
REQUIRED = {
    "torch": "2.4", "numpy": "1.26", "scipy": "1.11", "tqdm": "4.60", "addict": "2.4", "jaxtyping": "0.2.30",
}  # fmt: skip

# Import name: package, extra that installs it, what it brings.
OPTIONAL = {
    "embreex": ("embreex", "sim", "ray casting: simulated streets, and with them the demo"),
    "gudhi": ("gudhi", "topology", "loops and voids (H1, H2) in kd.Topology"),
    "onnxruntime": ("onnxruntime", "onnx", "running exported students; with onnx, exporting them"),
    "PIL": ("pillow", "images", "reading camera images"),
    "tensorboard": ("tensorboard", "log", "TensorBoard event files; log.jsonl is always written"),
    "flash_attn": ("flash-attn", "flash", "attention kernels on CUDA, where a network asks for them"),
    "timm": ("timm", "timm", "image networks of timm, such as DINOv2, in kd.ImageEncoder"),
    "transformers": ("transformers", "weak-labels", "weak labels of images by a prompted segmenter"),
    "spconv": ("spconv", "bench", "a rival in benchmarks/ops.py; never called on a CPU, where its results are wrong"),
}  # fmt: skip
# Nothing here needs it, but it is often broken, and then other packages beside it are.
BYSTANDERS = {"torchvision": "torchvision"}

SECONDS = 90.0  # for a probe; importing large packages from a cold disk takes long
MARKS = {"ok": "ok", "note": "-", "problem": "PROBLEM"}


def run_probe(words: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What a probe said, and how it ended: empty when well."""
    # As a script its folder, with names such as `data`, would be where Python looks for modules.
    script = str(PACKAGE / "probes.py")
    code = f"import runpy, sys; runpy.run_path({script!r}, run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    clock = threading.Timer(SECONDS, process.kill)
    clock.start()
    try:
        out, err = process.communicate()
    finally:
        late = not clock.is_alive()
        clock.cancel()
    found = [json.loads(x.removeprefix(MARK)) for x in out.split("\n") if x.startswith(MARK)]
    if process.returncode == 0:
        return found, ""
    if late:
        return found, f"did not end within {SECONDS:.0f} s"
    last = (err.strip().splitlines() or [""])[-1][:200]
    return found, f"the process died with code {process.returncode}{': ' + last if last else ''}"


def try_imports(names: Sequence[str]) -> dict[str, str]:
    """Import name to what is wrong with it, for those that are installed but do not import."""
    wrong: dict[str, str] = {}
    left = [name for name in names if importlib.util.find_spec(name) is not None]
    while left:
        found, end = run_probe(["imports", *left])
        begun = [entry["name"] for entry in found if entry["key"] == "begin"]
        wrong.update({e["key"]: e["error"] for e in found if "error" in e})
        if not end or not begun:
            break
        wrong.setdefault(begun[-1], end)
        left = left[len(begun) :]
    return wrong


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def older(version: str, least: str) -> bool:
    """Whether a version comes before another; what is behind the numbers does not count."""
    numbers = [[int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]] for text in (version, least)]  # fmt: skip
    return numbers[0] < numbers[1]


class Report:
    """Findings by section, in order."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, section: str, name: str, state: str, text: str, todo: str = "") -> None:
        """State is ok, note (works, but), or problem (the core does not work)."""
        self.entries.append(
            {"section": section, "name": name, "state": state, "text": text, "todo": todo}
        )

    def text(self) -> str:
        """The report as people read it."""
        lines, section = [], None
        width = max(len(entry["name"]) for entry in self.entries)
        for entry in self.entries:
            if entry["section"] != section:
                section = entry["section"]
                lines += ["", section]
            todo = f"; {entry['todo']}" if entry["todo"] else ""
            lines.append(
                f"  {MARKS[entry['state']]:<7}  {entry['name']:<{width}}  {entry['text']}{todo}"
            )
        return "\n".join(lines[1:])


def examine() -> Report:
    """Look at everything."""
    report = Report()
    with ThreadPoolExecutor(2) as pool:
        core = pool.submit(run_probe, ["core"])
        wrong = pool.submit(try_imports, [*OPTIONAL, *BYSTANDERS])
        found, end = core.result()
        broken = wrong.result()
    said = {entry.pop("key"): entry for entry in found if entry["key"] != "plugin"}
    plugins = [entry for entry in found if entry.get("key") == "plugin"]
    _about_core(report, said, end)
    _about_machine(report, said.get("torch", {}))
    _about_optional(report, broken, bool(said.get("torch", {}).get("devices")))
    _about_plugins(report, plugins, said, end)
    _about_surroundings(report)
    return report


def _about_core(report: Report, said: dict[str, Any], end: str) -> None:
    add = report.add
    python = platform.python_version()
    if older(python, PYTHON):
        add("core", "Python", "problem", python, f"install {PYTHON} or newer")
    else:
        add("core", "Python", "ok", f"{python}, {sys.executable}")
    for name, least in REQUIRED.items():
        version = version_of(name)
        install = f"pip install '{name}>={least}'"
        if version is None:
            add("core", name, "problem", "not installed", install)
        elif older(version, least):
            add("core", name, "problem", f"{version} is older than {least}", install)
        elif name == "torch":
            _about_torch(report, said.get("torch", {"error": end}))
        else:
            add("core", name, "ok", version)
    package = said.get("package", {"error": end})
    if "error" in package:
        todo = "repair the first problem above, or install pointcept_kd again"
        add("core", "pointcept_kd", "problem", package["error"], todo)
        return
    where = f"{package['version']} in {package['folder']}"
    if package["config"] is None:
        todo = "install pointcept_kd again, or run from a complete checkout"
        add("core", "pointcept_kd", "problem", f"{where}, without its configs", todo)
    else:
        counts = f"{package['models']} models, {package['terms']} distillation terms"
        add("core", "pointcept_kd", "ok", f"{where}; {counts}")
    add("core", "host", "ok", package["host"])
    backends = said.get("backends", {"error": end})
    if "error" in backends:
        todo = "correct the POINTCEPT_KD_... variable that it names"
        add("core", "backends", "problem", backends["error"], todo)
    for line in backends.get("lines", ()):
        name, _, text = line.partition(": ")
        add("core", name, "ok", text)
    for device in ("cpu", "cuda"):
        test = said.get(f"self-test {device}", {"error": end})
        if "error" in test:
            todo = "install torch again; if that does not help, report it with this page"
            add("core", f"test on {device}", "problem", test["error"], todo)
        elif not test.get("absent"):
            took = f"a training step over {test['points']} points in {test['seconds']} s"
            add("core", f"test on {device}", "ok", f"{took}, loss {test['loss']}")


def _about_torch(report: Report, torch: dict[str, Any]) -> None:
    if "error" in torch:
        report.add("core", "torch", "problem", torch["error"], "install torch again (see pytorch.org)")  # fmt: skip
        return
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "no CUDA"
    report.add("core", "torch", "ok", f"{torch['version']}, {build}")
    for i, device in enumerate(torch["devices"]):
        text = f"{device['name']}, {device['gigabytes']} GiB, compute capability {device['capability']}"
        kinds = "float16 and bfloat16" if torch["bfloat16"] else "float16, no bfloat16"
        report.add("core", f"cuda:{i}", "ok", f"{text}, {kinds}")
    if not torch["devices"]:
        driver = shutil.which("nvidia-smi")
        seen = driver and subprocess.run([driver, "-L"], capture_output=True).returncode == 0
        if seen and not torch["cuda"]:
            todo = "install a CUDA build of torch (see pytorch.org)"
            report.add("core", "CUDA", "note", "this torch cannot use the NVIDIA GPU here", todo)
        elif seen:
            todo = "update the driver, or install a torch for it"
            text = f"nvidia-smi sees a GPU, torch with CUDA {torch['cuda']} does not"
            report.add("core", "CUDA", "note", text, todo)
        else:
            report.add("core", "CUDA", "note", "no NVIDIA GPU; everything runs on the CPU")
    kinds = [name for name in ("nccl", "gloo") if torch[name]]
    several = f"{' and '.join(kinds)}: several processes can train together"
    if not kinds:
        report.add("core", "distributed", "note", "neither nccl nor gloo", "--num-gpus 1 only")
    elif torch["devices"] and not torch["nccl"]:
        report.add("core", "distributed", "note", "no nccl", "one GPU only, or install a torch with it")  # fmt: skip
    else:
        report.add("core", "distributed", "ok", several)


def _about_machine(report: Report, torch: dict[str, Any]) -> None:
    add = report.add
    usable = usable_cores()
    threads = torch.get("threads")
    text = f"{usable} usable, torch computes with {threads or 'unknown'} threads"
    if threads and threads > usable:
        todo = f"set OMP_NUM_THREADS={usable}; more threads than cores are slower"
        add("machine", "cores", "note", text, todo)
    else:
        add("machine", "cores", "ok", text)
    gigabytes = memory()
    if gigabytes is not None:
        small = gigabytes < 4
        todo = "use num_worker=0 and batch_size=1" if small else ""
        add("machine", "memory", "note" if small else "ok", f"{gigabytes:.1f} GiB", todo)
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / 2**30
        small = size < 1
        todo = "workers pass batches through it: use num_worker=0, or start the container with --shm-size=8g"
        add("machine", "/dev/shm", "note" if small else "ok", f"{size:.2f} GiB", todo * small)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    small = free < 5
    todo = "checkpoints and simulated streets need some; set save_path elsewhere" * small
    add("machine", "disk", "note" if small else "ok", f"{free:.1f} GiB free in {Path.cwd()}", todo)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> float | None:
    """GiB of the machine, or of the container where that is less; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total / 2**30


def _about_optional(report: Report, broken: dict[str, str], gpu: bool) -> None:
    for name, (package, extra, brings) in OPTIONAL.items():
        version = version_of(package) or version_of(f"{package}-cu120")
        there = version is not None or importlib.util.find_spec(name) is not None
        if name in broken:
            todo = f"pip install --force-reinstall {package}, or uninstall it"
            text = f"{version or 'installed'}, but broken ({broken[name]}): {brings}"
            report.add("optional", package, "note", text, todo)
        elif there:
            idle = "" if gpu or name != "flash_attn" else "; not used without a GPU"
            report.add("optional", package, "ok", f"{version or 'installed'}: {brings}{idle}")
        else:
            todo = f"pip install 'pointcept_kd[{extra}]'"
            report.add("optional", package, "note", f"not installed: {brings}", todo)
    for name, package in BYSTANDERS.items():
        if name in broken:
            todo = (
                "packages that import it fail; install the version that fits torch, or uninstall it"
            )
            text = f"{version_of(package)}, but broken ({broken[name]})"
            report.add("optional", package, "note", text, todo)
    spec = importlib.util.find_spec("pointcept")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    root = os.environ.get("POINTCEPT_ROOT")
    where = f"POINTCEPT_ROOT={root}" if root else f"found in {places[0]}" if places else ""
    text = where or "not found; not needed. POINTCEPT_ROOT names a checkout"
    report.add("optional", "Pointcept", "ok" if where else "note", text)


def _about_plugins(
    report: Report, plugins: Sequence[dict[str, Any]], said: dict[str, Any], end: str
) -> None:
    off = os.environ.get("POINTCEPT_KD_PLUGINS") == "0"
    for plugin in plugins:
        result = said.get(f"plugin {plugin['name']}", {"error": end})
        text = f"{plugin['value']} of {plugin['package']}"
        if off:
            report.add("plugins", plugin["name"], "note", f"{text}, left out by POINTCEPT_KD_PLUGINS=0")  # fmt: skip
        elif "error" in result:
            todo = "repair or uninstall that package, or set POINTCEPT_KD_PLUGINS=0"
            report.add("plugins", plugin["name"], "problem", f"{text}: {result['error']}", todo)
        else:
            report.add("plugins", plugin["name"], "ok", text)


def _about_surroundings(report: Report) -> None:
    folder = Path(os.environ.get("POINTCEPT_KD_SAMPLES", PACKAGE.parents[1] / "shared" / "data"))
    if (folder / "semantickitti").is_dir():
        report.add("data", "samples", "ok", f"real scans in {folder}")
    else:
        todo = "set POINTCEPT_KD_SAMPLES to their folder"
        report.add("data", "samples", "note", "no real scans found, which only tests need", todo)
    streets = Path("data/sim")
    if (streets / "dataset" / "sequences").is_dir():
        report.add("data", "streets", "ok", f"simulated streets in {streets}")
    else:
        todo = "`pointcept-kd demo` makes them, or `pointcept-kd prepare-data simulate --out data/sim`"  # fmt: skip
        report.add("data", "streets", "note", f"no simulated streets in {streets}", todo)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 0 when the core works, 1 when it does not."""
    parser = argparse.ArgumentParser(
        prog="pointcept-kd doctor",
        description="Say what is installed, what is missing and what that costs, and try a training step.",
        epilog="examples:\n  pointcept-kd doctor\n  python -m pointcept_kd doctor --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    report = examine()
    problems = [entry for entry in report.entries if entry["state"] == "problem"]
    if args.json:
        print(json.dumps({"works": not problems, "findings": report.entries}, indent=1))
    else:
        print(report.text())
        print(
            f"\n{len(problems)} problem{'s' * (len(problems) != 1)}, marked above."
            if problems
            else "\nThe core works."
        )
    return 1 if problems else 0
