"""Our attention for a model: registered with transformers under the name "headwise", and nothing else changed.

For any cache but ours it is transformers' SDPA. With a RaggedCache it is SDPA during prefill, so that prefill is exact,
after which the layer is told what passed; once a layer is frozen, its own kernel does the attention.
"""

import warnings

from transformers import PreTrainedModel

from headwise.models.families import ModelView, view
from headwise.models.interface import NAME, register
from headwise.models.passes import tell_caches

_SAME = (NAME, "sdpa")  # what gives the results of SDPA


def enable(model: PreTrainedModel | ModelView) -> None:
    """Route the model's attention through headwise. Only our caches notice: for every other cache it is SDPA.

    Making a RaggedCache does this. Call it yourself after another attention implementation was set. The model also
    tells our caches of its forward passes from then on (passes.py).

    Raises
    ------
    BadInput, UnsupportedModel
        The model is none that can be served.

    Warns
    -----
    UserWarning
        Attention was neither SDPA nor headwise before: results and speed change.
    """
    model_view = view(model)
    model, anatomy = model_view.model, model_view.anatomy
    before = model.config.get_text_config()._attn_implementation
    if before not in _SAME and not (before == "eager" and anatomy.special):
        warnings.warn(
            f"this model's attention was {before!r}; with headwise it goes through SDPA from now on, whatever the "
            f"cache. Call model.set_attn_implementation({before!r}) when you are done with headwise's caches.",
            UserWarning,
            stacklevel=2,
        )
    register()
    if not is_enabled(model):
        model.set_attn_implementation(NAME)
    tell_caches(model)


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through headwise."""
    return model.config.get_text_config()._attn_implementation == NAME
