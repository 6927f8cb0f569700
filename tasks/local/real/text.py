"""Documents out of the files of ``tasks.local.real.corpus``: each function gives the documents of one file's text."""

import re
from collections.abc import Iterator

# Macros of man(7) whose arguments are text, in bold, italics or both; headings and tags too.
_TEXT_MACROS = frozenset(
    ["B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SB", "SM", "SH", "SS", "IP", "TP", "TQ", "UR", "MT"]
)
_LEFT_OUT = {"de": ".", "ig": ".", "nf": "fi", "EX": "EE", "TS": "TE", "PS": "PE", "EQ": "EN"}
"""Macros that begin and end what is no running text: definitions, examples, tables, pictures, equations."""
_ESCAPES = (
    (r"\\f(?:\[[^\]]*\]|\(..|.)", ""),  # fonts
    (r"\\[&/,|^%:)cp]", ""),
    (r"\\s[-+]?\d+", ""),
    (r"\\-", "-"),
    (r"\\(?:\(aq|\[aq\])", "'"),
    (r"\\(?:\(dq|\[dq\])", '"'),
    (r"\\(?:\(bu|\[bu\])", "•"),
    (r"\\(?:\(en|\[en\])", "–"),
    (r"\\(?:\(em|\[em\])", "—"),
    (r"\\(?:\(ha|\[ha\])", "^"),
    (r"\\(?:\(ti|\[ti\])", "~"),
    (r"\\[~ ]", " "),
    (r"\\e", r"\\"),
    (r"\\(?:\(..|\[[^\]]*\]|\*\(..|\*\[[^\]]*\]|\*.)", ""),
    (r"\\$", ""),
)


def tcl(text: str) -> Iterator[str]:
    """A Tcl source from its first command on: the notices before it are the same in many files. Indexes of packages are none."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines))
    body = "\n".join(line.rstrip() for line in lines[start:])
    if "package ifneeded" not in body and max(map(len, lines), default=0) < 400:  # tables that a program wrote
        yield body


def metamath(text: str) -> Iterator[str]:
    """The sections of a Metamath database; proofs, which are compressed to letters, are left out, as are the contributors."""
    for section in re.split(r"^\s*\$\(\n(?=(?:#[*#]|=-|-\.){10})", text, flags=re.MULTILINE):
        _, _, body = section.partition("$)")  # the header's comment
        body = re.sub(r"\s*\$=.*?\$\.", " $.", body, flags=re.DOTALL)
        body = re.sub(r"\s+\((?:Contributed|Proof\s+shortened|Revised)\s+by[^()]*\)", "", body)
        yield re.sub(r"\n\s*\n", "\n", body)


def dictd(text: str) -> Iterator[str]:
    """The entries of a dictionary in dictd's format: a headword, its definitions indented below."""
    for entry in re.split(r"\n(?=\S)", text):
        if not entry.startswith("00-database") and "\n" in entry:
            yield entry


def man_source(text: str) -> Iterator[str]:
    """A manual page's source without its comments. A page that only names another one is none."""
    body = "\n".join(line.rstrip() for line in text.splitlines() if not line.startswith(('.\\"', "'\\\"", "'\\")))
    if not body.startswith(".so "):
        yield body


def man_as_text(text: str) -> Iterator[str]:
    """A manual page's running text, without examples and tables, up to the notes of its translators."""
    lines: list[str] = []
    until = None
    for line in text.splitlines():
        macro, _, rest = line[1:].strip().partition(" ") if line.startswith((".", "'")) else ("", "", line)
        if macro == "so":
            return
        if until is not None:
            until = None if macro == until else until
        elif macro in _LEFT_OUT:
            until = _LEFT_OUT[macro]
        elif macro == "SH" and rest.strip('"').startswith(("ÜBERSETZUNG", "COPYRIGHT", "KOLOPHON", "AUTOR")):
            break
        elif macro in _TEXT_MACROS:
            words = " ".join(quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest))
            lines += ["", words] if macro in {"SH", "SS"} else [words]
        elif not macro and rest.strip():
            lines.append(rest.rstrip())
    body = "\n".join(lines)
    for pattern, written in _ESCAPES:
        body = re.sub(pattern, written, body, flags=re.MULTILINE)
    yield re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", body))
