#!/usr/bin/env python3
"""coverage_table.py REPORT.json COMMAND: the Markdown page of diff-cover's report."""

import datetime
import json
import sys
from pathlib import Path

HEAD = """\
# Coverage of our own lines

Command: `{command}`, {date}, Python {python}, on a CPU

Own lines are those that the diff adds to sglang 0.5.9, without tests and benchmarks. Only
a CPU ran: what launches a kernel is not covered here. Test servers end by SIGKILL, which
loses what they ran: files and lines that only a server reaches are listed as missing,
though the tests ask real servers for them. Lines are numbered as in the merged file.

| file | own lines | run | missing |
| --- | --- | --- | --- |"""


def ranges(numbers: list[int]) -> str:
    """ "1-3, 7" for [1, 2, 3, 7]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def row(name: str, run: int, missing: list[int]) -> str:
    total = run + len(missing)
    share = f"{run / total:.0%}"
    return f"| {name} | {total} | {share} | {ranges(missing)} |"


def main() -> None:
    files = json.loads(Path(sys.argv[1]).read_text())["src_stats"]
    version = ".".join(map(str, sys.version_info[:3]))
    print(HEAD.format(command=sys.argv[2], date=datetime.date.today(), python=version))
    all_run, all_missing = 0, []
    for path, found in sorted(files.items()):
        run, missing = len(found["covered_lines"]), found["violation_lines"]
        print(row(path.removeprefix("python/"), run, missing))
        all_run, all_missing = all_run + run, all_missing + [*missing]
    total = all_run + len(all_missing)
    print(f"| all | {total} | {all_run / total:.1%} | {len(all_missing)} lines |")


if __name__ == "__main__":
    main()
