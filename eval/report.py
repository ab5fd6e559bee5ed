"""`lmcache-blend report`: every results folder below a directory as a leaderboard and plots."""

import sys
from pathlib import Path

from lmcache_blend.errors import ConfigError, DataError
from lmcache_blend.eval.boards import Board, make_boards
from lmcache_blend.eval.export import as_csv
from lmcache_blend.eval.render import markdown
from lmcache_blend.eval.results import Results
from lmcache_blend.eval.writer import find_folders, read_folder, write_atomic


def report(root: Path, *, plots: bool = True) -> list[Board]:
    """Write leaderboard.md, leaderboard.csv and plots/*.png into `root` from every results folder below it.

    Broken folders are left out with a warning. Raises ConfigError where there are no results, ResultsError
    where nothing can be written.
    """
    found: list[tuple[Path, Results]] = []
    for folder in find_folders(root):
        try:
            results = read_folder(folder)
        except DataError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if results is not None:
            found.append((folder, results))
    if not found:
        raise ConfigError(f"no sample is measured below {root}; run `lmcache-blend run` with --output {root} first")
    boards = make_boards(found)
    write_atomic(root / "leaderboard.md", markdown(boards).encode())
    write_atomic(root / "leaderboard.csv", as_csv(boards).encode())
    if plots:
        _plot(boards, root / "plots")
    return boards


def _plot(boards: list[Board], folder: Path) -> None:
    """matplotlib takes a second to import and belongs to the extra `eval`; the tables do without."""
    try:
        from lmcache_blend.eval.plots import write_plots
    except ImportError as error:
        print(f"warning: no plots ({error}); pip install 'lmcache-blend[eval]'", file=sys.stderr)
        return
    write_plots(boards, folder)
