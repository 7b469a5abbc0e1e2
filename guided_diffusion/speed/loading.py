"""A network filled from its checkpoint, and ready to be evaluated fast."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from guided_diffusion.checkpoints.loading import Checkpoint, enough_memory, load_weights
from guided_diffusion.speed.choice import Speed
from guided_diffusion.speed.cpu_layers import (
    CpuPlacement,
    convolution_sides,
    fuse_norms,
    has_cpu_layers,
    keep_freed_memory,
)

if TYPE_CHECKING:
    from guided_diffusion.networks.autoencoder import Autoencoder

CALLS_BEFORE_CAPTURE = 3

Function = Callable[..., torch.Tensor]


def load_network(
    checkpoint: Checkpoint, speed: Speed, device: torch.device, gradients: bool = False
) -> Function:
    """A U-Net or a classifier, filled from its checkpoint and ready to be evaluated fast.

    gradients: of its output with respect to x will be asked for. Raises UserError, as
    `load_weights`.
    """
    network = checkpoint.network
    # Neither a compiler nor the backward pass can look into our own layers.
    plain = gradients or speed.compile
    # Latents come in all sizes: pieces would add up.
    if device.type == "cpu" and checkpoint.blank.part is None:
        keep_freed_memory()
    _fill(checkpoint, speed, device, convolution_sides(network), plain=plain)
    function = compiled(network) if speed.compile else network
    return CudaGraph(function) if speed.cuda_graph and not gradients else function


def load_autoencoder(
    checkpoint: Checkpoint, speed: Speed, device: torch.device, side: int
) -> Autoencoder:
    """An autoencoder, filled from its checkpoint; never compiled.

    It is called twice an image, so that only precision and layers pay. side: of the pictures that
    it is to be fastest for. Raises UserError, as `load_weights`.
    """
    autoencoder = checkpoint.network
    _fill(checkpoint, speed, device, autoencoder.convolution_sides(side))
    return autoencoder


def _fill(
    checkpoint: Checkpoint,
    speed: Speed,
    device: torch.device,
    sides: dict[nn.Conv2d, int],
    plain: bool = False,
) -> None:
    """Load a network's weights to a device, into layers for it. plain: into torch's own."""
    network = checkpoint.network
    network.eval().convert_blocks(speed.dtype)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # graphs and events are made on the current one
        torch.backends.cuda.matmul.allow_tf32 = speed.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = speed.precision == "tf32"
    with enough_memory(checkpoint.blank.path):
        if device.type == "cpu" and has_cpu_layers() and not plain:
            load_weights(checkpoint, CpuPlacement(network, sides))
            fuse_norms(network)
        else:
            load_weights(checkpoint)
        network.to(device).requires_grad_(False)


def compiled(function: Function) -> Function:
    """The function through torch.compile; after a warning the plain one, where that fails."""
    fast = torch.compile(function, dynamic=False)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal fast
        try:
            return fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error.__cause__)
            if isinstance(cause, torch.cuda.OutOfMemoryError):
                raise cause from error
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            warnings.warn(f"compile: {reason}; going on without", UserWarning, stacklevel=2)
            fast = function
        return function(*inputs)

    return call


class CudaGraph:
    """A function of CUDA tensors, captured once and replayed: one command instead of thousands.

    What it returns is overwritten by the next call. Inputs of other shapes are captured anew.
    """

    def __init__(self, function: Function):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[torch.Tensor] = []  # what the captured commands read
        self.output: torch.Tensor | None = None  # and write

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            self._capture(inputs)
        for captured, x in zip(self.inputs, inputs, strict=True):
            captured.copy_(x)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self.graph = self.output = None  # first, for their memory
        self.inputs = []
        torch.cuda.empty_cache()
        static = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up at the first calls is not to be captured
            for _ in range(CALLS_BEFORE_CAPTURE):
                self.function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.function(*static)
        self.graph, self.inputs, self.output = graph, static, output
