"""Stop signals call the handler; what was ignored at the start stays ignored, but for those that Slurm sends."""

import signal

import pytest

from peco_ds.stop_signals import STOP_SIGNALS, ignore_stop_signals, on_stop_signal


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_every_stop_signal_calls_the_handler_and_a_second_ctrl_c_is_pythons_own():
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    calls = []
    on_stop_signal(lambda: calls.append(None))
    for number in STOP_SIGNALS:
        signal.raise_signal(number)
    assert len(calls) == len(STOP_SIGNALS)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_signals_ignored_at_the_start_stay_ignored_but_for_those_that_slurm_sends():
    ignore_stop_signals()
    on_stop_signal(lambda: None)
    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    assert ignored == {signal.SIGINT, signal.SIGHUP}
