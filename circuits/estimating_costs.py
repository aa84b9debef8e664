"""What a trace costs, from sizes alone: the formulas of nodes, memory and time.

Shapes: n positions, L layers, D model width, H heads, K key-value heads, E head width, V vocabulary, F features of a
dictionary, r their rank, l0 active features of a dictionary at a position, W its write sites. Bytes are of float32
unless said otherwise; a multiplication with its addition is two operations.

What is not a formula but a figure (the names in capitals) was measured with `benchmarks/estimates.py`, which prints how
far the formulas are off.
"""

from dataclasses import dataclass
from math import exp, sqrt

from circuits.hop_work import HOP_WORK
from circuits.settings import TraceSettings

FLOAT = 4  # bytes
USUAL = 2.5  # a graph's features over the root of those that are active (1.1 to 3.7 of trained dictionaries)
KEPT = 0.12  # of the active features are in the largest graph at the default threshold (0.08 to 0.13 of random ones)
KEPT_OF_TARGETS = 0.8  # the same of those that --max-targets allows (0.5 to 0.8 of random ones)
DEFAULT_THRESHOLD = 0.8  # of nodes, at which these were measured
EXPANDED = 0.8  # of the targets get a row where some influence may be left out (0.7 to 0.8)
EDGES = 0.13  # of the pairs of nodes of a pruned graph are edges (0.06 to 0.17)
BLOCK = 2**24  # numbers in a block of rows at most
BLOCK_COPIES = 3  # of a block of rows at once: weights, their sizes, shares
PAIR_BYTES = 40  # for a pair of kept nodes, before edges are pruned
PAIR_SECONDS = 1.5e-6  # to sort it out
HOP_BYTES = 3300  # an edge while its hops are sorted out
HOP_SHARE = 1 / 30  # of the speed of a matrix product at which hops are computed: they are short
WINDOW = 2**16  # bytes that the system maps around a row of a file
READ_SPEED = 8e8  # bytes a second at which files that the system has at hand are read and checked
WRITE_SPEED = 3e8  # bytes a second at which decoder rows become writers
PASSING = ("encoder files", "decoder files", "logits")  # parts of the memory, one after the other
SETTLED = 0.2  # seconds of the steps that cost the same whatever the prompt


@dataclass(frozen=True)
class DictionarySize:
    """A dictionary.

    basis
        Where its l0 is from.
    moves, moving
        Whether the base layer's heads move its features, and at most how many of a context.
    patterns
        How many it has of its own.
    encoder_held, encoder_mapped, decoder_held
        Some formats keep encoders and decoders in memory whatever the room; others have encoders that are used, on the
        CPU, where they lie in their file.
    """

    name: str
    kind: str
    n_features: int
    rank: int
    d_read: int
    d_write: int
    n_writes: int
    l0: float
    basis: str
    moves: bool = False
    moving: int | None = None
    patterns: int = 0
    encoder_held: bool = False
    encoder_mapped: bool = False
    decoder_held: bool = False

    def seen(self, n: int) -> float:
        """Features that are active somewhere: F (1 - exp(-n l0 / F)), as if positions were independent."""
        found = self.n_features * (1.0 - exp(-n * self.l0 / max(1, self.n_features)))
        return found if self.moving is None else min(found, self.moving)

    def nodes(self, n: int) -> float:
        """n l0; where heads move features also one at each position from there on, (n + 1) / 2 of each that is seen."""
        return n * self.l0 + (self.seen(n) * (n + 1) / 2 if self.moves else 0.0)

    @property
    def encoder_bytes(self) -> int:
        """4 F r D."""
        return FLOAT * self.n_features * self.rank * self.d_read

    @property
    def row_bytes(self) -> int:
        """Of a feature's decoder rows, 4 r W D."""
        return FLOAT * self.rank * self.n_writes * self.d_write

    def decoder_bytes(self, n: int) -> float:
        """Of the decoder that count as memory: all of one that is held, else the rows that are read of its file, each
        with what the system maps around it."""
        whole = float(self.n_features * self.row_bytes)
        return whole if self.decoder_held else min(whole, self.seen(n) * (self.row_bytes + WINDOW))


@dataclass(frozen=True)
class Work:
    """All sizes of one trace.

    n, positions
        Tokens, and those of them that have features and errors.
    parameters, weight_size
        Of the base model, and bytes of each.
    live, errors
        Layers whose attention is frozen, and error nodes of a position.
    outputs
        Output targets.
    dictionaries
        By replacement.
    file_bytes, resident, free
        Of files that are read and hashed; that the program itself has; that can be had before anything is loaded.
    on_cpu
        Files that are mapped into memory count.
    largest
        The graph is as large as it gets, with random dictionaries; else as trained ones make it.
    """

    settings: TraceSettings
    n: int
    positions: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocabulary: int
    parameters: int
    weight_size: int
    live: int
    errors: int
    outputs: int
    dictionaries: tuple[tuple[DictionarySize, ...], ...]
    file_bytes: int
    resident: int
    free: int
    on_cpu: bool = True
    largest: bool = False

    @property
    def every(self) -> tuple[DictionarySize, ...]:
        return tuple(size for sizes in self.dictionaries for size in sizes)

    @property
    def features(self) -> float:
        """Active features of the prompt."""
        return sum(size.nodes(self.positions) for size in self.every)

    @property
    def nodes(self) -> float:
        """Features, tokens, errors."""
        return self.features + self.n + self.positions * self.errors

    @property
    def targets(self) -> float:
        """Rows at most: of features, or of as many as `max_targets` says, and of outputs."""
        bound = self.settings.max_targets if self.bounded else None
        return (self.features if bound is None else bound) + self.outputs

    @property
    def bounded(self) -> bool:
        """Whether fewer rows are computed than there are features."""
        bound = self.settings.max_targets
        return bound is not None and bound < self.features and not self.settings.unpruned

    @property
    def expanded(self) -> float:
        """Rows that are computed: not of all targets where some influence may be left out."""
        everything = self.bounded or self.settings.unpruned or not self.settings.left_out
        return self.targets * (1.0 if everything else EXPANDED)

    @property
    def kept(self) -> float:
        """Nodes of the graph. More are kept in proportion as less influence is left out."""
        if self.settings.unpruned:
            return self.nodes + self.outputs
        most = (KEPT_OF_TARGETS if self.bounded else KEPT) * (self.targets - self.outputs)
        found = most if self.largest else min(most, USUAL * sqrt(self.features))
        found *= (1.0 - DEFAULT_THRESHOLD) / max(1e-9, 1.0 - self.settings.node_threshold)
        found = min(found, self.targets - self.outputs, self.settings.max_feature_nodes or found)
        return found + self.n + self.outputs

    @property
    def pairs(self) -> float:
        """Pairs of nodes of the graph, one above the other; at one position where nothing else crosses positions than
        features that heads move."""
        local = not self.live and any(size.moves for size in self.every)
        return self.kept**2 / 2 / (self.n if local else 1)

    @property
    def split(self) -> float:
        """Edges that get hop splits: those through frozen attention, as many as `HOP_WORK` allows."""
        if not self.settings.hops or self.settings.unpruned or not self.live:
            return 0.0
        return min(EDGES * self.kept**2, HOP_WORK / self.hop_work)

    @property
    def hop_work(self) -> float:
        """Multiplications for the hops of one edge, 2 H E n L (`circuits/hop_work.py`)."""
        return 2.0 * self.n_heads * self.d_head * self.n * self.n_layers


def held_encoders(work: Work) -> int:
    """Bytes of encoders in memory: all that have no other form, and those that gain by it as long as they fit.

    One after another, into half of what is free when their replacement is loaded.
    """
    total, taken = 0, work.parameters * work.weight_size
    for sizes in work.dictionaries:
        budget = max(0, work.free - taken - total) // 2
        for size in sizes:
            mapped = size.encoder_mapped and work.on_cpu
            if size.encoder_held or (size.encoder_bytes <= budget and not mapped):
                total += size.encoder_bytes
                budget -= size.encoder_bytes
    return total


def memory(work: Work) -> dict[str, float]:
    """Bytes by part. Those of `PASSING`, and what comes after them, are not there at one time: see `Costs.peak`.

    - attention weights: those of values, behind their norm, of live layers; where weights are not stored in float32,
      also what stands in float32 beside them, (H + K) D E of each layer
    - recording: 6 n D streams, n^2 H patterns, n E (2 H + K) of each layer, and patterns of dictionaries of their own
    - writers: n l0 W D, and n D of tokens and of each error
    - encoder files: the largest encoder of those that are used where they lie
    - decoder files: see `DictionarySize.decoder_bytes`
    - logits: the unembedding in float32, where it is not stored so
    - rows: where no layer is live, writers summed twice; `BLOCK_COPIES` blocks; targets x nodes / 2 with max_targets
    - graph: `PAIR_BYTES` for each pair of kept nodes
    - hop splits: `HOP_BYTES` an edge
    """
    n, d, everything = work.n, work.d_model, work.every
    half = work.weight_size < FLOAT
    heads = work.n_kv_heads * work.live + (work.n_heads + work.n_kv_heads) * work.n_layers * half
    layer = 6 * d + n * work.n_heads + (2 * work.n_heads + work.n_kv_heads) * work.d_head
    own = sum(size.patterns for size in everything) * n**2
    written = sum(size.nodes(work.positions) * size.n_writes for size in everything)
    block = min(float(BLOCK), work.targets * work.nodes / (1 if work.live else n**2))
    rows = BLOCK_COPIES * block + (0.0 if work.live else 2.0 * work.nodes * d)
    if work.bounded:
        rows += work.targets * work.nodes / 2
    encoders = [size.encoder_bytes for size in everything if size.encoder_mapped and work.on_cpu]
    parts = {
        "program": work.resident,
        "base model": work.parameters * work.weight_size,
        "attention weights": FLOAT * heads * work.d_head * d,
        "encoders": held_encoders(work),
        "recording": FLOAT * (work.n_layers * n * layer + own),
        "writers": FLOAT * d * (written + n + work.positions * work.errors),
        "encoder files": max(encoders, default=0),
        "decoder files": _decoders(work),
        "logits": FLOAT * work.vocabulary * d * half,
        "rows": FLOAT * rows,
        "graph": PAIR_BYTES * work.pairs,
        "hop splits": HOP_BYTES * work.split,
    }
    return {name: float(size) for name, size in parts.items() if size}


def _decoders(work: Work) -> float:
    """Decoders that are held, and files, which are let go when their last rows were read: that of a dictionary with one
    write site before the next is read."""
    held = [size.decoder_bytes(work.positions) for size in work.every if size.decoder_held]
    files = [size for size in work.every if work.on_cpu and not size.decoder_held]
    several = [size.decoder_bytes(work.positions) for size in files if size.n_writes > 1]
    single = [size.decoder_bytes(work.positions) for size in files if size.n_writes == 1]
    return sum(held) + sum(several) + max(single, default=0.0)


def operations(work: Work) -> dict[str, float]:
    """Floating point operations by step.

    - record and encode: 2 n parameters, and 2 n F r D of each dictionary
    - rows: a target passes half of the live layers with a covector at half of the positions, 2 (n / 2) D (H + K) E
      each, at all of them where only the strongest get a row, for these stand last; and it meets a quarter of all
      writers, 2 D each. Where no layer is live it reads through one at most, and meets half of the writers at its own
      position. Rows of kept targets are made twice, unless they are held.
    - hop splits: the work of `circuits/hop_work.py`, at a part of the speed
    """
    n, d = work.n, work.d_model
    encode = sum(2.0 * n * size.n_features * size.rank * size.d_read for size in work.every)
    reach = n if work.bounded else (n + 1) / 2
    layer = 2.0 * reach * d * (work.n_heads + work.n_kv_heads) * work.d_head
    meet = 2.0 * d * (work.nodes / 4 if work.live else work.nodes / n / 2)
    again = 0.0 if work.bounded or work.settings.unpruned else min(work.kept, work.expanded)
    return {
        "record and encode": 2.0 * n * work.parameters + encode,
        "rows": (work.expanded + again) * (max(work.live, 1) / 2 * layer + meet),
        "hop splits": 2.0 * work.split * work.hop_work / HOP_SHARE,
    }


@dataclass(frozen=True)
class Speeds:
    """Of this machine: operations a second of a float32 product, and of one as the search makes them; bytes a second of
    hashing."""

    matrix: float
    search: float
    hashing: float


def seconds(work: Work, speeds: Speeds) -> dict[str, float]:
    """Seconds by step. Files are read once, and hashed once."""
    steps = operations(work)
    found = {
        "read and hash files": work.file_bytes / READ_SPEED + work.file_bytes / speeds.hashing,
        "record and encode": steps["record and encode"] / speeds.matrix + memory(work)["writers"] / WRITE_SPEED,
        "rows": steps["rows"] / speeds.search,
        "hop splits": steps["hop splits"] / speeds.matrix,
        "the rest": SETTLED + PAIR_SECONDS * work.pairs,
    }
    return {name: length for name, length in found.items() if length}


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds by part."""

    memory: dict[str, float]
    seconds: dict[str, float]

    @property
    def peak(self) -> float:
        """The most bytes at one time: what passes is let go before rows are made."""
        passing = [self.memory.get(name, 0.0) for name in PASSING]
        late = sum(self.memory.get(name, 0.0) for name in ("rows", "graph", "hop splits"))
        return sum(self.memory.values()) - sum(passing) - late + max(*passing, late)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def costs(work: Work, speeds: Speeds, before: dict[str, float] | None = None) -> Costs:
    """What a trace of these sizes costs; `before` are seconds of steps that come first."""
    return Costs(memory(work), (before or {}) | seconds(work, speeds))


def peak(work: Work) -> float:
    """The most bytes that it has at one time."""
    return Costs(memory(work), {}).peak
