"""The config dialect, its options, and what a run makes of them."""

import copy
import os
import pickle
import random
import sys
import time
import tokenize
import warnings

import numpy as np
import pytest
import torch

from pointcept_kd.host import InputError, comm
from pointcept_kd.host.config import (
    RUNTIME_DEFAULTS,
    Config,
    ConfigDict,
    build_parser,
    default_setup,
    fill_defaults,
    find_config,
    parse_options,
    set_seed,
)


@pytest.fixture
def write(tmp_path):
    """Write configs into a folder, return the path of the last one."""

    def files(**sources):
        for name, source in sources.items():
            path = tmp_path / f"{name}.py"
            path.write_text(source)
        return path

    return files


def refused(text):
    return pytest.raises(InputError, match=text)


# -------------------------------------------------------------------------------------------- files


def test_plain_file(write):
    path = write(
        a="""
from __future__ import annotations
import os
from pathlib import Path
__hidden = 1
_shown = 2
def helper():
    return 3
class Thing: ...
value = helper()
model = dict(type="Net", depths=(1, 2), inner=dict(x=None))
"""
    )
    cfg = Config.fromfile(path)
    assert cfg == dict(_shown=2, value=3, model=dict(type="Net", depths=(1, 2), inner=dict(x=None)))
    assert cfg.filename == str(path)
    assert "def helper" in cfg.text
    assert isinstance(cfg.model.depths, tuple)


def test_access_and_missing_keys(write):
    cfg = Config.fromfile(write(a="model = dict(backbone=dict(depth=3))\nhooks = [dict(type='A')]"))
    assert cfg.model.backbone.depth == cfg["model"]["backbone"]["depth"] == 3
    assert cfg.hooks[0].type == "A"
    assert "model" in cfg
    assert "nothing" not in cfg
    assert cfg.get("nothing") is None
    assert cfg.get("nothing", 4) == 4
    assert list(cfg) == ["model", "hooks"] == list(cfg.keys())
    assert len(cfg) == 2
    with pytest.raises(AttributeError, match="did you mean model"):
        _ = cfg.modell
    with pytest.raises(KeyError, match="did you mean backbone"):
        _ = cfg.model["bakbone"]
    with pytest.raises(AttributeError, match="did you mean depth"):
        _ = cfg.model.backbone.dept
    assert not hasattr(cfg.model, "other")
    assert "other" not in cfg.model
    assert dict(**cfg.model) == dict(backbone=dict(depth=3))


def test_assignment_wraps_dicts():
    cfg = Config()
    cfg.a = dict(b=[dict(c=1)])
    cfg["d"] = dict(e=2)
    cfg.a.f = dict(g=3)
    assert cfg.a.b[0].c == 1
    assert cfg.d.e == 2
    assert cfg.a.f.g == 3
    del cfg.d
    del cfg["a"]
    assert len(cfg) == 0
    with pytest.raises(AttributeError, match="no key"):
        del cfg.d
    for name in ("filename", "text", "pretty_text"):
        with pytest.raises(AttributeError, match="read-only"):
            setattr(cfg, name, 1)


def test_the_given_dict_is_not_changed():
    given = dict(a=dict(b=1))
    cfg = Config(given)
    cfg.a.b = 2
    assert given == dict(a=dict(b=1))
    plain = cfg.to_dict()
    assert type(plain["a"]) is dict
    plain["a"]["b"] = 3
    assert cfg.a.b == 2


def test_pickle_and_copies(write):
    cfg = Config.fromfile(write(a="a = dict(b=[dict(c=(1, dict(d=2)))])"))
    for twin in (pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg), copy.copy(cfg)):
        assert twin == cfg
        assert (twin.filename, twin.text) == (cfg.filename, cfg.text)
        assert twin.a.b[0].c[1].d == 2
        twin.a.b[0].e = 5
        twin.a.z = 1
        assert "z" not in cfg.a
    assert "e" not in copy.deepcopy(cfg).a.b[0]
    inner = pickle.loads(pickle.dumps(cfg.a))
    assert type(inner) is ConfigDict
    assert inner == cfg.a


def test_base_merge(write):
    path = write(
        base="model = dict(a=1, b=dict(c=2, d=3), hooks=[1, 2])\nepoch = 5",
        child="_base_ = 'base.py'\nmodel = dict(b=dict(c=9), hooks=[3])\nnew = 1",
    )
    cfg = Config.fromfile(path)
    assert cfg == dict(model=dict(a=1, b=dict(c=9, d=3), hooks=[3]), epoch=5, new=1)
    assert list(cfg) == ["model", "epoch", "new"]
    assert "_base_" not in cfg
    assert "epoch = 5" in cfg.text
    assert "new = 1" in cfg.text


def test_bases_in_other_folders_and_grandparents(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "root.py").write_text("a = dict(p=1, q=1)")
    (tmp_path / "x" / "mid.py").write_text("_base_ = ['../root.py']\na = dict(q=2)")
    (tmp_path / "side.py").write_text("b = 1")
    (tmp_path / "x" / "y" / "leaf.py").write_text(
        "_base_ = ['../mid.py', '../../side.py']\na = dict(r=3)"
    )
    assert Config.fromfile(tmp_path / "x" / "y" / "leaf.py") == dict(a=dict(p=1, q=2, r=3), b=1)


def test_two_bases_with_one_key(write):
    path = write(one="k = 1", two="k = 2", child="_base_ = ['one.py', 'two.py']")
    with refused("two bases define 'k'.*one.py.*two.py"):
        Config.fromfile(path)


def test_circle_of_bases(write):
    path = write(a="_base_ = 'b.py'", b="_base_ = 'a.py'")
    with refused("leads back"):
        Config.fromfile(path)


@pytest.mark.parametrize("value", ["3", "[1]", "'a' + str(1)", "dict(a=1)"])
def test_base_must_be_written_out(write, value):
    with refused("a.py:1: `_base_` must be a path"):
        Config.fromfile(write(a=f"_base_ = {value}"))


def test_dict_over_something_else(write):
    path = write(base="m = dict(x=[1])", child="_base_ = 'base.py'\nm = dict(x=dict(a=1))")
    with refused(r"child.py: m.x is \[1\].*_delete_=True"):
        Config.fromfile(path)
    path = write(child="_base_ = 'base.py'\nm = dict(x=dict(_delete_=True, a=1))")
    assert Config.fromfile(path) == dict(m=dict(x=dict(a=1)))


def test_delete_is_removed_everywhere(write):
    path = write(
        base="m = dict(x=dict(a=1, b=2), y=dict(c=3))\nlone = dict(_delete_=True, a=1)",
        child="""
_base_ = 'base.py'
m = dict(
    x=dict(_delete_=True, a=5, deep=dict(_delete_=True, z=1)),
    y=dict(_delete_=False, d=4),
    new=dict(_delete_=True, q=dict(_delete_=True, r=1)),
    rows=[dict(_delete_=True, s=1), (dict(_delete_=True, t=1),)],
)
""",
    )
    cfg = Config.fromfile(path)
    assert cfg == dict(
        m=dict(
            x=dict(a=5, deep=dict(z=1)),
            y=dict(c=3, d=4),
            new=dict(q=dict(r=1)),
            rows=[dict(s=1), (dict(t=1),)],
        ),
        lone=dict(a=1),
    )
    assert "_delete_" not in cfg.pretty_text
    with refused("belongs inside the dict"):
        Config.fromfile(write(c="_delete_ = True"))


def test_base_references(write):
    path = write(
        base="data = dict(size=[0.05, 0.1], names=('a',))\nk = 19",
        child='''"""Mentions {{ _base_.nothing }} in passing."""
_base_ = ["base.py"]
head = dict(classes={{ _base_.k }}, size={{_base_.data.size}}, more={{ _base_.k }} + 1)  # {{ _base_.no }}
twin = {{ _base_.data }}
twin["size"].append(1)
''',
    )
    cfg = Config.fromfile(path)
    assert cfg.head == dict(classes=19, size=[0.05, 0.1], more=20)
    assert cfg.twin.size == [0.05, 0.1, 1]
    assert cfg.data.size == [0.05, 0.1]


def test_bad_base_references(write):
    write(base="classes = 19")
    with refused(r"c.py:2: the bases have no 'clases'; did you mean classes"):
        Config.fromfile(write(c="_base_ = 'base.py'\nx = {{ _base_.clases }}"))
    with refused(r"c.py:2: write \{\{ _base_.classes \}\} without quotes"):
        Config.fromfile(write(c="_base_ = 'base.py'\nx = '{{ _base_.classes }}'"))
    with refused(r"c.py:2: NameError.*a value of a base is written \{\{ _base_.classes \}\}"):
        Config.fromfile(write(c="_base_ = 'base.py'\nx = classes"))


def test_template_words(write, tmp_path):
    cfg = Config.fromfile(
        write(
            my_run="a = '{{ fileDirname }}'\nb = '{{fileBasename}}'\n"
            "c = 'exp/{{ fileBasenameNoExtension }}'\nd = '{{ fileExtname }}'"
        )
    )
    assert cfg == dict(a=tmp_path.as_posix(), b="my_run.py", c="exp/my_run", d=".py")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a = 1\nb = (2", r"a.py:2: not valid Python"),
        ("a = 1\nb = a +\n", r"a.py:2: not valid Python: invalid syntax"),
        ("abc = 1\nb = abd", r"a.py:2: NameError.*did you mean abc"),
        ("def f():\n    return 1 / 0\na = 2\nb = f()", r"a.py:2: ZeroDivisionError"),
        ("import no_such_module_at_all", r"a.py:1: ModuleNotFoundError"),
        ("text = 1", "'text' is a reserved name"),
        ("filename = 1", "reserved"),
    ],
)
def test_bad_files(write, source, text):
    with refused(text) as caught:
        Config.fromfile(write(a=source))
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(write, tmp_path):
    write(student_tiny="a = 1", teacher="a = 1")
    with refused("no such config file; nearest there: student_tiny.py"):
        Config.fromfile(tmp_path / "student_tinny.py")
    with refused("the folder .* has no nowhere"):
        Config.fromfile(tmp_path / "nowhere" / "a.py")
    (tmp_path / "a.yaml").write_text("a: 1")
    with refused("configs are Python files, this one ends in '.yaml'"):
        Config.fromfile(tmp_path / "a.yaml")
    (tmp_path / "latin.py").write_bytes(b"a = '\xe9'")
    with refused("UTF-8"):
        Config.fromfile(tmp_path / "latin.py")
    with refused("base_missing.py: there is no such config file"):
        Config.fromfile(write(c="_base_ = 'base_missing.py'"))


def test_custom_imports(write, tmp_path, monkeypatch):
    (tmp_path / "my_plugin_for_test.py").write_text("loaded = True")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = Config.fromfile(write(a="custom_imports = dict(imports=['my_plugin_for_test'])"))
    assert sys.modules.pop("my_plugin_for_test").loaded
    assert cfg.custom_imports.imports == ["my_plugin_for_test"]
    Config.fromfile(tmp_path / "a.py", import_custom_modules=False)
    assert "my_plugin_for_test" not in sys.modules
    with refused("custom_imports cannot import 'no_such_plugin'.*allow_failed_imports=True"):
        Config.fromfile(write(a="custom_imports = dict(imports=['no_such_plugin'])"))
    path = write(a="custom_imports = dict(imports=['no_such_plugin'], allow_failed_imports=True)")
    with pytest.warns(UserWarning, match="no_such_plugin"):
        Config.fromfile(path)
    for wrong in ("['a']", "dict(import_=['a'])", "dict(imports=[3])"):
        with refused("custom_imports"):
            Config.fromfile(write(a=f"custom_imports = {wrong}"))


def test_a_bug_inside_a_plugin_is_no_input_error(write, tmp_path, monkeypatch):
    (tmp_path / "broken_plugin_for_test.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        Config.fromfile(write(a="custom_imports = dict(imports=['broken_plugin_for_test'])"))


def test_deprecation(write):
    path = write(a="_deprecation_ = dict(expected='b.py', reference='the docs')\nx = 1")
    with pytest.warns(DeprecationWarning, match=r"a\.py is deprecated; use b\.py.*the docs"):
        cfg = Config.fromfile(path)
    assert cfg == dict(x=1)


# ----------------------------------------------------------------------------------------- printing


TRICKY = dict(
    none=None,
    numbers=[1, -2, 0.1, 1e-12, 1e300, True],
    infinite=(float("inf"), -float("inf")),
    one=(1,),
    nothing=[dict(), [], (), set()],
    choice={3, 1, 2},
    raw=b"\x00{{ fileDirname }}",
    strings=["it's", 'a "b"', "\n\t\\", "é", "{{ _base_.x }}", "{{{{ fileBasename }}}}", "\\{{"],
    keys={1: "a", "a-b": 2, "class": 3, None: 4, (1, 2): 5},
    table=list(range(200)),
    deep=dict(
        a=dict(b=dict(c=[dict(type="LongName" * 4, other="value" * 8, x=1.5) for _ in "ab"]))
    ),
    long="x" * 150,
)


def test_pretty_text_reads_back(tmp_path):
    cfg = Config(TRICKY)
    cfg.dump(tmp_path / "b.py")
    again = Config.fromfile(tmp_path / "b.py")
    assert again == cfg
    assert repr(again.to_dict()) == repr(cfg.to_dict())
    assert again.pretty_text == cfg.pretty_text
    assert [p.name for p in tmp_path.iterdir()] == ["b.py"]


def test_pretty_text_layout():
    cfg = Config(
        dict(
            epoch=3,
            model=dict(type="Net", depths=(2, 2)),
            data=dict(train=dict(type="A" * 30, root="B" * 30), val={"a-b": [1]}),
        )
    )
    assert cfg.pretty_text == (
        "epoch = 3\n"
        'model = dict(type="Net", depths=(2, 2))\n'
        "data = dict(\n"
        f'    train=dict(type="{"A" * 30}", root="{"B" * 30}"),\n'
        '    val={"a-b": [1]},\n'
        ")\n"
    )


def test_lines_stay_within_the_width():
    rng = random.Random(0)

    def value(depth):
        kind = rng.choice(["dict", "list", "tuple", "number", "word"]) if depth else "number"
        if kind == "dict":
            return {
                f"key{i}" * rng.randint(1, 3): value(depth - 1) for i in range(rng.randint(0, 4))
            }
        if kind in ("list", "tuple"):
            items = [value(depth - 1) for _ in range(rng.randint(0, 5))]
            return items if kind == "list" else tuple(items)
        return rng.random() if kind == "number" else "w" * rng.randint(0, 30)

    for _ in range(100):
        values = dict(a=value(5), long_name=value(4))
        text = Config(values).pretty_text
        assert max(len(line) for line in text.splitlines()) <= 100
        scope = {}
        exec(text, scope)
        assert {k: scope[k] for k in values} == values
        tokenize.untokenize(tokenize.generate_tokens(iter(text.splitlines(True)).__next__))


def test_numpy_scalars_print_as_numbers():
    text = Config(dict(a=np.float64(0.5), b=[np.int64(3)], c=np.str_("x"))).pretty_text
    assert text == 'a = 0.5\nb = [3]\nc = "x"\n'


@pytest.mark.parametrize(
    "value", [object(), np.zeros(2), torch.zeros(1), print, dict, torch.float32, range(3)]
)
def test_values_without_a_literal(tmp_path, value):
    cfg = Config(dict(a=dict(b=[1, dict(c=value)])))
    with refused(r"config key a\.b\.1\.c holds"):
        cfg.dump(tmp_path / "c.py")
    assert list(tmp_path.iterdir()) == []


def test_unprintable_names():
    for key in ("a-b", "class", "__x"):
        with refused("cannot be written as a Python name"):
            _ = Config({key: 1}).pretty_text
    with refused("reserved"):
        Config(dict(text=1))
    with refused("holds a dict"):
        Config([1])


def test_dump_where_one_cannot_write(tmp_path):
    with refused("cannot write the config"):
        Config(dict(a=1)).dump(tmp_path / "none" / "c.py")


def test_a_big_config_is_fast(write):
    step = 'dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5)'
    split = f"dict(type='D', transform=[{', '.join([step] * 12)}], aug=[{', '.join([f'[{step}]'] * 10)}])"
    path = write(
        base=f"data = dict(names={list(map(str, range(30)))}, train={split}, val={split})",
        child=f"_base_ = ['base.py']\ndata = dict(test={split})",
    )
    Config.fromfile(path)
    best = min(_seconds(lambda: Config.fromfile(path).pretty_text) for _ in range(5))
    # Loose against a busy machine; about 5 ms on an idle one.
    assert best < 0.05


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("None", None),
        ("", ""),
        ("exp/run-1", "exp/run-1"),
        ("a=b", "a=b"),
        ("'3'", "3"),
        ('"true"', "true"),
        ("1,2", [1, 2]),
        ("1,", [1]),
        ("[1,2.5,x]", [1, 2.5, "x"]),
        ("[ 1 , b ]", [1, "b"]),
        ("[]", []),
        ("()", ()),
        ("(1)", (1,)),
        ("(1,2)", (1, 2)),
        ("[(1,2),[3,(4)]]", [(1, 2), [3, (4,)]]),
        ("(1,2),(3,4)", [(1, 2), (3, 4)]),
        ("['a,b',\"c]\"]", ["a,b", "c]"]),
        ("it's", "it's"),
    ],
)
def test_option_values(text, value):
    parsed = parse_options([f"k={text}"])["k"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "pair", ["novalue", "=1", "a..b=1", ".a=1", "a=[1", "a=1]", "a=(1]", "+=1"]
)
def test_bad_options(pair):
    with refused("option"):
        parse_options([pair])


@pytest.fixture
def cfg():
    return Config(
        dict(
            epoch=4,
            mixer=None,
            model=dict(type="Net", width=8),
            data=dict(
                train=dict(transform=[dict(type="A"), dict(type="GridSample", grid_size=0.05)])
            ),
            test=dict(type="T", aug=[[dict(p=0.1)], [dict(p=0.2)]], pair=(1, 2)),
        )
    )


def test_options_merge(cfg):
    before = copy.deepcopy(cfg)
    cfg.merge_from_dict(
        parse_options(
            [
                "epoch=8",
                "model.width=16",
                "data.train.transform.1.grid_size=0.1",
                "test.aug.1.0.p=0.9",
                "test.pair.0=7",
                "weight=x.pth",
                "+model.depth=3",
                "+model.deep.er=4",
                "+extra=none",
                "test.mode=tta",
            ]
        )
    )
    assert (cfg.epoch, cfg.model.width, cfg.model.depth, cfg.model.deep.er) == (8, 16, 3, 4)
    assert cfg.data.train.transform[1] == dict(type="GridSample", grid_size=0.1)
    assert cfg.data.train.transform[0] == dict(type="A")
    assert cfg.test.aug[1][0].p == 0.9
    assert cfg.test.aug[0][0].p == 0.1
    assert cfg.test.pair == (7, 2)
    assert cfg.weight == "x.pth"
    assert cfg.extra is None
    assert cfg.test.mode == "tta"
    assert before.data.train.transform[1].grid_size == 0.05


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("epochs=1", r"no such key; did you mean epoch\? Or write \+epochs=\.\.\."),
        ("batch_sise=1", "did you mean batch_size"),
        ("model.widht=1", r"did you mean model\.width"),
        ("data.train.transform.1.grid_siz=1", r"did you mean data\.train\.transform\.1\.grid_size"),
        ("qqqqqqqqqqqq=1", r"no such key; write \+qqqqqqqqqqqq"),
        ("data.train.transform.5.p=1", "data.train.transform is a list of 2; '5' is not an index"),
        ("data.train.transform.x.p=1", "'x' is not an index"),
        ("+epoch.a=1", "epoch is 4 below and a dict here"),
        ("+mixer.a=1", "mixer is None below"),
    ],
)
def test_refused_options_change_nothing(cfg, option, text):
    before = copy.deepcopy(cfg)
    with refused(text):
        cfg.merge_from_dict(parse_options(["model.width=3", option]))
    assert cfg == before


def test_runtime_keys_are_known_without_being_in_the_file():
    cfg = Config(dict(model=dict()))
    cfg.merge_from_dict({key: value for key, value in RUNTIME_DEFAULTS.items() if key != "hooks"})
    assert cfg.batch_size == RUNTIME_DEFAULTS["batch_size"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_cache_of_a_data_set_is_an_option(split):
    cfg = Config(dict(data={split: dict(type="D", loop=2)}))
    cfg.merge_from_dict(parse_options([f"data.{split}.cache=shared"]))
    assert cfg.data[split] == dict(type="D", loop=2, cache="shared")
    cfg.merge_from_dict(parse_options([f"data.{split}.cache=true"]))
    assert cfg.data[split].cache is True
    with refused(f"did you mean data.{split}.cache"):
        cfg.merge_from_dict(parse_options([f"data.{split}.cach=true"]))


def test_digits_index_no_lists_in_files(write):
    path = write(base="a = [dict(x=1)]", child="_base_ = 'base.py'\na = {'0': dict(x=2)}")
    with refused("a is .* below and a dict here"):
        Config.fromfile(path)


def test_delete_and_new_keys_through_merge(cfg):
    cfg.merge_from_dict({"model": dict(_delete_=True, type="Other")})
    assert cfg.model == dict(type="Other")
    cfg.merge_from_dict({"a.b": 1}, allow_new=True)
    assert cfg.a.b == 1


def test_parser():
    parser = build_parser("text")
    args = parser.parse_args([])
    assert (args.config_file, args.num_gpus, args.num_machines) == ("", 1, 1)
    assert (args.machine_rank, args.dist_url, args.options) == (0, "auto", None)
    words = "--config-file a.py --num-gpus 2 --options a.b=1,2 c=x --options d=none a.b=3"
    args = parser.parse_args(words.split())
    assert (args.config_file, args.num_gpus) == ("a.py", 2)
    assert args.options == {"a.b": 3, "c": "x", "d": None}
    with refused("must read key=value"):
        parser.parse_args(["--options", "oops"])


def test_find_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "configs" / "street" / "big-net.py"
    path.parent.mkdir(parents=True)
    path.write_text("a = 1")
    for name in (
        "configs/street/big-net.py",
        "street/big-net.py",
        "street/big-net",
        "street-big-net",
        "street-big-net.py",
        path,
    ):
        assert find_config(name).resolve() == path.resolve()
    with refused("nearest: configs/street/big-net.py"):
        find_config("street/bignet.py")
    with refused("no config given"):
        find_config("")


# --------------------------------------------------------------------------------------------- runs


MINIMAL = "epoch = 6\neval_epoch = 2\ndata = dict(train=dict(type='D'))\n"


def test_setup_of_one_process():
    cfg = fill_defaults(Config(dict(num_worker=None, batch_size=6, seed=3)))
    default_setup(cfg)
    assert cfg.num_worker == cfg.num_worker_per_gpu == os.cpu_count()
    sizes = (cfg.batch_size_per_gpu, cfg.batch_size_val_per_gpu, cfg.batch_size_test_per_gpu)
    assert sizes == (6, 1, 1)
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    default_setup(cfg)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
    torch.manual_seed(3)
    assert torch.rand(1).item() == first[2]


def test_setup_of_several_processes(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "broadcast", lambda value: value)
    cfg = fill_defaults(Config(dict(num_worker=6, batch_size=4, batch_size_val=2, seed=10)))
    default_setup(cfg)
    assert (cfg.num_worker_per_gpu, cfg.batch_size_per_gpu, cfg.batch_size_val_per_gpu) == (3, 2, 1)
    # Process seed = seed + rank * workers per process.
    drawn = torch.rand(1).item()
    torch.manual_seed(13)
    assert torch.rand(1).item() == drawn
    for workers, each in ((0, 0), (1, 1), (2, 1)):
        cfg.num_worker = workers
        assert default_setup(cfg).num_worker_per_gpu == each
    cfg.batch_size = 5
    with refused("batch_size=5 must be a multiple of the 2 processes; set batch_size=6"):
        default_setup(cfg)


def test_setup_draws_a_missing_seed():
    cfg = fill_defaults(Config())
    default_setup(cfg)
    assert 0 <= cfg.seed < 2**31


def test_defaults_are_copies():
    cfg = fill_defaults(Config(dict(hooks=[])))
    assert cfg.hooks == []
    other = fill_defaults({})
    other["hooks"].append("changed")
    other["train"]["type"] = "changed"
    assert "changed" not in RUNTIME_DEFAULTS["hooks"]
    assert RUNTIME_DEFAULTS["train"] == dict(type="DefaultTrainer")


def test_seeds():
    assert set_seed(2**40) == 2**40
    assert os.environ["PYTHONHASHSEED"] == str(2**40 % 2**32)
    assert set_seed(None) != set_seed(None)


def test_no_warnings_from_reading(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.fromfile(write(a=MINIMAL))
