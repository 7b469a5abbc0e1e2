"""Fast convolutions against torch's own in float64, and Winograd's identity in fractions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.speed import winograd
from guided_diffusion.speed.cpu_layers import has_cpu_layers
from guided_diffusion.speed.packed import PackedConv2d
from guided_diffusion.speed.winograd import WinogradConv2d

needs_cpu_layers = pytest.mark.skipif(not has_cpu_layers(), reason="made for x86 CPUs")
needs_bf16 = pytest.mark.skipif(
    not (has_cpu_layers() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU does not convolve in bf16",
)
FP32, BF16 = torch.float32, torch.bfloat16
TILES = (2, 4)
METHODS = [
    ("packed", FP32),
    (2, FP32),
    (4, FP32),
    pytest.param("packed", BF16, marks=needs_bf16),
    pytest.param(2, BF16, marks=needs_bf16),
]
# Largest error of an output, in standard deviations of the outputs; measured: a third at most.
LARGEST_ERROR = {
    ("packed", FP32): 2e-5,
    ("packed", BF16): 0.05,
    (2, FP32): 5e-6,
    (2, BF16): 0.12,
    (4, FP32): 1e-4,
}


@dataclass(frozen=True)
class Problem:
    """A 3×3 convolution of random pictures."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def expected(self) -> torch.Tensor:
        x, weight, bias = (tensor.double() for tensor in (self.x, self.weight, self.bias))
        return F.conv2d(x, weight, bias, padding=1)

    def layer(self, method: str | int) -> Callable[[torch.Tensor], torch.Tensor]:
        arguments = (self.weight, self.bias, (1, *self.x.shape[1:]), self.x.dtype)
        if method == "packed":
            return PackedConv2d(*arguments, padding=1)
        return WinogradConv2d(*arguments, m=method)

    def solve(self, method: str | int) -> torch.Tensor:
        return self.layer(method)(self.x)


def problem(
    channels: int, out_channels: int, height: int, width: int, batch: int = 1, dtype=FP32
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator)
    return Problem(
        x.to(dtype, memory_format=torch.channels_last),
        weight / (9 * channels) ** 0.5,
        torch.randn(out_channels, generator=generator),
    )


def largest_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).abs().max() / expected.std()).item()


def mean_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


# ---- The algorithm ----------------------------------------------------------------------------


def exact(matrix: winograd.Matrix) -> list[list[Fraction]]:
    """The fractions that a matrix of floats stands for."""
    fractions = [[Fraction(c).limit_denominator(24) for c in line] for line in matrix]
    assert [list(map(float, line)) for line in fractions] == [list(line) for line in matrix]
    return fractions


@pytest.mark.parametrize("m", TILES)
def test_the_matrices_convolve_exactly(m):
    """Aᵀ ((G w) ⊙ (Bᵀ d)) is a convolution for all w, d: so it is for each pair of unit ones."""
    weight, input_, output = (
        exact(matrices[m]) for matrices in (winograd._WEIGHT, winograd._INPUT, winograd._OUTPUT)
    )
    for i, j, k in product(range(m), range(3), range(m + 2)):
        places = range(m + 2)
        result = sum(output[i][p] * weight[p][j] * input_[p][k] for p in places)
        assert result == (1 if k == i + j else 0), (i, j, k)


# ---- Results ----------------------------------------------------------------------------------


@needs_cpu_layers
@pytest.mark.parametrize(
    "shape", [(3, 5, 8, 12, 2), (40, 24, 24, 8, 1), (1, 1, 4, 4, 3), (192, 64, 16, 32, 1)]
)
@pytest.mark.parametrize(("method", "dtype"), METHODS)
def test_a_convolution_equals_torchs_in_float64(method, dtype, shape):
    some = problem(*shape, dtype=dtype)
    y = some.solve(method)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert largest_error(y, some.expected) < LARGEST_ERROR[method, dtype]


@needs_cpu_layers
@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["packed", *TILES]),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.integers(1, 3),
)
def test_any_channels_and_sizes(method, channels, tiles, batch):
    m = 1 if method == "packed" else method
    some = problem(*channels, tiles[0] * m, tiles[1] * m, batch)
    expected = some.expected
    error = (some.solve(method).double() - expected).abs().max()
    assert error < LARGEST_ERROR[method, FP32] * max(1, expected.abs().max() / 4)


@needs_cpu_layers
@pytest.mark.parametrize("shape", [(192, 192, 16, 16), (512, 64, 16, 32)])
def test_the_price_in_exactness(shape):
    """m = 2: about as exact as a plain sum in fp32. m = 4: two to three bits are lost."""
    some = problem(*shape)
    expected = some.expected
    plain = mean_error(F.conv2d(some.x, some.weight, some.bias, padding=1), expected)
    assert mean_error(some.solve(2), expected) < 2 * plain
    assert 2 * plain < mean_error(some.solve(4), expected) < 10 * plain


@needs_bf16
def test_the_price_in_bf16():
    """m = 2: at most three times the error of a plain sum. m = 4: more than bf16 can spare."""
    some = problem(192, 192, 16, 16, dtype=BF16)
    expected = some.expected
    plain = mean_error(some.solve("packed"), expected)
    assert mean_error(some.solve(2), expected) < 3 * plain
    assert mean_error(some.solve(4), expected) > 8 * plain


@needs_cpu_layers
@pytest.mark.parametrize(("method", "dtype"), METHODS)
def test_the_bias_arrives_as_it_is(method, dtype):
    some = problem(8, 16, 16, 8, dtype=dtype)
    y = Problem(some.x, torch.zeros_like(some.weight), some.bias).solve(method)
    assert torch.equal(y, some.bias.to(dtype).view(1, -1, 1, 1).expand_as(y))


# ---- In pieces, and in memory -----------------------------------------------------------------


@needs_cpu_layers
@pytest.mark.parametrize("m", TILES)
@pytest.mark.parametrize(("room", "rows"), [(0, 1), (1, 1), (2, 2), (5, 4), (11, 6), (99, 12)])
def test_chunks_of_any_size_give_the_same(monkeypatch, m, room, rows):
    """room: rows of tiles that a chunk may hold; rows: how many it gets."""
    some = problem(8, 16, 12 * m, 4 * m, batch=2)
    whole = some.solve(m)
    monkeypatch.setattr(winograd, "CHUNK", room * 4 * (m + 2) ** 2 * 8)
    layer = some.layer(m)
    assert layer._rows_and_tiles(8, 12 * m, 4 * m) == (rows, 4)
    torch.testing.assert_close(layer(some.x), whole, atol=1e-5, rtol=1e-5)


@needs_cpu_layers
@pytest.mark.parametrize("method", ["packed", *TILES])
def test_pictures_that_are_not_channels_last(method):
    some = problem(8, 16, 8, 16, batch=2)
    y = some.layer(method)(some.x.contiguous())
    torch.testing.assert_close(y, some.solve(method), atol=1e-5, rtol=1e-5)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(2).new_empty(100).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@needs_cpu_layers
@pytest.mark.parametrize("m", TILES)
def test_what_was_in_memory_before_does_not_matter(poisoned_memory, m):
    some = problem(8, 16, 8, 16, batch=2)
    assert largest_error(some.solve(m), some.expected) < LARGEST_ERROR[m, FP32]


@needs_cpu_layers
@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["packed", *TILES]),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    batch=st.integers(1, 2),
    room=st.integers(0, 12),
)
def test_pictures_of_another_size_than_the_layer_was_made_for(method, size, batch, room):
    """room: rows of tiles that a chunk may hold where they are eight in a row."""
    some = problem(8, 16, *size, batch)
    layer = Problem(torch.empty(1, 8, 16, 8), some.weight, some.bias).layer(method)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(winograd, "CHUNK", room * 8 * 36 * 8)
        y = layer(some.x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = some.expected
    error = (y.double() - expected).abs().max()
    assert error < LARGEST_ERROR[method, FP32] * max(1, expected.abs().max() / 4)


@needs_cpu_layers
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=needs_bf16)])
def test_weights_are_sorted_once_for_each_size(monkeypatch, dtype):
    """Sorted for another size, some products take a hundred times as long."""
    some, packed_for = problem(8, 16, 26, 8, dtype=dtype), []
    pack = PackedConv2d._pack
    monkeypatch.setattr(
        PackedConv2d,
        "_pack",
        lambda self, weight, shape: packed_for.append(tuple(shape)) or pack(self, weight, shape),
    )
    packed = some.layer("packed")
    for height in (26, 26, 10, 10):
        x = some.x[:, :, :height]
        expected = Problem(x, some.weight, some.bias).expected
        assert largest_error(packed(x), expected) < LARGEST_ERROR["packed", dtype]
    assert packed_for == [(1, 8, 26, 8), (1, 8, 10, 8)]
    packed_for.clear()
    monkeypatch.setattr(winograd, "CHUNK", 5 * 4 * 16 * 8)
    layer = some.layer(2)  # 13 rows of 4 tiles, 5 rows at a time and then 3
    for _ in range(2):
        assert largest_error(layer(some.x), some.expected) < LARGEST_ERROR[2, dtype]
    assert packed_for == [(1, 16 * 8, 5 * 4, 1)]


@needs_cpu_layers
@pytest.mark.parametrize("m", TILES)
@pytest.mark.parametrize("size", [(7, 16), (8, 13), (9, 9), (1, 1)])
def test_memory_beyond_a_picture_that_is_no_multiple_of_tiles(poisoned_memory, m, size):
    some = problem(8, 16, *size, batch=2)
    assert largest_error(some.solve(m), some.expected) < LARGEST_ERROR[m, FP32]


@needs_cpu_layers
@pytest.mark.parametrize("m", TILES)
def test_an_image_without_numbers_leaves_the_others_alone(m):
    some = problem(8, 16, 8, 16, batch=3)
    some.x[1, 0, 0, 0] = torch.nan
    y, clean = some.solve(m), torch.tensor([0, 2])
    assert y[1].isnan().any()
    assert largest_error(y[clean], some.expected[clean]) < LARGEST_ERROR[m, FP32]


@needs_cpu_layers
@pytest.mark.parametrize("method", ["packed", *TILES])
def test_a_layer_has_its_weights_to_itself(method):
    """They may lie in a mapped file, which is closed."""
    some = problem(16, 16, 8, 8)
    layer = some.layer(method)
    before = layer(some.x)
    some.weight.fill_(torch.nan)
    some.bias.fill_(torch.nan)
    assert torch.equal(layer(some.x), before)


@needs_cpu_layers
@pytest.mark.parametrize("method", ["packed", *TILES])
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float64])
def test_weights_of_any_type_and_layout(method, dtype):
    """As files may hold them."""
    some = problem(16, 24, 8, 8)
    weight = some.weight.to(dtype, memory_format=torch.channels_last)
    stored = Problem(some.x, weight, some.bias.to(dtype))
    assert largest_error(stored.solve(method), stored.expected) < LARGEST_ERROR[method, FP32]


@needs_cpu_layers
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=needs_bf16)])
@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        (1, {}),
        (3, {"padding": 1, "stride": 2}),
        (3, {"padding": 1, "groups": 4}),
        (1, {"groups": 2}),
    ],
)
def test_packed_convolutions_of_other_kinds(dtype, kernel, arguments):
    generator = torch.Generator().manual_seed(0)
    inputs = 32 // arguments.get("groups", 1)
    weight = torch.randn(16, inputs, kernel, kernel, generator=generator)
    weight = weight / (inputs * kernel**2) ** 0.5
    bias = torch.randn(16, generator=generator)
    layer = PackedConv2d(weight, bias, (1, 32, 8, 8), dtype, **arguments)
    for shape in ((1, 32, 8, 8), (3, 32, 8, 8), (2, 32, 6, 10)):
        x = torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), **arguments)
        assert largest_error(layer(x), expected) < LARGEST_ERROR["packed", dtype]
