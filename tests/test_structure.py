"""The house: small files and functions, imports that only go down, and what no folder may know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from weights_conversion.architectures import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "weights_conversion"
NAME = PACKAGE.name

MOST_LINES, MOST_FUNCTION_LINES = 300, 50

# Rooms, bottom to top: each imports from rows above its own alone.
LEVELS = (
    {NAME, "config", "errors"},
    {"files", "mapping"},
    {"architectures", "launch", "layouts"},
    {"cli", "configs", "hub", "output"},
    {"engine", "formats", "tokenizer"},
    {"sources"},
    {"verification"},
    {"verify"},
    {"demo", "verbs"},
    {"api"},
)
SCRIPTS = {"commands", "__main__"}  # whole processes, which nothing imports
# (room, what it never imports, with the room's files that are meant; "" all)
NEVER = (
    ("formats", "", {"architectures", "configs", "sources"}),
    ("mapping", "", {"files", "output", "formats"}),
    ("layouts", "", {"files", "output", "formats"}),
    ("engine", "", {"verification", "verify", "sources", "architectures"}),
    ("hub", "", {"architectures", "configs", "layouts", "mapping", "formats"}),
    ("verification", "forward", {"mapping", "architectures", "layouts", "engine", "sources"}),
    ("verification", "rope", {"mapping", "architectures", "layouts", "engine", "sources"}),
    ("verification", "conventions", {"mapping", "architectures", "layouts", "engine", "sources"}),
)
# Rooms that may read os.environ; errors hides what it holds of secrets, demo passes it on to the commands that it runs.
ENVIRONMENT = {"launch", "hub", "errors", "demo"}
OPENS = ("open", "read_text", "read_bytes", "write_text", "write_bytes")
OPENS_NO_FILE = {"mapping", "layouts", "architectures"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports(name: str, types_too: bool = False) -> Iterator[str]:
    """The package's modules that a module imports; those for annotations alone only where they are asked for."""
    for_types = {
        id(inner)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(TREES[name]):
        if id(node) in for_types and not types_too:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (each if each in MODULES else node.module for each in full if node.module in MODULES)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


ARROWS = {name: set(imports(name)) for name in MODULES}
ARROWS[NAME] = set()  # it names the API, which is imported when somebody asks for it
MOST_ROOMS, MOST_LEVELS = 25, 10


def graph() -> dict[str, set[str]]:
    """Which rooms each room imports, at any time; a room is a folder, or a file beside the folders."""
    found: dict[str, set[str]] = {room(name): set() for name in MODULES}
    for name, targets in ARROWS.items():
        found[room(name)] |= {room(target) for target in targets} - {room(name)}
    return found


def heights(rooms: dict[str, set[str]]) -> dict[str, int]:
    """The level of each room: 1 where it imports no other, else one more than the highest that it imports."""
    return {name: _height(name, rooms, ()) for name in rooms}


def _height(name: str, rooms: dict[str, set[str]], above: tuple[str, ...]) -> int:
    assert name not in above, f"a cycle of rooms: {' -> '.join([*above, name])}"
    return 1 + max((_height(each, rooms, (*above, name)) for each in rooms[name]), default=0)


def test_rooms_are_few() -> None:
    rooms = graph()
    assert len(rooms) <= MOST_ROOMS
    assert max(heights(rooms).values()) <= MOST_LEVELS


def test_files_are_small() -> None:
    lines = {name.partition(".")[2]: path.read_text().count("\n") for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_functions_are_small() -> None:
    found = {
        f"{name.partition('.')[2]}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    }
    assert {name for name, count in found.items() if count > MOST_FUNCTION_LINES} == set()


def test_every_room_has_its_level() -> None:
    assert {room(name) for name in MODULES} == set().union(*LEVELS) | SCRIPTS


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    level = {each: number for number, rooms in enumerate(LEVELS) for each in rooms}
    own = room(name)
    if own in SCRIPTS:
        return
    for target in ARROWS[name]:
        other = room(target)
        assert other == own or level.get(other, 99) < level[own], f"{name} imports {target}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, f"a cycle: {' -> '.join([*path, name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(ARROWS[name] - {name}):
            visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize(("own", "file", "never"), NEVER)
def test_nevers(own: str, file: str, never: set[str]) -> None:
    names = [name for name in MODULES if room(name) == own and (not file or name.endswith(f".{file}"))]
    assert names
    for name in names:
        assert never.isdisjoint({room(target) for target in imports(name, types_too=True)}), name


KNOW_FORMATS = {"formats", "sources"}


def test_no_format_is_asked_for_by_its_class() -> None:
    """Whoever is neither a format nor a source knows an opened checkpoint by the protocol alone."""
    classes = {
        node.name
        for name in MODULES
        if room(name) == "formats"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ClassDef)
    }
    assert {"RankFiles", "DistCheckpoint", "RankFormat"} <= classes
    asked = [
        f"{name}, line {node.lineno}: {ast.unparse(node)}"
        for name in MODULES
        if room(name) not in KNOW_FORMATS
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type")
        for word in ast.walk(node)
        if getattr(word, "id", getattr(word, "attr", "")) in classes
    ]
    assert asked == []


@pytest.mark.parametrize("name", MODULES)
def test_who_reads_the_environment(name: str) -> None:
    reads = [
        node
        for node in ast.walk(TREES[name])
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"))
    ]
    assert not reads or room(name) in ENVIRONMENT, f"{name}, line {reads[0].lineno}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in OPENS_NO_FILE])
def test_who_opens_no_file(name: str) -> None:
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in OPENS
    ]
    assert calls == []


LOOKS = {
    "pathlib": {"exists", "is_file", "is_dir", "is_symlink", "is_mount"},
    "os.path": {"exists", "isfile", "isdir", "islink"},
}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"weights_conversion.demo"}))
def test_no_look_takes_an_error_for_no(name: str) -> None:
    """As Path.is_file() does in Python 3.14, os.path.isfile() always. fileio's looks raise what they cannot know."""
    found = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and (
            (node.func.attr in LOOKS["pathlib"] and not node.args)
            or (ast.unparse(node.func.value) == "os.path" and node.func.attr in LOOKS["os.path"])
        )
    ]  # fmt: skip
    assert found == []


def family_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines on which a family's name is compared with, looked for, or matched."""
    for node in ast.walk(tree):
        compared: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            compared = [node.pattern]
        for each in compared:
            for inner in ast.walk(each):
                if isinstance(inner, ast.Constant) and inner.value in FAMILIES:
                    yield inner.lineno, inner.value


ROPE_KINDS = {"llama3"}  # also the name of a rope scaling, which is compared as such
KIND_OF_ROPE = ("kind", "rope_type", "scaling")


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) != "architectures"])
def test_no_family_is_asked_for_by_name(name: str) -> None:
    lines = MODULES[name].read_text().splitlines()
    found = [
        f"line {line}: {lines[line - 1].strip()}"
        for line, family in family_names(TREES[name])
        if not (family in ROPE_KINDS and any(word in lines[line - 1] for word in KIND_OF_ROPE))
    ]
    assert found == []


def test_a_name_is_seen() -> None:
    code = 'a = f == "falcon"\nb = x in ("llama", y)\nmatch z:\n    case "mistral":\n        pass\nc = ["falcon"]\n'
    assert sorted(family_names(ast.parse(code))) == [(1, "falcon"), (2, "llama"), (4, "mistral")]


if __name__ == "__main__":  # the graph itself, for who wants to see it
    print(f"{len(graph())} rooms on {max(heights(graph()).values())} levels")
    for name, height in sorted(heights(graph()).items(), key=lambda each: (each[1], each[0])):
        print(f"{height:2} {name:20} {' '.join(sorted(graph()[name]))}")
