"""A Python file of one's own, loaded so that it and its neighbours import what lies beside them, also where a module here has
the same name: `models`, `data`, `losses`, ... Ours stay ours.

Names are resolved by who imports: each module of such a folder has an `__import__` of its own, which also serves imports
within functions, long after the file was loaded. Python knows the modules of the folder as those of a package of their own.
"""

import builtins
import hashlib
import os
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def module_names(folder: str) -> set[str]:
    """Names of the modules and packages in `folder`; a folder without a Python file is none."""
    names = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # one that may not be read
                if entry.name.endswith(".py") or any(name.endswith(".py") for name in os.listdir(entry.path)):
                    names.add(entry.name.removesuffix(".py"))
    return names


class Imports:
    """What the modules of `folder`, and of what its file adds to sys.path, import: an `__import__`, and a finder of Python's for
    the modules of `package`."""

    def __init__(self, package: str, folder: str) -> None:
        self.package = package
        self.usual = {*sys.path, HERE} - ({folder} - {HERE})
        self.names: dict[str, set[str]] = {}  # of modules by folder, where one of them is called like one of ours
        self.ours = module_names(HERE)
        self.folder = folder

    def folders(self) -> list[str]:
        """Where names are looked up first: folders in which one of ours is hidden."""
        for folder in (self.folder, *sys.path):
            if folder not in self.names and folder not in self.usual and os.path.isdir(folder):
                names = module_names(folder)
                self.names[folder] = names if names & self.ours else set()
        return [folder for folder, names in self.names.items() if names]

    def __call__(self, name, globals=None, locals=None, fromlist=(), level=0):
        top = name.partition(".")[0]
        if level or not any(top in self.names[folder] for folder in self.folders()):
            return builtins.__import__(name, globals, locals, fromlist, level)
        sys.modules[self.package].__path__ = self.folders()
        module = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist)
        return module if fromlist else sys.modules[f"{self.package}.{top}"]

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.startswith(f"{self.package}.") else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(name, spec.loader.path, self)
        return spec


class Loader(SourceFileLoader):
    """Gives a module its `__import__` before it runs."""

    def __init__(self, name: str, path: str, imports: Imports) -> None:
        super().__init__(name, path)
        self.imports = imports

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": self.imports}
        super().exec_module(module)


def load(path: str) -> ModuleType:
    """The module of the file `path`, run anew; its folder's other modules are run once. Raises whatever the file raises."""
    folder = os.path.dirname(path)
    package = f"own_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    imports = next((f for f in sys.meta_path if isinstance(f, Imports) and f.package == package), None)
    if imports is None:
        imports = Imports(package, folder)
        sys.meta_path.insert(0, imports)
    if folder not in sys.path:
        sys.path.append(folder)  # behind ours
    loader = Loader(package, path, imports)
    spec = spec_from_file_location(package, path, loader=loader, submodule_search_locations=[folder])
    module = module_from_spec(spec)
    sys.modules[package] = module
    loader.exec_module(module)
    return module
