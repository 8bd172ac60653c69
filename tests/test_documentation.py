"""Public names have a docstring and a page; code in the pages runs; links lead somewhere; imports are light."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch

import pyro_sam as ps
from pyro_sam.study import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if not {"_build", "_generated", "tutorials"} & set(path.relative_to(DOCS).parts)
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *SOURCES]
PUBLIC = ["pyro_sam"] + [
    f"pyro_sam.{module.name}" for module in pkgutil.iter_modules(ps.__path__) if module.name[0] != "_"
]

# what a page runs: hidden code in a comment, code and commands that a reader sees
BLOCK = re.compile(
    r"<!-- run\n(?P<hidden>.*?)-->|(?:<!-- needs: (?P<needs>\w+) -->\n)?```(?P<kind>python|console)\n(?P<code>.*?)```",
    re.DOTALL,
)
GOES_ON = re.compile(r"<!-- goes on from: (\S+) -->")
RUN = [path for path in [ROOT / "README.md", *SOURCES] if BLOCK.search(path.read_text())]
NEEDS = [(path, match["needs"]) for path in RUN for match in BLOCK.finditer(path.read_text()) if match["needs"]]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(page: Path, names: dict[str, Any], needs: str | None = None) -> None:
    """Run the code of a page, and before it that of the page that it goes on from.

    Args:
        page: The page.
        names: Variables, which are added to.
        needs: The other library whose code is run too; None for none.
    """
    text = page.read_text()
    if before := GOES_ON.search(text):
        run((page.parent / before[1]).resolve(), names)
    for match in BLOCK.finditer(text):
        if match["needs"] not in (None, needs):
            continue
        group = "code" if match["hidden"] is None else "hidden"
        line = text.count("\n", 0, match.start(group))
        if match["kind"] == "console":
            run_commands(match["code"])
        elif match[group].startswith(">>> "):
            found = doctest.DocTestParser().get_doctest(match[group], names, page.name, str(page), line)
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, clear_globs=False)
            names.update(found.globs)
            assert not result.failed
        else:
            exec(compile("\n" * line + match[group], str(page), "exec"), names)


def run_commands(text: str) -> None:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] != ["$", "pyro-sam"]:
            continue
        try:
            status = cli.main(words[2:])
        except SystemExit as end:  # --version
            status = int(end.code or 0)
        assert status == 0, line


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An empty folder and a fresh start."""
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    # as if it were a module, so that what is defined in it can be pickled
    module = ModuleType("newcomer")
    monkeypatch.setitem(sys.modules, "newcomer", module)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield vars(module)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_code_in_the_pages_runs(page: Path, newcomer: dict[str, Any]) -> None:
    run(page, newcomer)


@pytest.mark.parametrize(("page", "library"), NEEDS)
@pytest.mark.filterwarnings("default")
def test_code_of_another_library_runs(page: Path, library: str, newcomer: dict[str, Any]) -> None:
    pytest.importorskip(library)
    run(page, newcomer, library)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_code_escapes(page: Path) -> None:
    fences = re.findall(r"^```(\S+)", page.read_text(), re.MULTILINE)
    assert set(fences) <= {"python", "console", "bibtex", "{toctree}", "{eval-rst}", "{raw}", "{include}"}


def test_a_block_that_fails_is_seen(newcomer: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text in ("<!-- run\nassert False\n-->", "```python\nassert False\n```"):
        page.write_text(text)
        with pytest.raises(AssertionError):
            run(page, newcomer)
    page.write_text("```python\n>>> 1 + 1\n3\n```")
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(AssertionError):
        run(page, newcomer)
    page.write_text("```console\n$ pyro-sam compare moon\n```")
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(AssertionError, match="moon"):
        run(page, newcomer)


def documented() -> list[Any]:
    """Return what the API reference documents."""
    found: list[str] = []
    for page in (DOCS / "api").glob("*.md"):
        for kind, name, options in re.findall(r"\.\. auto(\w+):: (\S+)\n((?:   .*\n)*)", page.read_text()):
            if kind == "module" and ":members:" in options:
                found += [f"{name}.{each}" for each in importlib.import_module(name).__all__]
            found.append(name)
    return [pkgutil.resolve_name(name) for name in found]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_have_a_docstring_and_a_page(module: str) -> None:
    if module == "pyro_sam.study":
        return  # an application
    with_page = {id(value) for value in documented()}
    package = importlib.import_module(module)
    for name in package.__all__:
        value = getattr(package, name)
        assert (value.__doc__ or "").strip(), name
        if isinstance(value, ModuleType) and not hasattr(value, "__all__"):
            continue
        assert id(value) in with_page, f"{module}.{name} has no page in docs/api"


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"pyro-sam {ps.__version__}\n"
    assert f"\nversion: {ps.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {ps.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_imports_go_down() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        plan = importlib.import_module("plan")
    finally:
        sys.path.remove(str(DOCS))
    graph = plan.imports()
    level = plan.floors(graph)
    for upper, lower in (("study", "tuning"), ("elbo", "_graph"), ("_graph", "_flat"), ("_flat", "_step")):
        assert level[upper] > level[lower] > level["_base"]
    assert plan.svg().count("<rect") == len(graph)
    with pytest.raises(CycleError):
        plan.floors({"a": {"b"}, "b": {"a"}})


def test_broken_links_of_the_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<a href='b.html#there'>1</a><a href='https://example.org'>2</a><img src='no.png'>"
    )
    (tmp_path / "b.html").write_text("<p id='there'/><a href='a.html#nowhere'>3</a><a href='c.html'>4</a>")
    out = subprocess.run([sys.executable, DOCS / "check.py", tmp_path], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert set(out.stderr.split("\n")[1:-1]) == {"a.html: no.png", "b.html: a.html#nowhere", "b.html: c.html"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        place = (page.parent / target).resolve()
        if place.parent == DOCS / "tutorials":  # which the build of the site copies there
            place = DOCS.parent / "tutorials" / place.name
        assert place.exists(), target


def test_importing_brings_in_core_dependencies_only() -> None:
    script = (
        "import torch, pyro, sys; before = set(sys.modules); import pyro_sam\n"
        "print(*{module.partition('.')[0] for module in set(sys.modules) - before})"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    heavy = {"matplotlib", "sklearn", "scipy", "torchmetrics", "tqdm", "tabulate", "arviz", "mlxtend", "lightning"}
    assert "pyro_sam" in found.stdout
    assert heavy.isdisjoint(found.stdout.split())


def test_importing_changes_nothing_global() -> None:
    script = (
        "import torch, pyro, logging, random; from torch.distributions import Distribution as D\n"
        "def state(): return (torch.get_rng_state().sum().item(), torch.get_default_dtype(), D._validate_args,"
        " logging.getLogger().level, random.getstate(), torch.get_num_threads(), len(pyro.get_param_store()))\n"
        "before = state(); import pyro_sam; print(state() == before)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
