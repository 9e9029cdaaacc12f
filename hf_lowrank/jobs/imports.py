"""Imports that wait: a package's names until they are used, an action until a module has been imported."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) for names of a `package`: {name: the module in it that has the name}.

    torch and transformers take seconds to import, so that what only names and describes does without them.
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up


def after_import(module: str, action: Callable[[], None]) -> None:
    """Call `action` once `module` has been imported, by whomever: now, if it has been already."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(module, action))


class _Waiting(MetaPathFinder):
    """Finds its one module as the other finders do, and acts when that has been executed."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._and_then(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec

    def _and_then(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_act(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:  # the module may be imported again
                sys.meta_path.insert(0, self)
                raise
            self.action()

        return execute_and_act
