"""Accuracy of a model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import spot_vit
import torch
from sklearn.metrics import average_precision_score
from spot_vit.evaluation.accuracy import evaluate, evaluate_all
from spot_vit.utils.modes import eval_mode
from support.models import build, images
from support.ranks import together
from support.training import make_loader, make_model
from torch import Tensor, nn


class Sharded(list[Any]):
    """Batches of (images, target, positions), of which each process has its own."""

    sharded = True


class Positions(list[Any]):
    """Batches of (images, target, positions), all of them here."""

    sharded = False


def drawn(count: int = 43, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [count, 4] and labels that a linear model finds about half of the time."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=draw)
    return inputs, torch.randint(classes, (count,), generator=draw)


def linear(classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, classes)


def batches(inputs: Tensor, target: Tensor, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), target.split(size), strict=True))


def test_evaluate_counts_in_order_and_restores_every_mode() -> None:
    model, loader = make_model(), make_loader(50)
    model.train()
    model[1].eval()
    result = evaluate(model, loader)
    assert [module.training for module in model] == [True, False, True, True]
    inputs, target = loader.dataset.tensors  # type: ignore[attr-defined]
    with eval_mode(model), torch.no_grad():
        logits = model(inputs)
    assert torch.equal(result.correct, logits.argmax(1) == target)
    assert result.top1 == pytest.approx(result.correct.float().mean().item())
    loss = nn.functional.cross_entropy(logits, target).item()
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_what_is_said_of_every_image() -> None:
    (inputs, target), model = drawn(), linear()
    result = evaluate(model, batches(inputs, target))
    logits = model(inputs).detach()
    order = logits.argsort(dim=1, descending=True)
    assert torch.equal(result.best, order[:, :5])
    hits = order == target[:, None]
    assert 0 < result.top1 < result.top5 < 1
    assert torch.equal(result.correct5, hits[:, :5].any(dim=1))
    assert result.top5 == hits[:, :5].any(dim=1).double().mean()
    assert torch.allclose(result.probability, logits.softmax(1).amax(1))
    assert torch.allclose(
        result.losses, nn.functional.cross_entropy(logits, target, reduction="none")
    )
    assert torch.equal(result.index, torch.arange(43)) and torch.equal(result.labels, target)
    for c, (count, share) in enumerate(result.per_class()):
        assert count == int((target == c).sum())
        assert share == pytest.approx(hits[target == c, 0].double().mean().item())
    assert result.num_classes == 7 and result.not_finite == 0 and result.mean_ap is None


def test_a_class_without_images_has_no_share_and_equal_logits_the_lowest_class_first() -> None:
    model = linear()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    inputs, _ = drawn()
    result = evaluate(model, batches(inputs, torch.full((43,), 3)))
    assert result.best.tolist() == [[0, 1, 2, 3, 4]] * 43 and result.top1 == 0 and result.top5 == 1
    counted = result.per_class()
    assert counted[3] == (43, 0.0) and counted[0][0] == 0 and math.isnan(counted[0][1])


def test_images_whose_logits_are_not_finite_are_counted_and_never_right() -> None:
    inputs, _ = drawn()
    inputs[[2, 30]] = float("nan")
    result = evaluate(linear(), batches(inputs, torch.zeros(43, dtype=torch.int64)))
    assert result.not_finite == 2 and not result.correct[[2, 30]].any()
    assert not result.correct5[[2, 30]].any() and math.isnan(result.loss)


@pytest.mark.parametrize("wrong", [7, -1])
def test_labels_the_model_does_not_know_are_named(wrong: int) -> None:
    inputs, target = drawn()
    target[5] = wrong
    with pytest.raises(
        ValueError, match=rf"labels from .*{wrong}.* of 7 classes, which are 0 to 6"
    ):
        evaluate(linear(), batches(inputs, target))


def test_targets_of_another_kind_are_refused() -> None:
    inputs, target = drawn()
    with pytest.raises(ValueError, match=r"labels must be int64 \[B\].*float32 \[8\]"):
        evaluate(linear(), batches(inputs, target.float()))
    with pytest.raises(ValueError, match="name 3 classes, the model has logits of 7"):
        evaluate(linear(), batches(inputs, torch.ones(43, 3)))
    with pytest.raises(ValueError, match=r"logits \[B, C\], got \[8, 4\]$|logits \[B, C\]"):
        evaluate(nn.Flatten(0), batches(inputs, target))
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate(linear(), [])
    with pytest.raises(ValueError, match="no labels"):
        evaluate(linear(), [inputs])


def test_several_labels_give_average_precision() -> None:
    inputs, _ = drawn()
    truth = torch.rand(43, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    truth[:, 6] = False
    model = linear()
    result = evaluate(model, batches(inputs, truth.float()))
    logits = model(inputs).detach()
    expected = average_precision_score(truth[:, :6].numpy(), logits[:, :6].numpy(), average=None)
    assert result.average_precision is not None and result.mean_ap is not None
    assert torch.allclose(result.average_precision[:6], torch.from_numpy(expected))
    assert result.average_precision[6].isnan()
    assert result.mean_ap == pytest.approx(expected.mean())
    first = truth.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(result.correct, first)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, truth.float())
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    counts = [count for count, _ in result.per_class()]
    assert counts == truth.sum(dim=0).tolist()


def test_batches_of_dictionaries_and_models_that_give_an_object() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = linear()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.inside(x))

    inputs, target = drawn()
    as_dict = [{"pixel_values": x, "labels": y} for x, y in batches(inputs, target)]
    found, expected = evaluate(Wrapped(), as_dict), evaluate(linear(), batches(inputs, target))
    assert torch.equal(found.best, expected.best) and found.loss == expected.loss


def test_padding_and_repetition_count_once_and_order_is_that_of_the_data() -> None:
    inputs, target = drawn()
    expected = evaluate(linear(), batches(inputs, target))
    order = torch.cat(
        [torch.randperm(43, generator=torch.Generator().manual_seed(2)), torch.arange(5)]
    )
    position = order.clone()
    position[[7, 40]] = -1  # padding repeats a picture
    order = torch.cat([order, position.new_tensor([int(order[7]), int(order[40])])])
    position = torch.cat([position, order[-2:]])
    parts = Positions(
        (inputs[i], target[i], p) for i, p in zip(order.split(8), position.split(8), strict=True)
    )
    found = evaluate(linear(), parts)
    assert torch.equal(found.index, torch.arange(43))
    for name in ("correct", "correct5", "losses", "labels", "best", "probability"):
        assert torch.allclose(getattr(found, name), getattr(expected, name)), name
    assert found.top1 == expected.top1 and found.loss == pytest.approx(expected.loss)


def test_a_third_entry_of_other_loaders_is_not_read_as_positions() -> None:
    inputs, target = drawn()
    patients = torch.arange(43) // 4
    parts = [(*b, p) for b, p in zip(batches(inputs, target), patients.split(8), strict=True)]
    assert len(evaluate(linear(), parts).correct) == 43


def in_two_processes(rank: int) -> dict[str, Any]:
    inputs, target = drawn()
    mine = torch.arange(43)[rank::2]
    position = mine
    if rank:  # 22 and 21 images: the last one is padding
        mine, position = torch.cat([mine, mine[:1]]), torch.cat([mine, mine.new_tensor([-1])])
    parts = Sharded(
        (inputs[i], target[i], p) for i, p in zip(mine.split(8), position.split(8), strict=True)
    )
    found = evaluate(linear(), parts, progress=False)
    alone = evaluate(linear(), Positions(parts), progress=False)
    return {"index": found.index, "best": found.best, "loss": found.loss, "alone": alone.index}


@pytest.mark.slow
def test_two_processes_count_every_image_once() -> None:
    inputs, target = drawn()
    expected = evaluate(linear(), batches(inputs, target))
    found = together(in_two_processes)
    assert torch.equal(found["index"], torch.arange(43))
    assert torch.equal(found["best"], expected.best)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert torch.equal(found["alone"], torch.arange(43)[::2])


def test_models_see_the_same_batches_in_one_pass() -> None:
    inputs, target = drawn()
    seen: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str, classes: int) -> None:
            super().__init__()
            self.name, self.inside = name, linear(classes)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.name)
            return self.inside(x)

    models = {"a": Noted("a", 7), "b": Noted("b", 9)}
    found = evaluate_all(models, iter(batches(inputs, target)), progress=False)
    assert seen == ["a", "b"] * 6
    for name, classes in (("a", 7), ("b", 9)):
        expected = evaluate(linear(classes), batches(inputs, target))
        assert torch.equal(found[name].best, expected.best)
        assert found[name].num_classes == classes


def test_share_of_patches_that_is_kept() -> None:
    model = spot_vit.sparsify(build(), keep=0.6, at=[1, 3])
    loader = [(images(model), torch.tensor([0, 1, 2]))]
    found = evaluate(model, loader, kept=True)
    assert found.kept is not None and found.kept.tolist() == pytest.approx([5 / 16] * 3)
    assert evaluate(model, loader).kept is None
    assert evaluate(build(), loader, kept=True).kept is None


def test_autocast_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    inputs, target = drawn()
    dtypes = []
    model = linear()
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    result = evaluate(model, batches(inputs, target), amp_dtype=torch.bfloat16, progress=False)
    assert set(dtypes) == {torch.bfloat16} and result.losses.dtype == torch.float32
    assert capsys.readouterr().err == ""


def test_training_goes_on_with_what_modules_cached() -> None:
    class Caching(nn.Module):
        """Keeps a table from its first call, as rotary embeddings do."""

        def __init__(self) -> None:
            super().__init__()
            self.inside, self.table = linear(), None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(4) * 2
            return self.inside(x * self.table)

    inputs, target = drawn()
    model = Caching()
    evaluate(model, batches(inputs, target))
    model(inputs.requires_grad_()).sum().backward()
