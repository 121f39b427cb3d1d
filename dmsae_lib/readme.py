"""The README's results: a block of Markdown written from results/ alone, so that its numbers cannot go stale."""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from dmsae_lib.atomic import write_text
from dmsae_lib.results import Results

BEGIN, END = "<!-- results: written by `make publish` -->", "<!-- end of results -->"
BETTER = {1: "higher", -1: "lower", 0: "neither"}
Row = dict[str, Any]


def _cycles(summary: Row) -> list[str]:
    head = ["cycle", "core in", "kept", "new", "core out", "core L0 / k", "dead", "FVU", "loss recovered"]
    lines = ["| " + " | ".join(head) + " |", "|" + "--:|" * len(head)]
    for row in summary["cycles"]:
        lines.append(f"| {row['cycle']} | {row['core_in']} | {row['kept']} | {row['core_out'] - row['kept']} | {row['core_out']} | "
                     f"{row['core_share']:.2f} | {row['dead']} | {row['fvu']['full']:.3f} | {row['loss_recovered']['full']:.4f} |")
    return lines


def _cell(rows: list[Row], value) -> str:
    found = [value(row) for row in rows if value(row) is not None]
    return f"{mean(found):.4f}" if found else "-"


def _retrained(summary: Row) -> list[str]:
    top = [key for key in ("probe_top1", "probe_top5") if any(key in (r["saebench"] or {}) for r in summary["retrain"])]
    head = ["k", "core", "seeds", "core L0", "total L0", "FVU", "loss recovered", *(f"top-{key[9:]} probes" for key in top)]
    lines = ["| " + " | ".join(head) + " |", "|--:|:--" + "|--:" * (len(head) - 2) + "|"]
    for k, arm in dict.fromkeys((row["k"], row["core"]) for row in summary["retrain"]):
        rows = [row for row in summary["retrain"] if (row["k"], row["core"]) == (k, arm)]
        cells = [str(k), arm.replace("_", " ") + (" (unbound)" if any(row["unbound"] for row in rows) else ""), str(len(rows)),
                 f"{mean(r['L0']['core'] for r in rows):.1f}", f"{mean(r['L0']['total'] for r in rows):.1f}",
                 _cell(rows, lambda r: r["fvu"]), _cell(rows, lambda r: r["loss_recovered"]),
                 *(_cell(rows, lambda r, key=key: (r["saebench"] or {}).get(key)) for key in top)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float, interval: list[float] | None) -> str:
    return f"{value:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def _differences(summary: Row) -> list[str]:
    """One line per metric and k up to the distillation k: the claim is about low k."""
    lines = ["| metric (better) | k | over training seeds | n | sign | over evaluation seeds |", "|:--|--:|:--|--:|:-:|:--|"]
    for row in summary["differences"]:
        if row["k"] <= summary["sizes"]["k"]:
            name = f"{row['label']}{' †' * row['doubted']} ({BETTER[row['better']]})"
            drawn = row["evaluation"] and _number(row["evaluation"]["value"], row["evaluation"]["interval"])
            lines.append(f"| {name} | {row['k']} | {_number(row['value'], row['interval'])} | {row['n']} | {row['sign']} | "
                         f"{drawn or '-'} |")
    return lines


def _evals(summary: Row) -> list[str]:
    lines = ["| eval | needs, beyond model and SAE | results here |", "|:--|:--|:--|"]
    for name, row in summary["evals"].items():
        ran = str(row["scores"]) if row["scores"] else f"not run: {row['not_run']}"
        ran += f"; † {row['doubt']}" if row["doubt"] else ""
        lines.append(f"| `{name}` | {row['needs']} | {ran} |")
    return lines


def _claims(summary: Row) -> list[str]:
    lines = ["| claim | verdict | numbers |", "|:--|:--|:--|"]
    return lines + [f"| {name}: {claim['claim']} | **{claim['verdict']}** | {claim['detail']} |"
                    for name, claim in summary["claims"].items()]


def _chains(summary: Row) -> list[str]:
    """One line per distillation chain."""
    settings = ("seed", "core_sparsity", "core_decoder_init", "core_bias_init")
    main = {name: summary["sizes" if name != "seed" else "inputs"][name] for name in settings} | {"cycles": summary["cycles"]}
    lines = ["| chain | core competes in BatchTopK | its decoder rows start | its biases | core sizes | core L0 / k | first FVU "
             "| last FVU |", "|:--|:-:|:--|:--|:--|--:|--:|--:|"]
    for name, chain in {"main": main, **summary["chains"]}.items():
        cycles, own = chain["cycles"], "yes" if chain["core_sparsity"] == "batchtopk" else "no"
        lines.append(f"| {name} | {own} | {chain['core_decoder_init']} | {chain['core_bias_init'].replace('_', ' ')} | "
                     f"{' '.join(str(row['core_out']) for row in cycles)} | {cycles[-1]['core_share']:.2f} | "
                     f"{cycles[0]['fvu']['full']:.4f} | {cycles[-1]['fvu']['full']:.4f} |")
    return lines


def results_block(summary: Row, made: Row, base_model: Row | None, extended: Row | None = None) -> str:
    """Markdown of the main numbers of one published run; ``made``: how its stages were made, from provenance.json.

    ``extended``: the summary of the extended run, where one is published.
    """
    hardware, seconds = made["hardware"], made["seconds"]
    lines = [BEGIN, ""]
    if base_model:
        nats, bits = base_model["nats_per_token"], base_model["bits_per_byte"]
        lines += ["**The embedded model** on held-out text: " + ", ".join(
            f"{name} {nats[key]:.2f} nats per token ({bits[key]:.2f} bits per byte)"
            for name, key in [("model", "model"), ("3-gram with back-off", "trigram"), ("unigram", "unigram")]) + ".", ""]
    lines += ["**Distillation**, one chain:", "", *_cycles(summary), ""]
    sizes = summary["final_core"]["sizes"]
    lines += ["The \"final core\" under each reading: " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sizes.items())
              + f"; retraining uses *{summary['final_core']['reading'].replace('_', ' ')}*.", ""]
    lines += ["**Claims**, judged by code (95 % paired intervals over seeds):", "", *_claims(summary)]
    if extended:
        lines += ["", "**The extended run** ([`results/extended`](results/extended/summary.json), "
                  f"[figures](figures/extended/README.md)): {len(extended['retrain'])} SAEs, every control at every k with three "
                  "seeds, and further distillation chains, so that C1 and C2 have seeds of their own:", "", *_claims(extended), "",
                  *_chains(extended)]
    lines += ["", "**First answers to what reviewers asked of an earlier version:**", ""]
    lines += [f"- *{name}, {row['question']}* {row['answer']}" for name, row in summary["reviewers"].items()]
    lines += ["", "**Retraining**, means over seeds (thresholds set for a total L0 of k; *unbound*: the core alone exceeds k):",
              "", *_retrained(summary), ""]
    if baselines := summary["probing_baselines"]:
        lines += [f"Probing without an SAE, mean accuracy of {baselines['n_sets']} sets ({len(baselines['dropped'])} more, which a "
                  f"dense probe cannot do, are left out): dense probe {baselines['dense']:.3f}, "
                  f"best single channel {baselines['best_channel']:.3f}, larger class {baselines['majority']:.3f}.", ""]
    lines += ["**SAEBench**, by eval (results: one per SAE and evaluation seed):", "", *_evals(summary), "",
              "SAEs with the distilled core minus the Matryoshka baseline at measured L0, paired by training seed, with 95 % t "
              "intervals (sign ?: it contains 0); and at equal k over evaluation seeds, for the first training seed:",
              "", *_differences(summary), ""]
    more = seconds.get("saebench_suite")
    seconds = {name: value for name, value in seconds.items() if name != "saebench_suite"}
    lines += [f"Wall clock by kind of stage on {hardware['cores']} cores of {hardware['cpu']}: "
              + ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items())
              + f"; {sum(seconds.values()) / 60:.1f} min in all"
              + (f", and {more / 60:.1f} min for `make saebench`." if more else "."), "", END]
    return "\n".join(lines)


def current_block(root: Path) -> str:
    """The block that results/default, results/extended and results/base_model give now."""
    results = Results(root / "results" / "default")
    record = root / "results" / "base_model" / "base_model.json"
    base_model = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    extended = root / "results" / "extended"
    more = Results(extended).summary if extended.is_dir() else None
    return results_block(results.summary, results.made, base_model, more)


def update_readme(root: Path) -> None:
    """Put the current block between the README's two markers."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    new = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: current_block(root), text, flags=re.DOTALL)
    write_text(path, new)
