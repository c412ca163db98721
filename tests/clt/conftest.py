"""Lets the tests of this folder import `sparse_cases`, and `toy_job`, the tiny training job of tests/distributed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
