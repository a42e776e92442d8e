# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The frozen layers before the first one that trains, run once an image: found, proven, cached, and begun behind."""

from .caching import cache_frozen_prefix, uncache_frozen_prefix


__all__ = ["cache_frozen_prefix", "uncache_frozen_prefix"]
