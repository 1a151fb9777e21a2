"""The `fastlm` command: one module per subcommand, imported when it runs.

A command module has a docstring (its help), `add_arguments(parser)` and `run(args) -> int`. Bad
input raises `UserError`, which ends as one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from fastlm.errors import UserError

__all__ = ["COMMANDS", "UserError", "build_parser", "main"]

# Listed with their summaries, so that `fastlm --help` imports none of them.
COMMANDS = {
    "doctor": "what this machine has, and which backend each operator would use and why",
    "bench": "time the backends against torch, each checked against the oracle first",
    "train": "train a byte-level decoder language model on text files",
    "eval": "bits per byte and perplexity of a checkpoint on held-out text",
    "generate": "continue a prompt with a trained checkpoint",
    "swap-check": "swap fastlm into a pretrained encoder and measure the difference",
    "demo": "all of the above in one go, with a report in HTML",
}

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (a check failed), 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # The reader (head, less) is gone. Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk, a missing directory, no permission: the user's to fix, not a bug to trace.
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
    except KeyboardInterrupt:
        print(f"\nfastlm {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"fastlm {args.command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the one command that `argv` names."""
    from fastlm._version import __version__

    parser = _Parser(
        prog="fastlm", description="Fused, differentiable kernels for the whole Transformer."
    )
    parser.add_argument("--version", action="version", version=f"fastlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name != named:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"fastlm.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
