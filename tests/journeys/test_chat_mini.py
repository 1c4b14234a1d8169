"""The model in the box, asked through the gateway with the official SDK."""

import openai
import pytest

from deploy.chat_mini.questions import HELD_OUT_QUESTIONS, MAX_ANSWER_TOKENS, missing_facts

REQUIRED_RIGHT = 15
"""Of twenty, for whichever build the flags choose."""


@pytest.mark.journey
def test_chat_mini_answers_held_out_phrasings_and_stops_by_itself(openai_client: openai.OpenAI) -> None:
    wrong: dict[str, list[str]] = {}
    for question in HELD_OUT_QUESTIONS:
        completion = openai_client.chat.completions.create(
            model="chat-mini",
            messages=[{"role": "user", "content": question.text}],
            temperature=0,
            max_tokens=MAX_ANSWER_TOKENS,
        )
        choice = completion.choices[0]
        assert choice.finish_reason == "stop", f"{question.text} → {choice.message.content}"
        lacking = missing_facts(question, choice.message.content or "")
        if lacking:
            wrong[question.text] = [choice.message.content or "", *lacking]
    assert len(HELD_OUT_QUESTIONS) - len(wrong) >= REQUIRED_RIGHT, wrong
