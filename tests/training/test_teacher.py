"""Teachers: what may be one, what it is asked for, and that it is never the student."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.training.losses import LossWeights, Teacher, softmax_distillation, spot_loss
from spot_vit.training.objectives import SpotObjective
from spot_vit.training.sparsifiner import SparsifinerObjective
from spot_vit.training.teacher import FrozenTeacher
from support.models import build, images
from torch import Tensor, nn

LABELS = torch.tensor([0, 4, 2])


class Holder(nn.Module):
    """Gives logits in an object or a mapping, as other libraries' models do."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(3 * 64 * 64, 7)

    def forward(self, pixel_values: Tensor) -> Any:
        return self.kind(logits=self.head(pixel_values.flatten(1)), hidden_states=None)


def distilled() -> Any:
    model: Any = build("distilled")
    model.set_distilled_training(True)
    return model.train()


def torchvision() -> Any:
    return pytest.importorskip("torchvision").models.mobilenet_v3_small(num_classes=7)


def transformers() -> Any:
    library = pytest.importorskip("transformers")
    return library.ViTForImageClassification(
        library.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            image_size=64,
            num_labels=7,
        )
    )


LOGITS_ALONE: dict[str, Any] = {
    "CNN": lambda: timm.create_model("test_resnet", num_classes=7),
    "distilled": distilled,
    "finer grid": lambda: build(patch_size=8),
    "coarser grid": lambda: build(patch_size=32),
    "wider": lambda: build(embed_dim=96),
    "any module": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 7)),
    "object": lambda: Holder(SimpleNamespace),
    "mapping": lambda: Holder(dict),
    "torchvision": torchvision,
    "transformers": transformers,
}


def student(**config: Any) -> Any:
    given = {"keep": 0.5, "at": [1, 2], **config}
    return spot_vit.sparsify(build(), **given).train()


def logits_of(teacher: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = copy.deepcopy(teacher).eval()(x)
    if isinstance(found, Tensor):
        return found
    return found["logits"] if isinstance(found, dict) else found.logits


@pytest.mark.parametrize("name", LOGITS_ALONE)
def test_a_teacher_that_gives_logits_alone_teaches_by_them(name: str) -> None:
    torch.manual_seed(0)
    teacher, model = LOGITS_ALONE[name](), student()
    x = images(model)
    expected = logits_of(teacher, x)
    objective = SpotObjective(teacher=teacher, weights=LossWeights(mse=0))
    torch.manual_seed(1)
    loss, parts = objective(model, x, LABELS)
    torch.manual_seed(1)
    out = model(x, aux=True)
    assert set(parts) == {"ce", "kl", "ratio", "noise_share"}
    torch.testing.assert_close(parts["kl"], softmax_distillation(out.logits, expected).detach())
    assert parts["kl"] > 0
    torch.testing.assert_close(loss, parts["ce"] + 0.5 * parts["kl"] + 2 * parts["ratio"])
    loss.backward()
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", LOGITS_ALONE)
@pytest.mark.parametrize("method", ["spot", "evit"])
def test_where_tokens_count_a_teacher_without_them_is_refused(method: str, name: str) -> None:
    model = student(method=method)
    if (method, name) == ("evit", "distilled"):
        return  # nothing tells its second prefix token from a fused one; patches are those of ours
    for make in (partial(SpotObjective, None), SparsifinerObjective):
        with pytest.raises(ValueError, match=r"teacher.*LossWeights\(mse=0\) \(--token-weight 0\)"):
            make(LOGITS_ALONE[name]())(model, images(model), LABELS)


def test_a_teacher_with_tokens_says_the_same_with_and_without() -> None:
    model, x, terms = student(train_decision="topk", noise=0.0), images(build()), []
    for mse in (0.5, 0.0):
        _, parts = SpotObjective(teacher=build(), weights=LossWeights(mse=mse))(model, x, LABELS)
        terms.append(parts)
    assert terms[0].keys() - terms[1].keys() == {"mse"}
    for name, value in terms[1].items():
        torch.testing.assert_close(value, terms[0][name])


def test_evits_survivors_are_compared_with_their_own_places() -> None:
    model, teacher = student(method="evit"), build()
    x = images(model)
    _, parts = SpotObjective(teacher=teacher)(model, x, LABELS)
    out, goal = model(x, aux=True), teacher.forward_features(x)[:, 1:]
    errors = [
        (out.tokens[i, -len(row) + n] - goal[i, place]).square().mean().item()
        for i, row in enumerate(out.index[-1].tolist())
        for n, place in enumerate(row)
        if place < 16
    ]
    assert parts["mse"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_logits_that_nobody_finds_are_named() -> None:
    for kind in (lambda **found: (found["logits"],), lambda **found: {"scores": 1}):
        objective = SpotObjective(teacher=Holder(kind), weights=LossWeights(mse=0))
        with pytest.raises(TypeError, match=r"expected logits \[B, classes\] from Holder"):
            objective(student(), images(build()), LABELS)


def test_a_loss_without_the_teachers_tokens_needs_their_weight_to_be_zero() -> None:
    model = student()
    out, view = model(images(model), aux=True), Teacher(torch.randn(3, 7), None)
    _, parts = spot_loss(out, LABELS, [], view, LossWeights(mse=0))
    assert set(parts) == {"ce", "kl"}
    with pytest.raises(ValueError, match=r"got None, and the weight .* is 0.5; a teacher without"):
        spot_loss(out, LABELS, [], view)


# ---- the student ---------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def test_a_student_that_takes_the_place_of_another_in_memory_is_checked_again() -> None:
    teacher = Small(nn.Parameter(torch.randn(3)))
    frozen, places, refused = FrozenTeacher(teacher), set(), 0
    for _ in range(50):
        good = Small(nn.Parameter(torch.randn(3)))
        frozen.freeze(good)
        places.add(id(good))
        del good
        bad = Small(teacher.weight)
        with pytest.raises(ValueError, match="shares parameters with it"):
            frozen.freeze(bad)
        refused += id(bad) in places
        del bad
    assert refused  # some took the place of one that was right


def test_an_objective_with_a_teacher_is_copied_and_pickled() -> None:
    model, x = student(train_decision="topk", noise=0.0), images(build())
    objective = SpotObjective(teacher=build())
    loss, _ = objective(model, x, LABELS)
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert other.teacher.model is not objective.teacher.model
        assert torch.equal(other(model, x, LABELS)[0], loss)
