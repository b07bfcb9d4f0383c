"""From a recipe to what a phase trains: the model, its teacher, the objective, the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from spot_vit.config.fields import near_names
from spot_vit.config.recipe import Recipe
from spot_vit.measure.flops import count_flops
from spot_vit.models.checkpoint_files import read_weights
from spot_vit.models.checkpoint_fit import misfits
from spot_vit.models.convert import set_keep, sparsify
from spot_vit.models.named import NAMED
from spot_vit.models.saved import load
from spot_vit.models.sparsifiner import sparsify_attention
from spot_vit.runs.phases import CONNECTIVITY, DENSE, Phase
from spot_vit.training.keep_sampling import SampledKeep
from spot_vit.training.losses import (
    Criterion,
    LossWeights,
    sigmoid_distillation,
    softmax_distillation,
)
from spot_vit.training.objectives import Objective, SpotObjective, dense_objective
from spot_vit.training.param_groups import head_parameters, param_groups
from spot_vit.training.schedules import KeepSchedule
from spot_vit.training.sparsifiner import (
    RECONSTRUCTION,
    ReconstructionObjective,
    SparsifinerObjective,
)
from spot_vit.utils.errors import UserError

_RESTING = ("cls_token", "pos_embed")  # never move in DynamicViT's recipe, of which they are part
_PUBLISHED_BATCH = 168  # of a process, in Sparsifiner's code

# ---- models --------------------------------------------------------------------------------------


def dense_model(recipe: Recipe, arguments: dict[str, Any]) -> Any:
    """The model of a recipe before it is converted, with the weights that the recipe asks for.

    Args:
        recipe: names a dense model, or one of our names for what is made from it.
        arguments: further ones of `timm.create_model`, such as what the data need.

    Raises:
        UserError: timm knows no such model, or has no weights for it.
    """
    given = {**arguments, **recipe.model_kwargs}
    if recipe.drop:
        given["drop_rate"] = recipe.drop
    if recipe.drop_path:
        given["drop_path_rate"] = recipe.drop_path
    return _create(recipe.model, recipe.pretrained and not recipe.synthetic, given, "model")


def _create(name: str, pretrained: bool, arguments: dict[str, Any], what: str) -> Any:
    name = NAMED.get(name, name)
    if not timm.is_model(name):
        hint = near_names(name, timm.list_models())
        file = ", and there is no such file" if what == "teacher" else ""
        raise UserError(f"{what}: timm knows no model {name!r}{file}{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:
        if not pretrained:
            raise UserError(f"{what} {name}: {error}") from error
        raise UserError(
            f"{what} {name}: its pretrained weights could not be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); give weights of your own with "
            f"--{'teacher' if what == 'teacher' else 'initial-checkpoint'} FILE, or train from "
            "scratch with --no-pretrained"
        ) from error


def convert(model: Any, recipe: Recipe) -> Any:
    """The model made sparse, in place, as the recipe says."""
    attention, tokens = recipe.sparsifiner_config(), recipe.spot_config()
    try:
        if attention is not None:
            sparsify_attention(model, config=attention)
        if tokens is not None:
            sparsify(model, config=tokens)
    except (TypeError, ValueError) as error:
        raise UserError(f"model {recipe.model}: {error}") from error
    return model


def check(
    recipe: Recipe, arguments: dict[str, Any], input_size: tuple[int, int, int] | None = None
) -> None:
    """Raises a UserError where the recipe's model cannot be made, converted, or shown the images.

    Takes no memory.

    Args:
        recipe: names the model.
        arguments: of `timm.create_model` that the data need.
        input_size: of an image; None leaves that out.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = convert(dense_model(recipe.replace(pretrained=False), arguments), recipe)
    if recipe.sampled_keep is not None:
        try:
            set_keep(model, tokens=recipe.sampled_keep[0])
        except ValueError as error:
            raise UserError(f"sampled_keep: {error}") from error
        set_keep(model, tokens=recipe.keep)
    if input_size is None:
        return
    try:
        count_flops(model, input_size)
    except (AssertionError, RuntimeError) as error:
        shape = "x".join(map(str, input_size))
        raise UserError(
            f"model {recipe.model}: images of {shape} do not fit it: {error}; see --img-size, "
            "--in-chans and --model-kwargs"
        ) from error


def teacher_of(recipe: Recipe, classes: int, arguments: dict[str, Any]) -> nn.Module:
    """The teacher that a recipe names.

    Args:
        recipe: names a model of timm, or a file.
        classes: of the data.
        arguments: of `timm.create_model` that the data need.

    Raises:
        UserError: there is no such teacher, or it knows other classes.
    """
    assert recipe.teacher is not None
    name, path = recipe.teacher, Path(recipe.teacher)
    alike = {**arguments, **recipe.model_kwargs}  # of a model that is the student's, but dense
    if path.is_file():
        try:
            teacher: Any = load(path)
        except UserError as error:
            teacher = _create(recipe.model, False, alike, "teacher")
            state = read_weights(path).state
            if problems := misfits(teacher, state):
                raise UserError(
                    f"teacher {path}: {error}; and as a {recipe.model} it does not fit: "
                    f"{'; '.join(problems)}"
                ) from error
            teacher.load_state_dict(state)
    elif recipe.synthetic:
        own = not timm.is_model(name) or NAMED.get(name, name) == NAMED.get(
            recipe.model, recipe.model
        )
        given = alike if own else {**_sized(name, arguments), "num_classes": classes}
        teacher = _create(recipe.model if own else name, False, given, "teacher")
    elif path.suffix in (".safetensors", ".pt", ".pth", ".tar") or "/" in name:
        raise UserError(f"teacher: there is no file {path}")
    else:
        published = timm.get_pretrained_cfg(name)
        if published is not None:  # said before it is fetched
            _refuse_other_classes(name, published.num_classes, classes)
        teacher = _create(name, True, _sized(name, arguments), "teacher")
    _refuse_other_classes(name, getattr(teacher, "num_classes", classes), classes)
    return teacher


def _sized(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a model of this name must be told of images that are not of its own size."""
    published = timm.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
    names = ("in_chans", "img_size") if fixed else ("in_chans",)
    return {name: arguments[name] for name in names if name in arguments}


def _refuse_other_classes(name: str, known: int, classes: int) -> None:
    if known != classes:
        raise UserError(
            f"teacher {name}: it knows {known} classes, and the data have {classes}; "
            "train the dense model on them first, in the same run with --dense-epochs N, or in one "
            "of its own with --method dense, whose best.safetensors is the teacher then"
        )


def check_teacher(
    recipe: Recipe,
    phase: Phase,
    model: Any,
    teacher: nn.Module,
    input_size: tuple[int, int, int],
) -> None:
    """Raises a UserError where a phase's losses cannot compare the model with its teacher.

    Shows them two images of noise, as the first step will show them others; the model stays as it
    is.
    """
    objective = objective_of(recipe, phase, teacher, lambda logits, _: logits.sum(), None)
    device = next(model.parameters()).device
    images = torch.randn(2, *input_size, device=device)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norms count
    try:
        with torch.no_grad():
            objective(model, images, torch.zeros(2, dtype=torch.int64, device=device))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"teacher {recipe.teacher or 'of this run'}: {error}") from error
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])


# ---- what a phase trains with --------------------------------------------------------------------


def objective_of(
    recipe: Recipe,
    phase: Phase,
    teacher: nn.Module | None,
    criterion: Criterion,
    draw: SampledKeep | KeepSchedule | None,
) -> Objective:
    """What the phase minimises."""
    # Sums over images, published for 168 of them: each image weighs as much in any batch.
    per_image = _PUBLISHED_BATCH / recipe.batch_size
    if phase.name == CONNECTIVITY:
        return ReconstructionObjective(weight=RECONSTRUCTION * per_image)
    sparse = recipe.sparse or recipe.attention_keep is not None
    if phase.name == DENSE or not sparse:
        return lambda model, images, target: dense_objective(
            model, images, target, criterion=criterion
        )
    weights = LossWeights(
        recipe.ce_weight, recipe.kl_weight, recipe.token_weight, recipe.ratio_weight
    )
    common: dict[str, Any] = {
        "criterion": criterion,
        "distillation": sigmoid_distillation if recipe.bce_loss else softmax_distillation,
    }
    if recipe.attention_keep is not None:
        own = recipe.self_distillation * per_image
        return SparsifinerObjective(teacher, draw, weights, own, **common)
    return SpotObjective(draw, teacher, weights, **common)


def draw_of(recipe: Recipe, phase: Phase) -> SampledKeep | KeepSchedule | None:
    """What changes the budget in the course of a phase; None for a constant one."""
    if phase.name in (DENSE, CONNECTIVITY):
        return None
    if recipe.sampled_keep is not None:
        return SampledKeep(*recipe.sampled_keep, seed=recipe.seed)
    if recipe.keep_epochs is not None:
        passes = phase.per_epoch * recipe.grad_accum_steps
        return KeepSchedule(passes, *recipe.keep_epochs)
    return None


def groups_of(recipe: Recipe, phase: Phase, model: Any) -> list[dict[str, Any]]:
    """Groups of parameters whose rates are shares (`lr_scale`) of the schedule's."""
    scale, rest = (1.0, 0) if phase.name in (DENSE, CONNECTIVITY) else recipe.backbone_rate()
    groups = param_groups(
        model,
        phase.lr,
        recipe.weight_decay,
        scale,
        rest,
        frozen=_RESTING if rest else (),
        head="new" if recipe.head in ("linear", "finetune") else recipe.head,
        layer_decay=recipe.layer_decay,
    )
    return [{**group, "lr": phase.lr, "lr_scale": group["lr"] / phase.lr} for group in groups]


def optimizer_of(
    recipe: Recipe, phase: Phase, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Timm's optimiser of the recipe's name.

    Raises:
        UserError: timm has none of the name, or it takes no such arguments.
    """
    given: dict[str, Any] = {}
    if recipe.opt_eps is not None:
        given["eps"] = recipe.opt_eps
    if recipe.opt_betas is not None:
        given["betas"] = tuple(recipe.opt_betas)
    try:
        return create_optimizer_v2(
            groups,
            opt=recipe.opt,
            lr=phase.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            **given,
            **recipe.opt_kwargs,
        )
    except (ValueError, TypeError, AssertionError) as error:
        known = [str(name) for name in list_optimizers()]
        hint = "" if recipe.opt in known else near_names(recipe.opt, known)
        raise UserError(f"opt {recipe.opt}: {error}{hint}") from error


def train_head_only(model: Any) -> Callable[[], None]:
    """Switches gradients off for everything but the classifier; what it gives switches them on."""
    head = head_parameters(model)
    resting = [p for name, p in model.named_parameters() if name not in head and p.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(False)

    def undo() -> None:
        for parameter in resting:
            parameter.requires_grad_(True)

    return undo
