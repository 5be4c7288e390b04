"""What `sweep.py --tune` searches: options of train.py, each over a range or a list of values.

    lr=log:0.003:1            log-uniform
    momentum=lin:0.5:0.99     uniform
    width=int:8:64            whole numbers, both ends included
    optimizer=sgd|adam        one of a list

A value is drawn with every digit and used with four significant ones: that is what a run's command line and name have.
"""

import argparse
from dataclasses import dataclass

from data import InputError, one_line
from engine import options, roles
from engine.cmdline import NUMBER
from study.grids import key_of, known_options

DIGITS = 4  # significant, of a value
CELLS = ("lr", "momentum", "wd")  # axes by which a report does not need to tell tuned cells apart
WHY_NOT = {  # the first role of an option that fits says why it is not tuned
    roles.SEED: "it is a seed; --seeds and --tune-seeds set it",
    roles.FILE: "it changes the task, so that values could not be compared",
    roles.GROWS: "it changes how long a run is, so that values could not be compared",
    roles.AXIS: "it tells the cells of a comparison apart; make it an axis of the grid",
    roles.MEASURING: "it changes what is measured, not what is learned",
    roles.TOLERATED: "it changes what is measured, not what is learned",
    roles.HARDWARE: "it changes on what a run happens",
    roles.PLACE: "it changes where a run happens, not the run",
}
TASK = ("data", "noise")  # groups of train.py's options that make the task


@dataclass(frozen=True)
class Dimension:
    """One tuned option. `kind`: log, lin, int or choice; `low`, `high` of a range; `choices` of a list, as they are given."""

    option: str  # as on the command line, without the dashes
    text: str  # what it is searched over, as it was given
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()
    switch: bool = False

    @property
    def corners(self) -> tuple[str, ...]:
        """Values that have to be valid for all to be: the ends of a range, everything of a list."""
        return self.choices or tuple(self.text.split(":")[1:])

    def suggest(self, trial) -> str:
        """The value of an Optuna trial, as train.py takes it; drawn if the trial has none yet."""
        return self.spelled(
            trial.suggest_categorical(self.option, self.choices)
            if self.choices
            else trial.suggest_int(self.option, int(self.low), int(self.high))
            if self.kind == "int"
            else trial.suggest_float(self.option, self.low, self.high, log=self.kind == "log")
        )

    def spelled(self, value: float | str) -> str:
        """A value that was drawn, as train.py takes it."""
        if self.kind in ("choice", "int"):
            return str(value)
        rounded = f"{value:.{DIGITS}g}"
        if self.low <= float(rounded) <= self.high:
            return rounded
        return self.corners[float(rounded) > self.high]

    def words(self, value: str) -> list[str]:
        """The words of train.py's command line for a value."""
        if self.switch:
            return [f"--{self.option}"] if value == "on" else []
        return [f"--{self.option}", value]


def refusal(key: str, action: argparse.Action) -> str | None:
    """Why an option of train.py is not tuned, None for one that may be."""
    own = roles.ROLES.get(key, frozenset({roles.PLACE}))
    for role, why in WHY_NOT.items():
        if role in own and not (role == roles.AXIS and key in CELLS):
            return why
    groups = {group.title for group in options.parser()._action_groups for a in group._group_actions if a.dest == key}
    return WHY_NOT[roles.FILE] if groups & set(TASK) else None


def whole(action: argparse.Action, text: str) -> bool:
    """Whether an option takes whole numbers, from one of its values. Raises `argparse.ArgumentTypeError`."""
    return isinstance(action.type(text), int)


def dimension(name: str, spec: str, action: argparse.Action) -> Dimension:
    """One option's dimension. Raises `InputError`."""
    what = f"--tune: {name}={spec}"
    kind, *ends = spec.split(":")
    switch = action.nargs == 0
    if kind not in ("log", "lin", "int") or not ends:
        choices = tuple(spec.split("|"))
        if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
            raise InputError(f"{what}: not log:LOW:HIGH, lin:LOW:HIGH, int:LOW:HIGH or a list A|B of different values")
        if switch and set(choices) != {"on", "off"}:
            raise InputError(f"{what}: {name} is a switch, on or off")
        return Dimension(name, spec, "choice", choices=choices, switch=switch)
    if switch or action.choices or action.type is None:
        raise InputError(f"{what}: {name} takes no number; give a list A|B")
    if len(ends) != 2 or not all(NUMBER.fullmatch(end) for end in ends):
        raise InputError(f"{what}: not {kind}:LOW:HIGH")
    low, high = map(float, ends)
    if not low < high:
        raise InputError(f"{what}: {ends[0]} is not below {ends[1]}")
    if kind == "log" and low <= 0:
        raise InputError(f"{what}: a logarithmic range begins above 0")
    if kind == "int" and not (low.is_integer() and high.is_integer() and all(end.isdigit() for end in ends)):
        raise InputError(f"{what}: {kind} has whole numbers as its ends")
    try:
        whole_numbers = whole(action, ends[0])
    except (argparse.ArgumentTypeError, ValueError) as e:
        raise InputError(f"{what}: {one_line(e)}") from e
    if kind != "int" and whole_numbers:
        raise InputError(f"{what}: {name} takes whole numbers; give int:LOW:HIGH")
    return Dimension(name, spec, kind, low, high)


def read_space(text: str, in_grid: set[str], given: list[str]) -> list[Dimension]:
    """The dimensions in the words NAME=SPEC of --tune.

    `in_grid`: options that the grid sets, as named in the parsed options; `given`: words that go to every run. Raises
    `InputError`.
    """
    known, dimensions = known_options(), {}
    everywhere = {key_of(word.partition("=")[0]) for word in given if word.startswith("--")}
    for word in text.split():
        name, equals, spec = word.partition("=")
        name = key_of(name).replace("_", "-")
        key = key_of(name)
        if not equals or not spec:
            raise InputError(f"--tune: '{word}' is not NAME=SPEC, such as lr=log:0.003:1")
        if name not in known:
            raise InputError(f"--tune: '{name}' is not an option of train.py")
        why = refusal(key, known[name])
        if why:
            raise InputError(f"--tune: '{name}' cannot be tuned: {why}")
        if key in in_grid:
            raise InputError(f"--tune: '{name}' is in the grid, too; give it once")
        if key in everywhere:
            raise InputError(f"--tune: --{name} is given for every run, too; give it once")
        if name in dimensions:
            raise InputError(f"--tune: '{name}' is there twice")
        dimensions[name] = dimension(name, spec, known[name])
    if not dimensions:
        raise InputError("--tune: it is empty")
    return list(dimensions.values())
