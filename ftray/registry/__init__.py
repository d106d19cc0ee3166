"""Immutable adapter versions `NAME@N`, aliases and canaries moved by an append-only journal."""

from ftray.registry.journal import Canary, CanaryLimits
from ftray.registry.reader import AdapterVersion
from ftray.registry.reference import Reference, parse_reference
from ftray.registry.registry import Registry

__all__ = ["AdapterVersion", "Canary", "CanaryLimits", "Reference", "Registry", "parse_reference"]
