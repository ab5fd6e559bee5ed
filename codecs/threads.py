"""How many threads torch uses in threads that work side by side."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_changing = threading.Lock()
# vLLM puts one that does nothing in the place of torch.set_num_threads, for the sake of the threads that it has bound.
_set_threads = torch._C.set_num_threads


def one_thread() -> None:
    """Let torch use one thread in the calling thread alone.

    It is a setting of the calling thread and of all that start later; these get their number back, by a thread that is
    the last one to set it.
    """
    with _changing:
        count = torch.get_num_threads()
        if count > 1:
            _set_threads(1)
            last = threading.Thread(target=_set_threads, args=(count,))
            last.start()
            last.join()


@contextmanager
def one_thread_meanwhile() -> Iterator[None]:
    """`one_thread` until the end of a `with` statement.

    So that what is done while others use the cores does not leave threads behind that wait for more of it, busily.
    """
    count = torch.get_num_threads()
    one_thread()
    try:
        yield
    finally:
        if count > 1:
            _set_threads(count)
