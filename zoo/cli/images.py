"""`zoo classify`, `zoo restore` and `zoo generate`: models at work on pictures."""

from __future__ import annotations
