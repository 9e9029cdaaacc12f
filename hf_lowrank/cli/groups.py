"""A command whose parameters are dataclasses of options → the flat signature that Typer reads.

Typer has no such thing itself: an option is a parameter of a function, and nothing else.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter
from typing import Any, get_type_hints


def with_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with an option for every field of its parameters that are dataclasses, in the order they stand in.

    When it is called, each of them is filled with what was given. A field is written as a parameter of a command would
    be, `Annotated` with `typer.Option(...)`, its default is the option's, and it may be a dataclass of options itself.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Size:
    ...     width: int = 1
    ...     height: int = 2
    >>> @with_groups
    ... def area(name: str, size: Size) -> str:
    ...     return f"{name}: {size.width * size.height}"
    >>> str(inspect.signature(area))
    '(*, name: str, width: int = 1, height: int = 2) -> str'
    >>> area(name="door", height=3)
    'door: 3'
    """
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, place in signature.parameters.items():
            if is_dataclass(place.annotation):
                given[name] = _filled(place.annotation, given)
        return command(**given)

    flat = [option for place in signature.parameters.values() for option in _options(place)]
    run.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    return run


def _options(place: Parameter) -> Iterator[Parameter]:
    """The parameter itself, or those of the fields of its dataclass."""
    if not is_dataclass(place.annotation):
        yield place.replace(kind=Parameter.KEYWORD_ONLY)
        return
    hints = get_type_hints(place.annotation, include_extras=True)
    for part in fields(place.annotation):
        yield from _options(
            Parameter(part.name, Parameter.KEYWORD_ONLY, default=_default(part), annotation=hints[part.name])
        )


def _default(part: Field[Any]) -> Any:
    if part.default_factory is not MISSING:
        return part.default_factory()
    return Parameter.empty if part.default is MISSING else part.default


def _filled(group: Any, given: dict[str, Any]) -> Any:
    """An instance of a dataclass of options, whose values are taken out of `given`."""
    hints = get_type_hints(group)
    nested = {name: _filled(kind, given) for name, kind in hints.items() if is_dataclass(kind)}
    return group(**nested, **{name: given.pop(name) for name in hints if name in given})
