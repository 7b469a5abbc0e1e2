"""What all results of a run follow from, besides each one's `Origin`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from threading import Thread
from typing import Any

import torch

from guided_diffusion.checkpoints.loading import fingerprint
from guided_diffusion.config import Config, pixel_settings
from guided_diffusion.run.records import Settings, digest_of
from guided_diffusion.speed.choice import Speed

PIXELS = 1  # to be raised when the same inputs and settings come to give other pixels


class Recipe:
    """What all results of a run follow from, besides each one's `Origin`."""

    def __init__(self, config: Config, device: torch.device, speed: Speed):
        self.config = config
        self.device = device
        self.speed = speed

    @cached_property
    def _hashing(self) -> dict[str, Future]:
        paths = {"model_path": self.config.model_path}
        if self.config.classifier:
            paths["classifier_path"] = self.config.classifier.path
        return {key: _in_background(fingerprint, path) for key, path in paths.items()}

    def start_hashing(self) -> None:
        """Read the checkpoints; for large ones that takes seconds, which nothing need wait for."""
        _ = self._hashing

    @cached_property
    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """Path, size and SHA-256 of each checkpoint, by its key. Raises UserError."""
        return {key: future.result() for key, future in self._hashing.items()}

    @cached_property
    def settings(self) -> Settings:
        """Key -> setting, or SHA-256 of a checkpoint. Raises UserError.

        Without those at their defaults, so that a key that comes to be known changes nothing.
        """
        digests = {key: checkpoint["sha256"] for key, checkpoint in self.checkpoints.items()}
        return {
            **pixel_settings(self.config),
            **digests,
            "device": self.device.type,  # each kind has random numbers of its own
            "precision": self.speed.precision,
            "compile": self.speed.compile,
            "cuda_graph": self.speed.cuda_graph,
            "version of the program": PIXELS,
        }

    @cached_property
    def digest(self) -> str:
        """A name for the settings. Raises UserError."""
        return digest_of(self.settings)


def _in_background(function: Callable[[str], Any], argument: str) -> Future:
    """What a thread will return that nobody waits for when the program ends with an error."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(function(argument))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future
