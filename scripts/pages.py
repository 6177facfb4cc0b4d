"""Write results/PROFILE/README.md, and renew what other pages show between markers.

    python scripts/pages.py --profile PROFILE

The page of a study has a heading for each notebook, with its findings, links and figures. In
README.md, results/README.md and notebooks/README.md stands, between markers such as
``<!-- begin caltech24/04_summary -->``, a table or finding of that name. PROFILE may be benchmark,
too: what ``make benchmark`` measures belongs to no profile. Where these pages clone the repository
or open Colab stands its address, if pyproject.toml names one.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pandas as pd
from PIL import Image

from avit_lib.places import project_root
from avit_lib.study import get_profile
from avit_lib.study.results import (
    MADE_BY,
    describe_origin,
    find_origin,
    results_dir,
    to_markdown,
)
from avit_lib.training import read_json, write_atomically

PAGES = ("README.md", "results/README.md", "notebooks/README.md")
MARKED = re.compile(r"<!-- begin (\w+)/(\w+) -->\n(?:.*?\n)??<!-- end \1/\2 -->", re.DOTALL)
CLONE = re.compile(r"(git clone .*--depth 1 )\S+( avit\b)")
COLAB = re.compile(r"(<!-- begin colab -->).*(<!-- end colab -->)")
# Of make; other notebooks belong to reproduce.
TARGETS = {
    "08_seeds": "seeds",
    "09_paper": "paper",
    "10_verdicts": "seeds",
    "11_ablations": "paper",
}
KINDS = {"findings": ".md", "tables": ".md", "figures": ".png"}
BENCHMARK_NOTES = (
    "All methods save about the same share of DeiT's FLOPs on embedded photographs: A-ViT's "
    "halting is fitted (starts.fit_start), the thresholds of adaptive merging are calibrated, and "
    "ToMe's r is chosen. DeiT-T has its ImageNet weights, the other sizes are untrained: times "
    "depend on how many tokens are left.",
    "A batch of one is timed on several images, one after another.",
    "Speed-ups are ratios of medians over interleaved rounds. Efficiency is speed-up / FLOP ratio, "
    "on the very images timed; 1 is ideal. Padding isn't counted; masked execution has ratio 1.",
    "For memory, bfloat16 means weights and images in inference, and autocast in training.",
    "In training DeiT has timm's attention. The study's own training uses the plain formula in "
    "bfloat16 on CPUs, which is faster: there packed training gains less than in these tables.",
)


class Page(NamedTuple):
    """What the page of a folder of results says of it."""

    name: str
    purpose: str
    command: str
    notes: tuple[str, ...]


class Result(NamedTuple):
    """A table, finding or figure: its file, what it shows, and what made it."""

    path: Path
    caption: str
    source: str
    body: str = ""  # of a table: its rows; of a finding: its words


def describe_page(name: str) -> Page:
    """The facts for the page of a profile, by name or file, or of the benchmark."""
    if name == "benchmark":
        purpose = "DeiT, A-ViT, ToMe and adaptive merging side by side: interleaved, warmed up, "
        purpose += "medians and quartiles of rounds"
        return Page(name, purpose, "make benchmark", BENCHMARK_NOTES)
    profile = get_profile(name)
    more = [target for source, target in TARGETS.items() if has_run(profile.name, source)]
    command = f"{' '.join(['make reproduce', *dict.fromkeys(more)])} PROFILE={name}"
    return Page(profile.name, profile.purpose, command, profile.notes)


def has_run(profile: str, source: str) -> bool:
    """Whether a notebook has written results of a profile."""
    return (results_dir(profile) / "provenance" / f"{source}.json").is_file()


def read_result(path: Path) -> Result:
    """A table (.md), finding (.md) or figure (.png) with its caption and source."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            source = Path(image.info.get("Source", "")).stem
            return Result(path, image.info.get("Description", ""), source)
    text = path.read_text()
    made_by = MADE_BY.search(text)
    source = Path(made_by[1]).stem if made_by else ""
    body = MADE_BY.sub("", text).strip()
    if path.parent.name == "findings":
        return Result(path, "", source or guess_source(path), body)
    caption, _, rows = body.partition("\n")
    return Result(path, caption, source, rows.strip())


def guess_source(finding: Path) -> str:
    """What made a finding: what made a table whose name begins alike, as 04_short, 04_avit_held."""
    folder, prefix = finding.parents[1], finding.stem.split("_")[0]
    for table in sorted((folder / "tables").glob(f"{prefix}*.md")):
        return read_result(table).source
    made = sorted((folder / "provenance").glob(f"{prefix}*.json"))
    return made[0].stem if made else ""


def read_results(folder: Path) -> list[Result]:
    """All findings, tables and figures of a folder of results, each kind by name."""
    return [
        read_result(path)
        for kind, suffix in KINDS.items()
        for path in sorted((folder / kind).glob(f"*{suffix}"))
    ]


def remove_stale(folder: Path) -> None:
    """Remove what a notebook made before its last run started: it makes it no longer."""
    for result in read_results(folder):
        stamp = folder / ".stamps" / result.source
        if stamp.is_file() and result.path.stat().st_mtime < stamp.stat().st_mtime:
            result.path.unlink()
            result.path.with_suffix(".csv").unlink(missing_ok=True)


def write_section(folder: Path, source: str, results: list[Result]) -> list[str]:
    """The lines on what one notebook found: findings, links, figures."""
    lines = [f"## {source or 'others'}", ""]
    if (folder / "notebooks" / f"{source}.failed.ipynb").is_file():
        lines += ["Its last run failed: what follows is partly of that run, partly of others.", ""]
    for result in results:
        if result.path.parent.name == "findings":
            lines += [result.body, ""]
    links = []
    if (folder / "notebooks" / f"{source}.ipynb").is_file():
        links.append(f"[executed notebook](notebooks/{source}.ipynb)")
    for result in results:
        if result.path.parent.name == "tables":
            links.append(f"[{result.path.stem}](tables/{result.path.name})")
    lines += [", ".join(links), ""] if links else []
    for result in results:
        if result.path.parent.name == "figures":
            lines += [f"![{result.path.stem}](figures/{result.path.name})", "", result.caption, ""]
    return lines


def write_page(page: Page) -> Path:
    """Write README.md into the folder of results that ``page`` describes."""
    folder = results_dir(page.name)
    results = read_results(folder)
    lines = [f"# Results: {page.name}", "", f"{page.purpose[0].upper()}{page.purpose[1:]}.", ""]
    lines += [f"Made by `{page.command}` with the seed named under Provenance. This page is"]
    lines += ["generated, do not edit it. Each table has a CSV of the same name beside it.", ""]
    for source in sorted({result.source for result in results}):
        lines += write_section(folder, source, [one for one in results if one.source == source])
    lines += ["## Provenance", "", *list_provenance(folder), ""]
    lines += [f"- {note}" for note in page.notes]
    target = folder / "README.md"
    write_atomically(target, ("\n".join(lines).rstrip() + "\n").encode())
    return target


def list_provenance(folder: Path) -> list[str]:
    """The lines on where the results of a folder come from: a table, and the packages."""
    made = {path.stem: read_json(path) for path in sorted((folder / "provenance").glob("*.json"))}
    columns = ["source", "seed", "commit", "dirty", "date", "python", "hardware", "seconds"]
    rows = [{"source": source} | facts for source, facts in made.items()]
    table = pd.DataFrame(rows, columns=columns)
    table["commit"] = table["commit"].str[:10]
    table["dirty"] = table["dirty"].map({True: "yes", False: "no"})
    packages = {", ".join(map(" ".join, facts["packages"].items())) for facts in made.values()}
    return [to_markdown(table), "", *(f"Packages: {names}." for names in sorted(packages))]


def name_origin(name: str, result: str, source: str) -> str:
    """A line that says by which command, commit and machine the table of a result was made."""
    last: dict[str, Any] = read_json(results_dir(name) / "provenance" / f"{source}.json")
    facts = find_origin(last, f"tables/{result}.csv")
    if "date" not in facts:
        return "Made by a run of which nothing is known."
    target = "reproduce" if re.match(r"\d\d_", source) else source
    target = TARGETS.get(source, target)
    command = f"make {target} PROFILE={name} SEED={facts['seed']}"
    if name == "benchmark":
        command = "make benchmark" if source.startswith(name) else f"python scripts/{source}.py"
    return f"Made by `{command}`, {describe_origin(facts)}."


def fill_marker(name: str, result: str, shown: str) -> str:
    """What belongs between the markers of a table or finding; ``shown``, if there is none."""
    table = results_dir(name) / "tables" / f"{result}.md"
    finding = results_dir(name) / "findings" / f"{result}.md"
    if finding.is_file():
        content = read_result(finding).body
    elif table.is_file():
        found = read_result(table)
        caption = f"\n\n{found.caption}" if name == "benchmark" else ""  # says what was measured
        content = f"{found.body}{caption}\n\n{name_origin(name, result, found.source)}"
    else:
        return shown
    return f"<!-- begin {name}/{result} -->\n{content}\n<!-- end {name}/{result} -->"


def read_address() -> str:
    """The public address of the repository, on GitHub; empty if it has none."""
    project = msgspec.toml.decode((project_root() / "pyproject.toml").read_bytes())["project"]
    return project["urls"].get("Repository", "")


def show_address(text: str, address: str) -> str:
    """``text`` with ``address`` in place of REPOSITORY, and a link to the notebooks on Colab."""
    opened = address.replace("https://github.com", "https://colab.research.google.com/github")
    link = f" ([open the notebooks]({opened}))" if address else ""
    text = CLONE.sub(rf"\g<1>{address or 'REPOSITORY'}\g<2>", text)
    return COLAB.sub(rf"\g<1>{link}\g<2>", text)


def stamp_page(page: Path) -> None:
    """Renew what stands between the markers of a page; one without a result stays as it is."""
    before = page.read_text()
    after = MARKED.sub(lambda found: fill_marker(found[1], found[2], found[0]), before)
    after = show_address(after, read_address())
    if after != before:
        write_atomically(page, after.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages that show results.")
    parser.add_argument("--profile", required=True, help="a profile by name or file, or benchmark")
    page = describe_page(parser.parse_args().profile)
    remove_stale(results_dir(page.name))
    print(f"results: {write_page(page)}")
    if results_dir("").resolve() != (project_root() / "results").resolve():
        print("the pages of the repository stay as they are: AVIT_RESULTS names another folder")
        return
    for path in map(project_root().joinpath, PAGES):
        if path.is_file():
            stamp_page(path)


if __name__ == "__main__":
    main()
