"""What is learnt from a lesson: a teacher's distribution (SDFT), or its answer's tokens (SFT)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from cloud.learners import targets
from cloud.learners.rollouts import guided_walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud.learners.config import LearnerConfig
    from cloud.learners.course import Lesson
    from cloud.learners.model import SplitModel, Upper
    from cloud.learners.packing import Example
    from cloud.learners.targets import Target


@dataclass(frozen=True)
class Drawn:
    """A lesson as one step sees it: its number, and the sequence that is scored.

    ``teacher`` is the same answer as the teacher sees it; ``counts`` is False for one that teaches
    nothing.
    """

    number: int
    example: Example
    teacher: Example
    counts: bool = True


@dataclass(frozen=True)
class Part:
    """One lesson's loss, mean over the answer's tokens in nats, and how its rollout went."""

    loss: torch.Tensor
    replaced: float = 0.0
    cut: bool = False


class Objective(Protocol):
    """How lessons become a loss."""

    def draw(self, picked: Sequence[int], step: int) -> list[Drawn]:
        """The lessons with these numbers as step ``step`` learns from them."""

    def targets(self, drawn: Sequence[Drawn]) -> list[Target | None]:
        """What to learn from the lessons of one row."""

    def loss(
        self, drawn: Drawn, target: Target | None, ours: torch.Tensor, fraction: float
    ) -> Part:
        """Loss of one lesson.

        Args:
            drawn: as :meth:`draw` gave it.
            target: as :meth:`targets` gave it.
            ours: the student's log-probabilities [answer tokens, vocabulary].
            fraction: of the job that is done, 0..1.
        """

    def after_step(self) -> None:
        """Called when the weights have changed."""

    def state(self) -> dict[str, torch.Tensor]:
        """What changes with the steps and a checkpoint must hold: live tensors by name."""


def cross_entropy(ours: torch.Tensor, answer: Sequence[int], skip: int = 0) -> torch.Tensor:
    """Mean of ``-log p`` in nats over an answer's tokens, the first ``skip`` left out."""
    skip = min(skip, len(answer) - 1)
    ids = torch.tensor(answer, device=ours.device)[skip:, None]
    return -ours[skip:].gather(1, ids).mean()


class Sft:
    """Supervised fine-tuning: cross-entropy on the demonstrated answer."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons

    def draw(self, picked: Sequence[int], step: int) -> list[Drawn]:  # noqa: ARG002
        """See :class:`Objective`."""
        return [Drawn(i, self._lessons[i].student, self._lessons[i].teacher) for i in picked]

    def targets(self, drawn: Sequence[Drawn]) -> list[Target | None]:
        """None: the answer says it."""
        return [None] * len(drawn)

    def loss(
        self,
        drawn: Drawn,
        target: Target | None,  # noqa: ARG002
        ours: torch.Tensor,
        fraction: float,  # noqa: ARG002
    ) -> Part:
        """See :class:`Objective`."""
        return Part(cross_entropy(ours, drawn.example.answer))

    def after_step(self) -> None:
        """Nothing follows the weights."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing of its own."""
        return {}


class Sdft:
    """Self-distillation (Shenfeld et al., arXiv 2601.19897).

    Args:
        model: whose upper layers are the student.
        lessons: what is learnt.
        config: divergence, rollouts, teacher.
        teacher: upper layers that teach; None where ``scored`` says it all.
        scored: the teacher's distribution along each demonstration, where it is fixed.
        base: the imported model's along each demonstration without being shown it, or empty.
        end: id of the token that ends an answer.
    """

    def __init__(
        self,
        model: SplitModel,
        lessons: Sequence[Lesson],
        config: LearnerConfig,
        *,
        teacher: Upper | None,
        scored: Sequence[Target],
        base: Sequence[Target],
        end: int,
    ) -> None:
        self._model = model
        self._lessons = lessons
        self._config = config
        self._teacher = teacher
        self._scored = scored
        self._base = base
        self._end = end

    def draw(self, picked: Sequence[int], step: int) -> list[Drawn]:
        """See :class:`Objective`."""
        config = self._config
        lessons = [self._lessons[i] for i in picked]
        counts = [True] * len(lessons)
        if config.rollouts == "on-policy":
            lessons, counts = self._on_policy(lessons, step)
        return [
            Drawn(i, lesson.student, lesson.teacher, counts=count)
            for i, lesson, count in zip(picked, lessons, counts, strict=True)
        ]

    def targets(self, drawn: Sequence[Drawn]) -> list[Target | None]:
        """The teacher's word, scored before or asked now."""
        if self._scored:
            return [self._scored[d.number] for d in drawn]
        config = self._config
        return list(
            targets.score(
                self._model,
                self._model.upper if self._teacher is None else self._teacher,
                [d.teacher for d in drawn],
                tokens=config.row_tokens,
                kept=config.top_k,
                keep=config.rollouts != "on-policy",
            )
        )

    def _on_policy(self, lessons: Sequence[Lesson], step: int) -> tuple[list[Lesson], list[bool]]:
        config = self._config
        answers = self._model.sample(
            [lesson.student for lesson in lessons],
            temperature=config.temperature,
            cap=config.cap,
            end=self._end,
            seed=config.seed * 1_000_003 + step,
        )
        own = [
            replace(
                lesson,
                student=replace(lesson.student, answer=answer),
                teacher=replace(lesson.teacher, answer=answer),
            )
            for lesson, answer in zip(lessons, answers, strict=True)
        ]
        counts = [
            len(a) > config.skip and (a[-1] == self._end or not config.mask_truncated)
            for a in answers
        ]
        return own, counts

    def loss(
        self, drawn: Drawn, target: Target | None, ours: torch.Tensor, fraction: float
    ) -> Part:
        """See :class:`Objective`."""
        config = self._config
        assert target is not None  # noqa: S101  # this teacher always has a word
        if not drawn.counts:
            return Part(0 * ours.sum())
        answer = drawn.example.answer
        walked, replaced, cut = len(answer), 0.0, False
        if config.rollouts == "guided":
            with torch.no_grad():
                walk = guided_walk(ours, target, answer, config.guidance)
            walked, replaced, cut = walk.walked, walk.replaced, walk.cut
        teacher, student = target.whole, target.see(ours)
        if config.sharpness != 1:
            teacher = torch.log_softmax(config.sharpness * teacher, dim=-1)
        if config.proximal < 1:
            share = config.proximal + (1 - config.proximal) * fraction
            teacher = targets.proximal(student.detach(), teacher, share)
        tokens = targets.divergence(config.divergence, teacher, student, config.js_beta)
        loss = tokens[min(config.skip, walked - 1) : walked].mean()
        if self._base:
            loss = loss + config.base_weight * self._base[drawn.number].kl(ours).mean()
        first, last = config.hint
        if hint := first + (last - first) * fraction:
            loss = (1 - hint) * loss + hint * cross_entropy(ours, answer, config.skip)
        return Part(loss, replaced, cut)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move an averaged teacher a little to the student, in fp32."""
        theirs = self.state()
        for name, value in self._model.upper.named_parameters():
            if name in theirs and value.requires_grad:
                theirs[name].lerp_(value.detach(), self._config.ema_rate)

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged teacher's weights, where there is one."""
        if self._config.teacher != "ema" or self._teacher is None:
            return {}
        return dict(self._teacher.named_parameters())
