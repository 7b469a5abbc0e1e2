"""The configs of public models: settings and sizes as their authors give them, commands that work.

Numbers of weights: 552.8 and 93.6 million are those of files that people have; for the others,
Dhariwal & Nichol 2021 give 296, 422, 554 and 559 million (their tables of hyperparameters), and
65, 43, 54 and 54 million for the classifiers.
"""

import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from guided_diffusion.config import (
    ClassifierConfig,
    Config,
    DatasetConfig,
    NetworkConfig,
    ScheduleConfig,
    load_config,
)
from guided_diffusion.downloads.table import TABLE
from guided_diffusion.factory import build_process, build_times, choose_speed
from guided_diffusion.networks.params import CHANNEL_MULT_BY_IMAGE_SIZE
from guided_diffusion.scheduler import count_evaluations
from guided_diffusion.speed.choice import Speed
from tests.support.networks import on_meta

ROOT = Path(__file__).parents[1]
CONFS = sorted(path for path in ROOT.glob("confs/*.yml") if not path.stem.startswith("train"))


OWN = {"data/pretrained/portraits64.pt", "data/pretrained/photos64.pt"}  # of this repository


@dataclass(frozen=True)
class Model:
    """What its authors publish of a model."""

    file: str
    millions: float  # of weights
    network: NetworkConfig
    classifier: ClassifierConfig | None = None
    noise_schedule: str = "linear"


def network(side: int, channels: int, blocks: int, **others: object) -> NetworkConfig:
    return NetworkConfig(
        image_size=side,
        model_channels=channels,
        num_res_blocks=blocks,
        channel_mult=CHANNEL_MULT_BY_IMAGE_SIZE[side],
        resblock_updown=True,
        use_scale_shift_norm=True,
        learn_sigma=True,
        **{"attention_resolutions": (32, 16, 8), "num_head_channels": 64} | others,
    )


def guide(side: int, scale: float, depth: int = 2) -> ClassifierConfig:
    path = f"data/pretrained/{side}x{side}_classifier.pt"
    return ClassifierConfig(path=path, scale=scale, depth=depth)


LARGE = network(256, 256, 2)
LIGHT = network(256, 128, 1, attention_resolutions=(16,))
OF_64 = network(64, 192, 3, use_new_attention_order=True, class_cond=True)
OF_128 = network(128, 256, 2, num_heads=4, num_head_channels=-1, class_cond=True)
OF_512 = network(512, 256, 2, class_cond=True)
MODELS = {
    "openai64": Model("64x64_diffusion.pt", 295.9, OF_64, guide(64, 1.0, depth=4), "cosine"),
    "openai128": Model("128x128_diffusion.pt", 421.5, OF_128, guide(128, 0.5)),
    "openai256_uncond": Model("256x256_diffusion_uncond.pt", 552.8, LARGE),
    "openai512": Model("512x512_diffusion.pt", 559.0, OF_512, guide(512, 4.0)),
    **{
        name: Model(f"{name}.pt", 552.8, LARGE)
        for name in ("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout")
    },
    **{
        name: Model(f"{name}.pt", 93.6, LIGHT)
        for name in ("ffhq_p2", "celebahq_p2", "cub_p2", "afhq_p2", "flower_p2", "metface_p2")
    },
}
CLASSIFIERS = {64: 65.4, 128: 42.6, 256: 54.1, 512: 54.4}  # image size: millions of weights


def load(name: str, *overrides: str) -> Config:
    return load_config(str(ROOT / "confs" / f"{name}.yml"), overrides)


def millions(module: torch.nn.Module) -> float:
    return round(sum(weight.numel() for weight in module.state_dict().values()) / 1e6, 1)


def header(path: Path) -> str:
    """The comment that a config begins with, its continued lines joined."""
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return re.sub(r" \\\n +", " ", "\n".join(line.removeprefix("#") for line in lines))


@pytest.mark.parametrize("name", MODELS)
def test_a_config_says_what_its_models_authors_say(name):
    config, model = load(name), MODELS[name]
    assert config.model_path == f"data/pretrained/{model.file}"
    assert config.network == model.network
    assert config.classifier == model.classifier
    assert config.diffusion.noise_schedule == model.noise_schedule
    assert config.schedule == ScheduleConfig(t_T=250, n_sample=1, jump_length=10, jump_n_sample=10)
    assert config.dataset == DatasetConfig(
        name=name,
        gt_path="me.jpg",
        mask_path="mask.png",
        inpainted_dir=f"log/{name}/inpainted",
        gt_masked_dir=f"log/{name}/gt_masked",
        gt_dir=f"log/{name}/gt",
        keep_mask_dir=f"log/{name}/gt_keep_mask",
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_config_builds_a_network_of_the_published_size(name):
    assert millions(on_meta(load(name).network.params)) == MODELS[name].millions


@pytest.mark.parametrize(
    ("name", "side"), [("openai64", 64), ("openai128", 128), ("openai512", 512)]
)
def test_a_config_builds_a_classifier_of_the_published_size(name, side):
    params = load(name).classifier.params(side)
    assert millions(on_meta(params)) == CLASSIFIERS[side]


def test_guidance_of_the_network_without_classes_is_there_on_demand():
    classifier = load("openai256_uncond", "classifier_scale=10").classifier
    assert classifier == guide(256, 10.0)
    assert millions(on_meta(classifier.params(256))) == CLASSIFIERS[256]


@pytest.mark.parametrize("name", MODELS)
def test_a_config_runs_as_it_is_on_any_cpu_from_pure_noise(name):
    config = load(name)
    assert choose_speed(config, torch.device("cpu")) == Speed("fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times = build_times(config)
    assert count_evaluations(times) == 2410
    signal = build_process(config).diffusion.alphas_cumprod[times[0]] ** 0.5
    assert 0.004 < signal < 0.007  # nothing to see, and its inverse is no astronomic number


def test_each_published_checkpoint_has_a_config():
    configs = [load(path.stem) for path in CONFS]
    paths = {c.model_path for c in configs} | {c.classifier.path for c in configs if c.classifier}
    published = {row.file for row in TABLE if row.name not in ("data", "lpips")}
    assert paths == published | OWN


@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_the_header_of_a_config_names_commands_that_work(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = header(path)
    python, *run = shlex.split(re.search(r"python test\.py.*", text)[0])
    assert run[:3] == ["test.py", "--conf_path", f"confs/{path.name}"]
    assert run[3::2] == ["--set"] * len(run[4::2])
    config = load_config(run[2], run[4::2])
    assert config == load(path.stem)
    if config.model_path in OWN:
        return  # it needs no download
    names = re.search(r"bash download\.sh (.*)", text)[1].split()
    files = [row.file for row in TABLE if row.name in names and row.name != "data"]
    assert files == [config.model_path, *([config.classifier.path] if config.classifier else [])]
