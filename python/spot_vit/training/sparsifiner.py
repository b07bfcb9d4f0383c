"""Training of Sparsifiner attention in its two stages (arXiv 2303.13755; METHOD B3).

    spot_vit.sparsify_attention(model, keep_rate=0.25)     # and sparsify(model, ...), if wanted
    train_connectivity(model, loader, epochs=5, lr=3e-4)
    finetune(model, loader, teacher, epochs=45, lr=8e-5)

First the connectivity predictors learn to reconstruct the attention map of the dense model, then
the model learns to live with the connectivity they give. Epochs and rates above are the published
ones (ImageNet, batch 1,344, weight decay 0.05, warm-up of 3 epochs in each stage, EMA 0.9999; rates
decay to 2e-4 and 2e-6, where `fit` decays to zero, our choice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spot_vit.models.convert import set_keep
from spot_vit.models.loop import SpotLoop, SpotOutput
from spot_vit.models.recording import record_operands
from spot_vit.models.sparsifiner import dense_attention, predictors
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.operands import Operands
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.training.fit import fit
from spot_vit.training.losses import Criterion, Distillation, LossWeights
from spot_vit.training.objectives import Objective, Parts, SpotObjective
from spot_vit.training.param_groups import param_groups
from spot_vit.training.reconstruction import TILE, reconstruction_loss
from spot_vit.training.schedules import NoiseSchedule
from spot_vit.training.teacher import FrozenTeacher
from spot_vit.utils.modes import eval_mode, unwrap
from spot_vit.utils.places import prefix_of

RECONSTRUCTION = 0.01  # weight, published

M = TypeVar("M", bound=nn.Module)

# ---- who learns ----------------------------------------------------------------------------------


def learn_connectivity(model: M, on: bool = True) -> M:
    """Switches gradients of the connectivity predictors on or off, for good, and returns the model.

    They are off in a converted model: the predictors name keys, and an index has no gradient, so
    that DistributedDataParallel would wait for them in vain. `train_connectivity` and `finetune`
    switch them on while they need them. In a loop of your own with `ReconstructionObjective` or
    `SparsifinerObjective(self_distillation=...)` call this before the optimizer is made, and before
    the model is wrapped.

    Args:
        model: with sparse attention, wrapped or not.
        on: whether they get gradients.

    Raises:
        ValueError: the model is wrapped by DistributedDataParallel, which noted at the wrapping who
            gets gradients.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "learn_connectivity: the model is wrapped by DistributedDataParallel, which noted at "
            "the wrapping who gets gradients; call it on the model first, and wrap it then"
        )
    for parameter in predictor_parameters(model, ConnectivityPredictor).values():
        parameter.requires_grad_(on)
    return model


def _require_learning(model: Any, what: str) -> None:
    """Raises unless the predictors' gradients are on, where a pass is to be differentiated."""
    own = predictor_parameters(model, ConnectivityPredictor).values()
    if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in own):
        raise ValueError(
            f"{what}: no connectivity predictor gets gradients; call learn_connectivity(model) "
            "before the optimizer is made and before the model is wrapped "
            "(DistributedDataParallel), or use train_connectivity or finetune"
        )


@contextmanager
def training_of(model: Any, *, backbone: bool, connectivity: bool) -> Iterator[None]:
    """A context in which connectivity predictors, or all else, or both get gradients.

    What else had none before has none in it.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    connecting = set(predictor_parameters(model, ConnectivityPredictor).values())
    try:
        for parameter, asked in before.items():
            parameter.requires_grad_(
                connectivity if parameter in connecting else backbone and asked
            )
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)


def _averaging(
    model: nn.Module, parameters: Sequence[nn.Parameter], then: Callable[[], Any] | None
) -> Callable[[], None]:
    """What `fit` calls after the backward pass: averages gradients over processes, then `then`."""

    def after_backward() -> None:
        _average_gradients(model, parameters)
        if then is not None:
            then()

    return after_backward


def _average_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Averages gradients over processes, where DDP would and cannot see the predictors run."""
    if not any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, torch.distributed.ReduceOp.SUM)
            parameter.grad /= torch.distributed.get_world_size()


# ---- first stage ---------------------------------------------------------------------------------


class ReconstructionObjective:
    """The loss of the first stage: reconstruction of a dense attention map, and nothing else.

    The backbone runs without gradients, in eval mode (its batch norms stand still), densely and
    with all tokens. Predictors are called one by one, not through the model: of a wrapped model the
    inner one runs, and gradients of several processes are left to the caller.

    Args:
        teacher: timm model whose map is reconstructed, wrapped or not; None for the model's own,
            which is the same while its backbone is the teacher's, and saves a forward pass.
        weight: of the loss.
        tile: queries at a time, see `reconstruction_loss`.
    """

    def __init__(
        self, teacher: Any = None, weight: float = RECONSTRUCTION, tile: int = TILE
    ) -> None:
        self.teacher = FrozenTeacher(teacher)
        self.weight, self.tile = weight, tile

    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> tuple[Tensor, Parts]:
        """The loss and its one term, whatever the targets.

        Raises:
            ValueError: no predictor gets gradients, see `learn_connectivity`.
        """
        _require_learning(model, "reconstruction")
        self.teacher.freeze(model)
        model = unwrap(model)
        with eval_mode(model), dense_attention(model), _all_tokens(model):
            student = _recorded(model, images)
        dense = self.teacher.model
        teacher = student if dense is None else _recorded(dense, images)
        loss = reconstruction_loss(predictors(model), student, teacher, self.tile)
        return self.weight * loss, {"reconstruction": loss.detach()}


@torch.no_grad()
def _recorded(model: Any, images: Tensor) -> dict[int, Operands]:
    with record_operands(model) as operands:
        model(images)
    return operands


@contextmanager
def _all_tokens(model: Any) -> Iterator[None]:
    """A context in which a SPOT model removes no tokens."""
    if not isinstance(model, SpotLoop):
        yield
        return
    keep = model.spot_config.keep
    set_keep(model, tokens=1.0)
    try:
        yield
    finally:
        set_keep(model, tokens=keep)


def train_connectivity(
    model: Any,
    loader: DataLoader[Any],
    teacher: nn.Module | None = None,
    *,
    lr: float = 3e-4,
    weight_decay: float = 0.05,
    wrap: Callable[[Objective], Objective] = lambda objective: objective,
    **options: Any,
) -> dict[str, float]:
    """Runs the first stage: connectivity predictors learn, nothing else moves.

    Args:
        model: with sparse attention (see `sparsify_attention`), SPOT or not, wrapped or not. Under
            DistributedDataParallel gradients are averaged over the processes.
        loader: yields (images, ...).
        teacher: as in `ReconstructionObjective`.
        lr: peak rate.
        weight_decay: of matrices.
        wrap: put around the objective, e.g. for autocast.
        **options: of `fit`, e.g. epochs, warmup, clip_grad, name.

    Returns:
        What `fit` returns.
    """
    with training_of(model, backbone=False, connectivity=True):
        optimizer = torch.optim.AdamW(param_groups(model, lr, weight_decay))
        objective = wrap(ReconstructionObjective(teacher))
        own = [*predictor_parameters(model).values()]
        options["after_backward"] = _averaging(model, own, options.get("after_backward"))
        return fit(model, loader, optimizer, objective, **options)


# ---- second stage --------------------------------------------------------------------------------


class SparsifinerObjective(SpotObjective):
    """The loss of the second stage: cross-entropy, and distillation from the dense teacher.

    Weights are 1.0, 0.5 for the logits' KL and 0.5 for the patch tokens' squares (published). With
    token removal the ratio term of `spot_loss` comes in, except where training meets the budget by
    itself (`train_decision="topk"`).

    Args:
        teacher: dense timm model with the student's grid, wrapped or not; at the first step it is
            put in eval mode and frozen.
        keep_ratios: of SPOT's stages, as in `SpotObjective`.
        weights: of the loss terms.
        self_distillation: weight of the predictors' reconstruction of the student's own dense map
            (published, optional: 0.002), thresholds applied. Its gradient reaches the predictors
            alone (our reading), which must be on, see `learn_connectivity`. Under
            DistributedDataParallel wrap the model after that, without `find_unused_parameters`.
        criterion: as in `SpotObjective`.
        distillation: as in `SpotObjective`.
        auxiliary: as in `SpotObjective`; "mse" is what Sparsifiner's code does with LV-ViT.
        noise: as in `SpotObjective`.
    """

    def __init__(
        self,
        teacher: Any,
        keep_ratios: Any = None,
        weights: LossWeights | None = None,
        self_distillation: float = 0.0,
        *,
        criterion: Criterion | None = None,
        distillation: Distillation | None = None,
        auxiliary: str | None = None,
        noise: NoiseSchedule | None = None,
    ) -> None:
        super().__init__(
            keep_ratios,
            teacher,
            weights,
            criterion=criterion,
            distillation=distillation,
            auxiliary=auxiliary,
            noise=noise,
        )
        self.self_distillation = self_distillation
        self._averaged = False  # whether `finetune` averages predictors' gradients over processes

    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> tuple[Tensor, Parts]:
        """The loss and its terms, as `SpotObjective` gives them, and "own"."""
        if not self.self_distillation:
            return super().__call__(model, images, target)
        _require_learning(model, "self_distillation")
        if not self._averaged:
            _refuse_unused(model)
        with record_operands(model) as seen:
            loss, parts = super().__call__(model, images, target)
        seen = {b: one._replace(q=one.q.detach(), k=one.k.detach()) for b, one in seen.items()}
        own = reconstruction_loss(predictors(model), seen, seen, thresholds=True)
        return loss + self.self_distillation * own, {**parts, "own": own.detach()}

    def _output(self, model: Any, images: Tensor) -> SpotOutput:
        """Logits, tokens and masks; of a model that removes no tokens, one mask that keeps all.

        Raises:
            TypeError: a compiled model without token removal, whose tokens nobody can see.
        """
        inner = unwrap(model)
        if isinstance(inner, SpotLoop):
            return model(images, aux=True)
        seen: list[Tensor] = []  # through the wrapper, which returns logits alone
        handle = inner.norm.register_forward_hook(lambda norm, args, tokens: seen.append(tokens))
        try:
            logits = model(images)
        finally:
            handle.remove()
        if not seen:
            raise TypeError(
                "distillation needs tokens, and those of a compiled model cannot be seen: compile "
                "its blocks one by one"
            )
        tokens = seen[-1]
        kept = tokens.new_ones(tokens.shape[0], tokens.shape[1] - prefix_of(inner))
        return SpotOutput(logits, tokens, [kept])


def _refuse_unused(model: nn.Module) -> None:
    """Raises where DDP counts predictors as unused, as they run outside of its forward pass."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.find_unused_parameters:
            raise ValueError(
                "self_distillation: predictors run outside of the forward pass, and "
                "DistributedDataParallel(find_unused_parameters=True) takes them for unused; wrap "
                "the model without it, after learn_connectivity(model)"
            )


def finetune(
    model: Any,
    loader: DataLoader[Any],
    teacher: nn.Module,
    *,
    lr: float = 8e-5,
    relevance_lr: float | None = None,
    weight_decay: float = 0.05,
    keep_ratios: Any = None,
    weights: LossWeights | None = None,
    self_distillation: float = 0.0,
    criterion: Criterion | None = None,
    distillation: Distillation | None = None,
    auxiliary: str | None = None,
    noise: NoiseSchedule | None = None,
    wrap: Callable[[Objective], Objective] = lambda objective: objective,
    **options: Any,
) -> dict[str, float]:
    """Runs the second stage: the model learns with sparse attention; connectivity predictors rest.

    Args:
        model: with sparse attention, SPOT or not, wrapped or not.
        loader: yields (images, targets, ...).
        teacher: the dense model.
        lr: peak rate of the backbone.
        relevance_lr: peak rate of SPOT's predictors, the backbone's when None.
        weight_decay: of matrices.
        keep_ratios: as in `SparsifinerObjective`.
        weights: of the loss terms.
        self_distillation: see `SparsifinerObjective`; with it connectivity predictors learn too, at
            `relevance_lr`, whether their gradients were on or off before.
        criterion: as in `SparsifinerObjective`.
        distillation: as in `SparsifinerObjective`.
        auxiliary: as in `SparsifinerObjective`.
        noise: as in `SparsifinerObjective`.
        wrap: put around the objective, e.g. for autocast.
        **options: of `fit`, e.g. epochs, warmup, clip_grad, name.

    Returns:
        What `fit` returns.
    """
    top = lr if relevance_lr is None else relevance_lr
    objective = SparsifinerObjective(
        teacher,
        keep_ratios,
        weights,
        self_distillation,
        criterion=criterion,
        distillation=distillation,
        auxiliary=auxiliary,
        noise=noise,
    )
    # DDP averages the gradients of what had some when the model was wrapped; the others' we do.
    own = predictor_parameters(model, ConnectivityPredictor).values()
    unknown = [parameter for parameter in own if not parameter.requires_grad]
    if self_distillation and unknown:
        options["after_backward"] = _averaging(model, unknown, options.get("after_backward"))
        objective._averaged = True
    with training_of(model, backbone=True, connectivity=self_distillation > 0):
        groups = param_groups(
            model, top, weight_decay, lr / top, freeze_epochs=0, head="pretrained"
        )
        return fit(model, loader, torch.optim.AdamW(groups), wrap(objective), **options)
