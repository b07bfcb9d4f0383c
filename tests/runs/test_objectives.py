"""What a run can learn from: labels of all kinds, teachers of all kinds, weights of other runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.cli.main import main
from spot_vit.config.recipe import Recipe
from spot_vit.runs.build import check_teacher
from spot_vit.runs.phases import FINETUNE, Phase
from spot_vit.runs.train import train
from spot_vit.utils.errors import UserError
from support.commands import SYNTHETIC
from support.runs import SMALL, records, small_recipe
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

CLASSES = 5
OWN = {"synthetic": False, "train_num_samples": None, "val_num_samples": None}


def picture(index: int) -> Tensor:
    """A picture of the class `index % CLASSES`, which the brightness of a corner tells."""
    image = 0.1 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
    image[:, :16, :16] += index % CLASSES
    return image


class Own(Dataset[Any]):
    """Pictures in the form that `make(index)` gives."""

    def __init__(self, make: Any, length: int = 48) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def single(index: int) -> Any:
    return picture(index), index % CLASSES


def named(index: int) -> Any:
    return {"pixel_values": picture(index), "labels": index % CLASSES}


def several(index: int) -> Any:
    label = index % CLASSES
    hot = torch.zeros(CLASSES)
    hot[[label, (label + 2) % CLASSES]] = 1
    return picture(index), hot


class Stream(IterableDataset[Any]):
    """The same, one after another, and nobody knows how many."""

    def __iter__(self) -> Iterator[Any]:
        return map(single, range(40))


def run(tmp_path: Path, make: Any = single, *, data: Any = None, **changes: Any) -> dict[str, Any]:
    """Figures of a run on pictures of one's own."""
    given = {"train_data": data or Own(make), "val_data": Own(make, 23)}
    for name in ("criterion", "val_data"):
        if name in changes:
            given[name] = changes.pop(name)
    recipe = small_recipe(tmp_path, **{**OWN, "epochs": 10, "lr": 3e-3, **changes})
    return train(recipe, **given)["results"]["finetune"]


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "spot"])
def test_several_labels(method: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"may have several labels.*add --bce-loss"):
        run(tmp_path, several, method=method)
    assert not (tmp_path / "run").exists()
    dense = {"dense_epochs": 2} if method == "spot" else {}
    changes: dict[str, Any] = {"method": method, "bce_loss": True, "eval_metric": "map", **dense}
    found = run(tmp_path, several, **changes)
    assert found["map"] > 0.55, "chance is 0.4"
    epochs = records(tmp_path / "run", "epoch")
    best = max(r["map"] for r in epochs if r["phase"] == "finetune")
    history = sorted((tmp_path / "run").glob("finetune-epoch*.safetensors"))
    assert len(history) == 3 and best >= found["map"]
    assert spot_vit.load(tmp_path / "run/best.safetensors").num_classes == CLASSES


def test_several_labels_mixed(tmp_path: Path) -> None:
    found = run(tmp_path, several, bce_loss=True, mixup=0.8, cutmix=1.0, epochs=1)
    assert 0 <= found["map"] <= 1
    assert all(r["loss"] > 0 for r in records(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes",
    [
        {"smoothing": 0.3},
        {"mixup": 0.8, "smoothing": 0.1},
        {"bce_loss": True},
        {"bce_loss": True, "bce_target_thresh": 0.2, "cutmix": 1.0},
        {"bce_loss": True, "bce_sum": True},
    ],
)
def test_losses_of_one_label(changes: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, epochs=1, experiment="plain", method="dense", smoothing=0.0)
    run(tmp_path, epochs=1, method="dense", **{"smoothing": 0.0, **changes})
    first = [records(tmp_path / name)[0]["loss"] for name in ("plain", "run")]
    assert first[0] > 0 and first[1] > 0 and first[0] != first[1]


def test_a_criterion_of_ones_own(tmp_path: Path) -> None:
    def squared(logits: Tensor, target: Tensor) -> Tensor:
        return (logits - torch.nn.functional.one_hot(target, CLASSES)).square().mean()

    found = run(tmp_path, criterion=squared, method="dense", epochs=20)
    assert found["top1"] > 0.6
    assert records(tmp_path / "run")[-1]["loss"] < 0.16, "the square of what no pupil knows"


def test_batches_that_are_dictionaries(tmp_path: Path) -> None:
    run(tmp_path, named)
    run(tmp_path, single, experiment="pairs")
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("run", "pairs")]
    assert losses[0] == losses[1]


def test_streams_of_unknown_length(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"steps: the data set does not say how many.*--steps N"):
        run(tmp_path, data=Stream())
    run(tmp_path, data=Stream(), steps=13)
    found = records(tmp_path / "run")
    assert len(found) == 13 and found[-1]["epoch"] == 2, "five batches in a pass"


def test_no_evaluation(tmp_path: Path) -> None:
    found = run(tmp_path, val_data=None, epochs=1)
    assert "top1" not in found and found["steps"] == 6
    assert spot_vit.load(tmp_path / "run/best.safetensors").num_classes == CLASSES


# ---- teachers ------------------------------------------------------------------------------------


def cnn(path: Path) -> str:
    """A small CNN in a file."""
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    spot_vit.save(path, model)
    return str(path)


def test_a_teacher_that_gives_logits_only(tmp_path: Path) -> None:
    teacher = cnn(tmp_path / "teacher.safetensors")
    recipe = small_recipe(tmp_path, teacher=teacher, steps=2)
    with pytest.raises(UserError, match=r"teacher .*ResNet has no tokens.*--token-weight 0"):
        train(recipe)
    assert not (tmp_path / "run").exists(), "said before the first step"
    train(recipe.replace(token_weight=0.0))
    assert all(r["kl"] > 0 for r in records(tmp_path / "run"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("grid", r"expected shape \[2, 17, 48\].*got \[2, 65, 48\]"),
        ("width", r"expected shape \[2, 17, 48\].*got \[2, 17, 24\]"),
        ("size", "Input height"),
    ],
)
def test_teachers_that_cannot_teach_this_model(what: str, said: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "grid": {"patch_size": 4}, "width": {"embed_dim": 24}, "size": {"img_size": 64},
    }  # fmt: skip
    name = "deit_tiny_patch16_224"
    student = timm.create_model(name, num_classes=CLASSES, **SMALL)
    spot_vit.sparsify(student)
    teacher = timm.create_model(name, num_classes=CLASSES, **{**SMALL, **changes[what]})
    recipe, phase = Recipe(teacher="it"), Phase(FINETUNE, 1, 1, 1e-3, 0.0, 0)
    with pytest.raises(UserError, match=f"teacher it: .*{said}"):
        check_teacher(recipe, phase, student, teacher, (3, 32, 32))
    if what != "size":
        logits_alone = recipe.replace(token_weight=0.0)
        check_teacher(logits_alone, phase, student, teacher, (3, 32, 32))


def test_a_published_teacher_is_made_for_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    before = timm.create_model

    def create(name: str, pretrained: bool = False, **given: Any) -> Any:
        if pretrained:
            made.append({"name": name, **given})
        return before(name, **given)

    monkeypatch.setattr(timm, "create_model", create)
    changes: dict[str, Any] = {"num_classes": 1000, "model_kwargs": {}, "img_size": 32}
    recipe = small_recipe(tmp_path, **OWN, **changes, teacher="deit_tiny_patch16_224", steps=1)
    train(recipe, train_data=Own(single), val_data=None)
    assert made == [{"name": "deit_tiny_patch16_224", "img_size": 32}]


def test_the_runs_own_dense_model_teaches_in_place_of_the_recipes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "x", "--config", "spot-deit-t", "--print-config"]
    for more, expected in (
        ([], "deit_tiny_patch16_224"),
        (["--dense-epochs", "2"], "null"),
        (["--dense-epochs", "2", "--teacher", "a.pt"], "a.pt"),
    ):
        assert main([*words, *more]) == 0
        found = re.search(r"^teacher: (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert found is not None and found[1] == expected


# ---- weights of other runs -----------------------------------------------------------------------


def states(tmp_path: Path, *names: str) -> list[dict[str, Tensor]]:
    return [spot_vit.load(tmp_path / name / "last.safetensors").state_dict() for name in names]


@pytest.mark.parametrize("head", ["linear", "finetune"])
def test_transfer_to_other_classes(head: str, tmp_path: Path) -> None:
    words = ["train", "x", *SYNTHETIC, "--output", str(tmp_path), "--method", "dense"]
    assert main([*words, "--experiment", "first", "--epochs", "1"]) == 0
    weights = str(tmp_path / "first/best.safetensors")
    recipe = small_recipe(
        tmp_path, **OWN, experiment="second", method="dense", initial_checkpoint=weights,
        num_classes=7, head=head, epochs=1, warmup_epochs=0,
    )  # fmt: skip
    train(recipe, train_data=Own(single), val_data=Own(single, 23))
    first, second = states(tmp_path, "first", "second")
    assert second["head.weight"].shape == (7, 48)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    if head == "linear":
        assert moved == {"head.weight", "head.bias"}
    else:
        assert moved == set(first), "everything moves"
