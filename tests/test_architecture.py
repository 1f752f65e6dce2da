"""The architecture as rules: who imports whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "configs",
    "data",
    "models",
    "tools",
    "benchmarks",
    "logger",
    "lr_scheduler",
    "utils",
    "main",
    "save_logits",
}
# What each part may import of ours; the programs at the top may import everything but each other.
MAY_IMPORT = {
    "configs": {"configs"},
    "data": {"data"},
    "models": {"models"},
    "logger": set(),
    "lr_scheduler": {"configs"},
    "utils": set(),
    "main": OURS - {"main", "save_logits", "tools", "benchmarks"},
    "save_logits": OURS - {"main", "save_logits", "tools", "benchmarks"},
    "tools": OURS - {"main", "save_logits", "benchmarks"},
    "hubconf": {"models"},
}
STORE_FILES = ("data/store/reader.py",)


def modules() -> list[Path]:
    folders = [
        path
        for name in ("configs", "data", "models", "tools")
        for path in sorted((ROOT / name).rglob("*.py"))
    ]
    return folders + sorted(ROOT.glob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    ours = {name.split(".")[0] for name in imports(path)} & OURS
    assert ours <= MAY_IMPORT[name_of(path)]


def store_closure() -> list[Path]:
    """The store's file and every file of ours that it needs."""
    pending, seen = [ROOT / name for name in STORE_FILES], []
    while pending:
        path = pending.pop()
        seen.append(path)
        pending += [
            ROOT / f"{name.replace('.', '/')}.py"
            for name in imports(path)
            if name.split(".")[0] in OURS and ROOT / f"{name.replace('.', '/')}.py" not in seen
        ]
    return seen


def test_the_store_needs_numpy_and_the_standard_library_alone():
    for path in store_closure():
        foreign = (
            {name.split(".")[0] for name in imports(path)}
            - set(sys.stdlib_module_names)
            - {"numpy", "data"}
        )
        assert not foreign, f"{path.name} imports {foreign}"


def test_importing_reads_no_file_of_ours_and_writes_nothing(tmp_path):
    """Every module in one fresh process, from a foreign folder: no logger configured, no CUDA
    started, no draw taken, no file written.
    """
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules()
    ]
    code = f"""
import importlib, logging, random, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, torch, timm, matplotlib
before = random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(), list(logging.root.handlers)
for name in {names!r}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
after = random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(), list(logging.root.handlers)
assert before == after
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "" and list(tmp_path.iterdir()) == []


def draws(path: Path) -> list[str]:
    """Calls like random.x(...) or numpy.random.x(...) that draw from a generator nobody passed."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text = ast.unparse(node.func)
            if text.startswith(("random.", "np.random.", "numpy.random.")) and text.rsplit(".", 1)[
                -1
            ] not in ("Generator", "PCG64", "MT19937", "SeedSequence", "default_rng"):
                found.append(f"{path.name}: {text}")
            if text in (
                "torch.rand",
                "torch.randn",
                "torch.randint",
                "torch.randperm",
                "torch.manual_seed",
            ) and not any(keyword.arg == "generator" for keyword in node.keywords):
                found.append(f"{path.name}: {text}")
    return found


def test_no_module_level_draw_in_data():
    assert [call for path in sorted((ROOT / "data").rglob("*.py")) for call in draws(path)] == []


def test_the_draw_finder_finds(tmp_path):
    (tmp_path / "bad.py").write_text("import random, torch\nrandom.random()\ntorch.randperm(3)\n")
    assert draws(tmp_path / "bad.py") == ["bad.py: random.random", "bad.py: torch.randperm"]
