"""Random valid command lines of train.py: one generator for each option of its parser.

An option without a generator is an error that names it: whoever adds an option says here what it may be.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import optim
import schedules
from engine import options, roles
from fuzz_inputs import Inputs, Set


@dataclass
class Command:
    """A valid command line in the making: what is chosen so far, and what that allows."""

    rng: random.Random
    inputs: Inputs
    ranks: int = 1
    chosen: dict[str, object] = field(default_factory=dict)
    in_file: set[str] = field(default_factory=set)  # options that the file of --config gives, and not the command line

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def value(self, name: str, default: object = None) -> object:
        """What was chosen for an option, `default` if it was left out."""
        got = self.chosen.get(name)
        return default if got is None else got

    @property
    def set(self) -> Set:
        return self.inputs.sets[self.chosen["dataset"]]

    @property
    def drawn(self) -> int:
        """Training examples before the split."""
        whole = self.value("synthetic_train") if self.set.name == "synthetic" else self.set.size
        return self.value("subset", whole)

    @property
    def n_train(self) -> int:
        return self.drawn - round(self.value("val_frac", 0.2) * self.drawn)

    @property
    def vgg(self) -> bool:
        return str(self.value("model", "resnet18")).startswith("vgg")

    @property
    def moves(self) -> bool:
        return bool(schedules.SCHEDULES[self.value("sched", "constant")].moves)

    @property
    def half(self) -> bool:
        """Half precision, which most CPUs compute very slowly."""
        return str(self.value("precision", "")).startswith(("16", "bf16"))

    @property
    def total_steps(self) -> int:
        per_epoch = math.ceil(self.n_train / self.value("bs", 128))
        whole = self.value("epochs", 64) * per_epoch
        whole = min(whole, self.value("max_steps", whole))
        if self.value("end", "epochs") == "epochs" or self.value("sched", "constant") == "constant":
            return whole
        in_steps = {
            "steps": lambda n: n,
            "epochs": lambda n: n * per_epoch,
            "examples": lambda n: math.ceil(n / self.value("bs", 128)),
        }
        unit = next((unit for unit in ("epochs", "examples") if self.value(f"sched_{unit}")), "steps")
        before = self.value("warmup_steps") or in_steps["epochs"](self.value("warmup_epochs", 0))
        before += in_steps[unit](self.value("sched_delay", 0))
        return min(whole, before + in_steps[unit](self.value(f"sched_{unit}", 5000)))

    def argv(self) -> list[str]:
        """The words of the command line, in random order and either spelling."""
        words = []
        for name, value in self.chosen.items():
            option = f"--{name.replace('_', '-')}"
            if value is None or value is False or name in self.in_file:
                continue
            if name == "dataset":
                value = self.set.path
            text = str(value)
            if value is True:
                words.append([option])
            elif text.startswith("-") or self.chance(0.3):
                words.append([f"{option}={text}"])
            else:
                words.append([option, text])
        self.rng.shuffle(words)
        return [word for some in words for word in some]


Generator = Callable[[Command], object]


def sometimes(p: float, *values: object) -> Generator:
    """One of `values` with probability `p`, else the option is left out."""
    return lambda c: c.rng.choice(values) if c.chance(p) else None


def switch(p: float) -> Generator:
    return lambda c: c.chance(p)


def between(p: float, low: int, high: int) -> Generator:
    return lambda c: c.rng.randint(low, high) if c.chance(p) else None


def real(p: float, low: float, high: float) -> Generator:
    """A number in low..high, in one of several spellings."""

    def make(c: Command) -> object:
        x = c.rng.uniform(low, high)
        return c.rng.choice([repr(x), f"{x:.3f}", f"{x:.2e}"]) if c.chance(p) else None

    return make


def dataset(c: Command) -> str:
    names = list(c.inputs.sets)
    return c.rng.choices(names, [c.inputs.sets[name].weight for name in names])[0]


def precision(c: Command) -> object:
    half = ["bf16-mixed", "16-mixed", "16", "bf16"]
    return (
        c.rng.choice(half if c.chance(0.15) else ["auto", "32-true", "64-true", "32", "64"]) if c.chance(0.8) else None
    )


def val_frac(c: Command) -> object:
    return c.rng.choice([0.1, 0.2, 0.35, 0.5]) if c.chance(0.4) else None


def noise_type(c: Command) -> object:
    kinds = ["uniform", "symmetric", "pair", "matrix", "instance", "dynamic", "human", "file", "matched"]
    if c.set.given:  # the set's own labels: only a file may replace them
        kinds = ["human", "file", "matched"]
        return c.rng.choice(kinds) if c.chance(0.3) else None
    if c.set.flips:
        kinds.append("asymmetric")
    if not c.set.files:
        kinds.remove("matrix")
    if not c.set.files or (c.set.name == "synthetic" and c.value("synthetic_train") != c.set.size):
        kinds = [k for k in kinds if k not in ("human", "file", "matched")]
    return c.rng.choice(kinds) if c.chance(0.7) else None


def noise(c: Command) -> object:
    if c.set.given or c.value("noise_type") in ("human", "file", "matched"):
        return None
    return c.rng.choice([0, 0.0, 0.1, 0.3, 0.5, 0.77, "1e-3", 0.999]) if c.chance(0.8) else None


def noise_file(c: Command) -> object:
    kind = c.value("noise_type")
    if kind == "human":
        return c.set.file("human.pt")
    if kind in ("file", "matched"):
        same_split = not (c.value("val_frac") or c.value("subset") or c.value("split_seed"))
        choices = ["noise.npz", "human.pt"] + ["dynamic.npz"] * (same_split and kind == "file")
        return c.set.file(c.rng.choice(choices))
    return None


def noise_labels(c: Command) -> object:
    return c.rng.choice(["worse_label", "aggre_label"]) if str(c.value("noise_file", "")).endswith(".pt") else None


def noise_matrix(c: Command) -> object:
    return c.set.file(c.rng.choice(["T.npy", "T.csv"])) if c.value("noise_type") == "matrix" else None


def model(c: Command) -> object:
    if c.set.side >= 32 and c.chance(0.01):
        return "vgg16-linear"
    return "resnet18" if c.set.grown or c.chance(0.3) else None


def width(c: Command) -> object:
    return None if c.vgg else c.rng.choice([1, 3, 4, 8] if c.half else [1, 3, 4, 5, 7, 8, 8, 9, 12, 15, 16])


def norm(c: Command) -> object:
    if c.vgg:
        return None
    return c.rng.choice(["bn", "gn"] if c.value("width") % 8 == 0 else ["bn"]) if c.chance(0.5) else None


def loss(c: Command) -> object:
    own = [f"forward:{c.set.file(name)}" for name in ("T.npy", "T.csv")] if c.set.files else []
    values = [
        "ce",
        "smooth",
        "smooth:0.3",
        "mae",
        "gce",
        "gce:1e-3",
        "gce:1",
        "sce",
        "sce:0.1+1.0",
        "sce:2,0",
        "forward",
    ]
    return c.rng.choice(values + own) if c.chance(0.3) else None


def momentum(c: Command) -> object:
    values = [0.5, 0.95, 0.99] + [0] * (c.value("optimizer") != "nesterov")
    return c.rng.choice(values) if c.chance(0.4) else None


def bs(c: Command) -> int:
    top = min(c.n_train, 8 if c.vgg or c.half else 64)
    return min(c.rng.choice([1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 48, 63, 64, c.n_train]), top)


def max_steps(c: Command) -> object:
    limit = 2 if c.vgg or c.half else 8 if c.value("measure") == "full" else 20
    longer = c.value("epochs") * math.ceil(c.n_train / c.value("bs")) > limit
    return c.rng.randint(1, limit) if longer or c.chance(0.2) else None


def sched_length(unit: str, *values: int) -> Generator:
    def make(c: Command) -> object:
        given = any(c.value(f"sched_{other}") for other in ("steps", "epochs", "examples"))
        length = c.rng.choice(values) if not given and c.chance(0.3) else None
        if length and c.value("sched") == "cyclic":  # a triangle has two steps at least, however large the batch
            return None if unit == "examples" else max(length, 2)
        return length

    return make


def fake_mask(c: Command) -> object:
    clean = not c.set.given and not float(c.value("noise", 0)) and c.value("noise_type") in (None, "uniform", "pair")
    return c.rng.choice([0, 0.2, 0.5, 1]) if clean and c.chance(0.5) else None


def compile_(c: Command) -> object:
    return "on" if c.chance(0.003) and c.ranks == 1 else c.rng.choice(["off", "auto"]) if c.chance(0.2) else None


def devices(c: Command) -> object:
    return (2 if c.chance(0.1) else c.rng.choice([1, "auto"])) if c.ranks == 1 and c.chance(0.1) else None


def name(c: Command) -> object:
    odd = ["r", "-x", "ü ß", "a=b,c;d", ".hidden", "x" * 200, "'quoted\"", "$HOME", "100%", "r.npz", "[a]*?"]
    return c.rng.choice(odd) if c.chance(0.5) else None


def null_every(c: Command) -> object:
    return c.rng.randint(1, 4) if c.value("measure", "split") == "split" and c.chance(0.5) else None


def plain(name: str, value: object) -> object:
    """The value of an option as config.json holds it."""
    action = known_options()[name]
    return action.type(str(value)) if action.type and not isinstance(value, bool) else value


def config(c: Command) -> object:
    """A config.json that gives some of the options chosen so far; what else it says must not hold."""
    if not c.chance(0.2):
        return None
    given = [name for name, value in c.chosen.items() if value is not None and value is not False]
    c.in_file = {name for name in given if name not in roles.having(roles.OWN) and c.chance(0.5)}
    for name in given:  # what the command line gives takes these out of the file
        if name not in c.in_file:
            c.in_file -= set(roles.REPLACES.get(name, ()))
    content = {name: plain(name, c.set.path if name == "dataset" else c.chosen[name]) for name in c.in_file}
    defaults = {name: action.default for name, action in known_options().items() if not action.nargs == 0}
    content |= {name: defaults[name] for name in given if name not in c.in_file and defaults.get(name) is not None}
    content |= {"name": "of the file", "runs": "/nowhere", "threads": 1000, "devices": 7, "resume": True, "config": "x"}
    folder = c.inputs.folder / "configs"
    folder.mkdir(exist_ok=True)
    path = folder / f"{c.rng.getrandbits(64):x}.json"
    path.write_text(json.dumps({"options": content}))
    return str(path)


# In the order in which they are chosen: a later one looks at what was chosen before it. True is a switch that is given.
GENERATORS: dict[str, Generator] = {
    "precision": precision,
    "dataset": dataset,
    "data_dir": lambda c: c.set.data_dir or ("nowhere" if c.chance(0.1) else None),
    "image_size": lambda c: c.rng.choice([28, 32, 33, 40]) if c.set.folder and c.chance(0.6) else None,
    "synthetic_train": lambda c: (
        c.rng.choice([64] if c.half else [200, 200, 200, 101, 64]) if c.set.name == "synthetic" else None
    ),
    "synthetic_test": lambda c: c.rng.choice([1, 20, 33]) if c.set.name == "synthetic" else None,
    "subset": lambda c: (
        c.rng.randint(50, min(64, c.set.size)) if c.set.grown or c.half or c.chance(0.15) and c.set.size > 64 else None
    ),
    "val_frac": val_frac,
    "split_seed": sometimes(0.2, 1, 2**63 - 1),
    "no_augment": switch(0.3),
    "noise_type": noise_type,
    "noise": noise,
    "noise_file": noise_file,
    "noise_labels": noise_labels,
    "noise_matrix": noise_matrix,
    "model": model,
    "width": width,
    "norm": norm,
    "bs": bs,
    "lr": lambda c: c.rng.choice([0.1, 0.03, "1e-3", "0.05"]) if c.chance(0.5) else None,
    "optimizer": sometimes(0.2, *optim.OPTIMIZERS),
    "loss": loss,
    "momentum": momentum,
    "wd": sometimes(0.3, 0, "1e-4", 0.01),
    "epochs": lambda c: 1 if c.vgg or c.half else c.rng.choice([1, 1, 2]),
    "measure": sometimes(0.8, "off", "split", "full", "full"),
    "max_steps": max_steps,
    "sched": sometimes(0.6, *schedules.SCHEDULES),
    "sched_steps": sched_length("steps", 1, 2, 7, 5000),
    "sched_epochs": sched_length("epochs", 1, 2, 9),
    "sched_examples": sched_length("examples", 1, 100, 1001),
    "end": sometimes(0.3, "epochs", "schedule"),
    "sched_milestones": lambda c: c.rng.choice(["0.5", "0.3+0.6", "1e-3,.999"]) if c.value("sched") == "step" else None,
    "sched_factor": lambda c: c.rng.choice([0.5, "1e-3"]) if c.value("sched") in ("step", "cyclic") else None,
    "sched_cycles": lambda c: 1 if c.value("sched") == "cyclic" else None,
    "sched_delay": lambda c: c.rng.choice([1, 3, 100]) if c.moves and c.chance(0.3) else None,
    "warmup_steps": sometimes(0.2, 1, 5, 1000),
    "warmup_epochs": lambda c: c.rng.choice([1, 2]) if not c.value("warmup_steps") and c.chance(0.1) else None,
    "measure_every": lambda c: c.rng.choice([1, 2, 3, 5]) if c.chance(0.9) else None,
    "measure_bn": sometimes(0.6, "train", "eval", "separate"),
    "measure_budget": lambda c: c.rng.choice([0.05, 0.5, 2, 100]) if c.chance(0.7) else None,
    "null_every": null_every,
    "permutations": between(0.4, 0, 5),
    "stratify": switch(0.3),
    "chunks": sometimes(0.4, 2, 3, 5, 8, 64),
    "window": between(0.3, 1, 6),
    "fake_mask": fake_mask,
    "seed": sometimes(0.3, 0, 1, 12345, 2**63 - 1),
    "noise_seed": sometimes(0.3, 0, 7, 2**63 - 1),
    "accelerator": lambda c: "cpu",
    "devices": devices,
    "strategy": lambda c: c.rng.choice(["auto", "ddp"]) if c.ranks == 1 and c.chance(0.1) else None,
    "num_nodes": sometimes(0.05, 1),
    "sync_bn": sometimes(0.2, "on", "off"),
    "threads": lambda c: c.rng.choice([1, 1, 1, 1, 2, 3]),
    "compile": compile_,
    "graph": sometimes(0.1, "off", "auto"),
    "deterministic": sometimes(0.1, "on", "off"),
    "profile": sometimes(0.03, 1, 3),
    "runs": sometimes(0.5, "runs", "a/b/ü", "./x y/"),
    "resume": switch(0.1),
    "checkpoint_minutes": sometimes(0.3, 0, 0.001, "1e9"),
    "best": switch(0.3),
    "examples": lambda c: (
        c.value("noise_type") != "dynamic"
        and not str(c.value("noise_file", "")).endswith("dynamic.npz")
        and c.chance(0.2)
    ),
    "name": name,
    "config": config,  # last, for it may hold any of the others
}


def known_options() -> dict[str, object]:
    """{name: argparse's action} of every option of train.py but --help."""
    return {a.dest: a for a in options.parser()._actions if a.option_strings and a.dest != "help"}


def check_complete() -> None:
    """Exit with a message that names the options without a generator, and the generators without an option."""
    known = known_options()
    lacking = [f"--{name.replace('_', '-')}" for name in known if name not in GENERATORS]
    idle = [name for name in GENERATORS if name not in known]
    if lacking or idle:
        raise SystemExit(
            f"tests/fuzz_options.py: no generator for {', '.join(lacking) or '-'}; "
            f"generators without an option: {', '.join(idle) or '-'}"
        )


def valid(rng: random.Random, inputs: Inputs) -> Command:
    """A valid command line at tiny size, over all options."""
    c = Command(rng, inputs, ranks=2 if rng.random() < 0.04 else 1)
    for name, generate in GENERATORS.items():
        c.chosen[name] = generate(c)
    return c
