"""Log-probabilities of the model's own distribution, before sampling changes anything."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are reduced this many logits at a time, so that a long prompt's do not double the memory they take.
_MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class RankedToken:
    """A token's natural-log probability and its rank: 1 + the number of tokens that are strictly likelier."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class RankedRow:
    """The token asked about, and the likeliest ones, best first."""

    chosen: RankedToken
    top: tuple[RankedToken, ...]


def rank_tokens(logits: Tensor, token_ids: Tensor, num_top: int) -> list[RankedRow]:
    """For each row of logits [R, V]: the log-probability of token_ids [R] and of the num_top likeliest tokens."""
    num_rows, vocab_size = logits.shape
    step = max(1, _MAX_ELEMENTS // vocab_size)
    tables = [
        _table(logits[start : start + step], token_ids[start : start + step], min(num_top, vocab_size))
        for start in range(0, num_rows, step)
    ]
    # float64 holds token ids and ranks exactly, so that one copy to the host brings everything.
    rows = torch.cat(tables).tolist() if tables else []
    return [RankedRow(tokens[0], tokens[1:]) for tokens in (tuple(RankedToken(int(t), lp, int(r)) for t, lp, r in row) for row in rows)]


def _table(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """[R, 1 + num_top, 3] float64: token id, log-probability, rank; the chosen token first."""
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None])
    chosen_rank = (logits > chosen).sum(dim=-1, keepdim=True) + 1
    top, top_ids = logits.topk(num_top, dim=-1)
    top_rank = (top[:, None, :] > top[:, :, None]).sum(dim=-1) + 1
    ids = torch.cat((token_ids[:, None], top_ids), dim=1).double()
    logprobs = (torch.cat((chosen, top), dim=1) - normalizer).double()
    ranks = torch.cat((chosen_rank, top_rank), dim=1).double()
    return torch.stack((ids, logprobs, ranks), dim=-1)
