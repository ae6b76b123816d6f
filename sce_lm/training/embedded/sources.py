"""The Python files of installed packages, found and read without importing the packages.

Files are read by worker programs, plain Python processes that import the standard library only.
They start in a few hundredths of a second, and nothing is forked from a process in which torch or
tokenizers already run threads.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STANDARD_LIBRARY = "stdlib"
DEFAULT_PACKAGES = (
    STANDARD_LIBRARY, "torch", "transformers", "datasets", "accelerate", "peft", "huggingface_hub",
    "numpy", "pandas", "pyarrow", "sympy", "mpmath", "networkx", "fsspec", "jinja2", "matplotlib",
)  # fmt: skip
# Tests call little but assertions; the others are tools and site packages in the library's folder.
SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


def find_sources(packages: Iterable[str]) -> list[tuple[str, str]]:
    """(module name, path) of every Python file of the packages, sorted by module.

    "stdlib" stands for the whole standard library; other names are top-level modules or packages,
    skipped where they are not installed.
    """
    sources: dict[str, str] = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            sources |= _modules_under(sysconfig.get_path("stdlib"), prefix="")
            continue
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or ():
            sources |= _modules_under(folder, prefix=f"{package}.")
        if not spec.submodule_search_locations and spec.origin and spec.origin.endswith(".py"):
            sources[package] = spec.origin
    return sorted(sources.items())


def _modules_under(root: str, prefix: str) -> dict[str, str]:
    modules = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        inner = (
            prefix + os.path.relpath(folder, root).replace(os.sep, ".") + "."
            if folder != root
            else prefix
        )
        for name in names:
            if name.endswith(".py"):
                module = (inner + name.removesuffix(".py")).removesuffix(".__init__")
                modules[module] = os.path.join(folder, name)
    return modules


def read_files(
    program: str, files: Sequence[tuple[str, str]], workers: int | None = None
) -> Generator[Any]:
    """What a worker program prints for each (module, path), in the order of `files`.

    The program reads one JSON line a file and answers with one. `workers` defaults to the
    processors of this process. Closing the iterator early stops the workers.
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", program]
    processes: list[subprocess.Popen[str]] = []
    own = threading.local()

    def start() -> None:
        own.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(own.process)

    def read(file: tuple[str, str]) -> Any:
        own.process.stdin.write(json.dumps(file) + "\n")
        own.process.stdin.flush()
        answer = own.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the process that was reading {file[1]} ended early; run again to start over"
            )
        return json.loads(answer)

    pool = ThreadPoolExecutor(workers or _processors(), initializer=start)
    try:
        yield from pool.map(read, files)
    finally:
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(
    packages: Iterable[str], sources: Sequence[tuple[str, str]], options: dict[str, Any]
) -> str:
    """16 hexadecimal digits that change with what is read (versions, files) and with how."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    known = {
        "python": platform.python_version(),
        "packages": {package: _version_of(package) for package in packages},
        "files": [(module, os.path.getsize(path)) for module, path in sources],
        "options": options,
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # standard library, or named unlike its distribution: the files tell
