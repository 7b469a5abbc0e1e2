"""Metrics against closed forms, cases worked by hand, other libraries and published figures."""

import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from guided_diffusion.config import UserError
from guided_diffusion.downloads.table import TABLE
from guided_diffusion.evaluation import distortion, lpips, lpips_files
from guided_diffusion.evaluation.bootstrap import Estimate, estimate

ROOT = Path(__file__).parents[2]


def constant(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def noisy_pair(height: int, width: int, strength: float = 30) -> tuple[np.ndarray, np.ndarray]:
    """A picture of random values, and the same with noise."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    noise = rng.normal(0, strength, picture.shape)
    return picture, np.clip(picture + noise, 0, 255).astype(np.uint8)


# ---- L1 and PSNR ----


@pytest.mark.parametrize(
    ("offset", "decibels"), [(1, 48.1308), (5, 34.1514), (10, 28.1308), (255, 0.0)]
)
def test_a_constant_offset_has_known_l1_and_psnr(offset, decibels):
    """PSNR = 20 log10(255 / offset); 255 = 48.1308 dB."""
    for result, truth in ((offset, 0), (0, offset), (255, 255 - offset)):
        assert distortion.l1(constant(result), constant(truth)) == offset
        measured = distortion.psnr(constant(result), constant(truth))
        assert measured == pytest.approx(decibels, abs=1e-4)


def test_equal_pictures_have_an_infinite_psnr():
    assert distortion.l1(constant(7), constant(7)) == 0
    assert distortion.psnr(constant(7), constant(7)) == math.inf


def test_a_hole_by_hand():
    """Errors 0 and 10, 20 and 30 in two rows; the hole is the right column."""
    truth = np.zeros((2, 2, 3), np.uint8)
    result = np.array([[0, 10], [20, 30]], np.uint8)[..., None].repeat(3, axis=2)
    hole = np.array([[False, True], [False, True]])
    assert distortion.l1(result, truth) == 15
    assert distortion.l1(result, truth, hole) == 20
    # Mean squared errors: 350 and 500.
    assert distortion.psnr(result, truth) == pytest.approx(22.6902, abs=1e-4)
    assert distortion.psnr(result, truth, hole) == pytest.approx(21.1411, abs=1e-4)


def test_channels_count_alike():
    result = constant(0)
    result[..., 1] = 30
    assert distortion.l1(result, constant(0)) == 10
    # The mean squared error is 300.
    assert distortion.psnr(result, constant(0)) == pytest.approx(23.3596, abs=1e-4)


# ---- SSIM ----


@pytest.mark.parametrize(("a", "b", "ssim"), [(100, 150, 0.923092), (0, 255, 0.0000999900)])
def test_ssim_of_constants_is_known(a, b, ssim):
    """Without variance it is (2 a b + C1) / (a^2 + b^2 + C1), with C1 = (0.01 * 255)^2."""
    for one, other in ((a, b), (b, a)):
        similarity = distortion.ssim_map(constant(one), constant(other))
        np.testing.assert_allclose(similarity, ssim, rtol=1e-5)
    np.testing.assert_allclose(distortion.ssim_map(constant(a), constant(a)), 1, rtol=1e-12)


def test_ssim_agrees_with_a_second_library():
    image = pytest.importorskip("torchmetrics.functional.image")
    truth, result = noisy_pair(24, 33)
    tensors = [
        torch.from_numpy(picture.astype(float)).permute(2, 0, 1)[None]
        for picture in (result, truth)
    ]
    _, expected = image.structural_similarity_index_measure(
        *tensors, data_range=255.0, sigma=1.5, return_full_image=True
    )
    whole_windows = expected[0].mean(dim=0)[5:-5, 5:-5].numpy()
    measured = distortion.ssim_map(result, truth)
    assert measured.shape == (14, 23)
    assert measured.std() > 0.01
    np.testing.assert_allclose(measured, whole_windows, atol=1e-10)


def test_ssim_falls_only_where_a_window_sees_the_difference():
    truth, _ = noisy_pair(40, 40)
    result = truth.copy()
    result[20, 30] = 255 - result[20, 30]
    rows, columns = np.nonzero(distortion.ssim_map(result, truth) < 1 - 1e-9)
    # The map begins at pixel (5, 5).
    assert (rows.min() + 5, rows.max() + 5) == (15, 25)
    assert (columns.min() + 5, columns.max() + 5) == (25, 34)
    assert distortion.inside(truth).shape == (30, 30, 3)


def test_absent_scikit_image_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(UserError, match="pip install -r requirements-eval.txt"):
        distortion.ssim_map(constant(1), constant(2))


# ---- Intervals ----


def test_the_interval_of_zeros_and_ones_is_that_of_the_binomial_distribution():
    """The resampled sum of 6 ones in 20 is binomial; its quantiles are 2 and 10."""
    found = estimate([1.0] * 6 + [0.0] * 14)
    assert found == Estimate(pytest.approx(0.3), pytest.approx(0.1), pytest.approx(0.5), 20)


def test_the_interval_agrees_with_a_second_library():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).lognormal(size=100)
    known = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    found = estimate(list(values))
    assert (found.mean, found.number) == (pytest.approx(values.mean()), 100)
    assert found.low == pytest.approx(known.low, rel=0.01)
    assert found.high == pytest.approx(known.high, rel=0.01)


def test_the_interval_is_repeatable():
    values = list(np.random.default_rng(1).normal(size=30))
    assert estimate(values) == estimate(values)


def test_infinite_values_are_left_out():
    assert estimate([1.0, math.inf, 3.0]) == estimate([1.0, 3.0])
    assert estimate([1.0, math.inf, 3.0]).number == 2
    assert estimate([math.inf] * 2) == Estimate(math.inf, math.inf, math.inf, 0)


def test_estimates_in_words():
    assert Estimate(4.1416, 3.98, 4.311, 8).describe(2) == "4.14 [3.98, 4.31]"
    assert estimate([4.1416]).describe(3) == "4.142"
    assert estimate([math.inf]).describe(2) == "inf"


# ---- LPIPS ----


# Of each network, as the papers give them: width, side, stride and margin of convolutions; side and
# stride of poolings.
LAYERS = {
    "alex": "64/11/4/2 p3/2 192/5/1/2 p3/2 384/3/1/1 256/3/1/1 256/3/1/1 p3/2",
    "vgg": "64/3/1/1 64/3/1/1 p2/2 128/3/1/1 128/3/1/1 p2/2 256/3/1/1 256/3/1/1 256/3/1/1 p2/2 "
    "512/3/1/1 512/3/1/1 512/3/1/1 p2/2 512/3/1/1 512/3/1/1 512/3/1/1 p2/2",
}
TORCHVISION = {"alex": "alexnet", "vgg": "vgg16"}


def features_of(name: str) -> nn.Sequential:
    """A network as torchvision makes it, with weights that keep its activations alive."""
    torch.manual_seed(0)
    layers, before = [], 3
    for layer in LAYERS[name].split():
        sizes = [int(size) for size in layer.removeprefix("p").split("/")]
        if layer.startswith("p"):
            layers.append(nn.MaxPool2d(*sizes))
            continue
        width, *shape = sizes
        convolution = nn.Conv2d(before, width, *shape)
        nn.init.normal_(convolution.weight, std=(2 / convolution.weight[0].numel()) ** 0.5)
        nn.init.normal_(convolution.bias, std=0.3)
        layers += [convolution, nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def reference():
    """torchmetrics' LPIPS, and a stand-in for torchvision, which it takes the networks from."""
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import lpips as theirs

    def build(name):
        return lambda weights: SimpleNamespace(features=features_of(name))

    models = SimpleNamespace(**{full: build(name) for name, full in TORCHVISION.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
        patch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
        yield theirs


@pytest.fixture(scope="module")
def heads_folder(reference) -> Path:
    return Path(reference.__file__).parent / "lpips_models"


@pytest.fixture(scope="module")
def folder(heads_folder, tmp_path_factory) -> str:
    """Random networks in the form of the published files, with the published heads."""
    folder = tmp_path_factory.mktemp("lpips")
    for name in lpips_files.FILES:
        network_path, heads_path = lpips_files.paths(name, str(folder))
        state = features_of(name).state_dict(prefix="features.")
        torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, network_path)
        os.symlink(heads_folder / Path(heads_path).name, heads_path)
    return str(folder)


@pytest.fixture(scope="module", params=["alex", "vgg"])
def network(request, folder) -> lpips.Lpips:
    return lpips.load(request.param, folder)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(picture / 127.5 - 1).to(torch.float32).permute(2, 0, 1)[None]


def test_lpips_agrees_with_a_second_library(network, reference):
    a, b = noisy_pair(45, 64, strength=60)
    seen = [network.features(picture) for picture in (a, b)]
    tensors = [as_tensor(picture) for picture in (a, b)]
    options = {"net": network.name, "pnet_rand": True}
    expected = reference._LPIPS(**options)(*tensors).item()
    assert network.distance(*seen) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    expected_map = reference._LPIPS(**options, spatial=True)(*tensors)[0, 0].numpy()
    measured = network.distance_map(*seen, (45, 64))
    assert measured.std() > 0.1 * measured.mean()
    np.testing.assert_allclose(measured, expected_map, rtol=1e-3)


def test_lpips_of_a_picture_to_itself_is_zero_and_order_does_not_matter(network):
    a, b = (network.features(picture) for picture in noisy_pair(32, 32))
    assert network.distance(a, a) == 0
    assert not network.distance_map(a, a, (32, 32)).any()
    assert network.distance(a, b) == network.distance(b, a) > 0


def test_the_more_noise_the_farther(network):
    distances = []
    for strength in (5, 20, 80):
        seen = [network.features(picture) for picture in noisy_pair(32, 32, strength)]
        distances.append(network.distance(*seen))
    assert all(less < more for less, more in pairwise(distances))


@pytest.mark.parametrize(("name", "least"), [("alex", 31), ("vgg", 16)])
def test_lpips_says_how_small_pictures_may_be(folder, name, least):
    network = lpips.load(name, folder)
    assert network.features(constant(9, least))[-1].shape[1:] == (1, 1)
    too_small = np.zeros((least - 1, 40, 3), np.uint8)
    with pytest.raises(
        UserError, match=rf"{least} or more pixels on each side, found 40x{least - 1};"
    ):
        network.features(too_small)


def test_distances_by_hand():
    """2 * 0.4^2 + 3 * 0.8^2 = 2.24 at one of two places, and in another layer 5 * 1^2."""
    a = [torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1.0]]])]
    b = [torch.tensor([[[0.6, 0.0]], [[0.8, 1.0]]]), torch.tensor([[[0.0]]])]
    network = lpips.Lpips("alex", nn.Sequential(), [torch.tensor([2.0, 3.0]), torch.tensor([5.0])])
    assert network.distance(a, b) == pytest.approx(2.24 / 2 + 5)
    # Enlarged linearly from two pixels to four: 1, 3/4, 1/4 and 0 of the first.
    expected = np.array([[2.24, 1.68, 0.56, 0]] * 2) + 5
    np.testing.assert_allclose(network.distance_map(a, b, (2, 4)), expected, rtol=1e-6)


def test_features_by_hand(monkeypatch):
    """Black in ImageNet's units is (-2.1179, -2.0357, -1.8044), of length 3.4475."""
    monkeypatch.setitem(lpips.NETWORKS, "alex", (None, (0,), 1))
    network = lpips.Lpips("alex", nn.Sequential(nn.Identity()), [])
    (found,) = network.features(constant(0, 1))
    np.testing.assert_allclose(found.flatten(), [-0.6143, -0.5905, -0.5234], atol=1e-4)


def test_places_without_features_have_no_direction(monkeypatch):
    monkeypatch.setitem(lpips.NETWORKS, "alex", (None, (1,), 1))
    network = lpips.Lpips("alex", nn.Sequential(nn.Identity(), nn.ReLU()), [])
    (found,) = network.features(constant(0, 1))
    assert found.flatten().tolist() == [0, 0, 0]


def write_weights(folder: Path, name: str, network: dict, heads: dict) -> None:
    for path, state in zip(lpips_files.paths(name, str(folder)), (network, heads), strict=True):
        torch.save(state, path)


def alexnet_state() -> tuple[dict, dict]:
    """Names and shapes as they are published."""
    widths = (64, 192, 384, 256, 256)
    heads = {f"lin{i}.model.1.weight": torch.zeros(1, w, 1, 1) for i, w in enumerate(widths)}
    return features_of("alex").state_dict(prefix="features."), heads


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (0, lambda state: state.pop("features.3.bias")),
        (0, lambda state: state.update({"features.12.weight": torch.zeros(1)})),
        (0, lambda state: state.update({"features.0.bias": torch.zeros(65)})),
        (0, lambda state: state.update({"features.0.bias": "text"})),
        (0, lambda state: state.clear()),
        (1, lambda state: state.pop("lin4.model.1.weight")),
        (1, lambda state: state.update({"lin5.model.1.weight": torch.zeros(1)})),
        (1, lambda state: state.update({"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)})),
    ],
)
def test_other_weights_are_refused(tmp_path, which, change):
    states = alexnet_state()
    change(states[which])
    write_weights(tmp_path, "alex", *states)
    with pytest.raises(UserError) as error:
        lpips.load("alex", str(tmp_path))
    path = lpips_files.paths("alex", str(tmp_path))[which]
    assert str(error.value).startswith(f"{path}: these are not the weights of LPIPS; ")


def test_a_file_of_something_else_is_refused(tmp_path):
    write_weights(tmp_path, "alex", [1, 2], {})
    with pytest.raises(UserError, match="these are not the weights of LPIPS"):
        lpips.load("alex", str(tmp_path))


def test_a_damaged_file_is_refused(tmp_path):
    write_weights(tmp_path, "alex", *alexnet_state())
    path = Path(lpips_files.paths("alex", str(tmp_path))[0])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="alexnet-owt-7be5be79.pth: the file is incomplete"):
        lpips.load("alex", str(tmp_path))


def test_missing_weights_are_named_with_how_to_get_them(tmp_path):
    network_path, heads_path = lpips_files.paths("alex", str(tmp_path))
    assert lpips_files.missing(str(tmp_path))["alex"] == network_path
    Path(network_path).touch()
    assert lpips_files.missing(str(tmp_path))["alex"] == heads_path
    with pytest.raises(UserError, match=r"AlexNet.*alex\.pth is not there.*download\.sh lpips"):
        lpips.load("alex", str(tmp_path))
    Path(heads_path).touch()
    assert list(lpips_files.missing(str(tmp_path))) == ["vgg"]


def test_the_downloads_bring_the_files_to_their_place():
    brought = {row.file for row in TABLE if row.name == "lpips"}
    assert brought == {path for name in lpips_files.FILES for path in lpips_files.paths(name)}


PUBLISHED = str(ROOT / lpips_files.FOLDER)


@pytest.mark.skipif("vgg" in lpips_files.missing(PUBLISHED), reason="needs bash download.sh lpips")
def test_published_weights_give_a_published_figure():
    """The example in torchmetrics 0.11's documentation: 0.3493 with VGG."""
    network = lpips.load("vgg", PUBLISHED)
    torch.manual_seed(123)
    # The example makes its network first, which takes random numbers.
    lpips.NETWORKS["vgg"][0]()
    for sides in ((25088, 4096), (4096, 4096), (4096, 1000)):
        nn.Linear(*sides)
    for head in network.heads:
        nn.Conv2d(len(head), 1, 1, bias=False)
    a, b = (torch.rand(10, 3, 100, 100) for _ in range(2))
    distances = []
    for pictures in zip(a, b, strict=True):
        as_bytes = [(x.permute(1, 2, 0) * 255).round().byte().numpy() for x in pictures]
        distances.append(network.distance(*map(network.features, as_bytes)))
    assert np.mean(distances) == pytest.approx(0.3493, abs=1e-4)
