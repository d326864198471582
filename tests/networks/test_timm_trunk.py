"""Models of timm as trunks: patch tokens in their places, last maps, local weight files. Needs timm for most of it."""

import importlib
import sys
import types

import pytest
import torch

from pointcept_kd.host import InputError
from pointcept_kd.networks import timm_trunk
from pointcept_kd.networks.image import ImageEncoder
from pointcept_kd.networks.image_segmentor import ImageSegmentor
from pointcept_kd.networks.timm_trunk import TimmTrunk
from pointcept_kd.networks.trunks import build_trunk

try:
    timm = timm_trunk.import_timm()
    reason = ""
except InputError as error:
    timm, reason = None, str(error)
needs_timm = pytest.mark.skipif(timm is None, reason=f"timm cannot be imported: {reason:.100}")

VIT = "vit_tiny_patch16_224"
DINO = "vit_small_patch14_dinov2"


def encoder(name, **kwargs):
    torch.manual_seed(0)
    return ImageEncoder(trunk=f"timm:{name}", allow_random=True, **kwargs)


@pytest.fixture(scope="module")
def vit():
    return encoder(VIT, heads=dict(a=5, b=3))


@needs_timm
def test_a_vision_transformer(vit):
    assert (vit.trunk.stride, vit.trunk.multiple, vit.trunk.out_channels) == (16, 16, 192)
    assert vit.trunk.mean == (0.5, 0.5, 0.5)
    torch.testing.assert_close(vit.std, torch.full((3, 1, 1), 0.5))
    images = torch.rand(2, 3, 48, 80)
    assert vit.features(images).shape == (2, 192, 3, 5)
    out = vit(images)
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "a": (2, 5, 48, 80),
        "b": (2, 3, 48, 80),
    }
    torch.testing.assert_close(out["a"].norm(dim=1), torch.ones(2, 48, 80))


@needs_timm
def test_dinov2():
    model = encoder(DINO, heads={})
    assert (model.trunk.stride, model.trunk.out_channels) == (14, 384)
    assert model.trunk.mean == (0.485, 0.456, 0.406)
    images = torch.rand(1, 3, 56, 70)
    assert model.features(images).shape == (1, 384, 4, 5)
    pixels = torch.tensor([[0, 55, 69], [0, 0, 0]])
    maps = model.features(images)[0]
    torch.testing.assert_close(
        model.features_at(images, pixels), torch.stack([maps[:, 3, 4], maps[:, 0, 0]])
    )
    with pytest.raises(InputError, match="images are 56 x 64; both sides must be multiples of 14"):
        model.features(images[..., :64])


@needs_timm
def test_patches_stand_where_the_image_has_them(vit):
    """Without attention, MLPs and positions every token is its patch's embedding: compared with a plain convolution."""
    trunk = build_trunk(f"timm:{VIT}").eval()
    model = trunk.model
    with torch.no_grad():
        model.pos_embed.zero_()
        for block in model.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
        images = torch.rand(2, 3, 32, 80)
        found = trunk(images)
        weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        for row in range(2):
            for column in range(5):
                patch = images[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                wanted = torch.einsum("nchw,ochw->no", patch, weight) + bias
                wanted = (wanted - wanted.mean(1, keepdim=True)) / (
                    wanted.var(1, keepdim=True, unbiased=False) + model.norm.eps
                ) ** 0.5
                torch.testing.assert_close(found[:, :, row, column], wanted, rtol=1e-4, atol=1e-4)


@needs_timm
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_medium_patch16_reg4_gap_256"])
def test_class_and_register_tokens_are_left_out(name):
    with torch.device("meta"):
        trunk = build_trunk(f"timm:{name}")
        prefix = trunk.model.num_prefix_tokens
        assert prefix in (4, 5)
        seen = trunk.model.forward_features(torch.rand(1, 3, 64, 96))
        assert seen.shape[1] == prefix + 24
        assert trunk(torch.rand(1, 3, 64, 96)).shape == (1, trunk.out_channels, 4, 6)


@needs_timm
@pytest.mark.parametrize(
    ("name", "channels"),
    [("convnext_atto", 320), ("resnet18", 512), ("efficientnet_lite0", 320)],
)
def test_other_networks_give_their_last_map(name, channels):
    model = encoder(name, heads={})
    assert (model.trunk.stride, model.trunk.out_channels) == (32, channels)
    images = torch.rand(1, 3, 64, 96)
    assert model.features(images).shape == (1, channels, 2, 3)
    with pytest.raises(InputError, match="must be multiples of 32"):
        model.features(images[:, :, :48])


@needs_timm
def test_resnet_of_timm_is_ours():
    """timm's ResNet-18 has torchvision's names: both trunks give the same features from one state dict."""
    theirs, ours = build_trunk("timm:resnet18").eval(), build_trunk("resnet18", 32).eval()
    ours.load_state_dict(theirs.model.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)
    theirs, ours = build_trunk("timm:resnet18", 8).eval(), build_trunk("resnet18", 8).eval()
    ours.load_state_dict(theirs.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)
        assert theirs(images).shape == (1, 512, 8, 12)


@needs_timm
def test_only_heads_learn(vit):
    vit.train()
    assert not any(module.training for module in vit.trunk.modules())
    assert not any(p.requires_grad for p in vit.trunk.parameters())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(vit(images)["a"], vit(images)["a"])
    sum((x**3).sum() for x in vit(images).values()).backward()
    assert {name for name, p in vit.named_parameters() if p.grad is not None} == {
        f"heads.{head}.{part}" for head in "ab" for part in ("weight", "bias")
    }
    assert vit.heads["a"].weight.grad.abs().max() > 0
    vit.zero_grad()


@needs_timm
def test_a_segmentor_can_train_one():
    torch.manual_seed(0)
    model = ImageSegmentor(2, "timm:convnext_atto")
    out = model(dict(images=torch.rand(1, 3, 32, 32), weak_labels=torch.ones(1, 32, 32).long()))
    out["loss"].backward()
    assert model.trunk.model.stem[0].weight.grad is not None


@needs_timm
@pytest.mark.parametrize("nesting", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "teacher.backbone."])
def test_weight_files(nesting, prefix, tmp_path):
    torch.manual_seed(1)
    source = timm.create_model(VIT, pretrained=False)  # with its classifier
    weights = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    torch.save(weights if nesting is None else {nesting: weights, "epoch": 3}, tmp_path / "w.pth")
    model = ImageEncoder(str(tmp_path / "w.pth"), "timm", {}, trunk=f"timm:{VIT}")
    for key, value in model.trunk.model.state_dict().items():
        assert torch.equal(source.state_dict()[key], value)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        wanted = source.eval().forward_features((images - 0.5) / 0.5)[:, 1:]
    torch.testing.assert_close(model.features(images).flatten(2).transpose(1, 2), wanted)


@needs_timm
def test_weights_in_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = timm.create_model("convnext_atto", pretrained=False)
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = ImageEncoder(
        str(tmp_path / "model.safetensors"), "timm", {}, trunk="timm:convnext_atto"
    )
    assert torch.equal(model.trunk.model.stem[0].weight, source.stem[0].weight)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="cut off or damaged"):
        ImageEncoder(str(tmp_path / "cut.safetensors"), "timm", {}, trunk="timm:convnext_atto")


@needs_timm
def test_names_of_the_original_release(tmp_path):
    """DINOv2's own files have a mask token, which timm's model has not."""
    source = timm.create_model(DINO, pretrained=False, num_classes=0).state_dict()
    torch.save({**source, "mask_token": torch.zeros(1, 384)}, tmp_path / "w.pth")
    model = ImageEncoder(str(tmp_path / "w.pth"), "timm", {}, trunk=f"timm:{DINO}")
    assert torch.equal(model.trunk.model.pos_embed, source["pos_embed"])
    assert model.trunk.model.pos_embed.shape == (1, 1 + 37 * 37, 384)


@needs_timm
def test_weight_files_that_do_not_fit(tmp_path):
    source = timm.create_model(VIT, pretrained=False, num_classes=0).state_dict()
    path = tmp_path / "w.pth"

    def load(weights, kind="timm", trunk=f"timm:{VIT}"):
        torch.save(weights, path)
        return ImageEncoder(str(path), kind, {}, trunk=trunk)

    with pytest.raises(InputError, match=r"lacks 1 of the .* entries of timm:.*norm\.bias"):
        load({key: value for key, value in source.items() if key != "norm.bias"})
    with pytest.raises(InputError, match=r"has 1 entries that .* has not, the first is more"):
        load({**source, "more": torch.zeros(1)})
    with pytest.raises(InputError, match=r"norm.bias is \(4,\), that of timm:.* \(192,\)"):
        load({**source, "norm.bias": torch.zeros(4)})
    with pytest.raises(InputError, match="lacks"):
        load(timm.create_model("convnext_atto", pretrained=False).state_dict())
    with pytest.raises(InputError, match="'timm' is for trunks timm:NAME"):
        load(source, kind="dino")
    with pytest.raises(InputError, match="'timm' is for trunks timm:NAME"):
        load(source, trunk="resnet50")
    with pytest.raises(InputError, match="does not exist"):
        ImageEncoder(str(tmp_path / "none.pth"), "timm", {}, trunk=f"timm:{VIT}")
    with pytest.raises(InputError, match="does not exist"):
        ImageEncoder(str(tmp_path / "none.safetensors"), "timm", {}, trunk=f"timm:{VIT}")


@needs_timm
def test_models_that_do_not_fit():
    with pytest.raises(InputError, match="has no model 'vit_tinier'; there are"):
        TimmTrunk("vit_tinier")
    with pytest.raises(InputError, match="stride=8 of timm:vit_tiny_patch16_224"):
        TimmTrunk(VIT, 8)
    with pytest.raises(InputError, match="timm:resnet18 with {'output_stride': 5}"):
        TimmTrunk("resnet18", 5)
    with pytest.raises(InputError, match="the image trunk has no weights"):
        ImageEncoder(trunk=f"timm:{VIT}")


def test_nothing_is_fetched(monkeypatch):
    """Every model is asked for without weights."""
    asked = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.feature_info = [{"reduction": 32, "num_chs": 7}]
            self.pretrained_cfg = dict(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), classifier=("a", "b"))

        def forward_intermediates(self, images, **kwargs):
            return [images[:, :1, ::32, ::32].expand(-1, 7, -1, -1)]

    def create(name, **kwargs):
        asked.append(kwargs)
        if "dynamic_img_size" in kwargs:
            raise TypeError("unexpected keyword argument 'dynamic_img_size'")
        return Network()

    fake = types.SimpleNamespace(
        is_model=lambda name: True, create_model=create, __version__="1", list_models=list
    )
    monkeypatch.setattr(timm_trunk, "import_timm", lambda: fake)
    trunk = TimmTrunk("any")
    assert len(asked) == 2
    assert all(kwargs["pretrained"] is False for kwargs in asked)
    assert all(kwargs["num_classes"] == 0 for kwargs in asked)
    assert (trunk.mean, trunk.stride, trunk.classifier) == ((0.1, 0.2, 0.3), 32, ("a.", "b."))
    assert trunk(torch.rand(2, 3, 64, 32)).shape == (2, 7, 2, 1)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(timm_trunk, "_import_torchvision", lambda: None)
    with pytest.raises(InputError, match=r"need timm and torchvision .*pip install"):
        build_trunk("timm:anything")


def test_torchvision_for_another_torch(monkeypatch):
    """Its operators are declared once, and it is imported again."""
    tries, defined = [], []

    def load(name):
        tries.append(name)
        if not defined:
            raise RuntimeError("operator torchvision::nms does not exist")

    class Library:
        def __init__(self, space, kind):
            assert (space, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema):
            defined.append(schema.partition("(")[0])

    monkeypatch.setattr(timm_trunk, "_library", None)
    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(torch.library, "Library", Library)
    timm_trunk._import_torchvision()
    assert tries == ["torchvision"] * 2
    assert defined == ["nms", "qnms"]
    defined.clear()
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # any other failure is told as it is
        timm_trunk._import_torchvision()
    assert not defined
