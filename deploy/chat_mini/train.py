"""Training: dialogues to batches of tokens, and a seeded run that goes on where its last checkpoint ended."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
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
from deploy.chat_mini.tokenizer import MESSAGE_END, MESSAGE_START

IGNORED = 0.0
"""Loss weight of a token that is given, not learnt: the frame of a message, padding."""


@dataclass(frozen=True)
class TrainingPlan:
    """What decides the outcome of a run. The defaults take about half an hour on two cores."""

    seed: int = 20
    steps: int = 1300
    dialogues_per_step: int = 64
    tokens_per_pass: int = 2560
    """Padded tokens that go through the network at once; a step adds up the gradients of several passes."""
    warm_up_steps: int = 50
    matrix_learning_rate: float = 1e-2
    other_learning_rate: float = 4e-3
    weight_decay: float = 0.05
    gradient_norm_limit: float = 1.0
    context_weight: float = 0.1
    """Loss weight of what the user and the system say, against 1 for what the assistant says."""
    checkpoint_every_steps: int = 100
    threads: int = 2


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids of a dialogue as the chat template writes it, and the loss weight of each token as a target."""

    ids: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue, context_weight: float) -> EncodedDialogue:
    """Encode message by message, which gives the same ids as the whole text: control tokens part the messages."""
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
    return EncodedDialogue(np.array(ids, np.int32), np.array(loss_weights, np.float32))


def encode_dialogues(
    tokenizer: Tokenizer, dialogues: Iterable[Dialogue], count: int, longest: int, context_weight: float
) -> list[EncodedDialogue]:
    """The first `count` dialogues that have at most `longest` tokens."""
    encoded = (encode_dialogue(tokenizer, dialogue, context_weight) for dialogue in dialogues)
    return list(itertools.islice((dialogue for dialogue in encoded if len(dialogue.ids) <= longest), count))


def batches(dialogues: list[EncodedDialogue], tokens_per_pass: int, padding: int) -> list[tuple[Any, Any]]:
    """Tokens and loss weights as matrices of at most `tokens_per_pass` each, dialogues of like length together.

    A row holds one dialogue, so that none sees another; padding on the right has no weight.
    """
    groups: list[list[EncodedDialogue]] = [[]]
    for dialogue in sorted(dialogues, key=lambda entry: len(entry.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(dialogue.ids) > tokens_per_pass:
            groups.append([])
        groups[-1].append(dialogue)
    matrices = []
    for group in groups:
        tokens = np.full((len(group), len(group[-1].ids)), padding, np.int64)
        loss_weights = np.full(tokens.shape, IGNORED, np.float32)
        for row, dialogue in enumerate(group):
            tokens[row, : len(dialogue.ids)] = dialogue.ids
            loss_weights[row, : len(dialogue.ids)] = dialogue.loss_weights
        matrices.append((torch.from_numpy(tokens), torch.from_numpy(loss_weights)))
    return matrices


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
        """Sum of the cross-entropies in nats, each times its weight; both arguments are (rows, length)."""
        inputs, targets, shares = tokens[:, :-1], tokens[:, 1:], loss_weights[:, 1:]
        counted = shares > IGNORED
        length = inputs.shape[1]
        rotary = (self._rotary[0][:length], self._rotary[1][:length])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = hidden_states(self.weights, self.architecture, inputs, rotary)
            logits = functional.linear(state[counted], self.weights["token_embd.weight"])
        losses = functional.cross_entropy(logits.float(), targets[counted], reduction="none")
        return (losses * shares[counted]).sum()

    def _train_step(self, dialogues: list[EncodedDialogue], padding: int) -> float:
        """One update from these dialogues; returns the mean loss in nats a token."""
        total_weight = float(sum(dialogue.loss_weights.sum() for dialogue in dialogues))
        total_loss = 0.0
        for tokens, loss_weights in batches(dialogues, self.plan.tokens_per_pass, padding):
            loss = self.loss(tokens, loss_weights) / total_weight
            loss.backward()
            total_loss += loss.item()
        if not math.isfinite(total_loss):
            raise FloatingPointError(f"the loss is {total_loss} at step {self.step}")
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.plan.gradient_norm_limit)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_share(self.plan, self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total_loss

    def run(
        self, dialogues: list[EncodedDialogue], padding: int, checkpoint: Path, report: Callable[[str], None]
    ) -> None:
        """Train to the end of the plan, with a checkpoint and a line to `report` now and then."""
        plan = self.plan
        recent: list[float] = []
        started = time.process_time() - self.cpu_s
        while self.step < plan.steps:
            at = self.step * plan.dialogues_per_step
            recent.append(self._train_step(dialogues[at : at + plan.dialogues_per_step], padding))
            self.step, self.cpu_s = self.step + 1, time.process_time() - started
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
