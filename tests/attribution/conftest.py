"""Fixtures of attribution tests: hand-written graphs, a tiny random Llama, random transcoders."""

import math
from collections.abc import Callable

import pytest
import torch

from clt.attribution.graphs.graph import BiasKind, Graph, GraphImage, NodeKind, NodeTable, Target
from clt.capture.models.adapter import ModelAdapter
from clt.records import ModelIdentity
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling

#: Label, token and probability of the targets.
LOGITS = (("red", 11, 0.9), ("blue", 23, 0.1))
WORDS = ("<s>", "USER", ":", *["<image>"] * 64, "\n", "which", "tile", "is", "odd", "?", "ASSISTANT", ":")


@pytest.fixture(scope="session")
def make_graph() -> Callable[..., Graph]:
    """A function that makes a random graph whose edges run upwards in layers and forwards in position."""
    return build_graph


def build_graph(
    n_features: int = 60,
    n_layers: int = 3,
    words: tuple[str, ...] = WORDS,
    prompt: str = "USER: <image>",
    seed: int = 0,
) -> Graph:
    """A random graph of a prompt; every word `<image>` is a patch of one square image.

    Args:
        n_features: active features, spread over layers and positions.
        n_layers: decoder layers.
        words: the prompt's tokens.
        prompt: the prompt's text.
        seed: of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)
    n_positions = len(words)
    patches = [position for position, word in enumerate(words) if word == "<image>"]
    side = math.isqrt(len(patches)) or 1
    nodes = _node_rows(n_features, n_layers, n_positions, patches, random)
    kind, layer, position, feature = torch.tensor(nodes).T
    rank = torch.where(kind == NodeKind.LOGIT, n_layers, layer)
    rows = torch.cat([torch.arange(n_features), torch.tensor([len(nodes) - 2, len(nodes) - 1])])
    edges = torch.randn(len(rows), len(nodes), generator=random) ** 3
    edges *= (rank[None, :] < rank[rows, None]) & (position[None, :] <= position[rows, None])
    edges *= (kind != NodeKind.LOGIT)[None, :]
    edges[:, kind == NodeKind.ERROR] *= 0.02
    order = {at: number for number, at in enumerate(patches)}
    patch = torch.tensor([order.get(int(at), -1) for at in position])
    is_patch = patch >= 0
    table = NodeTable(
        kind=kind.to(torch.uint8),
        layer=layer.to(torch.int16),
        position=position.to(torch.int32),
        feature=feature.to(torch.int32),
        activation=torch.rand(len(nodes), generator=random),
        image=torch.where(is_patch, 0, -1).to(torch.int16),
        patch_row=torch.where(is_patch, patch // side, -1).to(torch.int16),
        patch_col=torch.where(is_patch, patch % side, -1).to(torch.int16),
    )
    return Graph(
        nodes=table,
        rows_to_node=rows,
        edges=edges,
        row_values=edges.sum(1),
        targets=tuple(
            Target(
                kind="logit",
                label=label,
                position=n_positions - 1,
                token_id=token,
                layer=n_layers,
                probability=probability,
                weight=probability,
            )
            for label, token, probability in LOGITS
        ),
        token_ids=torch.arange(n_positions) + 5,
        token_strings=words,
        prompt=prompt,
        images=(GraphImage(pixels=_tiles(), grid=(side, side), box=(0.0, 0.0, 64.0, 64.0)),) if patches else (),
        model=ModelIdentity(
            name="toy", revision="local", architecture="Llava", n_layers=n_layers, d_model=16, fingerprint="ab" * 32
        ),
        architecture=CLTConfig(n_features=7, k=2, n_layers=n_layers, d_model=16),
        clt_fingerprint="cd" * 32,
    )


def _node_rows(
    n_features: int, n_layers: int, n_positions: int, patches: list[int], random: torch.Generator
) -> list[tuple[int, ...]]:
    """Kind, layer, position and feature number of every node, in the order of columns."""
    nodes: list[tuple[int, ...]] = []
    # Feature numbers below n_layers at layer 0 are those whose ids an error node bears in other systems.
    places = torch.randperm(n_layers * n_positions * 7, generator=random)[:n_features].sort().values.tolist()
    for place in places:
        layer, rest = divmod(place, n_positions * 7)
        position, feature = divmod(rest, 7)
        nodes.append((NodeKind.FEATURE, layer, position, feature))
    nodes += [(NodeKind.ERROR, layer, position, -1) for layer in range(n_layers) for position in range(n_positions)]
    nodes += [
        (NodeKind.IMAGE if position in patches else NodeKind.TEXT, -1, position, position + 5)
        for position in range(n_positions)
    ]
    nodes += [(NodeKind.BIAS, layer, -1, BiasKind.DECODER) for layer in range(n_layers)]
    nodes += [(NodeKind.BIAS, -1, -1, BiasKind.TARGET)]
    nodes += [(NodeKind.LOGIT, n_layers, n_positions - 1, token) for _, token, _ in LOGITS]
    return nodes


def _tiles() -> torch.Tensor:
    """[64,64,3] uint8: blue tiles with one red one in row 2, column 5."""
    pixels = torch.empty(64, 64, 3, dtype=torch.uint8)
    pixels[:] = torch.tensor([60, 90, 200], dtype=torch.uint8)
    pixels[16:24, 40:48] = torch.tensor([210, 40, 40], dtype=torch.uint8)
    return pixels


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., ModelAdapter]:
    """A function that makes a random Llama with grouped-query attention and biases, exact in float64."""
    return build_tiny_llama


@pytest.fixture(scope="session")
def make_random_clt() -> Callable[..., CrossLayerTranscoder]:
    """A function that makes a transcoder of a model in which scaling, biases, decoders and skip all matter."""
    return build_random_clt


def build_tiny_llama(bias: bool = True, dtype: torch.dtype = torch.float64, n_layers: int = 3) -> ModelAdapter:
    """A random Llama of width 24 with 4 query and 2 key-value heads and a vocabulary of the letters a to z.

    Its norms are PyTorch's: those of transformers compute in float32 whatever the model's dtype.

    Args:
        bias: biases in attention and in the language-model head.
        dtype: of the weights.
        n_layers: decoder layers.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, **{chr(97 + i): 2 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=bias,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).to(dtype)
        model.lm_head = torch.nn.Linear(24, len(words), bias=bias, dtype=dtype)
        for layer in model.model.layers:
            layer.input_layernorm = torch.nn.RMSNorm(24, eps=1e-6, dtype=dtype)
            layer.post_attention_layernorm = torch.nn.RMSNorm(24, eps=1e-6, dtype=dtype)
        model.model.norm = torch.nn.RMSNorm(24, eps=1e-6, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                size = 1.0 if "norm" in name or "embed" in name else 0.3
                parameter.copy_(size * torch.randn(parameter.shape, dtype=dtype))
    return ModelAdapter(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


def build_random_clt(adapter: ModelAdapter, **settings: object) -> CrossLayerTranscoder:
    """A random transcoder of the model's dtype; keyword arguments are fields of `CLTConfig`."""
    dimensions = {"n_features": 20, "k": 4, "n_layers": adapter.n_layers, "d_model": adapter.d_model}
    config = CLTConfig(**(dimensions | settings))
    generator = torch.Generator().manual_seed(5)
    layers, width = config.n_layers, config.d_model
    scaling = Scaling(
        mean_x=0.3 * torch.randn(layers, width, generator=generator),
        rms_x=0.5 + torch.rand(layers, generator=generator),
        mean_y=0.1 * torch.randn(layers, width, generator=generator),
        rms_y=0.5 + torch.rand(layers, generator=generator),
    )
    transcoder = CrossLayerTranscoder(config, scaling, seed=3, provenance=Provenance(model=adapter.identity))
    with torch.no_grad():
        sizes = [(transcoder.W_dec, 0.1), (transcoder.b_enc, 0.3), (transcoder.b_dec, 0.1), (transcoder.W_skip, 0.1)]
        for group, size in (
            *sizes,
            (transcoder.W_shared, 0.1),
            (transcoder.target_scale, 1.0),
            (transcoder.offset, 1.0),
        ):
            for parameter in group.values():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return transcoder.to(adapter.dtype)
