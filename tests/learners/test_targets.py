"""Packed rows, kept distributions, divergences and guided walks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloud.learners.config import LearnerConfig
from cloud.learners.packing import Example
from cloud.learners.rollouts import guided_walk
from cloud.learners.targets import Target, divergence, join, proximal, score

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM

    from cloud.learners.config import Divergence
    from tests.learners.learner_course import EXAMPLES, load, long, split
else:
    from learner_course import EXAMPLES, load, long, split


def whole_log_probs(whole: LlamaForCausalLM, e: Example) -> torch.Tensor:
    ids = torch.tensor([[*e.prefix, *e.prompt, *e.answer[:-1]]])
    first = len(e.prefix) + len(e.prompt) - 1
    return torch.log_softmax(whole(ids).logits[0, first:], -1)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("layers", [(0.5, 1.0), (0.0, 1.0)])
def test_packed_sequences_give_the_whole_models_log_probabilities(
    layers: tuple[float, float], keep: bool, tiny_folder: Path
) -> None:
    whole = load(tiny_folder)
    expected = [whole_log_probs(whole, e) for e in EXAMPLES]
    model = split(tiny_folder, LearnerConfig(layers=layers, embeddings=layers[0] == 0))
    found = model.log_probs(model.upper, EXAMPLES, keep=keep)
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)


_TOKENS = st.lists(st.integers(3, 199), min_size=1, max_size=12).map(tuple)
_PREFIXES = st.sampled_from([(), (5, 6, 7), (8,)])
_SEQUENCES = st.lists(st.builds(Example, _PREFIXES, _TOKENS, _TOKENS), min_size=1, max_size=6)
_LONG = [long(150), long(200)]
_APART = [Example(prefix, (9,), (10, 11)) for prefix in ((5, 6, 7), (8,), (), (5, 6, 7))]


@pytest.mark.parametrize("layers", [(0.5, 1.0), (0.0, 1.0)])
@given(_SEQUENCES)
@example(_APART)
@example(_LONG)
@settings(max_examples=25, deadline=None)
def test_a_packed_row_says_and_learns_what_the_whole_model_would(
    layers: tuple[float, float], tiny_folder: Path, sequences: list[Example]
) -> None:
    whole = load(tiny_folder)
    expected = [whole_log_probs(whole, e) for e in sequences]
    model = split(tiny_folder, LearnerConfig(layers=layers, embeddings=layers[0] == 0))
    parameters = model.trainable()
    for p in parameters.values():
        p.requires_grad_()
    found = model.log_probs(model.upper, sequences)
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)

    answers = torch.tensor([t for e in sequences for t in e.answer])[:, None]
    for log_probs in (found, torch.cat(expected)):
        torch.autograd.backward(-log_probs.gather(1, answers).sum())
    theirs = dict(whole.named_parameters())
    for name, p in zip(model.learnt(), parameters.values(), strict=True):
        other = theirs[name].grad
        assert p.grad is not None
        assert other is not None
        assert torch.allclose(p.grad, other, atol=1e-4, rtol=1e-3), name


def test_scores_do_not_depend_on_how_many_share_a_row(tiny_folder: Path) -> None:
    model = split(tiny_folder, LearnerConfig())
    wide, narrow = (
        join(list(score(model, model.upper, EXAMPLES, tokens=tokens))) for tokens in (999, 9)
    )
    assert torch.allclose(wide.log_probs, narrow.log_probs, atol=1e-4)


def pair(tokens: int = 7, words: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    teacher = torch.log_softmax(4 * torch.randn(tokens, words), -1)
    return teacher, torch.log_softmax(torch.randn(tokens, words), -1)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_bucket_for_the_rest_never_makes_a_divergence_larger(kind: Divergence) -> None:
    teacher, student = pair()
    full = divergence(kind, teacher, student)
    target = Target.of(teacher)
    kept = divergence(kind, target.whole, target.see(student))
    assert (kept <= full + 1e-4).all()
    assert (kept > 0.5 * full).all()
    nothing = divergence(kind, target.whole, target.see(teacher))
    assert torch.allclose(nothing, torch.zeros(7), atol=1e-4)


def test_divergences_are_those_of_torch() -> None:
    teacher, student = pair()
    forward = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none")
    assert torch.allclose(divergence("forward", teacher, student), forward.sum(-1), atol=1e-4)
    reverse = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="none")
    assert torch.allclose(divergence("reverse", teacher, student), reverse.sum(-1), atol=1e-4)
    mixture = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    js = 0.3 * divergence("forward", teacher, mixture) + 0.7 * divergence(
        "forward", student, mixture
    )
    assert torch.allclose(divergence("js", teacher, student, 0.3), js, atol=1e-4)


def test_the_proximal_target_has_just_the_share_of_the_teachers_information() -> None:
    teacher, student = pair()
    whole = divergence("forward", teacher, student)
    for share in (0.0, 0.25, 0.8):
        target = proximal(student, teacher, share)
        assert torch.allclose(target.exp().sum(-1), torch.ones(7))
        informed = (target.exp() * (teacher - student)).sum(-1)
        assert torch.allclose(informed, share * whole, atol=1e-3)
        assert (divergence("forward", target, student) < whole).all()
    assert torch.allclose(proximal(student, teacher, 1.0), teacher, atol=1e-3)
    assert torch.allclose(proximal(teacher, teacher, 0.25), teacher, atol=1e-5)


def test_no_distribution_with_as_much_information_is_nearer_to_the_student() -> None:
    teacher, student = pair()
    target = proximal(student, teacher, 0.5)
    informed = (target.exp() * (teacher - student)).sum(-1)
    generator = torch.Generator().manual_seed(1)
    nearest = divergence("forward", target, student)
    for size in (0.01, 0.1, 1.0):
        noise = size * torch.randn(target.shape, generator=generator)
        for tilt in (0.0, 0.01, 0.1):
            other = torch.log_softmax(target + noise + tilt * (teacher - student), -1)
            enough = (other.exp() * (teacher - student)).sum(-1) >= informed
            assert enough.any() or not tilt
            assert (divergence("forward", other, student) > nearest)[enough].all()


def _peaked(tokens: list[int], share: float = 0.9) -> torch.Tensor:
    p = torch.full((len(tokens), 50), (1 - share) / 49)
    p[torch.arange(len(tokens)), torch.tensor(tokens)] = share
    return p.log()


@pytest.mark.parametrize("kept", [0, 32])
def test_a_token_the_teacher_would_not_write_is_replaced_by_its_own(kept: int) -> None:
    teacher = Target.of(_peaked([1, 2, 3]), kept)
    walk = guided_walk(_peaked([1, 9, 3]), teacher, [1, 2, 3], 0.1)
    assert walk.replaced == pytest.approx(1 / 3)
    assert (walk.walked, walk.cut) == (3, False)


@pytest.mark.parametrize("kept", [0, 32])
def test_a_rollout_is_cut_where_it_leaves_its_draft(kept: int) -> None:
    teacher = torch.full((3, 50), 1e-4)
    teacher[torch.arange(3), torch.tensor([1, 2, 3])] = 0.6
    teacher[1, 9] = 0.3  # plausible to the teacher, though not what was demonstrated
    walk = guided_walk(_peaked([1, 9, 3]), Target.of(teacher.log(), kept), [1, 2, 3], 0.1)
    assert (walk.walked, walk.cut) == (2, True)
