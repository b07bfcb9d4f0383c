from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    torch_headers: str
    torch_target: str
    isas: list[str]
    cuda: str
    cuda_archs: list[str]

def build_info() -> BuildInfo: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
