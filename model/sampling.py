"""From logits to tokens, many sequences at once, each as if it were alone.

Order: logit bias, end tokens barred before min_tokens, repetition penalty, presence and frequency penalty, what a constraint bars,
temperature, then top_k, top_p and min_p, then the inverse of the cumulative distribution at u(seed, position), tokens in the order
of their ids.
A row's result depends on nothing but that row: the filters are thresholds on its probabilities, and equal probabilities are
kept or dropped together, so no sort order decides.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.logprobs import RankedRow, rank_tokens

Ids: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.int32]

# So many of the likeliest tokens are sorted to find the edges of top_k and top_p, in turn, and all only where these do not reach.
# Sorting 128 of 49,152 is 40 times faster than sorting all.
_CANDIDATES = (128, 4096)
_BLOCK = 256
_TEMPERATURES = (1e-10, 1e30)
_REPETITION_PENALTIES = (1e-20, 1e20)


class SamplingSettings(Protocol):
    """What a request says about the choice of its tokens; `router.request.SamplingParams` is one."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    min_tokens: int
    logprobs: int | None


class TokenHistory:
    """The distinct tokens of a sequence and how often each was generated: what penalties read, in the size of the text."""

    def __init__(self, prompt_ids: Iterable[int], generated_ids: Iterable[int]) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token_id in prompt_ids:
            self._place_of(token_id)
        for token_id in generated_ids:
            self.append(token_id)

    @property
    def ids(self) -> Ids:
        """Distinct tokens of prompt and answer, [N]."""
        return self._ids[: len(self._place)]

    @property
    def generated_counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated, 0 for those of the prompt alone, [N]."""
        return self._counts[: len(self._place)]

    def append(self, token_id: int) -> None:
        """Counts a generated token."""
        self._counts[self._place_of(token_id)] += 1

    def _place_of(self, token_id: int) -> int:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token_id
        return place


class SamplingState:
    """One sequence's settings and what they need to remember. `end_token_ids` are barred before min_tokens."""

    def __init__(
        self, settings: SamplingSettings, prompt_ids: Sequence[int], generated_ids: Sequence[int], end_token_ids: Collection[int]
    ) -> None:
        self.settings = settings
        self.num_generated = len(generated_ids)
        self.position = len(prompt_ids) + len(generated_ids)
        self.is_greedy = settings.temperature == 0.0
        self.bias_ids = np.array(list(settings.logit_bias.keys()), dtype=np.int64)
        self.bias_values = np.array(list(settings.logit_bias.values()), dtype=np.float32)
        self.end_ids = np.array(sorted(end_token_ids), dtype=np.int64)
        has_penalty = settings.repetition_penalty != 1.0 or settings.presence_penalty != 0.0 or settings.frequency_penalty != 0.0
        self.history = TokenHistory(prompt_ids, generated_ids) if has_penalty else None

    @property
    def bars_end(self) -> bool:
        """Whether the next token comes before min_tokens."""
        return self.num_generated < self.settings.min_tokens and len(self.end_ids) > 0

    @property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and filters touches the next token's logits."""
        return len(self.bias_ids) > 0 or self.history is not None or self.bars_end

    def append(self, token_id: int) -> None:
        """The sequence has grown by a token."""
        self.position += 1
        self.num_generated += 1
        if self.history is not None:
            self.history.append(token_id)


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that constrained rows may choose from: row rows[n] token v if bit v % 32 of words[n, v // 32] is set.

    rows [N], words [N, at least V / 32]; a row that is not named may choose any.
    """

    rows: Ids
    words: Words


@dataclass(frozen=True)
class Choice:
    """A row's next token; None where its logits were not numbers. `ranked` where log-probabilities were asked for."""

    token_id: int | None
    ranked: RankedRow | None = None


def sample(logits: Tensor, states: Sequence[SamplingState], allowed: AllowedTokens | None = None) -> list[Choice]:
    """The next token of each row of logits [R, V] float32, which are left as they are."""
    adjusted = _adjust(logits, states) if any(state.changes_logits for state in states) else logits
    if allowed is not None:
        adjusted = _bar(adjusted.clone() if adjusted is logits else adjusted, allowed)
    peaks, tokens = adjusted.max(dim=-1)
    drawn = [row for row, state in enumerate(states) if not state.is_greedy]
    if drawn:
        rows = None if len(drawn) == len(states) else _to_device(np.array(drawn), logits)
        chosen = _draw(adjusted if rows is None else adjusted[rows], [states[row] for row in drawn])
        tokens = chosen if rows is None else tokens.index_copy(0, rows, chosen)
    # max() hands on NaN, so that one look at it tells whether the whole row was sound.
    token_ids: list[int] = torch.where(peaks.isfinite(), tokens, -1).tolist()
    ranked = _rank(logits, tokens, states)
    return [Choice(token_id if token_id >= 0 else None, ranked.get(row)) for row, token_id in enumerate(token_ids)]


def uniform(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """u(seed, position) in [0, 1), the same on every machine.

    Output `position` of a SplitMix64 stream that starts at the hashed seed (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators"; finaliser: Stafford's variant 13); its upper 53 bits.
    """
    state = _mix(seeds.astype(np.uint64)) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _rank(logits: Tensor, tokens: Tensor, states: Sequence[SamplingState]) -> dict[int, RankedRow]:
    asked = [row for row, state in enumerate(states) if state.settings.logprobs is not None]
    if not asked:
        return {}
    rows = _to_device(np.array(asked), logits)
    wanted = [states[row].settings.logprobs or 0 for row in asked]
    table = rank_tokens(logits[rows], tokens[rows], max(wanted))
    return {row: RankedRow(ranked.chosen, ranked.top[:n]) for row, n, ranked in zip(asked, wanted, table, strict=True)}


def _adjust(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Bias, barred end tokens and penalties, on the few entries that they name."""
    vocab_size = logits.shape[1]
    flat = logits.flatten().clone()
    biased = [(row, state) for row, state in enumerate(states) if len(state.bias_ids)]
    if biased:
        places = _to_device(np.concatenate([row * vocab_size + state.bias_ids for row, state in biased]), logits)
        flat[places] += _to_device(np.concatenate([state.bias_values for _, state in biased]), logits)
    barred = [row * vocab_size + state.end_ids for row, state in enumerate(states) if state.bars_end]
    if barred:
        flat[_to_device(np.concatenate(barred), logits)] = -torch.inf
    penalised = [(row, state.history, state.settings) for row, state in enumerate(states) if state.history is not None]
    if penalised:
        places = _to_device(np.concatenate([row * vocab_size + history.ids for row, history, _ in penalised]), logits)
        counts = _to_device(np.concatenate([history.generated_counts for _, history, _ in penalised]), logits)
        lengths = [len(history.ids) for _, history, _ in penalised]
        repetition = np.clip([settings.repetition_penalty for _, _, settings in penalised], *_REPETITION_PENALTIES)
        presence = np.array([settings.presence_penalty for _, _, settings in penalised])
        frequency = np.array([settings.frequency_penalty for _, _, settings in penalised])
        factor, flat_cost, cost = (
            _to_device(np.repeat(values.astype(np.float32), lengths), logits) for values in (repetition, presence, frequency)
        )
        values = flat[places]
        values = torch.where(values > 0, values / factor, values * factor)
        flat[places] = values - cost * counts - flat_cost * (counts > 0)
    return flat.view_as(logits)


def _bar(logits: Tensor, allowed: AllowedTokens) -> Tensor:
    """The logits, changed in place, with what is not allowed at -inf. The bits are unpacked where the logits are."""
    vocab_size = logits.shape[1]
    packed = _to_device(allowed.words.view(np.uint8)[:, : -(-vocab_size // 8)], logits)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=logits.device)
    barred = ((packed[:, :, None] & places) == 0).flatten(1)[:, :vocab_size]
    if len(allowed.rows) == len(logits):
        return logits.masked_fill_(barred, -torch.inf)
    rows = _to_device(allowed.rows, logits)
    logits[rows] = logits[rows].masked_fill_(barred, -torch.inf)
    return logits


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Tokens [R] of logits [R, V], by temperature, filters and each row's own random number."""
    settings = [state.settings for state in states]
    temperatures = np.clip(np.array([s.temperature for s in settings]), *_TEMPERATURES).astype(np.float32)
    num_rows, vocab_size = logits.shape
    weights = logits.new_zeros((num_rows, -(-vocab_size // _BLOCK) * _BLOCK))
    scaled = weights[:, :vocab_size]
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=scaled)
    scaled.div_(_to_device(temperatures, logits)[:, None]).exp_()
    cut = [row for row, s in enumerate(settings) if 0 < s.top_k < vocab_size or s.top_p < 1.0]
    min_p = np.array([s.min_p for s in settings], dtype=np.float32)
    if cut or min_p.any():
        # The likeliest token's weight is exactly 1: min_p is a threshold as it stands.
        threshold = _to_device(min_p, logits)
        if cut:
            rows = _to_device(np.array(cut), logits)
            edges = _filter_edges(scaled[rows], [settings[row] for row in cut])
            threshold[rows] = torch.maximum(threshold[rows], edges)
        scaled.masked_fill_(scaled < threshold[:, None], 0.0)
    seeds = np.array([s.seed for s in settings], dtype=np.int64)
    positions = np.array([state.position for state in states], dtype=np.int64)
    return _invert(weights, _to_device(uniform(seeds, positions), logits))


def _filter_edges(weights: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """The smallest weight [F] that top_k and top_p keep in each row of unnormalised probabilities [F, V]."""
    vocab_size = weights.shape[1]
    limit = _to_device(np.array([s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in settings]), weights)[:, None]
    mass = _to_device(np.array([s.top_p for s in settings]), weights)[:, None]
    edges = weights.new_zeros(len(settings))
    rows = torch.arange(len(settings), device=weights.device)
    for num_candidates in sorted({min(count, vocab_size) for count in (*_CANDIDATES, vocab_size)}):
        top = weights.topk(num_candidates, dim=-1).values
        kth = torch.where(limit < vocab_size, top.gather(1, limit.clamp(max=num_candidates) - 1), 0.0)
        total = weights.masked_fill(weights < kth, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        # A token is kept while those before it have not reached the mass: the one that crosses it is kept.
        num_kept = (top.double().cumsum(dim=-1) < mass * total).sum(dim=-1, keepdim=True) + 1
        nucleus = torch.where(mass < 1.0, top.gather(1, num_kept.clamp(max=num_candidates) - 1), 0.0)
        edges[rows] = torch.maximum(kth, nucleus).squeeze(1)
        unsure = (limit > num_candidates) & ((limit < vocab_size) | (num_kept > num_candidates))
        if num_candidates == vocab_size or not bool(unsure.any()):
            break
        unsure = unsure.squeeze(1)
        weights, limit, mass, rows = weights[unsure], limit[unsure], mass[unsure], rows[unsure]
    return edges


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """For each row of weights [R, V'] the first token whose cumulated share exceeds u [R]; V' is a multiple of the block.

    Blocks first, then within the block found: no cumulative sum over the whole vocabulary. In float64, so that u is not rounded to 1.
    """
    blocks = weights.view(len(weights), -1, _BLOCK)
    block_sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = u[:, None] * block_sums[:, -1:]
    block = _first_above(block_sums, target)
    before = torch.where(block > 0, block_sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(dim=-1)
    return (block * _BLOCK + _first_above(inside, target - before)).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [R, 1] of the first entry above target; where rounding leaves none, the last that adds anything."""
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum((cumulative <= target).sum(dim=-1, keepdim=True), last)


def _to_device(values: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
