"""The overlay's changes as a patch for upstream that `git am` takes."""

import difflib
import io
import subprocess
import textwrap
from datetime import datetime
from email.utils import format_datetime, formataddr

from overlay import ledger
from overlay.plan import Change
from overlay.stack import Part

WRAP = textwrap.TextWrapper(72, subsequent_indent="  ", break_long_words=False)
WRAP.break_on_hyphens = False


def patch(changes: list[Change], part: Part) -> bytes:
    """One commit. The same changes give the same bytes, save for the author, who is git's
    configured user if there is one."""
    commit = part.commit
    git = lambda key: subprocess.run(["git", "config", key], capture_output=True).stdout
    name = git("user.name").decode().strip() or commit["name"]
    email = git("user.email").decode().strip() or commit["email"]
    date = format_datetime(datetime.fromisoformat(commit["date"]))
    subject, _, body = message(changes, part).partition("\n\n")
    head = (
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\n"
        f"From: {formataddr((name, email))}\nDate: {date}\nSubject: {subject}\n"
        "MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\n"
        f"Content-Transfer-Encoding: 8bit\n\n{body}---\n\n"
    )
    ordered = sorted(changes, key=lambda change: change.path)
    return (head + "".join(map(_hunks, ordered))).encode()


def _hunks(change: Change) -> str:
    path, is_new = change.path, change.old is None
    texts = (list(io.StringIO((t or b"").decode())) for t in (change.old, change.new))
    names = "/dev/null" if is_new else f"a/{path}", f"b/{path}"
    mode = "new file mode 100644\n" if is_new else ""
    lines = [f"diff --git a/{path} b/{path}\n{mode}"]
    for line in difflib.unified_diff(*texts, *names):
        end = "" if line.endswith("\n") else "\n\\ No newline at end of file\n"
        lines.append(line + end)
    return "".join(lines)


def message(changes: list[Change], part: Part) -> str:
    """Subject and PR body: the reasons in the ledgers, file by file."""
    texts = [part.commit["subject"], part.commit["body"].strip()]
    for change in sorted(changes, key=lambda c: (c.old is None, c.path)):
        file = part.files.get(change.path)
        text = file.read_text() if file else ""
        whys = []
        for names, entry in ledger.parse(text).items():
            thread = f" ({entry['thread']})" if "thread" in entry else ""
            whys.append(f"{names}: {entry['why']}{thread}")
        lines = [change.path + (" (new)" if change.old is None else "")]
        if not whys:
            lines += WRAP.wrap("  " + ledger.docstring(text).partition("\n\n")[0])
        for why in dict.fromkeys(whys):
            lines += WRAP.wrap(f"- {why}")
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"
