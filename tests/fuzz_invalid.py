"""Command lines that train.py has to refuse: a valid one of fuzz_options.py, and something that makes it invalid."""

import random
import string

from engine import cmdline
from fuzz_inputs import Inputs
from fuzz_options import Command, known_options, valid

NO_NUMBERS = ["", "x", "nan", "-inf", "1e", "--", "-1", "1_000", "٣", "１", " 1", "1 ", "0x10", "1,5", "1;", "\n1"]
NO_NUMBERS += ["9" * 5000, "x" * 5000, "None", "true", "1/2", "\udcff", "-", "½", "1+1"]
OUTSIDE = ["0", "-0.0001", "1.0001", "1.5", "1e9", "9" * 20, "inf", "65", "1025", "27", "1"]
NO_CHOICE = ["", "x", "--", "x" * 5000, "\udcff", "ON", " on", "on,off", "ü"]
NO_NAMES = ["a/b", "..", ".", "", "a\\b", "/", "x" * 300]
STRINGS = ("precision", "accelerator", "strategy")  # checked by train.py and not by the parser


def is_number(action) -> bool:
    return action.type not in (None, str, cmdline.path) and action.nargs != 0


def refused(action, text: str) -> bool:
    """Whether the option's own type says that it does not take `text`."""
    try:
        action.type(text)
    except Exception:
        return True
    return False


def bad_value(c: Command) -> list[str]:
    """One option with a value that it does not take."""
    known = known_options()
    takes = {n: a for n, a in known.items() if is_number(a) or a.choices or n in STRINGS or n == "name"}
    name = c.rng.choice(list(takes))
    action, option = takes[name], f"--{name.replace('_', '-')}"
    if is_number(action):
        outside = [text for text in OUTSIDE if refused(action, text)]
        return [f"{option}={c.rng.choice(outside if outside and c.chance(0.4) else NO_NUMBERS)}"]
    return [f"{option}={c.rng.choice(NO_NAMES if name == 'name' else NO_CHOICE)}"]


def bad_word(c: Command) -> list[str]:
    """A word that is no option of this parser: misspelt, abbreviated, without its value, or none at all."""
    known = known_options()
    name = c.rng.choice(list(known)).replace("_", "-")
    junk = "".join(c.rng.choices(string.ascii_lowercase, k=6))
    switches = [n for n, a in known.items() if a.nargs == 0]
    alone = [n for n, a in known.items() if a.nargs is None]
    words = [[f"--{junk}"], [f"--{junk}=1"], [junk], [f"--{name}x"], [f"-{name}"], ["--x" * 2000], ["-"]]
    words += [[f"--{c.rng.choice(switches).replace('_', '-')}=1"], [f"--{c.rng.choice(alone).replace('_', '-')}"]]
    short = name[: c.rng.randint(2, len(name))].rstrip("-")
    if short.replace("-", "_") not in known and short != "help":
        words.append([f"--{short}=1"])
    return c.rng.choice(words)


def contradiction(c: Command) -> list[str]:
    """Options that do not go together, or not with the data."""
    synthetic = ["--dataset=synthetic", "--synthetic-train=200", "--synthetic-test=10"]
    no_file = ["--noise-type=uniform", *synthetic]
    ways = [
        ["--model=resnet18", "--norm=gn", f"--width={c.rng.choice([1, 7, 9, 20])}"],
        ["--model=vgg16", "--width=32"],
        ["--model=vgg16-linear", "--norm=gn"],
        ["--sched-steps=5", "--sched-epochs=1"],
        ["--sched-examples=5", "--sched-epochs=1"],
        [f"--measure={c.rng.choice(['off', 'full'])}", "--null-every=2"],
        ["--noise-type=file", "--noise=0.5"],
        ["--noise-type=human"],
        ["--noise-type=matrix"] if not c.value("noise_matrix") else ["--noise-matrix=missing.npy"],
        ["--noise-labels=worse_label", *no_file],
        ["--noise-file=noise.npz", *no_file],
        ["--noise-matrix=T.npy", *no_file],
        ["--noise-type=instance", "--noise=1", *synthetic],
        ["--noise=0.5", "--fake-mask=0.5", "--noise-type=pair", *synthetic],
        ["--bs=100000"],
        ["--subset=1000000"],
        [f"--val-frac={c.rng.choice(['0', '1', '0.999999', '1e-9'])}"],
        ["--subset=1"],
        ["--strategy=dp"],
        ["--accelerator=tpu"],
        ["--accelerator=gpu"],
        ["--precision=bf17"],
        ["--graph=on"],
        ["--dataset=cifar11"],
        ["--dataset=synthetic", "--image-size=32"],
        ["--dataset=fmnist", "--data-dir=" + c.inputs.junk("empty-folder")],
    ]
    return c.rng.choice(ways)


def bad_file(c: Command) -> list[str]:
    """A file or a folder that is not what an option needs."""
    junk = c.rng.choice(c.inputs.junk_files)
    s = c.inputs.sets["synthetic"]
    own = [f"--dataset={s.path}", f"--synthetic-train={s.size}", "--synthetic-test=10"]
    ways = [
        [f"--dataset={junk}"],
        [*own, "--noise-type=file", f"--noise-file={junk}"],
        [*own, "--noise-type=human", "--noise-labels=worse_label", f"--noise-file={junk}"],
        [*own, "--noise-type=matrix", f"--noise-matrix={junk}"],
        [*own, f"--loss=forward:{junk}"],
        [*own, "--noise-type=file", f"--noise-file={c.inputs.sets['grey'].file('noise.npz')}"],
        [*own, "--noise-type=matrix", f"--noise-matrix={c.inputs.sets['grey'].file('T.npy')}"],
        [f"--runs={c.inputs.junk('text.npz')}"],
        [f"--config={c.rng.choice([junk, c.rng.choice(c.inputs.junk_configs)])}"],
        [f"--config={c.rng.choice(c.inputs.junk_configs)}"],
        ["--dataset=cifar10", f"--data-dir={c.inputs.junk('damaged-sets')}"],
        ["--dataset=fmnist", f"--data-dir={c.inputs.junk('damaged-sets')}"],
    ]
    return c.rng.choice(ways)


INVALID = {"value": bad_value, "word": bad_word, "contradiction": contradiction, "file": bad_file}


def invalid(rng: random.Random, inputs: Inputs) -> tuple[str, list[str]]:
    """(kind, command line) of one that train.py has to refuse: a valid one, and something that makes it invalid."""
    c = valid(rng, inputs)
    kind = rng.choices(list(INVALID), [5, 2, 3, 3])[0]
    spoilt = INVALID[kind](c)
    c.ranks = 1
    given = {word.split("=")[0] for word in spoilt}
    if kind in ("contradiction", "file"):  # what was chosen before could make these right, or wrong for another reason
        plain = [f"--{n.replace('_', '-')}={v}" for n, v in {"width": 8, "bs": 32, "epochs": 1}.items()]
        if any("vgg" in word for word in spoilt):
            plain = plain[1:]
        first = [f"--dataset={inputs.sets['synthetic'].path}", "--synthetic-train=200", "--synthetic-test=10"]
        if "--dataset" in given:
            first = first[1:]
        return kind, [*first, *plain, "--accelerator=cpu", "--threads=1", *spoilt]
    return kind, [*c.argv(), *spoilt]  # behind, for of an option given twice the last one counts
