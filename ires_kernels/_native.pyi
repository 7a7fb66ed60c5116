def run(
    op: int,
    items: list[tuple[object, ...]],
    factors: tuple[float, ...],
    stochastic: bool,
    seed: int,
    offset: int,
    threads: int,
    isa: str,
    tally: bool,
) -> tuple[int, int, int, int, int, int, float, float]: ...
def cuda_run(
    op: int,
    items: list[tuple[object, ...]],
    factors: tuple[float, ...],
    stochastic: bool,
    seed: int,
    offset: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_decode(
    layout: tuple[object, ...], parts: tuple[object, ...], first: int, n: int, out: int, device: int, stream: int
) -> None: ...
def run_fused(
    op: int,
    item: tuple[object, ...],
    operands: tuple[int | tuple[list[tuple[int, int, int, int, int, int]], int], ...],
    most: int,
    factors: tuple[float, ...],
    stochastic: bool,
    seed: int,
    offset: int,
    isa: str,
) -> tuple[int, int, int, int] | None: ...
def load_tile(
    reads: list[tuple[int, int, int, int, int]],
    op: int,
    items: list[tuple[object, ...]],
    factors: tuple[float, ...],
    stochastic: bool,
    seed: int,
    offset: int,
    device: int,
    stream: int,
) -> tuple[int, int, int] | None: ...
def decode(
    layout: tuple[object, ...],
    parts: tuple[object, ...],
    first: int,
    n: int,
    out: int,
    threads: int,
    isa: str,
) -> None: ...
def encode(
    layout: tuple[object, ...],
    scales: memoryview,
    first: int,
    n: int,
    values: int,
    out: int,
    draw: tuple[int, int] | None,
    threads: int,
    isa: str,
) -> None: ...
def measure(
    layout: tuple[object, ...], first: int, n: int, values: int, largest: int, cells: int, isa: str
) -> None: ...
def measure_results(
    op: int,
    item: tuple[object, ...],
    factors: tuple[float, ...],
    layout: tuple[object, ...],
    first: int,
    largest: int,
    cells: int,
    isa: str,
) -> None: ...
def store(
    op: int,
    item: tuple[object, ...],
    factors: tuple[float, ...],
    layout: tuple[object, ...],
    parts: tuple[object, ...],
    first: int,
    renewed: bool,
    out: int,
    draw: tuple[int, int] | None,
    isa: str,
    tally: bool,
) -> tuple[int, int, int, int, int, int, float, float, float]: ...
def fit(
    n: int,
    out_type: int,
    types: tuple[int, ...],
    operands: tuple[int | memoryview, ...],
    alphas: list[float],
    isa: str,
) -> tuple[int, int, int, list[int], float, float, float, float, list[float]]: ...
def fit_files(
    n: int,
    out_type: int,
    types: tuple[int, ...],
    operands: tuple[list[tuple[int, int, int]], ...],
    alphas: list[float],
    isa: str,
) -> tuple[int, int, int, list[int], float, float, float, float, list[float]] | tuple[int, int, int, int]: ...
def most_packed(type: int, n: int) -> int: ...
def pack(type: int, old: int, now: int, n: int, out: int, isa: str) -> int: ...
def unpack(type: int, record: int, now: int, n: int, isa: str) -> None: ...
def fits(type: int, record: int, now: int, n: int, isa: str) -> bool: ...
def memory_loop(item: tuple[object, ...], threads: int, isa: str) -> None: ...
def isas() -> list[str]: ...
def cuda_driver() -> int: ...

cuda_built: bool
cuda_least_driver: int
cuda_targets: str
