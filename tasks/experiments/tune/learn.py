"""The learning itself: Adam on the scales, drawn to their start, until what is held out gets no better."""

import random
import time
from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from pydantic import Field

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from ota_core.learn.model import ScaledModel
from tasks.experiments.tune.config import ScalesConfig
from tasks.experiments.tune.goal import Goal
from tasks.experiments.tune.network import loss_of


class Step(Frozen):
    """What one step did; step 0 is the recipe as given."""

    number: int
    train: dict[str, float] = Field({})
    """Capability to the loss of the step's blocks, before it; bits per byte, with objective kl per token."""
    distance: float = 0.0
    """Mean squared distance of the scales from their start, after it."""
    held_out: dict[str, float] | None = None
    """Capability to the loss on what is held out, where it was looked at."""
    value: float | None = None
    """The objective there."""
    seconds: float
    """Since the beginning."""


class Learned(Frozen):
    """How it went."""

    objective: str
    steps: tuple[Step, ...]
    best: int
    """The step whose scales are kept."""

    @property
    def start(self) -> Step:
        """The recipe as given."""
        return self.steps[0]

    @property
    def kept(self) -> Step:
        """The step whose scales are kept."""
        return next(one for one in self.steps if one.number == self.best)


Tell = Callable[[Step], None]


def learn(model: ScaledModel, goal: Goal, config: ScalesConfig, tell: Tell) -> Learned:
    """Learn the model's scales; it has the best ones at the end. ``tell`` is called after every step, first with the recipe as given.

    ``every`` so many steps the held-out blocks are looked at; after ``patience`` looks that are no better than the best, it ends. Raises
    OtaError where the loss is no number.
    """
    began = time.monotonic()
    start = model.scales.clone()
    parameter = torch.nn.Parameter(model.scales)  # the same memory
    optimizer = torch.optim.Adam([parameter], lr=config.rate)
    steps = [_looked(Step(number=0, seconds=time.monotonic() - began), model, goal)]
    tell(steps[0])
    best, kept, waited = steps[0], start.clone(), 0
    draws = {name: _draws(len(blocks.train), f"{config.seed} {name}") for name, blocks in goal.blocks.items()}
    for number in range(1, config.steps + 1):
        model.gradient.zero_()
        weights, train = goal.weights(), {}
        for name, blocks in goal.blocks.items():
            places = [next(draws[name]) for _ in range(min(config.batch, len(blocks.train)))]
            losses = []
            for place in places:
                teacher = goal.teachers[name][place] if goal.teachers else None
                loss = loss_of(model.network, blocks.train[place], teacher)
                (loss * (weights[name] / len(places))).backward()
                losses.append(float(loss.detach()))
            goal.saw(name, places, losses)
            train[name] = fmean(losses)
        parameter.grad = model.gradient + 2 * config.penalty / start.numel() * (model.scales - start)
        if not torch.isfinite(parameter.grad).all():
            raise OtaError(
                f"step {number}: the gradient is no finite number; is the merge of the recipe as given a working model?"
            )
        optimizer.step()
        model.write()
        distance = float((model.scales - start).pow(2).mean())
        step = Step(number=number, train=train, distance=distance, seconds=time.monotonic() - began)
        if number % config.every == 0 or number == config.steps:
            step = _looked(step, model, goal)
            assert step.value is not None and best.value is not None
            if step.value < best.value:
                best, kept, waited = step, model.scales.clone(), 0
            else:
                waited += 1
        steps.append(step)
        tell(step)
        if waited >= config.patience:
            break
    model.scales.copy_(kept)
    return Learned(objective=config.objective, steps=tuple(steps), best=best.number)


def _looked(step: Step, model: ScaledModel, goal: Goal) -> Step:
    """The step with what is held out measured."""
    losses = goal.held_out(model.network)
    value = goal.value(losses)
    return step.model_copy(update={"held_out": losses, "value": value})


def _draws(count: int, seed: str) -> Iterator[int]:
    """Places of blocks, every one once before any comes again."""
    rng = random.Random(seed)
    while True:
        order = list(range(count))
        rng.shuffle(order)
        yield from order
