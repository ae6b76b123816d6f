"""Call sequences of one Python file: what each function calls, in reading order.

Run as a program, this file is a worker of `sources.read_files`; it therefore imports the standard
library only.

- One sequence a function or method, at any depth, named like Python's ``__qualname__``. A nested
  function's calls belong to its own sequence and not to the enclosing one; lambdas, comprehensions,
  class bodies, and the decorators and defaults of nested functions belong to the function that
  evaluates them. Calls outside any function are left out.
- Order is reading order, by where the called name ends: ``a(b(c())).d()`` gives ``a, b, c, .d``.
- A name bound by an import, of the file or of an enclosing function, is written with its origin:
  ``np.zeros`` is ``numpy.zeros``. Relative imports are resolved, re-exports are not followed. A
  function or class defined at the top of the file is ``package.module.name``. Parameters and
  assigned variables hide both.
- Every other receiver is unknown: ``self.x()``, ``rows[0].x()`` and ``f().x()`` are ``.x``. Every
  other plain name stays as written, builtins among them. ``f()()`` and ``table[key]()`` have no
  name and give nothing beyond the ``f``.
"""

import ast
import gc
import json
import sys
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class _Scope:
    """Names bound in one function (or at the top of the file) and the calls made there.

    Names are looked up after the whole file was read, so a definition may follow its use.
    """

    def __init__(self, qualname: str, parent: "_Scope | None"):
        self.qualname = qualname
        self.parent = parent
        self.origins: dict[str, str] = {}  # name -> dotted origin
        self.variables: set[str] = set()
        # Line and column where the called name ends.
        self.calls: list[tuple[int, int, ast.expr]] = []

    def origin(self, name: str) -> str | None:
        """Dotted origin of a name seen from here; None for variables, builtins, unknown names."""
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.origins:
                return scope.origins[name]
            if name in scope.variables:
                return None
            scope = scope.parent
        return None


class _Reader:
    def __init__(self, module: str, is_package: bool):
        self.module = module
        self.package = module if is_package else module.rpartition(".")[0]
        self.scopes: list[_Scope] = []

    def read(self, tree: ast.Module) -> list[tuple[str, list[str]]]:
        self._visit_all(tree.body, _Scope("", None), prefix="")
        return [(scope.qualname, _called_names(scope)) for scope in self.scopes]

    def _visit_all(self, nodes, scope: _Scope, prefix: str) -> None:
        for node in nodes:
            self._visit(node, scope, prefix)

    def _visit(self, node: ast.AST, scope: _Scope, prefix: str) -> None:
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                scope.variables.add(node.id)
            return
        if isinstance(node, ast.Call):
            scope.calls.append(
                (node.func.end_lineno or 0, node.func.end_col_offset or 0, node.func)
            )
        elif isinstance(node, FUNCTIONS):
            self._bind_definition(node.name, scope, prefix)
            self._visit_function(node, scope, prefix)
            return
        elif isinstance(node, ast.ClassDef):
            self._bind_definition(node.name, scope, prefix)
            self._visit_all(node.decorator_list + node.bases + node.keywords, scope, prefix)
            self._visit_all(node.body, scope, f"{prefix}{node.name}.")
            return
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                scope.origins[bound] = alias.name if alias.asname else bound
            return
        elif isinstance(node, ast.ImportFrom):
            origin = self._absolute(node)
            for alias in node.names:
                scope.origins[alias.asname or alias.name] = f"{origin}.{alias.name}"
            return
        self._visit_all(ast.iter_child_nodes(node), scope, prefix)

    def _bind_definition(self, name: str, scope: _Scope, prefix: str) -> None:
        """At the top it has an origin, unless imported too; in a function it is a variable."""
        if not prefix:
            scope.origins.setdefault(name, f"{self.module}.{name}")
        elif prefix.endswith("<locals>."):
            scope.variables.add(name)

    def _visit_function(self, node, scope: _Scope, prefix: str) -> None:
        arguments = node.args
        self._visit_all(node.decorator_list, scope, prefix)
        self._visit_all(arguments.defaults, scope, prefix)
        self._visit_all([default for default in arguments.kw_defaults if default], scope, prefix)
        inner = _Scope(f"{prefix}{node.name}", scope)
        inner.variables |= {
            n.arg for n in ast.iter_child_nodes(arguments) if isinstance(n, ast.arg)
        }
        self.scopes.append(inner)
        self._visit_all(node.body, inner, f"{prefix}{node.name}.<locals>.")

    def _absolute(self, node: ast.ImportFrom) -> str:
        """The module that an import names, with the dots of a relative import resolved."""
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        parts = parts[: len(parts) - node.level + 1]
        return ".".join(parts + ([node.module] if node.module else []))


def _called_names(scope: _Scope) -> list[str]:
    names = (
        _called_name(func, scope) for _, _, func in sorted(scope.calls, key=lambda call: call[:2])
    )
    return [name for name in names if name]


def _called_name(func: ast.expr, scope: _Scope) -> str | None:
    if isinstance(func, ast.Name):
        return scope.origin(func.id) or func.id
    if not isinstance(func, ast.Attribute):
        return None
    attributes: list[str] = []
    receiver: ast.expr = func
    while isinstance(receiver, ast.Attribute):
        attributes.append(receiver.attr)
        receiver = receiver.value
    origin = scope.origin(receiver.id) if isinstance(receiver, ast.Name) else None
    return ".".join([origin, *reversed(attributes)]) if origin else f".{func.attr}"


def call_sequences(module: str, path: str) -> list[tuple[str, list[str]]]:
    """(qualname, called names) for each function of a file, in the order of definition.

    A file that is no valid Python of this interpreter gives an empty list.
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
        return _Reader(module, Path(path).name == "__init__.py").read(tree)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []


if __name__ == "__main__":
    gc.disable()  # syntax trees have no cycles, and scanning them takes a third of the time
    for line in sys.stdin:
        print(json.dumps(call_sequences(*json.loads(line))), flush=True)
