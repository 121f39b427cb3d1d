"""A small atlas with hostile text in it, made without a model."""

from typing import Any

HOSTILE = [
    "</script><script>window.ran = 1</script>",
    "<img src=https://example.org/x onerror='window.ran = 2'>",
    "\u202edesrever\u202c",
    "\x00\x1b[31m\x07",
    "\u2028\u2029\ufeff\u200b",
    "\ud83d",
    "{{ 7 * 7 }} & &amp; \"'`",
]
WORDS = [" the", " cat", " sat", "\n", "\t", " Häuser", " שלום", "."]
TOKENS = ["<bos>", *WORDS, *HOSTILE]
ROW = 20
GROUPS = [("main", "main", "core"), ("main-free", "main", "free"), ("other", "other", "core")]


def _latent(group: str, n: int, ids: list[str]) -> dict[str, Any]:
    contexts = []
    for tenth in range(10, 0, -1):
        values = [float((tenth + i + n) % 11) for i in range(6)]
        values[3] = float(tenth)
        contexts.append(
            {"tenth": tenth, "row": (n + tenth) % 4, "start": 1 + n % 9, "at": 4 + n % 9, "values": values}
        )
    history = (
        []
        if group == "main-free"
        else [{"cycle": t, "share": 0.1, "frequency": 0.5} for t in range(n % 3, 3)]
    )
    near = {"group": "main", "id": ids[0] if ids[0] != f"c{n % 3}:{n}" else ids[1], "cosine": -0.25}
    free = group == "main-free"
    return {
        "group": group,
        "id": f"c2:{n}" if free else f"c{n % 3}:{n}",
        "index": n,
        "first_cycle": history[0]["cycle"] if history else None,
        "share": 0.3 / (1 + n),
        "history": history,
        "active": 55,
        "tokens": 76,
        "frequency": (n + 1) / 10,
        "max": 10.0,
        "histogram": [0, 55, 0],
        "tenths": [[t + 0.0, t + 1.0] for t in range(10)],
        "contexts": contexts,
        "by_token": [[HOSTILE[n % len(HOSTILE)], 3.0, 5], [" cat", 2.0, 7]],
        "logits": {
            "raises": [[HOSTILE[(n + 1) % len(HOSTILE)], 1.5], [" cat", 1.0]],
            "lowers": [[" sat", -1.0]],
            "histogram": {"counts": [3, 9, 4], "low": -1.0, "high": 2.0},
        },
        "nearest": [near],
        "ablation": {"change": 0.01, "interval": [0.0, 0.02], "contexts": 4} if group != "other" else None,
    }


def hostile_atlas() -> dict[str, Any]:
    """Three groups of five latents; every hostile string stands in contexts, effects and means."""
    ids = [f"c{n % 3}:{n}" for n in range(5)]
    text = [[0, *((i * 7 + row * 3) % (len(TOKENS) - 1) + 1 for i in range(ROW - 1))] for row in range(4)]
    return {
        "config": "toy",
        "model": "<b>toy</b>",
        "hook": "blocks.1.hook_resid_post",
        "data": "embedded",
        "cycles": 2,
        "k": 4,
        "d_in": 8,
        "d_sae": 64,
        "context_size": ROW,
        "n_contexts": 4,
        "tokens": TOKENS,
        "text": text,
        "groups": [
            {"name": name, "chain": chain, "role": role, "kind": "ReLU"} for name, chain, role in GROUPS
        ],
        "latents": [_latent(group, n, ids) for group, *_ in GROUPS for n in range(5)],
    }
