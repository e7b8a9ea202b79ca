"""The commands about a suite alone, without a model: ``score``, ``data verify`` and ``data prepare``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlmbench.cli_choices import Listing, print_rows
from vlmbench.errors import UsageError


class Scorer(StrEnum):
    own = "own"
    lmms_eval = "lmms-eval"


def score(
    suite: Annotated[str, typer.Option(metavar="SPEC", help="The suite that was answered.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with an id and a text each.")],
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie; generated suites need none.")] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Score with the data that is there.")] = False,
    scorer: Annotated[
        Scorer, typer.Option(help="lmms-eval: its scorer beside ours, and every difference (extra lmms).")
    ] = Scorer.own,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Score answers from a file, whichever program gave them, with no model."""
    from vlmbench import score as scores
    from vlmbench.session import make_suite

    found = make_suite(suite).located(data_root, allow_partial=allow_partial)
    if scorer is Scorer.lmms_eval:
        from vlmbench import score_lmms

        compared = score_lmms.compare(found, text)
        if format is Listing.json:
            print_rows(score_lmms.to_rows(found, compared))
        else:
            print(score_lmms.to_text(compared))
        return 0
    rows = scores.score(found, text)
    if format is Listing.json:
        print_rows(rows)
    else:
        print(scores.to_text(rows))
    return 0


def verify(
    suite: Annotated[str, typer.Option(metavar="SPEC", help="The suite whose data is looked at.")],
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie.")] = None,
    limit: Annotated[int | None, typer.Option(help="Media to decode, taken evenly. Default: all.")] = None,
    format: Annotated[Listing, typer.Option(help="json for programs.")] = Listing.text,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Count rows, fields, media and subtitles, and decode them: exit 1 when something is missing or damaged."""
    from vlmbench import data_verify
    from vlmbench.progress import Progress
    from vlmbench.session import make_suite

    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    found = make_suite(suite)
    with Progress() as progress:
        checks = data_verify.verify(found, data_root, progress, limit)
    if format is Listing.json:
        print_rows(data_verify.to_rows(found, checks))
    else:
        print(data_verify.to_text(checks))
    return 0 if all(check.ok for check in checks) else 1


def prepare(
    suite: Annotated[str, typer.Option(metavar="SPEC", help="The suite whose archives are unpacked.")],
    data_root: Annotated[Path, typer.Option(help="Where data sets lie: files go to its folder of the suite's name.")],
    archives: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the archives are. Default: there.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> int:
    """Join and unpack a suite's official archives; a second time goes on where the first stopped. Nothing is deleted."""
    from vlmbench import data_prepare
    from vlmbench.progress import Progress
    from vlmbench.session import make_suite

    with Progress() as progress:
        print(data_prepare.prepare(make_suite(suite), data_root, archives, progress))
    return 0
