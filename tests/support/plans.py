"""Plans of runs, made without a network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from PIL import Image

from guided_diffusion.config import Config, load_config
from guided_diffusion.run.plan import Plan, make_plan
from guided_diffusion.run.recipe import Recipe
from guided_diffusion.run.records import Records, Result
from guided_diffusion.scheduler import plain_times
from guided_diffusion.speed.choice import Speed

SIZE = 16


SEED = 100


TIMES = plain_times(10)


CPU = torch.device("cpu")


NAMES = ("a.png", "b.png", "sub/c.png", "sub/d.png", "z.png")  # in the order of paths


@dataclass
class Case:
    """Five images with masks, a config, and the records of results."""

    path: Path
    keys: dict = field(default_factory=dict)  # of the whole run
    dataset: dict = field(default_factory=dict)
    speed: Speed = Speed()
    device: torch.device = CPU

    def __post_init__(self):
        for i, name in enumerate(NAMES):
            image = Image.new("RGB", (SIZE, SIZE), (i, 50, 0))
            mask = Image.new("L", (SIZE, SIZE), 255)
            mask.paste(0, (0, 0, SIZE, i + 1))
            for kind, picture in (("gts", image), ("masks", mask)):
                file = self.path / kind / name
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
        (self.path / "weights.pt").write_bytes(b"weights")
        (self.path / "classifier.pt").write_bytes(b"classifier")
        self.keys |= {"model_path": str(self.path / "weights.pt"), "seed": SEED}
        outputs = {"srs": "results", "lrs": "gt_masked", "gt_keep_masks": "masks_used"}
        self.dataset |= {
            "gt_path": str(self.path / "gts"),
            "mask_path": str(self.path / "masks"),
            "paths": {key: str(self.path / "out" / name) for key, name in outputs.items()},
        }

    @property
    def results(self) -> Path:
        return self.path / "out" / "results"

    @property
    def records(self) -> Records:
        return Records(str(self.results))

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.config(), self.device, self.speed)

    def config(self) -> Config:
        network = {"image_size": SIZE, "channel_mult": "1,2", "attention_resolutions": "8"}
        schedule = {"t_T": 10, "n_sample": 1, "jump_length": 2, "jump_n_sample": 2}
        content = {"timestep_respacing": "10", "schedule_jump_params": schedule} | network
        content |= self.keys | {"data": {"eval": {"some": self.dataset}}}
        (self.path / "conf.yml").write_text(yaml.safe_dump(content))
        return load_config(self.path / "conf.yml")

    def plan(self, **options: bool) -> Plan:
        return make_plan(self.config(), TIMES, self.recipe, self.records, **options)

    def finish(self, names: Sequence[str] | None = None) -> Plan:
        """Leave files and records as a run does that makes these pictures, or all."""
        plan, records = self.plan(), self.records
        digest, settings = self.recipe.digest, self.recipe.settings
        records.begin(plan.run, plan.config.seed, settings)
        records.set_aside(plan.run, plan.redo)
        for task in plan.tasks:
            if task.name not in plan.done and (names is None or task.name in names):
                file = self.results / task.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"picture")
                records.finished(task.name, Result(plan.run, digest, task.origin, 7, 1.0))
        return plan

    def tree(self) -> set[Path]:
        return set(self.path.rglob("*"))


def names(plan: Plan) -> list[str]:
    return [task.name for task in plan.tasks]


def names_in_batches(plan: Plan) -> list[list[str]]:
    return [[task.name for task in batch] for batch in plan.batches]
