"""How Sphinx builds the site: `make docs`.

Its sources are the documents where they lie, README.md among them, so that each is written once and
a link between two of them leads to the same place in the repository and in the site. The root of
the repository is therefore the root of the sources: ``sphinx-build -c docs . site``.
"""

from typing import Any

from docutils.nodes import SkipNode, field
from docutils.utils.math.latex2mathml import tex2mathml

import shampoo

project = "shampoo"
author = "the authors of shampoo"
copyright = "the authors of shampoo, under the MIT licence"
version = release = shampoo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/NOTES.md",
]
# Folders that hold no documents, and would only be walked through.
exclude_patterns = [
    *(".*", "site", "build", "dist", "peers"),
    *("shampoo", "kernels", "csrc", "tests", "tools", "examples"),
]

# Markdown as the host of the repository shows it: anchors of headings by its rule, formulas.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
# Frameworks need not be there for what shampoo.integrations says of itself.
autodoc_mock_imports = ["accelerate", "lightning", "timm", "torchtitan", "transformers"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# Formulas are MathML, which browsers show by themselves: no script is fetched to read a page.
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"shampoo {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "to_index.html"}
templates_path = ["_templates"]


def _inline(writer: Any, node: Any) -> None:
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise SkipNode


def _block(writer: Any, node: Any) -> None:
    writer.body.append(tex2mathml(node.astext(), as_block=True))
    raise SkipNode


def _classes_return_nothing(app: Any, domain: str, kind: str, content: Any) -> None:
    """What stands in for a framework says that a class of ours, which derives from it, returns."""
    for each in [*content.findall(field)] if kind == "class" else []:
        if each[0].astext() == "rtype":
            each.parent.remove(each)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("object-description-transform", _classes_return_nothing, priority=900)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
