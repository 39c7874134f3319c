"""The house rules that no linter knows: module rows, light driver, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fwm_audit

PACKAGE = Path(fwm_audit.__file__).parent
#: Lowest first: a module imports only from its own row or one above it in this table.
ROWS = {
    "pure": {"errors", "key", "catalog", "verdict", "records", "task", "confinement", "logs", "webhook", "__init__"},
    "torch": {
        *(
            "architectures",
            "arithmetic",
            "calibration",
            "datasheet",
            "embedding",
            "folding",
            "generator",
            "pairs",
            "peers",
            "target",
            "triggers",
        ),
        *("verification", "waking", "weights", "yin2022"),
    },
    "io": {
        *("storage", "checkpoint", "compaction", "ledger", "commitment"),
        *("history", "plan", "report", "exports", "page"),
    },
    "check": {"check"},
    "ray": {"dispatcher", "fleet", "releases", "train", "metrics"},
}
FOREIGN = {
    "torch": {"torch", "io", "check", "ray"},
    "timm": {"torch", "io", "check", "ray"},
    "torchvision": {"torch", "io", "check", "ray"},
    "fsspec": {"io", "check", "ray"},
    "s3fs": {"io", "check", "ray"},
    "ray": {"ray"},
}
ORDER = list(ROWS)


def row_of(module):
    (row,) = (name for name, modules in ROWS.items() if module in modules)
    return row


def imports(module):
    """Imports at the top level of a module; those inside functions are for what a process never needs."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fwm_audit":
            yield from (f"fwm_audit.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("*.py")))
def test_a_module_imports_from_its_own_row_or_one_above(module):
    mine = row_of(module)
    for name in imports(module):
        top, _, rest = name.partition(".")
        if top == "fwm_audit" and rest:
            theirs = row_of(rest)
            assert ORDER.index(theirs) <= ORDER.index(mine), f"{module} ({mine}) imports {rest} ({theirs})"
        elif top in FOREIGN:
            assert mine in FOREIGN[top], f"{module} ({mine}) imports {top}"


def test_every_row_has_its_modules():
    assert set().union(*ROWS.values()) == {path.stem for path in PACKAGE.glob("*.py")}


def test_the_package_docstring_maps_every_module():
    missing = [path.stem for path in PACKAGE.glob("[!_]*.py") if f" {path.stem} " not in fwm_audit.__doc__]
    assert missing == []


def test_the_driver_of_an_audit_loads_neither_torch_nor_ray_train():
    script = (
        "import sys, fwm_audit.fleet, jobs.audit\n"
        "print([name for name in ('torch', 'ray.train', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    assert all(getattr(fwm_audit, name) is not None for name in fwm_audit.__all__)
    with pytest.raises(AttributeError):
        _ = fwm_audit.nothing
