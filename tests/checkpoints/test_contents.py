"""Whatever is around a network: it is found and taken, or the file is called what it is."""

import argparse
import collections
import pickle
import types
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from guided_diffusion.checkpoints import loading
from guided_diffusion.checkpoints.loading import LATENT_UNET, Blank, check_weights
from guided_diffusion.config import ClassifierConfig, UserError
from guided_diffusion.networks.unet import Classifier, UNet
from tests.support.checkpoints import TINY, TINY_FILE, loaded

WEIGHTS = torch.load(TINY_FILE, weights_only=True)
OTHER = {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}
PREFIXES = ("", "module.", "_orig_mod.", "model.", "ema_model.", "module._orig_mod.", "a.b.c.")
WRAPPERS = {  # what a file holds, by a state dict; which of its keys lead to that one; what is left
    "none": (lambda sd: sd, "", ""),
    "ema": (lambda sd: {"model": OTHER, "ema": sd, "steps": 10}, "ema", "'model', 'steps'"),
    "model_ema": (lambda sd: {"state_dict": OTHER, "model_ema": sd}, "model_ema", "'state_dict'"),
    "ema_model": (lambda sd: {"model": OTHER, "ema_model": sd}, "ema_model", "'model'"),
    "params_ema": (lambda sd: {"params_ema": sd, "params": OTHER}, "params_ema", "'params'"),
    "state_dict": (lambda sd: {"state_dict": sd, "epoch": 3}, "state_dict", "'epoch'"),
    "model_state_dict": (lambda sd: {"model_state_dict": sd}, "model_state_dict", ""),
    "any": (lambda sd: {"unet of mine": collections.OrderedDict(sd)}, "unet of mine", ""),
    "deep": (lambda sd: {"checkpoint": {"net": sd}, "lr": 0.1}, "checkpoint.net", "'lr'"),
}
BESIDE = {  # what lies beside, which torch.load refuses to make, or which is large
    "Namespace": argparse.Namespace(lr=1e-4),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "path": Path("x"),
    "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(3))]).state_dict(),
    "generator": torch.get_rng_state(),
    "mixed": [argparse.Namespace(), {"a": Path("y")}],
}


def denoiser(**settings: object) -> UNet:
    with torch.device("meta"):
        return UNet(TINY.params)


def loaded_with_words(path: Path, network: torch.nn.Module | None = None) -> tuple[dict, list[str]]:
    """The weights that are taken from a file, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = loaded(network or denoiser(), path).state_dict()
    return weights, [str(each.message).removeprefix(f"{path}: ") for each in caught]


def refusal(path: Path, network: torch.nn.Module | None = None) -> str:
    with warnings.catch_warnings(), pytest.raises(UserError) as error:
        warnings.simplefilter("ignore")
        check_weights(Blank(network or denoiser(), str(path)))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("wrapper", "prefix"), product(WRAPPERS, PREFIXES))
def test_a_wrapped_network_is_taken_to_the_bit(tmp_path, wrapper, prefix, dtype):
    wrap, keys, left = WRAPPERS[wrapper]
    stored = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    torch.save(wrap({prefix + name: each for name, each in stored.items()}), tmp_path / "x.pt")
    weights, said = loaded_with_words(tmp_path / "x.pt")
    assert_same(weights, stored)
    where = [f"under '{keys}'"] if keys else []
    where += [f"without '{prefix}' before the names"] if prefix else []
    words = f"took the weights {', '.join(where)}" + (f"; left out: {left}" if left else "")
    assert said == ([words] if where else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_safetensors_are_taken_to_the_bit_whatever_their_extension(
    tmp_path, prefix, dtype, suffix, monkeypatch
):
    monkeypatch.setattr(loading, "PIECE", 300)
    stored = {prefix + name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    save_file(stored, tmp_path / f"x.{suffix}")
    weights, said = loaded_with_words(tmp_path / f"x.{suffix}")
    assert_same(weights, {name.removeprefix(prefix): each for name, each in stored.items()})
    assert len(said) == bool(prefix)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_is_left_out_and_never_made(tmp_path, monkeypatch, name, prefix):
    weights = {prefix + key: weight for key, weight in WEIGHTS.items()}
    torch.save({"model": weights, "other": BESIDE[name]}, tmp_path / "x.pt")
    monkeypatch.setattr(loading, "PIECE", 10**5)
    for made in (argparse.Namespace, types.SimpleNamespace):
        monkeypatch.setattr(pickle, made.__name__, None, raising=False)
    found, (said,) = loaded_with_words(tmp_path / "x.pt")
    assert_same(found, WEIGHTS)
    assert said.startswith("took the weights under 'model'") and said.endswith("left out: 'other'")


def test_several_networks_in_one_map_of_names(tmp_path):
    both = {"model." + name: each for name, each in OTHER.items()}
    both |= {"ema_model." + name: each for name, each in WEIGHTS.items()}
    torch.save(both | {"step": torch.tensor(5)}, tmp_path / "x.pt")
    found, (said,) = loaded_with_words(tmp_path / "x.pt")
    assert_same(found, WEIGHTS)
    assert said.startswith("took the weights without 'ema_model.' before the names; left out: 'mod")
    assert said.endswith(f" and {len(OTHER) + 1 - 3} more")


def test_a_prefix_that_begins_with_another_one(tmp_path):
    both = {"model." + name: each for name, each in OTHER.items()}
    both |= {"model.ema." + name: each for name, each in WEIGHTS.items()}
    torch.save(both, tmp_path / "x.pt")
    assert_same(loaded_with_words(tmp_path / "x.pt")[0], WEIGHTS)


@pytest.mark.parametrize("names", [("a", "b"), ("ema_0.99", "ema_0.9999"), ("model", "net")])
def test_which_of_several_networks_is_meant_is_not_guessed(tmp_path, names):
    torch.save(dict.fromkeys(names, WEIGHTS), tmp_path / "x.pt")
    inside = ", ".join(f"under '{name}'" for name in names)
    assert refusal(tmp_path / "x.pt") == (
        f"there are 2 networks in it, {inside}: save the state_dict() of one alone"
    )


def test_a_classifier_beside_a_denoiser_is_told_apart(tmp_path):
    config = ClassifierConfig(width=64, depth=1, attention_resolutions=(16, 8))
    with torch.device("meta"):
        classifier = Classifier(config.params(64))
    weights = {name: torch.zeros(each.shape) for name, each in classifier.state_dict().items()}
    torch.save({"unet": WEIGHTS, "classifier": weights}, tmp_path / "x.pt")
    assert_same(loaded_with_words(tmp_path / "x.pt")[0], WEIGHTS)
    assert_same(loaded_with_words(tmp_path / "x.pt", classifier)[0], weights)


def test_a_wrapped_network_that_does_not_fit_is_compared_without_its_wrapper(tmp_path):
    name = "middle_block.1.norm.bias"
    less = {"module." + key: each for key, each in WEIGHTS.items() if key != name}
    torch.save({"ema": less}, tmp_path / "x.pt")
    assert refusal(tmp_path / "x.pt").endswith(f"(weights: 1 missing, first {name})")


def test_what_is_taken_is_said_once(tmp_path):
    torch.save({"ema": WEIGHTS}, tmp_path / "x.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            check_weights(Blank(denoiser(), str(tmp_path / "x.pt")))
    assert len(caught) == 1


def test_maps_that_contain_each_other_without_end(tmp_path):
    """A small file whose maps, counted one by one, are a million of millions."""
    maps = {"x": 1.0}
    for _ in range(4):
        maps = dict.fromkeys(map(str, range(1000)), maps)
    for contents in ({"a": maps}, {"a": maps, "b": argparse.Namespace()}):
        torch.save(contents, tmp_path / "x.pt")
        refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.complex64]
)
def test_numbers_that_would_be_taken_for_others_are_refused(tmp_path, dtype):
    name = "middle_block.1.qkv.weight"
    stored = WEIGHTS | {name: WEIGHTS[name].to(dtype)}
    torch.save(stored, tmp_path / "x.pt")
    paths = [tmp_path / "x.pt"]
    if dtype != torch.complex64:
        save_file(stored, tmp_path / "x.safetensors")
        paths.append(tmp_path / "x.safetensors")
    for path in paths:
        assert refusal(path) == f"{name} in it is no tensor of floating-point numbers"


# ---- Files of something else -------------------------------------------------------------------

LAYER = torch.zeros(3, 3)
KINDS = {  # names of tensors -> what the file is
    "diffusers": ("down_blocks.0.resnets.0.conv1.weight", "this is a network of diffusers"),
    "lora": ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "this is a LoRA"),
    "lora of kohya": ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", "this is a LoRA"),
    "sd": ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.bias", "by texts"),
    "sd of diffusers": ("down_blocks.0.attentions.0.transformer_blocks.0.norm1.bias", "by texts"),
    "sdxl": ("conditioner.embedders.0.transformer.text_model.embeddings.weight", "by texts"),
    "flux": ("double_blocks.0.img_attn.qkv.weight", "by texts"),
    "dit": ("x_embedder.proj.weight", "this is a diffusion transformer (DiT)"),
    "edm": ("model.enc.64x64_conv.weight", "this is a network of EDM"),
    "vae": ("encoder.down.0.block.0.conv1.weight", "this is an autoencoder alone"),
    "latent": ("first_stage_model.quant_conv.weight", "set method: latent"),
    "layer": ("weight", "this is a single layer"),
    "resnet": ("layer1.0.conv1.weight", "it is no network of this family"),
}


@pytest.mark.parametrize("saved", ["pt", "wrapped", "with objects", "safetensors"])
@pytest.mark.parametrize("name", KINDS)
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, name, saved):
    tensor, words = KINDS[name]
    contents = {tensor: LAYER}
    if name == "resnet" and saved != "pt":
        words = "there is no network of this family in it, which would have time_embed.0.weight"
        words = "could run code" if saved == "with objects" else words
        words = "it is no network of this family" if saved == "safetensors" else words
    if saved == "safetensors":
        save_file(contents, tmp_path / "x")
    else:
        wrapped = {"state_dict": contents}
        objects = {**wrapped, "args": argparse.Namespace()}
        torch.save({"pt": contents, "wrapped": wrapped}.get(saved, objects), tmp_path / "x")
    assert words in refusal(tmp_path / "x")


@pytest.mark.parametrize("of_ours", [True, False])
def test_the_state_of_an_optimizer(tmp_path, of_ours):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict() | ({"timesteps": {}} if of_ours else {})
    torch.save(state, tmp_path / "opt000123.pt")
    message = refusal(tmp_path / "opt000123.pt")
    assert message.startswith("this is the state of an optimizer") and "modelNNNNNN.pt" in message


def test_a_latent_file_of_safetensors_is_read_as_one_of_lightning_is(tmp_path):
    save_file({"model.diffusion_model.x": LAYER}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="it is no network of this family, which would have time_"):
        check_weights(Blank(denoiser(), str(tmp_path / "x.safetensors"), LATENT_UNET))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["model_index.json", "unet/config.json"],
            "this is a folder of another library, such as dif",
        ),
        (["config.json", "diffusion_pytorch_model.safetensors"], "this is a folder of another li"),
        (["ema_0.9999_010000.pt", "opt010000.pt"], "this is a folder; name a file, such as ema_0."),
        ([], "this is a folder; name a file"),
    ],
)
def test_folders(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert refusal(tmp_path).startswith(f"cannot read this checkpoint: {words}")


def test_a_broken_file_of_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-1])
    assert refusal(tmp_path / "x.safetensors") == (
        "the file is incomplete, its end is missing; fetch it again"
    )
    (tmp_path / "x.safetensors").write_bytes(data[:20] + b"\0" + data[21:])
    assert refusal(tmp_path / "x.safetensors").startswith("the file is damaged: ")


# ---- Channels and classes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (4, "its network takes 4 channels (pictures with transparency, or latents), where this"),
        (6, "its network takes 6 channels (a small picture beside the noisy one, to enlarge it)"),
        (2, "its network takes 2 channels, where this program's take 3 (colours) or 1 (grey)"),
        (1, "in_channels: 1 in the file, 3 in the config (weights"),
    ],
)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_number_of_channels_is_the_first_reason(tmp_path, channels, words, learn_sigma):
    outputs = channels * (1 + learn_sigma)
    changed = {
        "input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3),
        "out.2.weight": torch.zeros(outputs, 32, 3, 3),
        "out.2.bias": torch.zeros(outputs),
    }
    torch.save(WEIGHTS | changed, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    also = "; learn_sigma: false in the file" if channels == 1 and not learn_sigma else ""
    words = words.replace(" (weights", f"{also}, true in the config (weights" if also else " (we")
    assert message.startswith(f"the checkpoint does not fit the config: {words}")
