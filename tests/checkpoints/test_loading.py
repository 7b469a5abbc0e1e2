"""Checkpoints: what loads, what is refused, and whether the reason given is the true one."""

import collections
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guided_diffusion.checkpoints import lightning, loading
from guided_diffusion.checkpoints.loading import (
    LATENT_AUTOENCODER,
    LATENT_UNET,
    Part,
    fingerprint,
    load_state_dict,
)
from guided_diffusion.checkpoints.mismatch import (
    difference_message,
    explain_autoencoder,
    explain_latent_unet,
    explain_pixel_network,
)
from guided_diffusion.config import (
    AutoencoderConfig,
    ClassifierConfig,
    LatentConfig,
    LatentUNetConfig,
    NetworkConfig,
    UserError,
    load_config,
)
from guided_diffusion.downloads.table import CHECKPOINTS
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.networks.unet import Classifier, UNet
from tests.support.checkpoints import ROOT, TINY, TINY_FILE, checked, loaded
from tests.support.filled_weights import filled

GUIDE = ClassifierConfig(width=64, depth=1, attention_resolutions=(16, 8))
GUIDE_IMAGE_SIZE = 64


def denoiser(network: NetworkConfig = TINY) -> UNet:
    with torch.device("meta"):
        return UNet(network.params)


def classifier(config: ClassifierConfig = GUIDE, image_size: int = GUIDE_IMAGE_SIZE) -> Classifier:
    with torch.device("meta"):
        return Classifier(config.params(image_size))


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in network.state_dict().items()}


def save_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """A small file with tensors of these shapes: each is one zero, repeated."""
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, path)
    return str(path)


def refusal(network: torch.nn.Module, path: Path | str, part: Part | None = None) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as error:
        checked(network, path, part)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return torch.load(TINY_FILE, weights_only=True)


# ---- What loads ----


def assert_loaded(path: Path, expected: dict[str, torch.Tensor]) -> None:
    checked(denoiser(), path)
    state_dict = loaded(denoiser(), path).state_dict()
    assert list(state_dict) == list(expected)
    for key, weight in state_dict.items():
        assert weight.dtype == torch.float32 and weight.device.type == "cpu"
        assert torch.equal(weight, expected[key].float()), key


def test_a_checkpoint_loads_to_the_bit(tiny):
    assert_loaded(TINY_FILE, tiny)


def test_files_of_torch_before_1_6_load(tmp_path, tiny):
    torch.save(tiny, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_loaded(tmp_path / "old.pt", tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_computed_with_in_fp32(tmp_path, tiny, dtype):
    stored = {key: weight.to(dtype) for key, weight in tiny.items()}
    torch.save(stored, tmp_path / "other.pt")
    assert_loaded(tmp_path / "other.pt", stored)


def test_the_order_of_the_names_does_not_matter(tmp_path, tiny):
    torch.save(dict(reversed(tiny.items())), tmp_path / "reversed.pt")
    assert_loaded(tmp_path / "reversed.pt", tiny)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to see the mapping")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounts")
def test_loading_takes_the_memory_of_the_weights_once(tmp_path):
    """A file of 128 MB, in pieces of 8 MB, in a process of its own."""
    script = """
import re, sys, torch
from guided_diffusion.checkpoints import loading as checkpoint
checkpoint.PIECE = 2**21
with torch.device("meta"):
    network = torch.nn.Sequential(*[torch.nn.Conv2d(512, 512, 4) for _ in range(8)])
torch.save({"warm": torch.zeros(1)}, sys.argv[1] + ".warm")
checkpoint.load_state_dict(sys.argv[1] + ".warm")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
(found,) = checkpoint.check_weights(checkpoint.Blank(network, sys.argv[1]))
checkpoint.load_weights(found)
print(peak() - before)
"""
    shapes = {"weight": (512, 512, 4, 4), "bias": (512,)}
    names = [(f"{i}.{key}", shape) for i in range(8) for key, shape in shapes.items()]
    weights = {name: torch.ones(shape) for name, shape in names}
    torch.save(weights, tmp_path / "big.pt")
    command = [sys.executable, "-c", script, str(tmp_path / "big.pt")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kilobytes = sum(weight.nbytes for weight in weights.values()) / 1024
    assert kilobytes * 0.9 < int(run.stdout) < kilobytes * 1.3


def test_a_checkpoint_in_many_pieces_is_whole(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(loading, "PIECE", 300)
    torch.save(tiny, tmp_path / "zip.pt")
    torch.save(tiny, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "old.pt"):
        found = loaded(denoiser(), tmp_path / name).state_dict()
        assert all(torch.equal(found[key], tiny[key]) for key in tiny)


def test_old_files_which_cannot_be_mapped_are_read_once(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(loading, "PIECE", 300)
    torch.save(tiny, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: loads.append(args) or load(*args, **kw))
    loaded(denoiser(), tmp_path / "old.pt")
    assert len(loads) == 1


def test_weights_come_in_channels_last_and_the_file_stays_as_it_was(tmp_path, tiny):
    path = tmp_path / "layout.pt"
    torch.save(tiny, path)
    before = path.read_bytes()
    network = loaded(denoiser(), path)
    for key, weight in network.state_dict().items():
        assert torch.equal(weight, tiny[key]), key
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last), key
    assert path.read_bytes() == before


def test_weights_that_share_memory_in_the_file_keep_their_values(tmp_path, tiny):
    shared = torch.randn(64, 64, 3, 3)
    keys = [f"middle_block.{i}.{layer}.weight" for i in (0, 2) for layer in ("in_layers.2",)]
    torch.save(tiny | dict.fromkeys(keys, shared), tmp_path / "shared.pt")
    network = loaded(denoiser(), tmp_path / "shared.pt")
    for key in keys:
        assert torch.equal(network.state_dict()[key], shared), key


# ---- No file, or not a good one ----


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_missing_published_file_says_how_to_fetch_it(tmp_path, name):
    message = refusal(denoiser(), tmp_path / name)
    assert f"no such checkpoint; fetch it: bash download.sh {CHECKPOINTS[name]}." in message
    assert "python test.py --conf_path confs/demo.yml" in message


def test_a_missing_file_of_ones_own_names_the_demo(tmp_path):
    message = refusal(denoiser(), tmp_path / "mine.pt")
    assert "no such checkpoint; check the path" in message and "download.sh" not in message
    assert "python test.py --conf_path confs/demo.yml" in message


def test_messages_know_every_published_file_that_a_config_names():
    published = [
        path for path in ROOT.glob("confs/*.yml") if path.stem.startswith(("face", "test"))
    ]
    assert len(published) == 20
    for path in published:
        config = load_config(str(path))
        paths = [config.model_path] + ([config.classifier.path] if config.classifier else [])
        assert {Path(p).name for p in paths} <= set(CHECKPOINTS)


@pytest.mark.parametrize("kept", [-1, -22, -1000, 0.9, 0.5, 1000, 4])
@pytest.mark.parametrize("name", ["mine.pt", "celeba256_250000.pt"])
def test_a_download_that_broke_off(tmp_path, name, kept):
    data = TINY_FILE.read_bytes()
    end = int(kept * len(data)) if isinstance(kept, float) else kept
    (tmp_path / name).write_bytes(data[:end])
    message = refusal(denoiser(), tmp_path / name)
    assert "the file is incomplete, its end is missing; " in message
    assert ("delete it and fetch it: bash download.sh celeba" in message) == ("celeba" in name)


@pytest.mark.parametrize("end", [1, 10, 15, 100, 5000, 20_000, 1_000_000, -1])
def test_an_old_file_that_broke_off(tmp_path, tiny, end):
    path = tmp_path / "old.pt"
    torch.save(tiny, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:end])
    assert "the file is damaged" in refusal(denoiser(), path)


def test_a_zip_archive_whose_inside_is_damaged(tmp_path):
    data = bytearray(TINY_FILE.read_bytes())
    pickled = data.index(b"time_embed.0.weight")
    data[pickled - 400 : pickled + 400] = b"\xff" * 800
    (tmp_path / "bad.pt").write_bytes(data)
    assert "the file is damaged" in refusal(denoiser(), tmp_path / "bad.pt")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "the file is empty; fetch it again" in refusal(denoiser(), tmp_path / "empty.pt")


@pytest.mark.parametrize(
    "content",
    ["<!DOCTYPE html><html>Quota exceeded</html>", "version https://git-lfs.github.com/spec/v1"],
)
def test_text_or_a_web_page(tmp_path, content):
    (tmp_path / "page.pt").write_text(content)
    message = refusal(denoiser(), tmp_path / "page.pt")
    problem = "this is no checkpoint, but a file of another kind, such as text or a web page"
    assert problem in message


def test_a_folder(tmp_path):
    assert "cannot read this checkpoint: " in refusal(denoiser(), tmp_path)


def test_a_file_that_does_not_fit_in_memory_need_not_be_fetched_again(monkeypatch):
    """As where `ulimit -v` is low."""
    error = RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    message = refusal(denoiser(), TINY_FILE)
    assert "there is not enough memory to load this network; close other programs" in message
    assert "damaged" not in message and "fetch" not in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "link.pt"):
        path = str(tmp_path / name)
        expected = f"{path}: this is a device or a pipe; a checkpoint must be a file"
        assert refusal(denoiser(), path) == refusal(denoiser(), path, LATENT_UNET) == expected
        for read_it in (fingerprint, load_state_dict):
            with pytest.raises(UserError, match="this is a device or a pipe"):
                read_it(path)


def compressed(path: Path) -> str:
    """A file beside this one, as a program for archives would pack it."""
    packed = path.with_name(f"packed-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    return str(packed)


def test_a_compressed_file_is_refused(tmp_path):
    """Mapped into memory, its numbers would be others: random ones only move by five bytes."""
    shapes = shapes_of(denoiser())
    torch.save({key: torch.rand(shape) for key, shape in shapes.items()}, tmp_path / "x.pt")
    checked(denoiser(), tmp_path / "x.pt")
    path = compressed(tmp_path / "x.pt")
    expected = (
        f"{path}: its records are compressed; pack them anew without compression: unzip it, "
        "then zip -0 -r"
    )
    assert refusal(denoiser(), path) == refusal(latent_unet(), path, LATENT_UNET) == expected
    with pytest.raises(UserError, match="its records are compressed"):
        load_state_dict(path)
    (tmp_path / "packed-x.pt").rename(tmp_path / "inpainting_big.ckpt")
    message = refusal(denoiser(), tmp_path / "inpainting_big.ckpt")
    assert message.endswith(
        "its records are compressed; delete it and fetch it: bash download.sh ldm"
    )


# ---- Names that a file gives ----

ODD_NAME = "\x1b[2J\u202e" + "x" * 10**6


def assert_shown(message: str, expected: str) -> None:
    """Escaped, with at most 80 characters of the name."""
    assert message.isprintable() and expected + "x" in message and len(message) < 600
    assert "x" * 60 + "..." in message and "x" * 80 not in message


def test_names_in_a_pixel_file_are_shown_short_and_escaped(tmp_path):
    name = r"\x1b[2J\u202e"
    for contents, expected in [
        ({ODD_NAME: torch.zeros(1)}, f"1 unknown, first {name}"),
        ({ODD_NAME: {"a": torch.zeros(1)}}, f"there are other weights, under '{name}"),
    ]:
        torch.save(contents, tmp_path / "x.pt")
        assert_shown(refusal(denoiser(), tmp_path / "x.pt"), expected)


def test_names_around_a_network_are_shown_short_and_escaped(tmp_path, tiny):
    name = r"\x1b[2J\u202e"
    for number, (contents, expected) in enumerate(
        [
            ({f"{ODD_NAME}.{key}": each for key, each in list(tiny.items())}, f"without '{name}"),
            ({ODD_NAME: tiny}, f"under '{name}"),
            ({"ema": tiny, ODD_NAME: 1}, f"left out: '{name}"),
        ]
    ):
        torch.save(contents, tmp_path / f"{number}.pt")
        with pytest.warns(UserWarning) as caught:
            checked(denoiser(), tmp_path / f"{number}.pt")
        assert_shown(str(caught[0].message), expected)


def test_names_in_a_latent_file_are_shown_short_and_escaped(tmp_path):
    shapes, name = latent_shapes(average=False), r"\x1b[2J\u202e"
    tensors = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    part = LATENT_UNET.prefix
    for contents, expected in [
        ({ODD_NAME: torch.zeros(1)}, f"the first is '{name}"),
        ({**tensors, part + ODD_NAME: torch.zeros(1)}, f"1 unknown, first {name}"),
        ({part + ODD_NAME: 0.5}, f": {part}{name}"),
    ]:
        torch.save(contents, tmp_path / "x.pt")
        message = refusal(latent_unet(), tmp_path / "x.pt", LATENT_UNET)
        assert message.isprintable() and expected + "x" in message
        assert len(message) < 600 and "xx..." in message


def test_what_an_error_says_of_a_file_is_shown_short_and_escaped(tmp_path, monkeypatch):
    path = save_shapes(tmp_path / "x.pt", {})

    def fail(*_, **__):
        raise RuntimeError(ODD_NAME)

    monkeypatch.setattr(torch, "load", fail)
    message = refusal(denoiser(), path)
    assert r"the file is damaged: \x1b[2J\u202exxx" in message and message.isprintable()
    assert "xxx...; fetch it again" in message and len(message) < 800


def test_a_shape_of_many_large_numbers_is_shown_short(tmp_path):
    wanted = {"a": (1,), "b": (2,)}
    message = difference_message(wanted, {"a": (2**62,) * 8, "b": (2,)}, explain_autoencoder)
    assert (
        "first a, [4611686018427387904, 46116" in message
        and "... in the file and [1] by" in message
    )


def test_a_file_of_thousands_of_levels_is_put_in_words():
    """Whose rates, 2**level, have too many digits to be written."""
    found = {f"input_blocks.{i}.1.norm.weight": (1,) for i in range(16_000)}
    found |= {f"output_blocks.{i}.1.conv.weight": (1,) for i in range(15_999)}
    found |= {"time_embed.0.weight": (128, 32)}
    for explain, wanted in [
        (explain_latent_unet, shapes_of(latent_unet())),
        (explain_pixel_network, shapes_of(denoiser())),
    ]:
        message = difference_message(wanted, found, explain)
        assert "channel_mult: 0,0,0,0," in message and len(message) < 1500
    found = {f"encoder.down.{i}.block.0.conv1.weight": (1,) for i in range(999)}
    found |= {"encoder.conv_in.weight": (1,), "quantize.embedding.weight": (256, 3)}
    message = difference_message(shapes_of(autoencoder()), found, explain_autoencoder)
    assert "ch_mult: 1,1,1,1," in message and len(message) < 600


# ---- Code in a file ----


class _MakesAFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def _save_pickle(protocol):
    def save(contents, path):
        path.write_bytes(pickle.dumps(contents, protocol))

    return save


SAVERS = {
    "zip": torch.save,
    "legacy": lambda contents, path: torch.save(
        contents, path, _use_new_zipfile_serialization=False
    ),
    "pickle-0": _save_pickle(0),
    "pickle-2": _save_pickle(2),
    "pickle-5": _save_pickle(5),
}


@pytest.mark.parametrize("hidden_in_state_dict", [False, True])
@pytest.mark.parametrize("kind", SAVERS)
def test_code_in_a_file_is_never_run(tmp_path, kind, hidden_in_state_dict):
    marker = tmp_path / "it-ran"
    evil = _MakesAFolder(marker)
    path = tmp_path / "evil.pt"
    SAVERS[kind]({"time_embed.0.weight": evil} if hidden_in_state_dict else evil, path)
    message = refusal(denoiser(), path)
    assert not marker.exists()
    if kind != "pickle-0":  # which looks like text
        assert "it holds objects that could run code when loaded (nothing was run)" in message


def test_the_code_above_would_run_if_it_were_let(tmp_path):
    marker = tmp_path / "it-ran"
    torch.save(_MakesAFolder(marker), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert marker.exists()


# ---- A good file of something else ----


@pytest.mark.parametrize(
    "contents",
    [[torch.zeros(1)], torch.zeros(3), {"a": 1}, {0: torch.zeros(1)}, {"a": {}}, None, "text"],
    ids=repr,
)
def test_what_is_no_map_of_names_to_tensors(tmp_path, contents):
    torch.save(contents, tmp_path / "other.pt")
    message = refusal(denoiser(), tmp_path / "other.pt")
    assert (
        "not a plain state dict" in message and "save the network's state_dict() alone" in message
    )


@pytest.mark.parametrize("shapes", [{}, {"conv1.weight": (64, 3, 7, 7)}])
def test_a_network_of_another_family(tmp_path, shapes):
    message = refusal(denoiser(), save_shapes(tmp_path / "resnet.pt", shapes))
    assert "it is no network of this family" in message


def test_a_denoiser_for_a_classifier_and_the_reverse(tmp_path):
    path = save_shapes(tmp_path / "classifier.pt", shapes_of(classifier()))
    assert "it is a classifier, which belongs in classifier_path" in refusal(denoiser(), path)
    assert "it is a denoiser, which belongs in model_path" in refusal(classifier(), TINY_FILE)


DENOISER_CHANGES = [
    ("num_channels", 64, "64", "32"),
    ("channel_mult", (1, 1), "1,1", "1,2"),
    ("channel_mult", (2, 3), "2,3", "1,2"),
    ("channel_mult", (1, 2, 2), "1,2,2", "1,2"),
    ("num_res_blocks", 3, "3", "1"),
    ("attention_resolutions", (32, 16), "image_size/1,image_size/2", "image_size/2"),
    ("attention_resolutions", (8,), "none", "image_size/2"),
    ("resblock_updown", False, "false", "true"),
    ("use_scale_shift_norm", False, "false", "true"),
    ("learn_sigma", False, "false", "true"),
    ("class_cond", True, "true (1000 classes)", "false"),
    ("in_channels", 1, "1", "3"),
]


@pytest.mark.parametrize(("key", "value", "theirs", "ours"), DENOISER_CHANGES)
def test_the_key_that_differs_is_named_and_no_other(tmp_path, key, value, theirs, ours):
    field = "model_channels" if key == "num_channels" else key
    other = shapes_of(denoiser(replace(TINY, **{field: value})))
    message = refusal(denoiser(), save_shapes(tmp_path / "other.pt", other))
    assert (
        f"does not fit the config: {key}: {theirs} in the file, {ours} in the config (" in message
    )


CLASSIFIER_CHANGES = [
    ("classifier_width", 128, "128", "64"),
    ("classifier_depth", 3, "3", "1"),
    ("classifier_attention_resolutions", (32, 8), "32,8", "16,8"),
    ("classifier_attention_resolutions", (1,), "none", "16,8"),
    ("classifier_resblock_updown", False, "false", "true"),
    ("classifier_use_scale_shift_norm", False, "false", "true"),
    ("classifier_pool", "adaptive", "adaptive", "attention"),
    ("classifier_pool", "spatial", "spatial", "attention"),
    ("classifier_pool", "spatial_v2", "spatial_v2", "attention"),
]


@pytest.mark.parametrize(("key", "value", "theirs", "ours"), CLASSIFIER_CHANGES)
def test_the_key_of_a_classifier_that_differs_is_named(tmp_path, key, value, theirs, ours):
    other = classifier(replace(GUIDE, **{key.removeprefix("classifier_"): value}))
    message = refusal(classifier(), save_shapes(tmp_path / "other.pt", shapes_of(other)))
    assert (
        f"does not fit the config: {key}: {theirs} in the file, {ours} in the config (" in message
    )


def test_a_classifier_of_another_image_size(tmp_path):
    path = save_shapes(tmp_path / "other.pt", shapes_of(classifier(image_size=128)))
    message = refusal(classifier(), path)
    assert "does not fit the config: image_size: 128 in the file, 64 in the config (" in message


def test_several_keys_that_differ_are_all_named(tmp_path):
    other = replace(TINY, model_channels=64, num_res_blocks=2, learn_sigma=False)
    message = refusal(denoiser(), save_shapes(tmp_path / "other.pt", shapes_of(denoiser(other))))
    for key in ("num_channels: 64", "num_res_blocks: 2", "learn_sigma: false"):
        assert f"{key} in the file" in message
    assert message.count(" in the config") == 3


def test_another_number_of_classes_is_told(tmp_path):
    network = denoiser(replace(TINY, class_cond=True))
    shapes = shapes_of(network) | {"label_emb.weight": (10, 128)}
    message = refusal(network, save_shapes(tmp_path / "ten.pt", shapes))
    assert "does not fit the config: num_classes: 10 in the file, 1000 in the config (" in message


def test_the_number_of_classes_of_a_network_without_any_is_told_with_class_cond(tmp_path):
    shapes = shapes_of(denoiser()) | {"label_emb.weight": (10, 128)}
    message = refusal(denoiser(), save_shapes(tmp_path / "ten.pt", shapes))
    reason = "class_cond: true (10 classes) in the file, false in the config (weights"
    assert f"does not fit the config: {reason}" in message


# ---- One weight is enough ----


def test_one_missing_one_unknown_and_one_misshaped_weight_are_each_refused(tmp_path):
    shapes = shapes_of(denoiser())
    key = "middle_block.1.norm.bias"
    without = {name: shape for name, shape in shapes.items() if name != key}
    cases = {
        f"(weights: 1 missing, first {key})": without,
        "(weights: 1 unknown, first extra)": shapes | {"extra": (1,)},
        f"(weights: 1 of another shape, first {key}, [65] in the file and [64] by the config)": (
            shapes | {key: (65,)}
        ),
        f"(weights: 1 missing, first {key}; 1 unknown, first extra)": without | {"extra": (64,)},
    }
    for expected, changed in cases.items():
        message = refusal(denoiser(), save_shapes(tmp_path / "one.pt", changed))
        assert message.endswith(expected)
        assert "no key of the config explains it" in message


# ---- Latent diffusion ----

MANIFESTS = json.loads((ROOT / "tests/golden/ldm/state_dict_manifests.json").read_text("utf-8"))
LATENT_TINY = LatentUNetConfig(  # what the manifest "tiny" describes
    image_size=16,
    model_channels=32,
    attention_resolutions=(4, 2),
    num_res_blocks=1,
    channel_mult=(1, 2, 3),
    num_heads=4,
)
VQ_TINY = AutoencoderConfig(ch=32, num_res_blocks=1, n_embed=256)


def latent_unet(config: LatentUNetConfig = LATENT_TINY) -> UNet:
    with torch.device("meta"):
        return UNet(LatentConfig(unet=config).unet_params)


def autoencoder(config: AutoencoderConfig = VQ_TINY) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(config.params)


def latent_shapes(
    unet: LatentUNetConfig = LATENT_TINY, vq: AutoencoderConfig = VQ_TINY, average: bool = True
) -> dict[str, tuple[int, ...]]:
    """What a file holds of networks of these configs."""
    unet_shapes, vq_shapes = shapes_of(latent_unet(unet)), shapes_of(autoencoder(vq))
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in unet_shapes.items()}
    shapes |= {f"first_stage_model.{key}": shape for key, shape in vq_shapes.items()}
    if average:
        names = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in unet_shapes}
        shapes |= {names[key]: shape for key, shape in unet_shapes.items()}
        shapes |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    return {"betas": (1000,), "cond_stage_model.x": (3,), "loss.logvar": (), **shapes}


class Callback:
    """Stands for what Lightning keeps of its own, and for what a hostile file may hold."""

    def __init__(self, marker: Path):
        self.evil = _MakesAFolder(marker)


def save_latent(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """A small file as Lightning writes it, beside whose tensors are objects that run code."""
    tensors = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    evil = Callback(path.with_suffix(".ran"))
    contents = {"epoch": 3, "state_dict": collections.OrderedDict(tensors), "callbacks": {0: evil}}
    torch.save({**contents, "hyper_parameters": evil, "optimizer_states": [evil]}, path)
    return str(path)


@pytest.fixture(scope="module")
def latents() -> dict[str, torch.Tensor]:
    return filled(MANIFESTS["tiny"])


def assert_part_loaded(path: Path, part: Part, expected: dict[str, torch.Tensor]) -> None:
    network = latent_unet() if part is LATENT_UNET else autoencoder()
    checked(network, path, part)
    weights = loaded(network, path, part).state_dict()
    assert {*weights} == {*expected}
    for key, weight in weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[key].float()), key


def below(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {key: weight for key, weight in weights.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): weight for key, weight in found.items()}


def averages(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of the plain weights, whose order in the file is the same."""
    names = below("model.diffusion_model.", weights)
    found = below("model_ema.diffusion_model", weights)
    return dict(zip(names, found.values(), strict=True))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_moving_average_and_the_autoencoder_load_to_the_bit(tmp_path, latents, wrapped, dtype):
    latents = {key: weight.to(dtype) for key, weight in latents.items()}
    evil = Callback(tmp_path / "ran")
    contents = {"state_dict": latents, "callbacks": evil} if wrapped else latents
    path = tmp_path / "x.ckpt"
    torch.save(contents, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_part_loaded(path, LATENT_UNET, averages(latents))
        assert_part_loaded(path, LATENT_AUTOENCODER, below("first_stage_model.", latents))
    assert not (tmp_path / "ran").exists()
    plain = below("model.diffusion_model.", latents)
    assert not any(torch.equal(plain[key], each) for key, each in averages(latents).items())


def test_a_latent_file_in_many_pieces_is_whole(tmp_path, latents, monkeypatch):
    monkeypatch.setattr(loading, "PIECE", 300)
    torch.save({"state_dict": latents}, tmp_path / "x.ckpt")
    assert_part_loaded(tmp_path / "x.ckpt", LATENT_UNET, averages(latents))


def test_of_a_latent_file_only_the_part_is_mapped(tmp_path, monkeypatch):
    mapped, map_tensors = [], lightning.map_tensors

    def spy(path, tensors):
        mapped.append({(each.start, each.shape) for each in tensors.values()})
        return map_tensors(path, tensors)

    monkeypatch.setattr(lightning, "map_tensors", spy)
    path = save_latent(tmp_path / "x.ckpt", latent_shapes())
    loaded(autoencoder(), path, LATENT_AUTOENCODER)
    stored = lightning.read_state_dict(path)
    own = {(each.start, each.shape) for each in below("first_stage_model.", stored).values()}
    assert mapped and all(each == own for each in mapped)


def test_without_a_moving_average_the_plain_weights_load_and_one_warning_says_so(tmp_path, latents):
    kept = {key: each for key, each in latents.items() if not key.startswith("model_ema.")}
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": kept}, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_part_loaded(path, LATENT_AUTOENCODER, below("first_stage_model.", kept))
        assert not caught
        assert_part_loaded(path, LATENT_UNET, below("model.diffusion_model.", kept))
        assert_part_loaded(path, LATENT_UNET, below("model.diffusion_model.", kept))
    assert [str(each.message) for each in caught] == [
        f"{path}: the file has no moving average (model_ema) of the weights; going on with the "
        "plain ones, whose pictures are worse"
    ]
    assert caught[0].category is UserWarning


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_only_the_first_warns(tmp_path, monkeypatch, rank):
    path = save_latent(tmp_path / "x.ckpt", latent_shapes(average=False))
    torchrun = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank}
    for name, value in {**torchrun, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checked(latent_unet(), path, LATENT_UNET)
    assert [str(each.message)[: len(path)] for each in caught] == [path] * (rank == 0)


def test_a_file_of_the_moving_average_alone_loads(tmp_path):
    shapes = {key: shape for key, shape in latent_shapes().items() if key.startswith("model_ema.")}
    checked(latent_unet(), save_latent(tmp_path / "x.ckpt", shapes), LATENT_UNET)
    path = save_latent(tmp_path / "other.ckpt", {**shapes, "model_ema.diffusion_modelout3": (1,)})
    message = refusal(latent_unet(), path, LATENT_UNET)
    assert "its moving average (model_ema) is of another network (weights: 1 unknown" in message


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    ("manifest", "unet", "vq", "tensors"),
    [
        ("inpainting_big", LatentUNetConfig(), AutoencoderConfig(), (416, 185)),
        ("tiny", LATENT_TINY, VQ_TINY, (218, 137)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no moving average")
def test_the_published_file_is_matched_key_for_key(tmp_path, manifest, unet, vq, tensors, average):
    shapes = MANIFESTS[manifest]
    if not average:
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("model_ema.")}
    path = save_latent(tmp_path / "x.ckpt", shapes)
    networks = {LATENT_UNET: latent_unet(unet), LATENT_AUTOENCODER: autoencoder(vq)}
    for (part, network), count in zip(networks.items(), tensors, strict=True):
        checked(network, path, part)
        assert len(network.state_dict()) == count


def test_no_two_weights_have_the_same_name_without_dots():
    deep = LatentUNetConfig(model_channels=32, channel_mult=(1,) * 7, num_res_blocks=4)
    for config in (LatentUNetConfig(), LATENT_TINY, deep):
        names = shapes_of(latent_unet(config))
        assert len({name.replace(".", "") for name in names}) == len(names)


# What of the networks a file has too few, too many or of another shape.
NAMES_OF_PARTS = {
    "average": (LATENT_UNET, "model_ema.diffusion_modelmiddle_block1normbias"),
    "autoencoder": (LATENT_AUTOENCODER, "first_stage_model.quant_conv.bias"),
}


@pytest.mark.parametrize("name", NAMES_OF_PARTS)
def test_one_weight_of_a_part_that_differs_is_refused(tmp_path, name):
    part, key = NAMES_OF_PARTS[name]
    network = latent_unet() if part is LATENT_UNET else autoencoder()
    shapes = latent_shapes()
    without = {each: shape for each, shape in shapes.items() if each != key}
    for changed, expected in [
        (without, "1 missing, first "),
        (shapes | {f"{key}2": (1,)}, "1 unknown, first "),
        (shapes | {key: (5,)}, "1 of another shape, first "),
    ]:
        message = refusal(network, save_latent(tmp_path / "x.ckpt", changed), part)
        assert f"(weights: {expected}" in message
    tensors = {each: torch.zeros(()).expand(shape) for each, shape in without.items()}
    torch.save({"state_dict": {**tensors, key: 0.5}}, tmp_path / "x.ckpt")
    message = refusal(network, tmp_path / "x.ckpt", part)
    assert message.endswith(f": {key} in it is no tensor of floating-point numbers")


def test_what_is_not_of_the_part_may_be_anything(tmp_path):
    shapes = latent_shapes() | {"model.diffusion_model.out.2.bias": (99,), "more": (1,)}
    path = save_latent(tmp_path / "x.ckpt", shapes | {"cond_stage_model.x": (7, 7)})
    checked(latent_unet(), path, LATENT_UNET)
    checked(autoencoder(), path, LATENT_AUTOENCODER)
    assert not (tmp_path / "x.ran").exists()


LATENT_CHANGES = [
    ("in_channels", 9, "9", "7"),
    ("in_channels", 4, "4", "7"),
    ("out_channels", 4, "4", "3"),
    ("model_channels", 64, "64", "32"),
    ("channel_mult", (1, 2, 2), "1,2,2", "1,2,3"),
    ("channel_mult", (1, 2, 3, 4), "1,2,3,4", "1,2,3"),
    ("num_res_blocks", 2, "2", "1"),
    ("attention_resolutions", (4, 2, 1), "4,2,1", "4,2"),
    ("attention_resolutions", (8,), "none", "4,2"),
    ("resblock_updown", False, "false", "true"),
]


@pytest.mark.parametrize(("key", "value", "theirs", "ours"), LATENT_CHANGES)
def test_the_key_of_a_latent_network_that_differs_is_named(tmp_path, key, value, theirs, ours):
    shapes = latent_shapes(replace(LATENT_TINY, **{key: value}))
    message = refusal(latent_unet(), save_latent(tmp_path / "x.ckpt", shapes), LATENT_UNET)
    reason = f"latent.unet.{key}: {theirs} in the file, {ours} in the config"
    assert f": the checkpoint does not fit the config: {reason} (weights: " in message


AUTOENCODER_CHANGES = [
    ("ch", 64, "64", "32"),
    ("ch_mult", (1, 2), "1,2", "1,2,4"),
    ("ch_mult", (1, 2, 4, 4), "1,2,4,4", "1,2,4"),
    ("ch_mult", (1, 1, 2), "1,1,2", "1,2,4"),
    ("num_res_blocks", 2, "2", "1"),
    ("n_embed", 512, "512", "256"),
    ("embed_dim", 4, "4", "3"),
    ("z_channels", 4, "4", "3"),
]


@pytest.mark.parametrize(("key", "value", "theirs", "ours"), AUTOENCODER_CHANGES)
def test_the_key_of_an_autoencoder_that_differs_is_named(tmp_path, key, value, theirs, ours):
    shapes = latent_shapes(vq=replace(VQ_TINY, **{key: value}))
    message = refusal(autoencoder(), save_latent(tmp_path / "x.ckpt", shapes), LATENT_AUTOENCODER)
    reason = f"latent.autoencoder.{key}: {theirs} in the file, {ours} in the config"
    assert f": the checkpoint does not fit the config: {reason} (weights: " in message


def test_stable_diffusion_is_refused_for_what_it_is(tmp_path):
    config = replace(LATENT_TINY, in_channels=9, out_channels=4)
    shapes = latent_shapes(config, average=False)
    attended = [key.removesuffix("qkv.weight") for key in shapes if key.endswith("qkv.weight")]
    shapes |= {f"{block}transformer_blocks.0.norm1.weight": (64,) for block in attended}
    shapes = {key: shape for key, shape in shapes.items() if ".qkv." not in key}
    del shapes["first_stage_model.quantize.embedding.weight"]
    path = save_latent(tmp_path / "sd.ckpt", shapes)
    message = refusal(latent_unet(), path, LATENT_UNET)
    for reason in ("it is guided by texts", "in_channels: 9 in the file, 7", "out_channels: 4 in"):
        assert reason in message
    assert "attention_resolutions" not in message
    message = refusal(autoencoder(), path, LATENT_AUTOENCODER)
    assert "its autoencoder has no codebook" in message and "such as KL" in message


def test_an_autoencoder_with_attention_is_refused(tmp_path):
    shapes = latent_shapes() | {"first_stage_model.encoder.mid.attn_1.norm.weight": (64,)}
    message = refusal(autoencoder(), save_latent(tmp_path / "x.ckpt", shapes), LATENT_AUTOENCODER)
    assert "its autoencoder has attention, which this program's has not (weights: " in message


def test_a_part_that_is_no_such_network(tmp_path):
    shapes = {"model.diffusion_model.conv.weight": (3,), "first_stage_model.conv.weight": (3,)}
    path = save_latent(tmp_path / "x.ckpt", shapes)
    message = refusal(latent_unet(), path, LATENT_UNET)
    assert "it is no network of this family, which would have time_embed.0.weight" in message
    message = refusal(autoencoder(), path, LATENT_AUTOENCODER)
    assert "its autoencoder has no codebook" in message


@pytest.mark.filterwarnings("ignore:.*no moving average")
@pytest.mark.parametrize("kept", [1.0, 0.6, 0.4])
def test_without_its_first_weight_a_network_is_incomplete_unless_most_is_missing(tmp_path, kept):
    def without(shapes):
        names = [name for name in shapes if "time_embed.0.weight" not in name]
        return {name: shapes[name] for name in names[: int(kept * len(names))]}

    shapes = {
        f"{LATENT_UNET.prefix}{key}": shape
        for key, shape in without(shapes_of(latent_unet())).items()
    }
    latent = save_latent(tmp_path / "latent.ckpt", shapes)
    pixel = save_shapes(tmp_path / "pixel.pt", without(shapes_of(denoiser())))
    for message in (refusal(latent_unet(), latent, LATENT_UNET), refusal(denoiser(), pixel)):
        assert ("no key of the config explains it, so the file is in" in message) == (kept > 0.5)
        assert ("it is no network of this family" in message) == (kept < 0.5)
        assert (" 1 missing, first time_embed.0.weight)" in message) == (kept == 1)


def test_an_autoencoder_of_which_there_is_only_the_codebook(tmp_path):
    shapes = {"first_stage_model.quantize.embedding.weight": (256, 3)}
    message = refusal(autoencoder(), save_latent(tmp_path / "x.ckpt", shapes), LATENT_AUTOENCODER)
    assert "does not fit the config: no key of the config explains it" in message


@pytest.mark.parametrize("shapes", [{"encoder.conv_in.weight": (3,), "loss.logvar": ()}, {}])
@pytest.mark.parametrize("part", [LATENT_UNET, LATENT_AUTOENCODER], ids=lambda part: part.prefix)
def test_a_file_of_lightning_without_latent_diffusion(tmp_path, shapes, part):
    path = save_latent(tmp_path / "x.ckpt", shapes)
    message = refusal(latent_unet(), path, part)
    assert f"no whole latent diffusion model: no name in it begins with {part.prefix!r}" in message
    assert message.endswith("; the first is 'encoder.conv_in.weight'") == bool(shapes)


@pytest.mark.parametrize("part", [LATENT_UNET, LATENT_AUTOENCODER], ids=lambda part: part.prefix)
def test_a_pixel_checkpoint_for_a_latent_one(tmp_path, tiny, part):
    torch.save({"state_dict": tiny}, tmp_path / "inside.ckpt")
    classifiers = save_shapes(tmp_path / "classifier.pt", shapes_of(classifier()))
    for path in (TINY_FILE, tmp_path / "inside.ckpt", classifiers):
        message = refusal(latent_unet(), path, part)
        assert "this is a pixel-space model: set method: pixel, or " in message


@pytest.mark.parametrize("average", [True, False])
def test_a_latent_checkpoint_for_a_pixel_one(tmp_path, average):
    shapes = latent_shapes(average=average)
    tensors = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    save_latent(tmp_path / "hostile.ckpt", shapes)
    torch.save({"state_dict": tensors}, tmp_path / "tensors.ckpt")
    torch.save(tensors, tmp_path / "plain.ckpt")
    networks = {"hostile": classifier(), "tensors": denoiser(), "plain": denoiser()}
    for name, network in networks.items():
        message = refusal(network, tmp_path / f"{name}.ckpt")
        assert "this is a latent diffusion checkpoint: set method: latent, or" in message
    assert not (tmp_path / "hostile.ran").exists()


# What a latent file may be that is none, and what is said then.
NO_LATENT_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"<!DOCTYPE html>", "this is no checkpoint, but a file of another kind"),
    "pickle": (pickle.dumps({}), "this is a file of torch before 1.6;"),
}


@pytest.mark.parametrize("name", NO_LATENT_FILES)
def test_what_is_no_latent_file(tmp_path, name):
    content, expected = NO_LATENT_FILES[name]
    path = tmp_path / "inpainting_big.ckpt"
    path.write_bytes(content)
    message = refusal(latent_unet(), path, LATENT_UNET)
    assert message.startswith(f"{path}: {expected}")
    assert message.endswith("; delete it and fetch it: bash download.sh ldm")


def test_a_latent_file_that_is_missing_incomplete_packed_or_damaged(tmp_path):
    path = tmp_path / "inpainting_big.ckpt"
    message = refusal(latent_unet(), path, LATENT_UNET)
    assert "no such checkpoint; fetch it: bash download.sh ldm." in message
    data = Path(save_latent(path, latent_shapes())).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    message = refusal(autoencoder(), path, LATENT_AUTOENCODER)
    assert "the file is incomplete, its end is missing; delete it and fetch it: bash" in message
    middle = data.index(b"first_stage_model")
    path.write_bytes(data[:middle] + b"\xff" * 50 + data[middle + 50 :])
    assert ": the file is damaged: " in refusal(autoencoder(), path, LATENT_AUTOENCODER)
    own = path.rename(tmp_path / "mine.ckpt")
    message = refusal(autoencoder(), own, LATENT_AUTOENCODER)
    assert message.endswith(
        "; fetch it again if you downloaded it, or save the whole model's state_dict()"
    )
    with zipfile.ZipFile(own, "w") as archive:
        archive.writestr("last.ckpt", data)
    problem = "this is a zip archive, but not one of torch's: it holds 'last.ckpt'; unpack it"
    assert refusal(autoencoder(), own, LATENT_AUTOENCODER) == f"{own}: {problem}"


def test_a_hostile_file_of_no_known_kind_stays_refused(tmp_path):
    path = save_latent(tmp_path / "x.ckpt", {"conv1.weight": (64, 3, 7, 7)})
    message = refusal(denoiser(), path)
    assert "it holds objects that could run code when loaded (nothing was run)" in message
    assert not (tmp_path / "x.ran").exists()


def test_a_network_in_a_hostile_file_is_taken_and_nothing_is_run(tmp_path):
    path = save_latent(tmp_path / "x.ckpt", shapes_of(denoiser()))
    with pytest.warns(UserWarning, match="took the weights under 'state_dict'; left out: 'epoch'"):
        assert not any(weight.any() for weight in loaded(denoiser(), path).state_dict().values())
    assert not (tmp_path / "x.ran").exists()


# ---- No state dict is too odd for a message ----

DENOISER_SHAPES = shapes_of(denoiser(replace(TINY, class_cond=True)))
CLASSIFIER_SHAPES = shapes_of(classifier())
AUTOENCODER_SHAPES = shapes_of(autoencoder())
EXPLAINED = [
    (DENOISER_SHAPES, explain_pixel_network),
    (CLASSIFIER_SHAPES, explain_pixel_network),
    (DENOISER_SHAPES, explain_latent_unet),
    (AUTOENCODER_SHAPES, explain_autoencoder),
]
NAMES = st.sampled_from(sorted(DENOISER_SHAPES | CLASSIFIER_SHAPES | AUTOENCODER_SHAPES))
ODD_SHAPES = st.lists(st.integers(0, 70), max_size=4).map(tuple)
ODD_NAMES = st.one_of(
    st.text(max_size=20),
    NAMES.map("module.".__add__),
    st.from_regex(
        r"(in|out)put_blocks\.[0-9]{0,5}(\.[012]\.(qkv|conv|op)\.weight)?", fullmatch=True
    ),
    st.from_regex(r"encoder\.down\.[0-9]{0,4}\.block\.[0-9]{0,4}\.conv1\.weight", fullmatch=True),
)


@settings(deadline=None, max_examples=100)
@given(
    wanted=st.sampled_from(EXPLAINED),
    found=st.sampled_from([DENOISER_SHAPES, CLASSIFIER_SHAPES, AUTOENCODER_SHAPES, {}]),
    begin=st.sampled_from(["", "out", "input_blocks", "input_blocks.3", "middle", "time", "enc"]),
    dropped=st.lists(NAMES, max_size=5),
    reshaped=st.dictionaries(NAMES, ODD_SHAPES, max_size=8),
    added=st.dictionaries(ODD_NAMES, ODD_SHAPES, max_size=8),
)
def test_any_difference_can_be_put_in_words(wanted, found, begin, dropped, reshaped, added):
    kept = {
        key: shape
        for key, shape in found.items()
        if not (begin and key.startswith(begin)) and key not in dropped
    }
    wanted_shapes, explain = wanted
    message = difference_message(wanted_shapes, kept | reshaped | added, explain)
    assert message.startswith("the checkpoint does not fit the config: ")


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 30_000), junk=st.binary(min_size=1, max_size=30))
@example(place=19177, junk=b"\x01")  # a zip archive that says it spans several disks
def test_any_damage_is_a_clear_error_or_leaves_the_file_readable(tmp_path_factory, place, junk):
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    save_shapes(path, dict(list(DENOISER_SHAPES.items())[:5]))
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + junk + data[place + len(junk) :])
    try:
        load_state_dict(str(path))
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
