"""`trace`: the pass is not changed, every patch has one fate, effects are what they say."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import spot_vit
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spot_vit.report.trace import Trace
from spot_vit.report.tracing import trace
from torch import Tensor

METHODS: dict[str, dict[str, Any]] = {
    "spot": {},
    "fuse": {"soft": "fuse"},
    "means": {"heads": "mean", "history": 2},
    "part": {"features": ("embed", "rowcol")},
    "dynamicvit": {"method": "dynamicvit"},
    "evit": {"method": "evit"},
    "evit, dropped": {"method": "evit", "soft": "none"},
    "random": {"method": "random"},
    "both": {},
}
SIZE = 64


def model_of(name: str, keep: float = 0.6, pool: str = "token") -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=5, embed_dim=48, num_heads=3, img_size=SIZE, num_classes=7,
        global_pool=pool,
    ).eval()  # fmt: skip
    if name == "both":
        spot_vit.sparsify_attention(model, keep_rate=0.4)
    spot_vit.sparsify(model, keep=keep, at=[1, 3], **METHODS[name])
    for parameter_name, parameter in model.named_parameters():
        if "relevance.fc3.weight" in parameter_name:  # untrained scores differ by roundings
            parameter.data.mul_(100)
    return model.eval()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_logits_have_the_same_bits_and_the_model_is_as_before(name: str, fast: bool) -> None:
    model, x = model_of(name), pictures()
    if fast:
        spot_vit.fast(model)
    model.train(False)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        expected = model(x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    found = trace(model, x)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(torch.tensor(np.stack([one.logits for one in found.images])), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(block.relevance._forward_hooks for block in model.blocks if block.relevance)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(METHODS)),
    keep=st.sampled_from([0.3, 0.5, 0.77, 0.99, 1.0]),
    count=st.integers(1, 3),
)
def test_every_patch_has_one_fate_at_every_stage(name: str, keep: float, count: int) -> None:
    model = model_of(name, keep)
    for one in trace(model, pictures(count), attention=()).images:
        alive = set(range((SIZE // 16) ** 2))
        made = 0
        for stage in one.stages:
            came = stage.position.tolist()
            assert len(came) == len(set(came)) and set(came) == alive
            kept, dropped = set(stage.position[stage.kept]), set(stage.position[~stage.kept])
            assert kept | dropped == alive and not kept & dropped
            if stage.weight is not None:
                assert (stage.weight[stage.kept] == 0).all()
                assert (stage.weight[~stage.kept] > 0).all()
            if stage.score is not None:
                assert sorted(stage.rank) == list(range(len(came)))
                assert (np.diff(stage.score[np.argsort(stage.rank)]) <= 0).all()
                assert set(stage.rank[stage.kept]) == set(range(len(kept)))  # the best stay
                if stage.cut is not None:
                    assert stage.score[stage.kept].min() >= stage.cut
                    assert stage.cut >= stage.score[~stage.kept].max()
            alive = kept
            if stage.weight is not None and stage.inside:
                alive = alive | {(SIZE // 16) ** 2 + made}
                made += 1


@pytest.mark.parametrize("name", ["spot", "means", "part", "dynamicvit", "both"])
def test_effects_are_those_of_asking_again_without_a_group(name: str) -> None:
    model, x = model_of(name), pictures(1)
    seen: dict[int, Any] = {}

    def note(b: int, module: Any, args: Any, out: Tensor) -> None:
        seen.setdefault(b, (args, out))

    handles = [
        block.relevance.register_forward_hook(partial(note, b))
        for b, block in enumerate(model.blocks)
        if block.relevance is not None
    ]
    (one,) = trace(model, x).images
    for handle in handles:
        handle.remove()
    config, heads = model.spot_config, 1 if model.spot_config.heads == "mean" else 3
    for stage in one.stages:
        (tokens, features, _), logp = seen[stage.block]
        assert list(stage.effect) == list(config.evidence)
        odds = (logp[..., 0] - logp[..., 1])[0]
        np.testing.assert_allclose(stage.score, odds.numpy(), rtol=0, atol=1e-6)
        for group, effect in stage.effect.items():
            t, f = tokens.double(), None if features is None else features.double()
            predictor = copy.deepcopy(model.blocks[stage.block].relevance).double()
            if group == "embed":
                t = t.mean(1, keepdim=True).repeat(1, t.shape[1], 1)
            else:
                latest = 2 * ("cls" in config.evidence) + 4 * ("rowcol" in config.evidence)
                for column in range(f.shape[2]):
                    kind = "moments"
                    if column < heads * latest:
                        place = column % latest
                        kind = "cls" if "cls" in config.evidence and place < 2 else "rowcol"
                    if kind == group:
                        f[..., column] = f[..., column].mean()
            with torch.no_grad():
                again, full = (
                    predictor(t, f, None)[0],
                    predictor(
                        tokens.double(), None if features is None else features.double(), None
                    )[0],
                )
            expected = (full[:, 0] - full[:, 1]) - (again[:, 0] - again[:, 1])
            np.testing.assert_allclose(effect, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_statistics_and_attention_are_those_of_the_pass(name: str) -> None:
    model, x = model_of(name), pictures(1)
    torch.manual_seed(1)
    (one,) = trace(model, x, attention="all").images
    torch.manual_seed(1)
    maps = spot_vit.attention_maps(model, x)
    assert [block.block for block in one.blocks] == list(range(5))
    for block, expected in zip(one.blocks, maps, strict=True):
        np.testing.assert_array_equal(block.position, expected.position[0])
        np.testing.assert_allclose(block.attention, expected.weights[0], rtol=2e-3, atol=1e-4)
        if block.statistics is not None:
            patches = expected.weights[0][:, block.front :, block.front :]
            np.testing.assert_allclose(block.statistics[..., 2].T, patches.mean(-1), atol=1e-6)
            np.testing.assert_allclose(block.statistics[..., 4].T, patches.mean(-2), atol=1e-6)
            np.testing.assert_allclose(
                block.statistics[..., 0].T, expected.weights[0][:, 0, block.front :], atol=1e-6
            )
        if name == "both" and block.named is not None:
            assert ((block.held > 0) & (block.held <= 1)).all()
            seen = expected.weights[0] > 0
            at = slice(block.front, None)
            np.testing.assert_array_equal(block.named.T, seen[:, at, at].sum(-1))
    computes = {block.block for block in one.blocks if block.statistics is not None}
    assert computes == ({0, 1, 2} if model.spot_config.uses_statistics and name != "part" else
                        {0, 2} if name == "part" else set())  # fmt: skip


def test_dense_logits_and_costs_are_those_of_the_model_with_everything() -> None:
    for name in ("spot", "evit", "both"):
        model, x = model_of(name), pictures(2)
        found = trace(model, x, rounds=1)
        dense = spot_vit.restore(copy.deepcopy(model))
        with torch.no_grad():
            expected = dense(x)
        logits = np.stack([one.dense_logits for one in found.images])
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        count = spot_vit.count_flops(model, (3, SIZE, SIZE))
        assert sum(layer.gmacs for layer in found.model.layers) == pytest.approx(count.total / 1e9)
        full = spot_vit.count_flops(dense, (3, SIZE, SIZE)).total / 1e9
        assert sum(layer.gmacs for layer in found.model.dense_layers) == pytest.approx(full)
        assert all(layer.ms > 0 for layer in found.model.layers + found.model.dense_layers)


def test_costs_follow_the_budget_the_weights_and_the_size_of_a_model() -> None:
    def same_as_counted(model: Any, x: torch.Tensor) -> float:
        total = sum(layer.gmacs for layer in trace(model, x, attention=()).model.layers)
        assert total == pytest.approx(spot_vit.count_flops(model, tuple(x.shape[1:])).total / 1e9)
        return total

    model, x = model_of("both"), pictures(1)
    found = [same_as_counted(model, x), same_as_counted(spot_vit.set_keep(model, 0.4), x)]
    with torch.no_grad():  # more of the basis is above its threshold
        for name, parameter in model.named_parameters():
            if "proj_back_n" in name:
                parameter.mul_(30)
    found.append(same_as_counted(model, x))
    model.blocks[0].mlp = torch.nn.Identity()
    found.append(same_as_counted(model, x))
    assert len(set(found)) == 4


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_votes_are_the_head_on_a_patch_alone(pool: str) -> None:
    model, x = model_of("spot", pool=pool), pictures(1)
    (one,) = trace(model, x).images
    with torch.no_grad():
        first = one.stages[0]
        tokens = model._tokens(x)[0]
        values = model.blocks[0](tokens)[0, 1:]
        logits = model.head(model.fc_norm(model.norm(values))).softmax(-1)
    np.testing.assert_array_equal(first.vote, logits.argmax(-1))
    np.testing.assert_allclose(first.vote_share, logits.amax(-1), atol=1e-6)


def test_sparse_attention_alone_and_compiled_models() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=SIZE, num_classes=4).eval()
    with pytest.raises(TypeError, match="converted model"):
        trace(model, pictures())
    spot_vit.sparsify_attention(model, keep_rate=0.3)
    found = trace(model, pictures())
    with torch.no_grad():
        expected = model(pictures())
    assert torch.equal(torch.tensor(np.stack([one.logits for one in found.images])), expected)
    assert not found.images[0].stages and found.images[0].blocks[-1].held is not None
    compiled = torch.compile(model_of("spot"), backend="eager")
    assert "compiled" in trace(compiled, pictures()).notes[0]


def test_names_labels_and_pictures(tmp_path: Any) -> None:
    model, x = model_of("spot"), pictures(3)
    names = ["<script>alert(1)</script>", 'a "quoted"\u202e name', "x" * 10_000]
    found = trace(model, x, [0, 6, 2], names)
    assert [one.name for one in found.images] == names
    assert {"date", "processor", "torch", "spot"} <= set(found.facts)
    assert [one.label for one in found.images] == [0, 6, 2]
    picture = found.images[0].picture
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    shown = (x[0].permute(1, 2, 0) * std + mean).clamp(0, 1)
    np.testing.assert_allclose(picture / 255, shown, atol=0.003)
    for wrong in ({"labels": [1]}, {"names": ["a"]}, {"attention": [9]}, {"attention": "some"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            trace(model, x, **wrong)
    found.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json").images[1].name == names[1]
