"""`python benchmark.py`: the figures agree with one another, and with what is known of them."""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import factory
from guided_diffusion.benchmark import network as benchmarking
from guided_diffusion.benchmark import setup
from guided_diffusion.benchmark.network import Product
from guided_diffusion.checkpoints.loading import LATENT_UNET
from guided_diffusion.config import Config, UserError, load_config
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
    """With a checkpoint of random weights, of both networks if it is a latent config."""
    path = folder / "random.ckpt"
    with setup.random_checkpoint(setup.networks_of(config)) as written:
        path.write_bytes(Path(written).read_bytes())
    return replace(config, model_path=str(path))


@contextmanager
def in_this_process() -> Iterator[Callable[..., object]]:
    """In place of `fresh_process`: here functions can be patched."""
    functions = {}

    def ask(function: Callable[..., object], *arguments: object) -> object:
        with patch.object(benchmarking, "_functions", functions):
            return function(*arguments)

    yield ask


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files, which is empty at first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # made when torch imports it
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


@pytest.mark.slow
def test_json_is_one_object_and_nothing_else(finished):
    assert finished.result.status == 0
    assert len(finished.result.out.splitlines()) == 1
    assert set(finished.figures) >= {
        *("ms_per_evaluation", "plain_ms_per_evaluation", "ratio_to_plain"),
        *("tflops", "ceiling_tflops", "share_of_ceiling", "images_per_hour"),
        *("peak_memory_bytes", "evaluations_per_image"),
        *("precision", "batch", "device", "machine"),
    }


@pytest.mark.slow
def test_what_was_asked_for_was_measured(finished):
    f = finished.figures
    assert (f["name"], f["precision"], f["batch"], f["device"]) == ("tiny", "fp32", 2, "cpu")
    assert f["evaluations_per_image"] == 5
    assert f"torch {torch.__version__}" in f["machine"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process(finished):
    assert 50e6 < finished.figures["peak_memory_bytes"] < BALLAST


@pytest.mark.slow
def test_nothing_is_left_behind(finished):
    assert "GB of random weights" in finished.result.err
    assert finished.left_behind == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_nothing_is_left_behind_by_a_run_that_ends_early(tmp_path, temporary, error):
    def fail(config, *_):
        path = Path(config.model_path)
        assert path.is_relative_to(temporary) and path.is_file()
        raise error

    config = load(tmp_path)
    with patch.object(benchmarking, "compare", fail), pytest.raises(error):
        benchmarking.measure(config, 1)
    assert list(temporary.iterdir()) == []


# ---- Arguments ----


def asked_for(*arguments: str) -> tuple[Config, int]:
    """Config and batch size that a command line would measure."""
    with (
        patch.object(benchmarking, "measure") as measure,
        patch.object(benchmarking, "describe", return_value="a table"),
    ):
        assert command(*arguments).out == "a table\n"
    return measure.call_args.args


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


@pytest.mark.parametrize(
    "error",
    [BrokenProcessPool(), MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory")],
    ids=["ended by the system", "memory", "memory of a GPU"],
)
def test_too_little_memory(error):
    with (
        patch.object(benchmarking, "ProcessPoolExecutor") as pool,
        benchmarking.fresh_process() as ask,
        pytest.raises(UserError, match="not enough memory .* lower --batch"),
    ):
        pool().__enter__().submit().result.side_effect = error
        ask(print)


def test_another_failure_of_a_process_is_not_called_one_of_memory():
    with (
        patch.object(benchmarking, "ProcessPoolExecutor") as pool,
        benchmarking.fresh_process() as ask,
        pytest.raises(UserError, match="no such weights"),
    ):
        pool().__enter__().submit().result.side_effect = UserError("no such weights")
        ask(print)


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


def convolution(batch: int, channels: int, out_channels: int, side: int) -> Product:
    return Product((batch, channels, side, side), (out_channels, channels, 3, 3))


def test_the_largest_convolutions_come_first(tmp_path):
    network = on_meta(load(tmp_path))
    largest = benchmarking.largest_convolutions(network, 2)
    assert len(largest) == benchmarking.LARGEST
    assert largest[:3] == [
        convolution(2, 64, 64, 8),  # eight of them
        convolution(2, 32, 32, 16),  # four, with a share of 1 / 2 each
        convolution(2, 64, 64, 16),  # one, with a share of 4
    ]
    with patch.object(benchmarking, "LARGEST", 100):
        everything = benchmarking.largest_convolutions(network, 2)
    assert convolution(2, 3, 32, 16) in everything
    assert convolution(2, 32, 32, 8) not in everything  # its stride is 2
    assert convolution(2, 32, 32, 16) in everything and len(everything) == len(set(everything))


@pytest.mark.parametrize("candidate", [convolution(2, 8, 16, 4), Product((8, 4), (16, 4))], ids=str)
def test_operations_and_type_of_what_the_ceiling_is_measured_with(candidate):
    function = candidate.prepare(torch.bfloat16, CPU)
    with FlopCounterMode(display=False) as counter:
        assert function().dtype == torch.bfloat16
    assert counter.get_total_flops() == candidate.operations


def test_the_ceiling_is_the_best_of_all(tmp_path):
    speeds = iter([3.0, 1.0, *[5.0] * 100])  # milliseconds: of the first, warm-up and one run
    with patch.object(benchmarking, "milliseconds", lambda function, device: next(speeds)):
        largest = benchmarking.largest_convolutions(on_meta(load(tmp_path)), 1)
        tflops, operation = benchmarking.measure_ceiling(largest, Speed(), CPU)
    operations = 2 * 9 * 8 * 8 * 64 * 64
    assert tflops == pytest.approx(operations / 1e-3 / 1e12)
    assert operation == "3×3 convolution of 64 to 64 channels at 8×8, batch 1"


def test_the_ceiling_is_also_looked_for_among_the_products_of_each_tap():
    tried = []

    def attempt(product: Product, dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
        tried.append((product, dtype))
        return float(len(tried)), str(product)

    with patch.object(benchmarking, "_try", attempt):
        best = benchmarking.measure_ceiling([convolution(2, 8, 16, 4)], Speed("bf16"), CPU)
    assert best == (2.0, "product of 32×8 and 8×16 matrices")
    assert tried == [
        (convolution(2, 8, 16, 4), torch.bfloat16),
        (Product((32, 8), (16, 8)), torch.bfloat16),
    ]


# ---- Both ways ----


def outputs_of_both(config: Config, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the fast and the plain way give, of the same inputs."""
    torch.manual_seed(0)
    fast = benchmarking.fast_functions(config, CPU, batch, Speed())
    torch.manual_seed(0)
    plain = benchmarking.plain_functions(config, CPU, batch)
    assert list(fast) == list(plain)
    return ((fast[name](), plain[name]()) for name in fast)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_plain_way_gives_what_the_fast_way_gives(tmp_path, variant):
    config = with_weights(load(tmp_path, **VARIANTS[variant]), tmp_path)
    ((fast, plain),) = outputs_of_both(config, 2)
    assert plain.isfinite().all() and plain.std() > 0.1
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_the_plain_way_is_fp32_nchw_with_explicit_attention(tmp_path):
    config = load(tmp_path, use_fp16=True, precision="bf16")
    functions = benchmarking.plain_functions(config, CPU, 1)
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
        functions["evaluate"]()
    assert len(seen) > 20 and all(seen)


def test_each_network_is_measured_on_its_own_layout(tmp_path, temporary):
    def fast(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> float:
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return 1.0

    def plain(self: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> float:
        assert x.is_contiguous() and x.shape == (3, 3, 64, 64) and len(t) == len(y) == 3
        return 2.0

    keys = {"image_size": 64, "attention_resolutions": "32", "class_cond": True, **GUIDED}
    with (
        patch.object(benchmarking, "count_operations", return_value=1),
        patch.object(benchmarking, "largest_convolutions"),
        patch.object(benchmarking, "measure_ceiling", lambda *_: (1.0, "an operation")),
        patch.object(factory, "load_networks", lambda *_: {"denoiser": fast}),
        patch.object(UNet, "forward", plain),
        patch.object(benchmarking, "fresh_process", in_this_process),
        patch.object(benchmarking, "milliseconds", lambda function, device: function()),
    ):
        f = benchmarking.measure(load(tmp_path, **keys), 3)
    assert (f["ms_spread"], f["plain_ms_spread"]) == ([1.0, 1.0], [2.0, 2.0])
    assert (f["runs"], f["ratio_to_plain"]) == (benchmarking.MOST_PAIRS, 2)
    assert not any("code" in key for key in f)


def test_the_ratio_is_the_same_on_a_machine_that_slows_down(tmp_path):
    """Since the calls of both ways come in pairs."""
    milliseconds_of = {"fast": 1.0, "plain": 4.0}
    calls = []

    def slower_and_slower(way: str, device: torch.device) -> float:
        calls.append(way)
        return milliseconds_of[way] * (1 if len(calls) < benchmarking.MOST_PAIRS else 3)

    config = load(tmp_path)
    with (
        patch.object(benchmarking, "fast_functions", lambda *_: {"evaluate": "fast"}),
        patch.object(benchmarking, "plain_functions", lambda *_: {"evaluate": "plain"}),
        patch.object(benchmarking, "measure_ceiling"),
        patch.object(benchmarking, "fresh_process", in_this_process),
        patch.object(benchmarking, "milliseconds", slower_and_slower),
    ):
        times, plain_times, *_ = benchmarking.compare(config, CPU, 1, Speed(), on_meta(config))
    known = times, plain_times, None, (1.0, "an operation")
    assert max(times["evaluate"]) == 3 * min(times["evaluate"])
    assert measured(config, known)["ratio_to_plain"] == pytest.approx(4, rel=0.03)


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


# ---- The table ----

GUIDED = {"classifier_scale": 1.0, "classifier_path": "nowhere/c.pt", "classifier_use_fp16": True}
PAPER = {  # 2410 evaluations
    "timestep_respacing": "250",
    "schedule_jump_params": {"t_T": 250, "n_sample": 1, "jump_length": 10, "jump_n_sample": 10},
}
KNOWN = (
    {"evaluate": [250.0, 240.0, 1500.0]},
    {"evaluate": [1000.0, 1300.0, 990.0]},
    2_345_000_000,
    (2.5, "an operation"),
)


def measured(config: Config, known: tuple = KNOWN) -> dict:
    """The figures of batch 2, where an evaluation's 5e11 operations took so long."""
    with (
        patch.object(setup, "random_weights", return_value={}),
        patch.object(setup, "describe_machine", return_value="a machine"),
        patch.object(factory, "choose_speed", return_value=Speed("bf16", reason="fast: a reason")),
        patch.object(benchmarking, "count_operations", return_value=5 * 10**11),
        patch.object(benchmarking, "compare", return_value=known),
    ):
        return benchmarking.measure(config, 2)


def row(table: str, label: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_the_table(tmp_path):
    table = benchmarking.describe(measured(load(tmp_path, **PAPER)))
    assert "network for 16×16 images, 0.8 M weights, 0.500 TFLOP an evaluation of batch 2" in table
    assert "a machine; device cpu" in table and "bf16 (fast: a reason)" in table
    assert row(table, "milliseconds an evaluation, median") == ["250", "1,000"]
    assert row(table, "fastest") == ["240", "990"]
    assert row(table, "slowest") == ["1,500", "1,300"]
    assert row(table, "images per hour, at 2,410 evaluations") == ["12.0", "2.99"]
    assert row(table, "TFLOP/s") == ["2.00", "0.500"]
    assert row(table, "ceiling in bf16") == ["2.50"]
    assert row(table, "share of it") == ["80%"]
    assert row(table, "peak memory, GB") == ["2.35"]
    assert row(table, "times as fast as plain") == ["4.00", "1"]
    assert "an operation" in table and "3 times, in turns" in table
    assert max(map(len, table.splitlines())) <= 100


def test_the_share_is_that_of_the_ceiling(tmp_path):
    f = measured(load(tmp_path))
    assert (f["tflops"], f["ceiling_tflops"], f["share_of_ceiling"]) == (2.0, 2.5, 0.8)


def test_the_table_where_memory_is_unknown_and_sampling_is_guided(tmp_path):
    keys = {"image_size": 64, "attention_resolutions": "32"}
    config = load(tmp_path, **GUIDED, **keys)
    times, plain_times, _, ceiling = KNOWN
    table = benchmarking.describe(measured(config, (times, plain_times, None, ceiling)))
    assert row(table, "peak memory, GB") == ["unknown"]
    assert "The classifier that guides this config's sampling is not counted." in table
    assert "classifier" not in benchmarking.describe(measured(load(tmp_path)))


# ---- Latent diffusion ----


@pytest.fixture
def measured_here():
    """All is measured in this process, and briefly."""
    with (
        patch.object(benchmarking, "fresh_process", in_this_process),
        patch.object(benchmarking, "LEAST_PAIRS", 1),
        patch.object(benchmarking, "MOST_PAIRS", 1),
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
    assert (f["evaluations_per_image"], f["image_size"], f["runs"]) == (4, 64, 1)
    for prefix in ("", "plain_"):
        assert f[f"{prefix}encode_ms"] > 0 and f[f"{prefix}decode_ms"] > 0
    seconds = (4 * f["ms_per_evaluation"] / 2 + f["encode_ms"] + f["decode_ms"]) / 1000
    assert f["images_per_hour"] == pytest.approx(3600 / seconds)
    assert f["ratio_to_plain"] == pytest.approx(
        f["plain_ms_per_evaluation"] / f["ms_per_evaluation"]
    )
    assert list(temporary.glob("benchmark-*")) == []


def test_the_pixel_table_says_nothing_of_latents(tmp_path):
    known = measured(load(tmp_path))
    table = benchmarking.describe(known)
    assert "encode" not in table and "autoencoder" not in table
    assert not any("code" in key for key in known)


def test_the_table_with_latent_diffusion(tmp_path):
    """The autoencoder's times are of batches of two; what is told of them is of one image."""
    times, plain_times, *others = KNOWN
    times = times | {"encode": [200.0, 180.0, 400.0], "decode": [600.0] * 3}
    plain_times = plain_times | {"encode": [800.0, 600.0, 1000.0], "decode": [2400.0] * 3}
    f = measured(load(tmp_path, method="latent"), (times, plain_times, *others))
    table = benchmarking.describe(f)
    assert "network for 64×64 images" in table
    assert row(table, "milliseconds to encode an image, median") == ["100", "400"]
    assert row(table, "milliseconds to decode an image, median") == ["300", "1,200"]
    # 4 × 250 / 2 + 100 + 300 = 900 milliseconds; 4 × 1000 / 2 + 400 + 1200 = 3600
    assert row(table, "images per hour, at 4 evaluations") == ["4,000", "1,000"]
    assert "The autoencoder's time counts in images per" in table
    assert [f[f"{name}_ms"] for name in ("encode", "decode")] == [100, 300]
    assert [f[f"plain_{name}_ms"] for name in ("encode", "decode")] == [400, 1200]


@pytest.mark.parametrize(
    ("image_size", "side", "latent_side"), [(None, 64, 16), (64, 64, 16), (100, 100, 28), (1, 1, 4)]
)
def test_latents_are_those_of_the_pictures(tmp_path, image_size, side, latent_side):
    config = load(tmp_path, method="latent", image_size=image_size)
    assert measured(config)["image_size"] == side
    network = setup.networks_of(config)[LATENT_UNET]
    x, _ = setup.network_inputs(network.params, 2, CPU)
    assert x.shape == (2, 7, latent_side, latent_side)
    # Attention stays at the same levels.
    assert network.params.attends(4) and network.params.attends(2) and not network.params.attends(1)
    (largest, *_) = benchmarking.largest_convolutions(network, 1)
    assert largest.x[2] in (latent_side, latent_side // 2, latent_side // 4)


def test_a_pixel_network_is_of_its_own_size(tmp_path):
    assert measured(load(tmp_path))["image_size"] == 16


def test_names_and_shapes_of_random_weights_are_those_of_the_published_file(tmp_path):
    config = with_weights(load(tmp_path, method="latent"), tmp_path)
    manifest = json.loads((SHAPES.parent / "state_dict_manifests.json").read_text("utf-8"))["tiny"]
    averages = ("model_ema.diffusion_model", "first_stage_model.")
    expected = {key: shape for key, shape in manifest.items() if key.startswith(averages)}
    weights = torch.load(config.model_path)
    assert {key: list(weight.shape) for key, weight in weights.items()} == expected
    assert len(expected) > 200


@torch.no_grad()
def test_the_plain_ways_of_latent_diffusion_give_what_the_fast_ones_give(tmp_path):
    config = with_weights(load(tmp_path, method="latent"), tmp_path)
    for number, (fast, plain) in enumerate(outputs_of_both(config, 1)):
        assert plain.shape == [(1, 3, 16, 16), (1, 3, 16, 16), (1, 3, 64, 64)][number]
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_the_plain_autoencoder_is_fp32_nchw(tmp_path):
    config = load(tmp_path, method="latent", precision="bf16")
    seen = []

    def convolution(x, weight, *arguments):
        seen.append(x.is_contiguous() and weight.is_contiguous() and x.dtype == torch.float32)
        return conv2d(x, weight, *arguments)

    conv2d = F.conv2d
    functions = benchmarking.plain_functions(config, CPU, 1)
    with patch.object(F, "conv2d", convolution):
        latent, picture = (functions[name]() for name in ("encode", "decode"))
    assert (latent.shape, picture.shape) == ((1, 3, 16, 16), (1, 3, 64, 64))
    assert len(seen) == 40 and all(seen)  # convolutions, of both ways


# ---- Memory for large pictures ----


def test_what_a_whole_run_takes(tmp_path):
    """`latent_memory` looks at a run of test.py that makes its picture."""
    keys = {"latent": LATENT["latent"], "ddim_steps": 2}
    latent_memory.write_config(tmp_path / "config.yml", keys)
    latent_memory.draw(tmp_path, 80)
    config = load_config(str(tmp_path / "config.yml"), require_data=False)
    config = with_weights(config, tmp_path)
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
