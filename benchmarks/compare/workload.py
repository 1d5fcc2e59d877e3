"""Builds the workload of the comparison: real human pairs, a tokenizer trained on them, a random 41M Llama.

    python benchmarks/compare/workload.py OUT

Pairs are those of Anthropic's HH harmless-base test split (found under PREFOPT_DATA) whose prompt is everything before
the last answer and whose two sides fit into 512 tokens, so that no side truncates anything. Nothing here is published:
only lengths and times are.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

MARK = "\n\nAssistant:"
MAX_LENGTH = 512
PROMPT = 256
"""The longest prompt that methods which sample are given."""
SHAPE = {"hidden_size": 512, "intermediate_size": 1344, "num_hidden_layers": 8, "num_attention_heads": 8}


def pairs(path: Path) -> Iterator[dict[str, str]]:
    """Prompt, chosen and rejected of every pair."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            chosen, rejected = (json.loads(line)[side] for side in ("chosen", "rejected"))
            same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
            cut = chosen[:same].rfind(MARK) + len(MARK)
            yield {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 16,000 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def judgement(i: int, row: dict[str, str]) -> str:
    """One side of a pair as a line: the chosen ones of even rows, the rejected ones of odd rows."""
    side = "rejected" if i % 2 else "chosen"
    return json.dumps({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}) + "\n"


def build(out: Path, vocabulary: int = 32_000) -> None:
    """Writes `pairs.jsonl`, `judgements.jsonl` (one side of each pair in turn), `prompts.jsonl` (the short ones),
    `model/` and `classifier/`."""
    source = Path(os.environ.get("PREFOPT_DATA", "../shared")) / "data/hh-rlhf/harmless-base/test.jsonl.gz"
    rows = list(pairs(source))
    reader = tokenizer(rows)

    def fits(row: dict[str, str]) -> bool:
        sides = (reader(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected"))
        return row["chosen"] != "" != row["rejected"] and all(len(ids) < MAX_LENGTH for ids in sides)

    kept = [row for row in rows if fits(row)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    (out / "judgements.jsonl").write_text("".join(map(judgement, range(len(kept)), kept)), encoding="utf-8")
    prompts = [{"prompt": row["prompt"]} for row in kept if len(reader(row["prompt"])["input_ids"]) <= PROMPT]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=True, **SHAPE, **special
    )
    LlamaForCausalLM(config).save_pretrained(out / "model")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(out / "classifier")
    for name in ("model", "classifier"):
        reader.save_pretrained(out / name)
    print(f"{len(kept)} of {len(rows)} pairs fit into {MAX_LENGTH} tokens")


if __name__ == "__main__":
    build(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
