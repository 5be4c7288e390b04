"""The documentation against the program: options and their defaults, series, links, and every command that it shows."""

import ast
import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest

import gradsplit
import noise
import noises
import report
import series
import sweep
from benchmarks import meter, planted
from conftest import ROOT
from engine import options

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
GUIDES = [page for page in PAGES if page.parent.name != "benchmarks"]
COMMAND = re.compile(r"(?:^|[\s/`(])(?:fabric run|torchrun|python)\s[^`]*?\b(?:train|sweep|report|noise)\.py")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def table_rows(page: str, first: str) -> list[list[str]]:
    """Cells of every row of the tables in docs/`page` whose first column is headed `first`."""
    rows, inside = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and not set(cells[0]) <= set("-: "):
            rows.append(cells)
    return rows


# -------------------------------------------------------------------------------------------------------------- options


def default_matches(action, text: str) -> bool:
    """Whether `text` states the default of a parser's option: a value, `off` of a switch, or in parentheses what follows."""
    default = options.FABRIC.get(action.dest, action.default)
    if text.startswith("("):
        return default is None and text.endswith(")")
    if action.nargs == 0:
        return text == "off"
    text = text.strip("`")
    if isinstance(default, float):
        return float(text) == default
    return text == str(default)


def test_the_tables_of_options_are_the_parser():
    parser = {a.option_strings[-1]: a for a in options.parser()._actions if a.dest != "help"}
    rows = table_rows("options.md", "option")
    described = [row[0].strip("`") for row in rows]
    assert len(described) == len(set(described)), "an option has two rows"
    assert set(described) == set(parser), "options in one of docs/options.md and the parser only"
    wrong = {row[0]: row[1] for row in rows if not default_matches(parser[row[0].strip("`")], row[1])}
    assert not wrong, f"not the parser's default: {wrong}"


def test_a_wrong_default_would_be_noticed():
    actions = {a.option_strings[-1]: a for a in options.parser()._actions}
    assert not default_matches(actions["--bs"], "64")
    assert not default_matches(actions["--bs"], "(by data set)")
    assert not default_matches(actions["--noise-type"], "`symmetric`")
    assert not default_matches(actions["--resume"], "on")
    assert not default_matches(actions["--devices"], "2")


def test_every_kind_of_noise_has_a_row():
    kinds = {re.match(r"`([\w-]+)`", row[0])[1] for row in table_rows("noise.md", "`--noise-type`")}
    assert kinds == set(noises.NOISES)


# --------------------------------------------------------------------------------------------------------------- series


def series_in_table() -> list[str]:
    return [tag for row in table_rows("measurements.md", "series") for tag in re.findall(r"`([\w/]+)`", row[0])]


def series_in_source() -> set[str]:
    """Every string, or constant of series.py, in the modules that a run takes its series from that has the form of a tag."""
    tags = set()
    for path in {*ROOT.glob("*.py"), ROOT / "engine" / "examples.py"} - {ROOT / "series.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                node = ast.Constant(vars(series).get(node.id))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                tags |= {node.value} if re.fullmatch(r"[a-z_]+/[a-z_]+", node.value) else set()
    return tags


def tags_of(folder: Path) -> set[str]:
    """Tags of scalars and histograms in a run's event files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    plugins = {}
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:  # only the first value of a tag names its plugin
                plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
    return {tag for tag, plugin in plugins.items() if plugin in ("scalars", "histograms")}


LONG_RUNS_ONLY = (
    "curvature/",
    "corrected/cos_",
    "noise_scale/",
    "probe/half_memorized_step",
    "train/prediction_changes",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "labels, lacks",
    [("--noise 0.4", ()), ("--fake-mask 0.4", (series.WRONG,)), ("--noise 0", (series.WRONG, series.NOISY))],
)
def test_the_table_of_series_is_what_a_run_writes(go, labels, lacks):
    """Both ways, but for the series that need a longer run, or labels that the run does not have."""
    short = "--max-steps 2 --measure-every 1 --epochs 1 --chunks 2 --permutations 2"
    written = tags_of(go(*f"{labels} --measure full --measure-budget 100 --bs 80 {short}".split()))
    described = series_in_table()
    assert len(described) == len(set(described)), "a series has two rows"
    assert written <= set(described), f"series without a row: {sorted(written - set(described))}"
    possible = {tag for tag in described if series.SERIES[tag].needs not in lacks}
    assert written <= possible, f"series that need more: {sorted(written - possible)}"
    never = sorted(tag for tag in possible - written if not tag.startswith(LONG_RUNS_ONLY))
    assert not never, f"rows of series that the run did not write: {never}"


def test_the_table_of_series_is_that_of_the_code():
    """Every series has an entry, of its own or its family's, which says when it is logged as the row does."""
    used, when = set(), ""
    for names, cell, _ in table_rows("measurements.md", "series"):
        when = cell.replace("the same", when).removesuffix(", with label noise")
        for tag in re.findall(r"`([\w/]+)`", names):
            entry = series.SERIES[tag]
            assert entry.when == when, tag
            used.add(id(entry))
    assert used == {id(entry) for tag, entry in series.SERIES.items() if tag != "*"}, "entries without a row"


def test_the_table_has_no_series_that_nothing_writes():
    """Also those that need a long run."""
    described = series_in_table()
    # of random masks the deviation, of estimates the ends of the interval: names that are made from the series' own
    made = {f"{tag}_{end}" for tag in series_in_source() for end in ("std", "low", "high")}
    unknown = sorted(set(described) - series_in_source() - made)
    assert not unknown, f"rows of series that no module names: {unknown}"


def test_the_table_of_a_cosine_and_its_null_follows_from_the_formulas():
    """Fixed mean gradients of length 1 with a cosine of 0.3, variance 100, 45 % noisy, in batches of B examples."""
    rows = {row[0].strip("`"): row[1:] for row in table_rows("measurements.md", "B")}
    f, c, variance = 0.55, 0.3, 100.0
    assert len(rows) == 5 and {len(values) for values in rows.values()} == {6}
    for i, B in enumerate((16, 32, 64, 128, 256, 512)):
        g2 = f * f + (1 - f) ** 2 + 2 * f * (1 - f) * c + variance / B  # E|g|^2
        s2 = variance + f * (1 - f) * (2 - 2 * c) * B / (
            B - 1
        )  # within the batch: that of one example, and between the two
        cosine = c / ((1 + variance / (f * B)) * (1 + variance / ((1 - f) * B))) ** 0.5
        null = gradsplit.null_cosines(g2, s2, f, B)["null/cos_clean_noisy"]
        difference = gradsplit.difference_measures(1, 1, c, s2, B)["grad/difference"]
        expected = (cosine, null, cosine - null, difference, difference / B)
        for name, value in zip(rows, expected, strict=True):
            digits = len(rows[name][i].partition(".")[2])
            assert float(rows[name][i]) == pytest.approx(value, abs=0.51 * 10**-digits), (name, B)


# ---------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or ROOT not in (there, *there.parents):
            broken.append(target)
        elif anchor and anchor not in anchors(there):
            broken.append(target)
    assert not broken


def test_every_page_and_picture_is_reached():
    """From the README, by links alone."""
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            there = (page.parent / target).resolve()
            if there.exists() and there not in reached:
                reached.add(there)
                queue += [there] if there.suffix == ".md" else []
    lost = {p.name for p in (ROOT / "docs").iterdir() if p.is_file()} - {p.name for p in reached}
    assert not lost


# ------------------------------------------------------------------------------------------------------------- commands


def code_lines(page: Path) -> list[str]:
    """Lines of fenced and indented code blocks, and inline code with arguments, that hold a command of ours."""
    text = page.read_text()
    lines, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    lines += [code for code in inline_code(page) if not code.endswith(".py")]
    return [line for line in lines if COMMAND.search(line)]


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def split_command(line: str) -> tuple[list[str], str, list[str]]:
    """(words before the script, the script, its arguments) of a command line, the last one of several joined by &&."""
    words = shlex.split(line.split(" && ")[-1], comments=True)
    at = next(i for i, word in enumerate(words) if Path(word).name in PARSERS)
    return words[:at], Path(words[at]).name, [w for w in words[at + 1 :] if w != "..."]


def parse_train(argv: list[str]) -> None:
    options.parse(argv)


def parse_sweep(argv: list[str]) -> None:
    args, extra = sweep.parser().parse_known_args(argv)
    if not args.status or args.grid or args.preset:
        assert sweep.jobs_of(args, extra)


PARSERS = {
    "train.py": parse_train,
    "sweep.py": parse_sweep,
    "report.py": lambda argv: report.parser().parse_args(argv),
    "noise.py": lambda argv: noise.command_line().parse_args(argv),
}


def parse_launcher(words: list[str], script: list[str]) -> None:
    """Fabric's own options through Fabric's own command line."""
    if "fabric" in words:
        from lightning_fabric import cli

        argv = words[words.index("run") + 1 :]
        cli._run.make_context("run", [*argv, str(ROOT / script[0]), *script[1:]], ignore_unknown_options=True)


COMMANDS = [(page, line) for page in GUIDES for line in code_lines(page)]


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{name_of(p)}-{i}" for i, (p, _) in enumerate(COMMANDS)])
def test_commands_are_understood(page, line, tmp_path, monkeypatch):
    before, script, argv = split_command(line)
    parse_launcher(before, [script, *argv])
    monkeypatch.chdir(tmp_path)
    for word in argv:  # a data set of the reader's own
        if argv[argv.index(word) - 1] == "--dataset" and word.endswith(".npz"):
            (tmp_path / word).touch()
        if argv[argv.index(word) - 1] == "--config":
            (tmp_path / word).parent.mkdir(parents=True)
            (tmp_path / word).write_text(json.dumps({"options": vars(options.parse([]))}))
    with contextlib.suppress(SystemExit) if "--help" in argv else contextlib.nullcontext():
        PARSERS[script](argv)


OTHERS = {
    "--help",
    "--sweeps",
    "--n",
    "--order",
    "--dist",
    "--seeds",
    "--with",
    "--main-port",
    "--master-port",
    "--signals-to-handle",
    "--nproc_per_node",
    "--logdir",
}


def test_every_option_named_in_the_text_exists():
    parsers = [
        options.parser(),
        sweep.parser(),
        report.parser(),
        noise.command_line(),
        planted.parser(),
        meter.parser(),
    ]
    subparsers = [sub for p in parsers for a in p._actions if isinstance(a.choices, dict) for sub in a.choices.values()]
    known = {name for p in [*parsers, *subparsers] for a in p._actions for name in a.option_strings} | OTHERS
    text = {
        (page.name, o) for page in GUIDES for c in inline_code(page) for o in re.findall(r"(?<!\S)--[a-z][\w-]*", c)
    }
    unknown = sorted((page, option) for page, option in text if option not in known)
    assert len(text) > 50
    assert not unknown


def test_the_documents_show_commands_of_every_kind():
    scripts = [split_command(line)[1] for _, line in COMMANDS]
    assert set(scripts) == set(PARSERS)
    assert len([c for c in COMMANDS if c[0].name == "README.md"]) >= 8


# ----------------------------------------------------------------------------------------------------------- the README


def test_the_readme_is_short_and_starts_with_what_matters():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    screen = "\n".join(lines[:25])
    assert "![" in screen
    assert len(re.findall(r"python3 -m venv", screen)) == 2
    tests = [line for line in lines if "python -m pytest" in line]
    assert tests and tests[0].startswith("python3 -m venv .venv && ")  # .ci/run runs this line
