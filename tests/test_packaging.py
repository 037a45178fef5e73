"""What is installed, and who may import whom."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import qvg_paged

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"qvg_paged": "qvg_paged", "kernels": "qvg_paged.kernels", "scheduler": "qvg_paged.scheduler"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Absolute names of modules that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_every_folder_with_an_init_is_a_listed_package_and_the_other_way_round() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    places = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert sorted(listed) == sorted(places) == sorted(FOLDERS.values())
    assert {places[name]: name for name in listed} == FOLDERS
    inits = {
        path.parent.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("__init__.py")
    }
    assert inits == set(FOLDERS)


def test_the_folders_are_imported_under_their_installed_names() -> None:
    for folder, name in FOLDERS.items():
        module = importlib.import_module(name)
        assert module.__file__ is not None
        if folder != "qvg_paged":
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(folder)


def test_the_package_says_that_it_is_typed() -> None:
    assert qvg_paged.__file__ is not None
    assert (Path(qvg_paged.__file__).parent / "py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["qvg_paged"]


def test_the_version_is_the_same_everywhere() -> None:
    assert qvg_paged.__version__ == PYPROJECT["project"]["version"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_point_downwards(path: Path) -> None:
    """scheduler -> qvg_paged -> kernels; only the command line may look up, to the scheduler and the benchmarks."""
    folder = path.parent.name
    names = imported(path)
    own = {name for name in names if name == "qvg_paged" or name.startswith("qvg_paged.")}
    if folder == "kernels":
        up = {name for name in own if not name.startswith("qvg_paged.kernels")}
    elif folder == "scheduler" or path.name == "cli.py":
        up = set()
    else:
        up = {name for name in own if name.startswith("qvg_paged.scheduler")}
    assert not up
    outside = {name.split(".")[0] for name in names}
    assert not outside & {"kernels", "scheduler", "tests"}, "installed names only"
    if path.name != "cli.py":
        assert "benchmarks" not in outside
    if folder == "scheduler":
        assert not outside & {"torch", "triton", "numpy"}, "no tensors here"


@pytest.mark.parametrize("first", ["qvg_paged.kernels.layout", "qvg_paged.kernels", "qvg_paged.scheduler"])
def test_either_end_may_be_imported_first(first: str, tmp_path: Path) -> None:
    """In a process of its own, from a folder where nothing shadows the installed packages."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {first}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["qvg_paged", "qvg_paged.kernels", "qvg_paged.scheduler"])
def test_public_names_exist_and_are_listed_in_order(name: str) -> None:
    module = importlib.import_module(name)
    assert all(hasattr(module, public) for public in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_module_has_a_docstring_and_every_public_function_too(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    bare = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            nested = isinstance(node, ast.FunctionDef) and node not in _top_level(tree)
            if not nested and not ast.get_docstring(node):
                bare.append(node.name)
    assert bare == []


def _top_level(tree: ast.Module) -> set[ast.stmt]:
    """Functions of the module and methods of its public classes; `jit` kernels explain themselves in the module."""
    found: set[ast.stmt] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found |= {child for child in node.body if isinstance(child, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
            found.add(node)
    return found
