"""How much code there is: tokens (without comments and docstrings), wide lines, comments, by
folder.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

LAYOUT = {"NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "COMMENT"}  # tokens that do not count
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ASIDE = ("tests", "benchmarks")  # what is no product code
WIDE = 100  # columns


def measure(text: str) -> Counter:
    """The counts of one file."""
    documented = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    docstrings = {n.body[0].lineno for n in documented if ast.get_docstring(n) is not None}
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if tokenize.tok_name[token.type] not in LAYOUT
        and not (token.type == tokenize.STRING and token.start[0] in docstrings)
    ]
    lines = text.splitlines()
    wide = sum(len(line) > WIDE for line in lines)
    comments = sum(line.lstrip().startswith("#") for line in lines)
    return Counter(tokens=len(tokens), lines=len(lines), wide=wide, comments=comments)


def main(argv: list[str] | None = None) -> int:
    """Print a row for each folder, and one for the product."""
    parser = argparse.ArgumentParser(prog="python -m tools.size", description=__doc__)
    default = Path(__file__).resolve().parents[1]
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="(the repository)")
    root = parser.parse_args(argv).folder
    sizes: dict[str, Counter] = {}
    for path in sorted(root.rglob("*.py")):
        *folders, _ = path.relative_to(root).parts
        if any(folder.startswith(".") for folder in folders):
            continue
        room = "/".join(folders) or "programs"
        if room.startswith(ASIDE):
            room = folders[0]
        sizes.setdefault(room, Counter()).update(measure(path.read_text(encoding="utf-8")))
    product = sum((size for room, size in sizes.items() if room not in ASIDE), Counter())
    print(f"{'tokens':>8}{'lines':>8}{'wide':>6}{'comments':>10}")
    for room, size in [*sorted(sizes.items()), ("product", product)]:
        numbers = [size[name] for name in ("tokens", "lines", "wide", "comments")]
        print("{:8,}{:8,}{:6,}{:10,}  ".format(*numbers) + room)
    return 0


if __name__ == "__main__":
    sys.exit(main())
