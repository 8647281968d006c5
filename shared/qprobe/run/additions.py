"""Candidates that were added to a file after its import: they join the run folder, and what is there is not embedded again.

The tables of an import are copies of its file, so they are written anew; rows of features and likelihoods are taken over where
prompt and completion are the same. A file that lacks something, or says otherwise, is refused with what changed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from qprobe import store
from qprobe.files import write_whole
from qprobe.prompts import Prompt
from qprobe.run.pools import Pool, Reward
from qprobe.store.table import StoreError, Table

# Says that the new rows of a run folder are whole, and that tables of the former file may go.
MARK = "adding.json"
SHOWN = 40

Key = tuple[str, str, int]  # rendered prompt, completion, and which of equal ones


@dataclass(frozen=True)
class Former:
    """What a run folder has of an import.

    Args:
        completions, rewards: by rendered prompt, in their order; rewards may be missing.
        keys: what row (task_id, sample) is.
        identity: of the table of completions.
    """

    completions: dict[str, list[str]]
    rewards: dict[str, list[float]] | None
    keys: dict[tuple[str, int], Key]
    identity: str


def take(pool: Pool, reward: Reward, rewards: Mapping[str, Sequence[float]]) -> str | None:
    """Let a run folder take a file that was added to.

    Args:
        pool: of the file as it is now, with its recorded completions.
        reward: the stage that gives the recorded rewards.
        rewards: these, by task id, in the order of the completions.

    Returns: a sentence on what was added; None where nothing was.

    Raises:
        StoreError: the file lacks something that was imported, or says otherwise; the message says what.
    """
    _recover(pool)
    if (pool.run / MARK).exists():  # an earlier call was stopped on its way
        _clear(pool, reward.name)
    former = _former(pool, reward)
    if former is None:
        return None
    rendered = {prompt.task_id: pool.sampler.render(prompt)[0] for prompt in pool.split.prompts}
    recorded = pool.split.recorded or {}
    now = {rendered[key]: list(recorded[key]) for key in pool.task_ids}
    prompts = {rendered[prompt.task_id]: prompt for prompt in pool.split.prompts}
    earned = {rendered[key]: [float(np.float32(value)) for value in rewards[key]] for key in pool.task_ids}
    if changes := _changes(former, now, earned, prompts):
        raise StoreError(
            f"{pool.run} holds another import ({'; '.join(changes)}): candidates can be added to a file, not taken away or "
            "changed. Choose another run folder, or delete this one."
        )
    tables = [
        path.parent
        for kind in ("features", "likelihoods")
        for path in (pool.run / kind / pool.name).rglob("manifest.json")
    ]
    for folder in tables:
        if store.found_table(folder).inputs.get("embedder", {}).get("embedder") == "given":
            shutil.rmtree(folder)  # copies of the user's own features, whose file has grown too
    tables = [folder for folder in tables if folder.exists()]
    moved = {folder: new for folder in tables if (new := _taken_over(folder, pool, former, rendered)) is not None}
    for folder, new in moved.items():
        aside = folder.with_name(f".{folder.name}.former")
        folder.rename(aside)
        new.rename(folder)
        shutil.rmtree(aside)
    write_whole(pool.run / MARK, b"{}\n")
    _clear(pool, reward.name)
    added = sum(map(len, now.values())) - sum(map(len, former.completions.values()))
    new_prompts = len(now) - len(former.completions)
    return (
        f"{added} candidates were added to the {sum(map(len, former.completions.values()))} of {pool.run}"
        f"{f', with {new_prompts} new prompts' if new_prompts else ''}; what is embedded stays."
    )


def _former(pool: Pool, reward: Reward) -> Former | None:
    """What is there, where it was made as this pool is and from another file."""
    folder = pool.completions.folder
    if not (folder / "manifest.json").exists() or not (pool.prompts.folder / "manifest.json").exists():
        return None
    found, prompts = store.found_table(folder, store.COMPLETIONS), store.found_table(pool.prompts.folder, store.PROMPTS)
    at = pool.rewards(reward).folder
    rewarded = (at / "manifest.json").exists()
    same = found.inputs == json.loads(json.dumps(pool.completions.inputs))
    if rewarded and same:
        same = store.found_table(at).inputs == json.loads(json.dumps(pool.rewards(reward).inputs))
    if same or not (found.parts() and prompts.parts()):
        return None
    if "recorded" not in found.inputs or found.inputs["batch_rows"] != pool.batch_rows:
        return None
    own, wanted = prompts.inputs, json.loads(json.dumps(pool.prompts.inputs))
    file_apart = [{**inputs, "prompts": None, "split": {**inputs["split"], "file": None}} for inputs in (own, wanted)]
    if file_apart[0] != file_apart[1]:
        return None
    texts = {row["task_id"]: row["prompt"] for row in prompts.read().to_pylist()}
    completions: defaultdict[str, list[str]] = defaultdict(list)
    keys = {}
    for row in sorted(found.read().to_pylist(), key=lambda row: (row["task_id"], row["sample"])):
        of_prompt = completions[texts[row["task_id"]]]
        number = of_prompt.count(row["completion"])
        keys[row["task_id"], row["sample"]] = texts[row["task_id"]], row["completion"], number
        of_prompt.append(row["completion"])
    rewards: defaultdict[str, list[float]] | None = None
    if rewarded and store.found_table(at).parts():
        rewards = defaultdict(list)
        for row in sorted(
            store.found_table(at, store.REWARDS).read().to_pylist(), key=lambda r: (r["task_id"], r["sample"])
        ):
            rewards[texts[row["task_id"]]].append(row["reward"])
    return Former(dict(completions), rewards, keys, found.identity)


def _changes(
    former: Former, now: Mapping[str, list[str]], earned: Mapping[str, list[float]], prompts: Mapping[str, Prompt]
) -> list[str]:
    """What the file no longer says, in words; empty where things were only added."""
    words = []
    if gone := [text for text in former.completions if text not in now]:
        words.append(f"{len(gone)} of {len(former.completions)} prompts are no longer there, such as {_short(gone[0])}")
    lacking: list[tuple[str, str]] = []
    others: list[tuple[str, float, float]] = []
    for text, completions in former.completions.items():
        if text not in now:
            continue
        lacking += [(text, one) for one in (Counter(completions) - Counter(now[text])).elements()]
        if former.rewards is None or len(former.rewards.get(text, [])) != len(completions):
            continue
        before = Counter(zip(completions, former.rewards[text], strict=True))
        after = Counter(zip(now[text], earned[text], strict=True))
        changed = (before - after).elements()
        others += [
            (text, reward, next(iter([r for c, r in (after - before).elements() if c == one])))
            for one, reward in changed
            if any(c == one for c, _ in (after - before).elements())
        ]
    if lacking:
        text, one = lacking[0]
        words.append(f"{len(lacking)} candidates are no longer there, such as {_short(one)} of {_of(prompts, text)}")
    if others:
        text, was, is_now = others[0]
        words.append(
            f"{len(others)} candidates have another reward, such as one of {_of(prompts, text)}: it was {was:g}, now {is_now:g}"
        )
    return words


def _of(prompts: Mapping[str, Prompt], text: str) -> str:
    return prompts[text].task_id


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _taken_over(folder: Path, pool: Pool, former: Former, rendered: Mapping[str, str]) -> Path | None:
    """A table next to another one, with those batches of the new pool whose rows are all in the old; None for a foreign table."""
    old = store.found_table(folder)
    if old.inputs.get("completions") != former.identity:
        return None
    staged = folder.with_name(f".{folder.name}.adding")
    shutil.rmtree(staged, ignore_errors=True)
    new = Table(staged, {**old.inputs, "completions": pool.completions.identity}, None)
    new.begin()
    features = "layer" in old.inputs
    rows = (old if features else store.found_table(folder, store.LIKELIHOODS)).read()
    found = list(zip(rows["task_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))
    place = {former.keys[key]: number for number, key in enumerate(found)}
    for keys in pool.batches:
        places, task_ids, samples = [], [], []
        for key in keys:
            seen = Counter[str]()
            for sample, completion in enumerate((pool.split.recorded or {})[key]):
                places.append(place.get((rendered[key], completion, seen[completion])))
                seen[completion] += 1
                task_ids.append(key)
                samples.append(sample)
        if None in places:
            continue  # it holds a new row: the stage makes it
        part = rows.take(pa.array(places))
        part = part.set_column(0, rows.schema.field(0), pa.array(task_ids, pa.string()))
        part = part.set_column(1, rows.schema.field(1), pa.array(samples, pa.int32()))
        Table(staged, new.inputs, None if features else store.LIKELIHOODS).write(keys, part)
    return staged


def _clear(pool: Pool, reward: str) -> None:
    """Remove the copies of the former file; the stages write those of the present one. The mark goes last."""
    rewards = pool.run / "rewards" / pool.name / reward
    tables: list[tuple[Path, Table | None]] = [(rewards, None)]
    tables += [(table.folder, table) for table in (pool.completions, pool.prompts)]
    for folder, wanted in tables:
        if folder.exists() and (
            wanted is None or store.found_table(folder).inputs != json.loads(json.dumps(wanted.inputs))
        ):
            aside = folder.with_name(f".{folder.name}.former")
            folder.rename(aside)  # at once: half a table would be a fault
            shutil.rmtree(aside)
    (pool.run / MARK).unlink()


def _recover(pool: Pool) -> None:
    """Finish what a call that was stopped had begun: a whole new table takes its place, what was moved aside goes."""
    for staged in list(pool.run.rglob(".*.adding")):
        folder = staged.with_name(staged.name.removeprefix(".").removesuffix(".adding"))
        if not folder.exists():
            staged.rename(folder)
    for aside in list(pool.run.rglob(".*.former")):
        shutil.rmtree(aside)
