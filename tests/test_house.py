"""The map in CONTRIBUTING.md is that of the code: a file imports only what stands below it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "l2l_ref"


def drawn() -> dict[str, int]:
    """{file: its line in the map, from the top}."""
    (block,) = re.findall(r"```map\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    lines = [line.split() for line in block.splitlines()]
    names = [name for line in lines for name in line]
    assert len(names) == len(set(names))
    return {name: number for number, line in enumerate(lines) for name in line}


def name_of(module: str) -> str:
    """`l2l_ref.data.images` -> `data/images`; the package itself is `__init__`."""
    return module.removeprefix("l2l_ref").strip(".").replace(".", "/") or "__init__"


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if exists(module) else node.module)
    return {name_of(module) for module in found if module.split(".")[0] == "l2l_ref"}


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def files() -> dict[str, Path]:
    """Every file of the package, by its name in the map."""
    paths = PACKAGE.rglob("*.py")
    return {str(p.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__"): p for p in paths}


def test_every_file_is_on_the_map():
    places = {"run.py", "bench/*", "examples/*"}
    packages = {"experiment"}  # its __init__ is a docstring
    assert drawn().keys() - places == files().keys() - packages


def test_arrows_run_down():
    lines, paths = drawn(), files()
    del paths["experiment"]
    upward = [
        f"{name} -> {other}"
        for name, path in paths.items()
        for other in imports(path)
        if not other.startswith("backend/_C") and lines[other] <= lines[name]
    ]
    assert upward == []


def test_the_front_door():
    import l2l_ref

    assert sorted(l2l_ref.__all__) == l2l_ref.__all__
    assert all(hasattr(l2l_ref, name) for name in l2l_ref.__all__)
    assert l2l_ref.meta_train.__module__ == "l2l_ref.meta_training"


def test_importing_is_as_cheap_as_torch():
    heavy = {"torchvision", "matplotlib", "PIL"}
    done = subprocess.run(
        [sys.executable, "-c", f"import l2l_ref, sys; print({heavy} & sys.modules.keys())"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"
