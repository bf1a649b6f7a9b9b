"""The watchdog takes only the innermost code for waiting for other ranks, not the code that called it."""

import signal
import threading
import time

from megatron_ral.runtime.watchdog import main_thread_place


def seen_during(action) -> tuple[str, str]:
    """Return main_thread_place() as seen by another thread during `action`, which gets the event that ends it."""
    found, end = [], threading.Event()

    def watch() -> None:
        time.sleep(0.3)
        found.append(main_thread_place())
        end.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    action(end)
    watcher.join()
    return found[0]


def in_file(name: str, line: str):
    """Return a function `collective(call)` whose code claims to be of a file of that name."""
    space = {"time": time}
    exec(compile(f"def collective(call):\n    {line}", name, "exec"), space)
    return space["collective"]


def test_a_collective_is_a_wait():
    collective = in_file("/somewhere/torch/distributed/distributed_c10d.py", "time.sleep(0.6)")
    assert seen_during(lambda end: collective(None))[0] == "collective"


def test_a_wait_through_deepspeeds_wrapper_is_a_wait():
    wrapper = in_file("/somewhere/deepspeed/utils/nvtx.py", "time.sleep(0.6)")

    def wait(end):
        wrapper(end)

    assert seen_during(wait)[0] == "wait"


def test_a_call_from_a_collective_is_no_wait():
    collective = in_file("/somewhere/torch/distributed/distributed_c10d.py", "call()")
    assert seen_during(lambda end: collective(lambda: time.sleep(0.6)))[0] == ""


def test_a_signal_handler_called_in_a_collective_is_no_wait():
    collective = in_file("/somewhere/torch/distributed/distributed_c10d.py", "[time.sleep(0.01) for _ in range(60)]")
    before = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.6))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert seen_during(lambda end: collective(None))[0] == ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_waiting_for_a_thread_of_this_process_is_no_wait():
    assert seen_during(lambda end: end.wait())[0] == ""
