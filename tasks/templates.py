"""`{field}` templates: text with holes that a row's fields fill. Nothing in a template is ever evaluated."""

import re
from collections.abc import Mapping
from typing import Any

from ..support.errors import ConfigError, DataError, did_you_mean

_HOLE = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}")


class Template:
    """A text with `{field}` holes; `{{` and `}}` write braces, `{answers.text.0}` looks into nested rows.

    A line that holds nothing but empty fields is left out, so optional fields need no second template.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields = tuple(dict.fromkeys(m[1] for m in _HOLE.finditer(text) if m[1] is not None))
        if "" in self.fields:
            raise ConfigError(f"template {text!r} has an empty {{}}; name the field, or write {{{{}}}} for braces")

    @property
    def only_field(self) -> str | None:
        """The field, when the template is nothing but one hole."""
        return self.fields[0] if len(self.fields) == 1 and self.text == f"{{{self.fields[0]}}}" else None

    def render(self, row: Mapping[str, Any], where: str) -> str:
        """Fill the holes.

        Raises:
            DataError: when the row lacks a field, or holds something other than text or a number in it.
        """
        lines = [(line, self._fill(line, row, where)) for line in self.text.split("\n")]
        return "\n".join(text for line, text in lines if text.strip() or not _only_holes(line))

    def _fill(self, line: str, row: Mapping[str, Any], where: str) -> str:
        return _HOLE.sub(lambda m: m[0][0] if m[1] is None else self._text(row, m[1], where), line)

    def _text(self, row: Mapping[str, Any], field: str, where: str) -> str:
        try:
            value = look_up(row, field)
        except KeyError:
            hint = did_you_mean(field, map(str, row))
            raise DataError(f"{where}: no field {field!r}, which the template {self.text!r} names; {hint}") from None
        return as_text(value, f"{where}: field {field!r}")


def look_up(row: Mapping[str, Any], field: str) -> Any:
    """A field of a row, or what a dotted path leads to through mappings and lists; `KeyError` when there is none."""
    if field in row:
        return row[field]
    value: Any = row
    for step in field.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise KeyError(field)
    return value


def as_text(value: Any, where: str) -> str:
    """A field as text: strings as they are, numbers and booleans as JSON writes them.

    Raises:
        DataError: for null, lists and mappings.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    kind = {type(None): "empty (null)", list: "a list", dict: "a mapping"}.get(type(value), type(value).__name__)
    raise DataError(f"{where} is {kind}, but text is needed")


def _only_holes(line: str) -> bool:
    return bool(line.strip()) and not _HOLE.sub(lambda m: m[0] if m[1] is None else "", line).strip()
