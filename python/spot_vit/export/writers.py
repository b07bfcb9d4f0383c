"""One function per format: from a graph to a file, without a word of whether it is right."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from spot_vit.export.standalone import KEY
from spot_vit.utils.errors import UserError

Program = torch.export.ExportedProgram
LARGEST_ONNX = 2**31 - 2**24  # bytes of a file of protobuf, less what is not weights


def write(program: Program, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a file of the format that its metadata says, by a name that ends as it must.

    Args:
        program: of `program_of`.
        path: of a file that is not there; OpenVINO's weights stand beside it.
        metadata: of `describe`.

    Raises:
        UserError: the format cannot hold this model.
    """
    with _quiet():
        _WRITERS[metadata["format"]](program, path, metadata)


def _torch(program: Program, path: Path, metadata: Mapping[str, Any]) -> None:
    torch.export.save(program, path, extra_files={f"{KEY}.json": json.dumps(metadata)})


def _aoti(program: Program, path: Path, metadata: Mapping[str, Any]) -> None:
    options = {"aot_inductor.metadata": {KEY: json.dumps(metadata)}}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=options
    )


def _onnx(program: Program, path: Path, metadata: Mapping[str, Any]) -> None:
    from spot_vit.export.operators import translations

    held = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if held > LARGEST_ONNX:
        raise UserError(f"weights of {held / 2**30:.1f} GiB are more than a file of ONNX can hold")
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=metadata["opset"],
            input_names=list(metadata["inputs"]),
            output_names=list(metadata["outputs"]),
            custom_translation_table=translations(),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"ONNX cannot hold this model: {_reason(error)}") from error
    assert made is not None
    model = made.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape[0] = "batch"  # a name that users read
    others = {node.domain for node in model.graph.all_nodes()} - {"", "ai.onnx"}
    if others or model.functions:
        raise UserError(f"ONNX cannot hold this model in standard operators: {sorted(others)}")
    model.metadata_props[KEY] = json.dumps(metadata)
    made.save(path)


def _openvino(program: Program, path: Path, metadata: Mapping[str, Any]) -> None:
    import openvino

    source = path.with_suffix(".onnx")
    _onnx(program, source, metadata)
    model = openvino.convert_model(source)
    _make_stable(model)
    model.set_rt_info(json.dumps(metadata), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    source.unlink()


def _make_stable(model: Any) -> None:
    """Has ties go to the lower position, as ONNX says of TopK; OpenVINO leaves them open."""
    from openvino import opset11

    for node in [node for node in model.get_ops() if node.get_type_name() == "TopK"]:
        has = node.get_attributes()
        values, count = node.input_value(0), node.input_value(1)
        kind = has["index_element_type"]
        new = opset11.topk(values, count, has["axis"], has["mode"], "value", kind, stable=True)
        for place in range(2):
            node.output(place).replace(new.output(place))
    model.validate_nodes_and_infer_types()


_WRITERS = {"torch": _torch, "aoti": _aoti, "onnx": _onnx, "openvino": _openvino}


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what exporters print and warn of from those who can do nothing about it."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
