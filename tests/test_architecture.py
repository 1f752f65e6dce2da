"""The architecture as rules: who imports whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"configs", "data", "models", "logger", "lr_scheduler", "utils"}
# What each part may import of ours.
MAY_IMPORT = {
    "configs": {"configs"},
    "data": {"data"},
    "models": {"models"},
    "logger": set(),
    "lr_scheduler": {"configs"},
    "utils": {"configs", "logger"},
    "hubconf": {"models"},
    "main": BELOW,
    "save_logits": BELOW,
    "tools": BELOW | {"tools"},
}
OURS = {*MAY_IMPORT, "benchmarks"}
STORE_FILES = ("data/store/reader.py",)
MODULES = sorted(ROOT.glob("*.py")) + [
    path
    for folder in ("configs", "data", "models", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OWN_GENERATORS = {"Generator", "PCG64", "MT19937", "SeedSequence", "default_rng"}
TORCH_DRAWS = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "manual_seed")}

IMPORT_ALL = """
import importlib, logging, random, sys
sys.path.insert(0, sys.argv[1])
import numpy, torch, timm, matplotlib
def state():
    draws = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return draws, list(logging.root.handlers)
before = state()
for name in sys.argv[2:]:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
assert before == state()
"""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert {name.split(".")[0] for name in imports(path)} & OURS <= MAY_IMPORT[part]


def test_the_store_needs_numpy_and_the_standard_library_alone():
    allowed = sys.stdlib_module_names | {"numpy", "data"}
    pending, seen = [ROOT / name for name in STORE_FILES], set()
    while pending:
        path = pending.pop()
        seen.add(path)
        names = imports(path)
        foreign = {name for name in names if name.split(".")[0] not in allowed}
        assert not foreign, f"{path.name} imports {foreign}"
        ours = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("data.")}
        pending += ours - seen
    assert len(seen) > 1


def test_importing_reads_no_file_of_ours_and_writes_nothing(tmp_path):
    """No logger is configured, no CUDA started, no draw taken, from a foreign folder."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
    ]
    command = [sys.executable, "-c", IMPORT_ALL, str(ROOT), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def draws(path: Path) -> list[str]:
    """Calls like random.x(...) or numpy.random.x(...) that draw from a generator nobody passed."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = ast.unparse(node.func)
        is_global = name.startswith(("random.", "np.random.", "numpy.random."))
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        if (is_global and name.rpartition(".")[2] not in OWN_GENERATORS) or (
            name in TORCH_DRAWS and not has_generator
        ):
            found.append(f"{path.name}: {name}")
    return found


def test_no_module_level_draw_in_data(tmp_path):
    assert [call for path in sorted((ROOT / "data").rglob("*.py")) for call in draws(path)] == []
    (tmp_path / "bad.py").write_text("import random, torch\nrandom.random()\ntorch.randperm(3)\n")
    assert draws(tmp_path / "bad.py") == ["bad.py: random.random", "bad.py: torch.randperm"]
