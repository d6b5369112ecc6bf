"""Lines, Python tokens and characters a line of each section of train_gpt2.py.

    python records/size.py                         # of the file as it is
    python records/size.py HEAD~1                  # and of a commit, to compare

A section begins with a line of dashes and a comment. Comments and docstrings are no tokens; empty lines have no
characters.
"""

import argparse
import io
import re
import signal
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def measure(lines: list[str], first: int, last: int, tokens: list) -> tuple[int, int, float]:
    """(lines, tokens, characters a line) of the lines from `first` up to `last`, counted from 0."""
    full = [len(line) for line in lines[first:last] if line.strip()]
    return last - first, sum(first < row <= last for row in tokens), sum(full) / max(1, len(full))


def sections(text: str) -> list[tuple[str, int, int, float]]:
    """(name, lines, tokens, characters a line) of each section, then of the whole file."""
    rows, before, depth = [], None, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and depth == 0 and (before is None or before in NOT_CODE)
        if token.type not in NOT_CODE and not docstring:
            rows.append(token.start[0])
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        before = token.type
    lines = text.splitlines()
    borders = [(0, "header")]
    for number, line in enumerate(lines[:-1]):
        if re.fullmatch("# -{20,}", line) and lines[number + 1].startswith("# "):
            borders.append((number, re.split(r"[.:]", lines[number + 1][2:])[0]))
    borders.append((len(lines), ""))
    parts = [(name, *measure(lines, first, last, rows))
             for (first, name), (last, _) in zip(borders, borders[1:], strict=False)]
    return [*parts, ("all", *measure(lines, 0, len(lines), rows))]


def main() -> None:
    texts = {"train_gpt2.py": (ROOT / "train_gpt2.py").read_text(encoding="utf-8")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    for commit in parser.parse_args().commits:
        shown = subprocess.run(["git", "show", "--end-of-options", f"{commit}:train_gpt2.py"], cwd=ROOT,
                               check=False, capture_output=True, text=True)
        if shown.returncode:
            raise SystemExit(f"{commit} has no train_gpt2.py: {' '.join(shown.stderr.split())}")
        texts[commit] = shown.stdout
    for name, text in texts.items():
        print(f"{name:40} {'lines':>7} {'tokens':>7} {'characters/line':>16}")
        for part, lines, tokens, characters in sections(text):
            print(f"  {part[:38]:38} {lines:7,} {tokens:7,} {characters:16.1f}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
