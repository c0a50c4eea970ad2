"""The steps of one job: draw, add up gradients, watch the loss, keep what a kill must not cost."""

from __future__ import annotations

import logging
import math
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cloud.learners import targets
from cloud.learners.checkpoint import State
from cloud.learners.course import StepReport
from cloud.learners.ewc import Ewc
from cloud.learners.objectives import Drawn
from cloud.learners.scoring import no_time_left
from protos.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cloud.learners.checkpoint import Checkpoints
    from cloud.learners.config import LearnerConfig
    from cloud.learners.course import Control, Course
    from cloud.learners.model import SplitModel
    from cloud.learners.objectives import Objective
    from cloud.learners.packing import Example
    from cloud.learners.targets import Target

log = logging.getLogger("anabranch.learners")

_DECAY = 1 / 3
_GOOD_EVERY = 10  # steps between weights that are kept in case the loss diverges
_WINDOW = 5
_DIVERGED = 2.0, 0.5  # times the first losses, plus nats


@dataclass
class _Cycle:
    """Draws without repetition until all were drawn, then again."""

    count: int
    left: list[int]

    def draw(self, size: int, rng: random.Random) -> list[int]:
        size = min(size, self.count)
        while len(self.left) < size:
            self.left += rng.sample(range(self.count), self.count)
        drawn, self.left = self.left[:size], self.left[size:]
        return drawn


@dataclass(frozen=True)
class _Held:
    """An answer that is held to a kept distribution; each of its tokens weighs ``weight``."""

    example: Example
    target: Target
    weight: float


class Training:
    """The steps of one job."""

    def __init__(
        self,
        model: SplitModel,
        course: Course,
        config: LearnerConfig,
        control: Control,
        objective: Objective,
        scores: Mapping[str, list[Target]],
        files: Checkpoints,
    ) -> None:
        self._model = model
        self._config = config
        self._control = control
        self._objective = objective
        self._files = files
        self._replay = list(zip(course.replay, scores["replay"], strict=False))
        self._anchors = list(zip(course.anchors, scores["anchors"], strict=False))
        self._rng = random.Random(config.seed)
        counts = (len(course.lessons), len(self._replay), len(self._anchors))
        self._draws = [_Cycle(count, []) for count in counts]
        self._parameters = model.trainable()
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        earlier = (*course.replay, *course.anchors)
        self._ewc = Ewc(model, earlier, self._parameters, config.ewc) if config.ewc else None
        self._losses: list[float] = []
        self._good: dict[str, torch.Tensor] | None = None
        self._good_seen: set[int] = set()
        self.seen: set[int] = set()
        """Numbers of the lessons that the weights were drawn to at least once."""
        self.step = 0
        self.seconds: list[float] = []
        self._method, self._spent, self._saved = "", 0.0, 0.0
        self.scoring = 0.0
        """Seconds before the first step, in all processes that the job has had."""

    def run(self, method: str, scoring: float) -> str:
        """Train to the end; why it ended early, or nothing.

        ``scoring`` are the seconds that this process spent before.
        """
        config, clock = self._config, self._control.clock
        self._method, self._spent, self.scoring = method, scoring, scoring
        state = self._files.load()
        if state is not None and state.method == method:
            self._restore(state)
            log.info("going on after step %d", self.step)
        del state  # its weights were copied
        self._saved, last = self._spent, clock()
        while (fraction := self._fraction()) < 1:
            before = clock()
            try:
                report = self._take(fraction, before)
            except FloatingPointError as error:
                return self._fall_back(str(error))
            now = clock()
            self._spent, last = self._spent + now - last, now
            self.seconds.append(now - before)
            self._control.report(report)
        if not self._finite():
            return self._fall_back("weights are no longer finite")
        if self.step < config.steps:
            return f"the budget of {config.budget_seconds:.0f} s ended after {self.step} steps"
        return ""

    def _fraction(self) -> float:
        """Of the steps or of the budget, whichever is further; 1 ends the job.

        A step that would end after the budget, if it takes as long as most, is not begun.
        """
        config = self._config
        part = self.step / config.steps
        if not config.budget_seconds:
            return part
        usual = statistics.median(self.seconds) if self.seconds else 0.0
        room = config.budget_seconds - self.scoring
        if room <= 0 or self._spent + usual > config.budget_seconds:
            if not self.step:
                raise no_time_left(config.budget_seconds, self.scoring)
            return 1.0
        return max(part, (self._spent - self.scoring) / room)

    def _take(self, fraction: float, before: float) -> StepReport:
        config = self._config
        dice = self._dice()
        lessons, replay, anchors = self._draw()
        losses, parts = self._gradients(lessons, [*replay, *anchors], fraction)
        told = [x for x, d in zip(losses, lessons, strict=False) if d.counts]
        loss = statistics.fmean(told) if told else 0.0
        held = sum(losses[len(lessons) : len(lessons) + len(replay)])
        anchor = sum(losses[len(lessons) + len(replay) :])
        if told:
            self._watch(loss + held + anchor, dice)
        rate = config.learning_rate * _rate(self.step, fraction, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._ewc is not None:
            self._ewc.add_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), config.clip)
        if not bool(norm.isfinite()):
            msg = f"the gradient is {float(norm)} at step {self.step + 1}"
            raise FloatingPointError(msg)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._objective.after_step()
        self.seen.update(d.number for d in lessons if d.counts)
        self.step += 1
        return StepReport(
            self.step,
            max(fraction, self.step / config.steps),
            loss,
            anchor / config.anchor_weight if config.anchor_weight else 0.0,
            held / config.replay_weight if config.replay_weight else 0.0,
            statistics.fmean(p[0] for p in parts),
            statistics.fmean(p[1] for p in parts),
            rate,
            self._control.clock() - before,
        )

    def _draw(self) -> tuple[list[Drawn], list[_Held], list[_Held]]:
        config = self._config
        sizes = (config.batch, config.replay_batch, config.anchor_batch)
        picked = [d.draw(n, self._rng) for d, n in zip(self._draws, sizes, strict=True)]
        return (
            self._objective.draw(picked[0], self.step),
            _held([self._replay[i] for i in picked[1]], config.replay_weight),
            _held([self._anchors[i] for i in picked[2]], config.anchor_weight),
        )

    def _gradients(
        self, lessons: Sequence[Drawn], held: Sequence[_Held], fraction: float
    ) -> tuple[list[float], list[tuple[float, bool]]]:
        """Add up gradients, row by row; each term's loss and how each lesson's rollout went.

        Lessons share the weight of one; what is held has its weight in its loss already.
        """
        terms: list[Drawn | _Held] = [*lessons, *held]
        counted = max(1, sum(d.counts for d in lessons))
        losses: list[float] = []
        walks: list[tuple[float, bool]] = []
        left = iter(terms)
        for row in targets.parts([t.example for t in terms], self._config.row_tokens):
            # Samples do not come again: what the frozen layers made of them is not kept.
            again = self._config.rollouts != "on-policy"
            log_probs = self._model.log_probs(self._model.upper, row, keep=again)
            total = log_probs.new_zeros(())
            mine = [next(left) for _ in row]
            told = iter(self._objective.targets([t for t in mine if isinstance(t, Drawn)]))
            for term, ours in zip(
                mine, torch.split(log_probs, [len(e.answer) for e in row]), strict=True
            ):
                if isinstance(term, Drawn):
                    part = self._objective.loss(term, next(told), ours, fraction)
                    total = total + part.loss / counted
                    losses.append(part.loss.item())
                    walks.append((part.replaced, part.cut))
                else:
                    loss = term.weight * term.target.kl(ours).sum()
                    total = total + loss
                    losses.append(loss.item())
            torch.autograd.backward(total)
        return losses, walks

    def _watch(self, loss: float, dice: dict[str, Any]) -> None:
        """Keep the weights that gave this loss from time to time, or raise where it diverges.

        Only weights whose loss is known are kept, in memory and on disk: who goes on from a
        checkpoint has no others to return to. ``dice`` are those before this step's draw.

        Raises:
            FloatingPointError: the loss is not finite, or far above what it was at the beginning.
        """
        self._losses.append(loss)
        if not math.isfinite(loss):
            msg = f"the loss is {loss} at step {self.step + 1}"
            raise FloatingPointError(msg)
        times, plus = _DIVERGED
        first = statistics.fmean(self._losses[:_WINDOW])
        now = statistics.fmean(self._losses[-_WINDOW:])
        if now > times * first + plus:
            msg = f"the loss rose from {first:.2f} to {now:.2f} by step {self.step + 1}"
            raise FloatingPointError(msg)
        if not self.step or max(now, loss) > first + plus:
            return
        if self.step % _GOOD_EVERY == 0:
            self._keep()
        if self._spent - self._saved >= self._config.checkpoint_seconds:
            self._save(dice)
            self._saved = self._spent

    @torch.no_grad()
    def _keep(self) -> None:
        """Remember the weights as good, in the memory of those before."""
        if self._good is None:
            self._good = {name: p.detach().clone() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            self._good[name].copy_(p)
        self._good_seen = set(self.seen)

    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self._parameters.values())

    def _fall_back(self, why: str) -> str:
        """Back to the last good weights."""
        if self._good is None:
            msg = f"{why}: nothing was learnt, lower the learning rate"
            raise TrainingError(msg)
        for name, value in self._good.items():
            self._parameters[name].data.copy_(value)
        self.seen = self._good_seen
        log.warning("%s: back to the last good weights", why)
        return f"{why}; the last good weights are kept"

    def _moving(self) -> dict[str, torch.Tensor]:
        """What changes while training: the weights, and what the objective keeps of its own."""
        tensors = {f"weights/{n}": p.detach() for n, p in self._parameters.items()}
        return tensors | {f"objective/{n}": p for n, p in self._objective.state().items()}

    def _dice(self) -> dict[str, Any]:
        return {"rng": self._rng.getstate(), "left": [list(d.left) for d in self._draws]}

    def _save(self, dice: dict[str, Any]) -> None:
        state = State(
            self.step,
            self._spent,
            self.scoring,
            self._moving(),
            self._optimizer.state_dict(),
            dice,
            self._method,
            self._losses[:-1],  # who goes on does this step again
            self.seconds,
            sorted(self.seen),
        )
        self._files.save(state)

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        for name, value in self._moving().items():
            value.copy_(state.tensors[name])
        self._optimizer.load_state_dict(state.optimizer)
        self._rng.setstate(state.dice["rng"])
        for draw, left in zip(self._draws, state.dice["left"], strict=True):
            draw.left = list(left)
        self._spent += state.spent
        self.scoring += state.scoring
        self.step, self._losses = state.step, list(state.losses)
        self.seconds, self.seen = list(state.seconds), set(state.seen)
        if self.step >= _GOOD_EVERY:  # before, nothing was learnt that is worth returning to
            self._keep()


def _held(pairs: Sequence[tuple[Example, Target]], weight: float) -> list[_Held]:
    """The mean over all their tokens, times ``weight``."""
    tokens = sum(len(example.answer) for example, _ in pairs)
    return [_Held(example, target, weight / tokens) for example, target in pairs]


def _rate(step: int, fraction: float, config: LearnerConfig) -> float:
    """Share of the learning rate: a linear warm-up, then a plateau and a way down, or a cosine.

    >>> from cloud.learners.config import LearnerConfig
    >>> config = LearnerConfig(steps=9, warmup=2)
    >>> [round(_rate(s, s / 9, config), 2) for s in range(9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.67, 0.33]
    >>> config = LearnerConfig(steps=6, warmup=2, schedule="cosine")
    >>> [round(_rate(s, s / 6, config), 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        begin = min(config.warmup / config.steps, 1.0)
        down = (fraction - begin) / (1 - begin) if fraction > begin else 0.0
        return warm * (1 + math.cos(math.pi * down)) / 2
    return min(warm, (1 - fraction) / _DECAY)
