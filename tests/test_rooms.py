"""The rooms and who may import whom: only what stands below. ``python -m tests.test_rooms`` draws the arrows."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# From the roof to the ground; those that share a floor know nothing of each other.
FLOORS = [
    ("main_*.py",),
    ("training",),
    ("evaluation", "data/preparation"),
    ("models/model_*", "data"),
    ("models", "data/degradations"),
    ("utils",),
    ("similarity_cuda",),
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# model_*.py and what puts together what is below: a training step each, and the choice of one.
STEPS = ("model_", "select_model", "restorer", "export")


def room_of(module: str) -> str | None:
    """``data.degradations.steps`` -> ``data/degradations``; None for what is no part of the house."""
    first, _, rest = module.partition(".")
    if first.startswith("main_"):
        return "main_*.py"
    if first == "data" and rest.partition(".")[0] in ("degradations", "preparation"):
        return f"data/{rest.partition('.')[0]}"
    if first == "models" and rest.startswith(STEPS):
        return "models/model_*"
    return first if first in FLOOR_OF else None


def modules() -> dict[str, Path]:
    """Every module of the house, by its dotted name."""
    found = [*REPOSITORY.glob("main_*.py")]
    for folder in ("training", "data", "models", "evaluation", "utils", "similarity_cuda"):
        found += (REPOSITORY / folder).rglob("*.py")
    names = {path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in found}
    return {name.removesuffix(".__init__"): path for path, name in sorted(names.items(), key=lambda item: item[1])}


def imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of another module of the house, also those within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            named = [module if module in known else node.module for module in inner]
        else:
            continue
        for module in dict.fromkeys(named):
            if module in known and module != name:
                yield node.lineno, module


@pytest.fixture(scope="module")
def arrows() -> list[tuple[str, int, str]]:
    known = modules()
    return [(name, line, other) for name, path in known.items() for line, other in imports(name, path, set(known))]


def test_no_room_imports_from_above_or_from_beside(arrows):
    assert arrows
    wrong = []
    for name, line, other in arrows:
        above, below = room_of(name), room_of(other)
        assert above is not None, f"{name}: stands in no room of FLOORS"
        assert below is not None, f"{other}: stands in no room of FLOORS"
        if above != below and FLOOR_OF[below] <= FLOOR_OF[above]:
            wrong.append(f"{modules()[name].relative_to(REPOSITORY)}:{line}: {above} imports {other} of {below}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others(arrows):
    graph = defaultdict(set)
    for name, _, other in arrows:
        graph[name].add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_scripts_are_a_screenful(arrows):
    tasks = [path for path in REPOSITORY.glob("main_train_*.py")]
    assert tasks
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 30 for path in tasks)


def drawing() -> str:
    """The arrows between rooms, as Mermaid draws them."""
    known = modules()
    between = {
        (room_of(name), room_of(other))
        for name, path in known.items()
        for _, other in imports(name, path, set(known))
        if room_of(name) != room_of(other)
    }
    ids = {room: f"r{number}" for number, room in enumerate(FLOOR_OF)}
    lines = [f'  {ids[room]}["{room}"]' for room in FLOOR_OF]
    lines += sorted(f"  {ids[a]} --> {ids[b]}" for a, b in between if a and b)
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def test_contributing_draws_the_rooms_as_they_are():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert drawing() in text, "put the drawing of python -m tests.test_rooms into CONTRIBUTING.md"


if __name__ == "__main__":
    print(drawing())
