"""Blueprints; importing the package registers those that come with it."""

from esper.seeds.blueprints import cnn, transformer

__all__ = ["cnn", "transformer"]
