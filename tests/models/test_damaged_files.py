"""Files of weights with wrong bytes, or made to do harm: the documented error, soon, in one line.

Zip files of `torch.save` have checksums, so a damaged one never gives other tensors. Safetensors
have none: there, what is read has the shapes that the model asks for, and finite numbers.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import spot_vit
import timm
import torch
from spot_vit import convert_checkpoint, load, load_checkpoint, save, save_checkpoint
from spot_vit.models.checkpoint_files import PREFIXES, short_name
from spot_vit.training.checkpoint import read_config
from spot_vit.utils.errors import UserError
from support.night import nightly
from support.published import random_state
from torch import Tensor, nn

SECONDS, BYTES = 2.0, 2**30
SIZES = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def dense() -> nn.Module:
    return timm.create_model("deit_small_patch16_224", **SIZES)


def spot() -> nn.Module:
    return spot_vit.sparsify(dense(), keep=0.5, at=[1, 2])


def damaged(whole: bytes, dice: random.Random, end: int | None = None) -> bytes:
    """The bytes with some flipped, cut off or put in; `end` is where what may be hit ends."""
    content, size = bytearray(whole), end or len(whole)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        place = dice.randrange(size)
        match dice.randrange(4):
            case 0 | 1:
                content[place] ^= 1 << dice.randrange(8)
            case 2:
                del content[place : place + dice.choice((1, 4, len(content)))]
            case 3:
                content[place:place] = dice.randbytes(dice.choice((1, 8, 64)))
        if len(content) <= size:
            break
    return bytes(content)


def hardest(whole: bytes, format: str) -> int | None:
    """Where the part ends that every second damage hits: headers of safetensors."""
    return 8 + struct.unpack("<Q", whole[:8])[0] if format == "safetensors" else None


def outcomes(
    path: Path, read: Callable[[Path], Any], contents: Iterator[bytes]
) -> Iterator[Any | None]:
    """What reading gives of each content, None for a refusal that names the file and its fault."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in contents:
        path.write_bytes(content)
        began = time.perf_counter()
        try:
            yield read(path)
        except ValueError as error:
            assert str(path) in str(error), error
            assert len(str(error)) < 20_000
            yield None
        assert time.perf_counter() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def write_published(path: Path) -> dict[str, Tensor]:
    state = random_state("deit", dim=24, depth=3, classes=5, patches=4)
    torch.save({"model": state, "epoch": 3}, path)
    return state


COUNTS = [
    40,
    pytest.param(nightly(2000), marks=pytest.mark.nightly, id="night"),
]


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_zip_of_torch_gives_its_tensors_or_the_error(tmp_path: Path, count: int) -> None:
    path, dice = tmp_path / "x.pth", random.Random(count)
    state = write_published(path)
    whole = path.read_bytes()
    read = 0
    contents = (damaged(whole, dice) for _ in range(count))
    for found in outcomes(path, lambda path: convert_checkpoint(path, "deit"), contents):
        if found is not None:
            read += 1
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], value) for name, value in state.items())
    assert read < count / 2  # what is not read by anybody, such as padding


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_files_of_torch_before_its_zips(tmp_path: Path, count: int) -> None:
    path, dice, model = tmp_path / "x.pth", random.Random(count), dense()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    begin = len(whole) - sum(4 * value.numel() for value in model.state_dict().values())
    contents = (damaged(whole, dice, begin) for _ in range(count))
    for found in outcomes(path, lambda path: convert_checkpoint(path, "deit", model), contents):
        if found is not None:
            assert {name: value.shape for name, value in found.items()} == shapes


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("reader", ["load", "load_checkpoint", "convert_checkpoint"])
def test_damaged_safetensors_give_what_fits_or_the_error(
    tmp_path: Path, reader: str, count: int
) -> None:
    path, dice = tmp_path / "x.safetensors", random.Random(count)
    model = dense() if reader == "convert_checkpoint" else spot()
    if reader == "load":
        save(path, model, classes=list("abcde"))
    elif reader == "load_checkpoint":
        save_checkpoint(path, model, {"step": 3})
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    whole = path.read_bytes()
    end = hardest(whole, "safetensors")

    def read(path: Path) -> dict[str, Tensor]:
        if reader == "load":
            return load(path).state_dict()
        if reader == "load_checkpoint":
            load_checkpoint(path, model)
            return model.state_dict()
        return convert_checkpoint(path, "deit", model)

    shapes = {name: value.shape for name, value in model.state_dict().items()}
    contents = (damaged(whole, dice, dice.choice((None, end))) for _ in range(count))
    for found in outcomes(path, read, contents):
        if found is not None:
            assert {name: value.shape for name, value in found.items()} == shapes
            assert all(value.isfinite().all() for value in found.values())


# ---- made to do harm -----------------------------------------------------------------------------


def refused(
    state: dict[str, Any], words: str, source: str = "deit", model: nn.Module | None = None
) -> str:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=words) as caught:
        convert_checkpoint(state, source, model)
    assert time.perf_counter() - began < SECONDS
    return str(caught.value)


@pytest.mark.parametrize("number", ["100000", "1" + 18 * "0", 5000 * "9", "٣" * 30])
@pytest.mark.parametrize("prefix", ["blocks", "score_predictor"])
def test_numbers_in_names_cost_nothing(number: str, prefix: str) -> None:
    state = random_state("deit", dim=24, depth=3, classes=5, patches=4, stages=3)
    source = "dynamicvit" if prefix == "score_predictor" else "deit"
    state = state if source == "dynamicvit" else random_state("deit", dim=24, classes=5)
    text = refused({**state, f"{prefix}.{number}.norm1.weight": torch.ones(2)}, "not a che", source)
    assert f"unexpected {prefix}.{number}"[:100] in text and len(text) < 5000


def test_names_of_any_length_and_many_prefixes() -> None:
    assert short_name(200_000 * "module." + "_orig_mod.x") == ("x", ["_orig_mod.", "module."])
    assert short_name("".join(reversed(PREFIXES)) + "x")[0] == "x"
    refused({"x" * 10**6: torch.ones(1)}, "not a checkpoint")
    model = spot_vit.sparsify(dense(), method="dynamicvit", keep=0.5)
    state = {**dense().state_dict(), "blocks.x.relevance.norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match="not a checkpoint"):
        convert_checkpoint(state, "deit", model)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.complex64, "complex"), (torch.int64, "whole"), (torch.bool, "whole")]
)
def test_weights_of_another_kind_of_number_are_refused(dtype: torch.dtype, kind: str) -> None:
    model, state = dense(), dense().state_dict()
    before = model.head.weight.clone()
    state["head.weight"] = torch.ones_like(state["head.weight"]).to(dtype)
    words = rf"head.weight is {kind} \(torch\.\w+\), the model has real"
    refused(state, words, model=model)
    assert torch.equal(model.head.weight, before)
    half = {name: value.half() for name, value in dense().state_dict().items()}
    convert_checkpoint(half, "deit", model)  # rounded numbers are still these numbers


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to("meta"),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_refused(odd: Callable[[Tensor], Tensor]) -> None:
    state = dense().state_dict()
    state["head.weight"] = odd(state["head.weight"])
    refused(state, r"sparse, nested, quantised or without memory in head\.weight")


DEEP = 100_000 * "[" + 100_000 * "]"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config", DEEP, "config must be dict, got NoneType"),
        ("conversion", DEEP, "conversion must be dict"),
        ("conversion", 10_000 * "9", "conversion must be dict"),
        ("conversion", '{"spot": []}', "may not be the versions"),
        ("conversion", '{"spot": {"at": [1e300]}}', "may not be the versions.*at must be"),
        ("conversion", '{"spot": {"keep": NaN}}', "may not be the versions.*keep must be"),
        ("architecture", "[]", "architecture must be str, got list"),
        ("architecture", '"hf-hub:someone/model"', "does not know"),
        ("architecture", '"local-dir:/"', "does not know"),
        ("architecture", '"spot_vit"', "does not know"),
        ("architecture", '"vit_7b_patch16_dinov3"', "does not fit"),
        ("arguments", "3", "arguments must be dict"),
        ("arguments", '{"depth": 1000000000}', r"asks for depth=1000000000, more than \d+$"),
        ("arguments", '{"depth": 1e999}', "asks for depth=inf"),
        ("arguments", '{"embed_dim": 1e30}', "asks for embed_dim"),
        ("arguments", '{"embed_dim": 100000, "num_heads": 1000}', "does not fit"),
        ("arguments", '{"num_heads": 0}', "may not be the versions"),
        ("arguments", '{"act_layer": "nothing"}', "may not be the versions"),
        ("arguments", '{"checkpoint_path": "/etc/passwd"}', "asks for checkpoint_path"),
        ("arguments", '{"pretrained": true}', "asks for pretrained"),
        ("classes", '"abc"', "classes must be list or none"),
    ],
)
def test_what_stands_beside_the_weights_does_no_harm(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    save(path, model)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    load(path)
    safetensors.torch.save_file(model.state_dict(), path, {**metadata, name: text})
    began = time.perf_counter()
    with pytest.raises(UserError, match=words) as caught:
        load(path)
    assert time.perf_counter() - began < SECONDS + 2  # seven billion weights without memory
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", [DEEP, "3", "[1]", '{"spot": 3}', '{"spot": {"tau": 1e999}}'])
def test_a_checkpoint_whose_conversion_is_nonsense(tmp_path: Path, text: str) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    safetensors.torch.save_file(model.state_dict(), path, {"config": "{}", "conversion": text})
    if text == DEEP:  # as good as none, which older files have
        assert load_checkpoint(path, model) == {}
    else:
        with pytest.raises(ValueError, match=r"x\.safetensors.*(how they were converted|tau must)"):
            load_checkpoint(path, model)


def header(content: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        header({"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}, b"1234"),
        header({"x": {"dtype": "F32", "shape": [2**31, 2**33], "data_offsets": [0, 0]}}),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}}, b"1234"),
        header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header({"x": {"dtype": "none", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"__metadata__": {"config": {}}}),
        header({"../../x": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}),
    ],
)
def test_headers_of_safetensors(tmp_path: Path, content: bytes) -> None:
    path, model = tmp_path / "x.safetensors", spot()
    path.write_bytes(content)
    readers: tuple[Callable[[], Any], ...] = (
        lambda: load(path),
        lambda: load_checkpoint(path, model),
        lambda: convert_checkpoint(path, "deit"),
    )
    for read in readers:
        began = time.perf_counter()
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            read()
        assert time.perf_counter() - began < SECONDS


@pytest.mark.parametrize("text", ["{", DEEP, "[]", "{}", '{"architecture": "../x"}'])
def test_folders_of_the_hub(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot be built by timm") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).mkdir()
        for read in (lambda path: convert_checkpoint(path, "deit"), read_config):
            with pytest.raises(UserError, match=rf"{name} cannot be read: Is a directory"):
                read(tmp_path / name)
