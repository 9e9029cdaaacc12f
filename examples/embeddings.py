# %% [markdown]
# # An embedding model, smaller
#
# An embedding model has no labels, and statistics need a loss. Here it is the squared distance of a text's embedding to
# a target: the embedding the model gives it now, moved a little in a random direction. The gradient of that loss tells,
# in expectation, how the embedding depends on every weight (it is the curvature of the squared distance, as of a
# regression whose labels are drawn from the model itself). So any texts will do: take those that the model will see.
#
# `MODEL` and `DATA` (a folder with a `train` and a `validation` file) can be set in the environment; `MODEL` is a BERT.

# %%
import os
from pathlib import Path

import torch
from torch.nn.functional import mse_loss, normalize
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lowrank import CompressionConfig, compress, compute_statistics
from hf_lowrank.folder.loading import resolve
from hf_lowrank.tasks import get_task, load_split
from hf_lowrank.tasks.metrics import correlation

MODEL = resolve(os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2"))
DATA = Path(os.environ["DATA"]) if "DATA" in os.environ else None
OUTPUT = os.environ.get("OUTPUT", "embeddings-small")
INCLUDE = ("encoder.*", "word_embeddings")  # half of a small model are its words; None: the linears alone
SAMPLES = int(os.environ.get("SAMPLES", "512"))
task = get_task("stsb")  # pairs of sentences and how alike they are; only the score needs the latter
tokenizer = AutoTokenizer.from_pretrained(MODEL)
torch.manual_seed(0)


# %%
def pooled(hidden, mask):
    """Sentence embeddings [batch, hidden] of unit length: the mean of the states of a sentence's tokens."""
    mask = mask[..., None].to(hidden.dtype)
    return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


class Embedder(BertModel):
    """The same model with its pooling in it, and a loss for `labels` [batch, hidden]."""

    def forward(self, attention_mask, labels=None, **inputs):
        hidden = super().forward(attention_mask=attention_mask, **inputs).last_hidden_state
        embeddings = pooled(hidden, attention_mask)
        return SequenceClassifierOutput(None if labels is None else mse_loss(embeddings, labels), embeddings)


def tokens(texts):
    """Inputs of the model for some texts."""
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


@torch.no_grad()
def embed(model, texts):
    """Embeddings [texts, hidden]."""
    batches = (tokens(texts[n : n + 32]) for n in range(0, len(texts), 32))
    return torch.cat([pooled(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])


def score(model):
    """How well the cosine of two embeddings ranks what people find alike: mean of Pearson's and Spearman's, in %."""
    rows = load_split(task, "validation", DATA)
    one, other = (embed(model, list(rows[column])) for column in task.text)
    return correlation((one * other).sum(dim=1).numpy(), rows["label"])["pearson_spearman"]


model = BertModel.from_pretrained(MODEL, dtype=torch.float32, add_pooling_layer=False)
print("dense:", score(model), "with", model.num_parameters(), "parameters")

# %% [markdown]
# ## Measure on texts alone

# %%
texts = sorted(load_split(task, "train", DATA)["sentence1"][:SAMPLES], key=len)
targets = embed(model, texts)
targets += 0.1 * torch.randn_like(targets) / targets.shape[1] ** 0.5
loader = DataLoader(range(len(texts)), 16, collate_fn=lambda n: {**tokens([texts[i] for i in n]), "labels": targets[n]})

embedder = Embedder.from_pretrained(MODEL, dtype=torch.float32, add_pooling_layer=False)
embedder.config.problem_type = "regression"
config = CompressionConfig(keep_model=float(os.environ.get("KEEP", "0.6")), include=INCLUDE)
statistics = compute_statistics(embedder, loader, config.needs, include=INCLUDE)

# %% [markdown]
# ## Compress the plain model
#
# Statistics belong to the weights that they were measured on, whatever class holds them. The plain class is the one
# that others can load.

# %%
model, report = compress(model, config, statistics)
print(report.summary())
print("low rank:", score(model))
model.save_pretrained(OUTPUT)
tokenizer.save_pretrained(OUTPUT)
