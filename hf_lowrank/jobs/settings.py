"""A dataclass of settings → nothing, or one line on the first value of another kind than its field."""

import math
import reprlib
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hf_lowrank.errors import LowRankError

WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}
LARGEST_SEED = 2**32 - 1  # of numpy's global generator, which transformers seeds


def check_settings(settings: Any) -> None:
    """Raise where a field of a dataclass holds what its annotation does not allow; a seed must also be in its range.

    Raises:
        LowRankError: it names the field and the value.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value, kinds = getattr(settings, field.name), _choices(hints[field.name])
        if not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(_words(kind) for kind in kinds if kind is not type(None))
            raise LowRankError(f"{field.name} must be {wanted}; it is {reprlib.repr(value)}")
    if hasattr(settings, "seed"):
        check_seed(settings.seed)


def check_choice(what: str, name: Any, choices: Iterable[str]) -> None:
    """Raise unless a name is among the choices, which `what` says in a word.

    >>> check_choice("form", "thin", ["factors", "interpolative"])
    Traceback (most recent call last):
    hf_lowrank.errors.LowRankError: unknown form 'thin'; there are factors, interpolative

    Raises:
        LowRankError: the message lists the choices.
    """
    known = list(choices)
    if name not in known:
        raise LowRankError(f"unknown {what} {name!r}; there are {', '.join(known)}")


def check_seed(seed: int) -> None:
    """Raise where a number cannot seed every generator.

    Raises:
        LowRankError: it is below 0 or above `LARGEST_SEED`.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise LowRankError(f"a seed is a whole number from 0 to {LARGEST_SEED:,}; it is {seed}")


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:  # a list will do, a text is no list of texts
        items = _choices(get_args(kind)[0])
        return isinstance(value, (tuple, list)) and all(any(_fits(part, item) for item in items) for part in value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_float(value)
    return isinstance(value, kind)


def _is_float(value: Real) -> bool:
    """Whether a number is one in floating point: not NaN, and not too large."""
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each {' or '.join(_words(item) for item in _choices(get_args(kind)[0]))}"
    return WORDS.get(kind, str(kind))
