"""Self-distillation on a tiny student: mechanics, determinism, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaForCausalLM

from cloud.learners.model import Example, SplitModel
from cloud.learners.sdft import Lesson, Sdft, SdftConfig, StepReport, Target, guided_walk, keep
from protos.errors import TrainingError

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
EXAMPLES = [Example((5, 6, 7), (10 + i, 11, 12 + 2 * i), (20 + i, 21, 22, 2)) for i in range(6)] + [
    Example((8, 9), (30, 31), (40, 41, 2)),
    Example((), (50, 51, 52), (60, 2)),
]


def load(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


def test_packed_sequences_give_the_whole_models_log_probabilities(tiny_folder: Path) -> None:
    whole = load(tiny_folder)
    expected = []
    for e in EXAMPLES:
        ids = torch.tensor([[*e.prefix, *e.prompt, *e.answer[:-1]]])
        first = len(e.prefix) + len(e.prompt) - 1
        expected.append(torch.log_softmax(whole(ids).logits[0, first:], -1))
    split = SplitModel(load(tiny_folder), split=1, device=CPU)
    found = split.log_probs(split.upper, EXAMPLES)
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)


def test_kept_targets_are_near_the_full_divergence() -> None:
    torch.manual_seed(0)
    teacher = torch.log_softmax(4 * torch.randn(7, 200), -1)
    student = torch.log_softmax(torch.randn(7, 200), -1)
    full = (teacher.exp() * (teacher - student)).sum(-1)
    kept = Target.of(teacher).kl(student)
    assert (kept <= full + 1e-4).all()
    assert torch.allclose(kept, full, rtol=0.1)
    assert torch.allclose(Target.of(teacher).kl(teacher), torch.zeros(7), atol=1e-5)


def _peaked(tokens: list[int], share: float = 0.9) -> torch.Tensor:
    p = torch.full((len(tokens), 50), (1 - share) / 49)
    p[torch.arange(len(tokens)), torch.tensor(tokens)] = share
    return p.log()


def test_a_token_the_teacher_would_not_write_is_replaced_by_its_own() -> None:
    walk = guided_walk(_peaked([1, 9, 3]), Target.of(_peaked([1, 2, 3])), [[1, 2, 3]], 0.1)
    assert walk.replaced == pytest.approx(1 / 3)
    assert walk.cut == 0
    assert torch.allclose(walk.weights, torch.full((3,), 1 / 3))


def test_a_rollout_is_cut_where_it_leaves_its_draft() -> None:
    teacher = torch.full((3, 50), 1e-4)
    teacher[torch.arange(3), torch.tensor([1, 2, 3])] = 0.6
    teacher[1, 9] = 0.3  # plausible to the teacher, though not what was demonstrated
    walk = guided_walk(_peaked([1, 9, 3]), Target.of(teacher.log()), [[1, 2, 3]], 0.1)
    assert walk.cut == 1
    assert walk.weights.tolist() == [0.5, 0.5, 0.0]


def lessons() -> list[Lesson]:
    out = []
    for e in EXAMPLES[:6]:
        shown = (*e.prompt, *e.answer, *e.prompt)
        out.append(Lesson(e, Example(e.prefix, shown, e.answer)))
    return out


def train(folder: Path, config: SdftConfig) -> tuple[dict[str, torch.Tensor], list[StepReport]]:
    model = SplitModel(load(folder), split=1, device=CPU)
    anchors = EXAMPLES[6:]
    pairs = list(zip(anchors, keep(model, model.copy_upper(), anchors), strict=True))
    seen: list[StepReport] = []
    learner = Sdft(
        model,
        lessons(),
        teacher=model.copy_upper(),
        replay=EXAMPLES[4:6],
        anchors=pairs,
        config=config,
    )
    return learner.learn(seen.append), seen


def test_training_pulls_the_student_to_its_teacher_and_reports_each_step(
    tiny_folder: Path,
) -> None:
    config = SdftConfig(steps=30, batch=4, learning_rate=3e-3, replay_batch=0)
    _, seen = train(tiny_folder, config)
    assert [s.step for s in seen] == list(range(1, 31))
    assert seen[-1].loss < 0.7 * seen[0].loss


def test_the_anchor_holds_the_student_to_the_base(tiny_folder: Path) -> None:
    def last_anchor(weight: float) -> float:
        config = SdftConfig(steps=25, learning_rate=3e-3, anchor_weight=weight, replay_batch=0)
        return train(tiny_folder, config)[1][-1].anchor

    assert last_anchor(20.0) < 0.5 * last_anchor(0.0)


def test_only_upper_layers_are_learnt(tiny_folder: Path) -> None:
    learnt, _ = train(tiny_folder, SdftConfig(steps=1))
    assert learnt
    assert all(n.startswith(("model.layers.1.", "model.norm")) for n in learnt)


def test_the_same_seed_gives_the_same_weights(tiny_folder: Path) -> None:
    one, _ = train(tiny_folder, SdftConfig(steps=5, batch=2, seed=3))
    two, _ = train(tiny_folder, SdftConfig(steps=5, batch=2, seed=3))
    other, _ = train(tiny_folder, SdftConfig(steps=5, batch=2, seed=4))
    assert all(torch.allclose(one[n], two[n], atol=1e-6) for n in one)
    assert any(not torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def test_a_diverging_loss_stops_the_job_with_what_to_do(tiny_folder: Path) -> None:
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(tiny_folder, SdftConfig(steps=40, learning_rate=1e30, warmup=1, clip=1e9))


def test_nothing_to_learn_is_an_error(tiny_folder: Path) -> None:
    model = SplitModel(load(tiny_folder), split=1, device=CPU)
    with pytest.raises(TrainingError, match="no demonstration"):
        Sdft(model, [], teacher=model.copy_upper(), replay=[], anchors=[], config=SdftConfig())
