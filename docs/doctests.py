"""Docstrings with examples (`>>> …`) → the same with the examples as blocks of code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"((?:^>>>.*\n?)(?:^(?=\S).*\n?)*)", flags=re.MULTILINE)


class Doctests(griffe.Extension):
    """Fence every example, up to the next blank line."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by Griffe with each object that has been read."""
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(r"```python\n\1\n```\n", obj.docstring.value)
