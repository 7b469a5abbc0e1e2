"""The processes that train one network together, each on its share of every batch."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from guided_diffusion.config import UserError
from guided_diffusion.machine.ranks import ALONE, WAITING, World, join

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # how gradients travel

# Outlives the group of processes: else the group's own thread may be the last to let go of it, and
# wait for Python's lock while the end of the group holds that lock and waits for the thread.
_latest_work: list[distributed.Work] = []


class Processes:
    """All processes of a training run, this one alone by default: what they do together."""

    def __init__(self, world: World = ALONE, device: torch.device | str = "cpu"):
        """Meet the others. device: where this process's network learns. Raises UserError."""
        self.world = world
        self.device = torch.device(device)
        if world.size > 1 and self.device.type not in BACKENDS:
            raise UserError(
                f"device: {self.device.type} trains in one process only; accepted for several: "
                + ", ".join(BACKENDS)
            )
        self.team = join(world)
        if world.size > 1:
            self._connect()

    def _connect(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            distributed.init_process_group(
                BACKENDS[self.device.type],
                store=self.team.store,
                rank=self.world.rank,
                world_size=self.world.size,
                timeout=WAITING,  # for rank 0, which writes checkpoints and draws samples
            )
        except RuntimeError as error:
            raise UserError(
                f"the processes cannot connect: {_first_line(error)}; on several machines, set "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network that they share"
            ) from error

    def check_same(self, name: str, value: Any) -> None:
        """Raises UserError if a value, by its `repr`, is not that of rank 0."""
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        if digest != self.team.share(f"same {name}", lambda: digest):
            raise UserError(
                f"{name}: not the same as for rank 0; all processes, on all machines, need the "
                "same config and the same images"
            )

    def replicate(self, network: nn.Module) -> nn.Module:
        """The network, to be called for learning: its gradients become the mean of all ranks'."""
        if self.world.size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)

    def no_sync(self, replica: nn.Module) -> AbstractContextManager:
        """While gradients only add up here, for the other ranks to hear of them later."""
        return nullcontext() if self.world.size == 1 else replica.no_sync()

    def gather(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """The values (count,) of all ranks, in order, from each one's share of them."""
        if self.world.size == 1:
            return values
        whole = values.new_zeros(count)
        whole[share_of(self.world, count)] = values
        _latest_work[:] = [distributed.all_reduce(whole, async_op=True)]
        _latest_work[0].wait()
        return whole

    def part(self) -> None:
        """Wait until all are done. Nothing can be done together afterwards."""
        self.team.share("end", lambda: None)
        self.team.leave()
        if self.world.size > 1:
            distributed.destroy_process_group()


def share_of(world: World, count: int) -> slice:
    """This rank's stretch of `count` things: all are as long as each other, give or take one."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def check_batch_size(batch_size: int, world: World) -> None:
    """Raises UserError if a rank would have nothing to learn from."""
    if batch_size < world.size:
        raise UserError(
            f"batch_size: found {batch_size}, which is of all processes together, and there are "
            f"{world.size} of them; accepted: {world.size} or more, or start fewer processes"
        )


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Raises UserError if another process ends while this one works together with it."""
    try:
        yield
    except distributed.DistError as error:
        raise _lost(f"another process has stopped: {_first_line(error)}") from error
    except RuntimeError as error:
        # Gloo's errors have no class of their own; they begin with the path of its source.
        if "gloo" not in str(error):
            raise
        raise _lost("another process has stopped") from error


def _lost(what: str) -> UserError:
    return UserError(
        f"{what}; unless it gives a reason itself, run the same command again: training goes on "
        "from the newest checkpoint"
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
