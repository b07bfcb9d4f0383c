"""Recipes as yaml: the shipped ones, and reading and writing."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml
from spot_vit.config.fields import problem_lines
from spot_vit.config.recipe import Recipe
from spot_vit.config.recipe_files import read, read_fields, shipped, to_yaml

NAMES = [
    "digits", "dynamicvit-deit-s", "evit-deit-s", "finetune-folder", "sparsifiner-deit-s",
    "spot-deit-s", "spot-deit-t", "spot-lvvit-s", "spot-sparsifiner-deit-s",
]  # fmt: skip


def text_of(name: str) -> str:
    return (resources.files("spot_vit") / "recipes" / f"{name}.yaml").read_text()


def test_what_is_shipped() -> None:
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_says_where_each_field_is_from(name: str) -> None:
    fields = read(name)
    recipe = Recipe.from_dict(fields)
    assert recipe != Recipe() and yaml.safe_load(text_of(name)) == fields
    lines = [line for line in text_of(name).splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(fields)
    for line in lines:
        assert re.search(r"  # (published \(.+\)|our choice( \(.+\))?)$", line), line


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dynamicvit-deit-s", {"lr": 1e-3, "backbone_lr_scale": 0.01, "freeze_epochs": 5,
                               "epochs": 30, "keep": 0.7, "at": [3, 6, 9], "ratio_weight": 2.0}),
        ("evit-deit-s", {"min_lr": 2e-6, "weight_decay": 1e-6, "warmup_epochs": 0, "epochs": 30}),
        ("sparsifiner-deit-s", {"attention_keep": 0.25, "connectivity_epochs": 5, "epochs": 45,
                                "connectivity_lr": 3e-4, "connectivity_min_lr": 2e-4, "lr": 8e-5,
                                "min_lr": 2e-6, "warmup_epochs": 3, "batch_size": 168}),
        ("spot-lvvit-s", {"model": "lvvit_small", "at": [4, 8, 12]}),
    ],
)  # fmt: skip
def test_published_numbers(name: str, fields: dict) -> None:
    found = read(name)
    assert {key: found[key] for key in fields} == fields


def test_a_published_recipe_converts_as_the_published_models_are() -> None:
    sparsifiner = Recipe.from_dict(read("sparsifiner-deit-s"))
    assert (
        sparsifiner.sparsifiner_config() == sparsifiner.replace(sparsifiner={}).sparsifiner_config()
    ), "our defaults are those of the public code"
    assert sparsifiner.spot_config() is None
    evit = Recipe.from_dict(read("evit-deit-s")).spot_config()
    assert evit is not None and evit.fuses and evit.cuts_inside and not evit.learned


def test_written_recipes_are_read_again(tmp_path: Path) -> None:
    recipe = Recipe(
        lr=1e-7, keep=(0.9, 0.5), at=[3, 6], teacher="vít é", data_args={"a": [1, 2]}, soft="none",
        recovery_interval=3,
    )  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(recipe))
    assert Recipe.from_dict(read(str(file))) == recipe
    assert Recipe.from_dict(yaml.safe_load(to_yaml(recipe))) == recipe, "by any yaml loader"
    assert re.search(r"^# Sparsity\n", to_yaml(recipe), re.MULTILINE)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert read(str(tmp_path)) == read(str(file)), "a run's folder"


def test_numbers_are_what_people_write() -> None:
    assert read_fields("lr: 1e-3\nmin_lr: 1E-6\nwarmup_lr: -2e+3") == {
        "lr": 1e-3, "min_lr": 1e-6, "warmup_lr": -2e3,
    }  # fmt: skip
    assert read_fields("a: 3\nb: 3.5\nc: e5\nd: 1e\n") == {"a": 3, "b": 3.5, "c": "e5", "d": "1e"}
    assert read_fields("") == {} and read_fields("# only words") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1\nlr: 2", "lr is there twice"),
        ("- a\n- b", "expected names of fields with values"),
        ("lr: [1, 2", "no yaml: .*line"),
        ("1: 2", "expected names of fields"),
        ("just words", "expected names of fields"),
        ("a: !!python/object:os.system x", "no yaml: could not determine a constructor"),
    ],
)
def test_what_is_no_recipe(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as said:
        read(str(file))
    assert str(file) in str(said.value) and len(problem_lines(said.value)) == 1
    assert "\n" not in str(said.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no file 'spot-deit-x', .* did you mean 'spot-deit-[st]'"
    ):
        read("spot-deit-x")
    with pytest.raises(ValueError, match="no file"):
        read(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read(str(tmp_path / "binary.yaml"))
