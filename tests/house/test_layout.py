"""Who may import whom (DESIGN.md, section 7), what is packaged, what is exported, and what starting up costs."""

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDERS = ("circuits", "graph", "kernels", "replacements")
PARTS = FOLDERS[1:]  # subpackages of `circuits` that stand beside it in a checkout
MAY_IMPORT = {
    "kernels": {"kernels"},
    "graph": {"graph"},
    "replacements": {"replacements", "kernels"},
    "circuits": {"circuits", "graph", "kernels", "replacements"},
}
BANNED = {"graph": {"torch", "transformers", "safetensors"}, "kernels": {"transformers"}}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import in a file, also inside functions; a relative module begins with a dot."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            if module == "circuits":
                yield from ((node.lineno, f"circuits.{alias.name}") for alias in node.names)


def owner(module: str) -> str | None:
    """Which of the four folders a module is in, None for other people's."""
    parts = module.split(".")
    if parts[0] != "circuits":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in PARTS else "circuits"


def python_files(folder: str) -> list[Path]:
    """Every Python file of a folder."""
    files = sorted((CHECKOUT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python files"
    return files


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_directions(folder: str) -> None:
    """Each folder imports only what it may; a part that is not `circuits` does not import `circuits` itself."""
    wrong = [
        f"{file.relative_to(CHECKOUT)}:{line} imports {module}"
        for file in python_files(folder)
        for line, module in imports(file)
        if (of := owner(module)) is not None and of not in MAY_IMPORT[folder]
    ]
    assert not wrong


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "examples", "benchmarks"])
def test_no_bare_and_no_relative_imports(folder: str) -> None:
    """Nobody imports `graph`, `kernels` or `replacements` but as part of `circuits`; all imports are absolute."""
    wrong = [
        f"{file.relative_to(CHECKOUT)}:{line} imports {module}"
        for file in python_files(folder)
        for line, module in imports(file)
        if module.startswith(".") or module.split(".")[0] in PARTS
    ]
    assert not wrong


@pytest.mark.parametrize("folder", BANNED)
def test_libraries_that_a_folder_does_without(folder: str) -> None:
    """A graph knows no torch, kernels know no transformers."""
    wrong = [
        f"{file.relative_to(CHECKOUT)}:{line} imports {module}"
        for file in python_files(folder)
        for line, module in imports(file)
        if module.split(".")[0] in BANNED[folder]
    ]
    assert not wrong


def test_package_list_is_the_folders() -> None:
    """pyproject.toml lists exactly the folders with Python files, and maps the four names to the four folders."""
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for folder in FOLDERS:
        for file in python_files(folder):
            inside = file.parent.relative_to(CHECKOUT).as_posix().replace("/", ".")
            found.add(inside if folder == "circuits" else f"circuits.{inside}")
    assert sorted(settings["packages"]) == sorted(found)
    expected = {"circuits": "circuits"} | {f"circuits.{part}": part for part in PARTS}
    assert settings["package-dir"] == expected


def test_kernels_is_no_package_of_its_own() -> None:
    """With an `__init__.py`, a process started in the checkout would import it instead of Hugging Face's `kernels`."""
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()
    assert not list(CHECKOUT.glob("conftest.py"))
    assert not (CHECKOUT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["circuits", "circuits.graph", "circuits.replacements"])
def test_public_names(module: str) -> None:
    """`__all__` is sorted, has no name twice, and everything in it is there; nothing public is left out of it."""
    package = importlib.import_module(module)
    exported: list[str] = package.__all__
    assert len(set(exported)) == len(exported)
    assert exported == sorted(exported, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert [name for name in exported if not hasattr(package, name)] == []
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("circuits.")
        for alias in node.names
    }
    assert imported
    assert set(exported) - {"__version__"} == imported


@pytest.mark.parametrize("module", ["circuits", "circuits.graph", "circuits.replacements"])
def test_no_public_name_is_a_module(module: str) -> None:
    """Importing a submodule sets it on its package, so a public function of that name would be gone."""
    package = importlib.import_module(module)
    folder = Path(str(package.__file__)).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert len(modules) > 3
    assert set(package.__all__) & modules == set()


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a fresh Python process has loaded at its end, started outside the checkout."""
    script = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        f"sys.argv = ['circuits', *{list(arguments)!r}]\n"
        "import circuits\n"
        "try:\n"
        "    if sys.argv[1:]: runpy.run_module('circuits', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('\\n' + ' '.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",)])
def test_start_is_light(arguments: tuple[str, ...]) -> None:
    """`import circuits`, `circuits --help` and `--version` wait for no torch, transformers, numpy or networkx."""
    loaded = loaded_by(*arguments)
    assert "circuits" in loaded
    assert loaded & {"torch", "transformers", "numpy", "networkx", "safetensors"} == set()


def test_help_lists_the_commands() -> None:
    """`circuits --help` says what the program is for and lists every command."""
    command = [sys.executable, "-m", "circuits", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert "Attribution graphs" in done.stdout
    listed = {line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()}
    assert {"trace", "show", "render", "info", "train"} <= listed
    assert done.stderr == ""
