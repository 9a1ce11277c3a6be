"""Settings of Sphinx, for `make site`. The pages are the repository's own; the source folder is its root."""

import json
import sys
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fa  # noqa: E402

project, author, language = "fa", "The fa authors", "en"
version = release = fa.__version__
project_copyright = "The fa authors. Code: MIT. Figures, text and tables: CC BY 4.0"

extensions = ["myst_nb", "sphinx_copybutton"]
extensions += [f"sphinx.ext.{name}" for name in ("autodoc", "autosummary", "napoleon", "viewcode", "mathjax")]
root_doc = "README"
include_patterns = ["*.md", "*/README.md", "docs/**", "notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "data/[!R]*", "docs/contents.md", "fa", "tests", "report"]

# Notebooks are shown as they are committed, with the outputs that they hold; nothing is executed.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3

# Docstrings are in Google's style; single backticks are code. No other site is asked for its names, so that types of
# other packages have no link; a name of this package that leads nowhere is an error.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 80
napoleon_type_aliases = {"UserError": "fa.UserError"}
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj)", r"(?!fa\.).*|.*\._\w+")]

# No page loads anything from elsewhere: MathJax is one file of a package.
html_theme = "furo"
html_title = f"fa {version}"
html_show_sphinx = html_copy_source = False
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg.js"
mathjax_path = mathjax.name
html_static_path = ["_static", str(mathjax)]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "to_root.html"}


def add_contents(app, docname, source):
    """The contents of the site stand at the end of the README's page, and not in the README."""
    if docname == root_doc:
        pages = []
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
            pages.append(f"{path.stem[:2]} {title.lstrip('# ')} <notebooks/{path.stem}>")
        contents = (ROOT / "docs" / "contents.md").read_text(encoding="utf-8")
        source[0] += contents.replace("NOTEBOOKS", "\n".join(pages))


def add_alternative_texts(app, docname, source):
    """A picture's alternative text is in the output's metadata; MyST-NB looks for it in the cell's alone."""
    if docname.startswith("notebooks/"):
        page = json.loads(source[0])
        for cell in page["cells"]:
            for output in cell.get("outputs", []):
                if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                    cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        source[0] = json.dumps(page)


def keep_sentences(app, what, name, obj, options, lines):
    """Napoleon takes the words before a first colon for a type; where a docstring has a sentence, it finds none."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")
    for i, line in enumerate(lines):
        if line.strip() == "Returns:":
            lines.insert(i + 1, line.replace("Returns:", r"    \ "))


def find_alias(app, module, name):
    """Viewcode looks for an alias of a built-in type in Python's builtins, which have no page; it is told where."""
    return module if getattr(getattr(sys.modules[module], name, None), "__module__", "") == "builtins" else None


def add_anchor(app, domain, kind, content):
    """A public name is found by the name of the module that defines it, too; there Viewcode's way back leads."""
    for signature in content.parent.findall(addnodes.desc_signature):
        if signature.get("module") == "fa":
            module = getattr(attrgetter(signature["fullname"])(fa), "__module__", "fa")
            signature["ids"] += [f"{module}.{signature['fullname']}"] * module.startswith("fa.")


def set_way_back(app, env):
    """Viewcode remembers one name of a module, the first that it met, be it the package's."""
    env._viewcode_modules = {name: (*entry[:3], name) for name, entry in env._viewcode_modules.items() if entry}


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("source-read", add_alternative_texts)
    app.connect("autodoc-process-docstring", keep_sentences, priority=1)
    app.connect("viewcode-follow-imported", find_alias)
    app.connect("object-description-transform", add_anchor)
    app.connect("env-updated", set_way_back)
