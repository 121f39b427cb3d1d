"""A hooked model held against what transformers makes of the same weights, on one plain sentence."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmsae_lib.store.artifacts import UserError
from dmsae_lib.store.atomic import explain_errors

# Relative difference at the worst position that is rounding. Measured over the architectures that agree:
# below 1e-6 in float32, up to 1.3e-2 in bfloat16, 26 layers deep; those that do not agree differ by 0.4 and
# more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
TEXT = "When it rained, the old man by the river read three books; when it did not, he wrote them."
LENGTH = 16  # tokens looked at
REMEDY = "choose a model of another architecture, such as Llama, Gemma 2, Qwen 2 or GPT-2"


class Expected(NamedTuple):
    """What transformers' own ``architecture`` computes on ``tokens`` (2, positions)."""

    architecture: str
    tokens: Tensor
    logits: Tensor  # (2, positions, vocabulary)
    outputs: dict[str, Tensor]  # by path, of every module that may be the block at the hook


def _probe(tokenizer: Any, context_size: int) -> Tensor:
    """A sentence behind BOS, (2, positions) int64; the rows differ in their last token alone."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][: min(LENGTH, context_size) - 1]
    first = [tokenizer.bos_token_id, *(ids or [tokenizer.bos_token_id])]
    other = next((token for token in first if token != first[-1]), first[-1])
    return torch.tensor([first, [*first[:-1], other]])


@torch.no_grad()
def computed(model: Any, tokenizer: Any, context_size: int, layer: int) -> Expected:
    """Before the bridge replaces the parts of ``model``.

    Keeps the output of each module that is the ``layer``-th of a list: which of them is the block is known
    once the model is bridged.
    """
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: torch.nn.Module, _: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    parts = [(path, part) for path, part in model.named_modules() if path.endswith(f".{layer}")]
    handles = [part.register_forward_hook(keep(path)) for path, part in parts]
    tokens = _probe(tokenizer, context_size).to(model.device)
    try:
        return Expected(type(model).__name__, tokens, model(tokens).logits, found)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check(model: Any, expected: Expected) -> None:
    """Hold a loaded :class:`~dmsae_lib.data.language_model.LanguageModel` against transformers.

    Raises UserError where the residual at the hook, or the logits with that residual put in again, differ,
    are not finite, or change with a later token.
    """
    start, tolerance = f"model.name is {model.config.name}:", TOLERANCE[model.config.dtype]
    kind, tokens = expected.architecture, expected.tokens
    # a KeyError for a hook or a block that is not there, whatever its parts raise where they do not fit
    with explain_errors(f"{start} TransformerLens gives no {model.hook_name} of {kind}", REMEDY):
        block = expected.outputs[f"{model.bridge.adapter.component_mapping['blocks'].name}.{model.layer}"]
        logits = model.upper(tokens, resid := model.lower(tokens))
        model.skips_below = _may_skip(model, tokens, 2 * resid.roll(1, dims=1))
    pairs = {"residuals at the hook": (resid, block), "logits": (logits, expected.logits)}
    for what, (ours, theirs) in pairs.items():
        if not theirs.isfinite().all():
            problem = f"on a plain sentence, its {what} hold NaN or Inf"
            raise UserError(f"{start} {problem}; set model.dtype to float32, or get its weights again.")
        if not (apart := _apart(ours, theirs)) <= tolerance:
            problem = f"TransformerLens does not compute {kind} as transformers does"
            raise UserError(
                f"{start} {problem} ({what}: {apart:.2g} apart, relative to their size); {REMEDY}."
            )
        # measured: 0, both rows are computed alike
        if not _apart(ours[:1, :-1], ours[1:, :-1]) <= tolerance / 10:
            problem = f"{kind} is not causal: a token changes the {what} of those before it"
            raise UserError(f"{start} {problem}; choose a model that predicts the next token.")


def _may_skip(model: Any, tokens: Tensor, other: Tensor) -> bool:
    """Whether the upper half needs nothing of the lower one but the residual, here ``other``: equal bits.

    Some architectures carry more (keys and values of lower layers, tuples); those run whole.
    """
    whole = model.upper(tokens, other)
    model.skips_below = True
    try:
        return torch.equal(model.upper(tokens, other), whole)
    except Exception:  # whatever the model's own code raises there
        return False
    finally:
        model.skips_below = False


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference at one position, relative to the norm there. Both (rows, positions, any)."""
    ours, theirs = ours.float(), theirs.float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)).max())
