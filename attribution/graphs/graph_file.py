"""Reads and writes attribution graphs: one safetensors file with JSON in its header, no pickle.

Tensors: nodes.<field>, rows_to_node, edges, row_values, token_ids, images.<number>. Header: `graph` (targets, prompt,
identities, a CRC-32 of every tensor) and `graph_crc32` of that text, because safetensors has no checksums. Files are
written atomically. Users call `Graph.save` and `Graph.load`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt.attribution.graphs.graph import Graph, GraphImage, NodeKind, NodeTable, Target
from clt.config import config_to_tree, parse_config
from clt.errors import CLTError, GraphError
from clt.records import ModelIdentity
from clt.tensor_files import write_tensors
from clt.transcoder.architecture import CLTConfig

#: Version of the layout.
SCHEMA = 1

_TENSORS = ("rows_to_node", "edges", "row_values", "token_ids")


def write_graph(graph: Graph, path: Path) -> None:
    """Writes a graph; see `Graph.save`."""
    tensors = {f"nodes.{f.name}": getattr(graph.nodes, f.name) for f in fields(NodeTable)}
    tensors |= {name: getattr(graph, name) for name in _TENSORS}
    tensors |= {f"images.{number}": image.pixels for number, image in enumerate(graph.images)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = json.dumps(
        {
            "schema": SCHEMA,
            "targets": [_without_nan(asdict(target)) for target in graph.targets],
            "token_strings": list(graph.token_strings),
            "prompt": graph.prompt,
            "images": [{"grid": image.grid, "box": image.box} for image in graph.images],
            "model": asdict(graph.model),
            "clt": config_to_tree(graph.architecture),
            "clt_fingerprint": graph.clt_fingerprint,
            "crc32": {name: _crc32(tensor) for name, tensor in tensors.items()},
        }
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors, {"graph": header, "graph_crc32": str(zlib.crc32(header.encode()))})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise GraphError(f"{path}: the graph cannot be written ({' '.join(str(error).split())})") from None
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def read_graph(path: Path) -> Graph:
    """Reads a graph; see `Graph.load`."""
    if not path.is_file():
        raise GraphError(f"{path}: no such graph file; write one with Graph.save or `clt attribute`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata["graph"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if str(zlib.crc32(text.encode())) != metadata["graph_crc32"]:
            raise ValueError("checksum mismatch in the header")
        header = json.loads(text)
        if header["schema"] != SCHEMA:
            raise GraphError(f"{path}: graph layout {header['schema']}, expected {SCHEMA}; compute the graph again")
        for name, tensor in tensors.items():
            if _crc32(tensor) != header["crc32"][name]:
                raise ValueError(f"checksum mismatch in {name}")
        graph = _assemble(header, tensors, str(path))
        _check(graph)
    except GraphError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, CLTError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise GraphError(f"{path}: not a readable graph ({reason}); compute the graph again") from None
    return graph


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.numpy().data)


def _without_nan(tree: dict[str, Any]) -> dict[str, Any]:
    """None for NaN, which JSON does not have."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in tree.items()}


def _assemble(header: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Graph:
    def target(tree: Mapping[str, Any]) -> Target:
        values: dict[str, Any] = {key: float("nan") if value is None else value for key, value in tree.items()}
        return Target(**values)

    return Graph(
        nodes=NodeTable(**{f.name: tensors[f"nodes.{f.name}"] for f in fields(NodeTable)}),
        rows_to_node=tensors["rows_to_node"],
        edges=tensors["edges"],
        row_values=tensors["row_values"],
        token_ids=tensors["token_ids"],
        targets=tuple(target(tree) for tree in header["targets"]),
        token_strings=tuple(header["token_strings"]),
        prompt=header["prompt"],
        images=tuple(
            GraphImage(pixels=tensors[f"images.{number}"], grid=tuple(tree["grid"]), box=tuple(tree["box"]))
            for number, tree in enumerate(header["images"])
        ),
        model=ModelIdentity(**header["model"]),
        architecture=parse_config(CLTConfig, header["clt"], source=source),
        clt_fingerprint=header["clt_fingerprint"],
    )


def _check(graph: Graph) -> None:
    """Raises ValueError where the parts of a graph do not fit together."""
    n_nodes, n_rows = len(graph.nodes), len(graph.rows_to_node)
    for field in fields(NodeTable):
        if getattr(graph.nodes, field.name).shape != (n_nodes,):
            raise ValueError(f"nodes.{field.name} does not have {n_nodes} entries")
    if graph.edges.shape != (n_rows, n_nodes) or graph.row_values.shape != (n_rows,):
        raise ValueError(f"edges have shape {tuple(graph.edges.shape)}, expected {(n_rows, n_nodes)}")
    if n_nodes and int(graph.nodes.kind.max()) > max(NodeKind):
        raise ValueError(f"node kind {int(graph.nodes.kind.max())} is not known")
    if len(graph.token_strings) != len(graph.token_ids):
        raise ValueError(f"{len(graph.token_strings)} token strings for {len(graph.token_ids)} tokens")
    inside = (graph.rows_to_node >= 0) & (graph.rows_to_node < n_nodes)
    if not bool(inside.all()) or len(graph.rows_to_node.unique()) != n_rows:
        raise ValueError("rows_to_node does not name distinct nodes")
    last = torch.arange(n_nodes - len(graph.targets), n_nodes)
    if not graph.targets or not torch.equal(graph.rows_to_node[-len(graph.targets) :], last):
        raise ValueError("the last rows are not the targets")
    if not bool(torch.isfinite(graph.edges).all()):
        raise ValueError("an edge is not finite")
