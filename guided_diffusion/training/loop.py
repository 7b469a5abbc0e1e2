"""The training loop: steps, averages, checkpoints, exact resume.

Everything random in a step follows from (seed, step), so a checkpoint needs no random state, and
a run that was killed at any moment goes on from its newest complete checkpoint to the same
weights. Files are named as the ecosystem does: modelNNNNNN.pt, ema_RATE_NNNNNN.pt, optNNNNNN.pt.

Of many processes, each draws what is random for the whole batch and learns from its share; their
gradients are averaged, so that the network, the optimiser and the timesteps' losses stay the same
in all. Rank 0 alone keeps averages and writes files, which do not tell how many processes there
were.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from guided_diffusion.checkpoints.loading import Blank, check_weights, load_state_dict
from guided_diffusion.config import TrainingParams, UserError
from guided_diffusion.machine import storage
from guided_diffusion.respace import Process
from guided_diffusion.training.data import TrainingImages, endless_batches
from guided_diffusion.training.ema import EMA
from guided_diffusion.training.losses import TIMESTEP_SAMPLERS, training_losses
from guided_diffusion.training.ranks import Processes, share_of

WriteSamples = Callable[[dict[str, torch.Tensor], str], None]  # (weights, path of the picture)


@dataclass(frozen=True)
class Objective:
    """What the network learns; see `training_losses`."""

    process: Process
    predict_xstart: bool = False
    use_kl: bool = False
    class_cond: bool = False


class Trainer:
    """A network on its way: weights, averages, optimiser, and the number of steps done."""

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        params: TrainingParams,
        *,
        seed: int = 0,
        processes: Processes | None = None,
    ):
        """processes: those that train together, and this one's device; None: this one, on CPU."""
        self.processes = processes or Processes()
        self.device = self.processes.device
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.replica = self.processes.replicate(self.network)
        self.objective = objective
        self.params = params
        self.seed = seed
        self.step = 0
        rates = params.ema_rate if self.processes.team.is_first else ()
        self.emas = [EMA(self.network, rate) for rate in rates]
        self.timesteps = TIMESTEP_SAMPLERS[params.schedule_sampler](
            objective.process.diffusion.num_timesteps
        )
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=params.lr, weight_decay=params.weight_decay
        )

    def train_step(self, images: torch.Tensor, classes: torch.Tensor) -> float:
        """Learn from one batch; returns its mean loss.

        images: this rank's share of the batch, (b, 3, S, S) in [-1, 1]; classes: theirs, (b,).
        """
        batch_size, world = self.params.batch_size, self.processes.world
        share = share_of(world, batch_size)
        torch.manual_seed(_seed(self.seed, self.step))
        if self.params.random_flip:
            flip = torch.rand(batch_size)[share] < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        t, weights = self.timesteps.sample(batch_size)
        noise = torch.randn(batch_size, *images.shape[1:])[share]
        if world.rank > 0:  # no two ranks drop out the same
            torch.manual_seed(_seed(self.seed, self.step, world.rank))
        losses = self._backward(images, classes, t[share], weights[share], noise)
        losses = self.processes.gather(losses, batch_size).cpu()
        self.timesteps.update(t, losses)
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {self.step} is {loss}: training has diverged; lower lr, or set "
                "grad_clip, and run again from the last good checkpoint"
            )
        self._update()
        self.step += 1
        return loss

    def _backward(self, *share: torch.Tensor) -> torch.Tensor:
        """Add up the gradients, one microbatch at a time; returns the losses of the share, (b,)."""
        size = len(share[0]) if self.params.microbatch == -1 else self.params.microbatch
        *parts, last = zip(*(tensor.split(size) for tensor in share), strict=True)
        with self.processes.no_sync(self.replica):
            losses = [self._learn(*part) for part in parts]
        return torch.cat([*losses, self._learn(*last)])

    def _learn(self, *part: torch.Tensor) -> torch.Tensor:
        x0, y, t, weights, noise = (tensor.to(self.device) for tensor in part)
        losses = self._losses(x0, y, t, noise)
        # A sum over the batch, of which each rank has a share, by a mean over the ranks.
        share = self.params.batch_size / self.processes.world.size
        (losses * weights).sum().div(share).backward()
        return losses.detach()

    def _losses(
        self, x0: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            labels = (y,) if self.objective.class_cond else ()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.params.use_bf16):
                return self.replica(x_t, self.objective.process.network_times[t], *labels)

        return training_losses(
            network,
            self.objective.process.diffusion,
            x0,
            t,
            noise,
            predict_xstart=self.objective.predict_xstart,
            use_kl=self.objective.use_kl,
        )["loss"]

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.params, self.step)
        if self.params.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.params.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update(self.network)

    def save(self, log_dir: str) -> None:
        """Write a checkpoint; its optimiser file comes last, and so says that it is complete.

        Raises UserError if a file cannot be written; older checkpoints stay as they are.
        """
        files = self.checkpoint_files(self.step)
        contents = [self.network.state_dict(), *(ema.weights for ema in self.emas)]
        optimizer = self.optimizer.state_dict() | {"timesteps": self.timesteps.state_dict()}
        for name, content in zip(files, [*contents, optimizer], strict=True):
            _write(f"{log_dir}/{name}", content)

    def resume(self, log_dir: str) -> None:
        """Go on from the newest complete checkpoint in log_dir, if there is one.

        Raises UserError if log_dir holds checkpoints, but of another configuration.
        """
        # Rank 0 decides: the others have no averages, and may see files later.
        step = self.processes.team.share("step", lambda: self._newest_complete(log_dir))
        if step is not None:
            self._load(log_dir, step)

    def _newest_complete(self, log_dir: str) -> int | None:
        steps = _saved_steps(log_dir)
        if not steps:
            return None
        complete = [step for step in steps if not self._missing_files(log_dir, step)]
        if not complete:
            raise UserError(
                f"log_dir {log_dir}: step {steps[-1]} was saved, but without "
                f"{self._missing_files(log_dir, steps[-1])[0]}: set ema_rate as it was, or choose "
                "another log_dir to start afresh"
            )
        return complete[-1]

    def _load(self, log_dir: str, step: int) -> None:
        if missing := self._missing_files(log_dir, step):
            raise UserError(
                f"log_dir {log_dir}: rank 0 goes on from step {step}, but {missing[0]} is not "
                "here: all machines need the same log_dir, on a disk that they share"
            )
        *weights_paths, optimizer_path = (
            f"{log_dir}/{name}" for name in self.checkpoint_files(step)
        )
        try:
            for path in weights_paths:
                check_weights(Blank(self.network, path))
            optimizer = load_state_dict(optimizer_path)
        except UserError as error:
            raise UserError(
                f"{error}; to go on from an older checkpoint, delete {optimizer_path}; to start "
                "afresh, choose another log_dir"
            ) from error
        # Ranks without averages leave those paths alone.
        for part, path in zip([self.network, *self.emas], weights_paths, strict=False):
            part.load_state_dict(load_state_dict(path))
        try:
            self.timesteps.load_state_dict(optimizer.pop("timesteps"))
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{optimizer_path}: this is of another configuration: set schedule_sampler and "
                "diffusion_steps as they were, or choose another log_dir to start afresh"
            ) from error
        self.step = step

    def _missing_files(self, log_dir: str, step: int) -> list[str]:
        names = self.checkpoint_files(step)
        return [name for name in names if not storage.exists(f"{log_dir}/{name}")]

    def checkpoint_files(self, step: int) -> list[str]:
        """Names of a checkpoint's files: the weights, each average's, the optimiser's state."""
        emas = [f"ema_{rate}_{step:06d}.pt" for rate in self.params.ema_rate]
        return [f"model{step:06d}.pt", *emas, f"opt{step:06d}.pt"]

    def describe(self, images: int) -> str:
        """Two lines for people. images: how many there are to learn from."""
        params, size = self.params, self.processes.world.size
        weights = sum(weight.numel() for weight in self.network.parameters())
        return (
            f"a network of {weights / 1e6:.1f} M weights, {images:,} image(s) of "
            f"{params.data_dir}, {params.total_steps:,} steps of batch size {params.batch_size}"
            + (f" in {size} processes" if size > 1 else "")
            + f"\nseed {self.seed}, device {self.device}, log_dir {params.log_dir}, "
            + (f"resuming from step {self.step}" if self.step else "starting afresh")
        )


def train(
    trainer: Trainer,
    images: TrainingImages,
    log_dir: str,
    *,
    write_samples: WriteSamples,
    show_progress: bool = True,
) -> None:
    """Train on from the trainer's step to `total_steps`, with checkpoints and pictures in log_dir.

    Raises UserError if an image cannot be read, or log_dir cannot be written.
    """
    params, processes = trainer.params, trainer.processes
    processes.team.share("log_dir", lambda: _check_writable(log_dir))
    batches = endless_batches(
        images, params.batch_size, trainer.seed, trainer.step, processes.world
    )
    recent: list[float] = []
    with tqdm(
        total=params.total_steps,
        initial=trainer.step,
        unit="step",
        disable=not (show_progress and processes.team.is_first),
    ) as bar:
        while trainer.step < params.total_steps:
            recent.append(trainer.train_step(*next(batches)))
            bar.update()
            if trainer.step % params.log_interval == 0:
                bar.set_postfix(loss=f"{np.mean(recent):.4f}")
                recent.clear()
            if processes.team.is_first:
                _write_what_is_due(trainer, log_dir, write_samples)
    processes.part()


def _write_what_is_due(trainer: Trainer, log_dir: str, write_samples: WriteSamples) -> None:
    # The picture first: a run killed in between draws it again.
    if trainer.params.sample_interval and _is_due(trainer, trainer.params.sample_interval):
        write_samples(trainer.emas[0].weights, f"{log_dir}/samples{trainer.step:06d}.png")
    if _is_due(trainer, trainer.params.save_interval):
        trainer.save(log_dir)


def _is_due(trainer: Trainer, interval: int) -> bool:
    return trainer.step % interval == 0 or trainer.step == trainer.params.total_steps


def learning_rate(params: TrainingParams, step: int) -> float:
    """The rate at a step: up over `warmup_steps`, then constant or down to 0 at the last step."""
    rate = params.lr
    if step < params.warmup_steps:
        rate *= (step + 1) / params.warmup_steps
    if params.lr_anneal_steps:
        rate *= max(0.0, 1 - step / params.lr_anneal_steps)
    return rate


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _write(path: str, content: dict) -> None:
    advice = "make room, then run again: training goes on from the newest complete checkpoint"
    errors = OSError, RuntimeError  # a full disk is a RuntimeError in torch's writer
    with storage.writing(path, advice, errors=errors), storage.create_atomically(path) as file:
        torch.save(content, file)


def _saved_steps(log_dir: str) -> list[int]:
    """Steps, ascending, whose optimiser file is in log_dir itself."""
    if not storage.exists(log_dir):
        return []
    paths = [Path(path) for path in storage.list_files(log_dir)]
    names = [path.name for path in paths if path.parent == Path(log_dir)]
    matches = [re.fullmatch(r"opt(\d{6,})\.pt", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def _check_writable(log_dir: str) -> None:
    with storage.writing(f"in {log_dir}", "choose another folder", key="log_dir"):
        storage.check_writable(log_dir)
