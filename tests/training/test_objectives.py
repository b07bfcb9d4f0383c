"""Objectives: their ratios, their teachers, and what they leave out."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import spot_vit
import torch
from spot_vit.training.losses import LossWeights, sigmoid_distillation
from spot_vit.training.objectives import SpotObjective, dense_objective
from spot_vit.training.sparsifiner import SparsifinerObjective
from support.models import build, build_lvvit, images
from torch import Tensor, nn
from torch.nn import functional as F

LABELS = torch.tensor([0, 4, 2])


def spot(keep: Any = 0.5, at: tuple[int, ...] = (1, 2, 3), **fields: Any) -> Any:
    return spot_vit.sparsify(build(), keep=keep, at=list(at), **fields).train()


def same_draw(objective: Any, model: Any, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    return objective(model, *batch)


# ---- teachers ------------------------------------------------------------------------------------


def test_a_teacher_is_frozen_and_gets_no_gradient() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(1, 6), nn.Linear(6, 3)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.embed(x)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.head(x[:, 0])

    class Student(Dense):
        def forward(self, x: Tensor, aux: bool) -> object:
            tokens = self.forward_features(x)
            mask = torch.ones(len(x), 4)

            class Output:
                logits, masks, index, logp = self.forward_head(tokens), [mask], (), ()

            Output.tokens = tokens  # type: ignore[attr-defined]
            return Output

    teacher, student = Dense(), Student()
    teacher.train()
    student.load_state_dict(teacher.state_dict())
    objective = SpotObjective([0.5], teacher)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    loss, parts = objective(student, torch.randn(2, 5, 1), torch.tensor([0, 2]))
    loss.backward()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    # The student still equals its teacher: nothing to distil.
    assert parts["kl"].item() == pytest.approx(0, abs=1e-6) and parts["mse"].item() == 0
    assert parts["ratio"].item() == pytest.approx(0.25)


def test_a_teacher_that_is_the_student_is_refused_before_anything_changes() -> None:
    model, x = spot(), images(build())
    wrapped = nn.DataParallel(model)
    sharing = build()
    sharing.patch_embed = model.patch_embed
    sharing.train()
    for teacher, words in (
        (model, r"is the student itself \(cls_token, …\).*copy.deepcopy"),
        (wrapped, "is the student itself"),
        (sharing, r"shares parameters with it \(patch_embed\.proj\.weight"),
    ):
        for make in (partial(SpotObjective, None), SparsifinerObjective):
            objective = make(teacher)
            with pytest.raises(ValueError, match=words):
                objective(wrapped, x, LABELS)
        for module in (model, teacher):
            assert module.training and all(p.requires_grad for p in module.parameters())


def test_a_teacher_of_other_classes_is_named() -> None:
    with pytest.raises(ValueError, match="teacher: it has 9 classes, the student 7"):
        SpotObjective(teacher=build(num_classes=9))(spot(), images(build()), LABELS)


# ---- ratios --------------------------------------------------------------------------------------


def test_the_models_own_ratios_are_the_default() -> None:
    model, x = spot(keep=0.5), images(build())
    loss, parts = same_draw(SpotObjective(), model, x, LABELS)
    for given in (0.5, np.float32(0.5), [0.5, 0.25, 0.125], np.array([0.5, 0.25, 0.125])):
        again, same = same_draw(SpotObjective(given), model, x, LABELS)
        assert torch.equal(loss, again) and parts == same
    assert "ratio" in parts
    loss, parts = same_draw(SpotObjective([]), model, x, LABELS)
    assert "ratio" not in parts and torch.equal(loss, parts["ce"])
    spot_vit.set_keep(model, 0.7)  # the default follows
    assert SpotObjective()(model, x, LABELS)[1]["ratio"] >= 0
    # A list that the model itself has is as good as any other.
    level = spot(keep=(0.7, 0.7, 0.7))
    assert SpotObjective([0.7, 0.7, 0.7])(level, x, LABELS)[1]["ratio"] >= 0


@pytest.mark.parametrize(
    "fields", [{"train_decision": "topk"}, {"method": "evit"}, {"method": "random"}]
)
def test_where_training_meets_the_budget_there_is_no_ratio_term(fields: dict[str, Any]) -> None:
    model, x = spot(**fields), images(build())
    assert "ratio" not in SpotObjective()(model, x, LABELS)[1]
    asked = SpotObjective(model.spot_config.keep_ratios())(model, x, LABELS)[1]
    assert asked["ratio"] < 0.01 if fields.get("method") != "evit" else asked["ratio"] < 0.05


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([0.7, 0.7, 0.7], r"keep_ratios: \[0.7, 0.7, 0.7\] are not those .*\[0.5, 0.25, 0.125\]"),
        (0.7, r"keep_ratios: \[0.7, 0.49, 0.343\] are not those"),
        ([0.5, 0.25], "keep_ratios: expected 3 values, one a stage, got 2"),
        ([0.5], "expected 3 values, one a stage, got 1"),
    ],
)
def test_ratios_that_inference_does_not_use_are_refused(given: Any, words: str) -> None:
    for objective in (SpotObjective(given), SparsifinerObjective(build(), given)):
        with pytest.raises(ValueError, match=words):
            objective(spot(keep=0.5), images(build()), LABELS)


@pytest.mark.parametrize(
    "given", [0.0, 2, [2, 3, 4], [0.5, 0.7], "0.7", True, ["a"], [0.5, None], float("nan")]
)
def test_what_is_no_ratio_is_refused_at_once(given: Any) -> None:
    for make in (SpotObjective, partial(SparsifinerObjective, None)):
        with pytest.raises(ValueError, match="keep_ratios: expected None for the model's own"):
            make(given)


def test_a_dense_model_is_told_what_it_lacks() -> None:
    with pytest.raises(TypeError, match=r"expected a SPOT model \(see sparsify\)"):
        SpotObjective()(build().train(), images(build()), LABELS)
    with pytest.raises(TypeError, match=r"keep_ratios: 0.5 needs a SPOT model"):
        SpotObjective(0.5)(build().train(), images(build()), LABELS)


# ---- other targets -------------------------------------------------------------------------------


def test_several_labels_are_refused_or_have_a_criterion() -> None:
    model, dense, x, bce = spot(), build(), images(build()), F.binary_cross_entropy_with_logits
    target = torch.tensor([[1.0, 0, 1, 0, 0, 0, 0]]).expand(3, -1).contiguous()
    for call in (SpotObjective(), SparsifinerObjective(None), dense_objective):
        with pytest.raises(ValueError, match=r"rows sum to 1.*binary_cross_entropy"):
            call(model if call is not dense_objective else dense, x, target)
    loss, parts = dense_objective(dense, x, target, criterion=bce)
    torch.testing.assert_close(loss, bce(dense(x), target))
    for make in (SpotObjective, SparsifinerObjective):
        with pytest.raises(ValueError, match=r"distillation=spot_vit\.sigmoid_distillation"):
            make(teacher=build(), criterion=bce)
    objective = SpotObjective(
        teacher=dense, criterion=bce, distillation=sigmoid_distillation, keep_ratios=[]
    )
    loss, parts = same_draw(objective, model, x, target)
    torch.manual_seed(3)
    out = model(x, aux=True)
    view = dense(x)
    own, theirs = bce(out.logits, target), sigmoid_distillation(out.logits, view)
    assert set(parts) == {"criterion", "distillation", "mse", "noise_share"}
    torch.testing.assert_close(loss, own + 0.5 * theirs + 0.5 * parts["mse"])


def test_without_labels_the_teacher_teaches() -> None:
    model, dense, x = spot(), build(), images(build())
    loss, parts = same_draw(SpotObjective(teacher=dense), model, x, None)
    _, labelled = same_draw(SpotObjective(teacher=dense), model, x, LABELS)
    assert set(parts) == {"kl", "mse", "ratio", "noise_share"}
    assert all(torch.equal(parts[name], labelled[name]) for name in parts)
    by_hand = 0.5 * parts["kl"] + 0.5 * parts["mse"] + 2 * parts["ratio"]
    torch.testing.assert_close(loss, by_hand)
    with pytest.raises(ValueError, match="nothing to learn from"):
        SpotObjective()(model, x, None)
    with pytest.raises(ValueError, match="learns from labels"):
        dense_objective(dense, x, None)


@pytest.mark.parametrize("target", [None, LABELS])
def test_a_model_without_a_head_learns_features(target: Tensor | None) -> None:
    dense = build(num_classes=0)
    model: Any = spot_vit.sparsify(copy.deepcopy(dense), keep=0.5, at=[1, 2]).train()
    x = images(dense)
    loss, parts = same_draw(SpotObjective(teacher=dense), model, x, target)
    torch.manual_seed(3)
    features = model(x)
    assert set(parts) == {"distillation", "mse", "ratio", "noise_share"}
    torch.testing.assert_close(parts["distillation"], (features - dense(x)).square().mean())
    by_hand = 0.5 * parts["distillation"] + 0.5 * parts["mse"] + 2 * parts["ratio"]
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert model.blocks[1].relevance.fc1.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"nothing to learn from.*without a head"):
        SpotObjective()(model, x, target)
    metric = SpotObjective(
        criterion=lambda f, y: ((f - y[:, None]) ** 2).mean(), weights=LossWeights(kl=0)
    )
    if target is not None:  # a criterion knows what to make of features
        assert metric(model, x, target)[1]["criterion"] > 0


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", ["topk", "gumbel"])
def test_the_share_of_noise_is_that_of_its_definition(decision: str) -> None:
    model, x = spot(keep=0.6, train_decision=decision), images(build())
    _, parts = same_draw(SpotObjective(), model, x, LABELS)
    torch.manual_seed(3)
    out = model(x, aux=True)
    alive = [torch.ones_like(out.masks[0]), *out.masks[:-1]]
    shares = []
    for logp, mask, before in zip(out.logp, out.masks, alive, strict=True):
        odd = count = 0
        for i in range(len(x)):
            odds = [p[0] - p[1] if there else -1e9 for p, there in
                    zip(logp[i].tolist(), before[i].tolist(), strict=True)]  # fmt: skip
            kept = {n for n, m in enumerate(mask[i].tolist()) if m}
            best = sorted(range(len(odds)), key=lambda n: -odds[n])[: len(kept)]
            odd, count = odd + len(kept - set(best)), count + len(kept)
        shares.append(odd / count)
    assert parts["noise_share"].item() == pytest.approx(sum(shares) / 3, rel=1e-6)
    assert 0 < parts["noise_share"] < 1


def test_without_noise_training_keeps_what_inference_keeps() -> None:
    model, x = spot(keep=0.6, train_decision="topk", noise=0.0), images(build())
    assert SpotObjective()(model, x, LABELS)[1]["noise_share"] == 0
    masks = model(x, aux=True).masks
    assert all(map(torch.equal, masks, model.eval()(x, aux=True).masks))
    for method in ("evit", "random"):
        assert "noise_share" not in SpotObjective()(spot(method=method), x, LABELS)[1]


# ---- LV-ViT --------------------------------------------------------------------------------------


def official(student: Any, teacher: Any, out: Any, view: Tensor, mse: bool) -> dict[str, Tensor]:
    """The terms of DynamicViT's and Sparsifiner's code for LV-ViT, tokens selected one by one."""
    cls_s, cls_t = student.head(out.tokens[:, 0]), teacher.head(view[:, 0])
    aux_s, aux_t = student.aux_head(out.tokens[:, 1:]), teacher.aux_head(view[:, 1:])
    kept = out.masks[-1].reshape(-1) > 0.5
    aux_s, aux_t = (aux.reshape(len(kept), -1)[kept] for aux in (aux_s, aux_t))
    kl = partial(F.kl_div, reduction="batchmean", log_target=True)
    tokens = ((aux_s - aux_t) ** 2).mean()
    if not mse:
        tokens = kl(F.log_softmax(aux_s, dim=-1), F.log_softmax(aux_t, dim=-1))
    return {
        "ce": F.cross_entropy(cls_s, LABELS),
        "kl": kl(F.log_softmax(cls_s, dim=-1), F.log_softmax(cls_t, dim=-1)),
        "mse" if mse else "token_kl": tokens,
    }


@pytest.mark.parametrize("auxiliary", ["kl", "mse"])
@pytest.mark.parametrize("removes", [True, False])
def test_lvvits_heads_apart_are_the_published_losses(auxiliary: str, removes: bool) -> None:
    teacher, model = build_lvvit(depth=5), build_lvvit(depth=5)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    x = images(teacher)
    if removes:
        spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    model.train()
    model.patch_embed.eval()
    make = partial(SpotObjective, None) if removes else SparsifinerObjective
    torch.manual_seed(5)
    loss, parts = make(teacher, auxiliary=auxiliary)(model, x, LABELS)
    torch.manual_seed(5)
    if removes:
        out = model(x, aux=True)
    else:
        tokens = model.forward_features(x)
        out = spot_vit.SpotOutput(model(x), tokens, [torch.ones(3, 16)])
    terms = official(model, teacher, out, teacher.forward_features(x), auxiliary == "mse")
    assert set(parts) - {"ratio", "noise_share"} == set(terms)
    for name, term in terms.items():
        torch.testing.assert_close(parts[name], term.detach(), rtol=1e-10, atol=1e-12)
    weights = {"ce": 1.0}
    by_hand = sum(weights.get(name, 0.5) * term for name, term in terms.items())
    by_hand = by_hand + 2 * parts["ratio"] if removes else by_hand
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=1e-12)
    loss.backward()
    assert model.aux_head.weight.grad.abs().sum() > 0 and model.head.weight.grad.abs().sum() > 0


def test_auxiliary_logits_are_lvvits_alone() -> None:
    x = images(build())
    with pytest.raises(ValueError, match="auxiliary must be None or one of"):
        SpotObjective(auxiliary="l1")
    with pytest.raises(TypeError, match="expected a student with LV-ViT's two heads, got Spot"):
        SpotObjective(auxiliary="kl")(spot(), x, LABELS)
    model: Any = spot_vit.sparsify(build_lvvit(dtype=torch.float32), keep=0.6, at=[1]).train()
    with pytest.raises(TypeError, match="expected a teacher with LV-ViT's two heads"):
        SpotObjective(teacher=build(), auxiliary="kl")(model, x, LABELS)
