#!/usr/bin/env python3
"""Let a trained model continue a text: proof that a run's model directory loads with transformers alone.

Usage:

    python launch/generate.py runs/fira/model --prompt "It is a truth"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def continue_text(directory: str, prompt: str, tokens: int, seed: int) -> str:
    """Prompt and up to `tokens` sampled tokens (top-k 40, temperature 0.8)."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=True, top_k=40, temperature=0.8, pad_token_id=pad
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Sample a continuation from a HF model directory.")
    parser.add_argument("directory")
    parser.add_argument("--prompt", default="It is a truth")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(continue_text(args.directory, args.prompt, args.tokens, args.seed))


if __name__ == "__main__":
    main()
