"""Training: dialogues to rows of tokens, and a seeded run that goes on where its last checkpoint ended."""

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # type: ignore[import-not-found]  # an extra, not in the services' environment
import torch.nn.functional as functional  # type: ignore[import-not-found]
from tokenizers import Tokenizer  # type: ignore[import-not-found]

from deploy.chat_mini.architecture import Architecture
from deploy.chat_mini.corpus.dialogues import Dialogue
from deploy.chat_mini.network import hidden_states, initial_weights, rotary_table
from deploy.chat_mini.tokenizer import END_OF_TEXT, MESSAGE_END, MESSAGE_START

IGNORED = 0.0
"""Loss weight of a token that is given, not learnt: the frame of a message, padding."""


@dataclass(frozen=True)
class TrainingPlan:
    """What decides the outcome of a run. The defaults take about half an hour on two cores."""

    seed: int = 20
    steps: int = 1000
    rows_per_step: int = 8
    warm_up_steps: int = 40
    matrix_learning_rate: float = 4e-3
    other_learning_rate: float = 4e-3
    weight_decay: float = 0.05
    gradient_norm_limit: float = 1.0
    context_weight: float = 0.1
    """Loss weight of what the user and the system say, against 1 for what the assistant says."""
    checkpoint_every_steps: int = 50
    threads: int = 2


@dataclass(frozen=True)
class Rows:
    """Packed token rows, one longer than the context, and the loss weight of each token as a target."""

    tokens: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue, context_weight: float) -> tuple[list[int], list[float]]:
    """Token ids of a dialogue as the chat template writes it, and the loss weight of each; ends with END_OF_TEXT."""
    start, end = tokenizer.token_to_id(MESSAGE_START), tokenizer.token_to_id(MESSAGE_END)
    newline = tokenizer.encode("\n").ids
    ids: list[int] = []
    loss_weights: list[float] = []
    for message in dialogue:
        header = [start, *tokenizer.encode(f"{message.role}\n").ids]
        content = tokenizer.encode(message.content).ids
        spoken = 1.0 if message.role == "assistant" else context_weight
        ids += [*header, *content, end, *newline]
        loss_weights += [IGNORED] * len(header) + [spoken] * (len(content) + 1) + [IGNORED] * len(newline)
    ids.append(tokenizer.token_to_id(END_OF_TEXT))
    loss_weights.append(IGNORED)
    return ids, loss_weights


def pack_rows(
    tokenizer: Tokenizer, dialogues: Iterable[Dialogue], row_count: int, length: int, context_weight: float
) -> Rows:
    """Whole dialogues, packed into rows of `length`; each row begins with the start of a dialogue.

    Takes as many dialogues as the rows need. A dialogue that is longer than a row is left out.
    """
    padding = tokenizer.token_to_id(END_OF_TEXT)
    tokens = np.full((row_count, length), padding, np.int32)
    loss_weights = np.zeros((row_count, length), np.float32)
    encoded: Iterator[tuple[list[int], list[float]]] = (
        encode_dialogue(tokenizer, dialogue, context_weight) for dialogue in dialogues
    )
    open_rows: list[tuple[int, int]] = []  # (row, tokens in it): a dialogue goes where it fits, which wastes little
    next_row = 0
    for ids, spoken in encoded:
        if len(ids) > length:
            continue
        place = next((index for index, (_, used) in enumerate(open_rows) if used + len(ids) <= length), None)
        if place is None:
            if len(open_rows) == 8:
                open_rows.remove(max(open_rows, key=lambda entry: entry[1]))
            if next_row == row_count:
                break
            open_rows.append((next_row, 0))
            next_row += 1
            place = len(open_rows) - 1
        row, used = open_rows[place]
        tokens[row, used : used + len(ids)] = ids
        loss_weights[row, used : used + len(ids)] = spoken
        open_rows[place] = (row, used + len(ids))
    return Rows(tokens, loss_weights)


def learning_rate_share(plan: TrainingPlan, step: int) -> float:
    """The share of the peak learning rate at a step: a linear rise, then a linear fall to nearly nothing."""
    if step < plan.warm_up_steps:
        return (step + 1) / plan.warm_up_steps
    return max(0.01, (plan.steps - step) / (plan.steps - plan.warm_up_steps))


class Trainer:
    """One run: weights, optimizers and the step that comes next."""

    def __init__(self, architecture: Architecture, plan: TrainingPlan) -> None:
        torch.set_num_threads(plan.threads)
        self.architecture, self.plan, self.step, self.cpu_s = architecture, plan, 0, 0.0
        self.weights = initial_weights(architecture, plan.seed)
        matrices = [w for name, w in self.weights.items() if w.ndim == 2 and name != "token_embd.weight"]
        others = [w for name, w in self.weights.items() if w.ndim == 1 or name == "token_embd.weight"]
        self._optimizers = [
            torch.optim.Muon(
                matrices,
                lr=plan.matrix_learning_rate,
                weight_decay=plan.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=plan.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._peaks = [plan.matrix_learning_rate, plan.other_learning_rate]
        self._rotary = rotary_table(architecture, architecture.context_length)

    def loss(self, tokens: Any, loss_weights: Any) -> Any:
        """Mean cross-entropy in nats a token, weighted; both arguments are (rows, context length + 1)."""
        inputs, targets, shares = tokens[:, :-1], tokens[:, 1:], loss_weights[:, 1:]
        counted = shares > IGNORED
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = hidden_states(self.weights, self.architecture, inputs, self._rotary)
            logits = functional.linear(state[counted], self.weights["token_embd.weight"])
        losses = functional.cross_entropy(logits.float(), targets[counted], reduction="none")
        return (losses * shares[counted]).sum() / shares[counted].sum()

    def run(self, rows: Rows, checkpoint: Path, report: Callable[[str], None]) -> None:
        """Train to the end of the plan, with a checkpoint and a line to `report` now and then."""
        plan = self.plan
        order = list(range(len(rows.tokens)))
        random.Random(plan.seed).shuffle(order)  # noqa: S311  # reproducible, not secret
        recent: list[float] = []
        started = time.process_time() - self.cpu_s
        for step in range(self.step, plan.steps):
            batch = order[step * plan.rows_per_step : (step + 1) * plan.rows_per_step]
            loss = self.loss(
                torch.from_numpy(rows.tokens[batch].astype(np.int64)), torch.from_numpy(rows.loss_weights[batch])
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights.values(), plan.gradient_norm_limit)
            for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * learning_rate_share(plan, step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            if not math.isfinite(recent[-1]):
                raise FloatingPointError(f"the loss is {recent[-1]} at step {step}")
            self.step, self.cpu_s = step + 1, time.process_time() - started
            if self.step % 25 == 0 or self.step == plan.steps:
                mean = sum(recent) / len(recent)
                report(f"step {self.step}/{plan.steps}  loss {mean:.4f}  CPU {self.cpu_s / 60:.1f} min")
                recent.clear()
            if self.step % plan.checkpoint_every_steps == 0 or self.step == plan.steps:
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Write the whole state at once."""
        state = {
            "plan": asdict(self.plan),
            "architecture": asdict(self.architecture),
            "step": self.step,
            "cpu_s": self.cpu_s,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        os.replace(temporary, path)  # noqa: PTH105  # the atomic rename, named as such

    def resume(self, path: Path) -> bool:
        """Go on from a checkpoint of the same plan and architecture; False, untouched, where there is none."""
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["plan"] != asdict(self.plan) or state["architecture"] != asdict(self.architecture):
            return False
        for name, weight in self.weights.items():
            weight.data.copy_(state["weights"][name])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.cpu_s = state["step"], state["cpu_s"]
        return True

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """The weights by GGUF name, for the export."""
        return {name: weight.detach().float().numpy() for name, weight in self.weights.items()}


def first(dialogues: Iterable[Dialogue], count: int) -> list[Dialogue]:
    """The first `count` dialogues."""
    return list(itertools.islice(dialogues, count))
