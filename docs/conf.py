"""Settings of the documentation: ``make docs`` builds it, and warnings are errors."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import plan  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import pyro_sam  # noqa: E402

project = "pyro_sam"
author = "the pyro_sam developers"
copyright = author
release = version = pyro_sam.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "_generated", "**/.ipynb_checkpoints"]
html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"pyro_sam {release}"
html_static_path = ["_static"]
html_css_files = ["pyro_sam.css"]
html_show_sphinx = False

# Notebooks are shown with the outputs that they were saved with, and run by the tests instead.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # plain CommonMark has no tables
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every name of this package that a page refers to must have its place; other projects' cannot be looked up offline.
nitpicky = True
nitpick_ignore_regex = [
    (".*", r"(?!pyro_sam).*"),
    (".*", r"pyro_sam\._.*"),
    (".*", r"pyro_sam\.(predictive\.prediction\.SampledLikelihood|tuning\.space\.Settings)"),
]


def copy_tutorials() -> None:
    """Copy the notebooks to where Sphinx finds them."""
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copy(notebook, target)


def draw_plan() -> None:
    """Draw the house's plan from the imports of the package."""
    (HERE / "_generated").mkdir(exist_ok=True)
    (HERE / "_generated" / "plan.svg").write_text(plan.svg())


def list_more() -> None:
    """List the pages that the start page does not name."""
    named = (HERE / "index.md").read_text().splitlines()
    found = sorted(path.relative_to(HERE).with_suffix("") for path in [*HERE.glob("*.md"), *HERE.glob("study/*.md")])
    more = [str(page) for page in found if str(page) not in [*named, "index", "releasing"]]
    lines = ["```{toctree}", ":hidden:", ":caption: More", "", *more, "```", ""]
    (HERE / "_generated" / "more.md").write_text("\n".join(lines))


def keep_together(app: Sphinx, doctree: nodes.document) -> None:
    """Let no line end within a number and its error."""
    for text in list(doctree.findall(nodes.Text)):
        if " ± " in text and not isinstance(text.parent, nodes.literal | nodes.literal_block):
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\u00a0±\u00a0")))


def setup(app: Sphinx) -> None:
    """Say what is done to a page that was read."""
    app.connect("doctree-read", keep_together)


copy_tutorials()
draw_plan()
list_more()
