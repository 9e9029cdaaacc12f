# %% [markdown]
# # A language model, smaller
#
# As for a classifier; the score is the perplexity, the smaller the better. A language model uses its weights for
# everything that it knows, so it bears less than one fine-tuned for a task: begin with nine tenths.
#
# `MODEL`, `TASK` and `DATA` can be set in the environment:
# `MODEL=./stories260k TASK=tinystories DATA=./tinystories python examples/language_model.py`

# %%
import os

from hf_lowrank import Pipeline

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M")
OUTPUT = os.environ.get("OUTPUT", "language-model-small")
SAMPLES = int(os.environ.get("SAMPLES", "128"))
language = Pipeline.load(
    MODEL, os.environ.get("TASK", "wikitext2"), os.environ.get("DATA"), samples=SAMPLES, batch_size=4
)
print("dense:", language.score()["score"])

# %%
report = language.compress(keep_model=float(os.environ.get("KEEP", "0.9")))
print(report.summary())
print("low rank:", language.score()["score"])

# %% [markdown]
# ## Where the ranks went
#
# A layer that is better dense stays dense.

# %%
for layer in report.layers[:8]:
    print(layer.name, layer.rank or "dense")

# %%
language.save(OUTPUT, overwrite=True)
words = language.tokenizer("Once upon a time", return_tensors="pt")
answer = language.model.generate(**words, max_new_tokens=20, do_sample=False)
print(language.tokenizer.decode(answer[0], skip_special_tokens=True))
