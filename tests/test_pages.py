"""The report's files: names and messages of any kind shown as they are, and a disk that refuses leaves the old report."""

import html
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import report
from conftest import ROOT, any_name
from data import printable
from study import results
from study.markup import literal, to_html, to_markdown
from study.outputs import CannotWrite, whole_file, whole_folder
from study.page import Page
from test_report import plant

ODD = [
    "a|b",
    "**bold** *it* _it_ __x__ snake_case",
    "`code` ``x` y",
    "[text](javascript:alert(1)) ![i](x) [a][b] [c]: d",
    "<script>alert(1)</script> <b> &lt; &amp;",
    "two\nlines\n\n# heading\r\n- item",
    "back\\slash \\| \\* \\",
    "$\\frac{1}{0}$ $x $",
    "~~gone~~ #1 +x -y",
    os.fsdecode(b"odd\xff\xfe bytes"),
    "bell\a escape\x1b[31m nul\0 right-to-left\u202e",
    "数据 ü é",
    "'quoted' \"twice\"",
]


def texts(page: str, tag: str) -> list[str]:
    """What a reader sees in every element `tag`."""
    return [html.unescape(re.sub(r"<[^>]*>", "", inner)) for inner in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)]


def markdown(text: str) -> str:
    """HTML made by Python-Markdown, which tensorboard brings along and shows texts with; knows fewer escapes than others."""
    reader = pytest.importorskip("markdown").Markdown(extensions=["tables"])
    reader.ESCAPED_CHARS += ["$", "~", "|", "="]
    return reader.convert(text)


def shown(text: str) -> str:
    return " ".join(printable(text).split())


def page_of(items: list[str], folder: Path) -> tuple[str, str]:
    """(report.md, report.html) with every item as heading, paragraph, item of a list and cell."""
    page = Page(folder)
    for item in items:
        page.heading(3, item)
        page.text(literal(item))
    page.bullets([literal(item) for item in items])
    page.table(["name", "other"], [[literal(item), "x"] for item in items])
    page.write(items[0])
    return (folder / "report.md").read_text("utf-8"), (folder / "report.html").read_text("utf-8")


def test_any_name_is_shown_as_it_is(tmp_path):
    """Those above, and 200 drawn from the characters that mean something."""
    rng = random.Random(0)
    drawn = ["".join(rng.choices("|*_`[]()<>\\#&;$~!+-=.:ab 1\n", k=rng.randint(1, 14))) for _ in range(200)]
    items = [item for item in ODD + drawn if shown(item)]
    text, page = page_of(items, tmp_path)
    want = [shown(item) for item in items]
    for made in (page, markdown(text)):
        rows = [" ".join(cell.split()) for cell in texts(made, "td")]
        assert rows[::2] == want and set(rows[1::2]) == {"x"}
        for tag in ("h3", "p", "li"):
            assert [" ".join(t.split()) for t in texts(made, tag)] == want, tag
        assert not re.search(r"<(script|a|img|em|strong|code|hr|ol|h1|h2)\b", made.replace("<title>", ""))


def test_bold_and_code_of_our_own():
    shown_text = "**1a** (x_y): **not supported**; `--lr` 2 * 3"
    assert to_html(shown_text) == "<b>1a</b> (x_y): <b>not supported</b>; <code>--lr</code> 2 * 3"
    assert to_markdown(shown_text) == "**1a** (x_y): **not supported**; `--lr` 2 \\* 3"
    assert to_html(f"**{literal('a**b')}**") == "<b>a**b</b>"


def test_text_that_nobody_marked_as_literal_cannot_leave_its_cell(tmp_path):
    page = Page(tmp_path)
    page.table(["name", "other"], [[item, "x"] for item in ODD])
    page.write("t")
    made = markdown((tmp_path / "report.md").read_text("utf-8"))
    assert len(texts(made, "td")) == 2 * len(ODD) and not re.search("<(script|a|img)", made)


NAMES = [b"plain", b"odd\xff|`_*", "$x $<数>".encode()]


@pytest.fixture(scope="module")
def odd_runs(tmp_path_factory) -> Path:
    """Runs of odd names, one of them failed for an odd reason."""
    folder = tmp_path_factory.mktemp("odd")
    for i, name in enumerate(NAMES):
        reason = "bad <class> 'a|b'\n# x" if i else None
        argv = f"--dataset synthetic --bs {16 << i} --sched onecycle --epochs 2"
        series = {tag: [(0, 0.1), (10, 0.4)] for tag in ("val/acc", "optim/lr", "optim/momentum")}
        plant(folder, argv, series, "failed" if i else "finished", reason).rename(folder / os.fsdecode(name))
    return folder


@any_name
def test_a_report_on_runs_of_odd_names(odd_runs, tmp_path, capfd):
    assert report.main([str(odd_runs), "--out", str(tmp_path), "--export", str(tmp_path / "all.npz")]) == 0
    shown_text, err = capfd.readouterr()
    assert "Warning" not in err and "Traceback" not in err
    made = markdown((tmp_path / "report.md").read_text("utf-8"))
    page = (tmp_path / "report.html").read_text("utf-8")
    for name in ("odd\\xff|`_*", "$x $<数>"):
        assert name in texts(made, "td") and name in texts(page, "td")
    assert texts(page, "td").count("bad <class> 'a|b' # x") == 2 == texts(made, "td").count("bad <class> 'a|b' # x")
    for figure in tmp_path.glob("*.svg"):
        ET.parse(figure)
    assert {r.name for r in results.load_runs([str(tmp_path / "all.npz")])} == {os.fsdecode(name) for name in NAMES}
    assert oct((tmp_path / "report.md").stat().st_mode & 0o777) == oct(0o666 & ~umask())


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.fixture(scope="module")
def one_run(odd_runs, tmp_path_factory) -> tuple[str, Path]:
    """(a run's folder, the folder of the report on it)."""
    (folder,) = odd_runs.glob("$x*")
    out = tmp_path_factory.mktemp("one")
    assert report.main([str(folder), "--out", str(out)]) == 0
    return str(folder), out


@any_name
def test_a_single_run_of_an_odd_name(one_run):
    _, out = one_run
    shown_text = markdown((out / "report.md").read_text("utf-8"))
    assert texts(shown_text, "h1") == ["$x $<数>"] and "$x $" in (out / "run.svg").read_text("utf-8")


@pytest.mark.slow
def test_a_report_is_the_same_in_anybodys_environment(odd_runs, tmp_path):
    """A notebook's back end, a matplotlibrc that is dark and wants TeX, no UTF-8, another time zone."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfigure.facecolor: black\naxes.formatter.use_locale: True\n"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "MPL"))}
    own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    own |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"}
    made = []
    for i, environment in enumerate((plain, plain | own)):
        argv = [sys.executable, str(ROOT / "report.py"), str(odd_runs / "plain"), "--out", str(tmp_path / str(i))]
        ended = subprocess.run(argv, env=environment, capture_output=True, text=True, errors="replace")
        assert ended.returncode == 0, ended.stderr
        made.append(content(tmp_path / str(i)))
    assert made[0] == made[1]


# ------------------------------------------------------------------------------------------------- disks that refuse


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def limited(size: int, argv: list[str]) -> tuple[int, str]:
    """(status, standard error) of report.py in a child process that may write no file beyond `size` bytes."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))  # not pytest's, which are files
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            status = report.main(argv)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_a_disk_that_fills_up_leaves_the_older_report(one_run, tmp_path):
    """At the first figure and at the last page; one line, status 1, nothing left behind."""
    run, made = one_run
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / "mine.txt").write_text("kept")
    before = content(out)
    sizes = {name: len(blob) for name, blob in before.items()}
    assert max(sizes, key=sizes.get) == "report.html"
    status, err = limited(sizes["report.html"] * 9 // 10, [run, "--out", str(out), "--log-x"])
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"report.py: error: --out {out}: cannot be written (File too large)")
    assert content(out) == before
    status, err = limited(100, [run, "--out", str(tmp_path / "new" / "below")])
    assert (status, err.count("\n")) == (1, 1) and not (tmp_path / "new").exists()


def test_an_export_that_does_not_fit_leaves_the_older_one(odd_runs, tmp_path):
    file = tmp_path / "all.npz"
    assert report.main([str(odd_runs / "plain"), "--export", str(file)]) == 0
    before = file.read_bytes()
    status, err = limited(200, [str(odd_runs), "--export", str(file)])
    assert status == 1 and err == (
        f"report.py: error: --export {file}: cannot be written (File too large); what was there is as before\n"
    )
    assert file.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"all.npz"}


@pytest.mark.parametrize("option", ["--out", "--export"])
def test_a_place_that_cannot_be_written_is_one_line_and_status_1(option, odd_runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / ("x" if option == "--out" else "x.npz")
    assert report.main([str(odd_runs / "plain"), option, str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"report.py: error: {option} {path}: cannot be written (Not a directory)")
    assert err.count("\n") == 1


def test_a_folder_in_the_place_of_a_file_moves_nothing(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    with pytest.raises(CannotWrite, match="b in it is a folder"), whole_folder(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_an_error_of_another_kind_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "x" / "y") as folder:
        (folder / "a").write_text("new")
        raise KeyError
    with pytest.raises(KeyError), whole_file(tmp_path / "z", "--csv") as path:
        path.write_text("new")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "z", "--csv") as path:
        path.write_text(json.dumps(1))
    assert [p.name for p in tmp_path.iterdir()] == ["z"]
