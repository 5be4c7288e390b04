"""`--config FILE`: the options of another run, from its config.json, as words for the command line's own parser."""

import os
from argparse import ArgumentParser
from pathlib import Path

from data import InputError, one_line
from engine import roles
from engine.jsonfiles import read_json
from noises import NOISES


def arguments(file: str, parser: ArgumentParser, given: list[str]) -> list[str]:
    """The options of config.json `file`, each as `--option=value`, to stand before the command line's own, `given`.

    Options that `given` replaces are left out. Raises `InputError` naming the file if it cannot be read, holds an
    option that is not known here (it may decide what is computed), or a value that the option does not take.
    """
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest != "help"}
    named = {word.split("=")[0] for word in given}
    replaced = {key for key, action in actions.items() if named & set(action.option_strings)}
    replaced |= {other for key in replaced for other in roles.REPLACES.get(key, ())}
    if NOISES[parser.parse_args(given).noise_type].from_file:
        replaced.add("noise")  # the rate is the file's
    words, own = [], roles.having(roles.OWN)
    for key, value in options_in(Path(file)).items():
        if key in own or value is None and (key not in actions or actions[key].default is None):
            continue
        if key not in actions:
            raise InputError(f"--config {file}: holds an option '{one_line(key)}', which is not one of this version")
        option = actions[key].option_strings[0]
        if actions[key].nargs == 0:
            if not isinstance(value, bool):
                raise InputError(f"--config {file}: {option}: '{one_line(value)}' is not true or false")
            word = [option] * value
        elif is_text(value) or isinstance(value, (int, float)) and not isinstance(value, bool):
            word = [f"{option}={value}"]
        else:
            raise InputError(f"--config {file}: {option}: '{one_line(value)}' is neither a text nor a number")
        try:
            parser.parse_args(word)
        except InputError as e:
            raise InputError(f"--config {file}: {e}") from e
        words += word if key not in replaced else []
    return words


def is_text(value: object) -> bool:
    """Whether this is a text that could be a word of a command line: without NUL and without half a surrogate pair."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def options_in(file: Path) -> dict:
    """The options in a config.json. Raises `InputError` if there are none that can be read."""
    try:
        content = read_json(file)
    except InputError as e:
        raise InputError(f"--config {e}") from e
    if content is None:
        raise InputError(f"--config {file}: there is no such file")
    if not isinstance(content.get("options"), dict):
        raise InputError(f"--config {file}: not a run's config.json, which holds an object 'options'")
    return content["options"]
