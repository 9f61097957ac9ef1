"""Django's adapters together with those of a group."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import psycopg
from psycopg.adapt import AdaptersMap


def overlay(own: AdaptersMap, template: AdaptersMap) -> None:
    """Add to a connection's adapters those that Django registers beyond psycopg's own."""
    dumpers, loaders = _registered(template)
    for cls, dumper in dumpers:
        own.register_dumper(cls, dumper)
    for oid, loader in loaders:
        own.register_loader(oid, loader)


@lru_cache
def _registered(template: AdaptersMap) -> tuple[list[tuple[Any, Any]], list[tuple[int, Any]]]:
    plain = psycopg.adapters
    dumpers = [
        (cls, dumper)
        for form, known in template._dumpers.items()
        for cls, dumper in known.items()
        if plain._dumpers[form].get(cls) is not dumper
    ]
    loaders = [
        (oid, loader)
        for form, known in enumerate(template._loaders)
        for oid, loader in known.items()
        if plain._loaders[form].get(oid) is not loader
    ]
    return dumpers, loaders
