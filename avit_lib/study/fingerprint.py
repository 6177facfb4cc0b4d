"""What a result was computed from, as a short hash: the parsed code of the functions it uses, and
of those they use.

Comments, docstrings, annotations, error messages and the names of modules don't count, a changed
formula or constant does. Functions are followed by name; what is reached through an object
(``model.blocks``) has to be named as well.
"""

import ast
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

from avit_lib.errors import UserError

PACKAGE = "avit_lib"


def fingerprint(*roots: Any) -> str:
    """The hash of functions, classes and constants of the package, ``roots`` and all that they
    use.
    """
    found, waiting = {}, list(roots)
    while waiting:
        thing = waiting.pop()
        thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
        if id(thing) not in found:
            found[id(thing)], used = _normalised(source(thing), vars(sys.modules[thing.__module__]))
            waiting += used
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()[:16]


def source(thing: Any) -> str:
    """The code of a function or class; raises UserError when its file was changed after it had been
    imported.
    """
    try:
        return textwrap.dedent(inspect.getsource(thing))
    except OSError:
        raise UserError(
            f"the file of {thing.__qualname__} was changed while it was in use; run this again"
        ) from None


def used_by(code: Iterable[str]) -> list[Any]:
    """The functions and classes of the package that pieces of Python ``code`` use, by their
    imports.
    """
    trees = [ast.parse(piece) for piece in code]
    namespace = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                namespace[alias.asname or alias.name] = getattr(module, alias.name)
    return [thing for piece in code for thing in _normalised(piece, namespace)[1]]


def _normalised(code: str, namespace: dict[str, Any]) -> tuple[str, list[Any]]:
    """``code`` as text that changes with its meaning alone, and the functions and classes of the
    package it uses.
    """
    reader = _Reader(namespace)
    tree = reader.visit(ast.parse(code))
    as_before = (
        {"show_empty": True} if sys.version_info >= (3, 13) else {}
    )  # 3.12 and 3.13 show trees in other words
    text = ast.dump(tree, **as_before).replace(", type_params=[]", "")
    return "\n".join([text, *sorted(reader.constants)]), reader.used


class _Reader(ast.NodeTransformer):
    """Strips a tree of what does not compute, and collects what it names."""

    def __init__(self, namespace: dict[str, Any]):
        self.namespace, self.used, self.constants = namespace, [], set()

    def visit(self, node: ast.AST) -> ast.AST:
        if hasattr(node, "annotation"):
            node.annotation = None
        if hasattr(node, "returns"):
            node.returns = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not _is_text(part)]
        return super().visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.namespace:
            self._take(node.id, self.namespace[node.id])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        owner = self.namespace.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if (
            isinstance(owner, ModuleType) and owner.__name__.split(".")[0] == PACKAGE
        ):  # module.function, as a name
            self._take(node.attr, getattr(owner, node.attr))
            return ast.Name(node.attr, node.ctx)
        return self.generic_visit(node)

    def _take(self, name: str, value: Any) -> None:
        if words := self._words(value):
            self.constants.add(f"{name} = {words}")

    def _words(self, value: Any) -> str:
        """A constant in words; of functions and classes none, those of the package are ``used``."""
        if isinstance(value, (FunctionType, type)):
            self.used += [value] if value.__module__.split(".")[0] == PACKAGE else []
        elif isinstance(value, str | int | float | bool | None):
            return repr(value)
        elif isinstance(value, dict | list | tuple | set | frozenset):
            words = [
                self._words(part) for part in (value.items() if isinstance(value, dict) else value)
            ]
            return str(sorted(words) if isinstance(value, set | frozenset) else words)
        return ""


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
