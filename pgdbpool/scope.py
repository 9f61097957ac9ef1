"""Values of a context that end with their `with` block: the tenant, the deadline, the correlation id.

An asynchronous exception (a signal handler's, such as a job's time limit) may come between any two steps of
the block's beginning and end, and before the first step of `__exit__`, which then does nothing. So the value
ends with whichever comes first, its `__exit__` or its `Scope`, which only the `with` statement refers to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Binding(Generic[T]):
    """A value, the binding that it hides, and whether it is over while others still lead to it."""

    __slots__ = ("hidden", "over", "value")

    def __init__(self, value: T, hidden: Binding[T] | None = None) -> None:
        self.value = value
        self.hidden = hidden
        self.over = False


Variable = ContextVar["Binding[T] | None"]


def current(variable: Variable[T]) -> T | None:
    """Return the value that the context has, or None."""
    binding = _live(variable)
    return None if binding is None else binding.value


def _live(variable: Variable[T]) -> Binding[T] | None:
    binding = variable.get()
    while binding is not None and binding.over:
        binding = binding.hidden
    return binding


class Scope(ContextDecorator, Generic[T]):
    """The `with` block of a value; also a decorator.

    :param value: makes the value when the block begins, and may refuse to.
    """

    def __init__(self, variable: Variable[T], value: Callable[[], T]) -> None:
        self._variable = variable
        self._value = value
        self._binding: Binding[T] | None = None

    def _recreate_cm(self) -> Scope[T]:
        return Scope(self._variable, self._value)

    def __enter__(self) -> None:
        if self._binding is not None:
            raise RuntimeError("this block has begun already: make one of its own for each `with`")
        try:
            self._binding = Binding(self._value(), _live(self._variable))
            self._variable.set(self._binding)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._binding is None:
            return
        top = self._variable.get()
        while top is not None and top is not self._binding:  # those above it were interrupted in their end
            top = top.hidden
        self._end(restore=top is not None)

    def __del__(self) -> None:
        if self._binding is not None:
            self._end(restore=self._variable.get() is self._binding)

    def _end(self, restore: bool) -> None:
        if self._binding is None:
            return
        if restore:
            self._variable.set(self._binding.hidden)
        else:  # this is another context, or a later block: who still comes to it passes it by
            self._binding.over = True
        self._binding = None
