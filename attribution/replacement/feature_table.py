"""Tables of transcoder features on one prompt: the active ones, and those that an intervention changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from clt.errors import GraphError
from clt.records import SparseCodes

#: Rows that `repr` prints.
_SHOWN_ROWS = 10


class FeatureActivation(NamedTuple):
    """One row of a `FeatureTable`."""

    layer: int
    position: int
    feature: int
    activation: float


class FeatureChange(NamedTuple):
    """One row of a `FeatureChanges` table."""

    layer: int
    position: int
    feature: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureTable:
    """The n active features of one prompt, by layer, position and feature number unless `top` sorted them.

    Attributes:
        layer: [n] int64, source layer.
        position: [n] int64, index in the prompt.
        feature: [n] int64, feature number.
        activation: [n] float, > 0.
        layers: the L source layers of the transcoder.
        n_features: F, features per layer.
        tokens: the S tokens of the prompt as text.
    """

    layer: Tensor
    position: Tensor
    feature: Tensor
    activation: Tensor
    layers: tuple[int, ...]
    n_features: int
    tokens: tuple[str, ...]

    @classmethod
    def from_codes(cls, codes: SparseCodes, layers: Sequence[int], tokens: Sequence[str]) -> Self:
        """The active features among the codes of one prompt.

        Args:
            codes: [L,S,K] codes of the source layers; empty slots have value 0.
            layers: the L source layers.
            tokens: the S tokens as text.

        Returns:
            The table, on the CPU.
        """
        values, indices = codes.values.cpu(), codes.indices.cpu().long()
        row, position, slot = (values > 0).nonzero(as_tuple=True)
        # Slots are ascending in feature number, so the order is (layer, position, feature).
        return cls(
            layer=torch.tensor(layers)[row],
            position=position,
            feature=indices[row, position, slot],
            activation=values[row, position, slot],
            layers=tuple(layers),
            n_features=codes.n_features,
            tokens=tuple(tokens),
        )

    def __len__(self) -> int:
        return len(self.layer)

    def __iter__(self) -> Iterator[FeatureActivation]:
        columns = (self.layer, self.position, self.feature, self.activation)
        yield from map(FeatureActivation._make, zip(*(column.tolist() for column in columns), strict=True))

    def top(self, n: int) -> FeatureTable:
        """The n largest activations, largest first; all of them where there are fewer.

        Args:
            n: rows to keep, > 0.

        Returns:
            A table of the same prompt.

        Raises:
            GraphError: n is not positive.
        """
        if n < 1:
            raise GraphError(f"top({n}): n must be at least 1")
        order = self.activation.argsort(descending=True, stable=True)[:n]
        return self._rows(order)

    def where(self, *, layer: int | None = None, position: int | None = None) -> FeatureTable:
        """The rows of one layer, of one position, or of both.

        Args:
            layer: source layer; all by default.
            position: index in the prompt, negative from its end; all by default.

        Returns:
            A table of the same prompt, in the same order.

        Raises:
            GraphError: there is no such layer or position.
        """
        keep = torch.ones(len(self), dtype=torch.bool)
        if layer is not None:
            if layer not in self.layers:
                raise GraphError(f"layer {layer}: the transcoder has features in layers {_span(self.layers)}")
            keep &= self.layer == layer
        if position is not None:
            S = len(self.tokens)
            if not -S <= position < S:
                raise GraphError(f"position {position}: the prompt has {S} tokens")
            keep &= self.position == position % S
        return self._rows(keep.nonzero()[:, 0])

    def dense(self) -> Tensor:
        """[L,S,F] activations, 0 where a feature is not active; row l belongs to `layers[l]`."""
        dense = self.activation.new_zeros(len(self.layers), len(self.tokens), self.n_features)
        rows = torch.searchsorted(torch.tensor(self.layers), self.layer)
        dense[rows, self.position, self.feature] = self.activation
        return dense

    def __repr__(self) -> str:
        head = f"FeatureTable: {len(self)} active features, {len(self.tokens)} tokens, layers {_span(self.layers)}"
        lines = [f"{'layer':>5} {'position':>8} {'feature':>8} {'activation':>11}  token"]
        for row in self._rows(torch.arange(min(len(self), _SHOWN_ROWS))):
            token = self.tokens[row.position]
            lines.append(f"{row.layer:5} {row.position:8} {row.feature:8} {row.activation:11.4g}  {token!r}")
        return _listing(head, lines, len(self))

    def _rows(self, index: Tensor) -> FeatureTable:
        return FeatureTable(
            layer=self.layer[index],
            position=self.position[index],
            feature=self.feature[index],
            activation=self.activation[index],
            layers=self.layers,
            n_features=self.n_features,
            tokens=self.tokens,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureChanges:
    """Features whose activation an intervention changed, largest change first.

    Attributes:
        layer: [n] int64, source layer.
        position: [n] int64, index in the prompt.
        feature: [n] int64, feature number.
        before: [n] float, activation without the intervention; 0 is inactive.
        after: [n] float, activation with it.
        tokens: the S tokens of the prompt as text.
    """

    layer: Tensor
    position: Tensor
    feature: Tensor
    before: Tensor
    after: Tensor
    tokens: tuple[str, ...]

    @classmethod
    def between(cls, before: FeatureTable, after: FeatureTable) -> Self:
        """The features whose activations differ between two runs of one prompt by more than rounding.

        Args:
            before: active features of the first run.
            after: active features of the second.

        Returns:
            One row per feature whose activations differ by more than eps^0.6 of the larger one (7e-5 of it in float32);
            ties by layer, position and feature number.
        """
        S, F = len(before.tokens), before.n_features
        keys = [(table.layer * S + table.position) * F + table.feature for table in (before, after)]
        union = torch.cat(keys).unique()
        columns = []
        for key, table in zip(keys, (before, after), strict=True):
            column = table.activation.new_zeros(len(union))
            column[torch.searchsorted(union, key)] = table.activation
            columns.append(column)
        change, larger = (columns[0] - columns[1]).abs(), torch.maximum(*columns)
        order = change.argsort(descending=True, stable=True)
        order = order[(change > torch.finfo(change.dtype).eps ** 0.6 * larger)[order]]
        union = union[order]
        return cls(
            layer=union // F // S,
            position=union // F % S,
            feature=union % F,
            before=columns[0][order],
            after=columns[1][order],
            tokens=before.tokens,
        )

    def __len__(self) -> int:
        return len(self.layer)

    def __iter__(self) -> Iterator[FeatureChange]:
        columns = (self.layer, self.position, self.feature, self.before, self.after)
        yield from map(FeatureChange._make, zip(*(column.tolist() for column in columns), strict=True))

    def __repr__(self) -> str:
        lines = [f"{'layer':>5} {'position':>8} {'feature':>8} {'before':>11} {'after':>11}  token"]
        for row, _ in zip(self, range(_SHOWN_ROWS), strict=False):
            token = self.tokens[row.position]
            lines.append(
                f"{row.layer:5} {row.position:8} {row.feature:8} {row.before:11.4g} {row.after:11.4g}  {token!r}"
            )
        return _listing(f"FeatureChanges: {len(self)} features changed", lines, len(self))


def _listing(head: str, lines: Sequence[str], n_rows: int) -> str:
    more = [f"... {n_rows - _SHOWN_ROWS} more rows"] if n_rows > _SHOWN_ROWS else []
    return "\n".join([head, *lines, *more])


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}..{layers[-1]}"
