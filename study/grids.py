"""What a sweep consists of: presets and grids of train.py's options, expanded into checked runs with their names.

train.py's own parser decides what an option is, what it may be and what a run is called.
"""

import argparse
import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from data import InputError
from datasets import known_shape
from engine import options, roles
from engine.identity import differences

REPORT_SIZES = "16,32,64,128,256,512"
MAIN = "dataset=cifar10 model=resnet18 epochs=64 lr=0.1 measure=full noise=0,0.2,0.5 "
RATIO = "dataset=cifar10 model=resnet18 epochs=80 lr=0.05,0.1 bs=64,128 noise=0,0.2,0.5 "
QUICK = (  # so few images that a narrow network comes to fit its wrong labels within minutes
    "dataset=cifar10 subset=2000 val-frac=0.5 width=8 no-augment=on epochs=20 sched=onecycle seed+noise-seed+split-seed=0,1,2 "
    "measure=full measure-every=20 measure-budget=0.6 chunks=2 permutations=2 "
)

MEDIUM = (  # 3,000 images: accuracy 0.87 without noise, wrong labels partly fitted; 192 steps are 16 epochs at B = 256
    "dataset=fmnist model=resnet18 subset=4500 val-frac=0.3333 width=8 no-augment=on epochs=16 "
    "seed+noise-seed+split-seed=0,1,2,3,4 measure=full measure-every=20 measure-budget=0.45 chunks=2 permutations=2 "
)
RATES = "bs+lr=16:0.025,32:0.05,64:0.1,128:0.2,256:0.4 "  # one lr/B
FULL = (  # figures 4, 7 and 10, measured as in the report's plots
    " noise=0,0.2,0.5 dataset=cifar10 model=resnet18 epochs=64 lr=0.1 sched=onecycle sched-steps=5000 end=schedule measure-bn=eval"
)

# A preset's parts, each a list of grids; {sizes} are the report's batch sizes. An A/A run measures a fake noisy set.
PRESETS = {
    "report": {
        "4-12": [MAIN + "bs={sizes} sched=constant,cosine,onecycle sched-steps=5000 end=schedule"],
        "13-14": [RATIO + "sched=onecycle,constant sched-steps=25000 end=schedule"],
        "15-17": [
            "dataset=fmnist model=vgg16 epochs=64 lr=0.1 noise=0,0.2,0.5 bs={sizes} sched=onecycle sched-steps=5000 end=schedule"
        ],
    },
    "budget": {
        "steps": [MAIN + "bs={sizes} sched=constant,cosine,onecycle sched-steps=5000 end=schedule"],
        "epochs": [MAIN + "bs={sizes} sched=cosine,onecycle sched-epochs=64"],
        "examples": [MAIN + "bs={sizes} sched=cosine,onecycle sched-examples=640000 end=schedule"],  # 5000 steps of 128
        "ratio": [
            RATIO + "sched=onecycle,constant sched-steps=25000 end=schedule",
            RATIO + "sched=onecycle sched-epochs=80",
        ],
        "aa": [MAIN.replace("noise=0,0.2,0.5", "fake-mask=0.2,0.5") + "bs={sizes} sched=onecycle end=schedule"],
    },
    "quick": {
        "steps": [
            QUICK + "noise=0,0.5 bs=16,64,256 sched-steps=80 end=schedule"
        ],  # all of the training at 256, a sixteenth at 16
        "epochs": [QUICK + "noise=0,0.5 bs=16,64,256 sched-epochs=20"],
        "aa": [QUICK + "fake-mask=0.5 bs=16,64,256 sched-epochs=20"],
    },
    "medium": {
        "steps": [MEDIUM + "noise=0,0.2,0.5 bs=16,32,64,128,256 sched=onecycle sched-steps=192 end=schedule"],
        "epochs": [MEDIUM + "noise=0,0.2,0.5 bs=16,32,64,128,256 sched=onecycle sched-epochs=16"],
        "constant": [MEDIUM + "noise=0,0.5 bs=16,64,256 sched=constant"],
        "scaled": [
            MEDIUM + RATES + "noise=0,0.5 sched=onecycle sched-steps=192 end=schedule",
            MEDIUM + RATES + "noise=0,0.5 sched=onecycle sched-epochs=16",
        ],
        "aa": [MEDIUM + "fake-mask=0.5 bs=16,64,256 sched=onecycle sched-steps=192 end=schedule"],
    },
    "full": {
        "256-512": ["bs=512,256" + FULL],  # the longest runs first
        "64-128": ["bs=128,64" + FULL],
        "16-32": ["bs=32,16" + FULL],
    },
}

SCHED_LENGTHS = tuple(f"--{option.replace('_', '-')}" for option in roles.having(roles.SCHED_LENGTH))
SEEDS = tuple(f"--{option.replace('_', '-')}" for option in roles.having(roles.SEED))
NOT_VARIED = ("runs", "name", "resume")
PLACES = set(roles.having(roles.PLACE)) - set(NOT_VARIED)  # not in a run's name: two such runs would be one


@dataclass
class Job:
    """One run: train.py's options for it, without those that say where and on what, and its checked namespace."""

    argv: list[str]
    args: object = field(repr=False)
    always: frozenset[str] = frozenset()  # the axes of its grid: in its name at their default, too
    varied: frozenset[str] = frozenset()  # those in which the runs of its grid differ: the beginning of its name
    long_name: str = ""  # for where its own is that of another run

    @property
    def name(self) -> str:
        return self.args.name

    @property
    def work(self) -> float:
        """Rough cost in examples, for estimates: training examples, and 150 more for each step's launches."""
        shape = known_shape(self.args)
        n = (self.args.subset or (shape.train if shape else 50_000)) * (1 - self.args.val_frac)
        steps = self.args.epochs * math.ceil(n / self.args.bs)
        share = options.run_steps(self.args, math.ceil(n / self.args.bs))[0] / steps
        return share * (self.args.epochs * n + 150 * steps)


def known_options() -> dict[str, argparse.Action]:
    """train.py's options {name without the dashes: its action}."""
    known = {a.option_strings[0].removeprefix("--"): a for a in options.parser()._actions if a.option_strings}
    known.pop("-h", None)
    return known


def key_of(name: str) -> str:
    """An option as it is called among the parsed ones: --noise-seed is noise_seed."""
    return name.strip("-").replace("-", "_")


def axes(grid: str, option: str) -> list[list[list[str]]]:
    """A grid's axes as lists of alternatives, each the options it adds.

    `grid`: words NAME=VALUE,VALUE,..., NAME any option of train.py. Two options move together as A+B=VALUE,VALUE
    (one value for both) or A+B=X:Y,X:Y. A switch takes on or off; `default` leaves an option out. Raises `InputError` with
    `option`, which gave the grid, before the reason.
    """
    known = known_options()
    listed = []
    for word in grid.split():
        names, equals, values = word.partition("=")
        keys = [k.strip("-").replace("_", "-") for k in names.split("+")]
        if not equals or not values:
            raise InputError(f"{option}: '{word}' is not NAME=VALUE,VALUE,...")
        for key in keys:
            if key.replace("-", "_") in PLACES:
                raise InputError(
                    f"{option}: '{key}' changes where a run happens, not the run; give --{key} for all runs"
                )
            if key not in known or key in (*NOT_VARIED, "help"):
                raise InputError(f"{option}: '{key}' is not an option of train.py that a sweep can vary")
        alternatives = []
        for value in values.split(","):
            parts = value.split(":") if len(keys) > 1 and ":" in value else [value] * len(keys)
            if len(parts) != len(keys) or not all(parts):
                raise InputError(f"{option}: '{value}' in '{word}' is not one value for each of {', '.join(keys)}")
            alternative = []
            for key, part in zip(keys, parts, strict=True):
                if known[key].nargs == 0:  # a switch
                    if part not in ("on", "off", "default"):
                        raise InputError(f"{option}: {key} is a switch, on or off, not '{part}'")
                    alternative += [f"--{key}"] * (part == "on")
                elif part != "default":
                    alternative += [f"--{key}", part]
            alternatives.append(alternative)
        listed.append(alternatives)
    if not listed:
        raise InputError(f"{option}: it is empty")
    return listed


def of_seeds(axis: list[list[str]], option: str) -> bool:
    """Whether an axis sets any of `SEEDS`, and so gives way to --seeds. Raises `InputError` if it sets more."""
    names = {word for alternative in axis for word in alternative if word.startswith("--")}
    more = names - set(SEEDS)
    if names == more:
        return False
    if more:
        raise InputError(f"--seeds: {option} varies {', '.join(sorted(more))} together with the seed; leave one out")
    return True


def without(names: tuple[str, ...], argv: list[str]) -> list[str]:
    """`argv` without these options and the value of each, a word of its own or behind a `=`."""
    pairs = zip(["", *argv], argv, strict=False)
    return [w for before, w in pairs if w.split("=")[0] not in names and before not in names]


def axis_values(grid: str) -> dict[str, set[str]]:
    """{option: values} that a grid gives, options as named in the parsed ones, values as they are written."""
    values: dict[str, set[str]] = {}
    for names, _, listed in (word.partition("=") for word in grid.split()):
        keys = [key_of(name) for name in names.split("+")]
        for value in listed.split(","):
            parts = value.split(":") if len(keys) > 1 and ":" in value else [value] * len(keys)
            for key, part in zip(keys, parts, strict=True):
                values.setdefault(key, set()).add(part)
    return values


def axis_names(grids: Iterable[str], several: bool = False) -> set[str]:
    """The options that grids have as axes, as their names in the parsed options; with `several` those of several values."""
    words = (word.partition("=") for grid in grids for word in grid.split())
    return {key_of(key) for names, _, values in words for key in names.split("+") if not several or "," in values}


def varied_options(grids: Iterable[str]) -> set[str]:
    """The options in which runs of some grids differ, as named in the parsed options: of several values, or not in all grids."""
    grids, plain = [axis_values(grid) for grid in grids], vars(options.parser().parse_args([]))
    seen: dict[str, set[str]] = {key: set() for values in grids for key in values}
    for key, values in seen.items():
        for grid in grids:
            values |= {str(plain[key]) if value == "default" else value for value in grid.get(key, {"default"})}
    return {key for key, values in seen.items() if len(values) > 1}


def named(argv: list[str], args, always: frozenset[str], varied: frozenset[str]) -> Job:
    """The job of checked `args` under its name: the options of `varied` alone, where it has any; its long name goes on with
    what else it has."""
    parts = options.name_parts(args, always | varied)
    first = [part for option, part in parts.items() if option in varied]
    rest = [part for option, part in parts.items() if option not in varied]
    args.name = options.joined(first or rest)
    return Job(argv, args, always, varied, options.joined(first + rest))


def expand(
    grids: list[str],
    extra: list[str],
    option: str,
    seeds: list[str] = (),
    always: Collection[str] | None = None,
    whole: Collection[str] = (),
) -> list[Job]:
    """The jobs of some grids, each once, in order. `extra` options hold for all and override the grid's.

    `seeds` set the three seeds of `SEEDS` alike, in place of an axis; one of them in `extra` stays as it is given, as any option
    there does (`--split-seed 0`: one split for all seeds). A run's name has the options in which the runs differ, those of the
    `whole` grids of which these are a part, at their default too, and the seed alone where all three are alike. `always`: every
    axis of the grids. Every run is checked by train.py's own parser before any is started; raises `InputError`.
    """
    given = {word.split("=")[0] for word in extra}
    always = set(axis_names(grids) if always is None else always) | (set(roles.having(roles.SEED)) if seeds else set())
    length_given = not given.isdisjoint(SCHED_LENGTHS)
    checked = []
    for grid in grids:
        alternatives = axes(grid, option)
        if seeds:
            alternatives = [a for a in alternatives if not of_seeds(a, option)]
            alternatives.append([[word for name in SEEDS for word in (name, s)] for s in seeds])
        for chosen in itertools.product(*alternatives):
            argv = [word for alternative in chosen for word in alternative]
            if length_given:  # in whatever unit: the two would be refused together
                argv = without(SCHED_LENGTHS, argv)
            argv += extra
            try:
                checked.append((argv, options.parse(argv)))
            except InputError as e:
                raise InputError(f"{option}: {e}") from e
    varied = varied_options(whole or grids)
    if seeds:
        varied = varied - set(roles.having(roles.SEED)) | {key_of(name) for name in SEEDS if name not in given}
    if all(args.seed == args.noise_seed == args.split_seed for _, args in checked):
        varied -= {"noise_seed", "split_seed"}
    jobs: dict[str, Job] = {}
    for argv, args in checked:
        new = named(argv, args, frozenset(always), frozenset(varied))
        job = jobs.setdefault(new.name, new)
        other = differences(vars(job.args), vars(args))
        if other:
            raise InputError(f"{option}: two runs would be called {args.name}: {'; '.join(other.values())}")
    return list(jobs.values())
