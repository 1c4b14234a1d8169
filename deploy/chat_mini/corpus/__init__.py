"""The training text: intents written by hand in topics/*.txt, and the dialogues generated from them."""
