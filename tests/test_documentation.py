"""Every public name has a docstring and stands in the README; links lead somewhere; nothing heavy is imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_sam as ps

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", ps.__all__)
def test_public_name_has_a_docstring_and_stands_in_the_readme(name: str) -> None:
    assert (getattr(ps, name).__doc__ or "").strip()
    assert re.search(rf"\b{name}\b", PAGES[0].read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


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
