"""Files of every format give what their models give, and nothing else appears under their names."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.export import export_model, formats, make, open_exported, verify, writers
from spot_vit.export.standalone import KEY
from spot_vit.utils.errors import UserError
from support.exported import DECIDING, KINDS, needs, python, small, written
from support.models import images
from support.slow import most_slow

SETTINGS = [(format, "both") for format in ("onnx", "openvino", "torch")]
SETTINGS += [("onnx", "dynamicvit")]
OFTEN = len(SETTINGS)
SETTINGS += [("torch", "spot"), ("aoti", "spot")]
for format in ("onnx", "openvino", "torch"):
    SETTINGS += [(format, kind) for kind in KINDS if (format, kind) not in SETTINGS]


@pytest.mark.parametrize(("format", "kind"), most_slow(SETTINGS, OFTEN))
@torch.no_grad()
def test_a_file_gives_what_its_model_gives(format: str, kind: str, tmp_path: Path) -> None:
    """For any number of images: the same patches, and logits to 1e-4."""
    needs(format)
    model, said = small(kind), []
    asked = [p.requires_grad for p in model.parameters()]
    path = tmp_path / f"new folder/model{formats.ENDINGS[format]}"
    assert export_model(model, path, format, say=said.append) == path
    assert said[-1].startswith("verified")
    file = open_exported(path)
    for number in (1, 3, 5):
        x = images(model, number, seed=number)
        found = file.decisions(x)
        if kind in DECIDING:
            out = model(x, aux=True)
            assert len(found) == 3
            assert all(map(torch.equal, found[1:], out.index))
        else:
            assert len(found) == 1
        assert (file(x) - model(x)).abs().max() < 1e-4
        assert torch.equal(file(x), found[0])
    beside = ["model.bin"] if format == "openvino" else []
    assert written(path.parent) == [*beside, path.name]
    assert [p.requires_grad for p in model.parameters()] == asked


@pytest.mark.parametrize("kind", ["dense", "spot", "evit", "both"])
def test_onnx_has_standard_operators_only(kind: str, tmp_path: Path) -> None:
    needs("onnx")
    import onnx

    export_model(small(kind), tmp_path / "m.onnx", "onnx", opset=21)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("TopK") == {"dense": 0, "both": 6}.get(kind, 4)
    assert "Sort" not in kinds and "Einsum" not in kinds and "CumSum" not in kinds
    (given,) = model.graph.input
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(held[KEY])["opset"] == 21


def test_metadata(tmp_path: Path) -> None:
    """What the model came with, what was given, and what the file needs."""
    model, path = small("both"), tmp_path / "m.pt2"
    names = [f"class {c}" for c in range(7)]
    given = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}
    export_model(model, path, "torch", classes=names, data_config=given, verify=False)
    extra = {f"{KEY}.json": ""}
    torch.export.load(path, extra_files=extra)
    found = json.loads(extra[f"{KEY}.json"])
    assert found == open_exported(path).metadata
    assert found["architecture"] == "vit_tiny_patch16_224" and found["format"] == "torch"
    assert found["conversion"]["spot"] == json.loads(json.dumps(model.spot_config.to_dict()))
    assert (found["keep"], found["attention_keep"], found["opset"]) == (0.6, 0.5, None)
    assert found["classes"] == names
    config = found["data_config"]
    assert config["mean"] == [0.1, 0.2, 0.3] and config["crop_pct"] == 0.5
    assert config["input_size"] == [3, 64, 64] and config["interpolation"] == "bicubic"
    assert found["inputs"] == {"images": ["batch", 3, 64, 64]}
    assert found["outputs"]["logits"] == ["batch", 7] and list(found["outputs"])[2] == "kept_2"
    assert "spot::sparse_attention" in found["operators"] and "spot_ext" in found["needs"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["gmacs"] == pytest.approx(spot_vit.count_flops(model, (3, 64, 64)).total / 1e9)


WRONG: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "format": (lambda m: m, "onxn", {}, "expected one of torch, aoti, onnx, openvino, got 'onxn'"),
    "training": (lambda m: m.train(), "onnx", {}, r"training mode.*model\.eval\(\)"),
    "dtype": (lambda m: m.double(), "onnx", {}, r"float64: call model\.float\(\)"),
    "device": (lambda m: m.to("meta"), "onnx", {}, r"on meta: call model\.cpu\(\)"),
    "not a model": (lambda m: "model", "onnx", {}, "expected a model, got str"),
    "size": (lambda m: m, "onnx", {"image_size": 96}, "built for 64x64.*set_input_size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_exported(case: str, tmp_path: Path) -> None:
    needs("onnx")
    change, format, extra, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        export_model(change(small("spot")), tmp_path / "m.onnx", format, **extra)
    assert written(tmp_path) == []


def test_a_fast_model_is_refused(tmp_path: Path) -> None:
    fast = pytest.importorskip("spot_vit.models.fast").fast
    with pytest.raises(UserError, match="export it before"):
        export_model(fast(small("spot")), tmp_path / "m.pt2", "torch")


def test_chance_is_refused(tmp_path: Path) -> None:
    model = spot_vit.sparsify(small("dense"), method="random", keep=0.5)
    with pytest.raises(UserError, match="draws its tokens anew"):
        export_model(model.eval(), tmp_path / "m.pt2", "torch")


def test_names_of_files(tmp_path: Path) -> None:
    model = small("dense")
    with pytest.raises(UserError, match=r"ends in \.pt2"):
        export_model(model, tmp_path / "m.onnx", "torch")
    with pytest.raises(UserError, match="is a folder"):
        export_model(model, tmp_path, "torch")
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is there already"):
            make.check_target(tmp_path / "m.xml", "openvino")
        (tmp_path / name).unlink()
    (tmp_path / "m.pt2").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_model(model, tmp_path / "m.pt2", "torch")
    assert (tmp_path / "m.pt2").read_text() == "mine"
    export_model(model, tmp_path / "m.pt2", "torch", verify=False, force=True)
    assert open_exported(tmp_path / "m.pt2").num_classes == 7


def test_a_format_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"openvino are not installed: pip install 'spot-vit\[exp"):
        export_model(small("dense"), tmp_path / "m.xml", "openvino")
    assert formats.available()["torch"] is None and formats.available()["onnx"] is not None


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, path = small("dense"), tmp_path / "m.pt2"
    with monkeypatch.context() as patch:
        patch.setattr(make.shutil, "copyfileobj", full)
        with pytest.raises(UserError, match=r"m\.pt2 cannot be written.*make room"):
            export_model(model, path, "torch", verify=False)
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(UserError, match="is full: make room there, or name another folder"):
        export_model(model, path, "torch", verify=False)
    assert written(tmp_path) == []


# ---- verification --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "by", "message"),
    [
        (
            "model.head.bias",
            2e-4,
            r"on 1 random image the largest difference of a logit is 2\.0e-04",
        ),
        ("model.blocks.1.relevance.fc3.weight", None, "decision 1 has other patches in"),
    ],
)
def test_a_wrong_file_does_not_appear(
    place: str, by: float | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits a little off, or another order of the scores: the largest difference is named."""
    write = writers.write

    def wrong(program: Any, path: Path, metadata: Any) -> None:
        tensor = program.state_dict[place]
        changed = -tensor if by is None else tensor + by
        program.state_dict[place] = torch.nn.Parameter(changed.detach(), requires_grad=False)
        write(program, path, metadata)

    monkeypatch.setattr(make, "write", wrong)
    with pytest.raises(UserError, match=message):
        export_model(small("spot"), tmp_path / "m.pt2", "torch")
    assert written(tmp_path) == []


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"does not run: .*does not say what it is of"):
        verify.verify(small("spot"), tmp_path / "m.pt2", (3, 64, 64))


def test_decisions_that_hang_on_rounding_are_not_taken_for_verified() -> None:
    """Predictors that score all patches alike."""
    model = small("dynamicvit")
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.relevance.fc3.weight.zero_()
    with pytest.raises(UserError, match="hangs on rounding"):
        verify.firm_images(model, 2, (3, 64, 64), 0)


def test_images_are_firm() -> None:
    model = small("spot")
    x = verify.firm_images(model, 6, (3, 64, 64), 0)
    assert x.shape == (6, 3, 64, 64)
    with torch.no_grad():
        exact = small("spot").double()(x.double(), aux=True)
        assert all(map(torch.equal, model(x, aux=True).index, exact.index))


# ---- without spot_vit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load", most_slow(["import spot_ext", "torch.ops.load_library(sys.argv[3])"])
)
def test_loading_by_torch_alone(load: str, tmp_path: Path) -> None:
    """As the page says: with spot_ext, or with its library alone."""
    import spot_ext

    model, path = small("spot"), tmp_path / "m.pt2"
    export_model(model, path, "torch", verify=False)
    x = images(model, 3)
    torch.save(x, tmp_path / "x")
    script = f"import sys, torch\n{load}\n" + (
        "logits, *kept = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]))\n"
        "assert 'spot_vit' not in sys.modules and not logits.requires_grad\n"
        "torch.save(logits, sys.argv[2])"
    )
    done = python(script, path, tmp_path / "x", spot_ext.library_path())
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert (torch.load(tmp_path / "x") - model(x)).abs().max() < 1e-5


def test_missing_operators_are_one_sentence(tmp_path: Path) -> None:
    export_model(small("spot"), tmp_path / "m.pt2", "torch", verify=False)
    folder = Path(make.__file__).parent
    script = (
        "import sys; from pathlib import Path\nsys.modules['spot_ext'] = None\n"
        f"sys.path.insert(0, {str(folder)!r})\nimport standalone\n"
        "try: standalone.load(Path(sys.argv[1]))\nexcept standalone.Missing as e: print(e)"
    )
    done = python(script, tmp_path / "m.pt2")
    assert done.returncode == 0, done.stderr
    assert "\n" not in done.stdout.strip()
    assert "calls spot::attention_stats, " in done.stdout and "pip install" in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.pt2", None, "there is no file"),
        ("m.pt2", b"text", "does not say what it is of"),
        ("m.onnx", b"text", "cannot be loaded by ONNX Runtime"),
        ("m.xml", b"text", "cannot be loaded by OpenVINO"),
        ("m.safetensors", b"text", r"ends in \.pt2, \.onnx or \.xml"),
    ],
)
def test_files_that_are_not_ours(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if name.endswith((".onnx", ".xml")):
        needs("onnx" if name.endswith(".onnx") else "openvino")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_exported(tmp_path / name)


def test_an_opened_file_is_no_trainable_model(tmp_path: Path) -> None:
    export_model(small("dense"), tmp_path / "m.pt2", "torch", verify=False)
    file = open_exported(tmp_path / "m.pt2")
    with pytest.raises(UserError, match="cannot be trained"):
        file.train()
    with pytest.raises(ValueError, match=r"expected images \[B, \[3, 64, 64\]\], got"):
        file(torch.zeros(1, 3, 32, 32))
    assert not file.training and file.pretrained_cfg["input_size"] == [3, 64, 64]
