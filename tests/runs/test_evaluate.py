"""An evaluation as `spot eval` carries it out: models, images, budgets, what is written."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spot_vit
import timm
import torch
from PIL import Image
from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.config.recipe_files import to_yaml
from spot_vit.evaluation.report import describe
from spot_vit.evaluation.statistics import paired_difference
from spot_vit.models.saved import save
from spot_vit.runs.damaged import check_images
from spot_vit.runs.evaluate import evaluate
from spot_vit.runs.evaluated import load_evaluated
from spot_vit.runs.sides import grouped, sides_of
from spot_vit.utils.errors import UserError
from support.ranks import together
from support.runs import SMALL, folder_of_pictures, small_recipe
from torch import nn
from torch.utils.data import DataLoader

COLOURS = ["class0", "class1", "class2"]


def stirred(model: nn.Module) -> Any:
    """The model with weights so large that its answers differ."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def dense(classes: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(0)
    given = {**SMALL, "num_classes": classes, **arguments}
    return stirred(timm.create_model("deit_tiny_patch16_224", **given))


def sparse(classes: int = 3, **fields: Any) -> Any:
    return spot_vit.sparsify(dense(classes), **{"keep": 0.6, "at": [1, 2], **fields})


def saved(path: Path, model: nn.Module, classes: list[str] | None = None) -> str:
    save(path, model, classes=classes)
    return str(path)


def settings(folder: Path, checkpoint: str, data: Any, **changes: Any) -> EvaluationSettings:
    given = {
        "workers": 0, "batch_size": 4, "speed": 0.0, "device": "cpu",
        "output": str(folder / "found.json"),
    }  # fmt: skip
    return EvaluationSettings(checkpoint=checkpoint, data=str(data), **{**given, **changes})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return folder_of_pictures(tmp_path / "photos")


def test_a_sweep_on_digits_is_what_each_budget_gives_alone(tmp_path: Path) -> None:
    model = stirred(timm.create_model("digits_vit", depth=4))
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    path = saved(tmp_path / "model.safetensors", model)
    given = {"val_length": 400}  # more than the 360 digits: some are shown twice
    found = evaluate(settings(tmp_path, path, "digits", keep=(0.7, 0.4), data_args=given))
    data = spot_vit.ClutteredDigits("test", 400)
    names = [row["name"] for row in found["rows"]]
    assert names == ["keep 1", "keep 0.7", "keep 0.4"]
    alone = [
        spot_vit.evaluate(spot_vit.set_keep(model, keep), DataLoader(data, 4), progress=False)
        for keep in (1.0, 0.7, 0.4)
    ]
    sources = data.sources(range(400))
    for row, one in zip(found["rows"], alone, strict=True):
        assert row["top1"] == one.top1 and row["loss"] == pytest.approx(one.loss, rel=1e-6)
        if row is not found["rows"][0]:
            expected = paired_difference(one.correct, alone[0].correct, sources)
            assert row["difference"] == pytest.approx(list(expected))
        cost = spot_vit.count_flops(spot_vit.set_keep(model, row["keep"]), (1, 64, 64)).total / 1e9
        assert row["gmacs"] == cost
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert found["data"]["images"] == 400 and found["machine"]["threads"]
    assert "keep 0.4" in describe(found)


def test_without_a_budget_the_model_is_shown_at_its_own(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    found = evaluate(settings(tmp_path, path, photos))
    assert [row["keep"] for row in found["rows"]] == [1.0, 0.6]
    assert [row["name"] for row in found["rows"]] == ["keep 1", "keep 0.6"]
    assert found["model"] == "deit_tiny_patch16_224, SPOT"
    found = evaluate(settings(tmp_path, path, photos, no_dense=True))
    assert [row["name"] for row in found["rows"]] == ["keep 0.6"]


def test_dense_and_sparse_attention(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "dense.safetensors", dense(), COLOURS)
    found = evaluate(settings(tmp_path, path, photos))
    assert [row["name"] for row in found["rows"]] == ["deit_tiny_patch16_224"]
    both = spot_vit.sparsify_attention(sparse(), 0.5)
    path = saved(tmp_path / "both.safetensors", both, COLOURS)
    found = evaluate(settings(tmp_path, path, photos, attention_keep=(0.5, 0.25)))
    names = [row["name"] for row in found["rows"]]
    assert names == ["keep 1, attention 1", "keep 0.6, attention 0.5", "keep 0.6, attention 0.25"]
    reference = evaluate(settings(tmp_path, str(tmp_path / "dense.safetensors"), photos))
    assert found["rows"][0]["loss"] == reference["rows"][0]["loss"]


def test_speed_is_stated_of_every_budget(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    found = evaluate(settings(tmp_path, path, photos, speed=0.05, batch_size=2))
    assert found["speed"]["batch"] == 2
    assert all(row["images_per_second"] > 0 for row in found["rows"])
    assert all((row["time_ratio"] is None) == bool(found["speed"]["busy"]) for row in found["rows"])


# ---- images and labels ---------------------------------------------------------------------------


def test_predictions_name_every_picture_and_bad_ones_are_named(
    tmp_path: Path, photos: Path
) -> None:
    folder = photos / "validation" / "class1"
    (folder / "broken.png").write_bytes(b"no picture at all")
    (folder / "notes.txt").write_text("a text file")
    Image.new("CMYK", (30, 20)).save(folder / "cmyk.jpg")
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    predictions = tmp_path / "predictions.csv"
    found = evaluate(settings(tmp_path, path, photos, predictions=str(predictions), bad_share=0.2))
    pictures = sorted(p for p in (photos / "validation").rglob("*") if p.suffix in (".png", ".jpg"))
    good = [p for p in pictures if p.name != "broken.png"]
    assert found["data"]["images"] == len(good) == 13
    assert [Path(name).name for name in found["data"]["unreadable"]] == ["broken.png"]
    assert "broken.png" in describe(found) and "notes.txt" in describe(found)
    with predictions.open(newline="") as file:
        lines = list(csv.DictReader(file))
    own = [line for line in lines if line["model"] == "keep 0.6"]
    assert sorted(Path(line["file"]).name for line in own) == sorted(p.name for p in good)
    assert {line["label"] for line in own} == set(COLOURS)
    right = sum(int(line["correct"]) for line in own) / len(own)
    assert right == pytest.approx(found["rows"][1]["top1"])
    # 16 patches: 9 stay behind the first stage, 5 behind the second.
    assert {float(line["kept"]) for line in own} == {0.3125}


def test_labels_follow_the_names_of_classes(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "a.safetensors", dense(), COLOURS)
    expected = evaluate(settings(tmp_path, path, photos))["rows"][0]
    model = dense(5)  # two more classes, and another order
    order = [4, 1, 2]
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-1e4)
        model.head.weight[order], model.head.bias[order] = dense().head.weight, dense().head.bias
    names = ["x", "class1", "class2", "y", "class0"]
    found = evaluate(settings(tmp_path, saved(tmp_path / "b.safetensors", model, names), photos))
    assert found["rows"][0]["top1"] == expected["top1"]
    assert found["rows"][0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    counted = {one["class"]: one["images"] for one in found["per_class"]}
    assert counted == {"x": 0, "class1": 4, "class2": 4, "y": 0, "class0": 4}
    text = describe(found)
    assert "2 classes of the model have no image here" in text


def test_classes_that_cannot_be_told_apart_are_refused(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "a.safetensors", dense(7))
    with pytest.raises(UserError, match=r"knows 7 classes without their names.*has 3"):
        evaluate(settings(tmp_path, path, photos))
    order = tmp_path / "classes.txt"
    order.write_text("\n".join(["x", "class1", "y", "class0", "class2", "z", "u"]))
    found = evaluate(settings(tmp_path, path, photos, class_map=str(order)))
    counted = [one["images"] for one in found["per_class"]]
    assert counted == [0, 4, 0, 4, 4, 0, 0]
    order.write_text("\n".join([*"abcdefgh", *COLOURS]))
    with pytest.raises(UserError, match=r"labels from 8 to \d+ do not fit a model of 7 classes"):
        evaluate(settings(tmp_path, path, photos, class_map=str(order)))
    path = saved(tmp_path / "b.safetensors", dense(), ["cat", "dog", "bird"])
    with pytest.raises(UserError, match="class0"):
        evaluate(settings(tmp_path, path, photos))


def test_folders_of_imagenet_are_known_to_models_of_imagenet(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "imagenette", classes=2)
    for split in ("train", "validation"):
        (root / split / "class0").rename(root / split / "n02102040")
        (root / split / "class1").rename(root / split / "n01440764")
    model = dense(1000)
    with torch.no_grad():
        model.head.bias[217] = 1e4  # n02102040, and it says so of everything
    found = evaluate(settings(tmp_path, saved(tmp_path / "a.safetensors", model), root))
    assert found["rows"][0]["top1"] == 0.5
    counted = {one["class"]: one["images"] for one in found["per_class"] if one["images"]}
    assert counted == {"n02102040": 4, "n01440764": 4}


def test_a_run_knows_its_data(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = small_recipe(
        tmp_path, data=str(photos), synthetic=False, val_split="train", num_classes=None,
        train_num_samples=None, val_num_samples=None,
    )  # fmt: skip
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    saved(run / "best.safetensors", dense(), COLOURS)
    for given in (None, str(photos)):
        asked = EvaluationSettings(
            checkpoint=str(run), data=given, workers=0, speed=0.0, device="cpu",
            output=str(tmp_path / "found.json"),
        )  # fmt: skip
        assert evaluate(asked)["data"]["images"] == 36
    assert evaluate(asked.replace(split="validation"))["data"]["images"] == 12
    with pytest.raises(UserError, match="name the data to evaluate on"):
        path = saved(tmp_path / "alone.safetensors", dense(), COLOURS)
        evaluate(asked.replace(checkpoint=path, data=None))


# ---- other models, damage ------------------------------------------------------------------------


def test_a_baseline_sees_the_same_pictures_at_its_own_size(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    larger, order = dense(img_size=48), ["class2", "class0", "class1"]
    other = saved(tmp_path / "other.safetensors", larger, order)
    found = evaluate(settings(tmp_path, path, photos, baseline=other))
    alone = evaluate(settings(tmp_path, other, photos))
    names = [row["name"] for row in found["rows"]]
    assert names == ["baseline", "keep 1", "keep 0.6"]
    assert found["rows"][0]["top1"] == alone["rows"][0]["top1"]
    assert f"{other} (deit_tiny_patch16_224)" in describe(found)
    assert found["rows"][0]["gmacs"] == alone["rows"][0]["gmacs"] > found["rows"][1]["gmacs"]
    for row in found["rows"][1:]:
        assert row["difference"][0] == pytest.approx(row["top1"] - found["rows"][0]["top1"])
    assert {one["class"]: one["shares"][names[0]] for one in found["per_class"]} == {
        one["class"]: next(iter(one["shares"].values())) for one in alone["per_class"]
    }


def test_weights_alone_need_a_name(tmp_path: Path, photos: Path) -> None:
    model, average = dense(), dense()
    with torch.no_grad():
        average.head.weight.neg_()
    path = tmp_path / "timm.pth.tar"
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, path)
    with pytest.raises(UserError, match="--model NAME"):
        evaluate(settings(tmp_path, str(path), photos))
    named = {"model": "deit_tiny_patch16_224", "model_kwargs": {**SMALL, "num_classes": 3}}
    for ema, one in ((False, model), (True, average)):
        found = evaluate(settings(tmp_path, str(path), photos, use_ema=ema, **named))
        expected = evaluate(
            settings(tmp_path, saved(tmp_path / "one.safetensors", one, COLOURS), photos)
        )
        assert found["rows"][0]["loss"] == expected["rows"][0]["loss"]
    with pytest.raises(UserError, match=r"does not load into deit_tiny"):
        evaluate(settings(tmp_path, str(path), photos, model="deit_tiny_patch16_224"))


def test_a_stream_of_pictures_with_several_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "pets"
    folder.mkdir()
    draw = np.random.default_rng(0)
    content = {
        "image": [Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8)) for _ in range(20)],
        **{name: draw.integers(0, 2, 20).tolist() for name in ("cat", "dog", "indoors")},
    }
    features = {name: datasets.Value("int64") for name in content} | {"image": datasets.Image()}
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    made.to_parquet(folder / "validation.parquet")
    path = saved(tmp_path / "model.safetensors", sparse(), ["cat", "dog", "indoors"])
    given = {"target_key": "cat,dog,indoors", "predictions": str(tmp_path / "p.csv")}
    found = [
        evaluate(settings(tmp_path, path, tmp_path, dataset=f"{kind}/{folder}", **given))
        for kind in ("hfds", "hfids")
    ]
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["rows"][1]["mean_ap"] > 0 and found[0]["data"]["multi_label"]
    counted = {one["class"]: one["images"] for one in found[0]["per_class"]}
    assert counted == {name: sum(content[name]) for name in ("cat", "dog", "indoors")}
    assert "mAP" in describe(found[1])
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 41
    with pytest.raises(UserError, match="images of a stream have no numbers"):
        asked = settings(tmp_path, path, tmp_path, dataset=f"hfids/{folder}", **given)
        sides = sides_of(load_evaluated(path, asked, None), None, asked)
        check_images(grouped(sides, asked), asked.replace(corruptions=("fog",)))


@pytest.mark.skipif(
    find_spec("imagecorruptions") is None, reason="the extra `corruptions` is not installed"
)
def test_damage_is_done_to_any_pictures(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    asked = settings(
        tmp_path, path, photos, corruptions=("gaussian_noise", "contrast"), severities=(1, 5)
    )
    found = evaluate(asked)["damage"]
    assert found["kinds"] == ["gaussian_noise", "contrast"] and found["severities"] == [1, 5]
    for kind in found["kinds"]:
        assert {name: len(rates) for name, rates in found["errors"][kind].items()} == {
            "keep 1": 2, "keep 0.6": 2,
        }  # fmt: skip
    rates = [rate for kind in found["errors"].values() for rate in kind["keep 0.6"]]
    assert found["top1"]["keep 0.6"] == pytest.approx(1 - sum(rates) / 4)
    assert found["mce"]["keep 1"] == pytest.approx(1) and found["relative_to"] == "keep 1"
    lead = found["top1"]["keep 0.6"] - found["top1"]["keep 1"]
    assert found["difference"]["keep 0.6"][0] == pytest.approx(lead)
    assert evaluate(asked)["damage"] == found  # the same damage again


def test_folders_of_imagenet_c(tmp_path: Path, photos: Path) -> None:
    root = tmp_path / "imagenet-c"
    for kind in ("fog", "snow"):
        for severity in (1, 3):
            folder_of_pictures(root / kind / "all", side=32)
            (root / kind / "all" / "validation").rename(root / kind / str(severity))
            shutil.rmtree(root / kind / "all")
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    found = evaluate(settings(tmp_path, path, photos, imagenet_c=str(root)))["damage"]
    assert sorted(found["kinds"]) == ["fog", "snow"] and found["severities"] == [1, 3]
    assert found["relative_to"] == "keep 1" and found["source"] == str(root)


# ---- what is wrong -------------------------------------------------------------------------------


def test_faults_are_found_before_any_work(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    plain = saved(tmp_path / "dense.safetensors", dense(), COLOURS)
    small = tmp_path / "file"
    small.write_text("in the way")
    faults = {
        "is a folder; name the file": settings(tmp_path, path, photos, output=str(tmp_path)),
        "is a file": settings(tmp_path, path, photos, output=str(small / "found.json")),
        "neither a file or run folder, nor a model of timm": settings(tmp_path, "deit_tny", photos),
        "removes no tokens": settings(tmp_path, plain, photos, keep=(0.5,)),
        "has dense attention": settings(tmp_path, path, photos, attention_keep=(0.5,)),
        "leaves none of 16": settings(tmp_path, path, photos, keep=(0.1,)),
        "real_labels": settings(tmp_path, path, photos, real_labels="nothing.json"),
        "there is no 'fogg'; did you mean 'fog'": settings(
            tmp_path, path, photos, corruptions=("fogg",)
        ),
        "there is no file": settings(tmp_path, "no.pth", photos, model="deit_tiny_patch16_224"),
        "timm knows no model": settings(tmp_path, path, photos, model="deit_tny"),
    }
    from spot_vit.runs import evaluate as module

    monkeypatch.setattr(module, "evaluate_groups", None)
    for words, asked in faults.items():
        with pytest.raises(UserError, match=words) as error:
            evaluate(asked)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "found.json").exists()


def test_real_labels_are_those_of_imagenet(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    with pytest.raises(UserError, match="none of these images is one"):
        evaluate(settings(tmp_path, path, photos, real_labels="timm"))
    folder = photos / "validation" / "class0"
    for number, picture in enumerate(sorted(folder.iterdir())):
        picture.rename(folder / f"ILSVRC2012_val_{number + 1:08d}.png")
    truth = tmp_path / "real.json"
    truth.write_text(json.dumps([[0], [], [0, 1], [2]]))
    found = evaluate(settings(tmp_path, path, photos, real_labels=str(truth)))
    assert found["rows"][0]["real"]["images"] == 3 and "ReaL top-1" in describe(found)


def test_a_broken_model_is_written_as_json_that_all_can_read(tmp_path: Path, photos: Path) -> None:
    model = dense()
    path = tmp_path / "model.pth"
    model.head.bias.data[0] = math.inf
    torch.save(model.state_dict(), path)
    named = {"model": "deit_tiny_patch16_224", "model_kwargs": {**SMALL, "num_classes": 3}}
    found = evaluate(settings(tmp_path, str(path), photos, **named))
    assert found["rows"][0]["loss"] is None and found["rows"][0]["not_finite"] == 12
    json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)


def test_the_table_as_csv(tmp_path: Path, photos: Path) -> None:
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    found = evaluate(settings(tmp_path, path, photos, output=str(tmp_path / "table.csv")))
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["keep 1", "keep 0.6"]
    assert float(lines[1]["top1"]) == found["rows"][1]["top1"]


def share(rank: int, asked: dict[str, Any]) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    found = evaluate(EvaluationSettings(**asked))
    return json.dumps([found["rows"], found["data"]["images"], found["per_class"]])


def test_two_processes_find_what_one_does(tmp_path: Path, photos: Path) -> None:
    (photos / "validation" / "class2" / "000.png").unlink()  # 11 pictures
    path = saved(tmp_path / "model.safetensors", sparse(), COLOURS)
    asked = settings(tmp_path, path, photos, predictions=str(tmp_path / "p.csv"), batch_size=2)
    alone = evaluate(asked)
    lines = (tmp_path / "p.csv").read_text()
    (tmp_path / "p.csv").unlink()
    rows, images, classes = json.loads(together(share, asked.to_dict()))
    assert images == alone["data"]["images"] == 11 and classes == alone["per_class"]
    for ours, theirs in zip(rows, alone["rows"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["top1"] == theirs["top1"] and ours["difference"] == theirs["difference"]
    assert (tmp_path / "p.csv").read_text().count("\n") == lines.count("\n") == 23
