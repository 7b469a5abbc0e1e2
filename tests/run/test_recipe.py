"""What a run records of its settings: results of before count on, and no new key is forgotten."""

import json
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from guided_diffusion.config import load_config, schema
from guided_diffusion.config.vocabulary import key_of, kinds_of
from guided_diffusion.run import recipe as recipes
from guided_diffusion.run.recipe import Recipe
from guided_diffusion.speed.choice import Speed

ROOT = Path(__file__).parents[2]
# As runs recorded them before each field said whether pixels depend on it.
RECORDED = json.loads((ROOT / "tests" / "golden" / "settings.json").read_text("utf-8"))
PARTS = (
    *(schema.Config, schema.NetworkConfig, schema.DiffusionConfig, schema.ClassifierConfig),
    schema.LangevinConfig,
    *(schema.ScheduleConfig, schema.StartConfig, schema.SpeedConfig, schema.DatasetConfig),
    *(schema.LatentConfig, schema.LatentUNetConfig, schema.AutoencoderConfig),
)
# Keys that change no pixel, or that count in other ways: in origins, or as a precision.
ASIDE = {
    *("name", "seed", "show_progress", "checkpoint_every", "samples_per_image", "device"),
    *("log_every", "fast", "precision", "compile", "cuda_graph", "use_fp16", "start_from.path"),
    *("latent.autoencoder.resolution", "latent.autoencoder.dropout"),
}
ASIDE_IN_DATASET = {  # places, the choice of pictures, and the order of work
    *("gt_path", "mask_path", "paths.srs", "paths.lrs", "paths.gts", "paths.gt_keep_masks"),
    *("batch_size", "offset", "max_len", "deterministic", "random_flip", "drop_last"),
}


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: Path(case["conf"]).stem)
def test_settings_are_recorded_as_before(case, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(case["conf"], case["set"])
    recipe = Recipe(config, torch.device(case["device"]), Speed(**case["speed"]))
    with patch.object(recipes, "fingerprint", lambda path: {"sha256": f"digest of {path}"}):
        assert json.dumps(recipe.settings) == json.dumps(case["settings"])
    assert recipe.digest == case["digest"]


def test_every_key_says_whether_pixels_depend_on_it():
    marks = {
        key_of(part, field.name): field.metadata["pixels"]
        for part in PARTS
        for field in fields(part)
        if field.name in kinds_of(part)
    }
    assert {marks.pop(f"data.eval.*.{key}") for key in ASIDE_IN_DATASET} == {False}
    assert {key for key, decides in marks.items() if not decides} == ASIDE
    assert {"model_path", "timestep_respacing", "method", "data.eval.*.fit"} <= marks.keys()
