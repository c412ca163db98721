"""Lets the tests of this folder import `toy_job`, the tiny training job of tests/distributed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
