"""Capture end to end: the store equals the model's activations, also after interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.reading.activation_store import ActivationStore
from clt.capture.reading.open_store import open_store
from clt.capture.run import capture_store
from clt.capture.sources.examples import JsonlSource, SourceSettings, ToySource
from clt.config import load_config
from clt.errors import ConfigError, InputError, NonFiniteError, StoreError
from clt.launch import capture as launch_capture
from clt.records import Modality

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("the cat sat", "what is this ?", "a red mat", "the cat sat on a mat", "blue", "is this the cat ?")
SITES = tuple(f"lm.{layer}.{kind}" for kind in ("resid_mid", "mlp_out") for layer in range(3))


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_config(tmp_path: Path, model: Path, n: int = 24, extra: str | None = None, **changes: Any) -> CaptureConfig:
    records = [{"id": f"t{i}", "prompt": TEXTS[i % len(TEXTS)], "answer": "red"} for i in range(n)]
    records += [{"id": "extra", "prompt": extra}] if extra else []
    file = write_jsonl(tmp_path / "texts.jsonl", records)
    settings: dict[str, Any] = {"store_dtype": "float32", "rows_per_unit": 64, "chunk_tokens": 32, "batch_size": 4}
    source = SourceSettings(jsonl=JsonlSource(file=file))
    return CaptureConfig(
        **{"model": str(model), "output": str(tmp_path / "store"), "source": source, **settings, **changes}
    )


def image_config(tmp_path: Path, model: Path, **changes: Any) -> CaptureConfig:
    """Prompts with none, one and two images."""
    for i, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (20 + i, 30), color).save(tmp_path / f"{i}.png")
    records: list[dict[str, Any]] = [
        {"prompt": "the cat"},
        {"prompt": "what is <image> ?", "image": "0.png", "answer": "red cat"},
        {"prompt": "<image> the <image>", "image": ["1.png", "2.png"]},
        {"prompt": "a <image>", "image": "2.png", "answer": "mat"},
    ]
    file = write_jsonl(tmp_path / "images.jsonl", records)
    settings: dict[str, Any] = {"store_dtype": "float32", "rows_per_unit": 32, "batch_size": 3}
    source = SourceSettings(jsonl=JsonlSource(file=file))
    return CaptureConfig(
        **{"model": str(model), "output": str(tmp_path / "store"), "source": source, **settings, **changes}
    )


def natural_rows(store: ActivationStore) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Everything in the store, samples laid end to end."""
    acts, tables = [], []
    for unit in store.units:
        order = store.natural_index(unit.unit).argsort()
        acts.append(store.read(unit.unit, 0, unit.n_tokens, store.sites)[order])
        tables.append(store.tokens(unit.unit).select(order))
    names = vars(tables[0])
    return torch.cat(acts), {name: torch.cat([getattr(table, name) for table in tables]) for name in names}


def check_against_the_model(config: CaptureConfig, adapter: ModelAdapter) -> ActivationStore:
    """Runs each sample alone and compares every stored number."""
    assert open_store(config.output).id == capture_store(config, adapter=adapter)
    store = open_store(config.output)
    acts, tokens = natural_rows(store)
    row = 0
    job = plan_capture(config, adapter)
    for sample in range(len(job.lengths)):
        example = job.source.load(sample)
        inputs = adapter.prepare(example.prompt, example.images, example.answer)
        with torch.no_grad(), attach(adapter, SITES) as recorded:
            adapter.forward(inputs)
        rows = slice(row, row + job.lengths[sample])
        expected = torch.stack([recorded[site][0] for site in SITES], dim=1)
        # float32; padding and batching change the order of summation
        torch.testing.assert_close(acts[rows], expected, atol=1e-5, rtol=1e-5)
        for name in ("position", "token_id", "modality", "patch_row", "patch_col", "image"):
            assert torch.equal(tokens[name][rows], getattr(inputs.tokens, name)[0]), name
        assert (tokens["sample"][rows] == sample).all()
        row += job.lengths[sample]
    assert row == store.num_tokens == len(acts)
    assert not (tokens["modality"] == Modality.PAD).any()
    return store


def test_store_of_a_text_model_equals_its_activations(tmp_path: Path, llama_folder: Path) -> None:
    config = text_config(tmp_path, llama_folder)
    capture_store(config)
    store = check_against_the_model(config, ModelAdapter.from_pretrained(llama_folder))
    assert store.sites == SITES
    assert store.model == ModelAdapter.from_pretrained(llama_folder).identity
    assert len(store.units) == 3
    assert [i for unit in store.units for i in store.commit(unit.unit).sample_ids] == [f"t{i}" for i in range(24)]


def test_store_of_a_vision_language_model_equals_its_activations(tmp_path: Path, llava_folder: Path) -> None:
    config = image_config(tmp_path, llava_folder)
    capture_store(config)
    store = check_against_the_model(config, ModelAdapter.from_pretrained(llava_folder))
    assert len(store.units) == 3
    modality = torch.cat([store.modality(unit.unit) for unit in store.units])
    assert int((modality == Modality.IMAGE).sum()) == 4 * 9


def test_prompts_of_similar_length_run_together_padded_on_the_left(tmp_path: Path, llama_folder: Path) -> None:
    config = text_config(tmp_path, llama_folder, rows_per_unit=256)
    adapter, masks = ModelAdapter.from_pretrained(llama_folder), []
    adapter.model.register_forward_pre_hook(
        lambda _, args, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    lengths = plan_capture(config, adapter).lengths
    capture_store(config, adapter=adapter)
    assert all((mask.diff(dim=1) >= 0).all() for mask in masks), "zeros, if any, come first"
    assert sorted(int(n) for mask in masks for n in mask.sum(1)) == sorted(lengths)
    assert masks[0].shape[1] == max(lengths), "memory runs out early, if it does"
    in_order = [lengths[i : i + config.batch_size] for i in range(0, len(lengths), config.batch_size)]
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in in_order)
    assert sum(int((mask == 0).sum()) for mask in masks) < padding / 2


def test_bfloat16_store_holds_the_rounded_values(tmp_path: Path, llama_folder: Path) -> None:
    capture_store(text_config(tmp_path, llama_folder, output=str(tmp_path / "exact")))
    capture_store(text_config(tmp_path, llama_folder, output=str(tmp_path / "rounded"), store_dtype="bfloat16"))
    exact, rounded = (natural_rows(open_store(tmp_path / name))[0] for name in ("exact", "rounded"))
    assert torch.equal(rounded, exact.bfloat16())


def test_read_site_is_a_choice(tmp_path: Path, llama_folder: Path) -> None:
    capture_store(text_config(tmp_path, llama_folder, n=3, read_site="mlp_in"))
    assert open_store(tmp_path / "store").sites[:3] == ("lm.0.mlp_in", "lm.1.mlp_in", "lm.2.mlp_in")


def tree(root: Path) -> dict[str, bytes]:
    """All files of a store; partial files of a killed process are not part of it."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_capture_killed_midway_ends_with_the_same_bytes(tmp_path: Path, llama_folder: Path) -> None:
    config = text_config(tmp_path, llama_folder, n=150, store_dtype="bfloat16")
    yaml = tmp_path / "job.yaml"
    yaml.write_text(
        f"model: {llama_folder}\noutput: {tmp_path / 'store'}\nstore_dtype: bfloat16\nrows_per_unit: 64\n"
        f"chunk_tokens: 32\nbatch_size: 4\nsource: {{jsonl: {{file: {tmp_path / 'texts.jsonl'}}}}}\n"
    )
    assert load_config(CaptureConfig, yaml) == config
    n_units = plan_capture(config).plan.n_units
    child = subprocess.Popen([sys.executable, str(ROOT / "launch" / "capture.py"), str(yaml)], cwd=tmp_path)
    commits = tmp_path / "store" / "units" / "commits"
    deadline = time.monotonic() + 120
    while not commits.is_dir() or len(list(commits.glob("0*.json"))) < 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = len(list(commits.glob("0*.json")))
    assert 3 <= done < n_units, "killed midway"
    with pytest.raises(StoreError, match="has not finished"):
        open_store(config.output)

    kept = {path: path.stat().st_mtime_ns for path in commits.glob("0*.json")}
    resumed = capture_store(config)
    assert all(path.stat().st_mtime_ns == modified for path, modified in kept.items()), "committed units are skipped"
    whole = text_config(tmp_path, llama_folder, n=150, store_dtype="bfloat16", output=str(tmp_path / "whole"))
    assert capture_store(whole) == resumed
    assert tree(Path(config.output)) == tree(Path(whole.output))


def test_finished_capture_is_not_run_again(tmp_path: Path, llama_folder: Path) -> None:
    config = text_config(tmp_path, llama_folder)
    first = capture_store(config)
    before = tree(Path(config.output))
    assert capture_store(config) == first
    assert tree(Path(config.output)) == before


def test_non_finite_activations_are_named_and_not_committed(tmp_path: Path, llama_folder: Path) -> None:
    config = text_config(tmp_path, llama_folder, extra="USER")
    adapter = ModelAdapter.from_pretrained(llama_folder)
    user = adapter.tokenizer.convert_tokens_to_ids("USER")
    with torch.no_grad():
        adapter.model.get_input_embeddings().weight[user] = float("nan")
    unit = plan_capture(config, adapter).plan.n_units - 1
    message = rf"unit {unit}: lm\.0\.resid_mid is not finite in sample 24 \('extra'\); the unit is not committed"
    with pytest.raises(NonFiniteError, match=message) as error:
        capture_store(config, adapter=adapter)
    assert "\n" not in str(error.value)
    names = set(tree(Path(config.output)))
    assert not any(name.startswith(f"data.zarr/acts/lm/c/{unit}/") for name in names)
    assert not any(name.endswith((f"{unit:06d}.json", f"{unit:06d}.safetensors", ".partial")) for name in names)
    assert f"units/commits/{unit - 1:06d}.json" in names
    assert "manifest.json" not in names


def test_overflow_of_a_narrow_dtype_is_noticed(tmp_path: Path, llama_folder: Path) -> None:
    adapter = ModelAdapter.from_pretrained(llama_folder, dtype="float64")
    with torch.no_grad():
        adapter.mlp(2).down_proj.weight.mul_(1e300)  # type: ignore[union-attr, operator]
    with pytest.raises(NonFiniteError, match=r"lm\.2\.mlp_out is not finite"):
        capture_store(text_config(tmp_path, llama_folder), adapter=adapter)


def test_image_that_cannot_be_decoded_is_named_before_its_unit_is_committed(tmp_path: Path, llava_folder: Path) -> None:
    config = image_config(tmp_path, llava_folder)
    image = tmp_path / "2.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    with pytest.raises(InputError, match=r"2\.png: the image cannot be decoded"):
        capture_store(config)
    assert not any("000001" in name or "manifest" in name for name in tree(Path(config.output)))
    image.write_bytes(whole)
    capture_store(config)
    check_against_the_model(config, ModelAdapter.from_pretrained(llava_folder))


def test_output_of_another_job_is_not_overwritten(tmp_path: Path, llama_folder: Path) -> None:
    config = text_config(tmp_path, llama_folder)
    capture_store(config)
    before = tree(Path(config.output))
    for change in ({"n": 23}, {"read_site": "mlp_in"}, {"store_dtype": "bfloat16"}, {"rows_per_unit": 96}):
        with pytest.raises(StoreError, match="holds a store with"):
            capture_store(text_config(tmp_path, llama_folder, **change))
    other = ModelAdapter.from_pretrained(llama_folder)
    with torch.no_grad():
        other.lm_head.weight.add_(1)  # type: ignore[operator, union-attr]
    changed = ModelAdapter(other.model, other.tokenizer)
    with pytest.raises(StoreError, match="holds a store with fingerprint"):
        capture_store(text_config(tmp_path, llama_folder), adapter=changed)
    assert tree(Path(config.output)) == before


def test_sizes_follow_the_bytes_of_a_token(tmp_path: Path, llama_folder: Path) -> None:
    adapter = ModelAdapter.from_pretrained(llama_folder)

    def sizes(**changes: Any) -> tuple[int, int]:
        spec = plan_capture(text_config(tmp_path, llama_folder, **changes), adapter).spec
        return spec.rows_per_unit, spec.chunk_tokens

    assert sizes(rows_per_unit=None, chunk_tokens=None) == (65_536, 1024)
    assert sizes(rows_per_unit=None, chunk_tokens=128) == (65_536, 128)
    assert sizes(rows_per_unit=16_384, chunk_tokens=None) == (16_384, 1024)
    assert sizes(rows_per_unit=96, chunk_tokens=None) == (96, 96)
    with pytest.raises(ConfigError, match="rows_per_unit=100 must be a multiple of chunk_tokens=64"):
        sizes(rows_per_unit=100, chunk_tokens=64)
    with pytest.raises(ConfigError, match="must be at least 32"):
        sizes(rows_per_unit=64, chunk_tokens=8)
    with pytest.raises(ConfigError, match="sample 3 has 9 tokens, rows_per_unit=8"):
        sizes(rows_per_unit=8, chunk_tokens=None)


def test_toy_configuration_is_valid() -> None:
    config = load_config(CaptureConfig, ROOT / "configs" / "capture" / "toy.yaml", ["source.toy.n=7"])
    assert config.source.toy == ToySource(n=7, seed=1)


def test_entry_point_prints_the_id_or_one_line_about_the_error(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_config(tmp_path, llama_folder)
    yaml = tmp_path / "job.yaml"
    yaml.write_text(
        f"model: {llama_folder}\noutput: {config.output}\nsource: {{jsonl: {{file: {tmp_path}/texts.jsonl}}}}"
    )
    assert launch_capture.main([str(yaml), "--dry-run"]) == 0
    assert "samples=24 " in capsys.readouterr().out
    assert not Path(config.output).exists()
    assert launch_capture.main([str(yaml)]) == 0
    assert capsys.readouterr().out.strip() == open_store(config.output).id
    for override, message in (
        ("seed=1", "holds a store with seed=0"),
        ("modle=x", "unknown key 'modle'"),
        ("model=/no/such/model", "/no/such/model: no such model folder"),
    ):
        assert launch_capture.main([str(yaml), override]) == 2
        last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(last) == 1 and message in last[0]
