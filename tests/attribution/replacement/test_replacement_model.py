"""The replacement model against a dense forward written with plain hooks, against the model, and against hand edits."""

import copy
from dataclasses import fields, replace

import pytest
import torch

from clt.attribution.replacement.replacement_model import Intervention, ReplacementModel, require_same_model
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.capture.sources.toy import toy_examples
from clt.errors import CheckpointError, ConfigError, GraphError
from clt.records import Modality, TokenTable
from clt.transcoder.architecture import CLTConfig, SparsitySettings
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

#: Float32 logits of size 10 after four layers: the order of additions differs.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}

ARCHITECTURES = [
    {},
    {"first_offset": 1},
    {"n_targets": 2, "read_site": "mlp_in"},
    {"skip": True, "drop_bos": True},
    {"read_site": "resid_pre", "drop_bos": True},
    {"read_site": "resid_post", "first_offset": 1, "n_targets": 2},
    {"sparsity": SparsitySettings(kind="jumprelu", threshold=0.7)},
    {"sparsity": SparsitySettings(kind="relu")},
    {"tied_decoders": "target", "skip": True},
    {"tied_decoders": "source", "n_targets": 2},
    {"layer_norm": True, "read_site": "mlp_in", "skip": True},
]


@pytest.fixture(scope="module")
def make_clt(toy_adapter, make_random_clt):
    """A function that makes a random transcoder of the toy model from fields of `CLTConfig`."""
    return lambda **settings: make_random_clt(toy_adapter, **({"n_features": 48, "k": 6} | settings))


def prepared(adapter, count=1, seed=11, answer=False):
    examples = toy_examples(count, seed)
    return [adapter.prepare(e.prompt, e.images, e.answer if answer else None) for e in examples]


def standardised(transcoder, layer, x):
    """Encoder inputs of a layer from raw inputs [...,D]."""
    if transcoder.config.layer_norm:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (x - transcoder.scaling.mean_x[layer]) / transcoder.scaling.rms_x[layer]


def dense_codes(transcoder, layer, x):
    """Activations of raw inputs as a dense [...,F] tensor."""
    x = standardised(transcoder, layer, x)
    z = (x @ transcoder.W_enc[str(layer)].T + transcoder.b_enc[str(layer)]).relu()
    if transcoder.config.sparsity.has_penalty:
        thresholds = transcoder.log_threshold[str(layer)].exp() if str(layer) in transcoder.log_threshold else 0
        return torch.where(z > thresholds, z, 0)
    kth = z.topk(transcoder.config.k).values[..., -1:]
    return torch.where(z >= kth, z, 0)


def reference_logits(adapter, transcoder, inputs):
    """Replaced MLPs by plain torch hooks, dense codes and the unfolded transcoder."""
    config, codes, x, handles = transcoder.config, {}, {}, []
    acts = inputs.real_mask & ~((inputs.tokens.modality == Modality.BOS) & config.drop_bos)

    def read(layer):
        def hook(_module, args, output=None):
            tensor = args[0] if config.read_site != "resid_post" else output
            x[layer] = tensor
            if transcoder.targets_of(layer):
                codes[layer] = dense_codes(transcoder, layer, tensor)

        return hook

    def write(target):
        def hook(_module, _args, output):
            if not transcoder.sources_of(target):
                return output
            y = transcoder.b_dec[str(target)]
            for source in transcoder.sources_of(target):
                y = y + codes[source] @ transcoder.decoder(source, target)
            if config.skip:
                y = y + standardised(transcoder, target, x[target]) @ transcoder.W_skip[str(target)].T
            y = y * transcoder.scaling.rms_y[target] + transcoder.scaling.mean_y[target]
            return torch.where(acts[..., None], y, output)

        return hook

    module = {
        "resid_mid": adapter.mlp_norm,
        "mlp_in": adapter.mlp,
        "resid_pre": adapter.attn_norm,
        "resid_post": lambda layer: adapter.layers[layer],
    }[config.read_site]
    for layer in range(adapter.n_layers):
        handles.append(adapter.mlp(layer).register_forward_hook(write(layer)))
        if config.read_site == "resid_post":
            handles.append(module(layer).register_forward_hook(read(layer)))
        elif config.read_site == "resid_pre":
            handles.append(adapter.layers[layer].register_forward_pre_hook(read(layer)))
        else:
            handles.append(module(layer).register_forward_pre_hook(read(layer)))
    try:
        with torch.no_grad():
            return adapter.forward(inputs)
    finally:
        for handle in handles:
            handle.remove()


def with_token(inputs, token):
    """One prompt continued by one token."""

    def joined(tensor, value):
        return torch.cat([tensor, torch.full_like(tensor[:, :1], value)], 1)

    position = inputs.tokens.position.shape[1]
    ends = {"token_id": token, "position": position, "modality": int(Modality.TEXT)}
    tokens = TokenTable(
        **{
            f.name: joined(getattr(inputs.tokens, f.name), ends.get(f.name, 0 if f.name == "sample" else -1))
            for f in fields(TokenTable)
        }
    )
    model_inputs = dict(inputs.model_inputs)
    for name, value in (("input_ids", token), ("attention_mask", 1), ("position_ids", position)):
        model_inputs[name] = joined(model_inputs[name], value)
    return replace(inputs, model_inputs=model_inputs, tokens=tokens, answer_start=inputs.answer_start + 1)


def greedy_without_cache(model, inputs, steps, interventions, mlps):
    """New tokens by a whole forward per token; a position yet to come is left out until it is there."""
    eos, new = model.adapter.tokenizer.eos_token_id, []
    for _ in range(steps):
        present = inputs.tokens.position.shape[1]
        here = [i for i in interventions if i.position is None or i.position < present]
        token = int(model.forward(inputs, here, mlps=mlps)[0, -1].argmax())
        new.append(token)
        if token == eos:
            break
        inputs = with_token(inputs, token)
    return new


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_replaced_logits_equal_a_dense_forward_with_plain_hooks(toy_adapter, make_clt, settings):
    transcoder = make_clt(**settings)
    batch = toy_adapter.collate(prepared(toy_adapter, 3))
    replaced = ReplacementModel(toy_adapter, transcoder).forward(batch)
    real = batch.real_mask
    torch.testing.assert_close(replaced[real], reference_logits(toy_adapter, transcoder, batch)[real], **CLOSE)
    # The random transcoder must matter, or the comparison would be trivial.
    assert (replaced - toy_adapter.forward(batch))[real].abs().max() > 0.5


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_error_terms_make_the_logits_equal_the_models(toy_adapter, make_clt, settings):
    model = ReplacementModel(toy_adapter, make_clt(**settings))
    batch = toy_adapter.collate(prepared(toy_adapter, 3))
    errors = model.record_errors(batch)
    original, replaced = toy_adapter.forward(batch), model.forward(batch, errors=errors)
    real = batch.real_mask
    assert (replaced - original)[real].abs().max() <= 1e-5 * original[real].abs().max()


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_error_terms_are_exact_to_rounding_in_float64(make_tiny_llama, make_random_clt, settings):
    adapter = make_tiny_llama()
    model = ReplacementModel(adapter, make_random_clt(adapter, **settings))
    batch = adapter.collate([adapter.prepare(text) for text in ("a b c d e f", "q r s")])
    replaced, original = model.forward(batch, errors=model.record_errors(batch)), adapter.forward(batch)
    torch.testing.assert_close(replaced[batch.real_mask], original[batch.real_mask], rtol=1e-11, atol=1e-11)


def test_a_bfloat16_model_keeps_its_dtype_under_interventions(toy_adapter, make_random_clt):
    adapter = ModelAdapter(copy.deepcopy(toy_adapter.model).bfloat16(), toy_adapter, toy_adapter.identity)
    model = ReplacementModel(adapter, make_random_clt(toy_adapter))
    [prompt] = prepared(adapter)
    switch = Intervention(layer=0, feature=3, value=2.0)
    original = adapter.forward(prompt)
    for mlps, errors in (("replaced", model.record_errors(prompt)), ("original", None)):
        logits = model.forward(prompt, [switch], errors, mlps=mlps)
        assert logits.dtype == torch.bfloat16
        assert bool(logits.isfinite().all()) and not torch.equal(logits, original)


def test_recorded_errors_are_the_mlp_outputs_minus_the_transcoder_on_the_original_residual(toy_adapter, make_clt):
    transcoder = make_clt()
    [prompt] = prepared(toy_adapter)
    layers = range(toy_adapter.n_layers)
    with attach(toy_adapter, read=[f"lm.{i}.{kind}" for i in layers for kind in ("resid_mid", "mlp_out")]) as seen:
        toy_adapter.forward(prompt)
    x = torch.stack([seen[f"lm.{i}.resid_mid"][0] for i in layers])
    y = torch.stack([seen[f"lm.{i}.mlp_out"][0] for i in layers])
    errors = ReplacementModel(toy_adapter, transcoder).record_errors(prompt)
    expected = y - transcoder(x).detach()
    torch.testing.assert_close(torch.stack([errors.by_target[i][0] for i in layers]), expected, rtol=1e-4, atol=1e-5)


def test_padding_beginning_of_sequence_and_sourceless_layers_keep_their_own_output(toy_adapter, make_clt):
    transcoder = make_clt(drop_bos=True, first_offset=1)
    batch = toy_adapter.collate(prepared(toy_adapter, 4))
    sites = [f"lm.{layer}.{kind}" for layer in range(toy_adapter.n_layers) for kind in ("mlp_in", "mlp_out")]
    with attach(toy_adapter, read=sites) as seen:
        ReplacementModel(toy_adapter, transcoder).forward(batch)
    kept = (batch.tokens.modality == Modality.PAD) | (batch.tokens.modality == Modality.BOS)
    assert (batch.tokens.modality == Modality.PAD).any()
    for layer in range(toy_adapter.n_layers):
        own = toy_adapter.mlp(layer)(seen[f"lm.{layer}.mlp_in"])
        same = (own == seen[f"lm.{layer}.mlp_out"]).all(-1)
        assert torch.equal(same, torch.ones_like(kept) if layer == 0 else kept)


def test_batch_with_left_padding_equals_single_prompts(toy_adapter, make_clt):
    model = ReplacementModel(toy_adapter, make_clt(drop_bos=True))
    prompts = prepared(toy_adapter, 4)
    batch = toy_adapter.collate(prompts)
    assert len(set(batch.real_mask.sum(1).tolist())) > 1
    everywhere = Intervention(layer=1, feature=3, value=4.0)
    at_five = Intervention(layer=0, feature=7, position=5, value=3.0)
    together = model.forward(batch, [everywhere, at_five])
    for row, prompt in enumerate(prompts):
        alone = model.forward(prompt, [everywhere, at_five])[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)


@pytest.mark.parametrize("mlps", ["replaced", "original"])
@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_an_intervention_equals_a_hand_made_edit_of_the_mlp_outputs(toy_adapter, make_clt, settings, mlps):
    model = ReplacementModel(toy_adapter, make_clt(**settings))
    [prompt] = prepared(toy_adapter)
    codes = model.codes(prompt, mlps="original")
    layer, position = 1, 40
    slot = int(codes.values[layer, position].argmax())
    feature, activation = int(codes.indices[layer, position, slot]), codes.values[layer, position, slot]
    errors = model.record_errors(prompt) if mlps == "replaced" else None
    intervention = Intervention(layer=layer, feature=feature, position=position, value=float(activation) + 2.5)

    def adding(target):
        decoder = model.transcoder.W_dec[str(target)][layer - model.transcoder.sources_of(target).start, feature]

        def edit(y):
            y = y.clone()
            y[0, position] += 2.5 * decoder
            return y

        return edit

    # The outer edits act after the replacement, so later features and MLPs respond to them as to the intervention.
    with attach(toy_adapter, edit={f"lm.{t}.mlp_out": adding(t) for t in model.transcoder.targets_of(layer)}):
        by_hand = model.forward(prompt, errors=errors, mlps=mlps)
    steered = model.forward(prompt, [intervention], errors=errors, mlps=mlps)
    torch.testing.assert_close(steered, by_hand, **CLOSE)
    assert (steered - toy_adapter.forward(prompt)).abs().max() > 1e-3


def test_original_outputs_without_interventions_are_the_models(toy_adapter, make_clt):
    model = ReplacementModel(toy_adapter, make_clt())
    [prompt] = prepared(toy_adapter)
    assert torch.equal(model.forward(prompt, mlps="original"), toy_adapter.forward(prompt))


@pytest.mark.parametrize("mlps", ["replaced", "original"])
def test_scale_and_value_agree_and_the_last_intervention_holds(toy_adapter, make_clt, mlps):
    model = ReplacementModel(toy_adapter, make_clt())
    [prompt] = prepared(toy_adapter)
    codes = model.codes(prompt, mlps=mlps)
    feature = int(codes.indices[0, 20, 0])
    plain = model.forward(prompt, mlps=mlps)

    def run(*changes):
        return model.forward(prompt, [Intervention(layer=0, feature=feature, **c) for c in changes], mlps=mlps)

    assert torch.equal(run({"scale": 1.0}), plain)
    assert torch.equal(run({"scale": 0.0}), run({"value": 0.0}))
    assert not torch.equal(run({"value": 0.0}), plain)
    assert torch.equal(run({"value": 9.0}, {"value": 0.0}), run({"value": 0.0}))
    # The last one holds where it acts, the first one elsewhere.
    mixed = run({"value": 0.0}, {"position": 20, "value": 9.0})
    assert torch.equal(mixed[0, :20], run({"value": 0.0})[0, :20])
    assert not torch.equal(mixed[0, 20], run({"value": 0.0})[0, 20])


def test_an_inactive_feature_can_be_switched_on(toy_adapter, make_clt):
    model = ReplacementModel(toy_adapter, make_clt())
    [prompt] = prepared(toy_adapter)
    codes = model.codes(prompt)
    inactive = next(f for f in range(48) if f not in codes.indices[2, 30].tolist())
    plain = model.forward(prompt)
    assert torch.equal(model.forward(prompt, [Intervention(layer=2, feature=inactive, position=30, scale=5.0)]), plain)
    moved = model.forward(prompt, [Intervention(layer=2, feature=inactive, position=30, value=5.0)])
    assert torch.equal(moved[0, :30], plain[0, :30])
    assert not torch.equal(moved[0, 30], plain[0, 30])


@pytest.mark.parametrize("switched_on", [False, True])
def test_a_feature_that_is_switched_takes_its_offsets_along(make_tiny_llama, make_random_clt, switched_on):
    adapter = make_tiny_llama()
    model = ReplacementModel(adapter, make_random_clt(adapter, feature_offset=True))
    prompt = adapter.prepare("s i x t h")
    codes, layer, position = model.codes(prompt), 1, 3
    active = dict(zip(codes.indices[layer, position].tolist(), codes.values[layer, position].tolist(), strict=True))
    if switched_on:
        feature, value = next(f for f in range(20) if f not in active), 2.0
        written, sign = value, 1
    else:
        feature, value = max(active, key=lambda f: active[f]), 0.0
        written, sign = active[feature], -1

    def change(target):
        row = layer - model.transcoder.sources_of(target).start
        factor = written + model.transcoder.offset[str(target)][row, feature]

        def edit(y):
            y = y.clone()
            y[0, position] += sign * factor * model.transcoder.W_dec[str(target)][row, feature]
            return y

        return edit

    with attach(adapter, edit={f"lm.{t}.mlp_out": change(t) for t in model.transcoder.targets_of(layer)}):
        by_hand = model.forward(prompt)
    intervention = Intervention(layer=layer, feature=feature, position=position, value=value)
    torch.testing.assert_close(model.forward(prompt, [intervention]), by_hand)


def test_interventions_on_rows_of_a_batch_equal_separate_runs(toy_adapter, make_clt):
    model = ReplacementModel(toy_adapter, make_clt())
    prompts = prepared(toy_adapter, 2)
    first = Intervention(layer=0, feature=5, value=6.0, prompt=0)
    second = Intervention(layer=2, feature=9, position=50, value=6.0, prompt=1)
    together = model.forward(toy_adapter.collate(prompts), [first, second], mlps="original")
    for row, change in enumerate((first, second)):
        alone = model.forward(prompts[row], [replace(change, prompt=None)], mlps="original")[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)


@pytest.mark.parametrize("mlps", ["replaced", "original"])
@pytest.mark.parametrize("drop_bos", [False, True])
def test_generation_with_interventions_equals_greedy_decoding_without_cache(toy_adapter, make_clt, mlps, drop_bos):
    model = ReplacementModel(toy_adapter, make_clt(drop_bos=drop_bos))
    # Sentences, so that decoding takes some steps; prompts of two lengths.
    examples = [*toy_examples(2, 11, ("describe",)), *toy_examples(1, 11, ("exists",))]
    prompts = [toy_adapter.prepare(e.prompt, e.images) for e in examples]
    lengths = [prompt.tokens.position.shape[1] for prompt in prompts]
    last = toy_adapter.n_layers - 1
    # A feature that is never active by itself and writes a token which is never generated otherwise.
    model.transcoder.b_enc[str(last)][0] = -1e9
    plain = model.generate(toy_adapter.collate(prompts), 8, mlps=mlps).ids
    assert len(plain[0]) > 1
    word = next(token for token in range(5, toy_adapter.vocab_size) if not any(token in row for row in plain))
    unembedding = toy_adapter.lm_head.weight
    model.transcoder.W_dec[str(last)][-1, 0] = unembedding[word] - unembedding.mean(0)
    switch = Intervention(layer=last, feature=0, value=1e4)
    cases = [
        [],
        [switch],
        [replace(switch, position=lengths[2] - 1, prompt=2)],
        # The position of the first new token: it acts in one decoding step.
        [replace(switch, position=lengths[0], prompt=0)],
        [Intervention(layer=0, feature=f, value=20.0) for f in range(4)],
    ]
    generated = [model.generate(toy_adapter.collate(prompts), 8, case, mlps=mlps).ids for case in cases]
    assert generated[0] == plain
    assert generated[1] == [[word] * 8] * 3
    assert generated[2][:2] == plain[:2] and generated[2][2][0] == word
    assert generated[3][1:] == plain[1:] and generated[3][0][:2] == [plain[0][0], word]
    for case, rows in zip(cases, generated, strict=True):
        for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
            mine = [replace(change, prompt=None) for change in case if change.prompt in (None, row)]
            assert tokens == greedy_without_cache(model, prompt, 8, mine, mlps)


def test_features_are_the_codes_of_the_read_sites(toy_adapter, make_clt):
    transcoder = make_clt(first_offset=1, drop_bos=True)
    model = ReplacementModel(toy_adapter, transcoder)
    batch = toy_adapter.collate(prepared(toy_adapter, 2))
    with attach(toy_adapter, read=[f"lm.{i}.resid_mid" for i in range(3)]) as seen:
        toy_adapter.forward(batch)
    codes = model.codes(batch, mlps="original")
    assert codes.values.shape == (3, batch.real_mask.numel(), 6)
    acts = batch.real_mask & (batch.tokens.modality != Modality.BOS)
    for layer in range(3):
        dense = dense_codes(transcoder, layer, seen[f"lm.{layer}.resid_mid"]) * acts[..., None]
        found = (
            torch.zeros_like(dense).reshape(-1, 48).scatter_add_(1, codes.indices[layer].long(), codes.values[layer])
        )
        torch.testing.assert_close(found, dense.reshape(-1, 48), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer": 4, "feature": 0, "value": 0.0}, "layer 4"),
        ({"layer": -1, "feature": 0, "value": 0.0}, "layer -1"),
        ({"layer": 0, "feature": 48, "value": 0.0}, "feature 48"),
        ({"layer": 0, "feature": 0, "position": 400, "value": 0.0}, "position 400"),
        ({"layer": 0, "feature": 0, "position": -1, "value": 0.0}, "position -1"),
        ({"layer": 0, "feature": 0, "position": 0, "value": 0.0}, "position 0"),
        ({"layer": 0, "feature": 0, "prompt": 1, "value": 0.0}, "prompt 1"),
        ({"layer": 0, "feature": 0}, "either value or scale"),
        ({"layer": 0, "feature": 0, "value": 1.0, "scale": 1.0}, "either value or scale"),
        ({"layer": 0, "feature": 0, "value": float("nan")}, "finite"),
    ],
)
def test_impossible_interventions_are_refused_in_one_line(toy_adapter, make_clt, change, named):
    model = ReplacementModel(toy_adapter, make_clt(drop_bos=True))
    [prompt] = prepared(toy_adapter)
    with pytest.raises(GraphError, match=named) as refusal:
        model.forward(prompt, [Intervention(**change)])
    assert "\n" not in str(refusal.value)


def test_positions_beyond_the_last_decoding_step_are_refused(toy_adapter, make_clt):
    model = ReplacementModel(toy_adapter, make_clt())
    [prompt] = prepared(toy_adapter)
    length = prompt.tokens.position.shape[1]
    with pytest.raises(GraphError, match=f"position {length + 2}"):
        model.generate(prompt, 3, [Intervention(layer=0, feature=0, position=length + 2, value=1.0)])
    model.generate(prompt, 3, [Intervention(layer=0, feature=0, position=length + 1, value=1.0)])


def test_errors_of_other_inputs_or_of_the_original_model_are_refused(toy_adapter, make_clt):
    model = ReplacementModel(toy_adapter, make_clt())
    prompts = prepared(toy_adapter, 2)
    errors = model.record_errors(toy_adapter.collate(prompts))
    with pytest.raises(GraphError, match="record them again"):
        model.forward(prompts[0], errors=errors)
    with pytest.raises(GraphError, match="error terms"):
        model.forward(toy_adapter.collate(prompts), errors=errors, mlps="original")


def test_a_transcoder_of_another_model_is_refused_by_name(toy_adapter, make_clt):
    other = replace(toy_adapter.identity, name="some/other-model", fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="some/other-model") as refusal:
        require_same_model(other, toy_adapter.identity)
    assert toy_adapter.identity.name in str(refusal.value)
    transcoder = make_clt()
    transcoder.provenance = Provenance(model=other)
    with pytest.raises(CheckpointError, match="some/other-model"):
        ReplacementModel(toy_adapter, transcoder)
    # The same weights under another path are the same model.
    require_same_model(replace(toy_adapter.identity, name="elsewhere"), toy_adapter.identity)


def test_a_transcoder_of_other_dimensions_is_refused(toy_adapter):
    config = CLTConfig(n_features=8, k=2, n_layers=3, d_model=toy_adapter.d_model)
    with pytest.raises(CheckpointError, match="3 layers"):
        ReplacementModel(toy_adapter, CrossLayerTranscoder(config, Scaling.identity(3, toy_adapter.d_model)))


def test_a_read_site_behind_its_own_target_is_refused(toy_adapter, make_clt):
    with pytest.raises(ConfigError, match="resid_post"):
        ReplacementModel(toy_adapter, make_clt(read_site="resid_post"))
