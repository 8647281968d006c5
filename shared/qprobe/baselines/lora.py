"""Training a LoRA adapter of a language model, with or without a head, on an objective (`objectives`).

Minimised is a mean over examples. Easy prompts have most of the successes; so that they do not dominate, an epoch takes at most
`per_prompt` examples of a prompt, drawn anew for every epoch.

A finished epoch is on the disk, and a killed training continues there with the same result as without the interruption (bit for
bit on a CPU, where as much memory is free). The folder appears whole, by rename. There is one process; nothing is sharded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from tqdm import tqdm

from qprobe import models
from qprobe.baselines.objectives import Example, Objective, digest_of
from qprobe.baselines.settings import LoRASettings
from qprobe.files import fingerprint, write_whole
from qprobe.models import adapters
from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.memory import GIB, Footprint, Passes

HEAD_FILE, _CHECKPOINT = "head.safetensors", "checkpoint.safetensors"
# As for the probes: with fewer prompts, what is held out tells too little and costs too much.
_FEWEST_TO_HOLD_OUT = 20
# Bytes of a pass there: in larger ones fresh memory costs more time than it saves.
_MOST_ON_A_CPU = 2 * GIB
# Steps that the learning rate rises for, as a share of all; it falls to 0 in the rest.
_WARM_UP = 0.05


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Args:
        folder: holds the adapter.
        rows: completions that there were to train on, before the cap of a prompt.
        prompts: that they belong to.
        empty: completions left out because they have no tokens.
        too_long: left out because of `max_tokens` or the model's context.
        train_loss: mean loss of every epoch.
        held_out_loss: after every epoch; empty where nothing was held out.
        kept_epoch: whose weights were kept, from 1.
    """

    folder: Path
    rows: int
    prompts: int
    empty: int
    too_long: int
    train_loss: list[float]
    held_out_loss: list[float]
    kept_epoch: int

    def sentence(self, name: str) -> str:
        """What was trained on, for the user."""
        loss = f"loss {self.train_loss[0]:.3f} in the first epoch, {self.train_loss[self.kept_epoch - 1]:.3f} in the one kept"
        kept = f"{self.kept_epoch} of {len(self.train_loss)}"
        why = "by held-out prompts" if self.held_out_loss else "nothing held out"
        return (
            f"{name}: trained on {self.rows} completions of {self.prompts} prompts; left out: {self.empty} empty, "
            f"{self.too_long} too long; {loss} ({kept}, {why})."
        )


def check_base(model: ModelSpec) -> None:
    """Raise, in a sentence, what can be known to fail before an adapter is trained on a model."""
    adapters.peft()
    model.source()  # a file or package that is missing
    if model.adapter is not None:
        raise ValueError(
            f"model.adapter is {model.adapter}, and a second adapter would be trained on top of it: merge the first into a model "
            "of its own, or leave out the baselines that train one."
        )


@dataclass
class _State:
    """Of a training between two epochs."""

    epoch: int = 0
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    kept_epoch: int = 0


@dataclass
class Training:
    """One training from its examples to the folder of its adapter; a finished folder is not trained again.

    Args:
        spec: of the model that is trained.
        examples: what is trained on.
        settings: how.
        folder: where the adapter is written.
        seed: of the training.
        progress: whether to show a progress bar.
        empty: examples that were left out before, for what is said at the end.
    """

    spec: ModelSpec
    examples: Sequence[Example]
    settings: LoRASettings
    folder: Path
    seed: int = 0
    progress: bool = True
    empty: int = 0

    @property
    def work(self) -> Path:
        """The folder of an unfinished training."""
        return self.folder.with_name(f".{self.folder.name}.training")

    def run(self, objective: Objective) -> Trained:
        """Train, or find what was trained.

        Raises:
            ValueError: there is nothing to train on, or `folder` holds an adapter made from other inputs.
            RuntimeError: a single example does not fit the memory, or the loss is no longer a number.
            ModuleNotFoundError: peft is missing.
        """
        self.objective = objective
        base = self.spec.identity()
        settings = {entry.name: getattr(self.settings, entry.name) for entry in dataclasses.fields(LoRASettings)}
        made_from = {"objective": objective.name, "base": base, "settings": settings, "seed": self.seed}
        self.inputs = fingerprint({**made_from, "examples": digest_of(self.examples)})
        if (done := self._finished()) is not None:
            return done
        check_base(self.spec)
        # A copy of its own: the adapter is built into it, and samplers and embedders hold the other one.
        language_model = models.load.__wrapped__(self.spec)
        rows, trained_on, held_out = self._divided(language_model)
        self.passes, self.footprint = Passes(language_model), Footprint(language_model, shared=True, tokens_per_pass=1)
        if language_model.device.type == "cpu":
            self.passes.ceiling = _MOST_ON_A_CPU
        with _seeded(self.seed, language_model.device):
            self.model = self._adapted(language_model)
            head = objective.prepare(language_model, trained_on)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if head is not None:
            self.parameters |= {f"head.{name}": p for name, p in head.named_parameters()}
        state, best = self._train(trained_on, held_out)
        self._set(best)
        counts = len(rows), len({row.prompt for row in rows}), self.empty, len(self.examples) - len(rows)
        trained = Trained(self.folder, *counts, state.train_loss, state.held_out_loss, state.kept_epoch)
        self._write(base, head, trained)
        del self.model, self.parameters
        gc.collect()  # peft's modules know each other; their memory is the next stage's
        return trained

    def _adapted(self, language_model: LanguageModel) -> Any:
        peft, chosen = adapters.peft(), self.settings.target_modules
        config = peft.LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules="all-linear" if chosen is None else list(chosen),
            task_type="CAUSAL_LM",
        )
        try:
            return peft.get_peft_model(language_model.model, config)
        except ValueError as error:
            raise ValueError(f"LoRA's target_modules {list(chosen or ())} cannot be adapted ({error}).") from error

    def _divided(self, language_model: LanguageModel) -> tuple[list[Example], list[Example], list[Example]]:
        """The examples that fit the model, and of these what is trained on and what is held out."""
        limit = min(self.settings.max_tokens, language_model.context_length or self.settings.max_tokens)
        rows = [example for example in self.examples if len(example.ids) < limit]  # one token more may end it
        if not rows:
            raise ValueError(
                f"All {len(self.examples)} completions to train on are longer than {limit} tokens with their prompts: raise "
                "max_tokens or take a model of longer context."
            )
        names = sorted({row.prompt for row in rows})
        count = round(self.settings.held_out * len(names)) if len(names) >= _FEWEST_TO_HOLD_OUT else 0
        chosen = set(np.random.default_rng([self.seed, 0]).permutation(names)[:count].tolist())
        trained_on = [row for row in rows if row.prompt not in chosen]
        return rows, trained_on, self._of_epoch([row for row in rows if row.prompt in chosen], 0)

    def _of_epoch(self, rows: Sequence[Example], epoch: int) -> list[Example]:
        """At most `per_prompt` examples of each prompt, in random order; the same for the same epoch."""
        generator = np.random.default_rng([self.seed, 1, epoch])
        by_prompt: dict[str, list[Example]] = defaultdict(list)
        for place in generator.permutation(len(rows)):
            of_prompt = by_prompt[rows[place].prompt]
            if len(of_prompt) < self.settings.per_prompt:
                of_prompt.append(rows[place])
        taken = [row for of_prompt in by_prompt.values() for row in of_prompt]
        return [taken[place] for place in generator.permutation(len(taken))]

    def _train(self, rows: Sequence[Example], held_out: Sequence[Example]) -> tuple[_State, dict[str, Tensor]]:
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.settings.learning_rate, weight_decay=0.0)
        state, best = self._continue(optimizer)
        an_epoch, epochs = len(self._of_epoch(rows, 1)), self.settings.epochs
        steps = math.ceil(an_epoch / self.settings.batch_rows)
        total, done = an_epoch * epochs, an_epoch * state.epoch
        with tqdm(total=total, initial=done, desc=self.objective.name, unit="row", disable=not self.progress) as bar:
            # It ends where an epoch was worse on held-out prompts than one before.
            while state.epoch < epochs and state.kept_epoch == state.epoch:
                state.epoch += 1
                step, sums, units = (state.epoch - 1) * steps, 0.0, 0
                of_epoch = self._of_epoch(rows, state.epoch)
                with _seeded(self.seed * 1000 + state.epoch, self.model.device):  # of the dropout
                    self.model.train()
                    for start in range(0, len(of_epoch), self.settings.batch_rows):
                        batch = of_epoch[start : start + self.settings.batch_rows]
                        for group in optimizer.param_groups:
                            group["lr"] = self.settings.learning_rate * _share(step, steps * epochs)
                        sums += self._step(batch, optimizer, bar)
                        units += self.objective.units(batch)
                        step += 1
                        bar.set_postfix(loss=f"{sums / units:.3f}", refresh=False)
                if not math.isfinite(sums):
                    raise RuntimeError(
                        f"The loss of {self.objective.name} became {sums}: lower its learning_rate, or use model.dtype=float32."
                    )
                state.train_loss.append(sums / units)
                if held_out:
                    state.held_out_loss.append(self._measure(held_out))
                if not held_out or state.held_out_loss[-1] == min(state.held_out_loss):
                    state.kept_epoch = state.epoch
                    best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
                self._keep(state, optimizer, best)
        return state, best

    def _step(self, batch: Sequence[Example], optimizer: torch.optim.Optimizer, bar: tqdm) -> float:
        """One step on a batch, in passes that fit the memory; returns the sum of its loss."""
        optimizer.zero_grad(set_to_none=True)
        parameters, units = list(self.parameters.values()), self.objective.units(batch)
        total = 0.0

        def add(chosen: list[int]) -> None:
            nonlocal total
            loss = self.objective.loss(self.model, [batch[row] for row in chosen])
            # A pass that runs out of memory is done again, so nothing is added before all of it is there.
            gradients = torch.autograd.grad(loss / units, parameters, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            total += float(loss.detach())
            bar.update(len(chosen))

        self._in_passes(batch, add)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return total

    @torch.no_grad()
    def _measure(self, rows: Sequence[Example]) -> float:
        self.model.eval()
        sums: list[float] = []
        self._in_passes(
            rows, lambda chosen: sums.append(float(self.objective.loss(self.model, [rows[row] for row in chosen])))
        )
        return sum(sums) / self.objective.units(rows)

    def _in_passes(self, rows: Sequence[Example], work: Callable[[list[int]], None]) -> None:
        """Call `work` on the numbers of some rows at a time, by an estimate of what they keep for the backward pass."""
        footprint, lengths = self.footprint, [len(row.ids) + 1 for row in rows]

        def need(chosen: Sequence[int]) -> int:
            # The adapter keeps what its layers read in float32, once more after dropout, and the mask of that.
            kept = footprint.layers * (footprint.activation + 6 * footprint.activation // footprint.bytes)
            scored = max(lengths[row] for row in chosen) - min(len(rows[row].prompt_ids) for row in chosen) + 1
            scores = scored * footprint.vocabulary * (footprint.bytes + 12)
            return len(chosen) * (max(lengths[row] for row in chosen) * kept + scores)

        self.passes.run(range(len(rows)), range(len(rows)), lengths, need, work)

    def _keep(self, state: _State, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor]) -> None:
        """Write all that the next epoch needs, whole."""
        groups: dict[str, Mapping[str, Tensor]] = {"now": self.parameters, "best": best}
        groups |= {f"adam {number}": values for number, values in optimizer.state_dict()["state"].items()}
        tensors = {
            f"{group}/{name}": values.detach().cpu().contiguous()
            for group, own in groups.items()
            for name, values in own.items()
        }
        metadata = {"inputs": self.inputs, "state": json.dumps(dataclasses.asdict(state))}
        write_whole(self.work / _CHECKPOINT, tensors_to_bytes(tensors, metadata))

    def _continue(self, optimizer: torch.optim.Optimizer) -> tuple[_State, dict[str, Tensor]]:
        """Where a training of the same inputs was interrupted, or its beginning."""
        if not (self.work / _CHECKPOINT).is_file():
            return _State(), {}
        with safe_open(self.work / _CHECKPOINT, framework="pt") as file:
            metadata = file.metadata()
            if metadata["inputs"] != self.inputs:
                return _State(), {}
            groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for key in file.keys():  # noqa: SIM118 - it is no dict
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
        if "now" not in groups:  # as an older version named them
            return _State(), {}
        self._set(groups.pop("now"))
        best = groups.pop("best", {})
        adam = {int(group.removeprefix("adam ")): values for group, values in groups.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": adam})
        return _State(**json.loads(metadata["state"])), best

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, own in values.items():
            self.parameters[name].copy_(own)

    def _finished(self) -> Trained | None:
        """What a finished folder says; None where there is none."""
        path = self.folder / adapters.BASE_FILE
        if not path.is_file():
            return None
        said = json.loads(path.read_text())
        if said["inputs"] != self.inputs:
            raise ValueError(
                f"{self.folder} holds an adapter made from other completions, settings or another model: name another folder, "
                "or delete that one to train anew."
            )
        return Trained(folder=self.folder, **said["trained"])

    def _write(self, base: Mapping[str, Any], head: nn.Module | None, trained: Trained) -> None:
        """Write the adapter's folder, whole."""
        said = dataclasses.asdict(trained)
        del said["folder"]
        more = {
            "inputs": self.inputs,
            "seed": self.seed,
            "settings": dataclasses.asdict(self.settings),
            "trained": said,
        }
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".making-") as made:
                making = Path(made) / "adapter"
                self.model.save_pretrained(making, save_embedding_layers=False)
                if head is not None:
                    plain = {name: p.detach().cpu().contiguous() for name, p in head.named_parameters()}
                    (making / HEAD_FILE).write_bytes(tensors_to_bytes(plain))
                adapters.write_base(making, base, more)
                making.replace(self.folder)
        except OSError as error:
            raise OSError(
                f"The adapter {self.folder} could not be written ({error.strerror or error}): make space and start the same "
                "command again, which continues after the last epoch."
            ) from error
        shutil.rmtree(self.work, ignore_errors=True)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed inside, the process's own untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: up in the first twentieth of the steps, then down to 0."""
    rising = max(1, round(_WARM_UP * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1))
