"""Names become classes: scopes, parents, refusals and their texts."""

import pytest

from pointcept_kd.host import InputError, Registry, stand_in


@pytest.fixture
def root():
    return Registry("models")


@pytest.fixture
def child(root):
    return Registry("models", scope="kd", parent=root)


class Alpha:
    def __init__(self, depth, width=3):
        self.depth, self.width = depth, width


class Beta:
    def __init__(self, **kwargs):
        self.kwargs = kwargs


def test_decorator_call_and_list_of_names(root):
    @root.register_module()
    class Gamma:
        pass

    root.register_module(module=Alpha)
    root.register_module(["b1", "b2"], module=Beta)
    assert root.get("Gamma") is Gamma
    assert root.get("Alpha") is Alpha
    assert root.get("b1") is root.get("b2") is Beta
    assert len(root) == 4
    assert "Alpha" in root
    assert "Delta" not in root


def test_second_registration(root):
    root.register_module("x", module=Alpha)
    root.register_module("x", module=Alpha)
    with pytest.raises(KeyError, match="registered in the models registry already"):
        root.register_module("x", module=Beta)
    root.register_module("x", module=Beta, force=True)
    assert root.get("x") is Beta


def test_refused_list_leaves_nothing_behind(root):
    root.register_module("x", module=Alpha)
    with pytest.raises(KeyError):
        root.register_module(["new", "x"], module=Beta)
    assert "new" not in root


@pytest.mark.parametrize("name", ["a.b", "kd.X"])
def test_dot_in_a_name(root, name):
    with pytest.raises(KeyError, match="scope"):
        root.register_module(name, module=Alpha)


def test_only_classes_and_strings(root):
    with pytest.raises(TypeError, match="only classes"):
        root.register_module("f", module=lambda: None)
    with pytest.raises(TypeError, match="non-empty string"):
        root.register_module([3], module=Alpha)
    with pytest.raises(TypeError, match="parentheses"):
        root.register_module(Alpha)


def test_scopes(root, child):
    root.register_module("R", module=Alpha)
    child.register_module("C", module=Beta)
    assert root.get("kd.C") is Beta
    assert root.get("pointcept.R") is Alpha
    assert root.get("C") is None
    assert child.get("C") is child.get("kd.C") is Beta
    assert child.get("R") is child.get("pointcept.R") is child.get("kd.R") is Alpha
    assert child.get("other.R") is root.get("other.R") is None
    assert sorted(root.names()) == ["R", "kd.C"]
    with pytest.raises(KeyError, match="scope"):
        Registry("models", scope="kd", parent=root)


def test_child_may_differ_from_root(root, child):
    root.register_module("X", module=Alpha)
    stand_in(root, child, "X")(Beta)
    assert root.get("X") is Alpha
    assert root.get("kd.X") is child.get("X") is Beta


def test_stand_in_fills_an_empty_root(root, child):
    assert stand_in(root, child, "X")(Beta) is Beta
    stand_in(root, child, "X")(Beta)
    assert root.get("X") is root.get("kd.X") is Beta


def test_build_leaves_the_config_alone(root):
    root.register_module(module=Alpha)
    cfg = dict(type="Alpha", depth=2)
    built = root.build(cfg, default_args=dict(depth=9, width=7))
    assert (built.depth, built.width) == (2, 7)
    assert cfg == dict(type="Alpha", depth=2)
    assert isinstance(root.build(dict(type=Beta, q=1)), Beta)
    assert root.build(dict(type=Beta, q=1)).kwargs == dict(q=1)


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (dict(depth=1), "needs a `type`; got keys"),
        ([1], "builds from a dict"),
        (dict(type=3), "must be a name or a class"),
        (dict(type="Alpa"), "nearest: Alpha"),
        (dict(type="alpha"), "nearest: Alpha"),
        (dict(type="Zzzzzz"), "known: Alpha"),
        (dict(type="Alpha", depht=1), "does not take 'depht'; did you mean depth"),
        (dict(type="Alpha", q=1), "it takes depth, width"),
        (dict(type="Alpha"), "needs 'depth'"),
    ],
)
def test_bad_entries(root, cfg, text):
    root.register_module(module=Alpha)
    with pytest.raises(InputError, match=text) as caught:
        root.build(cfg)
    assert "\n" not in str(caught.value)


def test_nearest_prefers_the_plain_name(root, child):
    stand_in(root, child, "PT-v3m1")(Beta)
    with pytest.raises(InputError, match="nearest: PT-v3m1$"):
        root.build(dict(type="PT-v3m2x"))
    child.register_module("Distiller", module=Alpha)
    with pytest.raises(InputError, match=r"nearest: kd\.Distiller"):
        root.build(dict(type="kd.Distiler"))


def test_empty_registry_says_so(root):
    with pytest.raises(InputError, match="it is empty"):
        root.build(dict(type="Alpha"))


def test_constructor_errors_pass_unchanged(root):
    class Picky(Exception):
        def __init__(self, code, detail):
            super().__init__(f"{code}: {detail}")
            self.code = code

    @root.register_module()
    class Fails:
        def __init__(self):
            raise Picky(7, "no")

    with pytest.raises(Picky, match="7: no") as caught:
        root.build(dict(type="Fails"))
    assert caught.value.code == 7
