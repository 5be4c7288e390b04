"""The rules of CONTRIBUTING.md on what imports what, and on sizes, read from the source by `ast`: nothing is run.

A rule's exceptions are listed beside it with a reason. One that is no longer needed fails, too, and is to be deleted.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

COMMANDS = {"train", "sweep", "report", "noise"}
REGISTRIES = {"models", "datasets", "noises", "optim", "losses", "schedules", "series"}  # one entry for each
MEASURING = {"data", "metrics", "measure", "epochwise", "gradsplit"}
MOST_AT_THE_TOP = 16  # modules: four commands, seven registries, four for data and measuring, the installed meter
MOST_LINES = 60  # of a function

# What `study` may know of a run: its options, and how its folder is read.
OF_A_RUN = {"options", "cmdline", "roles", "identity", "schema", "jsonfiles", "files", "locks", "events"}
REPORTS_ONLY = {"matplotlib", "pandas", "scipy", "markdown"}  # training works where these are missing

# rule: {what breaks it: why}
EXCEPTIONS = {
    "at the top": {
        "engine.record -> engine.eventfile": "tensorboard takes a second to import, and a command that is refused does not wait",
    },
    "independent of engine": {
        "models -> engine.ownfiles": "how Python imports a file of one's own; it knows nothing of a run",
    },
    "reports only": {
        "metrics -> scipy.special": "one quantile, of a full measurement, imported where it is needed",
    },
    "function": {
        "engine.options.parser": "the list of all options in the order of --help",
    },
}


class Import(NamedTuple):
    """An import statement for one module, ours or a library's."""

    by: str
    of: str
    at_top: bool  # not within a function or class

    def __str__(self) -> str:
        return f"{self.by} -> {self.of}"


def sources() -> dict[str, Path]:
    """{module's name: file} of everything but the tests."""
    paths = [
        *ROOT.glob("*.py"),
        *(p for folder in ("engine", "study", "benchmarks") for p in (ROOT / folder).rglob("*.py")),
    ]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(paths)}
    assert COMMANDS | MEASURING <= names.keys() and len(names) > 30
    return names


SOURCES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def statements(node: ast.AST, at_top: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """The import statements below `node`, each with whether it is outside of functions; `if TYPE_CHECKING` left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_top
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))
        yield from statements(child, at_top and not inside)


def imports_of(name: str, tree: ast.AST) -> list[Import]:
    imports = []
    for node, at_top in statements(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:  # of a package, or of a module's content
            assert node.level == 0, f"{name}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [module if module in SOURCES else node.module for module in inner]
        imports += [Import(name, module, at_top) for module in dict.fromkeys(modules)]
    return imports


IMPORTS = [i for name, tree in TREES.items() for i in imports_of(name, tree)]
OURS = [i for i in IMPORTS if i.of in SOURCES]


def wing(name: str) -> str:
    """The folder of a module: engine, study, benchmarks, or "" at the top."""
    return name.partition(".")[0] if "." in name or name in ("engine", "study", "benchmarks") else ""


def check(rule: str, broken: dict[str, object]) -> None:
    """Fail for what breaks a rule and is no exception, and for exceptions that break nothing."""
    allowed = EXCEPTIONS.get(rule, {})
    new = {what: why for what, why in broken.items() if what not in allowed}
    assert not new, f"{rule}: {new}"
    spare = [what for what in allowed if what not in broken]
    assert not spare, f"{rule}: no longer needed in EXCEPTIONS: {spare}"


def functions() -> dict[str, int]:
    """{module.function or module.Class.method: lines}"""
    lines = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if not isinstance(child, ast.ClassDef):
                    lines[f"{prefix}.{child.name}"] = child.end_lineno - child.lineno + 1
                collect(child, f"{prefix}.{child.name}")
            else:
                collect(child, prefix)

    for name, tree in TREES.items():
        collect(tree, name)
    return lines


def circle(imports: list[Import]) -> list[str] | None:
    """The modules of an import circle, None if there is none."""
    graph: dict[str, set[str]] = {}
    for i in imports:
        graph.setdefault(i.by, set()).add(i.of)
    while graph:  # take away the modules that import nothing that is left
        leaves = [name for name, of in graph.items() if not of & graph.keys()]
        if not leaves:
            break
        for name in leaves:
            del graph[name]
    if not graph:
        return None
    path = [min(graph)]
    while path[-1] not in path[:-1]:
        path.append(min(graph[path[-1]] & graph.keys()))
    return path[path.index(path[-1]) :]


def test_no_import_circle():
    assert circle([Import("a", "b", True), Import("b", "c", False), Import("c", "b", True)]) == ["b", "c", "b"]
    assert circle(OURS) is None


def test_own_modules_are_imported_at_the_top():
    check("at the top", {str(i): 1 for i in OURS if not i.at_top})


def test_registries_and_measurements_need_no_run():
    independent = REGISTRIES | MEASURING
    check("independent of engine", {str(i): 1 for i in OURS if i.by in independent and wing(i.of) == "engine"})
    assert not [str(i) for i in OURS if i.by in independent and (i.of in COMMANDS or wing(i.of) == "study")]


def test_the_meter_needs_torch_alone():
    needed = {i.of.partition(".")[0] for i in IMPORTS if i.by == "gradsplit"}
    assert "torch" in needed and needed - {"torch"} <= sys.stdlib_module_names


def test_the_two_wings_hardly_touch():
    """`study` knows of a run only its options and its folder, and `engine` nothing of `study`."""
    allowed = {"data", *REGISTRIES, *(f"engine.{name}" for name in OF_A_RUN)}
    assert not [str(i) for i in OURS if wing(i.by) == "study" and wing(i.of) != "study" and i.of not in allowed]
    assert not [str(i) for i in OURS if wing(i.by) == "engine" and wing(i.of) in ("study", "benchmarks")]


def test_commands_are_imported_by_benchmarks_and_tests_alone():
    assert not [str(i) for i in OURS if i.of in COMMANDS and wing(i.by) != "benchmarks"]


def test_what_only_reports_need_is_imported_by_them_alone():
    library = [i for i in IMPORTS if i.of.partition(".")[0] in REPORTS_ONLY]
    elsewhere = [str(i) for i in library if wing(i.by) not in ("study", "benchmarks") and i.by != "report"]
    assert len(library) > len(elsewhere)
    check("reports only", dict.fromkeys(elsewhere))


def test_the_top_is_read_at_a_glance():
    top = [name for name in SOURCES if not wing(name)]
    assert len(top) <= MOST_AT_THE_TOP, top


def test_functions_are_short():
    check("function", {name: n for name, n in functions().items() if n > MOST_LINES})
