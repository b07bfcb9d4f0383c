"""A recipe: its fields, and what they ask of each other."""

from __future__ import annotations

from typing import Any

import pytest
from spot_vit.config.fields import problem_lines
from spot_vit.config.methods import METHODS, Method
from spot_vit.config.recipe import GROUPS, Recipe
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.config.spot import SpotConfig


def test_the_groups_are_the_recipe() -> None:
    names = [name for group in GROUPS for name in group.names()]
    assert names == Recipe.names() and len(set(names)) == len(names)
    assert all(rule.text for _, rule in Recipe.rules().values())
    assert all((group.__doc__ or "").count("\n") == 0 for group in GROUPS)


def test_round_trip() -> None:
    recipe = Recipe(
        keep=[0.9, 0.5], at=[2, 4], sampled_keep=[0.3, 1], data_args={"length": 8}, scale=(0.5, 1),
        opt_betas=[0.9, 0.95], model_kwargs={"patch_size": [8, 8]},
    )  # fmt: skip
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe != Recipe()
    assert recipe.scale == (0.5, 1) and recipe.to_dict()["scale"] == [0.5, 1]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as said:
        Recipe.from_dict(
            {"methd": "x", "img-size": 3, "lr": "fast", "workers": -1, "method": "spott",
             "keep": 2, "device": "gpu", "mixup": 0.8, "batch_size": 3}
        )  # fmt: skip
    lines = problem_lines(said.value)
    assert len(lines) == 8
    for words in (
        "methd is no field of a recipe; did you mean 'method'?",
        "img-size is no field of a recipe; did you mean 'img_size'?",
        "lr must be a number above 0, got 'fast'",
        "workers must be a whole number of 0 or more, or None, got -1",
        "got 'spott'; did you mean 'spot'?",
        "keep must be a number from 1e-06 to 1, or a non-empty list",
        "device must be cpu, cuda or cuda:N, got 'gpu'",
        "batch_size must be even where mixup or cutmix is on, got 3",
    ):
        assert sum(words in line for line in lines) == 1, words


def test_a_recipe_without_a_problem_of_its_own_names_unknown_fields() -> None:
    with pytest.raises(ValueError, match=r"^nothing_like_it is no field of a recipe$"):
        Recipe.from_dict({"nothing_like_it": 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep": (0.5, 0.7)}, "keep must not rise"),
        ({"keep": (0.5, 0.4), "at": (1, 2, 3)}, "keep names 2 stages, at names 3"),
        ({"at": (0, 3)}, "no block comes before it"),
        ({"method": "evit", "features": ("cls",)}, "has its own evidence"),
        ({"spot": {"hist": 3}}, "hist is no field of SpotConfig; did you mean 'history'"),
        ({"spot": {"keep": 0.5}}, "spot: keep is the recipe's own field keep"),
        ({"spot": {"tau": 0}}, "tau must be a number above 0"),
        ({"attention_keep": 0.2, "sparsifiner": {"reduce": 2}}, "did you mean 'reduce_"),
        ({"attention_keep": 0.2, "sparsifiner": {"keep_rate": 1}}, "own field attention_keep"),
        ({"attention_keep": 0.2, "sparsifiner": {"reduce_n": 0}}, "reduce_n must be a whole"),
        ({"sparsifiner": {"reduce_n": 2}}, "attention_keep must say how much"),
        ({"attention_keep": 0}, "attention_keep must be a number above 0"),
        ({"sampled_keep": (0.9, 0.3)}, r"smaller number first, got sampled_keep=\[0.9, 0.3\]"),
        ({"scale": (1, 0.5), "ratio": (2, 1)}, r"got scale=\[1, 0.5\], ratio=\[2, 1\]"),
        ({"sampled_keep": (0.3, 0.9), "train_decision": "gumbel"}, "needs train_decision='topk'"),
        ({"sampled_keep": (0.3, 0.9), "keep_epochs": (1, 2)}, "both say what keep is"),
        ({"sampled_keep": (0.3, 0.9), "method": "dense"}, "need a method that removes tokens"),
        ({"keep_epochs": (1, 2), "method": "dense"}, "need a method that removes tokens"),
        ({"sampled_keep": 0.3}, "a list of 2"),
        ({"stage": "connectivity"}, "give attention_keep"),
        ({"cutmix": 1.0, "batch_size": 7}, "batch_size must be even"),
        ({"bce_sum": True}, "belong to bce_loss, which is off"),
        ({"bce_target_thresh": 0.0}, "belong to bce_loss, which is off"),
        ({"val_share": 0.1, "synthetic": True}, "synthetic takes none"),
        ({"device": "cuda:x"}, "device must be cpu"),
        ({"epochs": 0}, "epochs must be a whole number of 1 or more"),
        ({"amp_dtype": "float"}, "did you mean 'float16'"),
        ({"std": (0.0,)}, "std must be"),
        ({"smoothing": 1.0}, "smoothing must be"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**fields)


def test_configurations_of_conversions() -> None:
    recipe = Recipe(keep=0.6, at=[1, 2], features=["embed", "cls"], spot={"history": 2, "tau": 0.5})
    assert recipe.spot_config() == SpotConfig(
        keep=0.6, at=(1, 2), features=("embed", "cls"), history=2, tau=0.5
    )
    assert recipe.sparsifiner_config() is None
    both = Recipe(attention_keep=0.25, sparsifiner={"reduce_n": 4}, method="dense")
    assert both.sparsifiner_config() == SparsifinerConfig(0.25, reduce_n=4)
    assert both.spot_config() is None and not both.sparse
    assert Recipe(noise=0.1, soft="fuse").spot_config() == SpotConfig(noise=0.1, soft="fuse")


def test_sampled_budgets_are_met_exactly() -> None:
    config = Recipe(sampled_keep=(0.3, 0.9)).spot_config()
    assert config is not None and config.train_decision == "topk"
    plain = Recipe().spot_config()
    assert plain is not None and plain.train_decision == "gumbel"


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_trains_slowly_only_beside_predictors_on_trained_weights(method: str) -> None:
    learned = bool(METHODS[method].evidence)
    assert Recipe(method=method).backbone_rate() == (1.0, 0)
    for start in ({"pretrained": True}, {"initial_checkpoint": "a.pt"}, {"dense_epochs": 2}):
        fields: dict[str, Any] = {"method": method, **start}
        assert Recipe(**fields).backbone_rate() == ((0.01, 5) if learned else (1.0, 0))
        assert Recipe(**fields, freeze_epochs=2).backbone_rate()[1] == 2
        assert Recipe(**fields, backbone_lr_scale=0.5).backbone_rate() == (0.5, 0)
    assert Recipe(method=method, pretrained=True, epochs=2).backbone_rate()[1] == int(learned)


def test_a_new_method_needs_no_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", Method("mine", "Mine", "a test", by_chance=True))
    assert Recipe(method="mine", pretrained=True).backbone_rate() == (1.0, 0)
    with pytest.raises(ValueError, match=r"'mine'.*got 'mne'; did you mean 'mine'"):
        Recipe(method="mne")
