"""Each rank's log tells what the rank said, over all its starts, and leaves stderr as it was."""

import logging
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

RUN = """
import logging, sys, threading, warnings
from peco_ds.command_line import run
from peco_ds.errors import UserError
from peco_ds.runtime.rank_log import log_to

logger = logging.getLogger("peco_ds")
logger.addHandler(logging.StreamHandler())
logger.propagate = False
logger.setLevel(logging.WARNING)  # as on every rank but the first

def main(argv):
    log_to(sys.argv[1], 5)
    logger.info("quiet news")
    logger.warning("loud news")
    warnings.warn("an old option")
    ending = sys.argv[2]
    if ending == "thread":
        thread = threading.Thread(target=lambda: 1 / 0, name="writer")
        thread.start()
        thread.join()
    if ending == "fault":
        assert False, "ours"
    if ending == "bad input":
        raise UserError("lr -1, must be positive; raise it")

run(main)
"""


def start(folder, ending: str):
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder), ending], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )


def test_news_warnings_and_tracebacks_are_in_the_log_and_stderr_shows_what_it_showed(tmp_path):
    done = start(tmp_path, "thread")
    log = (tmp_path / "logs" / "rank_00005.log").read_text()
    assert done.returncode == 0
    for words in (
        "quiet news",
        "loud news",
        "UserWarning: an old option",
        "uncaught in thread writer",
        "ZeroDivisionError",
    ):
        assert words in log, words
    assert "loud news" in done.stderr and "an old option" in done.stderr and "ZeroDivisionError" in done.stderr
    assert "quiet news" not in done.stderr and "==== start" not in done.stderr


def test_the_log_grows_over_starts_and_a_line_cut_short_by_a_kill_stays_by_itself(tmp_path):
    start(tmp_path, "well")
    path = tmp_path / "logs" / "rank_00005.log"
    first = path.read_text()
    path.write_text(first + "2026-01-01 00:00:00 rank 5 INFO half a li")
    start(tmp_path, "well")
    log = path.read_text()
    assert log.startswith(first)
    headers = [line for line in log.splitlines() if "==== start" in line]
    assert len(headers) == 2 and all("torch" in line and "deepspeed" in line and "pid" in line for line in headers)
    assert any(line.endswith("INFO half a li") for line in log.splitlines())


def test_the_traceback_behind_a_line_on_stderr_is_in_the_log(tmp_path):
    bad = start(tmp_path, "bad input")
    assert (
        bad.returncode == 2
        and "Traceback" not in bad.stderr
        and bad.stderr.splitlines()[-1] == "error: lr -1, must be positive; raise it"
    )
    fault = start(tmp_path, "fault")
    assert fault.returncode == 1 and fault.stderr.count("Traceback") == 1
    log = (tmp_path / "logs" / "rank_00005.log").read_text()
    assert "UserError: lr -1" in log and "AssertionError: ours" in log and log.count("Traceback") == 2


def test_a_second_run_in_one_process_has_its_own_log(tmp_path):
    from peco_ds.runtime import rank_log

    # a stage that an earlier test ran in this process may have left its log open
    rank_log.close()
    logger = logging.getLogger("peco_ds")
    before = (list(logger.handlers), logger.level, sys.excepthook)
    try:
        paths = []
        for name in ("first", "second"):
            paths.append(rank_log.log_to(tmp_path / name, 0))
            logger.warning("said by %s", name)
        assert "said by first" in paths[0].read_text() and "said by second" not in paths[0].read_text()
        assert "said by second" in paths[1].read_text() and "said by first" not in paths[1].read_text()
    finally:
        rank_log.close()
    assert (list(logger.handlers), logger.level, sys.excepthook) == before
