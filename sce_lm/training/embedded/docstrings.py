"""Documentation inside one Python file: docstrings, and strings given to ``add_docstr`` and such.

Run as a program, this file is a worker of `sources.read_files`; it therefore imports the standard
library only.
"""

import ast
import gc
import inspect
import json
import sys
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTING_CALLS = {"add_docstr", "_add_docstr", "add_newdoc", "add_newdoc_for_scalar_type"}
TOPICS = "pydoc_data.topics"  # the language reference, kept for help() as one dictionary of strings


def docstrings(module: str, path: str) -> list[tuple[str, str]]:
    """(qualified name, cleaned text) of everything documented in a file, in source order.

    A file that is no valid Python of this interpreter gives an empty list.
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
        found = list(_topics(tree) if module == TOPICS else _documentation(tree, module))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    # Lone surrogates can stand in a literal but not in UTF-8.
    return [(name, inspect.cleandoc(text).encode(errors="ignore").decode()) for name, text in found]


def _documentation(node: ast.AST, name: str):
    """Walk statements only: most of a tree is expressions, and no docstring is in one."""
    if isinstance(node, DOCUMENTED):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield name, text
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _documentation(child, f"{name}.{child.name}")
            elif isinstance(child, ast.Expr):
                yield from _documenting_call(child.value)
            else:
                yield from _documentation(child, name)


def _documenting_call(call: ast.expr):
    """``add_docstr(torch.abs, "text")`` gives ("torch.abs", "text"); others give nothing."""
    if not isinstance(call, ast.Call):
        return
    called = getattr(call.func, "attr", getattr(call.func, "id", None))
    if called not in DOCUMENTING_CALLS or len(call.args) < 2:
        return
    *owner, text = call.args
    if isinstance(text, ast.Tuple) and text.elts:  # numpy documents a method as a pair (name, text)
        *method, text = text.elts
        owner += method
    name = ".".join(str(p.value) if isinstance(p, ast.Constant) else ast.unparse(p) for p in owner)
    strings = (n.value for n in ast.walk(text) if isinstance(n, ast.Constant))
    yield name, max((s for s in strings if isinstance(s, str)), key=len, default="")


def _topics(tree: ast.Module):
    for dictionary in ast.walk(tree):
        if isinstance(dictionary, ast.Dict):
            for key, value in zip(dictionary.keys, dictionary.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(
                    value, (ast.Constant, ast.JoinedStr)
                ):
                    yield f"{key.value}", ast.literal_eval(value)


if __name__ == "__main__":
    gc.disable()  # syntax trees have no cycles, and scanning them would take a third of the time
    for line in sys.stdin:
        print(json.dumps(docstrings(*json.loads(line))), flush=True)
