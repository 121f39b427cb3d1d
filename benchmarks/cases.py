"""What is measured: shapes, cases, and the closed forms that the figures are set against."""

from dataclasses import dataclass

THREADS = 2  # the goals are stated for two cores
PREFIXES = (1, 3, 7, 15, 32)  # nested prefixes in 32nds of the width
DEAD = 0.1  # share of dead latents in the cases that have some
CORE = 64  # core latents of the row `ours_core`; a quarter of the width where that is less
OURS, CORED, SAELENS, DICTIONARY, DENSE = "ours", "ours_core", "saelens", "dictionary_learning", "dense"
PEERS = (SAELENS, DICTIONARY)
# ours, on active entries alone or with dense products, whatever the rule says
SPARSE, MATRICES = "ours_sparse", "ours_matrices"


@dataclass(frozen=True)
class Shape:
    """Sizes of one SAE and its batch. ``real``: activations of the embedded model, which fix d_in at 128."""

    name: str
    d_in: int
    d_sae: int
    k: int
    batch_size: int
    real: bool = False
    settle: int = 200  # steps of training before anything is timed
    bf16: bool = False

    @property
    def widths(self) -> list[int]:
        """Cumulative sizes of the nested prefixes, the last one d_sae."""
        return [self.d_sae * share // 32 for share in PREFIXES]

    @property
    def n_core(self) -> int:
        return min(CORE, self.d_sae // 4)

    @property
    def floor_flops(self) -> int:
        """Multiplications and additions of the encoder's matrix product (batch_size, d_in) x (d_in,
        d_sae)."""
        return 2 * self.batch_size * self.d_in * self.d_sae


@dataclass(frozen=True)
class Case:
    """One interleaved measurement.

    ``rounds`` times in turn, each contestant takes ``untimed`` steps (caches and threads wake up) and
    ``timed`` ones.
    """

    name: str
    # "step", "installed" (peers without our malloc settings), "width" and "many" (growth), "share" (of
    # active latents)
    kind: str
    shape: Shape
    contestants: tuple[str, ...]
    dead: float = 0.0
    n_saes: int = 1
    rounds: int = 5
    untimed: int = 1
    timed: int = 2
    warm_up: int = 3  # steps of each contestant before the first turn


S = Shape("S", 128, 2048, 32, 1024, real=True, settle=400)
M = Shape("M", 256, 4096, 64, 2048, settle=200)
L = Shape("L", 512, 16384, 64, 2048, settle=120)
WIDTHS = (1024, 2048, 4096, 8192, 16384)
MANY = (1, 2, 4, 8)
SHARES = (24, 64, 128, 192, 256, 384)  # k at a width of 768: 3 to 50 % of the latents are active
ALL = (OURS, SAELENS, DICTIONARY, DENSE)


def cpu_cases() -> list[Case]:
    cases = []
    for shape in (S, M, L):
        cases.append(Case(f"{shape.name}-clean", "step", shape, (OURS, CORED, SAELENS, DICTIONARY, DENSE)))
        cases.append(Case(f"{shape.name}-dead", "step", shape, ALL, dead=DEAD))
        cases.append(Case(f"{shape.name}-installed", "installed", shape, ALL))
    for width in WIDTHS:
        shape = S if width == S.d_sae else Shape(f"W{width}", 128, width, 32, 1024, real=True)
        cases.append(Case(f"width-{width}", "width", shape, ALL))
    for n in MANY:
        cases.append(Case(f"many-{n}", "many", S, ALL, n_saes=n))
    for k in SHARES:
        cases.append(
            Case(
                f"share-{k}", "share", Shape(f"D{k}", 128, 768, k, 1024, real=True), (SPARSE, MATRICES, DENSE)
            )
        )
    return cases


def cuda_cases() -> list[Case]:
    """The paper's shape, bf16 autocast over float32 weights. No such run has been made by us: it needs a
    GPU."""
    cases = []
    for k in (20, 80, 320):
        for batch_size in (2048, 8192):
            shape = Shape(f"paper-k{k}-b{batch_size}", 2304, 65536, k, batch_size, bf16=True)
            cases.append(Case(f"{shape.name}-clean", "step", shape, ALL))
            cases.append(Case(f"{shape.name}-dead", "step", shape, ALL, dead=DEAD))
    return cases


def quick_cases() -> list[Case]:
    """Every code path at toy size, for the tests; its timings mean nothing."""
    shape = Shape("toy", 16, 128, 8, 64, settle=20)
    few = {"rounds": 2, "timed": 1, "warm_up": 1}
    return [
        Case("toy-clean", "step", shape, (OURS, CORED, SAELENS, DICTIONARY, DENSE), **few),
        Case("toy-dead", "step", shape, ALL, dead=DEAD, **few),
        Case("toy-installed", "installed", shape, ALL, **few),
        Case("width-64", "width", Shape("W64", 16, 64, 8, 64, settle=20), ALL, **few),
        Case("width-128", "width", shape, ALL, **few),
        Case("many-2", "many", shape, ALL, n_saes=2, **few),
        Case("share-8", "share", shape, (SPARSE, MATRICES, DENSE), **few),
    ]
