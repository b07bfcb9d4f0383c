"""Checkpoints: weights and configuration, and writers that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import spot_vit
import timm
import torch
from spot_vit.training.checkpoint import load_checkpoint, read_config, save_checkpoint
from spot_vit.utils.modes import unwrap
from support.training import make_model
from torch import nn

SIZES = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
ROOT = Path(__file__).resolve().parents[2]


def test_checkpoints_bring_weights_and_config_back(tmp_path: Path) -> None:
    path, model, other = tmp_path / "new" / "model.safetensors", make_model(0), make_model(1)
    config = {"keep": 0.6, "at": [1, 2, 3], "name": "ä"}
    save_checkpoint(path, model, config)
    assert read_config(path) == config
    assert load_checkpoint(path, other) == config
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
    assert os.listdir(path.parent) == [path.name]
    save_checkpoint(path, model)
    assert load_checkpoint(path, other) == {}


def spot_model(seed: int = 0, **fields: Any) -> Any:
    """A SPOT model; seeds differ in their weights."""
    torch.manual_seed(seed)
    return spot_vit.sparsify(timm.create_model("vit_tiny_patch16_224", **SIZES), **fields)


def refused(path: Path, model: nn.Module, words: str) -> None:
    """Loading fails with these words and the name of the file, and changes nothing."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(path, model)
    assert path.name in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "dynamicvit"},
        {"at": [1, 2]},
        {"features": ["embed", "moments"]},
        {"history": 1},
        {"heads": "mean"},
        {"scaling": "n"},
        {"soft": "fuse"},
        {"d_remap": 16},
    ],
)
def test_a_model_converted_otherwise_is_refused_by_field(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    """Several of these have the same names and shapes: a state dict would fit."""
    path = tmp_path / "spot.safetensors"
    save_checkpoint(path, spot_model(at=[1, 2, 3]))
    (field,) = fields
    refused(path, spot_model(1, **{"at": [1, 2, 3], **fields}), rf"{field} was .* in the model")


def test_budgets_stay_as_the_model_has_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="spot_vit")
    path, model, other = tmp_path / "spot.safetensors", spot_model(keep=0.5), spot_model(1, tau=2.0)
    save_checkpoint(path, model)
    load_checkpoint(path, other)
    assert other.spot_config.keep == 0.7
    said = caplog.text
    assert "spot.safetensors: keep was 0.5 and is 0.7 in the model" in said
    assert "tau was 1.0 and is 2.0" in said
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())


def test_sparse_attention_travels_with_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    settings = {"reduce_n": 2, "coef_topk": 3}
    model = spot_vit.sparsify_attention(spot_model(), 0.25, **settings)
    save_checkpoint(path, model)
    load_checkpoint(path, spot_vit.sparsify_attention(spot_model(1), 0.5, **settings))
    other = spot_vit.sparsify_attention(spot_model(1), 0.5, **{**settings, "coef_topk": 4})
    refused(path, other, "coef_topk was 3 and is 4 in the model")
    refused(path, spot_model(1), r"sparsify_attention\(model, reduce_n=2, coef_topk=3, blocks=")


def test_dense_models_and_converted_ones(tmp_path: Path) -> None:
    dense, spot = tmp_path / "dense.safetensors", tmp_path / "spot.safetensors"
    save_checkpoint(dense, spot_vit.restore(spot_model()))
    save_checkpoint(spot, spot_model(scaling="raw"))
    refused(dense, spot_model(1), "of a model without sparsify: load them first, then convert")
    words = r"convert the model first: sparsify\(model, at=\(1, 2, 3\), scaling='raw'\)"
    refused(spot, spot_vit.restore(spot_model(1)), words)


def test_wrappers_on_either_side(tmp_path: Path) -> None:
    path, model = tmp_path / "spot.safetensors", spot_model()
    state = model.state_dict()
    blocks = spot_model(1)
    for b, block in enumerate(blocks.blocks):
        blocks.blocks[b] = torch.compile(block)
    wrapped = {"plain": model, "compiled": torch.compile(model), "parallel": nn.DataParallel(model)}
    for saved in wrapped.values():
        save_checkpoint(path, saved)
        for loaded in (spot_model(1), nn.DataParallel(torch.compile(spot_model(1))), blocks):
            load_checkpoint(path, loaded)
            own = unwrap(loaded).state_dict()
            assert own.keys() == state.keys() or loaded is blocks
            for (name, value), expected in zip(own.items(), state.values(), strict=True):
                assert torch.equal(value, expected), name
        refused(path, nn.DataParallel(spot_model(1, heads="mean")), "heads was 'concat'")


def test_another_size_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    path, small = tmp_path / "model.safetensors", {**SIZES, "num_classes": 3}
    model = spot_vit.sparsify(timm.create_model("vit_tiny_patch16_224", **small))
    save_checkpoint(path, model)
    refused(path, spot_model(1), r"head.weight is \(3, 48\).*num_classes.*reset_classifier")
    save_checkpoint(path, spot_vit.restore(model))
    refused(path, nn.Linear(4, 2), r"missing bias, weight; unexpected blocks.0")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", spot_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[2, 3] = float("nan")
    save_checkpoint(path, model)  # it shall be possible to look at it
    refused(path, spot_model(1), "numbers in blocks.1.mlp.fc1.weight: ")


def test_files_that_are_damaged_or_of_others(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", spot_model()
    save_checkpoint(path, model, {"step": 3})
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:1000], whole[:-8]):
        path.write_bytes(content)
        refused(path, model, "was not read.* damaged")
        with pytest.raises(ValueError, match=r"model\.safetensors was not read.* damaged"):
            read_config(path)
    torch.save(model.state_dict(), path)
    refused(path, model, "was not read.* damaged, or no checkpoint")
    safetensors.torch.save_model(model, str(path), {"format": "pt", "config": "no JSON {"})
    for read in (read_config, lambda path: load_checkpoint(path, model)):
        with pytest.raises(ValueError, match=r"model\.safetensors was not written by save_check"):
            read(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(tmp_path / "absent.safetensors", model)


def test_files_of_older_versions_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="spot_vit")
    path, model, other = tmp_path / "model.safetensors", spot_model(), spot_model(1)
    safetensors.torch.save_file(model.state_dict(), path, {"config": '{"step": 3}'})
    assert load_checkpoint(path, other) == {"step": 3} and "older version" in caplog.text
    assert torch.equal(other.head.weight, model.head.weight)


KILLED_WRITERS = """
import itertools, os, signal, sys, time
import torch
from torch import nn
from spot_vit.training.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)  # fork and thread pools do not mix
path, steps, model = sys.argv[1], itertools.count(), nn.Linear(1000, 1000)
save_checkpoint(path, model, {"step": -1})
for trial in range(30):
    pid = os.fork()
    if pid == 0:
        for step in steps:
            nn.init.constant_(model.weight, step)
            nn.init.constant_(model.bias, step)
            save_checkpoint(path, model, {"step": step})
    time.sleep(0.02 + 0.003 * trial)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    step = load_checkpoint(path, model)["step"]
    assert step == -1 or ((model.weight == step).all() and (model.bias == step).all()), step
    left = os.listdir(os.path.dirname(path))
    print(trial, step, len(left))
"""


def test_a_killed_writer_never_leaves_a_broken_checkpoint(tmp_path: Path) -> None:
    """kill -9 at 30 moments: what lies under the name is always one whole step."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"}
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(trials) == 30
    assert max(count for _, _, count in trials) > 1, "no kill fell into a write"
