"""Configuration files: every one loads, every error names its key, and no field goes unread."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clt.attribution.run import AttributeConfig, EvaluateConfig
from clt.capture.planning import CaptureConfig
from clt.config import config_to_tree, config_to_yaml, load_config, parse_config
from clt.errors import ConfigError
from clt.launch.demo import DemoConfig
from clt.training.settings import TrainConfig
from clt.transcoder.architecture import CLTConfig, TranscoderSettings

ROOT = Path(__file__).resolve().parent.parent
KINDS: dict[str, type[Any]] = {
    "capture": CaptureConfig,
    "train": TrainConfig,
    "attribute": AttributeConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
}
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_of_configs_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    kind = KINDS[path.parent.name]
    config = load_config(kind, path)
    (tmp_path / "again.yaml").write_text(config_to_yaml(config))
    assert load_config(kind, tmp_path / "again.yaml") == config


def test_every_kind_has_a_file() -> None:
    assert {path.parent.name for path in FILES} == set(KINDS)


def test_demo_trains_what_the_toy_training_file_says() -> None:
    demo = load_config(DemoConfig, ROOT / "configs" / "demo" / "toy.yaml").training
    train = load_config(TrainConfig, ROOT / "configs" / "train" / "toy.yaml")
    for field in dataclasses.fields(demo):
        assert getattr(demo, field.name) == getattr(train, field.name), field.name


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("store: s\noutput: o\nsteps: 10\nclt: {n_features: 8, k: 4}\n")
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("clt.kk=3", "unknown key 'clt.kk'"),
        ("nonsense=1", "unknown key 'nonsense'"),
        ("clt.k=9", "k=9 exceeds n_features=8"),
        ("steps=many", "steps"),
        ("steps=0", "steps"),
        ("clt.first_offset=2", "clt.first_offset"),
        ("optimizer.betas=3", "optimizer.betas"),
        ("clt.k", "expected key=value"),
        ("=3", "expected key=value"),
        ("steps.deeper=3", "'steps' holds a value"),
        ("steps=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(train_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, train_file, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [("[1, 2]", "top level"), ("a: b: c", "YAML"), ("\x00", "YAML"), ("", "top level")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(TrainConfig, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
        load_config(TrainConfig, tmp_path / "none.yaml")


def test_overrides_reach_nested_keys_and_create_sections(train_file: Path) -> None:
    config = load_config(TrainConfig, train_file, ["optimizer.learning_rate=2e-4", "mesh.layer=2"])
    assert config.optimizer.learning_rate == 2e-4 and config.mesh.layer == 2


@given(
    n_features=st.integers(1, 100),
    k=st.integers(1, 100),
    n_targets=st.none() | st.integers(1, 40),
    first_offset=st.sampled_from([0, 1]),
    skip=st.booleans(),
)
def test_settings_round_trip_through_plain_values(
    n_features: int, k: int, n_targets: int | None, first_offset: int, skip: bool
) -> None:
    tree = {"n_features": n_features, "k": k, "n_targets": n_targets, "first_offset": first_offset, "skip": skip}
    if k > n_features:
        with pytest.raises(ConfigError, match="exceeds"):
            parse_config(TranscoderSettings, tree, "test")
        return
    settings = parse_config(TranscoderSettings, tree, "test")
    config = CLTConfig.resolve(settings, n_layers=3, d_model=7)
    again = parse_config(CLTConfig, yaml.safe_load(yaml.safe_dump(config_to_tree(config))), "test")
    assert again == config


def _settings_classes() -> set[type[Any]]:
    found: set[type[Any]] = set()
    todo: list[Any] = list(KINDS.values())
    while todo:
        kind = todo.pop()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in found:
            found.add(kind)
            todo += [field.type for field in dataclasses.fields(kind)]
            todo += list(kind.__pydantic_fields__.values()) if hasattr(kind, "__pydantic_fields__") else []
        elif hasattr(kind, "annotation"):
            todo.append(kind.annotation)
        todo += list(getattr(kind, "__args__", ()))
    return found


def test_every_field_is_read_somewhere() -> None:
    read = set()
    for room in ("kernels", "clt", "capture", "attribution", "launch"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    classes = _settings_classes()
    assert len(classes) > 8
    unread = {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c) if f.name not in read}
    assert not unread
