"""From a model to what is exported of it: logits and decisions, for any number of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.config.methods import METHODS
from spot_vit.models.fast import is_fast
from spot_vit.models.loop import SpotLoop
from spot_vit.utils.errors import UserError

LARGEST_BATCH = 2**16


class Outputs(nn.Module):
    """What a file gives: logits, then for each decision the patches that stay.

    Args:
        model: dense or converted, not wrapped, in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[B, classes], and [B, n_k] int64 ascending positions on the grid where any are decided.

        Args:
            images: [B, 3, H, W].
        """
        if not isinstance(self.model, SpotLoop):
            return self.model(images)
        found = self.model(images, aux=True)
        return (found.logits, *found.index)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs of a model as a tuple, the logits alone too."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def check_model(model: Any) -> None:
    """Raises a UserError for a model of which no file can be made, with the cure."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UserError(f"expected a model, got {kind}")
    if is_fast(model):
        raise UserError(
            "this model is fast, with weights packed for this machine, which no file holds: export "
            "it before spot_vit.fast, or spot_vit.restore it"
        )
    if model.training:
        raise UserError(
            "this model is in training mode, where tokens are masked: call model.eval()"
        )
    config = getattr(model, "spot_config", None)
    if config is not None and METHODS[config.method].by_chance:
        raise UserError(
            f"method {config.method!r} draws its tokens anew in every pass, so that no file can be "
            "verified: export another method"
        )
    tensors = [*model.parameters(), *model.buffers()]
    if other := {t.device.type for t in tensors} - {"cpu"}:
        raise UserError(f"this model is on {', '.join(sorted(other))}: call model.cpu()")
    kinds = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}
    if kinds:
        names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        raise UserError(f"files hold float32, this model has {names}: call model.float()")


def program_of(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The graph of a model for any number of images; operators of SPOT stay as they are.

    Args:
        model: as `check_model` wants it.
        images: [B, 3, H, W] to trace with, B at least 2.

    Raises:
        UserError: torch.export cannot follow the model.
    """
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        try:
            program = torch.export.export(Outputs(model), (images,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch's own kinds have no common base
            raise UserError(
                f"torch.export cannot follow this {type(model).__name__}: "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            ) from error
    for name, tensor in program.state_dict.items():  # whose users want no gradients
        if isinstance(tensor, nn.Parameter):
            program.state_dict[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return program


def operators_in(program: torch.export.ExportedProgram) -> list[str]:
    """Names of SPOT's operators that a graph calls, as "spot::select_tokens", in order."""
    called = (node.target for node in program.graph.nodes if node.op == "call_function")
    names = {op._schema.name for op in called if isinstance(op, torch._ops.OpOverload)}
    return sorted(name for name in names if name.startswith("spot::"))
