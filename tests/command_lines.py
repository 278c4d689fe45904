"""The command lines of the published code, as examples/README.md writes them for our scripts."""

import re
import shlex
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "examples/README.md"


def command_lines(script: str, given: dict[str, str]) -> list[list[str]]:
    """The arguments of each line that starts ``script``, with words replaced as ``given`` says."""
    part = re.search(r"<!-- commands -->\n(.*?)<!-- end -->", README.read_text(), re.DOTALL)
    found = re.findall(rf"\| `{script} ([^`]*)` \|$", part[1] if part else "", re.MULTILINE)
    return [[given.get(word, word) for word in shlex.split(line)] for line in found]
