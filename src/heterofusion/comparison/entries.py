"""Entries of a comparison file: names, mappings, and what flags depend on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text
from heterofusion.sweeps.template import VARIABLE

_VARIABLE_NAME = re.compile(r"[A-Za-z_]\w*")
_RESERVED = ("seed", "adapter", "item")  # variables that every comparison has


@dataclass(frozen=True)
class Needs:
    """What flags depend on.

    Attributes:
        case: whether there is a variable of a case among them.
        seed: whether the seed is among them.
        made: names of the shared things among them, and of those that these are made of, in the file's order.
    """

    case: bool
    seed: bool
    made: tuple[str, ...]


def slug(text: str) -> str:
    """A name as that of a folder, in small letters."""
    return re.sub(r"[^\w.+=,-]+", "-", text).strip("-.").lower() or "method"


def point_name(settings: Mapping[str, Any]) -> str:
    """Values of flags as a name: `learning_rate=0.001,alpha_init=0.3`."""
    return ",".join(f"{name}={as_text(value)}" for name, value in settings.items())


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping of the file; nothing is an empty one.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; a mapping was expected")
    return {str(key): item for key, item in value.items()}


def names_of(value: Any, known: Sequence[str], what: str, where: str) -> tuple[str, ...]:
    """A list of names of things that are there; nothing is an empty one.

    Args:
        value: the list.
        known: what is there.
        what: kind of the things, for messages.
        where: names the list in messages.

    Raises:
        UserError: it is no list or empty, or has a name that is not there, or one twice.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {value!r}; a list of one or more names was expected")
    names = tuple(map(str, value))
    for index, name in enumerate(names):
        if name not in known:
            raise UserError(f"{where} names {name!r}, which is no {what} of it; there is {', '.join(known) or 'none'}")
        if name in names[:index]:
            raise UserError(f"{where} names {name!r} twice")
    return names


def check_variable(name: str, where: str) -> None:
    """Check what is to be a variable in flags.

    Raises:
        UserError: `{name}` could not stand in a text, or is a variable already.
    """
    if not _VARIABLE_NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} cannot be a variable; use letters, digits and _")
    if name in _RESERVED:
        raise UserError(f"{where}: {name!r} is a variable already; give it another name")


def check_parts_of_texts(value: Any, variables: Mapping[str, Any], where: str) -> None:
    """Check that a variable which is null, a list or a mapping stands alone in its text.

    Args:
        value: flags, or what is in them.
        variables: value by name.
        where: names them in messages.

    Raises:
        UserError: it is a part of a longer text.
    """
    if isinstance(value, str):
        for match in VARIABLE.finditer(value):
            found = variables.get(match[1], "")
            if match[0] != value and (found is None or isinstance(found, (list, dict))):
                raise UserError(
                    f"{where} has {value!r}, but {match[1]} is {'null' if found is None else repr(found)}, which is "
                    "no part of a text; let the variable be the whole value"
                )
    elif isinstance(value, Mapping):
        for item in value.values():
            check_parts_of_texts(item, variables, where)
    elif isinstance(value, list):
        for item in value:
            check_parts_of_texts(item, variables, where)
