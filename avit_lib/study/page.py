"""Pages for people: results/<name>/README.md with every table and figure, and the tables in the project's README."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from avit_lib.data import project_root
from avit_lib.study.results import results_dir, to_markdown
from avit_lib.study.settings import Profile, profile_names
from avit_lib.training import read_json, write_atomically

README_TABLE = "04_summary"  # the table of each profile that README.md shows
FOLDED = 40  # rows; longer tables are folded away until a reader opens them


class Collection(NamedTuple):
    """Results that belong to no profile: the name of their folder, what they are, the command that makes them."""

    name: str
    purpose: str
    command: str
    notes: tuple[str, ...] = ()


def write_page(about: Profile | Collection) -> Path:
    """Write results/<name>/README.md: every table inline, every figure shown, provenance at the end."""
    folder, command = results_dir(about.name), getattr(about, "command", f"make reproduce PROFILE={about.name}")
    lines = [f"# Results: {about.name}", "", f"{about.purpose[0].upper()}{about.purpose[1:]}.", ""]
    lines += [f"Made by `{command}`; this page is generated, do not edit it.", ""]
    made = []
    for kind, suffix in (("tables", ".md"), ("figures", ".png")):
        lines += [f"## {kind.capitalize()}", ""]
        for path in sorted((folder / kind).glob(f"*{suffix}")):
            facts = read_json(path.with_suffix(".json"))
            made.append({"file": path.name} | facts["provenance"])
            lines += [f"### {path.stem.replace('_', ' ')}", "", facts["caption"], ""]
            if kind == "figures":
                lines += [f"![{path.stem}]({kind}/{path.name})", ""]
                continue
            table = path.read_text().splitlines()
            if len(table) - 2 > FOLDED:
                table = ["<details>", f"<summary>{len(table) - 2} rows</summary>", "", *table, "", "</details>"]
            lines += [*table, "", f"[CSV]({kind}/{path.stem}.csv)", ""]
    columns = ["file", "source", "seed", "commit", "dirty", "date", "python", "hardware", "seconds_since_start"]
    origins = pd.DataFrame(made, columns=columns)
    lines += ["## Provenance", "", to_markdown(origins.assign(commit=origins["commit"].str[:10])), ""]
    packages = made[0]["packages"] if made else {}
    lines += ["Packages: " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".", ""]
    lines += [f"- {note}" for note in about.notes]
    target = folder / "README.md"
    write_atomically(target, ("\n".join(lines).rstrip() + "\n").encode())
    return target


def stamp_readme(readme: Path | None = None) -> None:
    """Put tables between the markers of README.md, where both are there.

    The table of each profile (results-<profile>), its sweep over seeds (sweep-<profile>), and of the benchmark on a CPU
    its summary (results-benchmark) and the cost of training on ImageNet (cost).
    """
    readme = readme or project_root() / "README.md"
    places = [(f"results-{name}", name, README_TABLE) for name in profile_names()]
    places += [(f"sweep-{name}", name, "sweep_summary") for name in profile_names()]
    places += [("results-benchmark", "benchmark", "summary_cpu"), ("cost", "benchmark", "cost_cpu")]
    before = text = readme.read_text() if readme.is_file() else ""
    for marker, name, table in places:
        path = results_dir(name) / "tables" / f"{table}.md"
        begin, end = f"<!-- begin {marker} -->", f"<!-- end {marker} -->"
        if begin not in text or end not in text or not path.is_file():
            continue
        described = read_json(path.with_suffix(".json"))
        facts = described["provenance"]
        command = "sweep" if marker.startswith("sweep") else "reproduce"
        made = facts["source"] if name == "benchmark" else f"make {command} PROFILE={name} SEED={facts['seed']}"
        note = f"\n\n{described['caption']}" if name == "benchmark" else ""
        line = f"Made by `{made}`, commit {facts['commit'][:10]}, {facts['date']}, on {facts['hardware']}."
        content = f"{begin}\n{path.read_text().strip()}{note}\n\n{line}\n{end}"
        text = text.split(begin)[0] + content + text.split(end)[1]
    if text != before:
        write_atomically(readme, text.encode())
