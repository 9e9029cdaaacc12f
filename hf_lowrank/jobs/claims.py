"""The settings that results were made with, and those of a job that would add to them → where they differ."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of every setting that differs, as JSON keeps it; None is one's absence.

    >>> list(differences({"seed": 0, "data": {"rows": [1, 2]}}, {"seed": 0, "data": {"rows": (1, 3)}}))
    [('data.rows', [1, 2], [1, 3])]
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for part in dict.fromkeys([*now, *before]):
            yield from differences(before.get(part), now.get(part), f"{name}.{part}" if name else part)
    elif (then := json.loads(json.dumps(before))) != (today := json.loads(json.dumps(now))):
        yield name, then, today
