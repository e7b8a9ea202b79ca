"""Names of methods, suites and model families, found by file name or entry point and imported only when asked for.

A file ``methods/pevlm.py`` with a class whose ``name`` is ``"pevlm"`` is the method ``pevlm``: nothing else is edited. A
package from outside registers ``name = "module:Class"`` in the entry-point group of the same name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vlmbench.errors import UsageError
from vlmbench.spec import nearest


@dataclass(frozen=True)
class Registry:
    """One kind of plug-in. `package` is scanned by file name, `group` by entry points."""

    kind: str
    package: str
    exclude: frozenset[str] = frozenset()
    """Files of the package that are no plug-ins."""

    @property
    def group(self) -> str:
        """The entry-point group has the package's own name, as in ``vlmbench.methods``."""
        return self.package

    @cached_property
    def _loaders(self) -> dict[str, tuple[str, Callable[[], Any]]]:
        """name -> (where it comes from, loader). Nothing is imported here."""
        found: dict[str, tuple[str, Callable[[], Any]]] = {}
        folder = Path(__file__).parent / self.package.rpartition(".")[2]
        for path in sorted(folder.glob("[a-z]*.py")):
            if path.stem in self.exclude:
                continue
            found[path.stem] = (str(path), lambda name=path.stem: self._from_file(name))  # type: ignore[misc]
        for entry in entry_points(group=self.group):
            if entry.name in found:
                taken = found[entry.name][0]
                raise UsageError(f"{self.kind} {entry.name!r} is defined twice: {entry.value} and {taken}; rename one.")
            found[entry.name] = (entry.value, entry.load)
        return found

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted(self._loaders)

    def load(self, name: str) -> Any:
        """The class behind `name`. Raises `UsageError` with the nearest name when there is none."""
        if name not in self._loaders:
            known = ", ".join(self.names())
            raise UsageError(f"No {self.kind} is called {name!r} (known: {known}).{nearest(name, self.names())}")
        return self._loaders[name][1]()

    def summary(self, name: str) -> str:
        """First line of the plug-in's docstring, read without importing it (so that listing stays cheap)."""
        origin = self._loaders[name][0]
        path = Path(origin)
        if not path.is_absolute():  # an entry point's ``module:Class``
            return f"from {origin}"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        return text.split("\n", 1)[0]

    def _from_file(self, name: str) -> Any:
        module = importlib.import_module(f"{self.package}.{name}")
        for value in vars(module).values():
            if inspect.isclass(value) and getattr(value, "name", None) == name:
                return value
        raise UsageError(
            f"{module.__file__} has no class with name = {name!r}; a {self.kind} file defines exactly that."
        )


methods = Registry("method", "vlmbench.methods")
suites = Registry("suite", "vlmbench.suites")
