"""Direct effects on logits and nearest latents, against plain loops."""

import pytest
import torch
from builders.sae import make_sae, random

from dmsae_lib.atlas.latents import Shown, nearest
from dmsae_lib.atlas.measure import LOGIT_BINS, WORDS, logits_of
from dmsae_lib.report.examples import direct_logits


def test_direct_effects_are_decoder_row_times_norm_times_unembedding(tiny_llama):
    rows = random(2, tiny_llama.d_model)
    gain = tiny_llama.bridge.ln_final.original_component.weight.float()
    unembedding = tiny_llama.bridge.W_U.float()
    for row, found in zip(rows, direct_logits(rows, tiny_llama)):
        expected = torch.stack([(row * gain) @ column for column in unembedding.T])
        assert torch.allclose(found, expected - expected.mean(), atol=1e-4)


def test_the_strongest_effects_of_either_sign_and_their_spread():
    effects = random(50, seed=3)
    found = logits_of(effects, lambda ids: [f"<{i}>" for i in ids])
    order = sorted(range(50), key=lambda i: -effects[i])
    assert [text for text, _ in found["raises"]] == [f"<{i}>" for i in order[:WORDS]]
    assert [text for text, _ in found["lowers"]] == [f"<{i}>" for i in order[::-1][:WORDS]]
    for text, value in found["raises"] + found["lowers"]:
        assert value == pytest.approx(float(effects[int(text[1:-1])]), rel=5e-3)
    assert sum(found["histogram"]["counts"]) == 50 and len(found["histogram"]["counts"]) == LOGIT_BINS


def test_the_nearest_latent_is_another_one_of_each_core():
    sae = make_sae().folded(1.0)
    one, other, free = (
        Shown(name, role, "ReLU", sae, [{"id": f"c0:{i}", "index": i} for i in indices], {})
        for name, role, indices in (
            ("a", "core", range(4)),
            ("b", "core", range(2, 7)),
            ("a", "free", [9, 11]),
        )
    )
    found = nearest([one, other, free])
    for group, near in zip((one, other, free), found):
        for i, mine in enumerate(near):
            row = sae.W_enc[:, group.indices[i]]
            for core, entry in zip((one, other), mine):
                cosines = {
                    latent["id"]: float(torch.cosine_similarity(row, sae.W_enc[:, latent["index"]], dim=0))
                    for latent in core.latents
                    if core is not group or latent is not group.latents[i]
                }
                best = max(cosines, key=lambda name: abs(cosines[name]))
                assert (entry["group"], entry["id"]) == (core.name, best)
                assert entry["cosine"] == pytest.approx(cosines[best], abs=1e-3)
