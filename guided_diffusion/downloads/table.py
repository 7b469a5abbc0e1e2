"""The published files: where they come from, where they go, and how to know them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

Size = tuple[int, float]  # the fewest and the most bytes that a file has
UNKNOWN: Size = (0, math.inf)


@dataclass(frozen=True)
class Download:
    """A published file. Paths start at the repository's root."""

    name: str  # what users call it; several files may share one name
    file: str  # the path that it gets
    address: str  # an https URL, or the id of a file on Google Drive
    size: Size
    purpose: str
    licence: str
    sha256: str = ""  # its digest in hexadecimal digits, or how that begins; empty if unknown
    # pictures: it is a zip of them. checkpoint: the address brings it, or a zip that holds it.
    unpack: Literal["", "pictures", "checkpoint"] = ""

    @property
    def on_drive(self) -> bool:
        return not self.address.startswith("https://")

    @property
    def page(self) -> str:
        """The link to open in a browser."""
        drive = f"https://drive.google.com/file/d/{self.address}/view"
        return drive if self.on_drive else self.address

    @property
    def archive(self) -> str:
        """The zip that it is unpacked from; empty if there is none."""
        return str(PurePosixPath(self.file).with_suffix(".zip")) if self.unpack else ""


def _exactly(size: int) -> Size:
    return size, size


def _fp32(weights: int) -> Size:
    """Of a file whose size is not published: names, and the archive around them, take < 1 MiB."""
    return 4 * weights, 4 * weights + 2**20


def _repaint(name: str, file: str, drive_id: str, purpose: str) -> Download:
    path, size = f"data/pretrained/{file}", _fp32(552_814_086)
    return Download(name, path, drive_id, size, purpose, "RePaint: non-commercial")


def _openai(name: str, file: str, purpose: str, size: Size = UNKNOWN) -> Download:
    address = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{file}"
    return Download(name, f"data/pretrained/{file}", address, size, purpose, "OpenAI's terms")


def _p2(name: str, drive_id: str, purpose: str) -> Download:
    path = f"data/pretrained/{name}.pt"
    return Download(name, path, drive_id, UNKNOWN, purpose, "its authors' terms")


def _lpips(file: str, folder: str, size: Size, sha256: str) -> Download:
    path, purpose = f"data/pretrained/lpips/{file}", "measures LPIPS in evaluate.py"
    address, licence = f"https://{folder}/{file}", "its authors' terms"
    return Download("lpips", path, address, size, purpose, licence, sha256)


_TORCHVISION = "download.pytorch.org/models"  # a name there has 8 digits of the digest
_HEADS = "raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
_ALEX = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
_VGG = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"

# The latent model surely holds the network, its moving average, the autoencoder and three tables.
# The autoencoder has a second name, under which torch.save may or may not repeat it.
_LATENT: Size = (4 * (387_245_827 + 387_245_829 + 53_219_486 + 3 * 1000), math.inf)

DEFAULT = ("celeba", "places", "imagenet", "classifier", "data")
TABLE = (
    _repaint("celeba", "celeba256_250000.pt", "1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX", "faces"),
    _repaint("places", "places256_300000.pt", "1QEl-btGbzQz6IwkXiFGd49uQNTUTtHsk", "scenes"),
    _openai("imagenet", "256x256_diffusion.pt", "ImageNet, 256x256", _exactly(2_215_479_544)),
    _openai("classifier", "256x256_classifier.pt", "guides imagenet", _exactly(216_496_432)),
    Download(
        name="data",
        file="data/datasets.zip",
        address="1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv",
        size=UNKNOWN,
        purpose="examples, unpacked to data/datasets",
        licence="RePaint: non-commercial",
        unpack="pictures",
    ),
    Download(
        name="ldm",
        file="data/pretrained/inpainting_big.ckpt",
        address="https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1",
        size=_LATENT,
        purpose="any photo, with method: latent",
        licence="its authors' terms",
        unpack="checkpoint",
    ),
    _lpips("alexnet-owt-7be5be79.pth", _TORCHVISION, _fp32(61_100_840), "7be5be79"),
    _lpips("alex.pth", _HEADS, _exactly(6009), _ALEX),
    _lpips("vgg16-397923af.pth", _TORCHVISION, _fp32(138_357_544), "397923af"),
    _lpips("vgg.pth", _HEADS, _exactly(7289), _VGG),
    _openai("openai64", "64x64_diffusion.pt", "ImageNet, 64x64"),
    _openai("openai64-classifier", "64x64_classifier.pt", "guides openai64"),
    _openai("openai128", "128x128_diffusion.pt", "ImageNet, 128x128"),
    _openai("openai128-classifier", "128x128_classifier.pt", "guides openai128"),
    _openai("openai256-uncond", "256x256_diffusion_uncond.pt", "ImageNet without classes"),
    _openai("openai512", "512x512_diffusion.pt", "ImageNet, 512x512"),
    _openai("openai512-classifier", "512x512_classifier.pt", "guides openai512"),
    _openai("lsun_bedroom", "lsun_bedroom.pt", "bedrooms"),
    _openai("lsun_cat", "lsun_cat.pt", "cats"),
    _openai("lsun_horse", "lsun_horse.pt", "horses"),
    _openai("lsun_horse_nodropout", "lsun_horse_nodropout.pt", "horses, trained without dropout"),
    _p2("ffhq_p2", "1nlCPBqOqSeqAQ8F4noThbnmr4okriwTc", "faces, light network"),
    _p2("celebahq_p2", "1ag8JnvKGKo6L6avO_dTFEBNWJo2jZIDF", "faces, light network"),
    _p2("cub_p2", "13RKF9MLNR3zpMMNchW7JtsjktVMgS0rK", "birds, light network"),
    _p2("afhq_p2", "1f6_swzSPNJXs9FWf6AW585bv7dORzRWf", "dogs, light network"),
    _p2("flower_p2", "1d6DDKAEu_iwNzxlBaVrETHBcc6oF5jYf", "flowers, light network"),
    _p2("metface_p2", "1swjgSB1WFF9JnBR6W6Newnfzdyo1nPYf", "paintings, light network"),
)

# The file name of a checkpoint -> what the command calls it.
CHECKPOINTS = {PurePosixPath(row.file).name: row.name for row in TABLE if row.unpack != "pictures"}
