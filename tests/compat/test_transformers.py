"""Hugging Face's vision models, converted: ViT, DINOv2, SigLIP, DINOv3, with random weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.models.loop import SpotOutput
from support import foreign
from support.slow import most_slow
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
WIDE = {**SIZES, "intermediate_size": 96}
NARROW = {**SIZES, "mlp_ratio": 2}
CLASSES = {"num_labels": 7}


def _siglip(**extra: Any) -> Any:
    config = transformers.SiglipConfig(vision_config={**WIDE, **extra}, text_config={}, **CLASSES)
    return transformers.SiglipForImageClassification(config)


def _of(name: str, config: str, sizes: dict[str, Any], **own: Any) -> Any:
    """A builder of a model, to which a test may give more of its configuration."""

    def make(**extra: Any) -> Any:
        cls, settings = getattr(transformers, name), getattr(transformers, config)
        return cls(settings(**{**sizes, **CLASSES, **own, **extra}))

    return make


REGISTERS = {"num_register_tokens": 3}
MODELS = {
    "ViT": _of("ViTForImageClassification", "ViTConfig", WIDE),
    "ViT, pooler": _of("ViTModel", "ViTConfig", WIDE),
    "DINOv2": _of("Dinov2ForImageClassification", "Dinov2Config", NARROW),
    "DINOv2, no head": _of("Dinov2Model", "Dinov2Config", NARROW),
    "DINOv2, registers": _of(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        NARROW,
        **REGISTERS,
    ),
    "DINOv2, registers, no head": _of(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", NARROW, **REGISTERS
    ),
    "SigLIP": _of("SiglipVisionModel", "SiglipVisionConfig", WIDE),
    "SigLIP, classes": _siglip,
    "DINOv3": _of("DINOv3ViTModel", "DINOv3ViTConfig", WIDE, **REGISTERS, pos_embed_rescale=None),
}
CLASSIFIERS = ["ViT", "DINOv2", "DINOv2, registers", "SigLIP, classes"]
ONE_EACH = ["ViT", "DINOv2, registers", "SigLIP", "DINOv3"]


def build(name: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    return foreign.filled(MODELS[name](**extra), dtype)


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def read(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.pooler_output


@pytest.mark.parametrize("name", MODELS)
def test_keep_1_is_bit_exact(name: str):
    foreign.check_bit_exact(build(name), images(), read)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_other_implementations_of_attention(implementation: str):
    model = build("ViT", attn_implementation=implementation)
    foreign.check_bit_exact(model, images(), read)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", MODELS)
def test_masked_training_equals_compacted_inference(name: str):
    model = build(name, torch.float64)
    foreign.check_masked_equals_compacted(model, images(torch.float64), read)


@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_every_parameter(name: str):
    model = build(name)
    keys = [key for key, _ in model.named_parameters()]
    unused = [key for key in keys if key.endswith("mask_token")]
    if name == "SigLIP, classes":  # its classifier reads the mean, not the pooling
        unused += [key for key in keys if key.startswith("vision_model.head.")]
    foreign.check_gradients(model, images(batch=8), tuple(unused))


@pytest.mark.parametrize("name", most_slow(["ViT", "SigLIP, classes", "DINOv3"]))
def test_object_life(name: str, tmp_path: Path):
    foreign.check_object_life(build(name), images(), read, tmp_path)


@pytest.mark.parametrize("name", ONE_EACH)
def test_sparse_attention_and_maps(name: str):
    foreign.check_sparse_attention(build(name), images(), read)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_distillation(name: str):
    foreign.check_distillation(build(name), images())


@pytest.mark.parametrize("name", most_slow(ONE_EACH))
def test_compiled(name: str):
    foreign.check_compiled(build(name), images(), read)


@pytest.mark.parametrize("name", ["ViT", "DINOv2, registers", "SigLIP, classes", "DINOv3"])
def test_budgets(name: str):
    foreign.check_budgets(build(name))


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("training", [False, True])
def test_labels_give_the_loss_of_the_tokens_that_are_kept(name: str, training: bool):
    model = spot_vit.sparsify(build(name, torch.float64), keep=0.5, at=[1, 3])
    x, labels = images(torch.float64), torch.tensor([1, 5, 2])
    with torch.no_grad():
        kept = model(x, aux=True).index
    out = model.train(training)(x, labels=labels, kept=kept)
    assert type(out).__name__ == "ImageClassifierOutput"
    expected = nn.functional.cross_entropy(model.eval()(x, kept=kept).logits, labels)
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-10)
    out.loss.backward()
    as_tuple = model(x, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[1].shape == (3, 7)


@pytest.mark.parametrize("name", ONE_EACH)
@torch.no_grad()
def test_outputs_hold_survivors_and_hidden_states(name: str):
    model = build(name)
    x = images()
    spot_vit.sparsify(model, keep=0.5, at=[1, 3])
    prefix = model.num_prefix_tokens
    out = model(x, aux=True)
    assert isinstance(out, SpotOutput) and out.tokens.shape == (3, prefix + 4, 48)
    theirs = model(x, output_hidden_states=True)
    if "last_hidden_state" in theirs:
        torch.testing.assert_close(theirs.last_hidden_state, out.tokens)
    counts = [state.shape[1] - prefix for state in theirs.hidden_states]
    assert counts == [16, 16, 8, 8, 4, 4]
    # The same pass in a loop of one's own.
    run = spot_vit.TokenPass(model, x)
    torch.testing.assert_close(model.norm(run.run()), out.tokens)
    features, maps = model.forward_intermediates(x, indices=[4])
    torch.testing.assert_close(features, out.tokens)
    assert maps[0].shape == (3, 48, 4, 4)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), out.logits)


@pytest.mark.parametrize("method", ["dynamicvit", "random"])
@pytest.mark.parametrize("name", ONE_EACH)
@torch.no_grad()
def test_other_methods(name: str, method: str):
    model = spot_vit.sparsify(build(name), method=method, keep=0.5, at=[1, 3])
    assert read(model(images())).isfinite().all()


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "DINOv3"])
def test_fused_tokens_are_not_left_to_the_head(name: str):
    model = spot_vit.sparsify(build(name, torch.float64), keep=0.5, at=[1, 3], soft="fuse")
    x = images(torch.float64)
    with torch.no_grad():
        out = model(x, aux=True)
        assert out.tokens.shape[1] == model.num_prefix_tokens + 4
        again = read(model(x))
        masked = read(model.train()(x, kept=out.index))
    torch.testing.assert_close(again, out.logits, rtol=0, atol=1e-10)
    assert masked.shape == again.shape


@pytest.mark.parametrize("name", ONE_EACH)
def test_gradient_checkpointing_changes_no_gradient(name: str):
    model = spot_vit.sparsify(build(name), keep=0.6, at=[1, 2, 3]).train()
    x = images()

    def gradients() -> list[Tensor | None]:
        torch.manual_seed(3)
        model.zero_grad()
        out = model(x, aux=True)
        (out.logits.sum() + sum(mask.sum() for mask in out.masks)).backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant"):
        model(x.requires_grad_(), aux=True)


@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_what_does_not_fit_is_refused(name: str):
    model = build(name)
    with pytest.raises(ValueError, match="no class token" if name == "SigLIP" else "one piece"):
        spot_vit.sparsify(model, method="evit")
    dropping = "attention_dropout" if name == "SigLIP" else "attention_probs_dropout_prob"
    with pytest.raises(spot_vit.UnsupportedModelError, match="attention dropout"):
        spot_vit.sparsify(build(name, **{dropping: 0.1}))
    spot_vit.sparsify(model, keep=0.5)
    with pytest.raises(ValueError, match="attention_maps"):
        model(images(), output_attentions=True)
    if name == "ViT":
        with pytest.raises(ValueError, match="attention_mask"):
            model(images(), attention_mask=torch.ones(3, 17))


def test_a_model_without_an_adapter_is_refused():
    config = transformers.CLIPVisionConfig(**WIDE)
    with pytest.raises(spot_vit.UnsupportedModelError, match="CLIPVisionModel"):
        spot_vit.sparsify(transformers.CLIPVisionModel(config))


class Probe(transformers.ViTForImageClassification):
    """A user's class, which adds to one of the library's."""

    def describe(self) -> str:
        return f"{self.config.num_labels} classes"


@torch.no_grad()
def test_subclasses_and_shared_configurations():
    config = transformers.ViTConfig(**WIDE, **CLASSES)
    teacher = foreign.filled(transformers.ViTForImageClassification(config))
    x = images()
    expected = teacher(x).logits
    model = foreign.filled(Probe(config))
    spot_vit.sparsify(model, keep=0.5, at=[1, 3])
    assert model.describe() == "7 classes"
    assert not torch.allclose(copy.deepcopy(model)(x).logits, expected)
    assert torch.equal(teacher(x).logits, expected)
    assert type(spot_vit.restore(model)) is Probe

    class Mine(transformers.ViTModel):
        def forward(self, *args: Any, **arguments: Any) -> Any:
            return super().forward(*args, **arguments)

    with pytest.raises(spot_vit.UnsupportedModelError, match="overrides forward"):
        spot_vit.sparsify(Mine(config))


def test_nothing_is_imported_before_a_model_is_given():
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import spot_vit, spot_vit.models.convert, timm
spot_vit.sparsify(timm.create_model("test_vit"), keep=0.5, at=[1])
print([name for name in sys.modules if name == "transformers" or "torchvision_vit" in name])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
    named = [name for name in spot_vit.supported() if name.startswith("transformers.")]
    assert len(named) == 9


@torch.no_grad()
def test_a_tower_converts_inside_its_model():
    config = transformers.SiglipConfig(
        vision_config=WIDE,
        text_config={**WIDE, "vocab_size": 50, "max_position_embeddings": 8},
    )
    model = foreign.filled(transformers.SiglipModel(config))
    x, words = images(), torch.arange(24).reshape(3, 8)
    expected = model(input_ids=words, pixel_values=x).logits_per_image
    spot_vit.sparsify(model.vision_model, keep=1.0, at=[1, 3])
    assert torch.equal(model(input_ids=words, pixel_values=x).logits_per_image, expected)
    spot_vit.set_keep(model.vision_model, 0.5)
    sparse = model(input_ids=words, pixel_values=x)
    assert sparse.logits_per_image.isfinite().all()
    assert not torch.allclose(sparse.logits_per_image, expected)
    assert sparse.vision_model_output.last_hidden_state.shape == (3, 4, 48)
