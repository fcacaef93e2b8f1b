"""Attributes that are computed when they are first asked for."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    cached = cached_property
else:

    class cached(cached_property):
        """functools.cached_property without its lock, as it is from Python 3.12 on. What is seen of a call has some
        forty of these, and belongs to one thread."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self.attrname] = self.func(instance)
            return value
