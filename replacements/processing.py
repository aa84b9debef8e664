"""What TransformerLens does to a model's weights when it loads it, for dictionaries that were trained on the result.

`circuits.processing` undoes it: it needs the weights. Source: TransformerLens, `HookedTransformer.process_weights_`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Processing:
    """Which steps were taken; none of them changes the model's logits, all but the last change activations.

    fold_norm
        Gains and biases of the norms went into the weights that read them: normalised activations lack both.
    center_writing_weights
        Embeddings and what sublayers write have mean zero over the model's width (LayerNorm models only).
    fold_value_biases
        Value biases went into the output bias of attention: `z` lacks them.
    center_unembed
        Logits have mean zero over the vocabulary.
    """

    fold_norm: bool = False
    center_writing_weights: bool = False
    fold_value_biases: bool = False
    center_unembed: bool = False
