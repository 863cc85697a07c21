"""One Python file with which a scheduler loads where this package is not installed, made from the package's own modules.

Diffusers runs a file that lies beside a component's config and is named like the component's library in
`model_index.json`, if its user passes `trust_remote_code=True`. The file has whatever the scheduler's class refers to,
directly or not, in the package's own words. Methods that import more of the package when they are called, as those that
calibrate and publish do, are left out.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from typing import TypeAlias


Definition: TypeAlias = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign

PACKAGE = __name__.partition(".")[0]

# The public name goes into `model_index.json`, and the file along when the scheduler is saved again.
TEMPLATE = '''\
"""{name} of {package} {version} (Apache-2.0) for sampling without that package; written by `{name}.include_code()`."""

{imports}


{code}


{name}.__module__ = "{package}"
{name}.source_code = Path(__file__).read_text(encoding="utf-8")
'''


def standalone_source(scheduler_class: type) -> str:
    """Python code that defines a scheduler class of this package without importing the package.

    Raises a `ValueError` for a class of another package.
    """
    name, package = scheduler_class.__name__, importlib.import_module(PACKAGE)
    if getattr(package, name, None) is not scheduler_class:
        raise ValueError(
            f"The code of {scheduler_class} is not {PACKAGE}'s own, so that it cannot be saved along: use "
            "`GASScheduler` or `SDMScheduler`."
        )
    needed = _Needed()
    needed.add(PACKAGE, name)
    return TEMPLATE.format(
        name=name, package=PACKAGE, version=package.__version__, imports=needed.imports(), code=needed.code()
    )


@dataclass
class _Module:
    """What a module defines and imports at its top level, by name; imports as (module, name, or "" for all of it)."""

    lines: list[str]
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.definitions or name in self.imports


@cache
def _parse(module_name: str) -> _Module:
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    parsed = _Module(source.splitlines())
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                parsed.definitions[node.name] = node
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                parsed.definitions[name] = node
            case ast.Import():
                parsed.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            case ast.ImportFrom():
                origin = resolve_name("." * node.level + (node.module or ""), module.__package__)
                parsed.imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return parsed


class _Needed:
    """Definitions of the package that a name needs, and imports of other packages."""

    def __init__(self) -> None:
        self._definitions: dict[str, dict[str, Definition]] = {}  # by module
        self._imports = {("Path", "pathlib", "Path")}  # for the template

    def add(self, module_name: str, name: str) -> None:
        """Adds what a name means in a module, and all that this refers to."""
        module, found = _parse(module_name), self._definitions.setdefault(module_name, {})
        if name in module.imports:
            origin, original = module.imports[name]
            if origin.partition(".")[0] != PACKAGE:
                self._imports.add((name, origin, original))
            elif name == original and _parse(origin).has(name):
                self.add(origin, name)
            else:
                raise ValueError(
                    f"{module_name} must import what {name} is by its own name, not a module or under another."
                )
        elif name in module.definitions and name not in found:
            found[name] = module.definitions[name]
            for other in _names(found[name]):
                self.add(module_name, other)

    def imports(self) -> str:
        """Imports of other packages, sorted."""
        lines = []
        for name, origin, original in self._imports:
            line = f"from {origin} import {original}" if original else f"import {origin}"
            lines.append(line if name in (origin, original) else f"{line} as {name}")
        return "\n".join(sorted(lines))

    def code(self) -> str:
        """The definitions, each after those that it was made from."""
        origins = {
            module_name: {origin for origin, _ in _parse(module_name).imports.values() if origin in self._definitions}
            for module_name in self._definitions
        }
        texts: dict[str, str] = {}
        for module_name in TopologicalSorter(origins).static_order():
            found = self._definitions[module_name]
            for name, node in sorted(found.items(), key=lambda item: item[1].lineno):
                text = _text(node, _parse(module_name).lines)
                if texts.setdefault(name, text) != text:
                    raise ValueError(f"{module_name} and another module define {name}: give one of them another name.")
        return "\n\n\n".join(texts.values())


def _names(definition: Definition) -> Iterator[str]:
    """Names that a definition may take from its module."""
    parts = definition.body if isinstance(definition, ast.ClassDef) else [definition]
    if isinstance(definition, ast.ClassDef):
        parts = [*definition.bases, *definition.decorator_list, *(part for part in parts if not _is_left_out(part))]
    for part in parts:
        yield from (node.id for node in ast.walk(part) if isinstance(node, ast.Name))


def _is_left_out(part: ast.stmt) -> bool:
    """Whether part of a class's body is a method that imports more of the package when it is called."""
    return any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(part))


def _text(definition: Definition, lines: list[str]) -> str:
    """The source of a definition, with the comment above it."""
    kept = list(lines)
    for part in definition.body if isinstance(definition, ast.ClassDef) else ():
        if _is_left_out(part):
            start = _start(part, lines)
            start -= not lines[start - 1].strip()  # the blank line before
            kept[start : part.end_lineno] = [None] * (part.end_lineno - start)
    text = kept[_start(definition, lines) : definition.end_lineno]
    return "\n".join(line for line in text if line is not None)


def _start(node: ast.stmt, lines: list[str]) -> int:
    """Index of the first line of a statement, its decorators and the comment above it."""
    decorators = getattr(node, "decorator_list", [])
    start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while start > 0 and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return start
