"""Outputs of `clt attribute` and `clt evaluate` that cannot be written are refused before any work."""

from pathlib import Path

import pytest

from clt.attribution.run import AttributeConfig, EvaluateConfig, evaluate, explain
from clt.capture.sources.settings import SourceSettings, ToySource
from clt.errors import InputError


def test_an_output_of_the_wrong_kind_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file, source = tmp_path / "file", SourceSettings(toy=ToySource(n=1))
    file.touch()
    for output in (file, file / "below"):
        with pytest.raises(InputError, match=r"output=.*: .*/file is a file; choose the name of a folder"):
            explain(AttributeConfig(model="none", clt="none", output=output, prompt="p"))
    for output, message in ((tmp_path, "is a folder; choose the name of a file"), (file / "below", "is a file")):
        with pytest.raises(InputError, match=message):
            evaluate(EvaluateConfig(model="none", clt="none", store="none", source=source, output=output))
