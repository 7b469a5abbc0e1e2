"""Messages of the checks of inputs."""

import warnings
from dataclasses import replace

from guided_diffusion.config import DatasetConfig
from guided_diffusion.images.checks import PairChecks
from guided_diffusion.images.pairs import Pair, for_each_pair, read_pair
from guided_diffusion.images.views import Picture, decode_pair

DATASET = DatasetConfig(
    name="any",
    gt_path="gts",
    mask_path="masks",
    inpainted_dir="out/inpainted",
    gt_masked_dir="out/gt_masked",
    keep_mask_dir="out/gt_keep_mask",
)


REGION = replace(DATASET, fit="region")


def check_pairs(
    pairs: list[Pair],
    dataset: DatasetConfig,
    image_size: int | None,
    known_from: int | None = None,
) -> list[int]:
    """Check pairs as a plan does; how many views each has. Raises UserError."""
    checks = PairChecks(dataset, image_size, known_from)
    found = for_each_pair(pairs, lambda _, files: checks.inspect(files))
    checks.report(found)
    return [found[pair].mask.views for pair in pairs]


def messages_of(
    pairs: list[Pair],
    image_size: int | None = 8,
    dataset: DatasetConfig = DATASET,
    known_from: int | None = None,
) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check_pairs(pairs, dataset, image_size, known_from)
    assert all(warning.category is UserWarning for warning in record)
    assert all(warning.filename == __file__ for warning in record) or not record
    messages = [str(warning.message) for warning in record]
    assert not any("\n" in message for message in messages)
    return messages


def load_pair(pair: Pair, *arguments: object, **options: object) -> Picture:
    """Read and decode a pair, see `decode_pair`."""
    return decode_pair(read_pair(pair), *arguments, **options)
