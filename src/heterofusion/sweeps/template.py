"""Values of a sweep file with variables in them: `{anchor}` in a text, and lists made of other lists."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text

VARIABLE = re.compile(r"\{([A-Za-z_]\w*)\}")
_LOOP_KEYS = ("for_each", "except", "value")


class Template:
    """Fills variables into values, and remembers which it needed.

    A text that is nothing but `{name}` becomes the variable's value, whatever its type; inside a longer text it is
    written as text. `{for_each: LIST, except: VALUES, value: TEXT}` in a list becomes one value for each item of a
    list: `{item}` is the item, or, if the items are mappings, their keys are variables.

    Args:
        variables: value by name.
        lists: the named lists that `for_each` may name.
        where: names the sweep file in messages.

    Attributes:
        used: names of the variables that were filled in so far.
    """

    def __init__(self, variables: Mapping[str, Any], lists: Mapping[str, Sequence[Any]], where: str) -> None:
        self.variables = dict(variables)
        self.lists = lists
        self.where = where
        self.used: set[str] = set()
        self._open: list[str] = []  # variables that are being filled in

    def fill(self, value: Any) -> Any:
        """Fill a value: a text, a list or a mapping of such; anything else stays as it is.

        Raises:
            UserError: a variable or a list of that name is not there, or a loop is not written as it has to be.
        """
        if isinstance(value, str):
            return self._fill_text(value)
        if isinstance(value, Mapping):
            if "for_each" in value:
                raise UserError(f"{self.where}: for_each makes several values, so it must stand in a list")
            return {key: self.fill(item) for key, item in value.items()}
        if isinstance(value, list):
            filled: list[Any] = []
            for item in value:
                if isinstance(item, Mapping) and "for_each" in item:
                    filled += self._loop(item)
                elif isinstance(item, str) and isinstance(result := self._fill_text(item), list):
                    filled += result  # a variable that is a list, among other values
                else:
                    filled.append(self.fill(item))
            return filled
        return value

    def _fill_text(self, text: str) -> Any:
        whole = VARIABLE.fullmatch(text)
        if whole is not None:
            return self._filled(whole[1])
        return VARIABLE.sub(lambda match: as_text(self._filled(match[1])), text)

    def _filled(self, name: str) -> Any:
        if name in self._open:
            raise UserError(f"{self.where}: the value of {{{name}}} has {{{name}}} itself in it; give it another")
        self._open.append(name)
        value = self.fill(self._variable(name))
        self._open.pop()
        return value

    def _variable(self, name: str) -> Any:
        if name not in self.variables:
            known = ", ".join(sorted(self.variables)) or "none"
            raise UserError(f"{self.where} has {{{name}}}, but there is no variable {name}; there are: {known}")
        self.used.add(name)
        return self.variables[name]

    def _loop(self, loop: Mapping[str, Any]) -> list[Any]:
        unknown = [str(key) for key in loop if key not in _LOOP_KEYS]
        if unknown or "value" not in loop:
            raise UserError(f"{self.where}: for_each goes with value, and perhaps with except; found {sorted(loop)}")
        items = self.fill(loop["for_each"])
        if isinstance(items, str):
            if items not in self.lists:
                known = ", ".join(self.lists) or "none"
                raise UserError(f"{self.where}: for_each names {items!r}; lists of this file are: {known}")
            items = self.lists[items]
        if not isinstance(items, list):
            raise UserError(f"{self.where}: for_each has {items!r}; name a list, or give one")
        left_out = self.fill(loop.get("except", []))
        left_out = left_out if isinstance(left_out, list) else [left_out]
        values = []
        for item in items:
            inner = Template({**self.variables, **_loop_variables(item)}, self.lists, self.where)
            inner._open = [name for name in self._open if name not in _loop_variables(item)]
            if item not in left_out and inner.variables.get("name") not in left_out:
                values.append(inner.fill(loop["value"]))
            self.used |= inner.used & self.variables.keys() - _loop_variables(item).keys()
        return values


def _loop_variables(item: Any) -> dict[str, Any]:
    return dict(item) if isinstance(item, Mapping) else {"item": item}
