# %% [markdown]
# # A classifier, smaller
#
# Takes a fine-tuned classifier, measures on some of its training data what its task depends on, and stores its linear
# layers as products of two thin ones. What comes out is an ordinary model of transformers.
#
# `MODEL`, `TASK` and `DATA` (a folder with train and validation files; without it from the Hub) can be set in the
# environment: `MODEL=./bert-stsb TASK=stsb DATA=./stsb python examples/classifier.py`

# %%
import os

from transformers import pipeline

from hf_lowrank import Pipeline

MODEL = os.environ.get("MODEL", "distilbert/distilbert-base-uncased-finetuned-sst-2-english")
OUTPUT = os.environ.get("OUTPUT", "classifier-small")
classifier = Pipeline.load(MODEL, os.environ.get("TASK", "sst2"), os.environ.get("DATA"))
print("dense:", classifier.score()["score"])

# %% [markdown]
# ## Measure and compress
#
# `keep_model=0.6` keeps 60% of the parameters of the whole model. Statistics are of one to two thousand training
# samples, more of short texts and wide models: one pass forward and back for each.

# %%
report = classifier.compress(keep_model=float(os.environ.get("KEEP", "0.6")))
print(report.summary())
print("low rank:", classifier.score()["score"])

# %% [markdown]
# ## Save it, and load it as any other model
#
# With `import hf_lowrank` the Auto classes and pipelines know it; without, `trust_remote_code=True` does.

# %%
classifier.save(OUTPUT, overwrite=True)
classify = pipeline("text-classification", OUTPUT)
print(classify("A warm, funny and engaging film."))
