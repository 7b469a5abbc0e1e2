"""Networks of grey pictures, and with other numbers of classes than ImageNet's, from end to end."""

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import factory
from guided_diffusion.config import UserError, load_training_config
from guided_diffusion.images.tensors import as_grey, luma
from guided_diffusion.networks.unet import UNet
from guided_diffusion.training.build import build_trainer, sample_writer
from guided_diffusion.training.crops import RandomCrops
from guided_diffusion.training.data import TrainingImages
from tests.support.case import Case
from tests.support.checkpoints import ROOT, TINY_FILE
from tests.support.networks import load_written

PORTRAIT = ROOT / "data/datasets/gts/portraits"
COLOURS = np.asarray(Image.open(sorted(PORTRAIT.glob("*.png"))[0]).convert("RGB"))


def grey_weights() -> dict[str, torch.Tensor]:
    """The weights of a network that sees a grey picture as the coloured one sees it."""
    weights = torch.load(TINY_FILE, weights_only=True)
    stem = weights["input_blocks.0.0.weight"].sum(1, keepdim=True)
    outputs = {key: weights[key][[0, 3]] for key in ("out.2.weight", "out.2.bias")}
    return weights | {"input_blocks.0.0.weight": stem} | outputs


@pytest.fixture
def grey(tmp_path) -> Case:
    case = Case(tmp_path, images=2)
    torch.save(grey_weights(), tmp_path / "grey.pt")
    case.config |= {"model_path": str(tmp_path / "grey.pt"), "in_channels": 1, "log_every": 2}
    return case


def assert_grey(pictures: dict[str, np.ndarray]) -> None:
    assert len(pictures) == 2
    for picture in pictures.values():
        assert picture.shape == (32, 32, 3) and (picture == picture[..., :1]).all()


def test_a_grey_network_makes_grey_pictures_of_coloured_ones(grey):
    results = grey.finish()
    assert_grey(results)
    assert_grey(grey.written("gt"))
    assert_grey(grey.written("gt_masked"))
    kept = {name: mask == 255 for name, mask in grey.written("gt_keep_mask").items()}
    for name, gt in grey.written("gt").items():
        coloured = np.asarray(Image.open(grey.folder / "gts" / name).convert("RGB"))
        assert (coloured != coloured[..., :1]).any()
        # Written pictures are cut down to whole levels, as the original's are.
        assert abs(gt.astype(int) - as_grey(coloured)).max() <= 1
        known = kept[name]
        assert abs(results[name].astype(int) - gt)[known].mean() < 5


def test_a_grey_picture_is_the_same_whether_its_file_is_grey_or_not(grey):
    results = grey.finish()
    for path in (grey.folder / "gts").iterdir():
        Image.open(path).convert("L").save(path)
    grey.write_to("again")
    again = grey.finish()
    assert all((results[name] == again[name]).all() for name in results)


def test_photos_around_holes_are_grey_too(grey):
    grey.dataset["fit"] = "region"
    assert_grey(grey.finish())


def test_known_pixels_of_a_grey_network_come_out_grey_and_exact(grey):
    grey.config["paste_known"] = True
    result = grey.finish()
    for name, mask in grey.written("gt_keep_mask").items():
        coloured = np.asarray(Image.open(grey.folder / "gts" / name).convert("RGB"))
        assert (result[name] == as_grey(coloured))[mask == 255].all()


@pytest.mark.parametrize("paste_known", [True, False])
def test_python_gets_grey_pictures_and_tensors(grey, paste_known):
    overrides = [f"paste_known={str(paste_known).lower()}"]
    inpaint = factory.load_inpainter(grey.conf_path(), "cpu", overrides)
    image = Image.fromarray(COLOURS[:32, :32])
    mask = Image.fromarray(np.repeat(np.arange(32) < 16, 32).reshape(32, 32))
    result = np.asarray(inpaint(image, mask.convert("L"), seed=3))
    assert (result == result[..., :1]).all()
    pictures = torch.tensor(COLOURS[:32, :32] / 127.5 - 1).permute(2, 0, 1)[None].float()
    keep = torch.zeros(1, 1, 32, 32)
    keep[:, :, :16] = 1
    x = inpaint(pictures, keep, seed=3)
    assert x.shape == (1, 3, 32, 32) and (x == x[:, :1]).all()
    if paste_known:
        assert torch.equal(x[0, :, :16], luma(pictures).expand(-1, 3, -1, -1)[0, :, :16])


def test_luma_is_that_of_pillow_and_leaves_grey_as_it_is():
    x = torch.tensor(COLOURS).permute(2, 0, 1)[None].float()
    assert abs(luma(x)[0, 0].numpy() - as_grey(COLOURS)[..., 0]).max() <= 0.51
    levels = torch.linspace(-1, 1, 256)[None, None, None].expand(1, 3, 1, 256)
    assert torch.equal(luma(levels), levels[:, :1])


@pytest.mark.parametrize("value", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"in_channels: found . *; accepted: 3 \(colours\) or 1 \("):
        load_written(tmp_path, {"in_channels": value})


# ---- Training ----------------------------------------------------------------------------------


def test_training_images_are_grey(tmp_path):
    for images in (
        TrainingImages(str(PORTRAIT), 32, channels=1),
        RandomCrops(str(PORTRAIT), 32, (1.0, 1.0), channels=1),
    ):
        first = next(iter(images.batches(1, seed=0, first_step=0)))[0]
        picture, _ = images[first]
        assert picture.shape == (1, 32, 32) and picture.min() >= -1 and picture.max() <= 1
    whole, _ = TrainingImages(str(PORTRAIT), 64, channels=1)[0]
    assert torch.equal(whole[0], torch.tensor(as_grey(COLOURS)[..., 0] / np.float32(127.5)) - 1)


# ---- Classes -----------------------------------------------------------------------------------


def test_a_network_has_as_many_classes_as_the_config_says(tmp_path):
    config = load_written(tmp_path, {"class_cond": True, "num_classes": 10})
    with torch.device("meta"):
        assert UNet(config.network.params).label_emb.weight.shape == (10, 512)
    guided = {"classifier_path": "x.pt", "classifier_scale": 1, "num_classes": 10}
    networks = factory.build_networks(load_written(tmp_path, guided))
    assert networks["classifier"].network.state_dict()["out.2.c_proj.weight"].shape[0] == 10


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 1000), (3, 7)])
def test_classifiers_have_the_channels_and_classes_of_the_denoiser(
    tmp_path, pool, channels, classes
):
    keys = {"in_channels": channels, "num_classes": classes, "classifier_pool": pool}
    guided = {**keys, "classifier_path": "x.pt", "classifier_scale": 1, "classifier_width": 64}
    network = factory.build_networks(load_written(tmp_path, guided))["classifier"].network
    with torch.device("meta"):
        logits = network(torch.zeros(2, channels, 64, 64), torch.zeros(2))
    assert logits.shape == (2, classes)


@pytest.mark.parametrize(("classes", "label"), [(10, 10), (10, -1), (1000, 1000), (1, 1)])
def test_a_class_that_the_network_does_not_know_is_refused(tmp_path, classes, label):
    with pytest.raises(UserError) as error:
        load_written(tmp_path, {"num_classes": classes, "cond_y": label})
    accepted = f"accepted: null or a whole number from 0 to {classes - 1}"
    assert f"cond_y: found {label}; {accepted}" in str(error.value)
    load_written(tmp_path, {"num_classes": classes, "cond_y": classes - 1})


def test_classes_are_drawn_among_those_of_the_network(tmp_path):
    case = Case(tmp_path, images=1)
    weights = torch.load(TINY_FILE, weights_only=True)
    torch.save(weights | {"label_emb.weight": torch.zeros(3, 128)}, tmp_path / "three.pt")
    case.config |= {"model_path": str(tmp_path / "three.pt"), "class_cond": True, "num_classes": 3}
    inpainter = factory.load_inpainter(case.conf_path(), "cpu")
    assert inpainter.num_classes == 3
    assert len(case.finish()) == 1  # of a thousand, nearly all would be out of range


def test_training_takes_as_many_folders_as_there_are_classes(tmp_path):
    for number in range(3):
        (tmp_path / "data" / f"{number}").mkdir(parents=True)
        Image.fromarray(COLOURS).save(tmp_path / "data" / f"{number}" / "x.png")
    text = (ROOT / "confs/train_portraits.yml").read_text()
    (tmp_path / "train.yml").write_text(text)
    overrides = [f"data_dir={tmp_path / 'data'}", "class_cond=true", "batch_size=2"]

    def trainer(classes: int):
        config = load_training_config(
            tmp_path / "train.yml", [*overrides, f"num_classes={classes}", "device=cpu"]
        )
        return build_trainer(config)[0]

    assert trainer(3).network.label_emb.weight.shape[0] == 3
    with pytest.raises(UserError, match="has 3 folders .* network knows 2: merge folders"):
        trainer(2)


def test_a_grey_network_learns_and_is_drawn(tmp_path):
    overrides = [f"data_dir={PORTRAIT}", "in_channels=1", "device=cpu", "image_size=32"]
    overrides += ["num_channels=32", "channel_mult='1,2'", "attention_resolutions=16"]
    overrides += ["batch_size=2", "sample_number=1", "use_bf16=false", "learn_sigma=true"]
    overrides += ["diffusion_steps=10", f"log_dir={tmp_path}"]
    config = load_training_config(ROOT / "confs/train_portraits.yml", overrides)
    trainer, images = build_trainer(config)
    pictures = torch.stack([images[i][0] for i in range(2)])
    assert pictures.shape == (2, 1, 32, 32)
    weights = dict(trainer.network.state_dict())
    sample_writer(config, torch.device("cpu"), 1)(weights, f"{tmp_path}/grid.png")
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert (drawn == drawn[..., :1]).all()
