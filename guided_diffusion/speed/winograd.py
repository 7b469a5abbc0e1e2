"""3×3 convolutions with a fraction of the multiplications (Winograd 1980; Lavin & Gray 2016).

An m×m tile of the output, and its (m + 2)×(m + 2) tile of the input, are transformed so that the
convolution becomes a product at each of the (m + 2)² places: 2.25 times fewer multiplications
for m = 2, 4 times fewer for m = 4. The transforms take a few additions. They see one picture at
a time, as (H, W, C), which is the order in memory of the network's channels_last tensors.
"""

from collections.abc import Sequence

import torch
from torch import nn

from guided_diffusion.speed.packed import PackedConv2d

CHUNK = 2**22  # elements of transformed input at a time, so that they stay in the cache

# The matrices G, Bᵀ and Aᵀ of F(m×m, 3×3), whose lines stand for the points 0, 1, -1, (2, -2,) ∞.
_WEIGHT = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}
_INPUT = {
    2: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    4: (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
}
_OUTPUT = {
    2: ((1, 1, 1, 0), (0, 1, -1, -1)),
    4: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}

Matrix = Sequence[Sequence[float]]
Rows = Sequence[torch.Tensor]


class WinogradConv2d(nn.Module):
    """A 3×3 convolution of stride 1 and padding 1.

    weight, bias, input_shape, dtype: as for `PackedConv2d`; H and W may differ too. In fp32,
    m = 2 is as exact as the plain sum of products, and m = 4 loses two to three bits. In bf16,
    m = 2 loses one bit, and m = 4 would lose nearly four. On a CPU, without gradients.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        input_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        m: int,
    ):
        super().__init__()
        self.m = m
        self.out_channels, in_channels = weight.shape[:2]
        places = (m + 2) ** 2
        rows, tiles = self._rows_and_tiles(*input_shape[1:])
        # What is added at the place of the points (1, 1) gets into every output as it is.
        biases = bias.new_zeros(places, self.out_channels)
        biases[m + 3] = bias
        # A product at each place is a 1×1 convolution in as many groups.
        self.products = PackedConv2d(
            transformed_weight(weight, m).reshape(-1, in_channels, 1, 1),
            biases.flatten(),
            (1, places * in_channels, rows * tiles, 1),
            dtype,
            groups=places,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), channels_last. Returns the same kind."""
        m, places = self.m, self.m + 2
        rows, w = self._rows_and_tiles(*x.shape[1:])
        height, width = x.shape[2:]
        x = x.permute(0, 2, 3, 1)
        y = x.new_empty(len(x), -(-height // m), m, w, m, self.out_channels)  # whole tiles
        tiles = x.new_empty(rows, w, places, places, x.shape[3])
        for image, output in zip(x, y, strict=True):
            for row, out in zip(range(0, len(output), rows), output.split(rows), strict=True):
                # Where fewer rows are left, old tiles follow: all products have the same size.
                columns = padded_columns(image, m, row * m, len(out) * m)
                input_transform(columns, tiles[: len(out)])
                products = self.products(tiles.view(1, rows * w, 1, -1).permute(0, 3, 1, 2))
                products = products.permute(0, 2, 3, 1).view(rows, w, places, places, -1)
                output_transform(products[: len(out)], out)
        y = y.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return y.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _rows_and_tiles(self, channels: int, height: int, width: int) -> tuple[int, int]:
        """Rows of tiles at a time, and tiles in a row."""
        tall, wide = -(-height // self.m), -(-width // self.m)
        at_most = min(max(CHUNK // (wide * (self.m + 2) ** 2 * channels), 1), tall)
        # Of those that fill the chunk by half, the number with the fewest rows missing at the end.
        numbers = range(at_most // 2 + 1, at_most + 1)
        return min(numbers, key=lambda rows: (-tall % rows, -rows)), wide


def transformed_weight(weight: torch.Tensor, m: int) -> torch.Tensor:
    """G w Gᵀ: (O, C, 3, 3) -> (m + 2, m + 2, O, C), in fp32."""
    out_channels, in_channels = weight.shape[:2]
    g = torch.tensor(_WEIGHT[m])
    both_ways = torch.kron(g, g)  # ((m + 2)², 9)
    places = both_ways @ weight.float().reshape(-1, 9).T
    return places.view(m + 2, m + 2, out_channels, in_channels)


def padded_columns(image: torch.Tensor, m: int, first: int, number: int) -> torch.Tensor:
    """Rows of an image with a border of zeros, columns dealt out to m hands: tiles lie in a row.

    (H, W, C) -> (m, number + 2, W / m + 1, C), with W rounded up to a multiple of m: rows first − 1
    up to first + number, zeros beyond the image; the last column of hands 2 and 3 is undefined.
    """
    height, width, channels = image.shape
    tiles = -(-width // m)
    columns = image.new_empty(m, number + 2, tiles + 1, channels)
    top, bottom = max(first - 1, 0), min(first + number + 1, height)
    inside = slice(top - first + 1, bottom - first + 1)
    columns[:, : inside.start] = columns[:, inside.stop :] = 0
    columns[0, :, 0] = columns[1, :, -1] = 0
    for k in range(m):  # column k of a tile is column k + 1 of the padded one
        start, hand = (k + 1) // m, columns[(k + 1) % m]
        given = image[top:bottom, k::m]
        hand[inside, start : start + given.shape[1]] = given
        hand[:, start + given.shape[1] : start + tiles] = 0
    return columns


def input_transform(columns: torch.Tensor, out: torch.Tensor) -> None:
    """Bᵀ d B of each tile.

    columns: (m, H + 2, W / m + 1, C); out: (H / m, W / m, m + 2, m + 2, C).
    """
    m, padded, tiles, channels = columns.shape[0], columns.shape[1], out.shape[1], out.shape[4]
    across = columns.new_empty(m + 2, padded, tiles, channels)
    columns = [columns[j % m, :, j // m : j // m + tiles] for j in range(m + 2)]
    _combine(_INPUT[m], columns, across)
    rows = [across[:, i : i + padded - m - 1 : m] for i in range(m + 2)]
    _combine(_INPUT[m], rows, [out[:, :, i].permute(2, 0, 1, 3) for i in range(m + 2)])


def output_transform(products: torch.Tensor, out: torch.Tensor) -> None:
    """Aᵀ p A of each tile.

    products: (H / m, W / m, m + 2, m + 2, C); out: (H / m, m, W / m, m, C).
    """
    height, m, tiles, _, channels = out.shape
    across = products.new_empty(m, height, tiles, m + 2, channels)
    _combine(_OUTPUT[m], products.unbind(2), across)
    _combine(_OUTPUT[m], across.unbind(3), [out[:, :, :, j].transpose(0, 1) for j in range(m)])


def _combine(matrix: Matrix, rows: Rows, out: Rows) -> None:
    """out = matrix · rows, a few additions for each line of the matrix."""
    for coefficients, result in zip(matrix, out, strict=True):
        terms = [(row, c) for row, c in zip(rows, coefficients, strict=True) if c]
        terms.sort(key=lambda term: term[1] != 1)  # every line has a 1, to start from
        (first, _), (second, c), *rest = terms
        torch.add(first, second, alpha=c, out=result)
        for row, c in rest:
            result.add_(row, alpha=c)
