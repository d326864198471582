"""The choice of the host, on small packages in the form of Pointcept; the real one is in `tests/contract`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REGISTRY = """
class Registry:
    def __init__(self, name, parent=None, scope=None):
        self.name, self.scope, self.parent = name, scope or "pointcept", parent
        self._module_dict, self._children = {}, {}

    @property
    def module_dict(self):
        return self._module_dict

    @property
    def children(self):
        return self._children

    def get(self, key):
        scope, _, rest = key.rpartition(".")
        if scope and scope != self.scope:
            return self._children[scope].get(rest)
        return self._module_dict.get(rest)

    def register_module(self, name=None, force=False, module=None):
        def register(cls):
            if not force and (name or cls.__name__) in self._module_dict:
                raise KeyError(name)
            self._module_dict[name or cls.__name__] = cls
            return cls
        return register(module) if module else register

    def build(self, cfg):
        return self.get(cfg.pop("type"))(**cfg)
"""
FILES = {
    "utils/registry.py": REGISTRY,
    "utils/optimizer.py": "from .registry import Registry\nOPTIMIZERS = Registry('optimizers')\n",
    "utils/scheduler.py": "from .registry import Registry\nSCHEDULERS = Registry('schedulers')\n",
    "models/builder.py": "from pointcept.utils.registry import Registry\nMODELS = Registry('models')\n"
    "MODULES = Registry('modules')\n@MODELS.register_module('PT-v3m1')\nclass PointTransformerV3: ...\n",
    "models/losses/builder.py": "from pointcept.utils.registry import Registry\nLOSSES = Registry('losses')\n",
    "datasets/builder.py": "from pointcept.utils.registry import Registry\nDATASETS = Registry('datasets')\n"
    "@DATASETS.register_module()\nclass DefaultDataset:\n    VALID_ASSETS = ['coord']\n",
    "datasets/transform.py": "from pointcept.utils.registry import Registry\nTRANSFORMS = Registry('transforms')\n",
    "engines/hooks/builder.py": "from pointcept.utils.registry import Registry\nHOOKS = Registry('hooks')\n",
    "engines/hooks/default.py": "from .builder import HOOKS\nclass HookBase:\n    trainer = None\n"
    "    def before_train(self):\n        return 'theirs'\n@HOOKS.register_module()\nclass ModelHook(HookBase): ...\n"
    "@HOOKS.register_module()\nclass SemSegEvaluator(HookBase): ...\n",
    "engines/train.py": "from pointcept.utils.registry import Registry\nTRAINERS = Registry('trainers')\n"
    "@TRAINERS.register_module('DefaultTrainer')\nclass Trainer: ...\n",
    "engines/test.py": "from pointcept.utils.registry import Registry\nTESTERS = Registry('testers')\n"
    "@TESTERS.register_module()\nclass SemSegTester: ...\n",
}  # fmt: skip


def checkout(folder, **changes):
    """Write a package in the form of Pointcept; `changes` are files by path without `.py`, None leaves one out."""
    files = {**FILES, **{f"{path}.py": text for path, text in changes.items()}}
    for name, text in files.items():
        path = folder / "pointcept" / name
        for parent in [path.parent, *path.parent.parents]:
            if folder in parent.parents:
                parent.mkdir(parents=True, exist_ok=True)
                (parent / "__init__.py").touch()
        if text is not None:
            path.write_text(text)
    return folder


def ask(code="", env=None, **variables):
    """What a fresh process says: its answer as JSON, or the last line of its error."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("POINTCEPT_")}
    script = f"import json, sys\n{code}\nprint(json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**keep, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    if done.returncode:
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


WHO = "import pointcept_kd.host as h; answer = [h.HOST, str(h.PROVIDER)]"
CUDA = "import torch; torch.cuda.is_available = lambda: True\n"


def test_pointcept_serves_where_asked_for(tmp_path):
    root = checkout(tmp_path)
    answer = ask(
        "import pointcept_kd, pointcept_kd.host as h\n"
        "from pointcept_kd.host import MODELS, HOOKS, DATASETS, TRAINERS, TESTERS, kd\n"
        "from pointcept_kd.host.hooks import HookBase\n"
        "import pointcept.models.builder as b, pointcept.engines.hooks.builder as e\n"
        "import pointcept.engines.train as t, pointcept.engines.test as s, pointcept.engines.hooks.default as d\n"
        "class Mine: ...\n"
        "MODELS.register_module()(Mine)\n"
        "late = type('Late', (), {}); b.MODELS.register_module('Late', module=late)\n"
        "answer = dict(host=str(h.PROVIDER), mine=b.MODELS.get('Mine') is Mine, late=MODELS.get('Late') is late,\n"
        "  child=b.MODELS.get('kd.Distiller') is kd.MODELS.get('Distiller'),\n"
        "  built=type(e.HOOKS.build(dict(type='kd.CheckpointSaver'))).__name__,\n"
        "  theirs=MODELS.get('PT-v3m1').__module__, ours=kd.MODELS.get('PT-v3m1').__module__,\n"
        "  hook=issubclass(HookBase, d.HookBase), model=issubclass(kd.MODELS.get('Distiller'), d.HookBase),\n"
        "  evaluator=issubclass(kd.HOOKS.get('SemSegEvaluator'), e.HOOKS.get('SemSegEvaluator')),\n"
        "  trainer=issubclass(kd.TRAINERS.get('Trainer'), t.Trainer),\n"
        "  tester=issubclass(kd.TESTERS.get('SemSegTester'), s.SemSegTester),\n"
        "  missing=DATASETS.get('SemanticKITTIDataset').__module__,\n"
        "  path=[p for p in sys.path if p == pointcept_kd.host.PROVIDER.folder.as_posix()])",
        POINTCEPT_KD_HOST="pointcept", POINTCEPT_ROOT=str(root),
    )  # fmt: skip
    assert (
        answer.pop("host") == f"Pointcept 1.6.0 or newer in {root} (asked for by POINTCEPT_KD_HOST)"
    )
    assert answer.pop("built") == "CheckpointSaver"
    assert answer.pop("theirs") == "pointcept.models.builder"
    assert answer.pop("ours") == "pointcept_kd.networks.ptv3"
    # What an older Pointcept lacks is filled in.
    assert answer.pop("missing") == "pointcept_kd.data.semantic_kitti"
    assert answer.pop("path") == []
    assert answer == dict.fromkeys(answer, True)


def test_a_name_of_another_scope_is_found(tmp_path):
    code = (
        "import pointcept_kd.host as h\n"
        "from pointcept.models.builder import MODELS\n"
        "from pointcept.utils.registry import Registry\n"
        "other = Registry('models', scope='mmdet'); MODELS.children['mmdet'] = other\n"
        "other.register_module('X', module=dict)\n"
        "answer = [h.MODELS.get('mmdet.X') is dict, h.MODELS.get('mmdet.Y'), h.MODELS.get('no.X')]"
    )
    env = dict(POINTCEPT_KD_HOST="pointcept", POINTCEPT_ROOT=str(checkout(tmp_path)))
    assert ask(code, **env) == [True, None, None]


def test_auto(tmp_path):
    root = checkout(tmp_path)
    assert ask(WHO)[0] == "builtin"
    name, text = ask(WHO, POINTCEPT_ROOT=str(root))
    assert (name, "needs CUDA" in text) == ("builtin", True)
    assert ask(CUDA + WHO, PYTHONPATH=str(root))[0] == "pointcept"
    # Pointcept's own tools have imported it by the time that a config imports this package.
    loaded = "import pointcept.utils.registry\n"
    name, text = ask(loaded + WHO, PYTHONPATH=str(root))
    assert (name, "has imported it" in text) == ("pointcept", True)
    asked = ask(CUDA + WHO, PYTHONPATH=str(root), POINTCEPT_KD_HOST="builtin")
    assert asked == ["builtin", "built in (asked for by POINTCEPT_KD_HOST)"]


LACKING = "import torch_scatter_of_nobody\n"


@pytest.mark.parametrize(
    ("changes", "wanted", "text"),
    [
        (None, "pointcept", "there is no module named pointcept: set POINTCEPT_ROOT"),
        ({}, "real", "POINTCEPT_KD_HOST=real: use auto, pointcept or builtin"),
        (
            {"models/builder": LACKING},
            "pointcept",
            "there is no module named torch_scatter_of_nobody, needed by pointcept/models/builder.py; repair",
        ),
        (
            {"engines/train": "raise OSError('libcuda:\\n gone')\n"},
            "pointcept",
            "OSError: libcuda: gone, needed by pointcept/engines/train.py",
        ),
        ({"engines/hooks/default": "x = 1\n"}, "pointcept", "has no attribute 'HookBase'"),
        (
            {"datasets/builder": FILES["datasets/builder.py"].replace("VALID_ASSETS", "OLD")},
            "pointcept",
            "is older than 1.5.2",
        ),
    ],
)
def test_refusals_are_one_line(tmp_path, changes, wanted, text):
    env = {"POINTCEPT_KD_HOST": wanted}
    if changes is not None:
        env["POINTCEPT_ROOT"] = str(checkout(tmp_path, **changes))
    line = ask("import pointcept_kd; answer = 0", **env)
    assert line.startswith("error: ")
    assert text in line


def test_a_wrong_root_is_refused_by_auto_too(tmp_path):
    line = ask("import pointcept_kd; answer = 0", POINTCEPT_ROOT=str(tmp_path))
    assert line.startswith(f"error: POINTCEPT_ROOT={tmp_path}: there is no pointcept/__init__.py")


def test_auto_says_why_a_broken_pointcept_does_not_serve(tmp_path):
    root = checkout(tmp_path, **{"models/builder": LACKING})
    name, text = ask(CUDA + WHO, POINTCEPT_ROOT=str(root))
    assert name == "builtin"
    assert "torch_scatter_of_nobody, needed by pointcept/models/builder.py" in text
