"""Checks includes and links of every module against cmake/layers.txt.

    check_layers.py includes ROOT
    check_layers.py links ROOT LINK_GRAPH
    check_layers.py table ROOT

Prints one line per violation and exits 1 when there is one.
"""

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
LAYER = re.compile(r"^(\w+):([\w ]*)\| (torch|torch-free)$")
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2)/")
TORCH_LIBRARY = re.compile(r"(^|[/:])(lib)?(torch|c10|caffe2)", re.IGNORECASE)
SOURCES = {".hpp", ".h", ".cpp", ".cc", ".cu", ".cuh", ".inl"}
# Sources that nvcc reads, and what they include, must not see torch, whatever the module may do.
DEVICE = {".cu", ".cuh"}


def read_layers(root):
    """The table: module -> (set of modules it may use, whether it may use torch)."""
    layers = {}
    for number, line in enumerate((root / "cmake/layers.txt").read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LAYER.match(line)
        if not match:
            raise SystemExit(f"cmake/layers.txt:{number}: not '<module>: <uses> | torch-free or torch', got '{line}'")
        module, uses, kind = match.groups()
        unknown = set(uses.split()) - set(layers)
        if unknown:
            # Only modules above: then the table has no circle.
            raise SystemExit(f"cmake/layers.txt:{number}: {module} may only use modules above it, got {sorted(unknown)}")
        if kind == "torch-free":
            tainted = [used for used in uses.split() if layers[used][1]]
            if tainted:
                raise SystemExit(f"cmake/layers.txt:{number}: {module} is torch-free, got uses of {tainted}, which are not")
        layers[module] = (set(uses.split()), kind == "torch")
    return layers


def module_files(root, module):
    for folder in (root / module, root / "include/hestia" / module):
        if folder.is_dir():
            yield from sorted(path for path in folder.rglob("*") if path.suffix in SOURCES)


def without_comments(text):
    # Line numbers must survive, so a block comment leaves its newlines.
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    return re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)


def check_includes(root):
    layers = read_layers(root)
    problems = []
    read = 0
    for module, (uses, torch) in layers.items():
        for path in module_files(root, module):
            read += 1
            public = path.is_relative_to(root / "include")
            text = without_comments(path.read_text())
            for match in INCLUDE.finditer(text):
                header = match.group(1) or match.group(2)
                where = f"{path.relative_to(root)}:{text.count(chr(10), 0, match.start(1 if match.group(1) else 2)) + 1}"
                parts = header.split("/")
                if TORCH_HEADER.match(header):
                    if not torch:
                        problems.append(f"{where}: {module} is torch-free, got <{header}>")
                    elif path.suffix in DEVICE:
                        problems.append(f"{where}: sources for nvcc never include torch, got <{header}>")
                elif parts[0] == "hestia":
                    target = parts[1] if len(parts) > 2 else None
                    if target not in layers:
                        problems.append(f"{where}: no such module, got '{header}'")
                    elif target != module and target not in uses:
                        problems.append(f"{where}: {module} may not use {target}, got '{header}'")
                    elif not (root / "include" / header).is_file():
                        problems.append(f"{where}: no such public header, got '{header}'")
                elif match.group(1) is not None:
                    problems += check_internal(root, layers, module, public, path, header, where)
    if read == 0:
        problems.append(f"{root}: no source of any module found")
    problems += check_folders(root, layers)
    return problems, f"{read} files of {len(layers)} modules read"


def check_internal(root, layers, module, public, path, header, where):
    """A quoted include that is not a public header: only an internal header of the same module is allowed."""
    if public:
        return [f"{where}: a public header may only include public headers, got '{header}'"]
    for base in (path.parent, root / module, root, root / "include"):
        found = (base / header).resolve()
        if found.is_file():
            if found.is_relative_to(root / module):
                return []
            other = found.relative_to(root).parts[0] if found.is_relative_to(root) else found
            return [f"{where}: internal headers are for their own module, got '{header}' of {other}"]
    return [f"{where}: no such header in {module}/, got '{header}'"]


def check_folders(root, layers):
    """A module nobody put into the table would escape every other check."""
    problems = []
    public = root / "include/hestia"
    for folder in sorted(public.iterdir()) if public.is_dir() else []:
        if folder.is_dir() and folder.name not in layers:
            problems.append(f"include/hestia/{folder.name}: module is not in cmake/layers.txt")
        elif folder.is_file():
            problems.append(f"include/hestia/{folder.name}: headers stand in the folder of their module")
    for listing in sorted(root.glob("*/CMakeLists.txt")):
        if re.search(r"^\s*hestia_(module|program)\(", listing.read_text(), re.MULTILINE) and listing.parent.name not in layers:
            problems.append(f"{listing.parent.name}: module is not in cmake/layers.txt")
    return problems


def check_links(root, graph):
    layers = read_layers(root)
    problems = []
    linked = {}
    for line in Path(graph).read_text().splitlines():
        target, _, libraries = line.partition(":")
        linked[target.removeprefix("hestia_")] = libraries.split()
    for module, (uses, torch) in layers.items():
        if module not in linked:
            if any(path.suffix in {".cpp", ".cu"} for path in module_files(root, module)):
                problems.append(f"{module}: has sources but no target hestia_{module}")
            continue
        for library in linked[module]:
            name = library.removeprefix("hestia_")
            if library.startswith("hestia_") and name in layers:
                if name not in uses:
                    problems.append(f"{module}: may not link {name}")
            elif library in {"hestia_pch", "hestia_torch"} or TORCH_LIBRARY.search(library):
                if not torch:
                    problems.append(f"{module}: is torch-free, got a link to {library}")
            elif library.startswith("hestia_"):
                problems.append(f"{module}: links a target that is no module, got {library}")
    if not linked:
        problems.append(f"{graph}: the link graph is empty")
    return problems, f"{len(linked)} targets read"


def table_rows(layers):
    return [f"| `{module}/` | {', '.join(used for used in layers if used in uses) or 'nothing of ours'} | {'yes' if torch else 'no'} |"
            for module, (uses, torch) in layers.items()]


def check_table(root):
    """CONTRIBUTING's rows are `folder | may use | torch`, one per module, in the order of cmake/layers.txt."""
    wanted = table_rows(read_layers(root))
    found = re.findall(r"^\| `\w+/` \|.*$", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    problems = [f"CONTRIBUTING.md: row is missing, wanted {row}" for row in wanted if row not in found]
    problems += [f"CONTRIBUTING.md: row is not in cmake/layers.txt, got {row}" for row in found if row not in wanted]
    if not problems and found != wanted:
        problems = ["CONTRIBUTING.md: rows are not in the order of cmake/layers.txt"]
    return problems, f"{len(found)} rows read"


def main(arguments):
    checks = {"includes": (check_includes, 1), "links": (check_links, 2), "table": (check_table, 1)}
    if not arguments or arguments[0] not in checks or len(arguments) - 1 != checks[arguments[0]][1]:
        print(__doc__, file=sys.stderr)
        return 2
    check, _ = checks[arguments[0]]
    problems, summary = check(Path(arguments[1]).resolve(), *arguments[2:])
    for problem in problems:
        print(problem)
    print(f"{arguments[0]}: {summary}, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
