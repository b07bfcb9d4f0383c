"""torch.fx: what cannot be traced by symbols says so, and what the message names works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import images
from support.ranks import KINDS, LEARNED, converted
from torchvision.models.feature_extraction import create_feature_extractor

CURE = r"torch\.export\.export\(model, \(images,\)\).*model\.forward_intermediates"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_symbols_are_refused_by_name(kind: str, training: bool):
    """Though their defaults are symbols as well, no mask is blamed."""
    model = converted(kind).train(training)
    with pytest.raises(TypeError, match=CURE):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match=CURE):
        torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None, "is_causal": False})
    with pytest.raises(TypeError, match=CURE):
        create_feature_extractor(model, ["blocks.2"])


@pytest.mark.parametrize("kind", LEARNED)
@torch.no_grad()
def test_what_the_message_names_works(kind: str):
    model: Any = converted(kind).eval()
    x = images(model)
    program = torch.export.export(model, (x,))
    assert isinstance(program.graph_module, torch.fx.GraphModule)
    assert any("spot" in str(node.target) for node in program.graph.nodes)
    assert (program.module()(x) - model(x)).abs().max() < 1e-12
    taken: list[Any] = []
    with model.blocks[0].register_forward_hook(lambda *call: taken.append(call[-1])):
        (found,) = model.forward_intermediates(
            x, indices=[0], intermediates_only=True, output_fmt="NLC"
        )
    assert torch.equal(found, taken[0][:, 1:])


def test_masks_are_still_refused():
    model = converted("spot").eval()
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        model(images(model), torch.ones(17, 17))
