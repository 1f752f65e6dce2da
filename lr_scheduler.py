"""Learning rates as pure functions of the update, and what hands them to an optimizer."""

import math
from dataclasses import dataclass

import torch

from configs import Config, learning_rates


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then a decay; lengths in updates, counted from the run's first update."""

    name: str  # cosine (to `minimum`) | linear (to 1% of `base`) | step (by `decay_rate`)
    base: float
    warmup: float  # the rate that the warm-up begins with
    minimum: float
    updates: int
    warmup_updates: int
    decay_updates: int
    decay_rate: float

    @classmethod
    def from_config(cls, cfg: Config, steps_per_epoch: int) -> "Schedule":
        """The schedule of a configuration; `steps_per_epoch` counts updates."""
        settings = cfg.TRAIN.LR_SCHEDULER
        return cls(
            settings.NAME,
            *learning_rates(cfg),
            updates=cfg.TRAIN.EPOCHS * steps_per_epoch,
            warmup_updates=cfg.TRAIN.WARMUP_EPOCHS * steps_per_epoch,
            decay_updates=settings.DECAY_EPOCHS * steps_per_epoch,
            decay_rate=settings.DECAY_RATE,
        )

    def peak_and_sum(self) -> tuple[float, float]:
        """The highest rate of a run, and the sum of the rates of its updates, from a thousand."""
        points = range(0, self.updates, max(1, self.updates // 1000))
        rates = [lr_at(point, self) for point in points]
        return max(rates), sum(rates) / len(rates) * self.updates


def lr_at(step: int, schedule: Schedule) -> float:
    """The learning rate at a point of the schedule.

    The warm-up takes its share of the updates but does not shift the cosine or the steps after it:
    at its end the cosine is as far as it would be without one. The linear decay alone starts there.
    """
    base, warmup_updates = schedule.base, schedule.warmup_updates
    if step < warmup_updates:
        return schedule.warmup + step * ((base - schedule.warmup) / warmup_updates)
    if schedule.name == "cosine":
        done = min(step / schedule.updates, 1.0)
        amplitude = 0.5 * (base - schedule.minimum)
        return schedule.minimum + amplitude * (1 + math.cos(math.pi * done))
    if schedule.name == "linear":
        done = (step - warmup_updates) / max(schedule.updates - warmup_updates, 1)
        return base * (1 - 0.99 * min(done, 1.0))
    return base * schedule.decay_rate ** (step // schedule.decay_updates)


class LearningRateScheduler:
    """Sets the rate of every group to the schedule's times the group's `lr_scale` (layer decay).

    `step_update(u)` is called after the optimizer's step of update u (u = 0, 1, ... over the whole
    run) and sets the rate of the next one. So update u runs at the schedule's point max(0, u - 1),
    as in the original; there as here the very first update is not scaled by layer. At construction
    the optimizer is ready for update 0; a run that begins elsewhere calls `prepare`.
    """

    def __init__(self, schedule: Schedule, optimizer: torch.optim.Optimizer):
        self.schedule = schedule
        self.optimizer = optimizer
        self.prepare(0)

    def prepare(self, update: int) -> None:
        """Set the learning rates with which this update runs, whatever ran before."""
        if update > 0:
            return self.step_update(update - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(0, self.schedule)

    def step_update(self, step: int) -> None:
        """Set every group's learning rate to the schedule's at `step`."""
        rate = lr_at(step, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


def build_scheduler(
    cfg: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> LearningRateScheduler:
    """The scheduler of a configuration; `steps_per_epoch` counts updates, not forward passes."""
    return LearningRateScheduler(Schedule.from_config(cfg, steps_per_epoch), optimizer)
