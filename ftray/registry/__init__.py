"""Immutable adapter versions `NAME@N` and aliases moved by an append-only journal."""

from ftray.registry.reference import Reference, parse_reference
from ftray.registry.registry import AdapterVersion, Registry

__all__ = ["AdapterVersion", "Reference", "Registry", "parse_reference"]
