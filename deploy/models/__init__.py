"""`make model`: a model of your own, from a GGUF file or a Hugging Face directory to a served completion.

    make model FROM=<gguf file | HF directory | hub id> NAME=my-model QUANT=q4_k_m

source.py        what FROM is, and whether it can be used
conversion.py    Hugging Face → GGUF, by llama.cpp's converter in .venv-models
mixture.py       which tensor gets which type
quantization.py  GGUF → quantized GGUF; runs in .venv-triton, whose engine brings the quantizer
trial.py         loads the result and generates, before anybody is told of it; runs in .venv-triton
registration.py  the model's folder, its catalogue entry and its price; taken back when something fails
activation.py    the running stack: price, load, smoke prompt, flags
"""
