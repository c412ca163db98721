"""The jobs behind `clt attribute` and `clt evaluate`: files in, files out; scripts import the same functions."""

from __future__ import annotations

import json
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from clt.attribution.evaluation.agreement import AgreementReport, evaluate_replacement
from clt.attribution.graphs.attribute import AttributionSettings, attribute
from clt.attribution.graphs.export import graph_document
from clt.attribution.graphs.faithfulness import EdgeReport, check_edges
from clt.attribution.graphs.graph import Graph
from clt.attribution.graphs.scores import GraphScores, prune, score
from clt.attribution.replacement.replacement_model import require_same_model
from clt.attribution.viewer.page import write_export
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.model_settings import ModelChoice
from clt.capture.models.sites import decoder_sites
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.loader import iterate_store
from clt.capture.reading.open_store import open_store
from clt.capture.reading.token_filter import TokenFilter
from clt.capture.sources.examples import Example, SourceSettings, load_images, open_source
from clt.config import STRICT
from clt.errors import InputError
from clt.evaluation.evaluator import StoreReport, evaluate_store
from clt.hub.settings import TranscoderChoice
from clt.transcoder.model import CrossLayerTranscoder

GRAPH_FILE = "graph.safetensors"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AttributeConfig(ModelChoice, TranscoderChoice):
    """One graph: a model, its transcoder and a prompt, given as text or as an example of a source."""

    output: Path
    """Folder for the graph and its page."""
    prompt: str | None = None
    """Question, which gets the model's chat format, or a formatted prompt with one image placeholder per image."""
    images: tuple[Path, ...] = ()
    """Image files of `prompt`."""
    source: SourceSettings | None = None
    """A source of examples, instead of `prompt`."""
    index: int = Field(default=0, ge=0)
    """Index of the example in the source."""
    attribution: AttributionSettings = AttributionSettings()
    """Targets and limits of the graph."""
    node_threshold: float = Field(default=0.8, gt=0, le=1)
    """Share of the influence that the shown nodes hold."""
    edge_threshold: float = Field(default=0.98, gt=0, le=1)
    """Share of the edges' influence that the shown edges hold."""
    max_nodes: int = Field(default=500, gt=0)
    """Most features, errors and biases on the page."""
    checked_edges: int = Field(default=200, ge=0)
    """Edges compared with interventions; 0 checks none."""
    seed: int = 0
    """Seed of the choice of checked edges."""

    @model_validator(mode="after")
    def _has_one_prompt(self) -> AttributeConfig:
        if (self.prompt is None) == (self.source is None):
            raise ValueError("give exactly one of prompt and source")
        if self.images and self.prompt is None:
            raise ValueError("images needs prompt; a source has its own images")
        return self


@plain_dataclass(frozen=True, kw_only=True)
class Explanation:
    """A graph and its files.

    Attributes:
        graph: the unpruned graph.
        scores: replacement and completeness score of the unpruned graph.
        edges: comparison with interventions, None when none was asked for.
        page: the web page.
    """

    graph: Graph
    scores: GraphScores
    edges: EdgeReport | None
    page: Path


def explain(config: AttributeConfig) -> Explanation:
    """Computes, checks and writes the attribution graph of one prompt.

    Args:
        config: the job.

    Returns:
        The graph, its scores, and the page in `config.output`.

    Raises:
        CLTError: the model, transcoder, prompt or image cannot be read, or they do not fit each other.
    """
    _check_output(config.output, is_folder=True)
    transcoder = config.load_transcoder()
    adapter = config.load()
    example = _example(config, adapter)
    inputs = adapter.prepare(example.prompt, example.images)
    graph = attribute(adapter, transcoder, inputs, config.attribution)
    edges = None
    if config.checked_edges:
        edges = check_edges(adapter, transcoder, inputs, graph, n_edges=config.checked_edges, seed=config.seed)
    pruned = prune(graph, config.node_threshold, config.edge_threshold)
    document = graph_document(
        graph, pruned, example.images, edge_check=edges, slug=example.example_id, max_nodes=config.max_nodes
    )
    page = write_export(document, config.output)
    graph.save(config.output / GRAPH_FILE)
    return Explanation(graph=graph, scores=score(graph), edges=edges, page=page)


def _example(config: AttributeConfig, adapter: ModelAdapter) -> Example:
    if config.source is None:
        assert config.prompt is not None
        images = load_images(config.images)
        prompt = adapter.format_prompt(config.prompt, len(images))
        return Example(example_id="prompt", prompt=prompt, images=tuple(images))
    source = open_source(config.source)
    if config.index >= len(source.texts):
        raise InputError(f"index={config.index}: the source has {len(source.texts)} examples; choose a lower index")
    return source.load(config.index)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig(ModelChoice, TranscoderChoice):
    """Measures of a transcoder on a held-out store and held-out prompts."""

    store: str
    """Store of held-out activations."""
    source: SourceSettings
    """Held-out prompts with answers."""
    output: Path
    """JSON file for the report."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Stored tokens evaluated at once."""
    batch_size: int = Field(default=32, gt=0)
    """Prompts per forward pass."""


@plain_dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Measures of `clt evaluate`.

    Attributes:
        store: reconstruction, sparsity and dead features on held-out tokens.
        agreement: the replacement model against the model on held-out prompts.
    """

    store: StoreReport
    agreement: AgreementReport


def evaluate(config: EvaluateConfig) -> EvaluationReport:
    """Measures a transcoder and writes the report as JSON.

    Args:
        config: the job.

    Returns:
        The report, also in `config.output`.

    Raises:
        CLTError: something cannot be read, or the transcoder, model and store do not belong together.
    """
    _check_output(config.output, is_folder=False)
    transcoder = config.load_transcoder()
    store = open_store(config.store)
    require_same_model(transcoder.provenance.model, store.model)
    adapter = config.load()
    source = open_source(config.source)
    examples = (source.load(index) for index in range(len(source.texts)))
    inputs = (adapter.prepare(e.prompt, e.images, e.answer) for e in examples)
    report = EvaluationReport(
        store=evaluate_on_store(transcoder, store, config.batch_tokens),
        agreement=evaluate_replacement(adapter, transcoder, inputs, config.batch_size),
    )
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"output={config.output}: cannot be written ({error.strerror}); choose another file") from None
    return report


def _check_output(output: Path, is_folder: bool) -> None:
    """InputError before long work if the output is a file where a folder is needed, or the other way round."""
    found = next(place for place in (output, *output.parents) if place.exists())
    if found.is_dir() != (is_folder or found != output):
        kind, needed = ("folder", "file") if found.is_dir() else ("file", "folder")
        raise InputError(f"output={output}: {found} is a {kind}; choose the name of a {needed}")


def evaluate_on_store(
    transcoder: CrossLayerTranscoder, store: ActivationStore, batch_tokens: int = 4096
) -> StoreReport:
    """Measures a transcoder on all tokens of a store but the beginning-of-sequence ones.

    Args:
        transcoder: a transcoder.
        store: held-out activations of the same model.
        batch_tokens: tokens of a batch.

    Returns:
        The report.
    """
    layers = range(transcoder.config.n_layers)
    x_sites = decoder_sites(layers, transcoder.config.read_site)
    y_sites = decoder_sites(layers, "mlp_out")
    return evaluate_store(
        transcoder, iterate_store(store, x_sites, y_sites, batch_tokens, where=TokenFilter(drop_bos=True))
    )
