"""Fields of JSON objects that other programs wrote, checked as they are taken."""

import math
from typing import Any

from heterofusion.runtime.errors import UserError

_REQUIRED: Any = object()
_WORDS = {str: "text", int: "a number", float: "a number", dict: "an object", list: "a list", bool: "true or false"}


class Fields:
    """Fields of a JSON object, checked as they are taken; messages name file and field."""

    def __init__(self, content: Any, where: str, prefix: str = "") -> None:
        if not isinstance(content, dict):
            raise UserError(f"{where}: {prefix.rstrip('.') or 'it'} is {shown(content)}; an object was expected")
        self.content, self.where, self.prefix = content, where, prefix

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """A field of a type; null counts as missing where there is a default.

        Raises:
            ValueError: it is missing and has no default, or is of another type.
        """
        value = self.content.get(name)
        if value is None:
            if default is not _REQUIRED:
                return default
            state = "null" if name in self.content else "missing"
            raise UserError(f"{self.where}: {self.prefix}{name} is {state}; write the file again with its program")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(sorted({_WORDS[each] for each in kinds}))
            raise UserError(f"{self.where}: {self.prefix}{name} is {shown(value)}; {expected} was expected")
        return value

    def number(self, name: str, default: Any = _REQUIRED, finite: bool = True) -> Any:
        """A number.

        Args:
            name: the field.
            default: what stands for null and for a missing field.
            finite: whether NaN and infinity are refused.

        Raises:
            ValueError: it is missing and has no default, is no number, or is not finite.
        """
        value = self.get(name, (int, float), default)
        if finite and value is not default and not math.isfinite(value):
            raise UserError(f"{self.where}: {self.prefix}{name} is {value}; a finite number was expected")
        return value


def shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
