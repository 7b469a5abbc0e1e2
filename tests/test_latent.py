"""Latent diffusion: the golden runs, pictures of any size, and the command as for pixels."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from guided_diffusion import factory, load_inpainter
from guided_diffusion.config import load_config
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.images.files import read_rgb
from guided_diffusion.images.tensors import image_to_tensor, mask_to_tensor
from guided_diffusion.latent import LatentInpainter, latent_process
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.streams import Evaluation
from tests.support.latent_runs import GOLDEN, LatentCase

CASES = ("ddim10", "ddim7_eta")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> LatentCase:
    return LatentCase(tmp_path_factory.mktemp("latent"), ddim_steps=2)


@pytest.fixture(scope="module")
def inpaint(case) -> LatentInpainter:
    """Two steps, whatever size."""
    return load_inpainter(case.conf_path())


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(read_rgb(str(path))) for path in sorted(folder.iterdir())]


def known(folder: Path) -> list[np.ndarray]:
    """bool (H, W) of each mask."""
    return [mask[..., 0] >= 128 for mask in pictures(folder)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- Against the original --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_golden_tensors(name, tmp_path):
    """The latents after the last step, and what they decode to, within 1e-3."""
    case = LatentCase(tmp_path / name, name)
    inpaint = load_inpainter(case.conf_path())
    golden = np.load(GOLDEN / name / "tensors.npz")
    for i, (image, mask) in enumerate(
        zip(pictures(case.folder / "gts"), pictures(case.folder / "masks"), strict=True)
    ):
        last: list[Evaluation] = []
        x = inpaint.sample(
            image_to_tensor(image)[None],
            mask_to_tensor(mask)[None],
            [case.config["seed"] + i],
            after_evaluation=lambda evaluation, last=last: last.append(evaluation),
        )
        z, decoded = (torch.from_numpy(golden[f"{kind}_{i}"]) for kind in ("latent", "decoded"))
        assert (last[-1].x - z).abs().max() < 1e-3 * z.abs().max()
        hole = mask_to_tensor(mask)[None] < 0.5
        difference = (x - decoded.clamp(-1, 1)).abs()
        assert difference[hole].max() < 1e-3 * decoded.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_golden_pictures(name, tmp_path):
    """One level apart in the hole at most, and the input's own bytes outside it."""
    case = LatentCase(tmp_path / name, name)
    results = case.finish()
    expected = pictures(GOLDEN / name / "expected")
    gts, keeps = pictures(case.folder / "gts"), known(case.folder / "masks")
    for result, want, gt, keep in zip(results.values(), expected, gts, keeps, strict=True):
        difference = np.abs(result.astype(int) - want)[~keep]
        assert difference.max() <= 1 and (difference > 0).mean() < 0.001
        assert (result[keep] == gt[keep]).all()


# ---- The process of latents ------------------------------------------------------------------


def test_process_takes_the_published_betas_and_ends_at_the_first_of_them():
    process = latent_process([0, 1, 999])
    abar = process.diffusion.alphas_cumprod
    assert abar[0] == pytest.approx(1 - 0.0015, rel=1e-12)
    # √β grows in equal steps, so that the sum of log(1 − β) has no closed form but a known value.
    roots = [0.0015**0.5 + i / 999 * (0.0205**0.5 - 0.0015**0.5) for i in range(1000)]
    assert abar[1] == pytest.approx((1 - roots[0] ** 2) * (1 - roots[1] ** 2), rel=1e-12)
    assert abar[2] == pytest.approx(np.prod([1 - root**2 for root in roots]), rel=1e-9)
    assert process.network_times.tolist() == [0, 1, 999]


# ---- Sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (50, 33), (1, 1), (3, 70)])
def test_pictures_of_any_size_are_continued_by_their_mirror_image(inpaint, size):
    """As if NumPy had padded picture and mask, and the result had been cropped."""
    height, width = size
    image = noise(height, width, 3)
    keep = (noise(height, width, seed=1) > 128) * np.uint8(255)
    keep[-1, -1] = 0
    below, right = -height % 16, -width % 16  # 4 of the autoencoder, 4 of the network
    padded = [
        np.pad(array, [(0, below), (0, right), (0, 0)], mode="reflect")
        for array in (image, np.repeat(keep[..., None], 3, axis=2))
    ]
    gt, mask = image_to_tensor(padded[0])[None], mask_to_tensor(padded[1])[None]
    expected = inpaint.sample(gt, mask, [3])[..., :height, :width]
    crop = (..., slice(height), slice(width))
    x = inpaint.sample(gt[crop], mask[crop], [3])
    assert x.shape == (1, 3, height, width)
    assert torch.equal(x, expected)
    pasted = inpaint(gt[crop], mask[crop], seed=3)
    assert torch.equal(pasted, torch.where(mask[crop] == 1, gt[crop], x))


def test_published_multiple_is_32(tmp_path):
    case = LatentCase(tmp_path)
    case.config["latent"] = {}
    with (
        patch.object(factory, "check_checkpoints", factory.build_networks),
        patch("guided_diffusion.factory.load_network"),
        patch("guided_diffusion.factory.load_autoencoder"),
    ):
        assert load_inpainter(case.conf_path()).multiple == 32


def test_a_pictures_result_does_not_depend_on_its_batch(inpaint):
    gt = torch.stack([image_to_tensor(noise(48, 64, 3, seed=i)) for i in range(3)])
    keep = torch.ones(3, 3, 48, 64)
    keep[:, :, 10:30, 20:50] = 0
    together = inpaint.sample(gt, keep, [5, 6, 7])
    alone = torch.cat([inpaint.sample(gt[i : i + 1], keep[:1], [5 + i]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-4


# ---- Masks -----------------------------------------------------------------------------------


def test_colours_of_a_mask_are_cut_as_pillow_makes_them_grey(inpaint):
    colours = noise(64, 64, 3, seed=2)
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    cut = inpaint.prepare_mask(mask_to_tensor(colours)[None])
    clear = np.abs(grey.astype(int) - 127.5) > 1  # where rounding cannot matter
    assert ((cut[0, 0].numpy() == 1) == (grey >= 128))[clear].all()
    assert torch.equal(cut[:, :1].expand(-1, 3, -1, -1), cut)


def test_greys_of_a_mask_are_cut_at_one_half(inpaint):
    keep = torch.tensor([0, 127 / 255, 0.5, 128 / 255, 1]).view(1, 1, 1, 5)
    assert inpaint.prepare_mask(keep).flatten().tolist() == [0, 0, 0, 1, 1]
    levels = torch.arange(256).view(1, 1, 1, 256).expand(1, 3, 1, 256) / 255
    assert inpaint.prepare_mask(levels)[0, 0, 0].tolist() == [0] * 128 + [1] * 128


def test_nothing_of_a_holes_content_reaches_the_result(inpaint):
    keep = torch.ones(1, 3, 64, 64)
    keep[..., 20:40] = 0
    one, other = (image_to_tensor(noise(64, 64, 3, seed=i))[None] for i in range(2))
    other = torch.where(keep == 1, one, other)
    assert torch.equal(inpaint.sample(one, keep, [1]), inpaint.sample(other, keep, [1]))


# ---- From Python -----------------------------------------------------------------------------


def test_pictures_and_tensors_of_any_size_from_python(inpaint):
    image, mask = Image.fromarray(noise(40, 70, 3)), Image.new("L", (70, 40), 255)
    mask.paste(0, (10, 10, 40, 30))
    result = np.asarray(inpaint(image, mask, seed=4))
    keep = np.asarray(mask) == 255
    assert result.shape == (40, 70, 3)
    assert (result[keep] == np.asarray(image)[keep]).all()
    assert (result[~keep] != np.asarray(image)[~keep]).any()
    gt = image_to_tensor(np.asarray(image))[None]
    x = inpaint(gt, torch.from_numpy(keep)[None, None].float(), seed=4)
    truncated = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert (truncated[~keep] == result[~keep]).all()


def test_whole_photos_from_python_keep_their_colour_profile(inpaint, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = profile[:16] + b"CMYK" + profile[20:]
    mask = Image.new("L", (70, 40), 255)
    mask.paste(0, (0, 0, 40, 30))
    for icc, kept in ((profile, profile), (cmyk, None), (b"damaged", None)):
        Image.fromarray(noise(40, 70, 3)).save(tmp_path / "photo.webp", icc_profile=icc)
        inpaint(Image.open(tmp_path / "photo.webp"), mask).save(tmp_path / "result.png")
        with Image.open(tmp_path / "result.png") as result:
            assert result.info.get("icc_profile") == kept


def test_progress_gets_latents_that_can_be_shown(inpaint):
    seen = []
    gt = torch.zeros(1, 3, 50, 70)
    inpaint(gt, torch.zeros(1, 1, 50, 70), progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(1, 2), (2, 2)]
    assert seen[0][2].shape == (1, 3, 16, 20)  # of 64×80 pixels
    shown = inpaint.as_pictures(seen[0][2], (50, 70))
    assert shown.shape == (1, 3, 50, 70) and shown.abs().max() <= 1
    with pytest.raises(ValueError, match="of 70 rows and 50 columns"):
        inpaint.as_pictures(seen[0][2], (70, 50))


def test_what_does_not_fit_is_refused_from_python(inpaint):
    one, other = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 48))
    with pytest.raises(ValueError, match=r"of several sizes \(64x48, 64x64\)"):
        inpaint(one, other)
    with pytest.raises(ValueError, match="in a call of their own"):
        inpaint([one, other], [one, other])
    with pytest.raises(ValueError, match=r"not \(B, 3, H, W\)"):
        inpaint(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="with method: pixel"):
        inpaint(one, one, start_from=one)


# ---- Speed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "compile"),
    [([], False), (["compile=true"], True), (["image_size=64"], None)],
)
def test_nothing_is_compiled_for_each_size_unless_it_is_asked_for(case, settings, compile):
    config = load_config(case.conf_path(), settings)
    with patch("guided_diffusion.factory.choice.choose_speed") as choose:
        factory.choose_speed(config, torch.device("cpu"))
    wishes, use_fp16, _ = choose.call_args.args
    assert (wishes.compile, use_fp16) == (compile, False)


@pytest.mark.parametrize(("image_size", "side"), [(None, 64), (64, 64), (100, 112), (16, 16)])
def test_layers_are_made_for_the_size_of_the_pictures(case, image_size, side):
    overrides = [] if image_size is None else [f"image_size={image_size}"]
    with patch.object(Autoencoder, "convolution_sides", autospec=True) as sides:
        sides.side_effect = lambda autoencoder, side: {
            conv: side for conv in autoencoder.modules() if isinstance(conv, torch.nn.Conv2d)
        }
        load_inpainter(case.conf_path(), overrides=overrides)
    assert sides.call_args.args[1] == side
    p = load_config(case.conf_path(), overrides).latent.unet_params
    assert p.image_size == side // 4
    assert [rate for rate in (1, 2, 4) if p.attends(rate)] == [2, 4]


# ---- Stopped, and not finite -----------------------------------------------------------------


def test_freed_memory_goes_back(case):
    """Pieces of all the sizes of latents would add up."""
    with patch("guided_diffusion.speed.loading.keep_freed_memory") as keep:
        load_inpainter(case.conf_path())
    keep.assert_not_called()


def test_goes_on_from_any_state_to_the_same_pixels(case):
    inpaint = load_inpainter(case.conf_path(), overrides=["ddim_steps=4", "ddim_eta=0.7"])
    gt, keep = image_to_tensor(noise(64, 64, 3))[None], torch.zeros(1, 3, 64, 64)
    states, later = [], []
    whole = inpaint.sample(gt, keep, [8], after_evaluation=lambda e: states.append(e.state()))
    assert [inpaint.evaluations_before(state) for state in states] == [1, 2, 3, 4]
    for done, state in enumerate(states, 1):
        again = inpaint.sample(gt, keep, [8], resume=state, after_evaluation=later.append)
        assert torch.equal(again, whole)
        assert len(later) == 4 - done
        later.clear()


@pytest.mark.parametrize("broken", ["network", "autoencoder"])
def test_what_is_not_finite_is_said_of_the_right_picture(inpaint, broken):
    gt, keep = torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)

    def second_lost(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1], x[1:] * torch.nan])

    network, decode = inpaint.network, inpaint.autoencoder.decode
    if broken == "network":
        with (
            patch.object(inpaint, "network", lambda z, t: second_lost(network(z, t))),
            pytest.raises(NonFiniteError) as error,
        ):
            inpaint.sample(gt, keep, [0, 1])
    else:
        with (
            patch.object(inpaint.autoencoder, "decode", lambda z: second_lost(decode(z))),
            pytest.raises(NonFiniteError) as error,
        ):
            inpaint.sample(gt, keep, [0, 1])
    assert error.value.images == [1]
