"""Denoiser and classifier: names and shapes of weights, outputs, precision, start of training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guided_diffusion.config import load_config
from guided_diffusion.networks.layers import GroupNorm32, attention, timestep_embedding
from guided_diffusion.networks.params import UNetParams
from guided_diffusion.networks.unet import ResBlock, UNet
from tests.support.networks import (
    GOLDEN,
    NETWORKS,
    TINY,
    Shapes,
    filled_network,
    golden_params,
    on_meta,
    pool_params,
    shapes_of,
)
from tests.support.peak_memory import PeakMemory

ROOT = Path(__file__).parents[2]
CONFS = [ROOT / "confs" / "face_example.yml", *sorted((ROOT / "confs").glob("test_*.yml"))]
MANIFESTS = json.loads((GOLDEN / "state_dict_manifests.json").read_text())
UNCONDITIONAL_MANIFEST = "celeba256_250000.pt / places256_300000.pt"


def as_shapes(manifest: dict[str, list[int]]) -> Shapes:
    return {key: tuple(shape) for key, shape in manifest.items()}


# ---- Golden networks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_golden_networks_names_shapes_and_outputs(name, tmp_path):
    params = golden_params(name, tmp_path)
    assert shapes_of(params) == as_shapes(NETWORKS[name]["state_dict"])

    network = filled_network(params)
    with np.load(GOLDEN / "network_forward.npz") as arrays:
        x, t, out = (torch.from_numpy(arrays[f"{name}.{array}"]) for array in ("x", "t", "out"))
        conditional = isinstance(params, UNetParams) and params.num_classes
        y = [torch.from_numpy(arrays[f"{name}.y"])] if conditional else []
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            output = network(x.contiguous(memory_format=memory_format), t, *y)
            torch.testing.assert_close(output, out, atol=1e-4, rtol=1e-4)


# ---- Published checkpoints --------------------------------------------------------------------


def test_there_are_19_published_configs():
    masks = ("thin", "thick", "ev2li", "nn2", "ex64", "genhalf")
    families = [f"test_{f}_{m}" for f in ("c256", "inet256", "p256") for m in masks]
    assert {path.stem for path in CONFS} == {"face_example", *families}


@pytest.mark.parametrize("conf", CONFS, ids=lambda path: path.stem)
def test_a_published_configs_networks_fit_their_checkpoints(conf):
    config = load_config(str(conf))
    imagenet = "inet256" in conf.stem
    manifest = "256x256_diffusion.pt" if imagenet else UNCONDITIONAL_MANIFEST
    assert Path(config.model_path).name in manifest
    assert shapes_of(config.network.params) == as_shapes(MANIFESTS[manifest])
    assert (config.classifier is not None) == imagenet
    if config.classifier:
        classifier = Path(config.classifier.path).name
        params = config.classifier.params(config.network.image_size)
        assert shapes_of(params) == as_shapes(MANIFESTS[classifier])


# ---- The classifier's pools -------------------------------------------------------------------

POOLS = {  # at widths 64, 128, 192, 256: features are means of all blocks' 1344 channels
    "attention": {
        "out.0.weight": (256,),
        "out.0.bias": (256,),
        "out.2.positional_embedding": (256, 65),
        "out.2.qkv_proj.weight": (768, 256, 1),
        "out.2.qkv_proj.bias": (768,),
        "out.2.c_proj.weight": (1000, 256, 1),
        "out.2.c_proj.bias": (1000,),
    },
    "adaptive": {
        "out.0.weight": (256,),
        "out.0.bias": (256,),
        "out.3.weight": (1000, 256, 1, 1),
        "out.3.bias": (1000,),
    },
    "spatial": {
        "out.0.weight": (2048, 1344),
        "out.0.bias": (2048,),
        "out.2.weight": (1000, 2048),
        "out.2.bias": (1000,),
    },
    "spatial_v2": {
        "out.0.weight": (2048, 1344),
        "out.0.bias": (2048,),
        "out.1.weight": (2048,),
        "out.1.bias": (2048,),
        "out.3.weight": (1000, 2048),
        "out.3.bias": (1000,),
    },
}


def pooled(pool: str, w: dict[str, torch.Tensor], blocks: list[torch.Tensor]) -> torch.Tensor:
    """The logits, from the weights of `out` and the outputs of all blocks."""
    if pool == "adaptive":
        h = F.silu(normalised(blocks[-1], w["out.0.weight"], w["out.0.bias"]))
        return h.mean(dim=(2, 3)) @ w["out.3.weight"][:, :, 0, 0].T + w["out.3.bias"]
    h = torch.cat([block.mean(dim=(2, 3)) for block in blocks], dim=1)
    h = h @ w["out.0.weight"].T + w["out.0.bias"]
    if pool == "spatial":
        return h.clamp(min=0) @ w["out.2.weight"].T + w["out.2.bias"]
    h = F.silu(normalised(h[:, :, None, None], w["out.1.weight"], w["out.1.bias"])[:, :, 0, 0])
    return h @ w["out.3.weight"].T + w["out.3.bias"]


def normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Group norm with 32 groups and eps 1e-5 of (B, C, H, W), spelt out."""
    groups = x.reshape(len(x), 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    unit = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return unit * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pools_names_and_shapes(pool, tmp_path):
    shapes = shapes_of(pool_params(pool, tmp_path))
    assert {key: shape for key, shape in shapes.items() if key.startswith("out.")} == POOLS[pool]


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
@torch.no_grad()
def test_a_pool_equals_a_plain_computation(pool, tmp_path):
    network = filled_network(pool_params(pool, tmp_path))
    outputs = []
    for block in [*network.input_blocks, network.middle_block]:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    torch.manual_seed(0)
    logits = network(torch.randn(2, 3, 64, 64), torch.tensor([10, 700]))
    assert logits.shape == (2, 1000)
    expected = pooled(pool, network.state_dict(), outputs)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# ---- Precision and memory ---------------------------------------------------------------------


@torch.no_grad()
def test_in_half_precision_only_the_blocks_convolutions_are_half():
    network = filled_network(TINY)
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 800])
    full = network(x, t)
    network.convert_blocks(torch.float16)
    state_dict = network.state_dict()
    convolutions = {
        key.removesuffix(".weight")
        for key, tensor in state_dict.items()
        if key.split(".")[0] in ("input_blocks", "middle_block", "output_blocks")
        and tensor.dim() > 2
    }
    assert {
        "input_blocks.0.0",
        "middle_block.1.qkv",
        "output_blocks.3.0.skip_connection",
    } <= convolutions
    for key, tensor in state_dict.items():
        is_half = key.rpartition(".")[0] in convolutions
        assert tensor.dtype == (torch.float16 if is_half else torch.float32), key

    half = network(x, t)
    assert half.dtype == torch.float32
    difference = (half - full).norm() / full.norm()
    assert 0 < difference < 5e-3  # a half has 11 bits: 5e-4, summed over some twenty layers


def test_a_norm_computes_in_full_precision_whatever_its_input(monkeypatch):
    computed_in = []
    group_norm = F.group_norm

    def recording(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        computed_in.append(x.dtype)
        return group_norm(x, *arguments)

    monkeypatch.setattr(F, "group_norm", recording)
    x = torch.randn(1, 32, 4, 4, generator=torch.manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        output = GroupNorm32(32)(x.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), group_norm(x, 32), atol=0.02, rtol=0)
    assert computed_in == [torch.float32] * 2


def test_recomputing_activations_leaves_the_gradients_as_they_are():
    def gradients(use_checkpoint: bool) -> tuple[dict[str, torch.Tensor], int]:
        network = filled_network(replace(TINY, use_checkpoint=use_checkpoint))
        calls = []
        network.middle_block[0].register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        network(torch.randn(1, 3, 16, 16), torch.tensor([500])).square().sum().backward()
        return {key: p.grad for key, p in network.named_parameters()}, len(calls)

    (plain, plain_calls), (recomputed, recomputed_calls) = gradients(False), gradients(True)
    assert (plain_calls, recomputed_calls) == (1, 2)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    torch.testing.assert_close(recomputed, plain)


# ---- Layers -----------------------------------------------------------------------------------


def test_a_residual_block_holds_no_picture_longer_than_it_must():
    """At most two of its output at a time, counted in those."""
    params = UNetParams(64, 32, (1,), 1, (), use_scale_shift_norm=False)
    block, x, emb = (
        ResBlock(params, 32, 64).eval(),
        torch.zeros(1, 32, 256, 256),
        torch.zeros(1, 128),
    )
    with torch.no_grad(), PeakMemory() as memory:
        block(x, emb)
    assert 2 <= memory.peak / (64 * 256 * 256) < 2.1


def test_an_evaluation_holds_no_picture_longer_than_it_must():
    """At the peak, on the way up to full size: those are the numbers of 32 channels there."""
    params = UNetParams(256, 32, (1, 2, 4), 2, (), use_scale_shift_norm=False, resblock_updown=True)
    network, x, t = UNet(params).eval(), torch.zeros(1, 3, 256, 256), torch.zeros(1)
    with torch.no_grad(), PeakMemory() as memory:
        network(x, t)
    block_in, normed, activated, skips_left = 3, 3, 3, 2
    at_least = block_in + normed + activated + skips_left
    assert at_least <= memory.peak / (32 * 256 * 256) < at_least + 0.5


@pytest.mark.parametrize("heads_first", [True, False])
def test_attention_equals_an_explicit_softmax(heads_first):
    batch, tokens, heads, width = 2, 5, 3, 4
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=torch.manual_seed(0)).double()
    expected = torch.empty(batch, tokens, heads * width, dtype=torch.float64)
    for head in range(heads):
        order = [3 * head, 3 * head + 1, 3 * head + 2]
        if not heads_first:
            order = [head, heads + head, 2 * heads + head]
        q, k, v = (qkv[:, :, i * width : (i + 1) * width] for i in order)
        weights = (q @ k.transpose(1, 2) / math.sqrt(width)).exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        expected[:, :, head * width : (head + 1) * width] = weights @ v
    torch.testing.assert_close(attention(qkv, heads, heads_first), expected)


def test_the_timestep_embedding_by_hand_for_an_odd_width_and_a_fractional_time():
    embedding = timestep_embedding(torch.tensor([0.0, 2.5]), 5)  # frequencies 1 and 1 / 100
    angles = [math.cos(2.5), math.cos(0.025), math.sin(2.5), math.sin(0.025)]
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [*angles, 0.0]])
    torch.testing.assert_close(embedding, expected)


def test_whole_times_may_be_integers():
    times = torch.tensor([0, 999])
    torch.testing.assert_close(timestep_embedding(times, 32), timestep_embedding(times.float(), 32))


# ---- Fresh networks ---------------------------------------------------------------------------


def test_training_starts_from_zero_where_the_contract_says_so():
    torch.manual_seed(0)
    network = UNet(TINY)
    zero = {key for key, p in network.named_parameters() if p.dim() > 1 and not p.any()}
    endings = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    assert zero == {key for key in shapes_of(TINY) if key.endswith(endings)}
    biases = [
        p for key, p in network.named_parameters() if key.removesuffix("bias") + "weight" in zero
    ]
    assert not any(bias.any() for bias in biases)
    assert not network(torch.randn(1, 3, 16, 16), torch.tensor([5])).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 15}, r"image_size: found 15; accepted: multiples of 2\*\*1, for 2 levels"),
        ({"channel_mult": (1, 1.5)}, r"found 32; accepted: what makes \[32, 48\], .* of 32"),
        ({"channel_mult": (0, 1)}, r"model_channels: found 32; accepted: what makes \[0, 32\]"),
        ({"num_heads": 3}, r"num_heads: found 3; accepted: divisors of \[64, 64\]"),
        ({"num_heads_upsample": 3}, r"num_heads_upsample: found 3; accepted: divisors of \[64\]"),
        ({"num_head_channels": 48}, r"num_head_channels: found 48; accepted: divisors of"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_with_both_values(changes, message):
    with pytest.raises(ValueError, match=message):
        on_meta(replace(TINY, **changes))
