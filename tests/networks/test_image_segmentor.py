"""The segmentor of images: loss and scores by hand, learning, and its trunk in an encoder."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.host.hooks import compare, scan_losses
from pointcept_kd.host.loader import Compose, collate_fn
from pointcept_kd.host.metrics import confusion, summary
from pointcept_kd.networks.image import ImageEncoder, enlarge
from pointcept_kd.networks.image_segmentor import ImageSegmentor

from .test_resnet import TINY, with_statistics

SMALL = dict(depths=(1, 1, 1, 1), width=4, bottleneck=False)


def batch(images=2, height=16, width=24, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return dict(
        images=torch.rand(images, 3, height, width, generator=generator),
        weak_labels=torch.randint(0, classes + 1, (images, height, width), generator=generator),
    )


def test_loss_and_scores_by_hand():
    torch.manual_seed(0)
    model = MODELS.build(dict(type="kd.ImageSegmentor", num_classes=3, trunk=SMALL))
    with_statistics(model)
    data = batch()
    out = model(data)
    features = model.trunk((data["images"] - model.mean) / model.std)
    weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    maps = torch.einsum("nchw,kc->nkhw", features, weight) + bias[:, None, None]
    maps = enlarge(maps, (16, 24))
    assert out["seg_logits"].shape == (2 * 16 * 24, 3)
    torch.testing.assert_close(out["seg_logits"].view(2, 16, 24, 3), maps.permute(0, 2, 3, 1))
    losses = []
    for n in range(2):
        for row in range(16):
            for column in range(24):
                label = int(data["weak_labels"][n, row, column])
                if label:
                    scores = maps[n, :, row, column]
                    losses.append(scores.logsumexp(0) - scores[label - 1])
    assert len(losses) < 2 * 16 * 24
    torch.testing.assert_close(out["loss"], torch.stack(losses).mean())


def test_training_returns_the_loss_alone():
    model = ImageSegmentor(3, SMALL).train()
    out = model(batch())
    assert set(out) == {"loss"}
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_without_labels():
    model = ImageSegmentor(3, SMALL).eval()
    assert set(model(dict(images=torch.rand(1, 3, 8, 8)))) == {"seg_logits"}


def test_criteria_of_the_config():
    entries = [
        dict(type="CrossEntropyLoss", ignore_index=-1, loss_weight=2.0),
        dict(type="LovaszLoss", mode="multiclass", ignore_index=-1),
    ]
    torch.manual_seed(1)
    model = ImageSegmentor(3, SMALL, criteria=entries).eval()
    data = batch()
    out = model(data)
    wanted = build_criteria(entries)(out["seg_logits"], data["weak_labels"].flatten() - 1)
    torch.testing.assert_close(out["loss"], wanted)
    plain = F.cross_entropy(out["seg_logits"], data["weak_labels"].flatten() - 1, ignore_index=-1)
    assert out["loss"] > 2 * plain


def test_frozen_trunk():
    model = ImageSegmentor(3, SMALL, freeze_trunk=True).train()
    assert not any(module.training for module in model.trunk.modules())
    assert model.classifier.training
    before = {key: value.clone() for key, value in model.trunk.state_dict().items()}
    model(batch())["loss"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert all(torch.equal(before[key], value) for key, value in model.trunk.state_dict().items())


def test_learns_colours():
    """Left halves red, right halves blue: the classes are learned, the unlabelled middle says nothing."""
    torch.manual_seed(2)
    images = torch.rand(2, 3, 32, 32) * 0.2
    images[:, 0, :, :16] += 0.7
    images[:, 2, :, 16:] += 0.7
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[..., :12], labels[..., 20:] = 1, 2
    model = ImageSegmentor(2, SMALL).train()
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    data = dict(images=images, weak_labels=labels)
    first = None
    for _ in range(30):
        steps.zero_grad()
        loss = model(data)["loss"]
        first = loss.item() if first is None else first
        loss.backward()
        steps.step()
    assert loss.item() < 0.3 * first
    scores = model.train(False)(data)["seg_logits"].argmax(1).view(2, 32, 32)
    known = labels > 0
    assert (scores[known] == labels[known] - 1).float().mean() > 0.95


def test_its_trunk_in_an_encoder(tmp_path):
    """The whole way: a checkpoint as the run's saver writes it, read as the trunk of an encoder."""
    model = with_statistics(ImageSegmentor(19, TINY), seed=5)
    path = tmp_path / "model_best.pth"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    encoder = ImageEncoder(str(path), "segmentor", heads={}, trunk=TINY)
    images = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(images), model.read(images))
    with pytest.raises(
        InputError, match=r"trunk\.conv1\.weight is \(16, 3, 7, 7\), the trunk's \(8,"
    ):
        ImageEncoder(str(path), "segmentor", trunk=dict(TINY, width=8))
    again = ImageSegmentor(2, TINY, weight=str(path), kind="segmentor")
    assert torch.equal(again.trunk.conv1.weight, model.trunk.conv1.weight)


def test_what_the_evaluator_makes_of_it():
    """The pixels of a sample are its points: the loss of each, intersection over union by counting pixels."""
    torch.manual_seed(3)
    model = ImageSegmentor(3, SMALL).eval()
    samples = [batch(images, seed=seed) for seed, images in enumerate((1, 2))]
    collect = dict(
        type="Collect",
        keys=("images", "weak_labels", "segment"),
        offset_keys_dict=dict(offset="segment"),
    )
    chain = Compose([dict(type="kd.WeakLabelsToSegment"), dict(type="ToTensor"), collect])
    data = collate_fn([chain(sample) for sample in samples])
    assert data["offset"].tolist() == [16 * 24, 3 * 16 * 24]
    with torch.no_grad():
        out = model(data)
    pred, target, _ = compare(out["seg_logits"], data)
    found = summary(confusion(pred, target, 3, -1)).iou
    told = out["seg_logits"].view(3, 16, 24, 3).argmax(3)
    for k in range(3):
        ours = (told == k) & (data["weak_labels"] > 0)
        theirs = data["weak_labels"] == k + 1
        assert found[k] == pytest.approx(float((ours & theirs).sum() / (ours | theirs).sum()))
    alone = [float(model(sample)["loss"].detach()) for sample in samples]
    assert scan_losses(model, out, data) == pytest.approx(alone)


def test_bad_input():
    model = ImageSegmentor(3, SMALL)
    data = batch()
    with pytest.raises(InputError, match="num_classes=0"):
        ImageSegmentor(0, SMALL)
    with pytest.raises(InputError, match="training needs `weak_labels`"):
        model(dict(images=data["images"]))
    with pytest.raises(InputError, match=r"weak_labels are \(2, 8, 24\), the images \(2, 16, 24\)"):
        model(dict(data, weak_labels=data["weak_labels"][:, :8]))
    with pytest.raises(InputError, match="num_classes=3 allows 0 .. 3"):
        model(dict(data, weak_labels=data["weak_labels"] + 1))
    with pytest.raises(InputError, match="must be multiples of 4"):
        model(batch(height=18))
