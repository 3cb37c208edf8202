"""Lets the site list the settings of a run: their texts are arguments of `_setting` and `_preset`, no docstrings."""

import ast
from typing import Any

import griffe


class SettingsTable(griffe.Extension):
    """Appends the fields of `RunConfig`, with texts and defaults, to its docstring as attributes."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Read the fields once all of the class is there."""
        if cls.name != "RunConfig" or cls.docstring is None:
            return
        values = {name: item.value for name, item in cls.attributes.items()}
        rows = [f"    {name}: {_told(value)}" for name, value in values.items() if isinstance(value, griffe.ExprCall)]
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)


def _told(value: griffe.ExprCall) -> str:
    text, *rest = (str(argument) for argument in value.arguments)
    default = f"default: `{rest[0]}`" if str(value.function) == "_setting" else "default: the protocol's"
    words = ast.literal_eval(text)
    return words if "default" in words else f"{words}; {default}"
