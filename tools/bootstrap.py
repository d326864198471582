"""Make a virtual environment that runs this project: `python tools/bootstrap.py --venv .venv --extras dev`.

Needs nothing but Python 3.11+ and a package index. Where there is no NVIDIA GPU, torch is installed from a CPU build,
so that no CUDA libraries come along. A second call with unchanged requirements returns at once.
"""

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
# PyTorch's own index of CPU wheels: asked only where the configured index has no CPU build.
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def pinned(package: str) -> str:
    """The requirement line of a package in the constraints file."""
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.strip()
    raise SystemExit(f"error: {CONSTRAINTS.name} does not pin {package}")


def has_nvidia_gpu() -> bool:
    """Whether a driver answers."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip(python: Path, *args: str, quiet_failure: bool = False) -> bool:
    """Run pip in the environment; True when it succeeded."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, stderr=subprocess.DEVNULL if quiet_failure else None)
    return done.returncode == 0


def install_torch(python: Path) -> None:
    """Install the pinned torch: a CUDA build beside a GPU, otherwise one without CUDA libraries."""
    requirement = pinned("torch")
    common = ("install", "--quiet", "--only-binary", ":all:", "-c", str(CONSTRAINTS))
    if has_nvidia_gpu() or platform.system() != "Linux":
        # Outside Linux the plain wheel has no CUDA libraries.
        if pip(python, *common, requirement):
            return
    elif pip(python, *common, f"{requirement}+cpu", quiet_failure=True) or pip(
        python, *common, "--extra-index-url", CPU_WHEELS, f"{requirement}+cpu"
    ):
        return
    raise SystemExit(
        f"error: no wheel for {requirement} on this platform; install torch by hand and set SETUP=no"
    )


def main() -> None:
    """Create the environment, or return at once when its stamp says that nothing changed."""
    summary, _, example = __doc__.splitlines()[0].partition(": ")
    parser = argparse.ArgumentParser(description=summary, epilog=f"example: {example.strip('`.')}")
    parser.add_argument(
        "--venv", default=".venv", help="folder of the environment (default: .venv)"
    )
    parser.add_argument(
        "--extras", default="dev", help="extras of pyproject.toml to install (default: dev)"
    )
    args = parser.parse_args()
    if sys.version_info < (3, 11):
        raise SystemExit(
            f"error: Python {platform.python_version()} found, 3.11 or newer needed; set PYTHON=..."
        )

    folder = (ROOT / args.venv).resolve()
    wanted = hashlib.sha256(
        b"\0".join(
            [
                (ROOT / "pyproject.toml").read_bytes(),
                CONSTRAINTS.read_bytes(),
                args.extras.encode(),
                str(ROOT).encode(),
                sys.version.encode(),
                str(has_nvidia_gpu()).encode(),
            ]
        )
    ).hexdigest()
    stamp = folder / "pointcept_kd.stamp"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"Setting up {folder} (once; about a minute)", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts/python.exe" if platform.system() == "Windows" else "bin/python")
    install_torch(python)
    if not pip(
        python, "install", "--quiet", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{args.extras}]"
    ):
        raise SystemExit("error: installation failed; the lines above say why")
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
