"""Recipes as yaml: those that are shipped, those of users and runs."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from spot_vit.config.recipe import GROUPS, Recipe

RUN = "recipe.yaml"
"""The recipe's name in the folder of a run."""


def shipped() -> list[str]:
    """Names of the recipes that are shipped."""
    folder = resources.files("spot_vit") / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def read(name: str) -> dict[str, Any]:
    """The fields of a shipped recipe, of a yaml file, or of the run in a folder.

    Raises:
        ValueError: there is no such recipe, or it is no mapping in yaml.
    """
    if name in shipped():
        return read_fields((resources.files("spot_vit") / "recipes" / f"{name}.yaml").read_text())
    path = Path(name)
    path = path / RUN if path.is_dir() else path
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"config: there is no file {name!r}, and the recipes are {', '.join(shipped())}{hint}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} cannot be read: {error}") from None
    try:
        return read_fields(text)
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from None


def read_fields(text: str) -> dict[str, Any]:
    """The fields that yaml text names; none where it is empty.

    Raises:
        ValueError: it is no yaml, no mapping of names, or names a field twice.
    """
    found = read_text(text)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"expected names of fields with values, got {str(found)[:60]!r}")
    return found


def read_text(text: str) -> Any:
    """What yaml text holds.

    Raises:
        ValueError: it is no yaml, or a mapping has a name twice.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(f"no yaml: {error}".split())) from None


def to_yaml(recipe: Recipe) -> str:
    """A recipe as yaml that `read` and other loaders take, complete and in groups."""
    values = recipe.to_dict()
    blocks = []
    for group in GROUPS:
        lines = [_line(name, values[name]) for name in group.names()]
        blocks.append(f"# {(group.__doc__ or '').rstrip('.')}\n{''.join(lines)}")
    return "\n".join(blocks)


def _line(name: str, value: Any) -> str:
    """A field as yaml, lists and mappings of plain values in one line."""
    import yaml

    flow = None if isinstance(value, list | dict) else False
    return yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=flow, width=1000)


@cache
def _loader() -> Any:
    """The safe loader, for which 1e-3 is a number and a name that comes twice is a fault."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{', '.join(map(str, twice))} is there twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    number = r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(number), list("-+0123456789")
    )
    return Loader
