"""SolveScope: what stays fixed during one solve. Normalised weights and dropout masks are made once in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .modules import Modules

__all__ = ["SolveScope", "current_scope", "once"]

_current: ContextVar[SolveScope | None] = ContextVar("deqcore_scope", default=None)
#: The scopes that are on in what torch.compile is tracing (see compiled.py), which can't look into a context variable.
traced: list[SolveScope] = []


class SolveScope:
    """Says that a solve is on, and keeps what must not change until it is over.

    The kernel can't see modules inside a closure; modules look for the scope instead. Entered inside another one (a DEQ
    inside a DEQ's f), the outer scope stays in force: what is fixed for the outer solve is fixed for the inner ones.
    A backward that evaluates f again enters the same scope again.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        #: Samples that f is being called for, of how many; None for all. What is made once a solve is made for all.
        self.rows: tuple[torch.Tensor, int] | None = None
        #: The modules of torch that f was seen to call; see modules.py.
        self.modules: Modules | None = None
        self._grad = torch.is_grad_enabled()
        self._tokens: list[Token[SolveScope | None]] = []

    def __enter__(self) -> SolveScope:
        self._tokens.append(_current.set(_current.get() or self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._tokens.pop())
        if self.modules is not None and not self._tokens:
            self.modules.release()

    @contextmanager
    def narrowed(self, rows: torch.Tensor, batch: int) -> Generator[None]:
        """f is called for these samples of `batch` only; inside another such call, for these of those."""
        outer = self.rows
        if outer is not None and len(outer[0]) == batch:
            rows, batch = outer[0][rows], outer[1]
        self.rows = rows, batch
        try:
            yield
        finally:
            self.rows = outer

    @contextmanager
    def again(self) -> Generator[None]:
        """The scope once more, for evaluations of f after the solve: a backward's."""
        token = _current.set(self)
        try:
            with nullcontext() if self.modules is None or self._tokens else self.modules.frozen():
                yield
        finally:
            _current.reset(token)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for `key` the first time; it runs with the grad mode in which the scope was made."""
        if key not in self._made:
            with torch.set_grad_enabled(self._grad):
                self._made[key] = make()
        return self._made[key]


def current_scope() -> SolveScope | None:
    """The scope of the solve that is on in this thread, or None."""
    if torch.compiler.is_compiling():
        return traced[-1] if traced else None
    return _current.get()


def once(key: Hashable, make: Callable[[], Any]) -> Any:
    """`make()`, once a solve; every time outside of one."""
    scope = current_scope()
    return make() if scope is None else scope.once(key, make)
