"""What the factory does with networks and checkpoints: each is built, opened and compared once."""

from pathlib import Path

import pytest
import torch
import yaml

from guided_diffusion import factory
from guided_diffusion.checkpoints import lightning, loading
from guided_diffusion.config import Config, UserError, load_config
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.networks.unet import Classifier, UNet
from guided_diffusion.speed.choice import Speed
from tests.support.latent_runs import LatentCase

CPU = torch.device("cpu")
SMALL = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8"}
GUIDE = {"classifier_scale": 1.0, "classifier_width": 64, "classifier_depth": 1}


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """How often networks were built, and files were opened and compared."""
    counted = {"built": 0, "compared": 0, "read whole": 0}

    def count(owner: object, name: str, what: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            counted[what] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for network in (UNet, Classifier, Autoencoder):
        count(network, "__init__", "built")
    count(loading, "_compare", "compared")
    count(lightning, "read_state_dict", "read whole")
    return counted


def guided_config(folder: Path) -> Config:
    keys = {**SMALL, **GUIDE, "model_path": "denoiser.pt", "classifier_path": "classifier.pt"}
    for key in ("model_path", "classifier_path"):
        keys[key] = str(folder / keys[key])
    (folder / "conf.yml").write_text(yaml.safe_dump(keys))
    config = load_config(folder / "conf.yml", require_data=False)
    torch.save(UNet(config.network.params).state_dict(), config.model_path)
    classifier = Classifier(config.classifier.params(64))
    torch.save(classifier.state_dict(), config.classifier.path)
    return config


def test_denoiser_and_classifier_are_built_and_compared_once(tmp_path, counts):
    config = guided_config(tmp_path)
    counts["built"] = 0
    networks = factory.load_networks(config, CPU, Speed())
    assert list(networks) == ["denoiser", "classifier"]
    assert counts == {"built": 2, "compared": 2, "read whole": 0}


def test_a_latent_file_is_read_once_for_its_two_networks(tmp_path, counts):
    config = load_config(LatentCase(tmp_path).conf_path())
    networks = factory.load_networks(config, CPU, Speed())
    assert list(networks) == ["denoiser", "autoencoder"]
    assert counts == {"built": 2, "compared": 2, "read whole": 1}


def test_all_checkpoints_are_compared_before_any_weight_is_loaded(tmp_path, monkeypatch):
    config = guided_config(tmp_path)
    torch.save({"x": torch.zeros(1)}, config.classifier.path)
    monkeypatch.setattr(factory, "load_network", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"classifier\.pt: the checkpoint does not fit"):
        factory.load_networks(config, CPU, Speed())
