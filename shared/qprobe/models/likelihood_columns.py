"""What one pass over completions says of them: columns of log-probabilities and entropies, and the hidden states beside them.

    reader = LikelihoodColumns(ModelSpec("Qwen/Qwen2.5-Coder-1.5B-Instruct"))
    read = reader.read(prompts, completions, layers=(18,))
    read.columns                                # (R, len(COLUMNS)) float64, in the order of COLUMNS
    read.states[18]                             # (R, D) float32, what the embedder gives

The law is the model's own, untempered, whatever the sampler's temperature was; natural logarithms, softmax in float32.

Where it stops: an API tells the log-probabilities of some twenty tokens at most, so that entropies and self-certainty are the
local model's alone. `columns_of` takes what there is of every token and leaves the rest NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import MOST_TOKENS, check_tokens
from qprobe.models.loading import OwnTokens
from qprobe.models.memory import UsesModel
from qprobe.models.prefix import check_rows, law_of, parts_of
from qprobe.models.question import QUESTION_COLUMNS, Question

# Of the columns and how they are computed: tables of another version are made anew.
COLUMNS_VERSION = "1"
# Tokens that an entropy is averaged over to find the least certain passage of a completion.
WINDOW = 9
LAST, LOWEST = 10, 5

# Of a completion's tokens, the one that ended it not among them:
COLUMNS = (
    "logprob_sum",
    "logprob_mean",
    "logprob_min",  # of the least likely token
    "logprob_mean_last_10",
    "logprob_mean_lowest_5",
    "entropy_mean",  # of the law that each token was drawn from
    "entropy_max",
    "entropy_mean_last_10",
    "entropy_max_window_9",  # the largest mean over a token and the eight before it, fewer at the beginning
    "entropy_at_end",  # of what would follow
    "self_certainty_mean",  # KL(uniform || law): mean over the vocabulary of -log p, less the log of its size
    "self_certainty_min",
    "logprob_of_ending",  # of the whole ending, behind the last token
    "logprob_of_ending_begun",  # of its first token
    "logprob_of_likeliest_next",  # of the likeliest token there
    "tokens",
    "tokens_below_minus_1",  # how many have a log-probability below -1
)

# Which way an untrained score of a completion points: a larger value of sign * column is taken for the better completion.
UNTRAINED = {
    "logprob_sum": 1,
    "logprob_mean": 1,
    "logprob_min": 1,
    "entropy_mean": -1,
    "entropy_max_window_9": -1,
    "self_certainty_mean": 1,
    "tokens": -1,
    "question_log_odds": 1,
}

# Scores that are turned into float32 at a time. On a CPU 4 MB: what follows stays in its cache, a third of the time of 64 MB.
SCORES_AT_A_TIME = {"cpu": 2**20}
SCORES_AT_A_TIME_OF_A_GPU = 2**26


@dataclass(frozen=True)
class TokenLaw:
    """What is known of each of T laws over the vocabulary, and of the token that was drawn from it.

    Args:
        logprob: (T,) float64, log-probability of the token, in nats.
        entropy: (T,) float64, of the law, in nats.
        certainty: (T,) float64, self-certainty: KL from the uniform law to it, in nats (Kang, Zhao and Song 2025,
            "Scalable Best-of-N Selection for Large Language Models via Self-Certainty", arXiv 2502.18581, equation 8).
        likeliest: (T,) float64, log-probability of the likeliest token.
        confidence: (T,) float64, minus the mean log-probability of the likeliest tokens, in nats, as many as were asked for; None
            where none were (the token confidence of DeepConf, arXiv 2508.15260).
    """

    logprob: NDArray[np.float64]
    entropy: NDArray[np.float64]
    certainty: NDArray[np.float64]
    likeliest: NDArray[np.float64]
    confidence: NDArray[np.float64] | None = None

    def __add__(self, other: TokenLaw) -> TokenLaw:
        """Those of one behind those of the other, both with confidences or both without."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        joined: list[Any] = [None if own is None else np.concatenate((own, more)) for own, more in pairs]
        return TokenLaw(*joined)

    def __getitem__(self, places: slice) -> TokenLaw:
        cut: list[Any] = [None if own is None else own[places] for own in vars(self).values()]
        return TokenLaw(*cut)


@dataclass(frozen=True)
class ColumnsRead:
    """What `LikelihoodColumns.read` found.

    Args:
        columns: (R, C) float64, in the order of `COLUMNS`, and of `QUESTION_COLUMNS` behind them where a question was asked.
        states: layer -> (R, D) float32, the state of the last token.
    """

    columns: NDArray[np.float64]
    states: dict[int, Tensor]


def token_law(logits: Tensor, tokens: Tensor, top: int = 0) -> TokenLaw:
    """Of every row of logits, converted a few at a time.

    Args:
        logits: (T, V) float of any type.
        tokens: (T,) int64, or (T, M) of several tokens at each place: `logprob` is then (T, M).
        top: likeliest tokens that the confidence is of; 0: none is worked out.
    """
    several = tokens.view(len(logits), -1)
    drawn = torch.empty(several.shape, dtype=torch.float64)
    found = torch.empty(4 if top else 3, len(logits), dtype=torch.float64)
    at_a_time = SCORES_AT_A_TIME.get(logits.device.type, SCORES_AT_A_TIME_OF_A_GPU)
    for rows in torch.arange(len(logits), device=logits.device).split(max(1, at_a_time // logits.shape[1])):
        log_law = logits[rows].float().log_softmax(dim=-1)
        law, summed = log_law.exp(), log_law.sum(dim=-1)
        counted = torch.full_like(summed, log_law.shape[1])
        drawn[rows.cpu()] = log_law.gather(1, several[rows]).double().cpu()
        likeliest, likely = log_law.amax(dim=-1), log_law.topk(min(top, log_law.shape[1]), dim=-1).values
        if not bool(torch.isfinite(summed).all()):  # models mask words that do not exist with -inf
            possible = torch.isfinite(log_law)
            log_law = log_law.masked_fill(~possible, 0.0)
            counted, summed = possible.sum(dim=-1), log_law.sum(dim=-1)
        entropy = -torch.linalg.vecdot(law, log_law)
        values = [entropy, -summed / counted - counted.log(), likeliest]
        if top:
            values.append(-likely.masked_fill(~torch.isfinite(likely), 0.0).sum(dim=-1) / counted.clamp(max=top))
        found[:, rows.cpu()] = torch.stack(values).double().cpu()
    return TokenLaw(drawn.view(tokens.shape).numpy(), *found.numpy())


def columns_of(law: TokenLaw, ending: float) -> NDArray[np.float64]:
    """The columns of one completion.

    Args:
        law: of its T tokens and, last, of the ending's first token: (T + 1,) each.
        ending: log-probability of the ending behind the last token, in nats.

    Returns: (C,) float64, in the order of `COLUMNS`. Of an empty completion the ending is what was said, so that it is not the
        most likely of all.
    """
    tokens = len(law.logprob) - 1
    own = law[:tokens] if tokens else TokenLaw(np.array([ending]), law.entropy, law.certainty, law.likeliest)
    summed = np.r_[np.zeros(WINDOW), own.entropy.cumsum()]
    windows = (summed[WINDOW:] - summed[:-WINDOW]) / np.minimum(np.arange(1, len(own.entropy) + 1), WINDOW)
    values = {
        "logprob_sum": own.logprob.sum(),
        "logprob_mean": own.logprob.mean(),
        "logprob_min": own.logprob.min(),
        "logprob_mean_last_10": own.logprob[-LAST:].mean(),
        "logprob_mean_lowest_5": np.sort(own.logprob)[:LOWEST].mean(),
        "entropy_mean": own.entropy.mean(),
        "entropy_max": own.entropy.max(),
        "entropy_mean_last_10": own.entropy[-LAST:].mean(),
        "entropy_max_window_9": windows.max(),
        "entropy_at_end": law.entropy[-1],
        "self_certainty_mean": own.certainty.mean(),
        "self_certainty_min": own.certainty.min(),
        "logprob_of_ending": ending,
        "logprob_of_ending_begun": law.logprob[-1],
        "logprob_of_likeliest_next": law.likeliest[-1],
        "tokens": float(tokens),
        "tokens_below_minus_1": float((own.logprob < -1).sum()),
    }
    return np.array([values[name] for name in COLUMNS], dtype=np.float64)


class LikelihoodColumns(UsesModel, OwnTokens):
    """Likelihood columns by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
        ending: token ids that end a completion where it is right to end it (a closing fence, an end of turn); None is the
            tokenizer's end of text.
        question: what is asked behind the completion; None asks nothing.
    """

    def __init__(self, model: ModelSpec, ending: Sequence[int] | None = None, question: Question | None = None) -> None:
        self.model = model
        self.question = question
        self._ending = None if ending is None else [int(token) for token in ending]

    def identity(self) -> dict[str, Any]:
        return {"columns": COLUMNS_VERSION, "model": self.model.identity(), "ending": self.ending, **law_of(self.model)}

    @property
    def behind(self) -> list[int]:
        """What is read behind every completion: the ending but for its last token, or the question."""
        if self.question is not None:
            return list(self.question.behind)
        return [] if self._ending is None else self._ending[:-1]  # the end of text is one token

    @property
    def ending(self) -> list[int]:
        """The token ids of the ending.

        Raises:
            ValueError: the tokenizer names none, and none was given.
        """
        if self._ending is None:
            end = models.load_tokenizer(self.model).tokenizer.eos_token_id
            self._ending = [] if end is None else [int(end)]
        if not self._ending:
            raise ValueError(f"{self.model.name} names no token that ends a text: give `ending`, as token ids.")
        return self._ending

    def read(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        layers: Sequence[int] = (),
    ) -> ColumnsRead:
        """One pass over completions.

        Args:
            prompts: P lists of token ids, none empty.
            completions: the completions of each prompt, token ids, without the token that ended them; R altogether. Equal ones
                of a prompt are read once.
            layers: whose states at the last token are read in the same pass.

        Raises:
            ValueError: lists of different lengths, an empty prompt, a token that the model does not know.
        """
        distinct, of_row = _distinct(prompts, completions)
        columns = np.empty((len(distinct), len(COLUMNS) + len(QUESTION_COLUMNS) * (self.question is not None)))

        def tell(row: int, law: TokenLaw, last: Tensor | None) -> None:
            columns[row, : len(COLUMNS)] = _columns(law, len(distinct[row][1]), len(self.ending))
            if self.question is not None and last is not None:
                columns[row, len(COLUMNS) :] = self.question.columns(last)[0]

        states = self._read(prompts, distinct, layers, tell)
        return ColumnsRead(columns[of_row], {layer: values[of_row] for layer, values in states.items()})

    def confidences(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], top: int
    ) -> list[NDArray[np.float64]]:
        """`TokenLaw.confidence` of every completion's tokens, in nats; of an empty one where its first would be, (1,).

        Args:
            prompts, completions: as of `read`.
            top: likeliest tokens, at least 1.
        """
        distinct, of_row = _distinct(prompts, completions)
        found: dict[int, NDArray[np.float64]] = {}

        def tell(row: int, law: TokenLaw, last: Tensor | None) -> None:
            assert law.confidence is not None  # it was asked for
            found[row] = law.confidence[: max(1, len(distinct[row][1]))]

        self._read(prompts, distinct, (), tell, top)
        return [found[row] for row in of_row]

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        distinct: Sequence[tuple[int, tuple[int, ...]]],
        layers: Sequence[int],
        tell: Callable[[int, TokenLaw, Tensor | None], None],
        top: int = 0,
    ) -> dict[int, Tensor]:
        """One pass over distinct rows, each told once: the laws of its tokens and of what is behind, and the scores at its end,
        (1, V) (None where nothing was read behind the prompt). The states are given back."""
        run, footprint, ending = self.passes.run, self.passes.footprint, self.ending
        layers = sorted({run.language_model.check_layer(layer) for layer in layers})
        owner = [p for p, _ in distinct]
        # The last token of the ending is predicted, and predicts nothing.
        rows = [[*ids, *self.behind] for _, ids in distinct]
        check_tokens([*prompts, *rows, ending], footprint.vocabulary, self.model.name)
        at_once = min(run.tokens_per_pass, MOST_TOKENS)
        states = {layer: torch.empty(len(rows), footprint.width) for layer in layers}

        def need(count: int, width: int, chosen: Sequence[int]) -> int:
            sizes = [max(1, len(rows[row])) for row in chosen]
            kept = (max(at_once, *sizes) + count) * footprint.vocabulary * footprint.bytes
            at_a_time = SCORES_AT_A_TIME.get(run.language_model.device.type, SCORES_AT_A_TIME_OF_A_GPU)
            read = footprint.reading(count, width, sizes, [*layers, run.language_model.layer_count])
            return read + kept + 4 * 4 * max(at_a_time, footprint.vocabulary)

        def work(chosen: list[int], used: list[Sequence[int]], places: list[int]) -> None:
            prefix = run.prefill(used, layers, logits=True)
            assert prefix.logits is not None  # they were asked for
            for layer in layers:  # rows that stay empty keep the state of their prompt's last token
                states[layer][chosen] = prefix.states[layer][places].float().cpu()
            for row, place in zip(chosen, places, strict=True):
                if not rows[row]:
                    begins = torch.tensor(ending, device=prefix.logits.device)
                    tell(row, token_law(prefix.logits[place][None], begins, top), None)
            for part in parts_of([len(rows[row]) for row in chosen], at_once):
                own = [chosen[r] for r in part]
                found = run.read(prefix, [rows[r] for r in own], [places[r] for r in part], layers, logits=True)
                assert found.logits is not None  # they were asked for
                device = found.logits.device
                begun = [[*distinct[row][1], *ending][0] for row in own]
                at = torch.tensor([places[r] for r in part], device=device)
                firsts = token_law(prefix.logits[at], torch.tensor(begun, device=device), top)
                # After token t of a row comes its token t + 1. Of what is behind the ending any token will do.
                after = [*ending, *self.behind[len(ending) - 1 :]]
                coming = [token for row in own for token in [*distinct[row][1], *after][1 : len(rows[row]) + 1]]
                others = token_law(found.logits, torch.tensor(coming, device=device), top)
                last = 0
                for number, row in enumerate(own):
                    first, last = last, last + len(rows[row])
                    law = firsts[number : number + 1] + others[first:last]
                    tell(row, law, found.logits[last - 1 : last])
                ends = torch.tensor([len(distinct[row][1]) for row in own])
                befores = torch.tensor([len(rows[row]) for row in own]).cumsum(0) - torch.tensor(
                    [len(rows[row]) for row in own]
                )
                said = (ends > 0).nonzero()[:, 0]
                for layer in layers:  # an empty completion's is that of its prompt, above
                    of_rows = found.states[layer][(befores + ends - 1)[said].to(device)]
                    states[layer][torch.tensor(own)[said]] = of_rows.float().cpu()

        self.passes.each(range(len(rows)), owner, prompts, need, work)
        return states


def _distinct(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[tuple[int, tuple[int, ...]]], list[int]]:
    """(prompt's place, tokens) of the different completions, and of every completion its place among them."""
    check_rows(prompts, completions)
    asked = [(p, tuple(ids)) for p, of_prompt in enumerate(completions) for ids in of_prompt]
    distinct = list(dict.fromkeys(asked))
    place = {row: number for number, row in enumerate(distinct)}
    return distinct, [place[row] for row in asked]


def _columns(law: TokenLaw, tokens: int, ending: int) -> NDArray[np.float64]:
    """Columns of one completion of some tokens from the laws of its tokens and of its ending's."""
    return columns_of(law[: tokens + 1], float(law.logprob[tokens : tokens + ending].sum()))
