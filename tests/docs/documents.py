"""What the documents show: their code blocks, and the commands in these and in the text."""

import re
import shlex
from pathlib import Path

from tests.support.helpers import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "bash", "sh", "console")  # languages of blocks that may hold commands
STARTS = ("python ", "torchrun ", "srun torchrun ", "make ")


def marked(page: Path, kind: str) -> list[tuple[str, str]]:
    """(name, text) of the code blocks under a comment <!-- kind: name -->."""
    pattern = rf"<!-- {kind}:? ?([\w.-]*) -->\n```\w*\n(.*?)```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The texts of a page's code blocks in some languages; "" is a block that names none."""
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's code blocks."""
    return [words for text in blocks(page, *SHELL) for words in commands_in(text)]


def commands_in(text: str) -> list[list[str]]:
    """The commands in a block as words, comments left out."""
    return [
        shlex.split(line.removesuffix(" &"), comments=True)
        for line in joined(text)
        if line.startswith(STARTS)
    ]


def joined(text: str) -> list[str]:
    """A block's lines, continuation lines joined."""
    return text.replace("\\\n", " ").splitlines()


def inline_commands(page: Path) -> list[list[str]]:
    """The commands in a page's text; a program's name alone is none."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    codes = re.findall(r"`([^`\n]+)`", text)
    return [shlex.split(code) for code in codes if code.startswith(STARTS)]
