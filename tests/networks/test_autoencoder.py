"""The autoencoder: names of weights, golden numbers, nearest codes; and strips that change nothing.

Strips are compared with torch's own layers over the whole picture, piece by piece and all together.
"""

import json
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree
from torch import nn

from guided_diffusion.networks import autoencoder, strips
from guided_diffusion.networks.autoencoder import Autoencoder, Codebook
from guided_diffusion.networks.layers import GroupNorm32
from guided_diffusion.networks.params import AutoencoderParams
from guided_diffusion.networks.strips import Strips, Whole, group_norm
from guided_diffusion.speed.cpu_layers import FusedGroupNorm, fuse_norms, has_cpu_layers
from guided_diffusion.speed.packed import PackedConv2d
from guided_diffusion.speed.winograd import WinogradConv2d
from tests.support.filled_weights import filled
from tests.support.peak_memory import PeakMemory

GOLDEN = Path(__file__).parents[1] / "golden" / "ldm"
PREFIX = "first_stage_model."
TINY = AutoencoderParams(ch=32, num_res_blocks=1, n_embed=256)  # as in tiny_config.json
PARAMS = {"tiny": TINY, "inpainting_big": AutoencoderParams()}
LAYERS = ["plain", "fused", "packed", 2, 4]

needs_cpu_layers = pytest.mark.skipif(not has_cpu_layers(), reason="made for x86 CPUs")


@cache
def tiny() -> Autoencoder:
    """With the weights of the golden one. Not to be changed."""
    network = Autoencoder(TINY)
    shapes = {PREFIX + key: tensor.shape for key, tensor in network.state_dict().items()}
    weights = {key.removeprefix(PREFIX): value for key, value in filled(shapes).items()}
    network.load_state_dict(weights)
    return network.eval()


def with_layers(kind: str | int) -> Autoencoder:
    """The tiny one with layers of a kind; a number: the m of Winograd's convolutions."""
    network = deepcopy(tiny())
    if kind != "plain":
        fuse_norms(network)
    if kind in ("packed", 2, 4):
        if not has_cpu_layers():
            pytest.skip("made for x86 CPUs")
        put_cpu_layers(network, kind)
    return network


def put_cpu_layers(network: Autoencoder, kind: str | int) -> None:
    names = {module: name for name, module in network.named_modules()}
    for conv, side in network.convolution_sides(32).items():
        arguments = conv.weight, conv.bias, (1, conv.in_channels, side, side), torch.float32
        if kind != "packed" and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            layer = WinogradConv2d(*arguments, m=kind)
        else:
            layer = PackedConv2d(*arguments, padding=conv.padding[0], stride=conv.stride[0])
        parent, _, child = names[conv].rpartition(".")
        setattr(network.get_submodule(parent), child, layer)


def golden(name: str) -> torch.Tensor:
    with np.load(GOLDEN / "modules.npz") as arrays:
        return torch.from_numpy(arrays[name])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def use_strips(
    monkeypatch: pytest.MonkeyPatch, strip: int, *, room: int = 2**30, largest_whole: int = 0
) -> None:
    monkeypatch.setattr(autoencoder, "LARGEST_WHOLE", largest_whole)
    monkeypatch.setattr(strips, "STRIP", strip)
    monkeypatch.setattr(strips, "ROOM", room)


# ---- The published one ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMS)
def test_names_and_shapes_are_those_of_the_checkpoint(name):
    manifest = json.loads((GOLDEN / "state_dict_manifests.json").read_text())[name]
    wanted = {
        key.removeprefix(PREFIX): tuple(shape)
        for key, shape in manifest.items()
        if key.startswith(PREFIX)
    }
    with torch.device("meta"):
        network = Autoencoder(PARAMS[name])
    found = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert found == wanted
    assert network.factor == 4


def test_an_encoder_begins_with_the_base_width():
    """Where the finest level is wider, its first block widens (Esser et al. 2021, table 7)."""
    with torch.device("meta"):
        network = Autoencoder(AutoencoderParams(ch=32, ch_mult=(2, 3)))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    assert shapes["encoder.conv_in.weight"] == (32, 3, 3, 3)
    assert shapes["encoder.down.0.block.0.nin_shortcut.weight"] == (64, 32, 1, 1)
    assert shapes["encoder.down.0.block.1.conv1.weight"] == (64, 64, 3, 3)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (64, 96, 1, 1)
    assert shapes["decoder.conv_out.weight"] == (3, 64, 3, 3)


@pytest.mark.parametrize("in_strips", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_golden_numbers(monkeypatch, kind, in_strips):
    network = with_layers(kind)
    if in_strips:
        use_strips(monkeypatch, strip=7 * 64)
    for name, function in (("encode", network.encode), ("decode", network.decode)):
        result = function(golden(f"{name}_in"))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, golden(f"{name}_out"), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch": 48}, "ch: found 48; accepted: multiples of 32"),
        ({"ch_mult": (1, 0)}, r"ch_mult: found \(1, 0\); accepted: numbers >= 1"),
        ({"num_res_blocks": 0}, "num_res_blocks: found 0; accepted: numbers >= 1"),
    ],
)
def test_what_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderParams(**changes)


def test_the_factor_follows_from_the_levels():
    network = Autoencoder(AutoencoderParams(ch=32, ch_mult=(1, 1, 2, 2), n_embed=8)).eval()
    assert network.factor == 8
    assert network.encode(random(1, 3, 16, 24)).shape == (1, 3, 2, 3)
    assert network.decode(random(1, 3, 2, 3)).shape == (1, 3, 16, 24)


# ---- Codes ------------------------------------------------------------------------------------


def codebook(codes: torch.Tensor) -> Codebook:
    book = Codebook(*codes.shape)
    book.embedding.weight.data = codes
    return book


def test_the_nearest_code_at_each_place():
    book = codebook(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    z = torch.tensor([[[[0.9, 1.1, 0.0]], [[0.0, 0.0, 1.6]]]])  # (1, 2, 1, 3)
    assert book(z).tolist() == [[[[0.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]]]


@pytest.mark.parametrize("places_at_a_time", [1, 7, 256])
def test_the_nearest_codes_are_those_of_a_tree_search(monkeypatch, places_at_a_time):
    monkeypatch.setattr(autoencoder, "PLACES", places_at_a_time)
    codes, z = random(500, 3), random(2, 3, 9, 11, seed=1)
    places = z.permute(0, 2, 3, 1).double().numpy()
    expected = codes[torch.from_numpy(KDTree(codes.double().numpy()).query(places)[1])]
    assert torch.equal(codebook(codes)(z), expected.permute(0, 3, 1, 2))


def test_codes_near_each_other_and_far_from_zero():
    """A difference of 2⁻¹⁰ at 1,000: its square is below what fp32 can add to 1,000²."""
    codes = torch.full((3, 3), 1000.0)
    codes[:, 0] += torch.tensor([0, 1, 2]) / 2**10
    z = codes.T.reshape(1, 3, 1, 3)
    assert torch.equal(codebook(codes)(z), z)


# ---- Precision and layers ---------------------------------------------------------------------


def test_half_precision_leaves_norms_codes_and_the_last_convolutions_alone():
    network = deepcopy(tiny())
    network.convert_blocks(torch.bfloat16)
    kept = {name for name, tensor in network.named_parameters() if tensor.dtype == torch.float32}
    convolutions = {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
        for key in ("weight", "bias")
    }
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in kept & convolutions} == {
        "encoder.conv_out",
        "decoder.conv_out",
        "quant_conv",
        "post_quant_conv",
    }
    assert kept >= {name for name in network.state_dict() if name not in convolutions}


@pytest.mark.parametrize("in_strips", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(monkeypatch, dtype, in_strips):
    network = deepcopy(tiny())
    network.convert_blocks(dtype)
    if in_strips:
        use_strips(monkeypatch, strip=7 * 64)
    for name, function in (("encode", network.encode), ("decode", network.decode)):
        expected, result = golden(f"{name}_out"), function(golden(f"{name}_in"))
        assert result.dtype == torch.float32
        error = (result - expected).norm() / expected.norm()
        assert 1e-5 < error < (0.05 if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strips_add_no_error_to_half_precision(monkeypatch, dtype):
    """Beside the exact result, strips are as near as the whole: statistics are in fp32.

    On average: for one picture the ratio of the two errors is by chance 0.9 as well as 1.1.
    """
    network = deepcopy(tiny())
    network.convert_blocks(dtype)
    x, z = random(128, 3, 16, 16), random(32, 3, 4, 4, seed=1)
    latents, pictures = tiny().encode(x), tiny().decode(z)

    def errors() -> list[torch.Tensor]:
        differences = network.encode(x) - latents, network.decode(z) - pictures
        return [difference.flatten(1).norm(dim=1).mean() for difference in differences]

    of_whole = errors()
    use_strips(monkeypatch, strip=5 * 16)
    for in_strips, whole in zip(errors(), of_whole, strict=True):
        assert in_strips < 1.05 * whole


def test_the_sides_of_what_convolutions_work_on():
    network, sides = deepcopy(tiny()), {}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, inputs, _: sides.update({m: inputs[0].shape[3]}))
    network.decode(network.encode(random(1, 3, 32, 32)))
    assert network.convolution_sides(32) == sides
    assert set(sides.values()) == {32, 33, 16, 17, 8}


def test_every_norm_is_fused_with_the_silu_after_it():
    network = with_layers("fused")
    fused = [module for module in network.modules() if isinstance(module, FusedGroupNorm)]
    inside = [module for module in network.modules() if isinstance(module, GroupNorm32)]
    assert [layer.norm for layer in fused] == inside
    assert all(layer.silu for layer in fused)
    assert not any(isinstance(module, nn.SiLU) for module in network.modules())
    assert {norm.eps for norm in inside} == {1e-6}


# ---- Strips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("height", "width", "strip", "room"),
    [
        (40, 24, 40 * 24, 2**30),  # one at full size
        (40, 24, 9 * 24, 2**30),  # of 9 rows, and 4 left over
        (40, 24, 9 * 24, 0),
        (44, 36, 13 * 36, 3 * 16 * 44 * 36),  # room as in large pictures
        (20, 28, 2 * 28, 0),  # of two rows
        (20, 28, 1, 0),
    ],
)
def test_strips_change_nothing(monkeypatch, kind, height, width, strip, room):
    network = with_layers(kind)
    x, z = random(2, 3, height, width), random(2, 3, height // 4, width // 4, seed=1)
    latent, picture = network.encode(x), network.decode(z)
    use_strips(monkeypatch, strip, room=room)
    tolerance = 5e-5 if kind == 4 else 1e-5  # tiles lie elsewhere, so rounding differs
    torch.testing.assert_close(network.encode(x), latent, rtol=0, atol=tolerance)
    torch.testing.assert_close(network.decode(z), picture, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(
    ("room", "first", "widest"), [(2**30, 70, 70), (3 * 16 * 64 * 64, 70 + 76, 70 + 76 + 70)]
)
def test_how_many_rows_are_convolved(monkeypatch, room, first, widest):
    """Of 64, in four strips, each with a row more on either side where there is one: 70. Where room
    is little, a block's first convolution is computed again, and the widest one three times.
    """
    network, rows = deepcopy(tiny()), Counter()
    names = {module: name for name, module in network.named_modules()}
    for conv in network.convolution_sides(64):
        conv.register_forward_hook(lambda m, _, y: rows.update({names[m]: y.shape[2]}))
    use_strips(monkeypatch, strip=16 * 64, room=room)
    network.encode(random(1, 3, 64, 64))
    network.decode(random(1, 3, 16, 16))
    assert rows["encoder.down.0.block.0.conv1"] == first
    assert rows["decoder.up.0.block.1.conv1"] == first
    assert rows["decoder.up.1.upsample.conv"] == widest
    assert rows["decoder.up.0.block.0.nin_shortcut"] == 64  # which looks at no other rows
    assert rows["decoder.up.0.block.0.conv1"] == rows["decoder.conv_out"] == 70


def test_only_large_pictures_are_computed_in_strips(monkeypatch):
    made = []
    monkeypatch.setattr(autoencoder, "Strips", Whole)
    monkeypatch.setattr(Whole, "of", lambda x: made.append(x) or Whole(x), raising=False)
    use_strips(monkeypatch, strip=2**17, largest_whole=16 * 16)
    network = tiny()
    network.encode(random(3, 3, 16, 16))
    network.decode(random(3, 3, 4, 4))
    assert made == []
    network.encode(random(3, 3, 20, 16))
    assert [x.shape for x in made] == [(1, 3, 20, 16)] * 3
    network.decode(random(2, 3, 4, 5))
    assert [x.shape for x in made[3:]] == [(1, 3, 4, 5)] * 2


def test_a_megapixel_is_large():
    assert 256 * 256 < autoencoder.LARGEST_WHOLE < 1024 * 1024


STEPS = {
    "to": lambda x: x.to(torch.float64),
    "convolved": lambda x: x.convolved(_conv(3, padding=1)),
    "pointwise": lambda x: x.convolved(_conv(1), reach=0),
    "activated": lambda x: x.activated(_norm(), nn.SiLU()),
    "halved": lambda x: x.halved(_conv(3, stride=2)),
    "doubled": lambda x: x.doubled(),
    "plus": lambda x: x.plus(x.convolved(_conv(3, padding=1))),
    "two": lambda x: x.doubled().convolved(_conv(3, padding=1)).halved(_conv(3, stride=2)),
}


@cache
def _conv(size: int, **arguments: int) -> nn.Conv2d:
    conv = nn.Conv2d(64, 64, size, **arguments)
    conv.weight.data = random(*conv.weight.shape) / (64 * size**2) ** 0.5
    return conv.requires_grad_(False)


@cache
def _norm() -> GroupNorm32:
    norm = GroupNorm32(64)
    norm.weight.data, norm.bias.data = 1 + 0.3 * random(64), random(64, seed=1)
    return norm.requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from(list(STEPS)),
    height=st.integers(2, 9),
    rows_at_a_time=st.integers(1, 10),
    span=st.tuples(st.integers(0, 18), st.integers(0, 18)),
)
def test_any_rows_of_any_step(step, height, rows_at_a_time, span):
    x = random(2, 64, height, 6)
    expected = STEPS[step](Whole(x)).tensor
    first, end = sorted(place % (expected.shape[2] + 1) for place in span)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(strips, "STRIP", rows_at_a_time * 6)
        picture = STEPS[step](Strips.of(x))
        stored = picture.stored()
        if first < end:
            rows = picture.rows(first, end)
            torch.testing.assert_close(rows, expected[:, :, first:end], rtol=1e-5, atol=1e-5)
    assert (picture.height, picture.width) == expected.shape[2:]
    assert stored.tensor.dtype == expected.dtype
    assert stored.tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(stored.tensor, expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_a_picture_that_hardly_varies(monkeypatch):
    """Brightness 300 and a contrast of 0.1, brighter to the bottom: the sum of squares fails."""
    monkeypatch.setattr(strips, "STRIP", 5 * 8)
    x = 300 + 0.1 * random(2, 64, 17, 8) + torch.linspace(0, 1, 17)[:, None]
    y = F.silu(F.group_norm(x.double(), 32, eps=1e-5))
    norm = GroupNorm32(64).requires_grad_(False)
    found = Strips.of(x).activated(norm, nn.SiLU()).stored().tensor
    assert (found - y).abs().max() < 2e-3  # of which the subtraction of 300 in fp32 is most


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 3, 100])
def test_a_picture_takes_the_place_of_what_it_is_computed_from(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(strips, "STRIP", rows_at_a_time * 5)
    conv, x = _conv(3, padding=1), random(1, 64, 8, 5)
    expected = conv(conv(x)) + x
    before = Strips.of(x)
    others = [before.doubled(), Strips.of(random(1, 64, 4, 5))]  # not stored; of another shape
    after = before.convolved(conv).convolved(conv).plus(before).stored(over=[*others, before])
    assert after.tensor is x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_what_there_is_room_for_is_stored(monkeypatch):
    x = Strips.of(random(2, 64, 5, 6))
    assert x.held == 64 * 5 * 6
    monkeypatch.setattr(strips, "ROOM", (1 + 4) * x.held)
    assert x.doubled().stored_if_room(64).tensor.shape == (2, 64, 10, 12)
    assert x.doubled().stored_if_room(64).held == 4 * x.held
    monkeypatch.setattr(strips, "ROOM", (1 + 4) * x.held - 1)
    assert x.doubled().stored_if_room(64).tensor is None


@pytest.mark.parametrize("wrap", [lambda norm: norm, lambda norm: FusedGroupNorm(norm, silu=True)])
def test_the_norm_inside_a_layer(wrap: Callable[[GroupNorm32], nn.Module]):
    norm = GroupNorm32(32)
    assert group_norm(wrap(norm)) is norm


def test_results_are_without_gradients():
    assert not tiny().encode(random(1, 3, 8, 8)).requires_grad
    assert not tiny().decode(random(1, 3, 2, 2)).requires_grad


def peak_in_pictures(name: str, side: int) -> float:
    """Memory at the peak, in pictures of 32 channels at full size, 128×128."""
    with PeakMemory() as memory:
        getattr(tiny(), name)(torch.zeros(1, 3, side, side))
    return memory.peak / (32 * 128 * 128)


@pytest.mark.parametrize(("name", "side", "whole"), [("encode", 128, 4), ("decode", 32, 6)])
def test_memory_stays_near_that_of_one_and_a_half_pictures(monkeypatch, name, side, whole):
    """Also where the widest pictures, of twice the size, come into it."""
    assert peak_in_pictures(name, side) >= whole
    use_strips(monkeypatch, strip=2 * 128, room=3 * 16 * 128 * 128)
    assert peak_in_pictures(name, side) < 1.8
