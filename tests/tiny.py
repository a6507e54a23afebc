"""A tiny target with a tokenizer, and a tiny data set: whole jobs on them take seconds."""

import json
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stdlib_text(num_files=40):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:num_files]
    return [file.read_text(errors="ignore") for file in files]


def write_target(directory, *, hidden_size=64, num_layers=4, vocab_size=512, seed=0, **settings):
    """Save a random Qwen3 with a BPE tokenizer as a Hugging Face directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_text(8), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    torch.manual_seed(seed)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**values, **settings})).float()
    model.save_pretrained(directory)
    return Path(directory)


def overrides(root, target, data):
    """What makes a whole job of `target` and `data` tiny; its cache lies in `root`."""
    return [
        f"target.path={target}",
        f"data.path={data}",
        f"data.cache_dir={root}/cache",
        "data.max_length=300",
        "data.token_budget=512",
        "data.num_workers=1",
        "draft.ttt_length=3",
        "draft.draft_vocab_size=256",
        "trainer.lr=1e-3",
        "trainer.log_interval=1",
    ]


def write_data(file, *, num_rows=200, seed=0, max_chars=600):
    """Write JSONL rows of plain text of mixed lengths."""
    rng = random.Random(seed)
    text = "\n".join(stdlib_text(20))
    with Path(file).open("w") as out:
        for _ in range(num_rows):
            length = rng.randint(40, max_chars)
            begin = rng.randrange(len(text) - length)
            out.write(json.dumps({"text": text[begin : begin + length]}) + "\n")
    return Path(file)
