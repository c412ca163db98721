"""One rank of a test: runs a function of a test file inside a distributed job and saves the tensors it returns.

python rank_main.py TEST_FILE FUNCTION ARGUMENTS_JSON RESULT_FILE
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from clt.training.deepspeed_engine import joined_job


def main(test_file: str, function: str, arguments: str, result: str) -> None:
    """Loads the test file, calls the function and saves its result."""
    sys.path.insert(0, str(Path(__file__).parent))
    spec = importlib.util.spec_from_file_location("case", test_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["case"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    with joined_job():
        tensors = getattr(module, function)(**json.loads(arguments))
    save_file({key: torch.as_tensor(value).contiguous() for key, value in tensors.items()}, result)


def check_that_groups_are_gone() -> None:
    """Fails if a thread of gloo survives the job by 10 s: it may abort the process when the interpreter ends."""
    deadline = time.monotonic() + 10
    while any("gloo" in name for name in _threads()):
        assert time.monotonic() < deadline, _threads()
        gc.collect()
        time.sleep(0.05)


def _threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    main(*sys.argv[1:])
    check_that_groups_are_gone()
