"""The command `pointcept-kd`: light, from any folder, in a checkout and in a wheel; the help of every tool."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pointcept_kd
from pointcept_kd import cli, doctor
from pointcept_kd.host import InputError, config, dialect
from pointcept_kd.host.checkpoint import load_checkpoint

from .host.tiny import write_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "import sys\nfrom pointcept_kd.cli import main\nsys.exit(main())\n"


def call(*words, cwd, package=ROOT, python=(), **environment):
    """Run Python in a folder with the package of another one: the finished process."""
    path = os.pathsep.join([str(package), str(ROOT)])
    return subprocess.run(
        [sys.executable, *python, *map(str, words)],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


@pytest.fixture
def entry(tmp_path):
    """The script that an installation makes from the entry point."""
    script = tmp_path / "bin" / "pointcept-kd"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    return script


def test_help_imports_next_to_nothing(tmp_path, entry):
    for words in ([entry, "--help"], [entry], ["-m", "pointcept_kd", "--help"]):
        done = call(*words, cwd=tmp_path, python=["-X", "importtime"])
        assert done.returncode == 0
        assert "examples:\n" in done.stdout
        for name in cli.COMMANDS:
            assert re.search(rf"^  {name} +\w", done.stdout, re.M)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "pointcept_kd.cli" in imported
        assert not {"torch", "numpy", "pointcept_kd.host"} & imported


@pytest.mark.parametrize(
    ("argv", "whole_line", "expected"),
    [
        (["-m"], "python -m pointcept_kd doctor", True),
        (["-m"], "python -X dev -m pointcept_kd", True),
        (["/usr/bin/pointcept-kd", "train"], "python /usr/bin/pointcept-kd train", True),
        (["C:/x/pointcept-kd.exe"], "C:/x/pointcept-kd.exe", True),
        (["-m"], "python -m pointcept_kd.doctor", False),
        (["-m"], "python -m mine -m pointcept_kd", False),
        (["mine.py", "-m", "pointcept_kd"], "python mine.py -m pointcept_kd", False),
        (["/somewhere/pointcept-kd/mine.py"], "python /somewhere/pointcept-kd/mine.py", False),
        (["-c"], "python -c ...", False),
        ([""], "python", False),
        ([], "embedded", False),
    ],
)
def test_only_the_command_leaves_the_rooms_out(monkeypatch, argv, whole_line, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", whole_line.split())
    assert pointcept_kd._is_command() is expected


def test_words_that_are_no_command(capsys):
    assert cli.main(["tarin"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'tarin'; did you mean train?\n"
    assert cli.main(["xyz"]) == 2
    assert "known: train, test, infer" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"pointcept_kd \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_every_command_is_there():
    for name in set(cli.COMMANDS) - {"doctor"}:
        assert (ROOT / "tools" / f"{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("name", ["config", "missing script"])
def test_exit_codes_pass_through(tmp_path, name, monkeypatch, capsys):
    if name == "config":
        done = call("-m", "pointcept_kd", "train", "--config-file", "no.py", cwd=tmp_path)
        assert done.returncode == 2
        assert re.fullmatch(r"error: .*no\.py: .*no such config file.*\n", done.stderr)
        return
    monkeypatch.setattr(cli, "home", lambda: tmp_path)
    assert cli.main(["prepare_data"]) == 2
    assert "prepare_data.py is missing" in capsys.readouterr().err


def tools_with_a_command_line():
    return sorted(p.stem for p in (ROOT / "tools").glob("*.py") if "__main__" in p.read_text())


HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as done:
            assert done.code == 0, (path, done.code)
        else:
            raise AssertionError(f"{path} --help went on")
    out.flush()
    texts[path] = out.buffer.getvalue().decode()
print(json.dumps(texts))
"""


def test_the_help_of_every_tool_has_an_example(tmp_path, capsys):
    names = tools_with_a_command_line()
    assert {"train", "test", "infer", "prepare_data", "benchmark", "demo", "bootstrap"} <= {*names}
    files = [ROOT / "tools" / f"{name}.py" for name in names]
    done = call("-c", HELP, *files, cwd=tmp_path)  # one process: most of the time goes into imports
    assert (done.returncode, done.stderr) == (0, "")
    texts = {Path(path).stem: text for path, text in json.loads(done.stdout).items()}
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    texts["doctor"] = capsys.readouterr().out
    assert set(texts) == {*names, "doctor"}
    for name, text in texts.items():
        example = re.search(r"^examples?:\s+(.*)", text, re.M)
        assert example, f"{name} --help has no example"
        assert name in example[1]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with what a wheel holds."""
    pytest.importorskip("setuptools", reason="setuptools builds the package")
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "lib"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_a_wheel_holds_tools_and_configs(wheel):
    share = wheel / "pointcept_kd" / "_share"
    for folder in ("configs", "tools"):
        found = {str(p.relative_to(share)) for p in (share / folder).rglob("*") if p.is_file()}
        files = (p for end in ("py", "txt") for p in (ROOT / folder).rglob(f"*.{end}"))
        there = {str(p.relative_to(ROOT)) for p in files}
        assert found == there - {"tools/bootstrap.py"}
        assert found
    assert not (wheel / "tests").exists()


def test_a_wheel_trains_in_two_processes_from_another_folder(wheel, tmp_path):
    words = [
        "--config-file",
        write_config(tmp_path / "c.py"),
        "--num-gpus",
        2,
        "--options",
        "epoch=1",
        "eval_epoch=1",
    ]
    done = call("-m", "pointcept_kd", "train", *words, cwd=tmp_path, package=wheel)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "exp" / "model" / "model_last.pth")["epoch"] == 1
    assert "2 x cpu" in (tmp_path / "exp" / "train.log").read_text()


def test_a_wheel_finds_its_configs(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dialect, "__file__", str(wheel / "pointcept_kd" / "host" / "dialect.py"))
    share = wheel / "pointcept_kd" / "_share" / "configs" / "kd"
    for name in ("configs/kd/ptv3_to_student_tiny.py", "kd-ptv3_to_student_tiny"):
        assert config.find_config(name) == share / "ptv3_to_student_tiny.py"
    assert config.Config.fromfile(share / "ptv3_to_student_tiny.py")["data"]["num_classes"] == 19
    mine = tmp_path / "mine.py"
    mine.write_text('_base_ = ["configs/kd/ptv3_to_student_tiny.py"]\nepoch = 7\n')
    read = config.Config.fromfile(mine)
    assert (read["epoch"], read["model"]["type"]) == (7, "kd.Distiller")
    beside = tmp_path / "configs" / "kd" / "ptv3_to_student_tiny.py"
    beside.parent.mkdir(parents=True)
    beside.write_text("epoch = 8\nown = True\n")
    read = config.Config.fromfile(mine)
    assert (read["epoch"], read["own"]) == (7, True)
    mine.write_text('_base_ = ["kd/ptv3_to_student_tiny.py"]\n')
    with pytest.raises(InputError, match="there is no such config file"):
        config.Config.fromfile(mine)
    done = call("-m", "pointcept_kd", "--help", cwd=tmp_path, package=wheel)
    assert f"{share.parent}\n" in done.stdout
