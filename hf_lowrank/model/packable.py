"""A model → the layers whose weights quantizers may round: those of its body that nothing else shares."""

from torch import nn
from transformers import PreTrainedModel


def packable(model: PreTrainedModel) -> dict[str, nn.Linear | nn.Embedding]:
    """Linear layers, factors among them, and embeddings by name; none outside of the body, and none that is tied."""
    tied = {key.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for key in pair}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and name.startswith(prefix) and name not in tied
    }
