"""Changed features on their way through a run: what they are, what they become, and what more they then write.

A run comes in pieces: the prompt first, then one generated token at a time. Features that move keep what they need of
earlier positions, so that a piece costs no more than its own length.

Letters of shapes: B interventions, T positions of a piece, S positions so far, n features, r rank, H heads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits.changes import Plan, Side, Watched
from circuits.feature_values import all_sizes, gated, needs_all, pre_activations, strongest, unit, values
from circuits.linearize import LinearizedModel
from circuits.replacements.dictionary import Dictionary
from circuits.replacements.movement import HeadLoading, OwnAttention

Choice = Literal["anew", "held"]


@dataclass(frozen=True)
class SideValues:
    """Of one side of the features: pre-activations, activations, and activations after the change, (B, T, n, r)."""

    pre: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Step:
    """One piece of a run: `delta` (B, T, n, r) is what is written beside what the base model writes."""

    delta: Tensor
    sides: dict[Side, SideValues]


class FeatureRun:
    """The chosen features of one dictionary in one run of a plan.

    Parameters
    ----------
    recorded
        The same features on the recording, for their directions; None for the recording itself.
    prompt_length
        Positions below it share one choice of the context's features; those above have the choice of all so far.
    choice
        `held`: generated positions keep the choice of the prompt.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        index: int,
        plan: Plan,
        recorded: Step | None,
        prompt_length: int,
        choice: Choice = "anew",
    ) -> None:
        self.dictionary, self.index, self.plan, self.recorded = dictionary, index, plan, recorded
        self.prompt_length, self.choice = prompt_length, choice
        self.features = plan.features[index]
        self.first = 0
        self._kept: dict[str, Tensor] = {}
        self._chosen: Tensor | None = None

    def step(self, x: Tensor, pattern: Tensor | None = None) -> Step:
        """The next piece: x (B, T, d_read), and for features that the layer's heads move `pattern` (B, H, T, S)."""
        if isinstance(self.dictionary.moved_by, HeadLoading):
            assert pattern is not None
            done = self._moved(x, pattern, self.dictionary.moved_by)
        elif isinstance(self.dictionary.moved_by, OwnAttention):
            done = self._own(x, self.dictionary.moved_by)
        else:
            done = self._staying(x)
        self.first += x.shape[1]
        return done

    def _staying(self, x: Tensor) -> Step:
        length = x.shape[1]
        keep, gain = self.plan.factors(self.index, "own", self.first, length)
        wanted = ((keep != 1) | (gain != 0)).any(-1)
        for watched in self.plan.watched.get(self.index, ()):
            if self.first <= watched.position < self.first + length:
                wanted[:, watched.position - self.first] = True
        if not self.plan.changes and not self.plan.watched:
            wanted[:] = True
        shape = (*wanted.shape, len(self.features), self.dictionary.rank)
        pre, before = x.new_zeros(shape), x.new_zeros(shape)
        found = values(self.dictionary, x[wanted], self.features)
        pre[wanted], before[wanted] = (value.to(x) for value in found)
        return self._staying_step(pre, before, keep, gain)

    def _staying_step(self, pre: Tensor, before: Tensor, keep: Tensor, gain: Tensor) -> Step:
        after = keep.unsqueeze(-1) * before + gain.unsqueeze(-1) * self.direction("own", pre)
        return Step(after - before, {"own": SideValues(pre, before, after)})

    def _moved(self, x: Tensor, pattern: Tensor, movement: HeadLoading) -> Step:
        n_rows, length, width = x.shape
        pre, active = (
            value.reshape(n_rows, length, len(self.features), -1).to(x)
            for value in values(self.dictionary, x.reshape(-1, width), self.features)
        )
        chosen = self._choose(x, movement).unsqueeze(-1).double()
        keep, gain = self.plan.factors(self.index, "key", self.first, length)
        added = gain.unsqueeze(-1) * self.direction("key", pre)
        acts = self._keep("active", active)
        keeps, gains = self._keep("keep", keep).unsqueeze(-1), self._keep("added", added)
        loading = movement.weights.to(pattern.device)[self.features]
        delta = chosen * move((keeps - 1) * acts, loading, pattern) + move(gains, loading, pattern)
        arrived = chosen * move(acts, loading, pattern) + delta
        keep_q, gain_q = self.plan.factors(self.index, "query", self.first, length)
        after = keep_q.unsqueeze(-1) * arrived + gain_q.unsqueeze(-1) * self.direction("query", arrived)
        active = active * chosen.to(active)
        return Step(
            (delta + after - arrived).to(x),
            {
                "key": SideValues(pre, active, keep.unsqueeze(-1) * active + added),
                "query": SideValues(arrived.to(x), arrived.to(x), after.to(x)),
            },
        )

    def _choose(self, x: Tensor, movement: HeadLoading) -> Tensor:
        """(B, T, n) of bool: whether a feature is among those that move in the context that a query position has."""
        n_rows, length, width = x.shape
        if movement.context_k is None:
            return torch.ones(n_rows, length, len(self.features), dtype=torch.bool, device=x.device)
        sizes = all_sizes(self.dictionary, x.reshape(-1, width)).reshape(n_rows, length, -1)
        totals = self._kept.get("totals", torch.zeros_like(sizes[:, 0]))
        pieces, done = [], 0
        while done < length:
            in_prompt = self.first + done < self.prompt_length
            stop = min(self.prompt_length - self.first, length) if in_prompt else done + 1
            totals = totals + sizes[:, done:stop].sum(1)
            if in_prompt or self.choice == "anew" or self._chosen is None:
                self._chosen = strongest(totals, movement.context_k)[:, self.features]
            pieces.append(self._chosen.unsqueeze(1).expand(-1, stop - done, -1))
            done = stop
        self._kept["totals"] = totals
        return torch.cat(pieces, 1)

    def _own(self, x: Tensor, movement: OwnAttention) -> Step:
        """`pre_f[p] = sum_s A_g[p, s] (E_f x_s + b_f)` over all positions so far, and the gate at p."""
        n_rows, length, _ = x.shape
        x = x.to(movement.W_q)
        columns = None if needs_all(self.dictionary) else self.features
        sent = self._keep("sent", pre_activations(self.dictionary, x, columns))
        places = torch.arange(self.first, self.first + length, device=x.device)
        q = movement.queries(x, places)
        k = self._keep("keys", movement.keys(x, places).transpose(1, 2)).transpose(1, 2)
        future = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).triu(self.first + 1)
        patterns = (movement.scale * (q @ k.transpose(-1, -2))).masked_fill(future, -torch.inf).softmax(-1)
        group = movement.group.to(x.device) if columns is None else movement.group.to(x.device)[self.features]
        pre = sent.new_zeros(n_rows, length, *sent.shape[2:])
        for number in sorted(set(group.tolist())):
            mine = (group == number).nonzero()[:, 0]
            pre[:, :, mine] = torch.einsum("bts,bsnr->btnr", patterns[:, number], sent[:, :, mine])
        active = gated(self.dictionary, pre.flatten(0, 1), columns).view_as(pre)
        if columns is None:
            pre, active = pre[:, :, self.features], active[:, :, self.features]
        keep, gain = self.plan.factors(self.index, "own", self.first, length)
        return self._staying_step(pre, active, keep, gain)

    def direction(self, side: Side, current: Tensor) -> Tensor:
        """Unit vectors (B, T, n, r): those of the recording where the feature is active on it, else the current."""
        if self.dictionary.rank == 1:
            return torch.ones_like(current)
        found = unit(current)
        if self.recorded is not None:
            values = self.recorded.sides[side].before[:, self.first : self.first + current.shape[1]].to(current)
            size = values.norm(dim=-1, keepdim=True)
            n = values.shape[1]
            found[:, :n] = torch.where(size > 0, unit(values), found[:, :n])
        return found

    def _keep(self, name: str, piece: Tensor) -> Tensor:
        """Everything so far, (B, S, ...), this piece included."""
        if name in self._kept:
            piece = torch.cat([self._kept[name], piece], 1)
        self._kept[name] = piece
        return piece


def move(sent: Tensor, loading: Tensor, pattern: Tensor) -> Tensor:
    """`sum_s (sum_h alpha_fh A_h[p, s] + alpha_f,id [p = s]) sent[s, f]` at the last T positions, (B, T, n, r) float64.

    Parameters
    ----------
    sent
        (B, S, n, r).
    loading
        (n, H + 1), the last column for the identity.
    pattern
        (B, H, T, S).
    """
    length = pattern.shape[2]
    sent, loading = sent.double(), loading.double()
    moved = sent[:, -length:] * loading[:, -1:]
    for head in range(pattern.shape[1]):
        arrived = pattern[:, head].double() @ sent.flatten(2)
        moved = moved + arrived.view_as(moved) * loading[:, head, None]
    return moved


def on_recording(linear: LinearizedModel, index: int, features: Tensor) -> Step:
    """Features of dictionary `index` on the recording, nothing changed: (1, S, n, r)."""
    dictionary = linear.dictionaries[index]
    nothing = Plan(1, {index: features})
    run = FeatureRun(dictionary, index, nothing, None, linear.recording.n_positions)
    return run.step(linear.input_of(dictionary)[None], linear.recording.patterns[dictionary.layer][None])


def node_direction(recorded: Step, node: Watched, current: Tensor) -> Tensor:
    """Along what a node's length is taken, (B, r): its recorded direction, that of `current` where it was inactive."""
    if current.shape[-1] == 1:
        return torch.ones_like(current)
    values = recorded.sides[node.side].before
    if node.position < values.shape[1] and bool((value := values[0, node.position, node.column]).norm() > 0):
        return unit(value).to(current).expand_as(current)
    return unit(current)
