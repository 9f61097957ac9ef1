"""Values of a context that end with their `with` block: the tenant, the deadline, the correlation id.

An asynchronous exception (a signal handler's, such as a job's time limit) may come between any two steps of
the block's beginning and end, and before the first step of `__exit__`, which then does nothing. So the value
ends at its `__exit__` or with its `Scope`, whichever comes first. Only the `with` statement refers to the
`Scope`. A weak reference detects its end, and not `__del__`, which would run after each block and swallow an
interruption there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import ref

T = TypeVar("T")


class Binding(Generic[T]):
    """A value, the binding that it hides, and whether it has ended while others still lead to it."""

    __slots__ = ("hidden", "over", "value", "watch")

    def __init__(self, value: T, hidden: Binding[T] | None = None) -> None:
        self.value = value
        self.hidden = hidden
        self.over = False
        self.watch: ref[Any] | None = None
        """Detects that its Scope was dropped."""


Variable = ContextVar["Binding[T] | None"]


def current(variable: Variable[T]) -> T | None:
    """Return the value in the context, or None."""
    binding = variable.get()
    if binding is not None and binding.over:
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
        variable = self._variable
        try:
            value, hidden = self._value(), variable.get()
            if hidden is not None and hidden.over:
                hidden = _live(variable)
            binding = self._binding = Binding(value, hidden)
            binding.watch = ref(self, partial(_end, variable, binding))
            variable.set(binding)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if (binding := self._binding) is None:
            return
        top = self._variable.get()
        while top is not None and top is not binding:  # bindings above it were interrupted in their end
            top = top.hidden
        if top is None:
            binding.over = True
        else:
            self._variable.set(binding.hidden)
        self._binding = binding.watch = None


def _end(variable: Variable[T], binding: Binding[T], _: ref[Scope[T]]) -> None:
    """Mark the value as ended; it may be shadowed or belong to another context, so lookups skip it."""
    if variable.get() is binding:
        variable.set(binding.hidden)
    else:
        binding.over = True
