"""The embedded corpus: reference text inside every CPython, for a machine without a network.

It is two texts. `pydoc_data.topics` holds the help topics of the language reference, about 465 thousand characters.
The docstrings of the standard library, about 1.7 million characters, are read from the source files without importing
them. Both depend on the Python installation alone; a distribution may leave parts of the library out.
"""

import ast
import functools
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def topics() -> str:
    """Return every help topic of the language reference, in name order."""
    from pydoc_data.topics import topics as texts

    return "\n\n".join(texts[name].strip() for name in sorted(texts)) + "\n"


@functools.cache  # parsing the library takes seconds, and the preparation reads it twice
def docstrings() -> str:
    """Return every docstring of the standard library, in the order of its files and their definitions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            texts.extend(docstrings_of(path))
    return "\n\n".join(texts) + "\n"


def docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file in ASCII, in the order of their definitions."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a few templates in the standard library are not Python
        return
    for node in _walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.isascii():
                yield text


def _walk(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield nodes in the order of ast.walk, without expressions, which hold no definitions. Takes half the time."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        todo.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        yield node
