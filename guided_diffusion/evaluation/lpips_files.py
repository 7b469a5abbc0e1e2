"""Where the weights of LPIPS lie, known without torch."""

import os

FOLDER = "data/pretrained/lpips"  # where `bash download.sh lpips` puts them

# The network trained on ImageNet, as torchvision publishes it, and the heads of LPIPS, version 0.1.
FILES = {
    "alex": ("alexnet-owt-7be5be79.pth", "alex.pth"),
    "vgg": ("vgg16-397923af.pth", "vgg.pth"),
}
TITLES = {"alex": "AlexNet", "vgg": "VGG"}


def paths(name: str, folder: str = FOLDER) -> tuple[str, str]:
    """The files of a network and of its heads."""
    network, heads = FILES[name]
    return os.path.join(folder, network), os.path.join(folder, heads)


def missing(folder: str = FOLDER) -> dict[str, str]:
    """The networks that cannot be loaded, and for each the first of its files that is not there."""
    absent = {name: [p for p in paths(name, folder) if not os.path.exists(p)] for name in FILES}
    return {name: files[0] for name, files in absent.items() if files}


def how_to_get(path: str) -> str:
    """What to say of a file that is not there."""
    return f"{path} is not there; to get it, run: bash download.sh lpips"
