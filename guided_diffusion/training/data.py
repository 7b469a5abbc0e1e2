"""Training images, in an order that follows from the seed and the step alone."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import numpy as np
import torch

from guided_diffusion.config import UserError
from guided_diffusion.images.files import list_images, load_prepared
from guided_diffusion.images.tensors import as_grey, image_to_tensor
from guided_diffusion.machine.ranks import ALONE, World
from guided_diffusion.training.ranks import share_of

READERS = 2  # threads that read images while the network learns


class TrainingImages:
    """Images of a folder, each with its class: the position of its own folder among all."""

    def __init__(self, folder: str, image_size: int, channels: int = 3):
        """channels: 1 = grey. Raises UserError if the folder cannot be read or holds no image."""
        self.paths = list_images("data_dir", folder)
        self.image_size, self.channels = image_size, channels
        folders = [str(PurePath(path).parent) for path in self.paths]
        self.class_folders = sorted(set(folders))
        class_of = {folder: i for i, folder in enumerate(self.class_folders)}
        self.classes = [class_of[folder] for folder in folders]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """(C, S, S) in [-1, 1], and the class. Raises UserError that names a bad file."""
        return self.to_tensor(load_prepared(self.paths[i], self.image_size)), self.classes[i]

    def to_tensor(self, prepared: np.ndarray) -> torch.Tensor:
        """uint8 (S, S, 3) -> (C, S, S) in [-1, 1]."""
        return image_to_tensor(as_grey(prepared) if self.channels == 1 else prepared)[
            : self.channels
        ]

    def batches(self, batch_size: int, seed: int, first_step: int) -> Iterator[list[int]]:
        """Which ones each training step takes, from `first_step` on."""
        return step_batches(len(self), batch_size, seed, first_step)

    def check_classes(self, num_classes: int) -> None:
        """Raises UserError if there are more classes than the network knows."""
        if len(self.class_folders) > num_classes:
            raise UserError(
                f"data_dir has {len(self.class_folders)} folders with images, one class each, but "
                f"a class-conditional network knows {num_classes}: merge folders"
            )


def step_batches(
    num_images: int, batch_size: int, seed: int, first_step: int
) -> Iterator[list[int]]:
    """The images of each training step from `first_step` on: every epoch a fresh shuffle.

    A function of (seed, step), so that a resumed run goes on with the very same images.
    """
    epoch, skipped = divmod(first_step * batch_size, num_images)
    batch: list[int] = []
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_images).tolist()
        for i in order[skipped:]:
            batch.append(i)
            if len(batch) == batch_size:
                yield batch
                batch = []
        epoch, skipped = epoch + 1, 0


def endless_batches(
    images: TrainingImages, batch_size: int, seed: int, first_step: int, world: World = ALONE
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share ((b, C, S, S), (b,)) of the images and classes of each step, read ahead.

    batch_size: of all ranks together. Raises UserError that names a bad file. By threads, since an
    error in a process of its own would come back as that process's traceback.
    """
    order = images.batches(batch_size, seed, first_step)
    share = share_of(world, batch_size)

    def read(batch: list) -> list[tuple[torch.Tensor, int]]:
        return [images[i] for i in batch[share]]

    with ThreadPoolExecutor(READERS) as readers:
        ahead = deque(readers.submit(read, next(order)) for _ in range(READERS))
        while True:
            ahead.append(readers.submit(read, next(order)))
            pictures, classes = zip(*ahead.popleft().result(), strict=True)
            yield torch.stack(pictures), torch.tensor(classes)
