"""The README's results: a block of Markdown written from results/ alone, so that its numbers cannot go
stale."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from dmsae_lib.report.claims import judged_chains
from dmsae_lib.report.equal_l0 import advantage, per_unit
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS, PLURAL, by_k, kind_name, kinds, label, lines, units
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.store.atomic import write_text

BEGIN, END = "<!-- results: written by `make publish` -->", "<!-- end of results -->"
BETTER = {1: "higher", -1: "lower", 0: "neither"}
MATCHED = {"cores": "distilled cores", "plain": "first latents of plain SAEs", "random": "random rows"}
OF_CHAINS = ("R1", "R5", "R6", "R13")  # answers that several chains give better than one
Row = dict[str, Any]


def _table(head: list[str], rows: Iterable[Iterable[Any]], left: int = 1) -> list[str]:
    """A table whose first ``left`` columns are text, and an empty line after it."""
    first, *others = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)
    ]
    return [first, "|" + ":--|" * left + "--:|" * (len(head) - left), *others, ""]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(rows: list[Row], value: Callable[[Row], float | None], digits: int = 4) -> str:
    """Over chains where there are several, else over training seeds."""
    found = units(rows, value)[0]
    return _number(fmean(found) if found else None, digits)


def _signed(value: float, interval: list[float] | None, digits: int) -> str:
    shown = [f"{number:+.{digits}f}" for number in (value, *(interval or ()))]
    return shown[0] + (f" [{shown[1]}, {shown[2]}]" if interval else "")


def _gates(summary: Row) -> list[str]:
    bound = {
        row["gate"]: "-" if row["bound"] is None else f"< {row['bound']:.3g}" for row in summary["regime"]
    }
    return _table(
        ["gate", "value", "bound"],
        (
            [row["gate"], f"{row['value']:.3f}", bound[row["gate"]] + ("" if row["ok"] else ", **not met**")]
            for row in summary["regime"]
        ),
    )


def _core_eval(summary: Row) -> str:
    """sae_bench's loss of the bare model, which is another one."""
    losses = [
        row["saebench"]["ce_loss_without_sae"]
        for row in summary["retrain"]
        if "ce_loss_without_sae" in (row["saebench"] or {})
    ]
    return (
        f" sae_bench's core eval gives {losses[0]:.2f}, since it counts BOS among what is to be predicted."
        if losses
        else ""
    )


def _rule(sweep: Row) -> str:
    return "none" if sweep["chosen"] is None else f"{sweep['chosen']:g}"


def _rates(sweep: Row) -> list[str]:
    """What the core adds to the loss by learning rate, and what each kind of SAE leaves rare."""

    def of(lr: float, kind: bool, key: str, digits: int) -> str:
        return f"{fmean(row[key] for row in sweep['rows'] if (row['lr'], row['with_core']) == (lr, kind)):.{digits}f}"

    return _table(
        [
            "rate without core",
            "with",
            "loss increase without core",
            "with",
            "difference",
            "rare latents without",
            "with",
        ],
        (
            [
                f"{row['lr']:.4g}",
                f"{row['lr_core']:.4g}",
                of(row["lr"], False, "loss_increase", 4),
                of(row["lr_core"], True, "loss_increase", 4),
                _signed(row["difference"], row["interval"], 4),
                of(row["lr"], False, "rare", 2),
                of(row["lr_core"], True, "rare", 2),
            ]
            for row in sweep["core"]
        ),
        0,
    )


def _cycles(summary: Row) -> list[str]:
    placebos = sorted({kind for row in summary["cycles"] for kind in row["placebos"]})
    head = [
        "cycle",
        "core in",
        "kept",
        *(f"placebo kept: {ARMS[kind][0]}" for kind in placebos),
        "new",
        "core out",
        "core L0 / k",
        "rare latents",
        "FVU",
        "loss increase",
    ]
    return _table(
        head,
        (
            [
                row["cycle"],
                row["core_in"],
                row["kept"],
                *(row["placebos"][kind]["kept"] if kind in row["placebos"] else "-" for kind in placebos),
                row["core_out"] - row["kept"],
                row["core_out"],
                f"{row['core_share']:.2f}",
                f"{row['rare']:.1%}",
                f"{row['fvu']['full']:.4f}",
                f"{row['loss_increase']['full']:.4f}",
            ]
            for row in summary["cycles"]
        ),
        0,
    )


def _claims(summary: Row) -> list[str]:
    return _table(
        ["claim", "verdict", "numbers"],
        (
            [f"{name}: {claim['claim']}", f"**{claim['verdict']}**", claim["detail"]]
            for name, claim in summary["claims"].items()
        ),
        3,
    )


def _chains(summary: Row) -> list[str]:
    """One line per distillation chain, the main one's replicates first."""
    settings = {"main": summary["sizes"] | {"seed": summary["inputs"]["seed"]}} | summary["chains"]
    cycles = {"main": summary["cycles"]} | {
        name: chain["cycles"] for name, chain in summary["chains"].items()
    }
    order = [name for kind in kinds(summary) for name in kind.chains]
    return _table(
        [
            "chain",
            "core",
            "seed",
            "core size by cycle",
            "core L0 / k at the end",
            "loss increase, cycle 0",
            "last",
        ],
        (
            [
                name,
                kind_name(settings[name]),
                settings[name]["seed"],
                " ".join(str(row["core_out"]) for row in rows),
                f"{rows[-1]['core_share']:.2f}",
                *(f"{rows[t]['loss_increase']['full']:.4f}" for t in (0, -1)),
            ]
            for name in order
            for rows in [cycles[name]]
        ),
        4,
    )


def _identity(summary: Row) -> list[str]:
    rows = []
    for kind, name in MATCHED.items():
        mine = [row for row in summary["identity"] if row["kind"] == kind]
        shown = [
            [row[key] for row in mine if row[key] is not None]
            for key in ("cosine", "cosine_above", "activation", "activation_above", "span", "span_chance")
        ]
        rows.append([name, *(_number(fmean(values) if values else None, 3) for values in shown)])
    return _table(
        [
            "of two chains",
            "matched |cosine|",
            "share above .7",
            "correlation of matched activations",
            "share above .7",
            "span overlap",
            "chance",
        ],
        rows,
    )


def _controls(summary: Row) -> list[str]:
    """The main chain's kind of core and its controls at the distillation k."""
    k, rows, found = summary["sizes"]["k"], kinds(summary)[0].rows, []
    for arm in ARMS:
        if mine := [row for row in rows if (row["arm"], row["k"]) == (arm, k)]:
            gains = per_unit(advantage(rows, arm, k, "loss_increase"))[0] if arm != "none" else []
            found.append(
                [
                    label(arm, summary),
                    len(units(mine, lambda row: row["fvu"])[0]),
                    _mean(mine, lambda row: (row["core_rows"] or {}).get("rank"), 1),
                    _mean(mine, lambda row: row["L0"]["core"], 1),
                    _mean(mine, lambda row: row["L0"]["total"], 1),
                    _mean(mine, lambda row: row["fvu"]),
                    _mean(mine, lambda row: row["loss_increase"]),
                    _signed(fmean(gains), t_interval(gains), 4) if gains else "-",
                    _mean(mine, lambda row: row["rare"], 2),
                    *(
                        _mean(mine, lambda row, key=key: row["frequency_correlation"][key], 3)
                        for key in ("before", "next_k")
                    ),
                ]
            )
    return _table(
        [
            "core",
            "n",
            "rank",
            "core L0",
            "total L0",
            "FVU",
            "loss increase",
            "minus baseline at measured L0",
            "rare latents",
            "frequency as in the cycle before",
            "as at the next k",
        ],
        found,
    )


def _retrained(summary: Row) -> list[str]:
    """By k: the baseline, and the distilled core of each kind."""
    groups = [
        (k, name, rows)
        for (name, *_), mine in lines(summary, ["none", "distilled"])
        for k, rows in by_k(mine).items()
    ]
    head = [
        "k",
        "SAE",
        "n",
        "core L0",
        "total L0",
        "FVU",
        "loss increase",
        "loss recovered, zero ablation",
        "mean ablation",
    ]
    return _table(
        head,
        (
            [
                k,
                name + (" (unbound)" if any(row["unbound"] for row in rows) else ""),
                len(units(rows, lambda row: row["fvu"])[0]),
                _mean(rows, lambda row: row["L0"]["core"], 1),
                _mean(rows, lambda row: row["L0"]["total"], 1),
                *(
                    _mean(rows, lambda row, key=key: row[key])
                    for key in ("fvu", "loss_increase", "loss_recovered", "loss_recovered_mean")
                ),
            ]
            for k, name, rows in sorted(groups, key=lambda group: group[0])
        ),
        2,
    )


def _probes(summary: Row) -> list[str]:
    """Sparse probing of the main chain, and what needs no SAE."""
    tops = [
        key
        for key in ("probe_top1", "probe_top5")
        if any(key in (row["saebench"] or {}) for row in summary["retrain"])
    ]
    if not tops or not (without := summary["probing_baselines"]):
        return []
    drawn = lines(summary, wanted=lambda row: tops[0] in (row["saebench"] or {}))
    found = [
        f"Sparse probing, mean accuracy of {without['n_sets']} sets ({len(without['dropped'])} more, which "
        "a dense probe cannot do, are left out) over n training seeds; without an SAE: dense probe "
        f"{without['dense']:.3f}, best single channel {without['best_channel']:.3f}, larger class "
        f"{without['majority']:.3f}.",
        "",
    ]
    return found + _table(
        ["SAE", "k", "n", *(f"top {key[9:]}" for key in tops)],
        (
            [
                name,
                k,
                len(rows),
                *(_mean(rows, lambda row, key=key: row["saebench"].get(key)) for key in tops),
            ]
            for (name, *_), mine in drawn
            for k, rows in by_k(mine).items()
        ),
    )


def _differences(summary: Row) -> list[str]:
    """One line per metric and k up to the distillation k: the claim is about low k."""
    rows = [row for row in summary["differences"] if row["k"] <= summary["sizes"]["k"]]
    return _table(
        ["metric (better)", "k", "over training seeds", "n", "sign", "over evaluation seeds"],
        (
            [
                f"{row['label']}{' †' * row['doubted']} ({BETTER[row['better']]})",
                row["k"],
                _signed(row["value"], row["interval"], 3),
                row["n"],
                row["sign"],
                _signed(row["evaluation"]["value"], row["evaluation"]["interval"], 3)
                if row["evaluation"]
                else "-",
            ]
            for row in rows
        ),
    )


def _evals(summary: Row) -> list[str]:
    return _table(
        ["eval", "needs, beyond model and SAE", "results here"],
        (
            [
                f"`{name}`",
                row["needs"],
                (str(row["scores"]) if row["scores"] else f"not run: {row['not_run']}")
                + (f"; † {row['doubt']}" if row["doubt"] else ""),
            ]
            for name, row in summary["evals"].items()
        ),
        3,
    )


def _count(number: int, thing: str) -> str:
    return f"one {thing}" if number == 1 else f"{number} {thing}s"


def results_block(
    summary: Row, made: Row, base_model: Row | None, extended: Row | None = None, sweep: Row | None = None
) -> str:
    """Markdown of the main numbers of one published run; ``made``: how its stages were made, from
    provenance.json.

    ``extended``: the summary of the extended run, where one is published: what needs several chains is taken
    from it. ``sweep``: its learning_rate.json.
    """
    found, chains, wide = [BEGIN, ""], extended or summary, "extended" if extended else "default"
    if base_model:
        nats, bits = base_model["nats_per_token"], base_model["bits_per_byte"]
        found += [
            "**The embedded model** on held-out text: "
            + ", ".join(
                f"{name} {nats[key]:.2f} nats per token ({bits[key]:.2f} bits per byte)"
                for name, key in [
                    ("model", "model"),
                    ("3-gram with back-off", "trigram"),
                    ("unigram", "unigram"),
                ]
            )
            + f". The loss from which increases are counted is {summary['language_model']['clean_loss']:.2f}: on the first "
            "tokens of today's test split, which has lost the near-duplicates of training text."
            + _core_eval(summary),
            "",
        ]
    if chains["regime"]:
        found += [
            f"**The regime** of the {wide} run, of cycle 0 and of what is compared (without a bound: "
            "reported alone):",
            "",
            *_gates(chains),
        ]
    if sweep:
        found += [
            "**The learning rate**: loss increase on *select* with cycle 0's core minus without a core, the "
            "last line with "
            f"each at its own best rate; rate of all runs {sweep['configured']:g}, by notebook 09's rule "
            f"{_rule(sweep)}.",
            "",
            *_rates(sweep),
        ]
    found += [
        f"**Distillation**, the default run's main chain ({kind_name(summary['sizes'])} core, k = "
        f"{summary['sizes']['k']}). "
        "Placebo: a chain of as many frozen rows, those of it that the cycle before selected and new ones; "
        "rare: on fewer than 1 in 1000 tokens; loss increase: nats per token above the bare model.",
        "",
        *_cycles(summary),
    ]
    sizes = summary["final_core"]["sizes"]
    found += [
        'The "final core" under each reading: '
        + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sizes.items())
        + f"; retraining uses *{summary['final_core']['reading'].replace('_', ' ')}*.",
        "",
    ]
    judged, own = (len(judged_chains(one)) for one in (chains, summary))
    where = (
        (
            " of the extended run ([`results/extended`](results/extended/summary.json), "
            "[figures](figures/extended/README.md), "
            f"{len(extended['retrain'])} retrained SAEs)"
        )
        if extended
        else ""
    )
    found += [
        "**Claims**, judged by code with 95 % intervals; those about cores over "
        f"{_count(judged, 'distillation chain')}{where}:",
        "",
        *_claims(chains),
    ]
    if extended:
        able = ", ".join(name for name, claim in summary["claims"].items() if claim["n"] > 1) or "no claim"
        verdicts = {name: claim["verdict"] for name, claim in summary["claims"].items()}
        found += [
            f"The default run has {_count(own, 'distillation chain')} of its kind and can decide {able} "
            "alone:",
            "",
            *_table(["claim", *verdicts], [["verdict", *verdicts.values()]], len(verdicts) + 1),
        ]
    if chains["chains"]:
        found += [
            f"**Chains** of the {wide} run; those of the main one's kind, with other seeds, are its "
            "replicates:",
            "",
            *_chains(chains),
        ]
    if chains["identity"]:
        pairs = len({(row["a"], row["b"]) for row in chains["identity"]})
        found += [
            "**Identity of cores**: latents of two chains matched one to one, mean over "
            f"{_count(pairs, 'pair')} of chains:",
            "",
            *_identity(chains),
        ]
    k, rows = chains["sizes"]["k"], kinds(chains)[0].rows
    varied = PLURAL[per_unit(advantage(rows, "distilled", k, "loss_increase"))[1]]
    found += [
        f"**Controls** at the distillation k = {k} ({wide} run, {kind_name(chains['sizes'])} core), means "
        f"and 95 % t intervals over n {varied}. Rank: participation rank of the core's encoder rows; last "
        "columns: correlation of the "
        "core latents' frequencies with their own in the cycle that they come from, and with those of the "
        "same rows at the next k.",
        "",
        *_controls(chains),
    ]
    found += [
        f"**Retraining** over k ({wide} run), means over n {varied} (thresholds set for a total L0 of k; "
        "*unbound*: the "
        "core alone reaches k):",
        "",
        *_retrained(chains),
    ]
    answers = {
        name: (chains if name in OF_CHAINS else summary)["reviewers"][name] for name in summary["reviewers"]
    }
    found += [
        "**First answers to what reviewers asked of an earlier version**"
        + (f" ({', '.join(OF_CHAINS)}: of the extended run):" if extended else ":"),
        "",
    ]
    found += [f"- *{name}, {row['question']}* {row['answer']}" for name, row in answers.items()]
    found += [
        "",
        *_probes(summary),
        "**SAEBench**, by eval (results: one per SAE and evaluation seed):",
        "",
        *_evals(summary),
        "SAEs with the distilled core minus the Matryoshka baseline at measured L0, paired by training "
        "seed, with 95 % t intervals (sign ?: it contains 0; loss increase in nats); and at equal k over "
        "evaluation seeds, for the first training seed:",
        "",
        *_differences(summary),
    ]
    hardware, seconds = made["hardware"], dict(made["seconds"])
    more = seconds.pop("saebench_suite", None)
    found += [
        f"Wall clock of the default run by kind of stage on {hardware['cores']} cores of {hardware['cpu']}: "
        + ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items())
        + f"; {sum(seconds.values()) / 60:.1f} min in all"
        + (f", and {more / 60:.1f} min for `make saebench`." if more else "."),
        "",
        END,
    ]
    return "\n".join(found)


def current_block(root: Path) -> str:
    """The block that results/default, results/extended and results/base_model give now."""
    results = Results(root / "results" / "default")
    extended = root / "results" / "extended"
    base_model, sweep = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        for path in (root / "results" / "base_model" / "base_model.json", extended / "learning_rate.json")
    )
    more = Results(extended).summary if extended.is_dir() else None
    return results_block(results.summary, results.made, base_model, more, sweep)


def update_readme(root: Path) -> None:
    """Put the current block between the README's two markers."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    new = re.sub(
        re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: current_block(root), text, flags=re.DOTALL
    )
    write_text(path, new)
