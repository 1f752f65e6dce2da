"""The console commands of an installed package, which has the checkout's layout below `tinyvit`.

`tinyvit-train` runs main.py, `tinyvit-save-logits` save_logits.py, `tinyvit-NAME` tools/NAME.py.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"train": "main", "save_logits": "save_logits"}


def run() -> None:
    """Run the program that this command is called after."""
    name = Path(sys.argv[0]).stem.removeprefix("tinyvit-").replace("-", "_")
    program = ROOT / f"{PROGRAMS.get(name, f'tools/{name}')}.py"
    sys.path.insert(0, str(ROOT))  # where programs find the rooms by their names in the checkout
    runpy.run_path(str(program), run_name="__main__")
