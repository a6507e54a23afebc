"""The strongest end-to-end check of alignment: one document, learnt by heart, is drafted in full.

A label shifted by one, a layer off by one or a wrong rope position cannot reach full chains.
"""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from colospec.evaluate.__main__ import main as evaluate
from tests import tiny
from tests.jobs.start import job

TTT_LENGTH = 3
LENGTH = 120


def learn_by_heart(directory, token_ids):
    """Train the target on one document until its greedy continuation is the document."""
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        loss = model(input_ids=token_ids[None], labels=token_ids[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.02
    model.save_pretrained(directory)


def test_a_draft_that_knows_one_document_reaches_full_chains(tmp_path):
    target = tiny.write_target(tmp_path / "target", vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = "\n".join(tiny.stdlib_text(3))
    token_ids = torch.tensor(tokenizer(text[2000:4000])["input_ids"])[:LENGTH]
    document = tokenizer.decode(token_ids)
    again = torch.tensor(tokenizer(document)["input_ids"])
    assert torch.equal(again, token_ids), "the cut must not split a token"
    learn_by_heart(target, token_ids)
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"text": document}) + "\n")

    job(2, "+mode=colocate", f"target.path={target}", f"data.path={data}",
        f"data.cache_dir={tmp_path}/cache", "data.max_length=256", "data.token_budget=256",
        f"draft.ttt_length={TTT_LENGTH}", "draft.draft_vocab_size=400", "trainer.lr=3e-3",
        "trainer.schedule=constant", "trainer.max_steps=300", "trainer.log_interval=100",
        f"run_dir={tmp_path}/run")  # fmt: skip

    report = tmp_path / "report.json"
    evaluate(
        ["--target", str(target), "--draft", str(tmp_path / "run" / "export"), "--prompts",
         str(data), "--prompt-tokens", "16", "--max-new-tokens", "80", "--chain-length",
         str(TTT_LENGTH), "--json", str(report), "--device", "cpu"]
    )  # fmt: skip
    (draft,) = json.loads(report.read_text())["drafters"].values()
    assert draft["greedy"]["acceptance_length"] == 1 + TTT_LENGTH
