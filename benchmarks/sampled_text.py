"""Write text that a model samples, for training that holds the model to itself: one document a line.

Text of every kind that the model has learned, without a dataset: as long as the student predicts such text as its base
does, nothing of the base is lost. Sampling starts from the token between documents, at temperature 1.
Run from the checkout: ``python benchmarks/sampled_text.py`` writes output/sampled.jsonl.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.duration import duration
from sparsekv_pl.storage.whole_files import replace

RARE = 3e-4
"""Tokens less likely than this are not drawn: they break off a small model's thread."""
ROWS = 128
"""Rows that are sampled together."""


def documents(model: Any, tokenizer: Any, start: str, tokens: int) -> list[str]:
    """Sample ``ROWS`` rows of ``tokens`` tokens after ``start`` and return the documents between special tokens."""
    begun = torch.full((ROWS, 1), tokenizer.convert_tokens_to_ids(start))
    ids = model.generate(
        input_ids=begun,
        attention_mask=torch.ones_like(begun),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        epsilon_cutoff=RARE,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    found = (text for row in tokenizer.batch_decode(ids) for text in ends.split(row))
    return [text for text in found if text.strip()]


def main() -> None:
    """Sample documents and write one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pretrained", default="smollm2-135m-instruct", help="the model")
    parser.add_argument("--start", default="<|endoftext|>", help="the token before a document in the model's training")
    parser.add_argument("--batches", type=int, default=2, help=f"batches of {ROWS} rows")
    parser.add_argument(
        "--tokens", type=int, default=320, help="tokens of each row; longer ones are slower by the token"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/sampled.jsonl"))
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model, tokenizer = Backbone(given.pretrained).load(trainable=False)
    if given.start not in tokenizer.get_vocab():
        parser.error(
            f"--start {given.start} is no token of {given.pretrained}: give one of its special tokens, "
            f"{', '.join(tokenizer.all_special_tokens)}"
        )
    texts, begun = list[str](), time.monotonic()
    for batch in range(1, given.batches + 1):
        texts += documents(causal_lm(model), tokenizer, given.start, given.tokens)
        left = (time.monotonic() - begun) / batch * (given.batches - batch)
        print(f"batch {batch} of {given.batches}: {len(texts)} documents, {duration(left)} left", flush=True)
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    replace(given.output, "".join(rows).encode())  # in one step: a training takes the part of a file for the whole
    print(f"{given.output}: {len(texts)} documents, {sum(len(text.split()) for text in texts):,} words")


if __name__ == "__main__":
    main()
