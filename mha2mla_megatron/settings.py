"""Settings of every command: a frozen dataclass filled from YAML and `key=value` words through OmegaConf."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import require_file


def load_settings[Settings](schema: type[Settings], overrides: Sequence[str], file: Path | None = None) -> Settings:
    """Make a `schema` from its defaults, then `file` (YAML), then `overrides` (`a.b=value` words; later wins).

    A mapping adds to the one that was there before, but for fields that are not always one (of type Any), such as a
    blend of token files: there a whole new one takes the place of the old one. So does an empty one anywhere.

    Raises UserError for an unknown key, a value of the wrong type, or whatever the dataclass itself refuses.
    """
    merged = OmegaConf.structured(schema)
    if file is not None:
        merged = _merge(merged, _read_yaml(file), str(file))
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"'{word}': settings are given as key=value")
        try:
            update = OmegaConf.from_dotlist([word])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"'{word}': the value is not valid YAML ({first_line(error)})") from None
        _forget_mapping(merged, key, OmegaConf.select(update, key))
        merged = _merge(merged, update, f"'{word}'")
    return _to_object(merged)


def make_settings[Settings](schema: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """Make a `schema` from its defaults and nested `values`. source: what an error names.

    Raises UserError as `load_settings` does.
    """
    try:
        return _to_object(_merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)), source))
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain YAML/JSON values."""
    return dataclasses.asdict(settings)


def save_settings(settings: Any, file: Path) -> None:
    """Write the settings as YAML that `load_settings` reads back."""
    file.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False))


def require_keys(settings: Any, *keys: str) -> None:
    """Raise UserError for the first of the dotted `keys` that was left at None."""
    for key in keys:
        value = settings
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            raise UserError(f"{key} is not set; give it in the YAML file or as {key}=VALUE")


def _forget_mapping(merged: Any, key: str, value: Any) -> None:
    """Let go of the mapping that the field `key` holds, where `value` is to take its place and not to add to it."""
    group, _, name = key.rpartition(".")
    parent = OmegaConf.select(merged, group) if group else merged
    if not OmegaConf.is_dict(parent) or not dataclasses.is_dataclass(OmegaConf.get_type(parent)) or name not in parent:
        return
    node = parent._get_node(name)
    if not OmegaConf.is_dict(node) or dataclasses.is_dataclass(OmegaConf.get_type(node)):
        return
    empty = OmegaConf.is_dict(value) and not value
    if empty or node._metadata.ref_type is Any:
        with read_write(parent):
            parent[name] = {}


def _to_object(merged: Any) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None


def _read_yaml(file: Path) -> Any:
    require_file(file)
    try:
        found = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: cannot be read as YAML ({first_line(error)})") from None
    if (wrong := _other_than_a_name(found)) is not None:
        raise UserError(f"{file}: the key {wrong} is not a text; put it into quotes")
    return found


def _other_than_a_name(node: Any, prefix: str = "") -> str | None:
    """The first key that YAML took for a number, a date or the like."""
    for key in node if OmegaConf.is_dict(node) else ():
        if not isinstance(key, str):
            return f"{prefix}{key} ({type(key).__name__})"
        # The node, for a value may be an interpolation.
        if (found := _other_than_a_name(node._get_node(key), f"{prefix}{key}.")) is not None:
            return found
    return None


def _merge(base: Any, update: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(base, update)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list where a mapping belongs
        key = getattr(error, "full_key", None) or "?"
        parent = base
        for part in str(key).split(".")[:-1]:
            parent = parent.get(part, base)
        known = ", ".join(str(k) for k in parent) if OmegaConf.is_dict(parent) else ""
        if known and "not in" in str(error):
            raise UserError(f"{source}: unknown key '{key}'; known here: {known}") from None
        if (wrong := _of_another_form(base, update)) is not None:
            raise UserError(f"{source}: {wrong}") from None
        raise UserError(f"{source}: {key}: {first_line(error)}") from None


def _of_another_form(base: Any, update: Any, prefix: str = "") -> str | None:
    """What is wrong with the first value in `update` that is neither a group nor a list, where `base` has one."""
    for key in update if OmegaConf.is_dict(update) else ():
        name, value = f"{prefix}{key}", update[key]
        # The node, for the value of a list may be None.
        if OmegaConf.is_list(base._get_node(key)) and not OmegaConf.is_list(value):
            shown = "VALUE" if OmegaConf.is_dict(value) else value
            return f"{name} is a list, given as {name}=[{shown}]"
        if not OmegaConf.is_dict(base.get(key)):
            continue
        if not OmegaConf.is_dict(value):
            return f"{name} is a group of settings, given as {name}.KEY=VALUE"
        if (found := _of_another_form(base[key], value, f"{name}.")) is not None:
            return found
    return None
