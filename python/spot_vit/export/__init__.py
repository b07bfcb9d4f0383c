"""Models as files that run without this package: torch.export, AOTInductor, ONNX, OpenVINO."""

from spot_vit.export.formats import FORMATS, available
from spot_vit.export.make import export_model
from spot_vit.export.opened import Exported, open_exported

export = export_model

__all__ = ["FORMATS", "Exported", "available", "export", "export_model", "open_exported"]
