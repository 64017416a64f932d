"""Engines: the one place where models run. Everything that other modules need comes from `base`."""

from foggen.engines.base import *  # noqa: F403
