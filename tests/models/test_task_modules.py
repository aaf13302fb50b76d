from __future__ import annotations

import copy
import sys

import fake_tasks
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from refusal import expect_refusal
from torch import nn

import pl_prune as plp
from pl_prune.data import COCO, DIV2K, Cityscapes
from pl_prune.models import CARN, Detector, SemanticSegmenter, SuperResolution
from pl_prune.models.super_resolution import luma_psnr

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


@pytest.fixture
def trainer(tmp_path):
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def trained(trainer, module, data):
    """Fit and test, and return what was logged."""
    torch.manual_seed(0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e-3)
    before = copy.deepcopy(module.state_dict())
    trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    moved = [n for n, p in module.named_parameters() if not torch.equal(before[n], p)]
    assert len(moved) > 0.5 * len(list(module.parameters()))
    logged.update({name: float(value) for name, value in trainer.test(module, data, verbose=False)[0].items()})
    assert all(np.isfinite(value) for value in logged.values())
    return logged


def scored(module, data):
    """Prune half of the groups before a fit, with the module's own loss and scoring data; the parts that stay."""
    whole = sum(p.numel() for p in module.network.parameters())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e-3)
    pruner = plp.StructuredPruning(plp.Taylor(), 0.5, samples=plp.Samples(total=2, batch_size=2))
    Trainer(
        fast_dev_run=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruner],
    ).fit(module, data)
    assert pruner.groups is not None
    return sum(p.numel() for p in module.network.parameters()) / whole


def half(groups):
    return groups.expand({root: torch.arange(size) < (size + 1) // 2 for root, size in groups.sizes.items()})


def shrunk_equals_masked(network, inputs, look, groups):
    masks = half(groups)
    masked = copy.deepcopy(network)
    masks.apply_(dict(masked.named_parameters()))
    small = plp.shrink(network, masks, inputs, groups)
    with torch.no_grad():
        for a, b in zip(look(masked(inputs)), look(small(inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in network.parameters())


# segmentation


def miou(predictions, labels, classes):
    """The formula, class by class."""
    counted = labels != 255
    found = []
    for c in range(classes):
        both = ((predictions == c) & (labels == c) & counted).sum()
        either = (((predictions == c) | (labels == c)) & counted).sum()
        if either:
            found.append(both / either)
    return sum(found) / len(found)


class Constant(nn.Module):
    """Logits that are given, one batch after another."""

    def __init__(self, batches):
        super().__init__()
        self.batches = iter(batches)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return next(self.batches) + self.weight


def test_mean_iou_is_that_of_all_pixels_that_count(trainer):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 2, 5, 6, 7, generator=generator)
    logits[:, :, 4] = -9  # a class that is neither predicted nor there
    labels = torch.randint(4, (3, 2, 6, 7), generator=generator)
    labels[:, :, :2] = 255
    module = SemanticSegmenter(Constant(logits), num_classes=5)
    loader = torch.utils.data.DataLoader(
        [(torch.zeros(3, 6, 7), one) for batch in labels for one in batch], batch_size=2
    )
    found = trainer.test(module, loader, verbose=False)[0]
    expected = miou(logits.argmax(2).double(), labels.double(), 5)
    assert found["test/miou"] == pytest.approx(float(expected), abs=1e-6)
    losses = nn.functional.log_softmax(logits.double(), 2)
    right = losses.gather(2, labels.clamp(max=4)[:, :, None])[:, :, 0]
    expected = np.mean([-float(r[y != 255].mean()) for r, y in zip(right, labels, strict=True)])
    assert found["test/loss"] == pytest.approx(expected, abs=1e-6)


def test_auxiliary_logits_add_to_the_loss_of_training_alone():
    torch.manual_seed(0)
    module = SemanticSegmenter(fake_tasks.small_deeplab(), aux_weight=0.25).eval()
    x, y = torch.rand(2, 3, 16, 16), torch.randint(19, (2, 16, 16))
    found = module(x)
    module.log = lambda *args, **kwargs: None
    out, aux = (nn.functional.cross_entropy(found[name], y) for name in ("out", "aux"))
    torch.testing.assert_close(module.training_step((x, y), 0), out + 0.25 * aux)
    torch.testing.assert_close(module._step((x, y), "val"), out)
    assert torch.equal(module.predict_step((x, y), 0), found["out"].argmax(1))


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    fake_tasks.cityscapes(root)
    return Cityscapes(str(root), 16, 16, batch_size=2, workers=0)


def test_segmentation_trains_on_folders_and_its_network_shrinks(trainer, street):
    torch.manual_seed(0)
    logged = trained(trainer, SemanticSegmenter(fake_tasks.small_deeplab()), street)
    assert {"train/loss", "val/loss", "val/miou", "test/miou"} <= set(logged)
    network = fake_tasks.small_deeplab().double().eval()
    x = torch.rand(2, 3, 16, 16, dtype=torch.double)
    groups = plp.trace_groups(network, x)
    assert set(groups.rejected) == {"classifier.4", "aux_classifier.4"}
    assert shrunk_equals_masked(network, x, lambda out: (out["out"], out["aux"]), groups) < 0.4


def test_segmentation_is_scored_by_its_own_loss(street):
    assert scored(SemanticSegmenter(fake_tasks.small_deeplab()), street) < 0.7


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.MaxPool2d(2), ["(N, classes, 8, 8)", "MaxPool2d", "(2, 3, 4, 4)"]),
        (nn.Flatten(), ["'out'", "(2, 192)"]),
        (fake_tasks.Stem(("features",)), ["dict with ['features']"]),
    ],
)
def test_what_is_no_segmentation_network_is_refused(network, words):
    batch = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8).long()
    with expect_refusal(*words):
        SemanticSegmenter(network).training_step(batch, 0)


# super-resolution


@pytest.mark.parametrize(("groups", "giga"), [(1, 222.8), (4, 91.2)])
def test_carn_has_the_papers_multiplications(groups, giga):
    """CARN and CARN-M for images of 1280x720 (Table 1 there)."""
    network = CARN(2, groups=groups)
    traced = plp.trace_groups(network, torch.rand(2, 3, 8, 8))
    assert traced.cost({})[1] / 64 * 640 * 360 / 1e9 == pytest.approx(giga, abs=0.05)


def carn(network, x):
    """The cascades written out with functions and the network's weights."""
    p = {name: t.detach() for name, t in network.named_parameters()}

    def conv(name, x):
        weight = p[f"{name}.weight"]
        return nn.functional.conv2d(x, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def fuse(name, *features):
        return conv(name, torch.cat(features, 1)).relu()

    def residual(name, x):
        return (x + conv(f"{name}.body.2", conv(f"{name}.body.0", x).relu())).relu()

    def block(name, x):
        b1 = residual(f"{name}.blocks.0", x)
        o1 = fuse(f"{name}.fuse.0.0", x, b1)
        b2 = residual(f"{name}.blocks.1", o1)
        o2 = fuse(f"{name}.fuse.1.0", x, b1, b2)
        b3 = residual(f"{name}.blocks.2", o2)
        return fuse(f"{name}.fuse.2.0", x, b1, b2, b3)

    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1).to(x)
    e = conv("entry", x - mean)
    b1 = block("cascade.blocks.0", e)
    o1 = fuse("cascade.fuse.0.0", e, b1)
    b2 = block("cascade.blocks.1", o1)
    o2 = fuse("cascade.fuse.1.0", e, b1, b2)
    b3 = block("cascade.blocks.2", o2)
    features = conv("upsample.0", fuse("cascade.fuse.2.0", e, b1, b2, b3)).relu()
    n, c, h, w = features.shape
    shuffled = features.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    return conv("exit", shuffled) + mean


def test_carn_cascades_as_in_the_paper():
    torch.manual_seed(0)
    network, x = CARN(2, width=6).double(), torch.rand(2, 3, 5, 7, dtype=torch.double)
    network.mean = network.mean.float().double()
    torch.testing.assert_close(network(x), carn(network, x))
    for scale in (3, 4):
        assert CARN(scale, width=4)(torch.rand(1, 3, 5, 6)).shape == (1, 3, 5 * scale, 6 * scale)


@pytest.mark.parametrize("groups", [1, 2])
def test_carn_shrinks_exactly(groups):
    torch.manual_seed(0)
    network, x = CARN(2, width=8, groups=groups).double().eval(), torch.rand(2, 3, 6, 6, dtype=torch.double)
    traced = plp.trace_groups(network, x)
    assert set(traced.rejected) == {"exit"}
    assert shrunk_equals_masked(network, x, lambda out: [out], traced) < 0.4


def psnr(output, target, border):
    levels = [np.clip(np.round(x.double().numpy() * 255), 0, 255) for x in (output, target)]
    lumas = [16 + (65.481 * v[0] + 128.553 * v[1] + 24.966 * v[2]) / 255 for v in levels]
    h, w = lumas[0].shape
    error = (lumas[0] - lumas[1])[border : h - border, border : w - border]
    return 10 * np.log10(255**2 / (error**2).mean())


def test_the_ratio_is_that_of_brightness_within_the_border():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 9, 11, generator=generator)
    output = target + 0.1 * torch.randn(target.shape, generator=generator)
    for border in (0, 2, 4):
        expected = [psnr(o, t, border) for o, t in zip(output, target, strict=True)]
        assert luma_psnr(output, target, border).tolist() == pytest.approx(expected, abs=1e-4)
    assert luma_psnr(target, target).tolist() == [float("inf")] * 3
    with expect_refusal("one shape", "(3, 3, 9, 11)", "(3, 3, 9, 8)"):
        luma_psnr(output, target[..., :8])
    with expect_refusal("twice the border", "(9, 11)", "5"):
        luma_psnr(output, target, 5)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("div2k")
    fake_tasks.div2k(root)
    return DIV2K(str(root), patch=8, patches_per_image=2, batch_size=3, workers=0)


def test_super_resolution_trains_on_folders_and_tests_each_set(trainer, photographs):
    torch.manual_seed(0)
    module = SuperResolution(CARN(2, width=4))
    logged = trained(trainer, module, photographs)
    assert {"train/loss", "val/psnr", "test/psnr_Set14", "test/psnr_B100", "test/psnr_Urban100"} <= set(logged)
    with torch.no_grad():
        ratios = [
            luma_psnr(module(x), y, 2).item() for x, y, names in photographs.test_dataloader() if "Set14" in names
        ]
    assert len(ratios) == 2
    assert logged["test/psnr_Set14"] == pytest.approx(sum(ratios) / 2, abs=1e-4)


def test_super_resolution_is_scored_by_its_own_loss(photographs):
    assert scored(SuperResolution(CARN(2, width=4)), photographs) < 0.7


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CARN(5), ["scale of 2, 3 or 4", "5"]),
        (lambda: CARN(2, 10, 4), ["divide the width", "4", "10"]),
        (lambda: SuperResolution(nn.Identity(), -1), ["border of 0", "-1"]),
        (lambda: SemanticSegmenter(nn.Identity(), example_size=0), ["example_size to be", "0"]),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with expect_refusal(*words):
        make()


# detection


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    fake_tasks.coco(root)
    return COCO(str(root), batch_size=2, eval_batch_size=2, workers=0)


def test_detection_trains_on_folders(trainer, scenes):
    torch.manual_seed(0)
    logged = trained(trainer, Detector(fake_tasks.small_detector()), scenes)
    parts = ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    assert {*(f"train/{part}" for part in parts), "val/map", "test/map", "test/map_50"} <= set(logged)
    assert logged["train/loss"] == pytest.approx(sum(logged[f"train/{part}"] for part in parts[1:]), abs=1e-5)


class Oracle(nn.Module):
    """Boxes that are given."""

    def __init__(self, found):
        super().__init__()
        self.found = found
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.found


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 1.0), (4.0, 0.7), (40.0, 0.0)])
def test_precision_is_cocos(trainer, scenes, shift, expected):
    """One box of 40x40, shifted by d: its overlap is (40 - d) / (40 + d), which 0.50, 0.55 ... 0.95 are held against."""
    box = torch.tensor([[8.0, 8.0, 48.0, 48.0]]) + torch.tensor([shift, 0, shift, 0])
    found = [
        {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)},
    ]
    iou = max(0, 40 - shift) / (40 + shift)
    assert expected == pytest.approx(np.mean([iou >= 0.5 + 0.05 * i for i in range(10)]))
    logged = trainer.test(Detector(Oracle(found)), scenes, verbose=False)[0]
    assert logged["test/map"] == pytest.approx(expected, abs=1e-6)
    assert logged["test/map_50"] == pytest.approx(float(iou >= 0.5), abs=1e-6)


def test_a_detectors_network_is_scored_and_shrinks(scenes):
    torch.manual_seed(0)
    module = Detector(fake_tasks.small_detector())
    assert scored(module, scenes) < 0.8


def test_a_shrunk_detector_is_the_masked_one():
    torch.manual_seed(0)
    network = fake_tasks.small_detector().double().eval()
    x = torch.rand(2, 3, 64, 64, dtype=torch.double)
    groups = plp.trace_groups(network, x)
    assert {"rpn.head.cls_logits", "rpn.head.bbox_pred"} <= set(groups.rejected)

    def look(found):
        return [one[key] for one in found for key in ("boxes", "scores")]

    assert shrunk_equals_masked(network, x, look, groups) < 0.8


def test_scoring_a_detector_leaves_batch_norms_alone(scenes):
    module = Detector(fake_tasks.small_detector()).eval()
    module.log = lambda *args, **kwargs: None
    scenes.setup("fit")
    before = copy.deepcopy(dict(module.named_buffers()))
    loss = module.scoring_step(next(iter(scenes.scoring_dataloader())), 0)
    assert loss.requires_grad
    assert all(torch.equal(before[name], b) for name, b in module.named_buffers())


def test_a_missing_pycocotools_is_an_error_that_names_the_extra(monkeypatch):
    from torchmetrics.detection import mean_ap

    monkeypatch.setattr(mean_ap, "_PYCOCOTOOLS_AVAILABLE", False)
    monkeypatch.setattr(mean_ap, "_FASTER_COCO_EVAL_AVAILABLE", False)
    with expect_refusal("pycocotools", "pl_prune[detection]"):
        Detector(nn.Identity())


def test_reading_coco_without_pycocotools_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with expect_refusal("COCO", "pycocotools", "detection]"):
        COCO(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("kind", ["street", "photographs", "scenes"])
def test_panels_are_drawn_of_a_batch(kind, request):
    from pl_prune.report.images import image_panels

    torch.manual_seed(0)
    data = request.getfixturevalue(kind)
    data.setup("fit")
    module = {
        "street": lambda: SemanticSegmenter(fake_tasks.small_deeplab()),
        "photographs": lambda: SuperResolution(CARN(2, width=4)),
        "scenes": lambda: Detector(fake_tasks.small_detector()),
    }[kind]().eval()
    with torch.no_grad():
        found = module.panels(next(iter(data.val_dataloader())))
    assert "prediction" in found["columns"]
    assert image_panels("panels", "Panels", "What is seen.", **found).png.startswith(b"\x89PNG")
