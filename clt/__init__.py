"""Cross-layer transcoders and attribution graphs for vision-language models.

    model = clt.ReplacementModel.from_pretrained("llava-hf/llava-1.5-7b-hf", transcoder="runs/llava/clt")
    graph = model.attribute("Which color is the car?", images=["car.png"])
    graph.save("graph.safetensors")
    graph.show()

The names below are loaded when they are first used, so `import clt` is fast. Sub-packages: `clt.kernels` (encode and
decode), `clt.transcoder`, `clt.training`, `clt.capture` (models and activation stores), `clt.attribution` (replacement
models and graphs), `clt.launch` (the `clt` command). Imports run one way: kernels <- clt <- capture <- attribution <-
launch. docs/python.md explains them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clt.attribution.graphs.attribute import AttributionSettings as AttributionSettings
    from clt.attribution.graphs.attribute import attribute as attribute
    from clt.attribution.graphs.faithfulness import check_edges as check_edges
    from clt.attribution.graphs.graph import Graph as Graph
    from clt.attribution.graphs.scores import prune as prune
    from clt.attribution.graphs.scores import score as score
    from clt.attribution.graphs.targets import FeatureTarget as FeatureTarget
    from clt.attribution.graphs.targets import LogitDifference as LogitDifference
    from clt.attribution.graphs.targets import LogitTargets as LogitTargets
    from clt.attribution.replacement.feature_table import FeatureTable as FeatureTable
    from clt.attribution.replacement.interventions import Intervention as Intervention
    from clt.attribution.replacement.replacement_model import ReplacementModel as ReplacementModel
    from clt.attribution.run import AttributeConfig as AttributeConfig
    from clt.attribution.run import EvaluateConfig as EvaluateConfig
    from clt.attribution.run import evaluate as evaluate
    from clt.capture.models.adapter import ModelAdapter as ModelAdapter
    from clt.capture.planning import CaptureConfig as CaptureConfig
    from clt.capture.reading.open_store import open_store as open_store
    from clt.capture.run import capture_store as capture_store
    from clt.config import load_config as load_config
    from clt.errors import CLTError as CLTError
    from clt.launch.train import train as train
    from clt.training.settings import TrainConfig as TrainConfig
    from clt.transcoder.model import CrossLayerTranscoder as CrossLayerTranscoder

#: Public name -> module that defines it.
_PUBLIC = {
    "AttributeConfig": "clt.attribution.run",
    "AttributionSettings": "clt.attribution.graphs.attribute",
    "CLTError": "clt.errors",
    "CaptureConfig": "clt.capture.planning",
    "CrossLayerTranscoder": "clt.transcoder.model",
    "EvaluateConfig": "clt.attribution.run",
    "FeatureTable": "clt.attribution.replacement.feature_table",
    "FeatureTarget": "clt.attribution.graphs.targets",
    "Graph": "clt.attribution.graphs.graph",
    "Intervention": "clt.attribution.replacement.interventions",
    "LogitDifference": "clt.attribution.graphs.targets",
    "LogitTargets": "clt.attribution.graphs.targets",
    "ModelAdapter": "clt.capture.models.adapter",
    "ReplacementModel": "clt.attribution.replacement.replacement_model",
    "TrainConfig": "clt.training.settings",
    "attribute": "clt.attribution.graphs.attribute",
    "capture_store": "clt.capture.run",
    "check_edges": "clt.attribution.graphs.faithfulness",
    "evaluate": "clt.attribution.run",
    "load_config": "clt.config",
    "open_store": "clt.capture.reading.open_store",
    "prune": "clt.attribution.graphs.scores",
    "score": "clt.attribution.graphs.scores",
    "train": "clt.launch.train",
}

__all__ = sorted(_PUBLIC)

# In a bare checkout the other four folders are siblings of this one, so the checkout's root joins the search path of
# this package when (and only when) its pyproject.toml is there.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clt' has no attribute '{name}'")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *_PUBLIC})
