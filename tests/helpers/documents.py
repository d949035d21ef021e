"""What the README and the pages of the documentation hold: code blocks and commands."""

import re

from repository import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Each `pahm` command in a shell block: its page and its words."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r" #.*", "", line).replace("-m pahm", "pahm").split()
                if "pahm" in words:
                    found.append((page, words[words.index("pahm") + 1 :]))
    return found
