"""How long greedy decoding takes beside transformers, with the same weights on one thread: `make bench`.

128 new tokens after a prompt of 128, the tiny preset. Everybody runs once per round, in turns; a ratio is the median of
the ratios within a round. Ours is timed with compiled kernels and without.
"""

from functools import partial

import torch
import transformers
from rounds import interleaved, report
from transformers.utils import logging

import deepseek_lab as lab
from deepseek_lab.generation import generate

ROUNDS = 9
NEW_TOKENS = 128
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def test_generation(one_thread, tmp_path, monkeypatch):
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = lab.model.Transformer(lab.PRESETS["tiny"]).eval()
    lab.model.save_hf(model, tmp_path)
    published = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    print(f"\ntransformers chooses {published.config._experts_implementation} by itself")
    prompt = torch.randint(256, (1, 128))

    def ours(kernels):
        monkeypatch.setenv("LAB_KERNELS", kernels)
        return generate(model, prompt, NEW_TOKENS)

    @torch.inference_mode()
    def theirs(implementation):
        published.set_experts_implementation(implementation)
        return published.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)

    runs = {f"ours, {name}": (ours, name) for name in ("numba", "reference")}
    runs |= {f"transformers, {name}": (theirs, name) for name in IMPLEMENTATIONS}
    texts = [run(setting) for run, setting in runs.values()]  # also compiles and warms up
    assert all(torch.equal(text, texts[0]) for text in texts)
    report(interleaved({name: partial(run, setting) for name, (run, setting) in runs.items()}, ROUNDS))
