"""--config FILE: a YAML file that holds flags."""

import argparse
import difflib
import json
from pathlib import Path


def flags_of(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """A YAML file's settings as command-line arguments, so that they are checked like them."""
    import yaml  # transformers needs it too

    try:
        settings = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        parser.error(f"--config {file}: no such file")
    except yaml.YAMLError as error:
        parser.error(f"--config {file}: not valid YAML ({' '.join(str(error).split())})")
    if not isinstance(settings, dict):
        parser.error(f"--config {file}: needs lines such as 'lr: 0.01'")
    known = {flag.lstrip("-").replace("_", "-"): flag for flag in parser._option_string_actions}
    known = {name: flag for name, flag in known.items() if name not in ("config", "help", "h", "local-rank")}
    arguments = []
    for key, value in settings.items():
        name = str(key).lstrip("-").replace("_", "-")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            parser.error(f"--config {file}: there is no flag {key!r}; did you mean {near.replace('-', '_')!r}?")
        arguments += as_arguments(parser, file, known[name], value)
    return arguments


def as_arguments(parser: argparse.ArgumentParser, file: Path, flag: str, value: object) -> list[str]:
    """One setting; null and false leave the flag out."""
    action = parser._option_string_actions[flag]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"--config {file}: {flag} is true or false, not {value!r}")
        return [flag] if value else []
    if action.nargs == "+":
        return [flag, *map(str, value if isinstance(value, list) else [value])]
    return [f"{flag}={json.dumps(value) if isinstance(value, (dict, list, bool)) else value}"]
