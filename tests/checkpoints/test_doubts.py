"""What shapes cannot tell: right settings are never doubted, wrong ones are told by name."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from guided_diffusion.checkpoints.doubts import Doubts
from guided_diffusion.config import DiffusionConfig, load_config
from guided_diffusion.factory import pixel_process
from guided_diffusion.images.files import load_prepared
from guided_diffusion.images.tensors import image_to_tensor
from guided_diffusion.networks.unet import UNet
from tests.support.case import command
from tests.support.checkpoints import ROOT, TINY, TINY_FILE, loaded
from tests.support.networks import filled_network

DEMO = load_config(str(ROOT / "confs/demo.yml"), require_data=False)
PORTRAITS = sorted((ROOT / "data/datasets/gts/portraits").glob("*.png"))
MASK = sorted((ROOT / "data/datasets/gt_keep_masks/portraits").glob("*.png"))[0]
COSINE, LINEAR = (DiffusionConfig(noise_schedule=name) for name in ("cosine", "linear"))


@cache
def network(settings=DEMO.network, path: Path | str = DEMO.model_path) -> UNet:
    with torch.device("meta"):
        blank = UNet(settings.params)
    return loaded(blank, ROOT / path).eval()


def keep(share: float, side: int) -> torch.Tensor:
    """A mask that keeps this share of the rows, from the first."""
    mask = torch.zeros(3, side, side)
    mask[:, : round(share * side)] = 1
    return mask


def portrait(number: int, side: int = 64) -> torch.Tensor:
    return image_to_tensor(load_prepared(str(PORTRAITS[number]), side))


def doubt(net: UNet, settings, diffusion: DiffusionConfig, picture, mask=None) -> str | None:
    process = pixel_process(diffusion, "x.yml")
    mask = keep(0.5, picture.shape[-1]) if mask is None else mask
    return Doubts(net, process, settings, diffusion)(picture, mask)


def flat(*colour: float) -> torch.Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, 64, 64)


def chequered(side: int) -> torch.Tensor:
    rows = torch.arange(64)[:, None] // side + torch.arange(64) // side
    return (rows % 2 * 2.0 - 1).expand(3, 64, 64)


ODD = {  # pictures unlike all that the network has seen
    "grey": flat(0, 0, 0),
    "black": flat(-1, -1, -1),
    "white": flat(1, 1, 1),
    "red": flat(1, -1, -1),
    "ramp": (torch.arange(64) / 32 - 1).expand(3, 64, 64),
    "chequered": chequered(1),
    "squares": chequered(8),
    "noise": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("number", range(3))
def test_right_settings_are_not_doubted(number, share):
    settings = DEMO.network
    mask = keep(share, 64)
    assert doubt(network(), settings, COSINE, portrait(number), mask) is None
    tiny = network(TINY, TINY_FILE)
    picture = portrait(number, 32)
    assert doubt(tiny, TINY, LINEAR, picture, keep(share, 32)) is None


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("name", ODD)
def test_right_settings_are_not_doubted_where_pictures_are_odd(name, share):
    assert doubt(network(), DEMO.network, COSINE, ODD[name], keep(share, 64)) is None


def test_a_network_is_not_asked_where_little_is_known():
    wrong = replace(DEMO.network, use_new_attention_order=True)
    assert doubt(network(wrong), wrong, COSINE, portrait(0), keep(0.1, 64)) is None


WRONG = {  # settings -> what is said instead
    "use_new_attention_order: false": ({"use_new_attention_order": True}, {}),
    "num_head_channels: 32": ({"num_head_channels": 8}, {}),
    "noise_schedule: cosine": ({}, {"noise_schedule": "linear"}),
    "predict_xstart: false": ({}, {"predict_xstart": True}),
    "diffusion_steps: 1000": ({}, {"diffusion_steps": 4000}),
}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", WRONG)
def test_the_setting_that_is_wrong_is_named(name, number, share):
    of_network, of_diffusion = WRONG[name]
    settings = replace(DEMO.network, **of_network)
    diffusion = replace(COSINE, **of_diffusion)
    said = doubt(network(settings), settings, diffusion, portrait(number), keep(share, 64))
    assert f"times as wrong as it would be with {name}: set that" in said


@pytest.mark.parametrize("diffusion", [COSINE, LINEAR], ids=["cosine", "linear"])
@pytest.mark.parametrize("settings", [TINY, replace(TINY, class_cond=True)], ids=["", "classes"])
def test_a_network_without_training_is_said_to_do_harm(settings, diffusion):
    net = filled_network(settings.params)
    said = doubt(net, settings, diffusion, portrait(0, 32))
    assert said.startswith("the network makes the known pixels, with a little noise on them, worse")


def test_a_network_is_left_as_it_was():
    net, state = network(), torch.get_rng_state()
    blocks = [m for m in net.modules() if hasattr(m, "heads_first")]
    before = [(block.num_heads, block.heads_first) for block in blocks]
    assert len(blocks) > 2
    doubt(net, DEMO.network, COSINE, portrait(0))
    assert [(block.num_heads, block.heads_first) for block in blocks] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_that_are_not_finite_are_no_ground_for_a_doubt():
    net = filled_network(TINY.params)
    net.out[2].weight.data[:] = torch.nan
    assert doubt(net, TINY, LINEAR, portrait(0, 32)) is None


# ---- In a run ----------------------------------------------------------------------------------


def run(folder: Path, *arguments: str):
    image = [f"data.eval.portraits.gt_path={PORTRAITS[0]}"]
    image += [f"data.eval.portraits.mask_path={MASK}", "device=cpu"]
    paths = [f"data.eval.portraits.paths.{key}={folder / key}" for key in ("srs", "lrs", "gts")]
    paths += [f"data.eval.portraits.paths.gt_keep_masks={folder / 'masks'}", "show_progress=false"]
    model = [f"model_path={ROOT / DEMO.model_path}"]
    sets = [word for key in (*image, *paths, *model) for word in ("--set", key)]
    result = command("--conf_path", str(ROOT / "confs/demo.yml"), *sets, *arguments)
    assert result.status == 0, result.err
    return result


SHORT = [
    word
    for key in ("t_T=25", "jump_length=5", "jump_n_sample=3")
    for word in ("--set", f"schedule_jump_params.{key}")
]
NEW_ORDER = ("--set", "use_new_attention_order=true")


@pytest.mark.parametrize("wrong", [True, False])
def test_a_dry_run_can_ask_the_network(tmp_path, wrong):
    result = run(tmp_path, "--check-weights", *NEW_ORDER[: 2 * wrong])
    said = [line for line in result.lines("warning") if "use_new_attention_order: false" in line]
    assert len(said) == len(result.lines("warning")) == wrong
    assert all(DEMO.model_path in line and str(PORTRAITS[0]) in line for line in said)
    assert "everything is in order; nothing was sampled or written" in result.out
    assert not any(tmp_path.iterdir())


def test_a_run_warns_once_and_makes_what_it_makes_without_asking(tmp_path, monkeypatch):
    from guided_diffusion.run import runner

    first = run(tmp_path / "a", *SHORT, *NEW_ORDER)
    again = run(tmp_path / "a", *SHORT, *NEW_ORDER)
    assert [len(result.lines("warning")) for result in (first, again)] == [1, 0]
    monkeypatch.setattr(runner, "WORTH_ASKING", 10**9)
    assert not run(tmp_path / "b", *SHORT, *NEW_ORDER).lines("warning")
    written = [(tmp_path / name / "srs" / PORTRAITS[0].name).read_bytes() for name in "ab"]
    assert written[0] == written[1]
