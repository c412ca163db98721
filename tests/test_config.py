"""Configuration files and overrides: every file loads, every error names its key, every field is read and described."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from clt.attribution.run import AttributeConfig, EvaluateConfig
from clt.capture.planning import CaptureConfig
from clt.config import STRICT, config_to_tree, config_to_yaml, load_config, parse_config
from clt.config_keys import keys_of
from clt.errors import ConfigError
from clt.launch.commands.jobs import settings_page
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Nested:
    """Keys inside a key."""

    n: int = 0
    """A number."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ManyTypes:
    """A key of each type."""

    prompt: str | None = None
    name: str = ""
    path: Path = Path()
    either: str | Path | None = None
    number_or_text: int | str = 0
    folder_or_section: str | Nested | None = None
    section: Nested | None = None
    texts: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None
    flag: bool = False


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_of_configs_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    kind = KINDS[path.parent.name]
    config = load_config(kind, path)
    (tmp_path / "again.yaml").write_text(config_to_yaml(config))
    assert load_config(kind, tmp_path / "again.yaml") == config


def test_every_kind_has_a_file() -> None:
    assert {path.parent.name for path in FILES} == set(KINDS)


def test_demo_trains_with_the_settings_of_the_toy_training_file() -> None:
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
        ("clt.kk=3", "unknown key 'clt.kk'; did you mean 'clt.k'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ("nonsense=1", "unknown key 'nonsense'; remove it or correct its spelling"),
        ("clt.k=9", "k=9 exceeds n_features=8"),
        ("steps=many", "steps"),
        ("steps=0", "steps"),
        ("clt.first_offset=2", "clt.first_offset"),
        ("optimizer.betas=3", "optimizer.betas"),
        ("clt.k", "expected key=value"),
        ("=3", "expected key=value"),
        ("steps.deeper=3", "unknown key 'steps.deeper'"),
        ("steps=[1", "cannot be read"),
        ("steps=2020-13-45", "cannot be read"),
        ("data.modalities=text,", "an item of the list is empty"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(train_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, train_file, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_value_is_named_with_its_origin(train_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^command line: optimizer\.eps: Input should be .*, got 'x'$"):
        load_config(TrainConfig, train_file, ["optimizer={eps: x}"])
    train_file.write_text(train_file.read_text().replace("10", "ten"))
    with pytest.raises(ConfigError, match=r"job\.yaml: steps: Input should be .*, got 'ten'$"):
        load_config(TrainConfig, train_file, ["optimizer.eps=1e-8"])


def test_a_check_of_several_keys_is_reported_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"^command line: give exactly one of prompt and source$"):
        load_config(AttributeConfig, None, ["model=m", "clt=c", "output=o"])


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_is_no_configuration_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_config(TrainConfig, tmp_path / name if name == "folder" else name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "top level"),
        ("a: b: c", "YAML"),
        ("\x00", "YAML"),
        ("", "top level"),
        ("output: 2020-13-45", "month must be in"),
        ("steps: 1\nsteps: 2", "the key 'steps' is given twice"),
        ("clt: {k: 1, n_features: 2, k: 3}", "the key 'k' is given twice"),
    ],
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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompt=USER: <image> Which color?", "USER: <image> Which color?"),
        ("prompt=[no] list: {at all", "[no] list: {at all"),
        ("prompt=", ""),
        ("prompt=7", "7"),
        ('prompt="quoted"', '"quoted"'),
        ("prompt=null", None),
        ("prompt=a=b", "a=b"),
        ("name=null", "null"),
        ("path=1", Path("1")),
        ("either=0x10", "0x10"),
        ("either=null", None),
        ("number_or_text=12", 12),
        ("number_or_text=12: thirteen", "12: thirteen"),
        ("folder_or_section=runs/clt: a", "runs/clt: a"),
        ("folder_or_section={n: 3}", Nested(n=3)),
        ("folder_or_section.n=3", Nested(n=3)),
        ("section.n=3", Nested(n=3)),
        ("section=null", None),
        ("texts=a: b, c", ("a: b", "c")),
        ("texts=['a, b']", ("a, b",)),
        ("texts=", ()),
        ("numbers=1, 2", (1, 2)),
        ("numbers=3", (3,)),
        ("numbers=null", None),
        ("numbers=[4, 5]", (4, 5)),
        ("flag=true", True),
    ],
)
def test_a_value_is_read_by_the_type_of_its_key(override: str, value: object) -> None:
    config = load_config(ManyTypes, None, [override])
    assert getattr(config, override.partition("=")[0].partition(".")[0]) == value


def test_sections_that_a_file_leaves_out_are_created(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("section: null\nfolder_or_section: runs/clt\n")
    assert load_config(ManyTypes, tmp_path / "job.yaml", ["section.n=2"]).section == Nested(n=2)
    with pytest.raises(ConfigError, match="'folder_or_section' has the value 'runs/clt' and no keys"):
        load_config(ManyTypes, tmp_path / "job.yaml", ["folder_or_section.n=2"])


def test_without_a_file_all_values_come_from_the_overrides(tmp_path: Path) -> None:
    words = ["store=s", "output=o", "steps=3", "clt.n_features=8", "clt.k=2"]
    assert load_config(TrainConfig, None, words).clt == TranscoderSettings(n_features=8, k=2)
    with pytest.raises(ConfigError, match=r"^command line: missing clt\.k; set a value$"):
        load_config(TrainConfig, None, words[:-1])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed.yaml", "vlm_clt_training.yaml"),
        ("seed_independent.yaml", "vlm_clt_training_independent.yaml"),
    ],
)
def test_an_earlier_name_of_a_file_opens_it_with_a_warning(
    old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ROOT / "configs" / "train"
    assert not (folder / old).exists()
    assert load_config(TrainConfig, folder / old) == load_config(TrainConfig, folder / new)
    assert f"{old} is deprecated" in caplog.text and new in caplog.text


def test_every_field_of_every_settings_class_has_a_description() -> None:
    keys = [key for kind in KINDS.values() for key in keys_of(kind)]
    assert len({key.owner for key in keys}) >= 25
    assert not [key.name for key in keys if not key.description]


def test_the_settings_page_is_what_the_classes_say() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page() + "\n", "run `clt settings > docs/settings.md`"
    targets = set(re.findall(r"\]\(#([\w-]+)\)", page))
    headings = re.findall(r"^##+ (.*)$", page, re.MULTILINE)
    assert targets <= {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_every_field_is_read_somewhere() -> None:
    read = set()
    for folder in ("kernels", "clt", "capture", "attribution", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    keys = [key.name for kind in KINDS.values() for key in keys_of(kind)]
    assert not [name for name in keys if name.rpartition(".")[2] not in read]
