"""`python benchmark.py`: the figures agree with one another, and with what is known of them."""

import json
import tempfile
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import factory
from guided_diffusion.benchmark import network as benchmarking
from guided_diffusion.benchmark import setup
from guided_diffusion.benchmark.network import Ceiling, Convolution, Figures, FirstEvaluation, Pairs
from guided_diffusion.checkpoints.loading import LATENT_UNET
from guided_diffusion.config import Config, UserError, load_config
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.networks.unet import UNet
from guided_diffusion.speed.choice import Speed
from tests import latent_memory
from tests.support.benchmark_command import LATENT, SHAPES, Result, command, load, write

CPU = torch.device("cpu")
VARIANTS = {
    "plain": {},
    "convolutions that resample": {"resblock_updown": True},
    "class-conditional, other attention": {"class_cond": True, "use_new_attention_order": True},
}


def on_meta(config: Config) -> UNet:
    with torch.device("meta"):
        return UNet(config.network.params)


def with_weights(config: Config, folder: Path) -> Config:
    path = folder / "random.pt"
    torch.save(setup.random_weights(on_meta(config)), path)
    return replace(config, model_path=str(path))


@pytest.fixture
def temporary(tmp_path) -> Path:
    """The folder for temporary files, which is empty at first."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    with patch.object(tempfile, "tempdir", str(folder)):
        yield folder


# ---- A run as a user sees it ----


@dataclass(frozen=True)
class Finished:
    result: Result
    figures: dict
    left_behind: list[Path]


BALLAST = 2**30  # bytes that this process has held, unlike the one whose memory is measured


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    folder, temporary = (tmp_path_factory.mktemp(name) for name in ("finished", "temporary"))
    torch.ones(BALLAST // 4)
    with (
        patch.object(tempfile, "tempdir", str(temporary)),
        patch.object(benchmarking, "MOST_PAIRS", 5),
    ):
        result = command("--conf_path", write(folder), "--batch", "2", "--json")
    # Torch may make a folder of its own, for what it compiles.
    return Finished(result, json.loads(result.out), list(temporary.glob("benchmark-*")))


def test_json_is_one_object_and_nothing_else(finished):
    assert finished.result.status == 0
    assert len(finished.result.out.splitlines()) == 1
    assert set(finished.figures) >= {
        *("ms_per_evaluation", "plain_ms_per_evaluation", "ratio_to_plain"),
        *("tflops", "ceiling_tflops", "share_of_ceiling", "images_per_hour"),
        *("peak_memory_bytes", "seconds_to_first_evaluation", "evaluations_per_image"),
        *("precision", "batch", "device", "machine"),
    }


def test_what_was_asked_for_was_measured(finished):
    f = finished.figures
    assert (f["name"], f["precision"], f["batch"], f["device"]) == ("tiny", "fp32", 2, "cpu")
    assert f["evaluations_per_image"] == 5
    assert f"torch {torch.__version__}" in f["machine"]


def test_the_figures_agree(finished):
    f = finished.figures
    for prefix in ("", "plain_"):
        fastest, slowest = f[f"{prefix}ms_spread"]
        assert 0 < fastest <= f[f"{prefix}ms_per_evaluation"] <= slowest
    ms = f["ms_per_evaluation"]
    assert f["ratio_to_plain"] == pytest.approx(f["plain_ms_per_evaluation"] / ms)
    assert f["tflops"] == pytest.approx(f["tflop_per_evaluation"] / ms * 1000)
    assert f["share_of_ceiling"] == pytest.approx(f["tflops"] / f["ceiling_tflops"])
    assert f["images_per_hour"] == pytest.approx(2 * 3600 / (5 * ms / 1000))


def test_memory_and_start_are_those_of_a_fresh_process(finished):
    assert 50e6 < finished.figures["peak_memory_bytes"] < BALLAST
    assert 0.2 < finished.figures["seconds_to_first_evaluation"] < 60


def test_nothing_is_left_behind(finished):
    assert "GB of random weights" in finished.result.err
    assert finished.left_behind == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_nothing_is_left_behind_by_a_run_that_ends_early(tmp_path, temporary, error):
    def fail(config, settings, model_path, batch):
        assert Path(model_path).is_relative_to(temporary) and Path(model_path).is_file()
        raise error

    config = load(tmp_path)
    with patch.object(benchmarking, "run_first_evaluation", fail), pytest.raises(error):
        benchmarking.measure(config, [], 1)
    assert list(temporary.iterdir()) == []


# ---- Arguments ----


def asked_for(*arguments: str) -> tuple[Config, int]:
    """Config and batch size that a command line would measure."""
    with patch.object(benchmarking, "measure") as measure:
        measure.return_value.describe.return_value = "a table"
        assert command(*arguments).out == "a table\n"
    (config, settings, batch), _ = measure.call_args
    assert load_config(config.source, settings, require_data=False) == config
    return config, batch


def test_settings_win_over_the_file_and_precision_is_one(tmp_path):
    conf = ["--conf_path", write(tmp_path, precision="fp32")]
    config, batch = asked_for(*conf)
    assert (config.speed.precision, batch) == ("fp32", 1)
    config, batch = asked_for(*conf, "--precision", "bf16", "--batch", "7")
    assert (config.speed.precision, batch) == ("bf16", 7)
    config, _ = asked_for(*conf, "--set", "fast=true", "--set", "precision=bf16")
    assert (config.speed.precision, config.speed.fast) == ("bf16", True)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--batch", "0"], "--batch: found 0; accepted: a whole number >= 1"),
        (["--batch", "two"], "--batch: found two"),
        (["--batch", "-1"], "--batch: found -1"),
        (["--precision", "fp8"], "precision: found fp8"),
        (["--precision", "tf32"], "precision: found tf32"),
        (["--set", "cuda_graph=true"], "cuda_graph: "),
        (["--set", "sede=1"], "sede: unknown key"),
        (["--set", "timestep_respacing=ddim333"], "timestep_respacing"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    tmp_path, temporary, arguments, fragment
):
    with patch.object(setup, "random_weights", side_effect=AssertionError):
        result = command("--conf_path", write(tmp_path), *arguments)
    assert result.status == 2 and result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and fragment in line
    assert list(temporary.iterdir()) == []


def test_a_full_disk(tmp_path, temporary):
    with patch.object(torch, "save", side_effect=RuntimeError("unexpected pos 704 vs 598")):
        result = command("--conf_path", write(tmp_path))
    *_, line = result.err.splitlines()
    assert result.status == 2
    assert line.startswith("error: cannot write 0.00") and "TMPDIR" in line
    assert list(temporary.iterdir()) == []


def test_a_process_that_the_system_ends(tmp_path):
    pool = MagicMock()
    pool().__enter__().submit().result.side_effect = BrokenProcessPool
    with (
        patch.object(benchmarking, "ProcessPoolExecutor", pool),
        pytest.raises(UserError, match="lack of memory"),
    ):
        benchmarking.run_first_evaluation(load(tmp_path), [], "random.pt", 1)


def test_too_little_memory_on_a_gpu(tmp_path, temporary):
    failure = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with (
        patch.object(benchmarking, "run_first_evaluation", side_effect=failure),
        pytest.raises(UserError, match="memory for --batch 3; lower it"),
    ):
        benchmarking.measure(load(tmp_path), [], 3)


GUIDED = {
    **{"image_size": 64, "attention_resolutions": "32"},
    **{"classifier_scale": 1.0, "classifier_path": "nowhere/c.pt"},
}


@pytest.mark.parametrize("keys", [GUIDED, {"method": "latent"}], ids=["guided", "latent"])
def test_the_first_evaluation_needs_no_classifier(tmp_path, keys):
    config = load(tmp_path, **keys)
    pool = MagicMock()
    with patch.object(benchmarking, "ProcessPoolExecutor", pool):
        path = tmp_path / "a folder: with 'quotes' & \"more\" #.pt"
        benchmarking.run_first_evaluation(config, ["seed=5"], str(path), 1)
    function, _, settings, *_ = pool().__enter__().submit.call_args.args
    assert function is benchmarking.first_evaluation
    child = load_config(config.source, settings, require_data=False)
    assert child == replace(config, model_path=str(path), classifier=None, seed=5)


# ---- Operations ----


def test_operations_are_those_counted_by_hand(tmp_path):
    def conv(channels: int, out_channels: int, side: int, kernel: int = 3) -> int:
        return side**2 * channels * out_channels * kernel**2

    def linear(channels: int, out_channels: int) -> int:
        return channels * out_channels

    def res_block(channels: int, width: int, side: int) -> int:
        skip = conv(channels, width, side, kernel=1) if channels != width else 0
        scale_and_shift = linear(128, 2 * width)
        return conv(channels, width, side) + conv(width, width, side) + skip + scale_and_shift

    def attention(width: int, side: int) -> int:
        qkv_and_proj = conv(width, 4 * width, side, kernel=1)
        return qkv_and_proj + 2 * side**4 * width  # each token with each, twice

    multiply_adds = (
        linear(32, 128)  # time
        + linear(128, 128)
        + conv(3, 32, 16)  # down
        + res_block(32, 32, 16)
        + conv(32, 32, 8)  # with stride 2
        + res_block(32, 64, 8)
        + attention(64, 8)
        + 2 * res_block(64, 64, 8)  # middle
        + attention(64, 8)
        + res_block(64 + 64, 64, 8)  # up
        + attention(64, 8)
        + res_block(64 + 32, 64, 8)
        + attention(64, 8)
        + conv(64, 64, 16)
        + res_block(64 + 32, 32, 16)
        + res_block(32 + 32, 32, 16)
        + conv(32, 6, 16)  # out
    )
    network = on_meta(load(tmp_path))
    for batch in (1, 3):
        assert benchmarking.count_operations(network, batch) == 2 * batch * multiply_adds


def test_the_largest_convolutions_come_first(tmp_path):
    network = on_meta(load(tmp_path))
    largest = benchmarking.largest_convolutions(network, 2)
    assert len(largest) == benchmarking.LARGEST
    assert largest[:3] == [
        Convolution(2, 64, 64, 8),  # eight of them
        Convolution(2, 32, 32, 16),  # four, with a share of 1 / 2 each
        Convolution(2, 64, 64, 16),  # one, with a share of 4
    ]
    with patch.object(benchmarking, "LARGEST", 100):
        everything = benchmarking.largest_convolutions(network, 2)
    assert Convolution(2, 3, 32, 16) in everything
    assert Convolution(2, 32, 32, 8) not in everything  # its stride is 2


@pytest.mark.parametrize(
    "candidate", [Convolution(2, 8, 16, 4), benchmarking.MatrixProduct(8, 4, 16)], ids=str
)
def test_operations_and_type_of_what_the_ceiling_is_measured_with(candidate):
    function = candidate.prepare(torch.bfloat16, CPU)
    with FlopCounterMode(display=False) as counter:
        assert function().dtype == torch.bfloat16
    assert counter.get_total_flops() == candidate.operations


def test_the_ceiling_is_the_best_of_all(tmp_path):
    speeds = iter([3.0, 1.0, *[5.0] * 100])  # milliseconds: of the first, warm-up and one run
    with patch.object(benchmarking, "milliseconds", lambda function, device: next(speeds)):
        ceiling = benchmarking.measure_ceiling(on_meta(load(tmp_path)), 1, Speed(), CPU)
    operations = 2 * 9 * 8 * 8 * 64 * 64
    assert ceiling.tflops == pytest.approx(operations / 1e-3 / 1e12)
    assert ceiling.operation == "3×3 convolution of 64 to 64 channels at 8×8, batch 1"


# ---- Both networks ----


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_plain_way_gives_what_the_fast_way_gives(tmp_path, variant):
    config = with_weights(load(tmp_path, **VARIANTS[variant]), tmp_path)
    inputs = setup.example(config.network.params, 2, CPU)
    plain = benchmarking.plain_network(config, CPU)(*inputs)
    fast = factory.load_networks(config, CPU, Speed())["denoiser"](*inputs)
    assert plain.isfinite().all() and plain.std() > 0.1
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_the_plain_way_is_fp32_nchw_with_explicit_attention(tmp_path):
    config = with_weights(load(tmp_path, use_fp16=True, precision="bf16"), tmp_path)
    network = benchmarking.plain_network(config, CPU)
    seen = []

    def convolution(x, weight, *arguments):
        seen.append(x.is_contiguous() and weight.is_contiguous() and x.dtype == torch.float32)
        return conv2d(x, weight, *arguments)

    def attention(q, k, v):
        seen.append(torch.backends.cuda.math_sdp_enabled() and q.dtype == torch.float32)
        seen.append(not torch.backends.cuda.flash_sdp_enabled())
        return sdpa(q, k, v)

    conv2d, sdpa = F.conv2d, F.scaled_dot_product_attention
    with (
        patch.object(F, "conv2d", convolution),
        patch.object(F, "scaled_dot_product_attention", attention),
    ):
        network(*setup.example(config.network.params, 1, CPU))
    assert len(seen) > 20 and all(seen)


class PlainHere:
    """A `_PlainProcess` that is this process, where functions can be patched."""

    def __init__(self, *arguments: object):
        benchmarking._prepare_plain(*arguments)
        self.milliseconds = benchmarking._plain_milliseconds

    def __enter__(self) -> "PlainHere":
        return self

    def __exit__(self, *_: object) -> None:
        benchmarking._plain.clear()


def test_each_network_is_measured_on_its_own_layout(tmp_path, temporary):
    def fast(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> float:
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return 1.0

    def plain(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> float:
        assert x.is_contiguous() and x.shape == (3, 3, 64, 64) and len(t) == len(y) == 3
        return 2.0

    guided = {"classifier_scale": 1.0, "classifier_path": "none.pt", "classifier_use_fp16": True}
    keys = {"image_size": 64, "attention_resolutions": "32", "class_cond": True, **guided}
    with (
        patch.object(benchmarking, "time_shares"),
        patch.object(benchmarking, "run_first_evaluation"),
        patch.object(benchmarking, "measure_ceiling"),
        patch.object(factory, "load_networks", lambda *_: {"denoiser": fast}),
        patch.object(benchmarking, "plain_network", lambda config, device: plain),
        patch.object(benchmarking, "_PlainProcess", PlainHere),
        patch.object(benchmarking, "milliseconds", lambda function, device: function()),
    ):
        figures = benchmarking.measure(load(tmp_path, **keys), [], 3)
    pairs = [1.0] * benchmarking.MOST_PAIRS, [2.0] * benchmarking.MOST_PAIRS
    assert (figures.evaluation, figures.coding) == (Pairs(*pairs), {})
    assert figures.ratio_to_plain == 2


def test_random_weights_leave_nothing_at_zero(tmp_path):
    network = on_meta(load(tmp_path, class_cond=True))
    weights = setup.random_weights(network)
    assert {key: w.shape for key, w in weights.items()} == {
        key: w.shape for key, w in network.state_dict().items()
    }
    assert all(w.dtype == torch.float32 and w.std() > 0 for w in weights.values())


# ---- Time ----


def turns(seconds: float) -> str:
    order = []
    with patch.object(benchmarking, "SECONDS_FOR_PAIRS", seconds):
        series = benchmarking.alternate([lambda: order.append("a"), lambda: order.append("b")], CPU)
    assert all(len(times) == len(order) // 2 - 1 for times in series)  # less the warm-up
    return "".join(order)


def test_functions_are_called_in_turns_as_often_as_time_allows():
    assert turns(seconds=60) == "ab" * (1 + benchmarking.MOST_PAIRS)
    assert turns(seconds=0) == "ab" * (1 + benchmarking.LEAST_PAIRS)


class Sleeper(torch.nn.SiLU):
    def __init__(self, seconds: float, inside: torch.nn.Module | None = None):
        super().__init__()
        self.seconds, self.inside = seconds, inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.inside(x) if self.inside else x


class Inner(Sleeper):
    pass


def test_the_time_of_a_part_does_not_count_those_inside_it():
    network = torch.nn.Sequential(Sleeper(0.02, Inner(0.06)), Sleeper(0.02))
    with patch.object(benchmarking, "_PARTS", {Sleeper: "outer", Inner: "inner"}):
        shares = benchmarking.time_shares(network, [torch.zeros(1)])
    assert list(shares) == ["inner", "outer", "the rest"]
    assert abs(shares["inner"] - 0.6) < 0.1 and abs(shares["outer"] - 0.4) < 0.1
    assert not any(module._forward_hooks for module in network.modules())


# ---- The table ----


def figures(config: Config, **changes: object) -> Figures:
    known = Figures(
        config=config,
        speed=Speed("bf16", reason="fast: a reason"),
        device=CPU,
        machine="a machine",
        batch=2,
        weights=12_340_000,
        operations=5 * 10**11,
        evaluations_per_image=2410,
        evaluation=Pairs([250.0, 240.0, 1500.0], [1000.0, 1300.0, 990.0]),
        coding={},
        shares={"attention": 0.25, "the rest": 0.75},
        sampler_ms=1.5,
        ceiling=Ceiling(2.5, "an operation"),
        first=FirstEvaluation(3.25, 0.5, 2_345_000_000),
    )
    return replace(known, **changes)


def row(table: str, label: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_the_table(tmp_path):
    table = figures(load(tmp_path)).describe()
    assert "network for 16×16 images, 12.3 M weights, 0.500 TFLOP an evaluation of batch 2" in table
    assert "a machine; device cpu" in table and "bf16 (fast: a reason)" in table
    assert row(table, "milliseconds an evaluation, median") == ["250", "1,000"]
    assert row(table, "fastest") == ["240", "990"]
    assert row(table, "slowest") == ["1,500", "1,300"]
    assert row(table, "attention") == ["25.0%"] and row(table, "the rest") == ["75.0%"]
    assert row(table, "the sampler adds") == ["1.50"]
    assert row(table, "images per hour, at 2,410 evaluations") == ["12.0", "2.99"]
    assert row(table, "TFLOP/s") == ["2.00", "0.500"]
    assert row(table, "ceiling in bf16") == ["2.50"]
    assert row(table, "share of it") == ["80%"]
    assert row(table, "peak memory, GB") == ["2.35"]
    assert row(table, "seconds until the first evaluation") == ["3.25"]
    assert row(table, "times as fast as plain") == ["4.00", "1"]
    assert "an operation" in table and "3 times, in turns" in table
    assert max(map(len, table.splitlines())) <= 100


def test_the_table_where_memory_is_unknown_and_sampling_is_guided(tmp_path):
    keys = {"image_size": 64, "attention_resolutions": "32"}
    config = load(tmp_path, classifier_scale=1.0, classifier_path="nowhere/c.pt", **keys)
    known = figures(config)
    table = replace(known, first=replace(known.first, peak_memory_bytes=None)).describe()
    assert row(table, "peak memory, GB") == ["unknown"]
    assert "The classifier that guides this config's sampling is not counted." in table
    assert "classifier" not in figures(load(tmp_path)).describe()


# ---- Latent diffusion ----


def with_all_weights(config: Config, folder: Path) -> Config:
    """As `with_weights`, of both networks of a latent config."""
    path = folder / "random.ckpt"
    with setup.random_checkpoint(benchmarking.networks_of(config)) as written:
        path.write_bytes(Path(written).read_bytes())
    return replace(config, model_path=str(path))


def first_evaluation_here(
    config: Config, settings: list[str], model_path: str, batch: int
) -> FirstEvaluation:
    """In place of `run_first_evaluation`, in this process."""
    settings = [*settings, f"model_path={model_path}"]
    return benchmarking.first_evaluation(config.source, settings, batch, time.time())


@pytest.fixture
def measured_here():
    """All is measured in this process, and briefly."""
    with (
        patch.object(benchmarking, "run_first_evaluation", first_evaluation_here),
        patch.object(benchmarking, "_PlainProcess", PlainHere),
        patch.object(benchmarking, "MOST_PAIRS", 3),
        patch.object(benchmarking, "CEILING_RUNS", 1),
    ):
        yield


def test_a_run_with_latent_diffusion(tmp_path, temporary, measured_here):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the checkpoint has a moving average, as it should
        result = command(
            *("--conf_path", write(tmp_path, method="latent"), "--batch", "2", "--json")
        )
    f = json.loads(result.out)
    assert (f["evaluations_per_image"], f["image_size"], f["runs"]) == (4, 64, 3)
    for prefix in ("", "plain_"):
        assert f[f"{prefix}encode_ms"] > 0 and f[f"{prefix}decode_ms"] > 0
    seconds = (4 * f["ms_per_evaluation"] / 2 + f["encode_ms"] + f["decode_ms"]) / 1000
    assert f["images_per_hour"] == pytest.approx(3600 / seconds)
    assert f["ratio_to_plain"] == pytest.approx(
        f["plain_ms_per_evaluation"] / f["ms_per_evaluation"]
    )
    assert 0 < f["seconds_of_first_evaluation"] < 60 and f["sampler_ms_per_evaluation"] > 0
    assert list(temporary.glob("benchmark-*")) == []


def test_the_pixel_table_says_nothing_of_latents(tmp_path):
    known = figures(load(tmp_path))
    assert "encode" not in known.describe() and "autoencoder" not in known.describe()
    assert not any("code" in key or key == "image_size" for key in known.to_json())


def test_the_table_with_latent_diffusion(tmp_path):
    coding = {
        "encode": Pairs([100.0, 90.0, 200.0], [400.0, 300.0, 500.0]),
        "decode": Pairs([300.0] * 3, [1200.0] * 3),
    }
    config = load(tmp_path, method="latent")
    known = figures(config, coding=coding, evaluations_per_image=4)
    table = known.describe()
    assert "network for 64×64 images, 12.3 M weights" in table
    assert row(table, "milliseconds to encode an image, median") == ["100", "400"]
    assert row(table, "milliseconds to decode an image, median") == ["300", "1,200"]
    # 4 × 250 / 2 + 100 + 300 = 900 milliseconds; 4 × 1000 / 2 + 400 + 1200 = 3600
    assert row(table, "images per hour, at 4 evaluations") == ["4,000", "1,000"]
    assert "The autoencoder's time counts in images per" in table
    json_figures = known.to_json()
    assert [json_figures[f"{name}_ms"] for name in coding] == [100, 300]
    assert [json_figures[f"plain_{name}_ms"] for name in coding] == [400, 1200]


@pytest.mark.parametrize(
    ("image_size", "side", "latent_side"), [(None, 64, 16), (64, 64, 16), (100, 100, 28), (1, 1, 4)]
)
def test_latents_are_those_of_the_pictures(tmp_path, image_size, side, latent_side):
    config = load(tmp_path, method="latent", image_size=image_size)
    assert f"network for {side}×{side} images" in figures(config).describe()
    network = benchmarking.networks_of(config)[LATENT_UNET]
    x, _ = setup.example(network.params, 2, CPU)
    assert x.shape == (2, 7, latent_side, latent_side)
    # Attention stays at the same levels.
    assert network.params.attends(4) and network.params.attends(2) and not network.params.attends(1)
    (convolution, *_) = benchmarking.largest_convolutions(network, 1)
    assert convolution.side in (latent_side, latent_side // 2, latent_side // 4)


def test_a_pixel_network_is_of_its_own_size(tmp_path):
    config = load(tmp_path)
    assert setup.picture_side(config) == 16


def test_names_and_shapes_of_random_weights_are_those_of_the_published_file(tmp_path):
    config = with_all_weights(load(tmp_path, method="latent"), tmp_path)
    manifest = json.loads((SHAPES.parent / "state_dict_manifests.json").read_text("utf-8"))["tiny"]
    averages = ("model_ema.diffusion_model", "first_stage_model.")
    expected = {key: shape for key, shape in manifest.items() if key.startswith(averages)}
    weights = torch.load(config.model_path)
    assert {key: list(weight.shape) for key, weight in weights.items()} == expected
    assert len(expected) > 200


@torch.no_grad()
def test_the_plain_ways_of_latent_diffusion_give_what_the_fast_ones_give(tmp_path):
    config = with_all_weights(load(tmp_path, method="latent"), tmp_path)
    network = benchmarking.networks_of(config)[LATENT_UNET]
    inputs = setup.example(network.params, 1, CPU)
    plain = benchmarking.plain_network(config, CPU)(*inputs)
    networks = factory.load_networks(config, CPU, Speed())
    fast = networks["denoiser"](*inputs)
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    autoencoder = networks["autoencoder"]
    coders = benchmarking.plain_coders(config, CPU), (autoencoder.encode, autoencoder.decode)
    torch.manual_seed(0)
    x, z = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 3, 16, 16)
    for plain, fast, argument in zip(*coders, (x, z), strict=True):
        torch.testing.assert_close(fast(argument), plain(argument), atol=1e-4, rtol=1e-4)


def test_the_plain_autoencoder_is_fp32_nchw(tmp_path):
    config = with_all_weights(load(tmp_path, method="latent", precision="bf16"), tmp_path)
    seen = []

    def convolution(x, weight, *arguments):
        seen.append(x.is_contiguous() and weight.is_contiguous() and x.dtype == torch.float32)
        return conv2d(x, weight, *arguments)

    conv2d = F.conv2d
    functions = benchmarking._coding(config, benchmarking.plain_coders(config, CPU), CPU)
    assert list(functions) == ["encode", "decode"]
    with patch.object(F, "conv2d", convolution):
        latent, picture = (function() for function in functions.values())
    assert (latent.shape, picture.shape) == ((1, 3, 16, 16), (1, 3, 64, 64))
    assert len(seen) == 40 and all(seen)  # convolutions, of both ways


def test_the_first_evaluation_of_latent_diffusion(tmp_path):
    """The autoencoder is used as in a run, but its decoding is not the evaluation's time."""
    config = with_all_weights(load(tmp_path, method="latent"), tmp_path)
    calls, now, encode, decode = [], [1000.0], Autoencoder.encode, Autoencoder.decode

    def watched_encode(network: Autoencoder, x: torch.Tensor) -> torch.Tensor:
        calls.append(("encode", tuple(x.shape)))
        now[0] += 5
        return encode(network, x)

    def watched_decode(network: Autoencoder, z: torch.Tensor) -> torch.Tensor:
        calls.append(("decode", tuple(z.shape)))
        now[0] += 100
        return decode(network, z)

    with (
        patch.object(Autoencoder, "encode", watched_encode),
        patch.object(Autoencoder, "decode", watched_decode),
        patch.object(benchmarking.time, "time", lambda: now[0]),
    ):
        first = first_evaluation_here(config, [], config.model_path, 2)
    assert calls == [("encode", (2, 3, 64, 64)), ("decode", (2, 3, 16, 16))]
    assert (first.seconds_until, first.seconds) == (5, 0)


def test_a_plain_process_that_the_system_ends(tmp_path):
    pool = MagicMock()
    with patch.object(benchmarking, "ProcessPoolExecutor", pool):
        process = benchmarking._PlainProcess(load(tmp_path), CPU, 1)
        pool().submit().result.side_effect = BrokenProcessPool
        with pytest.raises(UserError, match="plain way .* lack of memory"):
            process.milliseconds("evaluate")


# ---- Memory for large pictures ----


def test_what_a_whole_run_takes(tmp_path):
    """`latent_memory` looks at a run of test.py that makes its picture."""
    keys = {"latent": LATENT["latent"], "ddim_steps": 2}
    latent_memory.write_config(tmp_path / "config.yml", keys)
    latent_memory.draw(tmp_path, 80)
    config = load_config(str(tmp_path / "config.yml"), require_data=False)
    config = with_all_weights(config, tmp_path)
    seconds, peak = latent_memory.inpaint(config.source, [f"model_path={config.model_path}"])
    calls = {name: len(times) for name, times in seconds.items()}
    assert calls == {"encode": 1, "evaluation": 2, "decode": 1}
    assert all(time > 0 for times in seconds.values() for time in times) and peak > 50e6
    image, result = (
        Image.open(tmp_path / path) for path in ("image.png", "out/inpainted/image.png")
    )
    assert result.size == (80, 80)
    different = [one != other for one, other in zip(image.getdata(), result.getdata(), strict=True)]
    assert 0.9 < sum(different) / 40**2 <= 1  # all of the hidden quarter, but for accidents
