"""Cross-layer transcoders for vision-language models.

The house, one import root for five folders of the checkout:

    clt.kernels       tensors in, tensors out: encode and decode
    clt               the transcoder, its training and its checkpoints
    clt.capture       model and images -> activations on disk
    clt.attribution   prompt -> replacement model -> attribution graph -> interventions
    clt.launch        entry points and the `clt` command

Imports run one way only: kernels <- clt <- capture <- attribution <- launch.

In an installed package all five lie under `clt/`. In a bare checkout the other four are siblings of this folder, so
the checkout's root joins the search path of this package when (and only when) its pyproject.toml is there.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
