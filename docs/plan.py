"""The house's plan, drawn from the imports of its modules: each stands a floor above all that it imports."""

import ast
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent / "pyro_sam"
_WIDTH, _HEIGHT, _ROW, _BOX = 112, 30, 70, 100


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Return which modules and packages of the first level each of them imports."""
    units = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    units -= {"__init__"}
    found: dict[str, set[str]] = {unit: set() for unit in units}
    for path in sorted(root.rglob("*.py")):
        unit = path.relative_to(root).parts[0].removesuffix(".py")
        if unit in units:
            found[unit] |= _imported(ast.parse(path.read_text()), units) - {unit}
    return found


def _imported(module: ast.Module, units: set[str]) -> set[str]:
    names = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module == "pyro_sam":
            names += [f"pyro_sam.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [name.split(".") for name in names]
    found = {part[1] for part in parts if part[0] == "pyro_sam" and len(part) > 1 and part[1] in units}
    # who imports the library as a user does stands above all of it
    return units - {"study"} if ["pyro_sam"] in parts else found


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each, 0 for the ground.

    Raises:
        graphlib.CycleError: If imports go round in a circle.
    """
    found: dict[str, int] = {}
    for unit in TopologicalSorter(graph).static_order():
        found[unit] = 1 + max((found[below] for below in graph[unit]), default=-1)
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports that do not follow from the others."""

    def reach(unit: str) -> set[str]:
        return graph[unit].union(*map(reach, graph[unit]))

    return {unit: below - set().union(*map(reach, below)) for unit, below in graph.items()}


def svg() -> str:
    """Return the plan as an SVG picture that takes the page's colours."""
    graph = imports()
    level, lines = floors(graph), reduced(graph)
    place = _places(level, lines)
    width = 2 * max(abs(x) for x, _ in place.values()) + _WIDTH
    height = _ROW * max(level.values()) + _HEIGHT
    parts = [_line(place[unit], place[below]) for unit in sorted(lines) for below in sorted(lines[unit])]
    parts += [_box(unit, *place[unit]) for unit in sorted(place)]
    view = f"{-width / 2:g} {-_HEIGHT / 2 - 1:g} {width:g} {height + 2:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plan" viewBox="{view}" role="img" '
        f'aria-label="Which parts of pyro_sam import which">{"".join(parts)}</svg>\n'
    )


def _places(level: dict[str, int], lines: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    place: dict[str, tuple[float, float]] = {}
    for floor in range(max(level.values()) + 1):
        # beside what they stand on
        here = sorted(unit for unit in level if level[unit] == floor)
        here.sort(key=lambda unit: sum(place[below][0] for below in lines[unit]) / max(len(lines[unit]), 1))
        for k, unit in enumerate(here):
            # a little to one side, then to the other, so that lines pass by
            shift = _WIDTH / 2 * (-1) ** floor if len(here) < 3 else 0
            place[unit] = (k - (len(here) - 1) / 2) * _WIDTH + shift, (max(level.values()) - floor) * _ROW
    return place


def _line(top: tuple[float, float], bottom: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = top, bottom
    y, to_y = y + _HEIGHT / 2, to_y - _HEIGHT / 2
    half = (y + to_y) / 2
    return (
        f'<path d="M{x:g} {y:g}C{x:g} {half:g} {to_x:g} {half:g} {to_x:g} {to_y:g}" fill="none" '
        'stroke="currentColor" opacity="0.45"/>'
    )


def _box(unit: str, x: float, y: float) -> str:
    private = unit.startswith("_")
    dashes = ' stroke-dasharray="4 3"' if private else ""
    path = ROOT / f"{unit}.py" if (ROOT / f"{unit}.py").exists() else ROOT / unit / "__init__.py"
    doc = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    return (
        f'<g><title>{escape(doc)}</title><rect x="{x - _BOX / 2:g}" y="{y - _HEIGHT / 2:g}" width="{_BOX}" '
        f'height="{_HEIGHT}" rx="4" fill="var(--color-background-primary, white)" stroke="currentColor"{dashes}/>'
        f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle" font-size="14" fill="currentColor">{unit}</text></g>'
    )
