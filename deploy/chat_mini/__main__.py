"""`python -m deploy.chat_mini build`: corpus, tokenizer, training, both GGUF files and their score.

`evaluate` scores the files that are there; `ask <question>` lets one of them answer; `corpus` prints dialogues.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

from deploy.chat_mini.architecture import Architecture
from deploy.chat_mini.corpus.dialogues import DialogueSource

ROOT = Path(__file__).resolve().parents[2]
BUILDS = {"Q8_0": "chat-mini-q8_0", "Q4_K_M": "chat-mini-q4_k_m"}
REQUIRED_RIGHT = {"Q8_0": 16, "Q4_K_M": 15}
"""Right answers of twenty that each build must give."""

TOKENIZER_DIALOGUES = 12_000
TOKENIZER_SEED = 7


def model_path(quantization: str) -> Path:
    """Where the model repository holds the file of a quantization."""
    return ROOT / "triton_models" / BUILDS[quantization] / "1" / "model.gguf"


def report(line: str) -> None:
    """One line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def build(work: Path) -> int:
    """The whole way from the intents to two scored files; goes on from the last checkpoint in `work`."""
    # Idle threads sleep instead of spinning, which halves the CPU time on a busy machine; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported here: the other commands work without torch.
    from deploy.chat_mini.export import export_gguf
    from deploy.chat_mini.tokenizer import END_OF_TEXT, read_vocabulary, train_tokenizer
    from deploy.chat_mini.train import Trainer, TrainingPlan, encode_dialogues

    architecture, plan = Architecture(), TrainingPlan()
    work.mkdir(parents=True, exist_ok=True)
    report(f"tokenizer: {architecture.vocabulary_size} tokens from {TOKENIZER_DIALOGUES} dialogues")
    sample = itertools.islice(DialogueSource(TOKENIZER_SEED), TOKENIZER_DIALOGUES)
    tokenizer = train_tokenizer(
        (message.content for dialogue in sample for message in dialogue), architecture.vocabulary_size
    )
    count = plan.steps * plan.dialogues_per_step
    report(f"corpus: {count} dialogues")
    dialogues = encode_dialogues(
        tokenizer, DialogueSource(plan.seed), count, architecture.context_length, plan.context_weight
    )
    trainer = Trainer(architecture, plan)
    checkpoint = work / "checkpoint.pt"
    if trainer.resume(checkpoint):
        report(f"resumed at step {trainer.step}")
    report(f"training: {architecture.parameter_count():,} parameters, {plan.steps} steps")
    trainer.run(dialogues, tokenizer.token_to_id(END_OF_TEXT), checkpoint, report)
    for quantization in BUILDS:
        path = model_path(quantization)
        errors = export_gguf(path, quantization, architecture, read_vocabulary(tokenizer), trainer.arrays())
        report(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
        for error in errors:
            print(f"    {error.name:<28} {error.storage:<5} RMSE {error.rmse:.6f}  relative {error.relative_rmse:.4f}")
    return evaluate_builds()


def evaluate_builds() -> int:
    """Score both files; 0 when both reach what is required, else 1."""
    from deploy.chat_mini.evaluate import evaluate

    status = 0
    for quantization, required in REQUIRED_RIGHT.items():
        verdicts = evaluate(model_path(quantization))
        right = sum(verdict.is_right for verdict in verdicts)
        for verdict in verdicts:
            print(f"  {'right' if verdict.is_right else 'WRONG'}  {verdict.question.text}")
            print(f"         {verdict.answer.text}")
            if not verdict.is_right:
                print(f"         {verdict.answer.finish_reason}; lacks {', '.join(verdict.missing)}")
        report(f"{quantization}: {right} of {len(verdicts)} right, {required} required")
        status |= right < required
    return status


def ask(quantization: str, question: str) -> int:
    """Print the greedy answer to one question."""
    from deploy.chat_mini.evaluate import Engine

    answer = Engine(model_path(quantization)).ask(question)
    print(answer.text)
    return 0


def print_corpus(count: int, seed: int) -> int:
    """Print dialogues as JSON lines."""
    for _, dialogue in zip(range(count), DialogueSource(seed), strict=False):
        print(json.dumps([{"role": message.role, "content": message.content} for message in dialogue]))
    return 0


def main() -> int:
    """Parse the command line and run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.chat_mini", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="train and write both GGUF files")
    build_parser.add_argument("--work", type=Path, default=ROOT / ".tollgate" / "chat-mini", help="for checkpoints")
    commands.add_parser("evaluate", help="score the files of the model repository")
    ask_parser = commands.add_parser("ask", help="answer one question")
    ask_parser.add_argument("--quantization", choices=sorted(BUILDS), default="Q8_0")
    ask_parser.add_argument("question")
    corpus_parser = commands.add_parser("corpus", help="print dialogues as JSON lines")
    corpus_parser.add_argument("--count", type=int, default=10)
    corpus_parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "build":
        return build(arguments.work)
    if arguments.command == "evaluate":
        return evaluate_builds()
    if arguments.command == "ask":
        return ask(arguments.quantization, arguments.question)
    return print_corpus(arguments.count, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
