"""Messages of the checks of inputs."""

import warnings
from dataclasses import replace

from guided_diffusion.config import DatasetConfig
from guided_diffusion.images.checks import check_pairs
from guided_diffusion.images.pairs import Pair

DATASET = DatasetConfig(
    name="any",
    gt_path="gts",
    mask_path="masks",
    inpainted_dir="out/inpainted",
    gt_masked_dir="out/gt_masked",
    keep_mask_dir="out/gt_keep_mask",
)


REGION = replace(DATASET, fit="region")


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
