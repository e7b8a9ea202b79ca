"""The command line. Every heavy import is inside the command that needs it, so that help and listing stay instant.

The commands are in ``cli_run``, ``cli_results``, ``cli_data`` and ``cli_machine``, and are put together here. A command
returns its exit code; what goes wrong is turned into one sentence and a code in `main`, in one place.
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from vlmbench import __version__, cli_data, cli_machine, cli_results, cli_run
from vlmbench.errors import RunError, UsageError
from vlmbench.plain import printable

app = typer.Typer(
    help="Compare acceleration methods for vision-language models on the same samples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone would double its cost
    pretty_exceptions_enable=False,
)


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an `Exception`, so that nothing takes it for a failed sample."""


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for command in (
    cli_run.run,
    cli_run.fit,
    cli_machine.list_,
    cli_results.table,
    cli_results.plot,
    cli_results.gate,
    cli_machine.check,
    cli_results.compare,
    cli_results.explain,
    cli_results.rescore,
    cli_data.score,
    cli_machine.bench,
    cli_machine.plan,
    cli_machine.doctor,
):
    app.command(name=command.__name__.rstrip("_"))(command)

data_app = typer.Typer(help="Look at a suite's data, or put its archives in place.", no_args_is_help=True)
app.add_typer(data_app, name="data")
for about_data in (cli_data.verify, cli_data.prepare):
    data_app.command()(about_data)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    formatted, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        return int(app(args, prog_name="vlmbench", standalone_mode=False) or 0)
    except UsageError as error:
        return _fail(error, str(error), 2, args)
    except RunError as error:
        return _fail(error, str(error), 1, args)
    except Stopped as error:
        number = signal.Signals(error.args[0])
        resumes = args[:1] == ["run"] or (args[:1] == ["fit"] and any("memvp" in arg for arg in args))
        goes_on = "; the same command goes on from here" if resumes else ""
        return _fail(error, f"Stopped by {number.name}{goes_on}.", 128 + number, args)
    except Exception as error:
        if hasattr(error, "show"):  # typer's own: an unknown command, option or value
            if isinstance(said := getattr(error, "message", None), str):
                vars(error)["message"] = said.removeprefix("Value error, ")  # whose error it was says nothing to a user
            error.show()
            return 2
        return _fail(error, f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}", 1, args)
    finally:
        warnings.formatwarning = formatted
        for number, handler in previous.items():
            signal.signal(number, handler)


def _warning(message: Warning | str, category: type[Warning], *where: object, **also: object) -> str:
    """Our own without the line of code that they came from: it says nothing to whoever gave a parameter."""
    if category.__module__.partition(".")[0] == "vlmbench":
        return f"Warning: {printable(str(message))}\n"
    return _PLAIN(message, category, *where, **also)  # type: ignore[arg-type]


_PLAIN = warnings.formatwarning


def _fail(error: BaseException, sentence: str, code: int, args: list[str]) -> int:
    if "--debug" in args:
        traceback.print_exception(error)
    print(f"Error: {printable(sentence)}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)
