"""Text of twelve domains out of Debian packages, documented functions out of them, GSM8K and HumanEval: one JSON-lines
file per domain, a document a line.

Which documents are taken depends on their names alone, so the same package versions give the same bytes everywhere.
manifest.json names the packages' versions and, per domain, documents, bytes and the file's SHA-256.
"""

import ast
import dataclasses
import gzip
import hashlib
import html.parser
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap

MEGABYTE = 1_000_000
MIN_BYTES = 400  # of a document
PIECE_BYTES = 2000  # least of a document that a separator ends
PROBLEMS_BYTES = 2600  # problems and functions are joined until they fill a sequence of 512 tokens
FUNCTION_BYTES = (160, 2600)  # least and most of one that is taken


@dataclasses.dataclass(frozen=True)
class Domain:
    """Where the text of a domain comes from, and how much of it is taken."""

    name: str
    packages: tuple  # of Debian
    patterns: tuple  # files of the unpacked packages, as globs
    max_bytes: int  # of text
    document_bytes: int = 48_000  # a longer document loses its end
    separator: str = ""  # a line that matches may start a new document
    strip_tags: bool = False


PYTHON_PACKAGES = ("libpython3.11-stdlib", "libpython3.11-testsuite")
KERNEL_FOLDER = "usr/share/doc/linux-doc-6.1/Documentation"
DOMAINS = (
    Domain("python", PYTHON_PACKAGES, ("usr/lib/python3.11/**/*.py",), 24 * MEGABYTE, document_bytes=200_000),
    Domain("kernel", ("linux-doc-6.1",), (f"{KERNEL_FOLDER}/**/*.rst*", f"{KERNEL_FOLDER}/**/*.txt*"), 20 * MEGABYTE),
    Domain("dictionary", ("dict-gcide",), ("usr/share/dictd/gcide.dict.dz",), 16 * MEGABYTE, separator="^[A-Za-z]"),
    Domain(
        "prose",
        ("anarchism", "jargon-text"),
        ("usr/share/doc/anarchism/markdown/*.md*", "usr/share/doc/jargon-text/jargon.txt.gz"),
        12 * MEGABYTE,
        document_bytes=MEGABYTE,
    ),
    Domain("perl", ("perl-doc",), ("usr/share/perl/**/*.pod",), 10 * MEGABYTE, document_bytes=200_000),
    Domain("go", ("golang-1.19-src",), ("usr/share/go-1.19/src/**/*.go",), 20 * MEGABYTE),
    Domain("rust", ("rust-src",), ("usr/src/*/library/**/*.rs", "usr/src/*/compiler/**/*.rs"), 20 * MEGABYTE),
    Domain("cpp", ("libboost1.74-dev",), ("usr/include/boost/**/*.hpp",), 20 * MEGABYTE),
    Domain("lisp", ("emacs-el",), ("usr/share/emacs/**/*.el.gz",), 20 * MEGABYTE),
    Domain("ruby", ("libruby3.1",), ("usr/lib/ruby/**/*.rb",), 10 * MEGABYTE),
    Domain("german", ("manpages-de",), ("usr/share/man/de/*/*.gz",), 12 * MEGABYTE),
    Domain(
        "database",
        ("postgresql-doc-15",),
        ("usr/share/doc/postgresql-doc-15/html/*.html",),
        10 * MEGABYTE,
        strip_tags=True,
    ),
)


class TextOfPage(html.parser.HTMLParser):
    """Collects what a page shows, tags left out."""

    def __init__(self):
        super().__init__()
        self.hidden = 0
        self.parts = []

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("head", "script", "style")
        if tag in ("p", "div", "tr", "li", "br", "pre", "h1", "h2", "h3", "dt", "dd"):
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("head", "script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)

    def text(self):
        return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(self.parts)).strip() + "\n"


def unpack(packages, folder):
    """Unpacks Debian packages, downloaded if they are not there; returns their versions."""
    versions = {}
    for package in packages:
        found = sorted(folder.glob(f"{package}_*.deb"))
        if not found:
            command = ["apt-get", "download", package]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            found = sorted(folder.glob(f"{package}_*.deb"))
            if done.returncode != 0 or not found:
                sys.exit(f"{package}: not downloaded; run apt-get update, or put its .deb in {folder}\n{done.stderr}")
        versions[package] = found[0].name.split("_")[1].replace("%3a", ":")
        target = folder / "unpacked" / package
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", found[0], target], check=True)
    return versions


def read_source(path):
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def documents_of(domain, folder):
    """(name, text) of every document, in the order of a hash of their names."""
    found = []
    for package in domain.packages:
        root = folder / "unpacked" / package
        for path in sorted({path for pattern in domain.patterns for path in root.glob(pattern)}):
            if not path.is_file() or path.is_symlink():
                continue
            name = f"{package}/{path.relative_to(root)}"
            text = read_source(path)
            if domain.strip_tags:
                page = TextOfPage()
                page.feed(text)
                text = page.text()
            if not domain.separator:
                found.append((name, text))
                continue
            pieces = [""]
            for line in text.splitlines(keepends=True):
                if len(pieces[-1]) >= PIECE_BYTES and re.match(domain.separator, line):
                    pieces.append("")
                pieces[-1] += line
            found += [(f"{name}#{number}", piece) for number, piece in enumerate(pieces)]
    return sorted(found, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def shortened(text, limit):
    if len(text.encode()) <= limit:
        return text
    return text.encode()[:limit].decode("utf-8", errors="ignore").rpartition("\n")[0] + "\n"


def domain_lines(domain, folder):
    """The domain's documents as JSON lines, without repetitions, as far as max_bytes goes; and their text's size."""
    lines, seen, size = [], set(), 0
    for name, text in documents_of(domain, folder):
        text = shortened(text, domain.document_bytes)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text.encode()) < MIN_BYTES or digest in seen or size + len(text.encode()) > domain.max_bytes:
            continue
        seen.add(digest)
        size += len(text.encode())
        lines.append(json.dumps({"name": name, "text": text}, ensure_ascii=False))
    return lines, size


def joined_lines(name, pieces):
    """Short pieces, several to a document: sequences are as long as in other domains."""
    lines, text, size = [], "", 0
    for piece in pieces:
        text += piece
        if len(text) >= PROBLEMS_BYTES:
            lines.append(json.dumps({"name": f"{name}#{len(lines)}", "text": text}, ensure_ascii=False))
            size += len(text.encode())
            text = ""
    return lines, size


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k_lines(path):
    """Problems of GSM8K as plain text."""
    problems = (f"Question: {record['question']}\nAnswer: {record['answer']}\n\n" for record in records_of(path))
    return joined_lines("gsm8k", problems)


def humaneval_lines(path):
    """HumanEval's problems with their solutions."""
    problems = (record["prompt"] + record["canonical_solution"].rstrip() + "\n\n\n" for record in records_of(path))
    return joined_lines("humaneval", problems)


def functions_of(text):
    """Source of the text's functions with a docstring, as if each stood alone; none of a text that does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines(keepends=True)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip() + "\n"
            if FUNCTION_BYTES[0] <= len(source.encode()) <= FUNCTION_BYTES[1]:
                found.append(source)
    return found


def function_lines(folder):
    """What HumanEval asks for, at a size that can be trained on: every documented function of the Python packages once,
    in the order of a hash."""
    functions = set()
    for package in PYTHON_PACKAGES:
        root = folder / "unpacked" / package
        for path in root.glob("usr/lib/python3.11/**/*.py"):
            if path.is_file() and not path.is_symlink():
                functions |= set(functions_of(read_source(path)))
    order = sorted(functions, key=lambda function: hashlib.sha256(function.encode()).digest())
    return joined_lines("functions", (function + "\n\n" for function in order))


def question_lines(path):
    """GSM8K's problems one by one."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), len(text.encode())


def make(out, gsm8k, gsm8k_test, humaneval, packages_folder=None):
    """Writes the corpus into the folder `out`; `packages_folder` keeps the packages for another time."""
    out.mkdir(parents=True, exist_ok=True)
    manifest = {"packages": {}, "domains": {}}

    def write(name, lines, size):
        content = "".join(line + "\n" for line in lines).encode()
        (out / f"{name}.jsonl").write_bytes(content)
        manifest["domains"][name] = {
            "documents": len(lines),
            "bytes": size,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        print(f"{name}: {len(lines)} documents, {size / MEGABYTE:.1f} MB", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(packages_folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for domain in DOMAINS:
            manifest["packages"] |= unpack(domain.packages, folder)
            lines, size = domain_lines(domain, folder)
            if not lines:
                sys.exit(f"{domain.name}: no text in {', '.join(domain.packages)}; Debian 12's packages are needed")
            write(domain.name, lines, size)
        write("functions", *function_lines(folder))
    write("gsm8k", *gsm8k_lines(gsm8k))
    write("gsm8k_test", *question_lines(gsm8k_test))
    write("humaneval", *humaneval_lines(humaneval))
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def pack(folder, archive):
    """Writes the folder's files as one .tar.xz, the same bytes for the same files."""

    def plain(entry):
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o644
        return entry

    with tarfile.open(archive, "w:xz", preset=6) as stream:
        for path in sorted(folder.glob("*.json*")):
            stream.add(path, arcname=path.name, filter=plain)
