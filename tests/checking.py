"""Calls of headwise are checked against its annotations while tests run: types by beartype, shapes by jaxtyping.

`jaxtyping.install_import_hook` does the same for three times the price: it makes two checked functions of each one when
a module is imported, and binds the arguments of every call. Here a function is made ready when it is first called.
"""

import ast
import sys
from dataclasses import is_dataclass
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from inspect import isgeneratorfunction
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

CHECKS = BeartypeConf(violation_type=TypeCheckError)  # as jaxtyping: a TypeError, which headwise may expect
SAME_SIZES = jaxtyped("context")  # within it, an axis of one name has one size
NAME = "@checked"  # no source can have it for something else


def checked(thing):
    """A function whose arguments and result are checked; a dataclass whose fields are, when it is made."""
    if isinstance(thing, type):
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    if isgeneratorfunction(thing):  # what it yields would be checked among the sizes of whoever asks
        return jaxtyped(thing, typechecker=beartype)
    ready, shaped = None, False

    @wraps(thing)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        nonlocal ready, shaped
        if ready is None:
            hints = {name: _resolved(hint, thing.__globals__) for name, hint in thing.__annotations__.items()}
            thing.__annotations__ = hints
            ready, shaped = beartype(conf=CHECKS)(thing), any(map(_shaped, hints.values()))
        if not shaped:
            return ready(*args, **kwargs)
        with SAME_SIZES:
            return ready(*args, **kwargs)

    return call


def check_calls(package):
    """Check the calls of all functions in a package that is not imported yet."""
    sys.meta_path.insert(0, _Finder(package))


def _resolved(hint, names):
    """A hint whose names in quotes are looked up; anything goes where they are known to type checkers alone."""

    def holder():
        pass

    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["hint"]
    except NameError:
        return Any


def _shaped(hint):
    """Whether there is a shape anywhere in a hint."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_shaped, get_args(hint)))


class _Finder(MetaPathFinder):
    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path, target=None):
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Decorates every function and class. Its bytecode is no other's, so it is neither kept nor taken."""

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        tree = _Decorating().visit(ast.parse(self.get_data(path)))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module):
        vars(module)[NAME] = checked
        super().exec_module(module)


class _Decorating(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        if any(ast.unparse(decorator).endswith("no_type_check") for decorator in node.decorator_list):
            return node
        node.decorator_list.append(_name(node))  # other decorators may take the annotations away
        return self.generic_visit(node)

    def visit_ClassDef(self, node):
        node.decorator_list.insert(0, _name(node))  # after `dataclass`
        return self.generic_visit(node)


def _name(node):
    return ast.copy_location(ast.Name(NAME, ast.Load()), node)
