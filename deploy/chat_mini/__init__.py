"""chat-mini, the demo model in the box: corpus, tokenizer, trainer, GGUF export and evaluation.

`python -m deploy.chat_mini build` runs all of it. Needs the packages of requirements/chat-mini.in, which are in no
service's lock; `questions` alone needs nothing but the standard library.
"""
