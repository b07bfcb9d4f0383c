"""One optimiser step over one or several batches, in whatever precision, on one device or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, distributed, nn

from spot_vit.training.objectives import Objective
from spot_vit.utils.modes import unwrap

CLIP_MODES = ("norm", "value", "agc")


class NonFiniteStep(FloatingPointError):
    """Loss or gradient of a step is infinite or not a number, and the parameters have not moved.

    Args:
        values: what the step would have returned.
        where: put after "not finite", e.g. " at step 3".
        name: of the training, put before it.

    Attributes:
        values: loss, gradient_norm and the loss terms, by name.
    """

    def __init__(self, values: Mapping[str, float], where: str = "", name: str = "") -> None:
        terms = ", ".join(f"{term} {value:g}" for term, value in values.items())
        super().__init__(
            f"{name and name + ': '}not finite{where}: {terms}; lower the learning rate or "
            "clip_grad, or check the data"
        )
        self.values = dict(values)


class TrainStep:
    """Forward and backward passes, clipping, the check for finite values, and the optimiser's step.

    Of a model in DistributedDataParallel or FSDP gradients are exchanged once a step, with the
    last of its batches, and what it returns is the mean over the processes.

    Args:
        model: any module, wrapped or not, in training mode when the step is called.
        optimizer: over the model's parameters.
        objective: the loss, see `Objective`.
        amp_dtype: bfloat16 or float16: the objective runs under autocast. None for none.
        scaler: of the loss. None makes one where `amp_dtype` is float16, whose small gradients
            would be zero without.
        clip_grad: largest norm of all gradients together; largest absolute value of each; or the
            largest ratio of a unit's gradient to its weight. Infinity for none.
        clip_mode: "norm", "value" or "agc", as timm has them; "agc" leaves the classifier out.
        after_backward: called when a step's gradients are there, before they are unscaled and
            clipped.

    Attributes:
        scaler: as given or made; it belongs into a checkpoint.
        skipped: steps left out because their gradient, scaled for float16, was too large; the
            scaler tries a smaller scale in the next one.

    Raises:
        ValueError: precision or clipping that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        *,
        amp_dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad: float = math.inf,
        clip_mode: str = "norm",
        after_backward: Callable[[], Any] | None = None,
    ) -> None:
        if amp_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"amp_dtype: expected torch.bfloat16, torch.float16 or None, got {amp_dtype}"
            )
        if clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode: expected one of {list(CLIP_MODES)}, got {clip_mode!r}")
        if not clip_grad > 0:
            raise ValueError(
                f"clip_grad: expected more than 0 (math.inf for no clipping), got {clip_grad}"
            )
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.device = next(model.parameters()).device
        self._wrappers = _exchanging(model)
        if clip_mode == "agc" and any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError(
                "clip_mode: 'agc' needs whole weights, and those of fully_shard are in pieces; "
                "expected 'norm' or 'value'"
            )
        if scaler is None and amp_dtype is torch.float16:
            scaler = torch.amp.GradScaler(self.device.type)
        self.amp_dtype, self.scaler = amp_dtype, scaler
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        self.after_backward = after_backward
        self.skipped = 0
        self._begun = False

    def __call__(self, batches: Sequence[tuple[Tensor, Any]]) -> dict[str, float]:
        """Moves the parameters once, by the gradient of the mean loss over all images.

        With batches of equal size that is the mean of their losses. It is that of one large batch
        where the loss is a mean over images; one that sums over them, as reconstruction does, or
        takes the mean over what each image kept, is another in small batches. Gradients stay where
        they are until the next step.

        Args:
            batches: (images [B, channels, H, W], target or None), on any device.

        Returns:
            "loss", "gradient_norm" (before clipping) and the terms of the loss, means over the
            images. All of them come from the device in one transfer.

        Raises:
            NonFiniteStep: see there. A gradient that is not finite is left to the scaler, where
                there is one, until its scale is down to 1.
            ValueError: no batch, or batches whose losses have other terms.
        """
        self.optimizer.zero_grad(set_to_none=True)
        names, means = self._backward(batches)
        if self.after_backward is not None:
            self.after_backward()
        scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = self._norm(parameters)
        found = _mean_over_processes(torch.cat([norm.to(means)[None], means]), self._wrappers)
        size, *rest = found.tolist()
        values = {"loss": rest[0], "gradient_norm": size}
        values.update(zip(names[1:], rest[1:], strict=True))
        good = math.isfinite(size)
        overflow = not good and scaler is not None and scaler.get_scale() > 1
        if not math.isfinite(values["loss"]) or not (good or overflow):
            if scaler is not None:
                scaler.update(scaler.get_scale())  # ready for another step, and as it was
            raise NonFiniteStep(values)
        if good:
            self._clip(parameters, norm)
            self.optimizer.step()
        self.skipped += overflow
        if scaler is not None:
            # Not scaler.step(): it would ask the device once more whether the gradient is finite.
            scaler.update()
        return values

    def _backward(self, batches: Sequence[tuple[Tensor, Any]]) -> tuple[list[str], Tensor]:
        """Leaves the gradient; gives the names of the loss and its terms, and their means."""
        images_of_all = sum(len(images) for images, _ in batches)
        if not images_of_all:
            raise ValueError("batches: expected at least one, with images in it, got none")
        names: list[str] = []
        total: Tensor | None = None
        for number, (images, target) in enumerate(batches, 1):
            share = len(images) / images_of_all
            with _exchanged(self._wrappers, number == len(batches), self._begun):
                loss, terms = self._loss(images, target)
                part = loss * share
                (part if self.scaler is None else self.scaler.scale(part)).backward()
            values = torch.stack([loss.detach(), *terms.values()]) * share
            found = ["loss", *terms]
            if total is not None and found != names:
                raise ValueError(
                    f"batches: losses of one step must have the same terms, got {names[1:]} and "
                    f"{found[1:]}"
                )
            names, total = found, values if total is None else total + values
        self._begun = True
        assert total is not None
        return names, total

    def _loss(self, images: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images = images.to(self.device, non_blocking=True)
        if isinstance(target, Tensor):
            target = target.to(self.device, non_blocking=True)
        if self.amp_dtype is None:
            return self.objective(self.model, images, target)
        with torch.autocast(self.device.type, self.amp_dtype):
            loss, terms = self.objective(self.model, images, target)
        return loss.float(), terms  # a scaled loss may be too large for float16

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        for module in self._wrappers:
            if hasattr(module, "clip_grad_norm_"):  # FSDP1: a process sees its piece alone
                return module.clip_grad_norm_(math.inf)
        return gradient_norm(parameters)

    def _clip(self, parameters: list[nn.Parameter], norm: Tensor) -> None:
        if math.isinf(self.clip_grad):
            return
        if self.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        elif self.clip_mode == "value":
            nn.utils.clip_grad_value_(parameters, self.clip_grad)
        else:
            head = {id(p) for p in _classifier(self.model)}
            adaptive_clip_grad([p for p in parameters if id(p) not in head], self.clip_grad)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of the gradients of all parameters together, a float tensor [] on their device.

    Args:
        parameters: with gradients or without, sharded (DTensor) or not.
    """
    whole: list[Tensor] = []
    parts: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (parts if hasattr(parameter.grad, "full_tensor") else whole).append(parameter.grad)
    if not parts:
        return nn.utils.get_total_norm(whole)
    norm: Any = nn.utils.get_total_norm(parts)
    norm = norm.full_tensor()
    return torch.hypot(norm, nn.utils.get_total_norm(whole).to(norm)) if whole else norm


def _exchanging(model: nn.Module) -> list[Any]:
    """The outermost modules that exchange gradients with other processes: of DDP, FSDP2, FSDP1."""
    if hasattr(type(model), "no_sync") or hasattr(type(model), "set_requires_gradient_sync"):
        return [model]
    return [found for child in model.children() for found in _exchanging(child)]


@contextmanager
def _exchanged(wrappers: Sequence[Any], now: bool, begun: bool) -> Iterator[None]:
    """A context whose backward pass exchanges gradients, or leaves that to a later one.

    Args:
        wrappers: of the model.
        now: whether it exchanges them.
        begun: whether there was a step before. In the first one DDP with a static graph learns its
            graph and cannot leave it out; the gradient is the same.
    """
    with ExitStack() as stack:
        for module in () if now else wrappers:
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
            elif begun or not getattr(module, "static_graph", False):
                stack.enter_context(module.no_sync())
        yield


def _mean_over_processes(values: Tensor, wrappers: Sequence[Any]) -> Tensor:
    """The mean over the processes that train a model together: all of them then do the same."""
    if not wrappers:
        return values
    group = getattr(wrappers[0], "process_group", None)
    distributed.all_reduce(values, group=group)
    return values / distributed.get_world_size(group)


def _classifier(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the classifier of a timm model, wrapped or not; none of another model."""
    found = getattr(unwrap(model), "get_classifier", lambda: None)()
    for module in found if isinstance(found, tuple) else [found]:
        if isinstance(module, nn.Module):
            yield from module.parameters()
