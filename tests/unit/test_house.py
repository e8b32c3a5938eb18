"""Rules of the tree: scripts run from anywhere, imports go one way, files stay short."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOWER_PACKAGES = {
    "common": set[str](),
    "data_prep": {"common"},
    "model": {"common", "data_prep"},
    "train": {"common", "data_prep", "model"},
    "launch": {"common", "data_prep", "model", "train"},
    "benchmarks": {"common", "data_prep", "model", "train", "launch"},
}
OURS = {*LOWER_PACKAGES, "tests"}
SOURCES = sorted(path for package in LOWER_PACKAGES for path in (ROOT / package).rglob("*.py"))
TOO_WIDE = {"Exception", "BaseException"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def is_script(path: Path) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in parse(path).body
    )


SCRIPTS = [path for path in SOURCES if is_script(path)]


def listed_by_git() -> list[Path]:
    """Return every Python file that is, or would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def imported_roots(tree: ast.AST) -> set[str]:
    """Return the first part of every absolute import in a module."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def swallows(node: ast.AST) -> bool:
    """Return whether a node catches every exception without raising it again."""
    if isinstance(node, ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_wide = any(kind is None or ast.unparse(kind) in TOO_WIDE for kind in caught)
        return is_wide and not isinstance(node.body[-1], ast.Raise)
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
        return any(ast.unparse(kind) in TOO_WIDE for kind in node.args)
    return False


def test_no_module_has_the_name_of_another_library() -> None:
    installed = set(importlib.metadata.packages_distributions()) - OURS
    assert {"numpy", "torch", "tiktoken"} <= installed
    taken = sys.stdlib_module_names | installed
    stems = {path.stem for path in SOURCES} - {"__init__"}
    assert stems & taken == set()
    assert OURS & sys.stdlib_module_names == set()


def test_imports_run_one_way() -> None:
    for path in SOURCES:
        package = relative(path).split("/")[0]
        assert imported_roots(parse(path)) & OURS <= LOWER_PACKAGES[package] | {package}, path


# Each is a module-level circle that is known and harmless; a new one fails the test.
KNOWN_CIRCLES = set[frozenset[str]]()


def modules_imported_by(path: Path, modules: set[str]) -> set[str]:
    """Return our modules that a module imports while it is loaded itself."""
    names = set()
    statements = list(parse(path).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            statements += node.body + node.orelse
        elif isinstance(node, ast.Try):
            statements += node.body + node.orelse + [inner for handler in node.handlers for inner in handler.body]
    return names & modules


def circles(imports: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the sets of modules on a circle that a depth-first walk meets."""
    met, done = set[frozenset[str]](), set[str]()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            met.add(frozenset(trail[trail.index(module) :]))
        elif module not in done:
            for imported in sorted(imports[module]):
                visit(imported, [*trail, module])
            done.add(module)

    for module in sorted(imports):
        visit(module, [])
    return met


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {frozenset("bc")}
    paths = {relative(path).removesuffix(".py").replace("/", "."): path for path in SOURCES}
    assert circles({name: modules_imported_by(path, set(paths)) for name, path in paths.items()}) == KNOWN_CIRCLES


def test_files_are_few_and_short() -> None:
    lengths = {relative(path): len(path.read_bytes().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400 and name[:5] != "bench"} == {}
    assert lengths["train/loop.py"] <= 250
    assert len(list((ROOT / "train").glob("*.py"))) <= 18


def test_a_script_replaces_its_own_folder_on_the_path_before_it_imports_ours() -> None:
    assert {"data_prep/textfiles.py", "train/main.py"} <= {relative(path) for path in SCRIPTS}
    for path in SCRIPTS:
        body = parse(path).body
        replacing = [
            index
            for index, node in enumerate(body)
            if isinstance(node, ast.If)
            and ast.unparse(node.test) == "not __package__"
            and any(
                isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "sys.path[0]" for line in node.body
            )
        ]
        ours = [index for index, node in enumerate(body) if imported_roots(node) & OURS]
        assert len(replacing) == 1 and all(index > replacing[0] for index in ours), path


def test_every_file_is_ascii() -> None:
    listed = listed_by_git()
    assert set(SOURCES) <= set(listed)
    assert [relative(path) for path in listed if not path.read_bytes().isascii()] == []


def test_nothing_swallows_every_exception() -> None:
    """Only the helper process of W&B may, so that any error of that service ends there as one line."""
    swallowing = [relative(path) for path in listed_by_git() for node in ast.walk(parse(path)) if swallows(node)]
    assert swallowing == ["train/metrics/wandb_process.py"]


def test_the_rule_sees_what_swallows() -> None:
    for code, expected in (
        ("try: f()\nexcept: pass", True),
        ("try: f()\nexcept (OSError, BaseException) as e: print(e)", True),
        ("with contextlib.suppress(Exception): f()", True),
        ("try: f()\nexcept BaseException:\n    undo()\n    raise", False),
        ("try: f()\nexcept (OSError, ValueError): pass", False),
        ("with suppress(OSError): f()", False),
    ):
        assert any(swallows(node) for node in ast.walk(ast.parse(code))) is expected, code
