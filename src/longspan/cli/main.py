"""The command `longspan`: its table of commands, and how it ends.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. A user's mistake is one message on stderr; a
traceback means a bug.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from copy import copy
from io import TextIOWrapper
from itertools import dropwhile
from typing import Annotated

import typer
from typer.models import CommandInfo

from longspan import __version__
from longspan.cli import (
    annotate,
    ask,
    data,
    data_pairs,
    doctor,
    export,
    import_config,
    plan,
    quickstart,
    report,
    synth,
    train,
)
from longspan.cli import eval as evaluation
from longspan.core.errors import LongspanError, UserError
from longspan.core.launched import is_first
from longspan.core.log import setup_logging
from longspan.core.threads import bound_spinning

app = typer.Typer(
    name="longspan",
    help="Take a language model from a short context window to a long one.",
    epilog=doctor.FIRST_STEPS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"longspan {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    setup_logging(verbose=verbose)


app.command(epilog=quickstart.EXAMPLE)(quickstart.quickstart)
app.add_typer(data.app, name="data")
data.app.command(epilog=data_pairs.PAIRS_EXAMPLE)(data_pairs.pairs)
data.app.command(epilog=data_pairs.RETRIEVAL_EXAMPLE)(data_pairs.retrieval)
app.command(epilog=plan.EXAMPLE)(plan.plan)
app.command(epilog=train.EXAMPLE)(train.train)
app.command("import-config", epilog=import_config.EXAMPLE)(import_config.import_config)
app.add_typer(synth.app, name="synth")
app.add_typer(annotate.app, name="annotate")
app.add_typer(evaluation.app, name="eval")
app.command(epilog=ask.EXAMPLE)(ask.ask)
app.command(epilog=export.EXAMPLE)(export.export)
app.command(epilog=report.EXAMPLE)(report.report)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)


def only_named(group: typer.Typer, words: Sequence[str]) -> typer.Typer:
    """Return a group without what the command line does not name: options are worked out for the one command alone.

    Where the words name no command, all stay, by name and first line: help and suggestions know them.
    """
    words = list(dropwhile(lambda word: word.startswith("-"), words))
    groups = [each for each in group.registered_groups if words and each.name == words[0]]
    commands = [
        each
        for each in group.registered_commands
        if words and each.callback is not None and (each.name or each.callback.__name__) == words[0]
    ]
    # Copies, because a process may run more than one command line.
    smaller = copy(group)
    if not groups and not commands:
        groups, commands = group.registered_groups, [_bare(each) for each in group.registered_commands]
    smaller.registered_commands = commands
    smaller.registered_groups = [copy(each) for each in groups]
    for each in smaller.registered_groups:
        if each.typer_instance is not None:
            each.typer_instance = only_named(each.typer_instance, words[1:])
    return smaller


def _bare(command: CommandInfo) -> CommandInfo:
    """Return a command without its options, which are read from settings that take time to import."""
    bare = copy(command)

    def nothing() -> None:
        pass

    assert command.callback is not None
    nothing.__name__, nothing.__doc__ = command.callback.__name__, command.callback.__doc__
    bare.callback = nothing
    return bare


def named_words() -> list[str]:
    """Return the words of this command line, or of the one that a shell wants to complete."""
    if "_LONGSPAN_COMPLETE" not in os.environ:
        return sys.argv[1:]
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:]


OTHERS_WAIT_SECONDS = 3.0
INTERRUPTED = 130


def run() -> None:
    """Run the command line and end the process with its exit code."""
    bound_spinning()  # no command has imported torch yet
    words = named_words()
    if "eval" in words[:2]:
        evaluation.add_installed()
    named = only_named(app, words)
    if isinstance(sys.stdout, TextIOWrapper):
        # A file's name that is not UTF-8 is printed with an escape, as stderr has it; in JSON it is the right one.
        sys.stdout.reconfigure(errors="backslashreplace")
    gc.freeze()  # what is imported by now stays: the collector need not walk it again and again
    try:
        try:
            named(prog_name="longspan")
        finally:
            sys.stdout.flush()
    except LongspanError as error:
        if isinstance(error, UserError) and not is_first():
            # All processes of a run find the same mistake: the first says it, before torchrun ends the rest.
            time.sleep(OTHERS_WAIT_SECONDS)
        else:
            typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught it inside a command, and says nothing
            typer.echo("interrupted", err=True)
        raise
    except BrokenPipeError:
        # The reader, `head` say, has gone. Python would flush once more at its end and complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
