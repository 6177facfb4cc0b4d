"""Write the pages and executed notebooks of the repository as a static site.

    python scripts/website.py [--profile caltech24] [--output site]

The site is what the menu leads to, link by link; its folders are those of the repository. A link to
a notebook leads to its executed copy in the profile's results, one to a folder to its README.md,
and code is shown as a page. It needs no network, and nothing that runs in the browser.
"""

import argparse
import html
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from avit_lib.places import find_folder

ROOT = Path(__file__).parents[1]
STYLE = Path(__file__).with_name("website.css")
MENU = {  # globs of the pages that every page leads to
    "Notebooks, executed": ["results/{profile}/notebooks/[0-9]*.ipynb"],
    "The study": ["README.md", "notebooks/README.md", "data/README.md", "docs/*.md"],
    "Results": ["results/README.md", "results/[bc]*/README.md", "results/{profile}/README.md"],
    "The repository": ["CONTRIBUTING.md", "CHANGELOG.md", "avit_lib", "LICENSE"],
}
TEXT = (".md", ".ipynb")
CODE = {".py": "python", ".toml": "toml", ".yml": "yaml", ".cff": "yaml", "": "text"}
LINK = re.compile(r'(href|src)="([^":#]+)(#[^"]*)?"')
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="{style}">
</head>
<body>
<nav>
{menu}
</nav>
<main>
{body}
</main>
</body>
</html>
"""


class Renderer(IPythonRenderer):
    """Markdown as HTML: formulas as MathML, headings with the names by which GitHub links."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)

    def heading(self, text: str, level: int, **attributes) -> str:
        name = re.sub(r"[^\w\- ]", "", strip_tags(text).lower()).replace(" ", "-")
        return f'<h{level} id="{name}">{text}</h{level}>\n'


def render_markdown(text: str) -> str:
    """Markdown as HTML."""
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)


def strip_tags(text: str) -> str:
    """The words of a piece of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def is_page(source: Path) -> bool:
    """Whether a file or folder is shown as a page; all others are copied."""
    return source.is_dir() or source.suffix in (*TEXT, *CODE)


def render(source: Path) -> str:
    """The body of the page of a file or folder."""
    if source.suffix == ".ipynb":
        exporter = HTMLExporter(template_name="basic")
        exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
        exporter.register_filter("markdown2html", render_markdown)
        return exporter.from_notebook_node(nbformat.read(source, as_version=4))[0]
    if source.suffix == ".md":
        return render_markdown(source.read_text())
    title = f"# {source.relative_to(ROOT)}\n\n"
    if source.is_dir():
        return render_markdown(title + list_folder(source))
    return render_markdown(f"{title}````{CODE[source.suffix]}\n{source.read_text()}\n````")


def list_folder(folder: Path) -> str:
    """Links to the pages in a folder and in those below, in Markdown; other files are counted."""
    files = [path for path in sorted(folder.rglob("[!._]*")) if path.is_file()]
    pages = [path.relative_to(folder) for path in files if is_page(path)]
    lines = [f"* [{page}]({page})" for page in pages]
    if len(files) > len(pages):
        lines.append(f"* {len(files) - len(pages):,} files that are no text")
    return "\n".join(lines)


def find_source(path: Path, profile: str) -> Path:
    """The file that a link to ``path`` shows: of a notebook the executed copy, if there is one."""
    if (path / "README.md").is_file():
        return path / "README.md"
    executed = ROOT / "results" / profile / "notebooks" / path.name
    return executed if path.parent == ROOT / "notebooks" and executed.is_file() else path


def find_place(source: Path) -> Path:
    """Where a file or folder lies in the site, relative to its top."""
    inside = source.relative_to(ROOT)
    if source.is_dir():
        return inside / "index.html"
    if source.name == "README.md":
        return inside.with_name("index.html")
    if source.suffix in TEXT:
        return inside.with_suffix(".html")
    return inside.with_name(f"{source.name}.html") if is_page(source) else inside


def find_way(page: Path, target: Path) -> str:
    """The link from one place in the site to another."""
    return "../" * (len(page.parts) - 1) + target.as_posix()


def follow(source: Path, body: str, profile: str) -> tuple[str, list[Path]]:
    """The body of a page with links as they are in the site, and the files that they show."""
    targets, folder = [], source if source.is_dir() else source.parent

    def lead(found: re.Match) -> str:
        target = find_source((folder / unquote(found[2])).resolve(), profile)
        if not target.exists():
            return found[0]
        targets.append(target)
        return f'{found[1]}="{find_way(find_place(source), find_place(target))}{found[3] or ""}"'

    return LINK.sub(lead, body), targets


def build(profile: str, output: Path) -> int:
    """Write the site into a folder; returns of how many files."""
    menu = {}
    for name, globs in MENU.items():
        found = [path for glob in globs for path in sorted(ROOT.glob(glob.format(profile=profile)))]
        # once each; no x.failed.ipynb
        menu[name] = [path for path in dict.fromkeys(found) if "." not in path.stem]
    bodies: dict[Path, str] = {}
    waiting = [source for sources in menu.values() for source in sources]
    while waiting:
        source = waiting.pop()
        if source not in bodies:
            body = render(source) if is_page(source) else ""
            bodies[source], targets = follow(source, body, profile)
            waiting += targets
    titles = {source: find_title(source, body) for source, body in bodies.items()}
    for source, body in bodies.items():
        target = output / find_place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_page(source):
            target.write_text(fill_page(source, body, titles, menu))
        else:
            shutil.copyfile(source, target)
    colours = HtmlFormatter().get_style_defs(".highlight")
    (output / STYLE.name).write_text(f"{STYLE.read_text()}{colours}\n")
    return len(bodies)


def find_title(source: Path, body: str) -> str:
    """The first heading of a page; of a notebook after its number."""
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.DOTALL)
    words = strip_tags(heading[1]) if heading else source.name
    return f"{source.stem[:2]} {words}" if source.suffix == ".ipynb" else words


def fill_page(source: Path, body: str, titles: dict[Path, str], menu: dict[str, list[Path]]) -> str:
    """A whole page: the menu, and beside it the body."""
    page, lines = find_place(source), []
    for name, sources in menu.items():
        lines.append(f"<h2>{name}</h2>\n<ul>")
        for one in sources:
            here = ' aria-current="page"' if one == source else ""
            link = f'<a href="{find_way(page, find_place(one))}"{here}>'
            lines.append(f"<li>{link}{html.escape(titles[one])}</a></li>")
        lines.append("</ul>")
    style = find_way(page, Path(STYLE.name))
    title = html.escape(titles[source])
    return PAGE.format(title=title, style=style, menu="\n".join(lines), body=body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="caltech24", help="whose executed notebooks to show")
    parser.add_argument("--output", type=Path, default=ROOT / "site")
    options = parser.parse_args()
    if options.output.exists() and not (options.output / STYLE.name).is_file():
        parser.error(f"{options.output} is there, and no site; name another --output")
    if find_folder("AVIT_RESULTS", "results").resolve() != ROOT / "results":
        parser.error("the site shows the results of the repository; unset AVIT_RESULTS")
    shutil.rmtree(options.output, ignore_errors=True)
    count = build(options.profile, options.output)
    print(f"{options.output / 'index.html'}: {count} files")


if __name__ == "__main__":
    main()
