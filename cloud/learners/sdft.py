"""Self-distillation fine-tuning with a chat-turn teacher and guided rollouts.

SDFT (Shenfeld et al., arXiv 2601.19897): the teacher is the student itself, only that it sees the
demonstration; at every token of the student's answer the student's distribution is pulled to the
teacher's by forward KL. Three changes make it work at 135M parameters. The teacher's prompt shows
the demonstration as an earlier turn of the chat (``protos.prompt``). Rollouts are *guided* (after
speculative knowledge distillation, arXiv 2410.11325): a token the student proposes stands if the
teacher gives it at least a tenth of its best token's probability, else the teacher's best token
replaces it. And the teacher is the model as it was imported, frozen: its distribution along the
demonstration is computed once and kept.

A rollout is drafted by the demonstration: while the guided walk agrees with it, one pass of each
model scores every token, and where the walk leaves it the rollout is cut. Nearly all do agree,
because the teacher copies what it was shown; the share that left is reported.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from protos.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloud.learners.model import Example, SplitModel, Upper

_DECAY = 1 / 3
_KEPT = 32  # tokens of a cached distribution; the rest of its mass is one bucket


@dataclass(frozen=True)
class SdftConfig:
    """Hyperparameters; the defaults are what measured best here (docs/learning.md)."""

    steps: int = 55
    batch: int = 8
    learning_rate: float = 1.5e-4
    warmup: int = 5
    guidance: float = 0.1
    anchor_weight: float = 1.0
    anchor_batch: int = 3
    replay_weight: float = 1.0
    replay_batch: int = 4
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """One demonstration in tokens: the student's view, and the teacher's with the same answer."""

    student: Example
    teacher: Example


@dataclass(frozen=True)
class StepReport:
    """How one step went: losses in nats a token, shares of tokens replaced and rollouts cut."""

    step: int
    steps: int
    loss: float
    anchor: float
    replay: float
    replaced: float
    cut: float


@dataclass(frozen=True)
class Target:
    """A kept distribution for each answer token: top tokens and the rest of the mass.

    ``ids`` [tokens, kept] int64; ``log_probs`` [tokens, kept] in nats; ``rest`` [tokens] is the
    natural log of the mass outside.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, log_probs: torch.Tensor) -> Target:
        """Keep the largest of ``log_probs`` [tokens, vocabulary]."""
        top, ids = log_probs.topk(min(_KEPT, log_probs.shape[-1]), dim=-1)
        return cls(ids, top, _log_rest(top))

    def kl(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Forward KL [tokens] in nats from this target to ``log_probs`` [tokens, vocabulary].

        Over the kept tokens and one bucket for the rest: a lower bound of the full KL, tight where
        the kept tokens hold the mass.
        """
        ours = log_probs.gather(1, self.ids)
        inside = (self.log_probs.exp() * (self.log_probs - ours)).sum(-1)
        return inside + self.rest.exp() * (self.rest - _log_rest(ours))


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Natural log of one minus the mass of ``log_probs`` [tokens, kept]."""
    inside = log_probs.exp().sum(-1).clamp(max=1 - 1e-6)
    return torch.log1p(-inside)


def join(targets: Sequence[Target]) -> Target:
    """Targets of several sequences behind one another."""
    return Target(
        torch.cat([t.ids for t in targets]),
        torch.cat([t.log_probs for t in targets]),
        torch.cat([t.rest for t in targets]),
    )


@dataclass
class Walk:
    """A guided walk along drafts: weights [tokens] that are 0 behind the first departure."""

    weights: torch.Tensor
    replaced: float
    cut: float


def guided_walk(
    student: torch.Tensor, teacher: Target, answers: Sequence[Sequence[int]], guidance: float
) -> Walk:
    """Walk the guided rollout along the drafts ``answers``.

    Args:
        student: log-probabilities [tokens of all answers, vocabulary].
        teacher: its distribution at the same tokens.
        answers: drafts, token ids of each answer.
        guidance: a proposal stands from this share of the teacher's best probability on.

    Returns:
        Weights: each answer's walked tokens share 1 / answers, the tokens after a departure get 0.
    """
    proposal = student.argmax(-1)
    found = teacher.ids == proposal[:, None]
    score = torch.where(found, teacher.log_probs, -torch.inf).amax(-1)
    stands = score >= teacher.log_probs[:, 0] + math.log(guidance)
    rollout = torch.where(stands, proposal, teacher.ids[:, 0])
    weights = torch.zeros(len(rollout), device=student.device)
    start, cut = 0, 0
    for answer in answers:
        end = start + len(answer)
        draft = torch.tensor(answer, device=student.device)
        departures = (rollout[start:end] != draft).nonzero()
        walked = int(departures[0, 0]) + 1 if len(departures) else len(answer)
        cut += walked < len(answer)
        weights[start : start + walked] = 1 / (walked * len(answers))
        start = end
    return Walk(weights, float((~stands).float().mean()), cut / len(answers))


@dataclass
class _Cycle:
    """Draws without repetition until all were drawn, then again."""

    count: int
    rng: random.Random
    _left: list[int] = field(default_factory=list)

    def draw(self, size: int) -> list[int]:
        while len(self._left) < size:
            self._left += self.rng.sample(range(self.count), self.count)
        drawn, self._left = self._left[:size], self._left[size:]
        return drawn


class Sdft:
    """One job of learning.

    Args:
        model: the previous release's fp32 masters, cut in two; its upper layers are trained.
        lessons: demonstrations to learn.
        teacher: the upper layers of the model as it was imported. A student that was tuned for one
            skill copies demonstrations of another less well: it would be a worse teacher.
        replay: earlier skills' demonstrations; the student is held to what it said of them before.
        anchors: answers that the base model itself wrote, with the base's distributions.
        config: hyperparameters.
    """

    def __init__(
        self,
        model: SplitModel,
        lessons: Sequence[Lesson],
        *,
        teacher: Upper,
        replay: Sequence[Example],
        anchors: Sequence[tuple[Example, Target]],
        config: SdftConfig,
    ) -> None:
        if not lessons:
            msg = "nothing to learn: there is no demonstration"
            raise TrainingError(msg)
        self._model = model
        self._lessons = lessons
        self._teacher = teacher
        self._replay = replay
        self._anchors = anchors
        self._config = config

    def learn(self, report: Callable[[StepReport], None]) -> dict[str, torch.Tensor]:
        """Train, and return the learnt parameters by name.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        config, model = self._config, self._model
        rng = random.Random(config.seed)
        torch.manual_seed(config.seed)
        teacher = keep(model, self._teacher, [lesson.teacher for lesson in self._lessons])
        earlier = keep(model, model.copy_upper(), self._replay)
        model.encode([lesson.student for lesson in self._lessons])
        parameters = [p.requires_grad_() for p in model.upper.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
        draws = [_Cycle(len(x), rng) for x in (self._lessons, self._replay, self._anchors)]
        for step in range(config.steps):
            picked = [
                d.draw(min(n, d.count))
                for d, n in zip(
                    draws, (config.batch, config.replay_batch, config.anchor_batch), strict=True
                )
            ]
            loss, seen = self._loss(step, picked, teacher, earlier)
            if not math.isfinite(seen.loss) or not math.isfinite(seen.anchor):
                msg = f"the loss is {seen.loss} at step {step}: lower the learning rate"
                raise TrainingError(msg)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            report(seen)
        return {name: p.detach() for name, p in model.trainable().items()}

    def _loss(
        self,
        step: int,
        picked: Sequence[Sequence[int]],
        teacher: list[Target],
        earlier: list[Target],
    ) -> tuple[torch.Tensor, StepReport]:
        config = self._config
        lessons = [self._lessons[i].student for i in picked[0]]
        replay = [self._replay[i] for i in picked[1]]
        anchors = [self._anchors[i][0] for i in picked[2]]
        log_probs = self._model.log_probs(self._model.upper, [*lessons, *replay, *anchors])
        counts = [sum(len(e.answer) for e in group) for group in (lessons, replay, anchors)]
        ours, kept, general = torch.split(log_probs, counts)
        target = join([teacher[i] for i in picked[0]])
        with torch.no_grad():
            walk = guided_walk(ours, target, [e.answer for e in lessons], config.guidance)
        loss = (walk.weights * target.kl(ours)).sum()
        held = (
            join([earlier[i] for i in picked[1]]).kl(kept).mean() if replay else loss.new_zeros(())
        )
        anchor = (
            join([self._anchors[i][1] for i in picked[2]]).kl(general).mean()
            if anchors
            else loss.new_zeros(())
        )
        total = loss + config.replay_weight * held + config.anchor_weight * anchor
        seen = StepReport(
            step + 1, config.steps, loss.item(), anchor.item(), held.item(), walk.replaced, walk.cut
        )
        return total, seen


def _rate(step: int, config: SdftConfig) -> float:
    """Linear warm-up, a plateau, and over the last third a linear way down.

    >>> [round(_rate(s, SdftConfig(steps=9, warmup=2)), 2) for s in range(9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.67, 0.33]
    """
    warm = (step + 1) / max(1, config.warmup)
    down = (config.steps - step) / max(1, config.steps * _DECAY)
    return min(1.0, warm, down)


@torch.no_grad()
def keep(
    model: SplitModel, upper: Upper, examples: Sequence[Example], tokens: int = 512
) -> list[Target]:
    """Distributions of ``upper`` along the answers of ``examples``, one target each.

    ``tokens`` is how many are packed in one row.
    """
    targets: list[Target] = []
    for part in _parts(examples, tokens):
        log_probs = model.log_probs(upper, part)
        targets += [Target.of(p) for p in torch.split(log_probs, [len(e.answer) for e in part])]
    return targets


def _parts(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Cut a list where a part has so many tokens: attention over a packed row grows by the square.

    >>> from cloud.learners.model import Example
    >>> [len(part) for part in _parts([Example((), (1, 2, 3), (4, 5))] * 5, 8)]
    [2, 2, 1]
    """
    part: list[Example] = []
    for example in examples:
        part.append(example)
        if sum(e.length for e in part) >= tokens:
            yield part
            part = []
    if part:
        yield part
