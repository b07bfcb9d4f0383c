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
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from spot_vit.models.convert import set_keep
from spot_vit.models.loop import SpotLoop, SpotOutput
from spot_vit.models.sparsifiner import dense_attention, predictors, record_operands
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.operands import Operands
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.training.fit import fit
from spot_vit.training.losses import LossWeights, spot_loss
from spot_vit.training.objectives import Objective, Parts, frozen, view_of
from spot_vit.training.param_groups import param_groups
from spot_vit.training.reconstruction import TILE, reconstruction_loss
from spot_vit.utils.modes import eval_mode, unwrap

RECONSTRUCTION = 0.01  # weight, published

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
        self.teacher = frozen(teacher)
        self.weight, self.tile = weight, tile

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """The loss and its one term, whatever the targets."""
        model = unwrap(model)
        with eval_mode(model), dense_attention(model), _all_tokens(model):
            student = _recorded(model, images)
        teacher = student if self.teacher is None else _recorded(self.teacher, images)
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
        average = partial(_average_gradients, model, [*predictor_parameters(model).values()])
        return fit(model, loader, optimizer, objective, after_backward=average, **options)


def _average_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Averages gradients over processes, where DDP would and cannot see the predictors run."""
    if not any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, torch.distributed.ReduceOp.SUM)
            parameter.grad /= torch.distributed.get_world_size()


# ---- second stage --------------------------------------------------------------------------------


class SparsifinerObjective:
    """The loss of the second stage: cross-entropy, and distillation from the dense teacher.

    Weights are 1.0, 0.5 for the logits' KL and 0.5 for the patch tokens' squares (published). With
    token removal the ratio term of `spot_loss` comes in.

    Args:
        teacher: dense timm model with the student's grid, wrapped or not; it is put in eval mode
            and frozen.
        keep_ratios: of SPOT's stages; empty without token removal, and where training meets the
            budget by itself (`train_decision="topk"`).
        weights: of the loss terms.
        self_distillation: weight of the predictors' reconstruction of the student's own dense map
            (published, optional: 0.002). Its gradient reaches the predictors alone (our reading).
    """

    def __init__(
        self,
        teacher: Any,
        keep_ratios: Sequence[float] = (),
        weights: LossWeights | None = None,
        self_distillation: float = 0.0,
    ) -> None:
        self.teacher = frozen(teacher)
        self.keep_ratios, self.weights = keep_ratios, weights
        self.self_distillation = self_distillation

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """The loss and its terms."""
        view = view_of(self.teacher, images)
        with ExitStack() as stack:
            seen: dict[int, Operands] = {}
            if self.self_distillation:
                seen = stack.enter_context(record_operands(model))
            output = _output(model, images)
        loss, parts = spot_loss(output, target, self.keep_ratios, view, self.weights)
        if self.self_distillation:
            seen = {b: one._replace(q=one.q.detach(), k=one.k.detach()) for b, one in seen.items()}
            own = reconstruction_loss(predictors(model), seen, seen)
            loss, parts = loss + self.self_distillation * own, {**parts, "own": own.detach()}
        return loss, parts


def _output(model: Any, images: Tensor) -> SpotOutput:
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
            "distillation needs tokens, and those of a compiled model cannot be seen: compile its "
            "blocks one by one"
        )
    tokens = seen[-1]
    kept = tokens.new_ones(tokens.shape[0], tokens.shape[1] - inner.num_prefix_tokens)
    return SpotOutput(logits, tokens, [kept])


def finetune(
    model: Any,
    loader: DataLoader[Any],
    teacher: nn.Module,
    *,
    lr: float = 8e-5,
    relevance_lr: float | None = None,
    weight_decay: float = 0.05,
    keep_ratios: Sequence[float] | None = None,
    weights: LossWeights | None = None,
    self_distillation: float = 0.0,
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
        keep_ratios: as in `SparsifinerObjective`; those of the model's configuration when None.
        weights: of the loss terms.
        self_distillation: see `SparsifinerObjective`; with it connectivity predictors learn too, at
            `relevance_lr`.
        wrap: put around the objective, e.g. for autocast.
        **options: of `fit`, e.g. epochs, warmup, clip_grad, name.

    Returns:
        What `fit` returns.
    """
    if keep_ratios is None:
        keep_ratios = _ratios(model)
    top = lr if relevance_lr is None else relevance_lr
    with training_of(model, backbone=True, connectivity=self_distillation > 0):
        groups = param_groups(model, top, weight_decay, lr / top, freeze_epochs=0)
        objective = SparsifinerObjective(teacher, keep_ratios, weights, self_distillation)
        return fit(model, loader, torch.optim.AdamW(groups), wrap(objective), **options)


def _ratios(model: Any) -> Sequence[float]:
    model = unwrap(model)
    if not isinstance(model, SpotLoop) or model.spot_config.train_decision == "topk":
        return ()
    return model.spot_config.keep_ratios()


@contextmanager
def training_of(model: Any, *, backbone: bool, connectivity: bool) -> Iterator[None]:
    """A context in which connectivity predictors, or all else, or both get gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    connecting = set(predictor_parameters(model, ConnectivityPredictor).values())
    try:
        for parameter in before:
            part = connectivity if parameter in connecting else backbone
            parameter.requires_grad_(part and before[parameter])
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
