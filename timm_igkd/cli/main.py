"""The command `timm-igkd`; definitions.py lists its commands.

Bad input ends with one line on stderr and exit code 2, a run that could not go on with 1, an interrupted one with 130.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd.errors import InputError, nearest
from timm_igkd.runs.parsing import OneLineParser


class CommandParser(OneLineParser):
    """A parser of commands, whose options must be written out."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_known_and_check(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; an unknown option is an error that offers the nearest name."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            raise getattr(namespace, "parser", self)._unknown(unknown[0])
        return namespace

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but name an unknown option that comes before a script: it is not the script's."""
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            rest = iter(args)
            for text in rest:
                name, has_value, _ = text.partition("=")
                if text == "--" or not name.startswith("-"):
                    break  # here the script begins
                if name not in self._option_string_actions:
                    raise self._unknown(text)
                if not has_value and self._option_string_actions[name].nargs != 0:
                    next(rest, None)
        return super().parse_known_args(args, namespace)

    def _unknown(self, text: str) -> InputError:
        options = [option for action in self._actions for option in action.option_strings]
        return InputError(f"{self.prog}: unknown argument {text!r}{nearest(text, options)}")


def build_parser() -> CommandParser:
    """Return the parser of all commands."""
    from timm_igkd.cli.definitions import COMMANDS, DISTILL_SUMMARY
    from timm_igkd.version import __version__

    parser = CommandParser(prog="timm-igkd", description="Knowledge distillation with integrated gradients for timm.")
    parser.add_argument("--version", action="version", version=f"timm-igkd {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command, parser=subparser)
    subparsers.add_parser("distill", help=DISTILL_SUMMARY)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for bad input; 1 for a run that could not go on; 130 for an interrupted one.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["distill"]:  # its flags are a dataclass's, not argparse's
        from timm_igkd.cli.distill_command import distill_command

        return distill_command(arguments[1:])

    def run() -> None:
        args = build_parser().parse_known_and_check(arguments)
        args.command.check(args)
        module = importlib.import_module(f"timm_igkd.cli.{args.command.module}")
        getattr(module, args.command.function)(args)

    return run_reporting_errors(run, "timm-igkd")
