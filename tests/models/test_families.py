"""Classes of the user's own: subclasses of timm's, converted as what they add to."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.models.loop import SpotLoop
from support.families import MaskedAutoencoder, OwnAttention, OwnBlock, small
from support.models import images
from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

OWN = ["MAE", "blocks and attention", "Eva", "BEiT", "NaFlexVit"]


@pytest.mark.parametrize("own", OWN)
@torch.no_grad()
def test_a_subclass_that_adds_converts_and_comes_back(own: str):
    model = small(own)
    classes = [type(module) for module in model.modules()]
    x = images(model)
    expected, keys = model(x), list(model.state_dict())
    assert spot_vit.sparsify(model, keep=1.0, at=[1, 2]) is model
    assert isinstance(model, SpotLoop) and isinstance(model, classes[0])
    assert torch.equal(model(x), expected)
    spot_vit.set_keep(model, 0.5)
    assert not torch.equal(model(x), expected)
    spot_vit.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("own", OWN)
def test_a_subclass_trains_as_it_runs(own: str):
    model = spot_vit.sparsify(small(own, torch.float64), keep=0.6, at=[1, 2])
    x = images(model)
    with torch.no_grad():
        out = model(x, aux=True)
    model.train()
    masked = model(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)
    aux = model(x, aux=True)
    (aux.logits.square().mean() + sum(mask.mean() for mask in aux.masks)).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {name for name in unused if name.startswith("decoder")}


@torch.no_grad()
def test_what_a_subclass_adds_goes_on_working():
    model = small("MAE")
    x = images(model)
    expected = model.forward_loss(x)
    spot_vit.sparsify(model, keep=0.5, at=[1, 2])
    assert model.mask_ratio == 0.75
    assert "decoder_pos_embed" in model.no_weight_decay()
    with pytest.warns(UserWarning, match="ran densely"):  # its own loop over blocks
        torch.testing.assert_close(model.forward_loss(x), expected)


@pytest.mark.parametrize("own", ["MAE", "blocks and attention"])
@torch.no_grad()
def test_copies_and_files_of_a_subclass(own: str, tmp_path: Path):
    model = spot_vit.sparsify(small(own), keep=0.5, at=[1, 2])
    spot_vit.sparsify_attention(model, keep_rate=0.5)
    x = images(model)
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(other) is type(model)
        assert torch.equal(other(x), expected)
        spot_vit.restore(other)
        assert type(other) is MaskedAutoencoder and not hasattr(other, "spot_config")
    assert torch.equal(model(x), expected)

    torch.save((x, expected), tmp_path / "expected.pt")
    script = f"""
import sys, torch, spot_vit
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(model(x), expected)
print(type(spot_vit.restore(model)).__name__)
"""
    path = [str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "MaskedAutoencoder", done.stderr


@torch.no_grad()
def test_two_models_of_a_subclass_share_their_adapter():
    first, second = (spot_vit.sparsify(small("MAE"), keep=0.5, at=[1]) for _ in range(2))
    assert type(first) is type(second)
    assert type(first).__name__ == "SpotMaskedAutoencoder"


def _overriding(base: type[nn.Module], *methods: str) -> type[nn.Module]:
    """A subclass with methods that do nothing else than the base's."""

    def method(name: str) -> Any:
        return lambda self, *args, **arguments: getattr(base, name)(self, *args, **arguments)

    return type("Mine", (base,), {name: method(name) for name in methods})


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (VisionTransformer, "forward"),
        (VisionTransformer, "forward_features"),
        (VisionTransformer, "forward_head"),
        (VisionTransformer, "_pos_embed"),
        (VisionTransformer, "pool"),
        (VisionTransformer, "forward_intermediates"),
        (VisionTransformer, "__call__"),
        (Eva, "_pos_embed"),
        (Beit, "forward_features"),
    ],
)
def test_a_subclass_that_overrides_is_refused_by_the_methods_name(base: Any, method: str):
    with torch.device("meta"):
        model = _overriding(base, method, "own")(img_size=32, depth=1, embed_dim=48, num_heads=3)
    with pytest.raises(spot_vit.UnsupportedModelError, match=rf"overrides {method}, which"):
        spot_vit.sparsify(model)
    assert type(model).__name__ == "Mine"


@pytest.mark.parametrize(("base", "where"), [(Block, "blocks.1"), (Attention, "blocks.1.attn")])
def test_a_part_that_overrides_forward_is_refused(base: Any, where: str):
    model = small("blocks and attention")
    block: Any = model.blocks[1]
    (block if base is Block else block.attn).__class__ = _overriding(base, "forward")
    with pytest.raises(spot_vit.UnsupportedModelError, match=f"{where}: .*overrides forward"):
        spot_vit.sparsify(model)
    assert type(model) is MaskedAutoencoder


def test_names_that_conversion_uses_are_refused():
    class Taken(VisionTransformer):
        def _tokens(self, x: Tensor) -> Tensor:
            return x

    class Stage(Block):
        pass

    with torch.device("meta"):
        model = Taken(img_size=32, depth=1, embed_dim=48, num_heads=3)
        with pytest.raises(spot_vit.UnsupportedModelError, match="overrides _tokens"):
            spot_vit.sparsify(model)
        model = VisionTransformer(img_size=32, depth=1, embed_dim=48, num_heads=3, block_fn=Stage)
        model.blocks[0].stage = 3
        with pytest.raises(spot_vit.UnsupportedModelError, match="needs to set: stage"):
            spot_vit.sparsify(model)
    assert model.blocks[0].stage == 3


@torch.no_grad()
def test_sparse_attention_and_maps_of_a_subclass():
    model = small("blocks and attention")
    x = images(model)
    expected = model(x)
    maps = spot_vit.attention_maps(model, x)
    assert len(maps) == 4 and type(model.blocks[0].attn) is OwnAttention
    spot_vit.sparsify_attention(model, keep_rate=1.0)
    assert torch.equal(model(x), expected)
    spot_vit.set_keep(model, attention=0.3)
    assert not torch.equal(model(x), expected)
    spot_vit.restore(model)
    assert type(model.blocks[0].attn) is OwnAttention and type(model.blocks[0]) is OwnBlock
