"""The innermost loop of a CPU's products, as LLVM IR: some rows of a weight past some tokens, in the machine's widest vectors.

Written out because it must not be left to chance: the sums stay in registers, each number of the weight is read once and widened there,
and the rows that come next are asked for from memory while these are computed. Against loops that LLVM makes vectors of, that is 3 to 4
times as fast at a handful of tokens (tests/benchmarks/bench_cpu_experts.py).
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import config
from numba.extending import intrinsic


def vector_width(cpu_name: str | None, cpu_features: str | None) -> int:
    """float32 lanes of the vectors of the CPU that Numba compiles for: this one, or the one that NUMBA_CPU_NAME and _FEATURES tell."""
    if cpu_name is not None:
        return 16 if cpu_name == "x86-64-v4" or "+avx512f" in (cpu_features or "") else 8
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this kind of machine
        return 4
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


WIDTH = vector_width(config.CPU_NAME, config.CPU_FEATURES)
# Rows and tokens of a tile: its sums, and what they are made of, must fit in 32 vector registers where they are wide, else in 16.
NUM_ROWS = 4 if WIDTH == 16 else 2
NUM_TOKENS = 6

# Sums may be reordered (that is what makes them vectors), but infinities and NaN keep their meaning.
_FLAGS = ("reassoc", "contract", "nsz")
_BYTE, _WORD, _SIZE, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)


def make_tile(num_rows: int, num_tokens: int) -> Callable[..., Any]:
    """tile(like, weight, weight_step, x, x_step, y, y_step, K): y[t, r] = sum over K of x[t, k] weight[r, k], sizes as they were made.

    `weight`, `x` and `y` are addresses, the steps are numbers from one row to the next. The weight is stored as `like`'s element:
    float32, uint16 (a bfloat16's bits) or int16 (a float16's); x and y are float32. The order of a sum's parts depends on K alone.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_context: Any, like: Any, weight: Any, weight_step: Any, x: Any, x_step: Any, y: Any, y_step: Any, length: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            _Tile(builder, like.dtype, num_rows, num_tokens, arguments[1:]).generate()
            return context.get_dummy_value()

        return types.void(like, weight, weight_step, x, x_step, y, y_step, length), generate

    return tile  # type: ignore[no-any-return]


class _Tile:
    """One tile's IR: a loop over whole vectors, then a masked step over what is left."""

    def __init__(self, builder: Any, stored: Any, num_rows: int, num_tokens: int, arguments: Any) -> None:
        self.builder, self.stored = builder, stored
        self.element = {types.uint16: ir.IntType(16), types.int16: ir.HalfType()}.get(stored, _FLOAT)
        weight, weight_step, x, x_step, y, y_step, self.length = arguments
        size = 4 if self.element == _FLOAT else 2
        self.rows = [self._pointer(weight, weight_step, row * size, self.element) for row in range(num_rows)]
        self.next_rows = [self._pointer(weight, weight_step, (2 * num_rows + row) * size, self.element) for row in range(num_rows)]
        self.tokens = [self._pointer(x, x_step, token * 4, _FLOAT) for token in range(num_tokens)]
        self.outputs = [self._pointer(y, y_step, token * 4, _FLOAT) for token in range(num_tokens)]

    def generate(self) -> None:
        builder, function = self.builder, self.builder.function
        before = builder.block
        head, step, left, tail, end = (function.append_basic_block(name) for name in ("head", "step", "left", "tail", "end"))
        whole = builder.and_(self.length, ir.Constant(_SIZE, -WIDTH))
        builder.branch(head)

        builder.position_at_end(head)
        index = builder.phi(_SIZE)
        sums = [builder.phi(_VECTOR) for _ in range(len(self.rows) * len(self.tokens))]
        index.add_incoming(ir.Constant(_SIZE, 0), before)
        for each in sums:
            each.add_incoming(ir.Constant(_VECTOR, [0.0] * WIDTH), before)
        builder.cbranch(builder.icmp_signed("<", index, whole), step, left)

        builder.position_at_end(step)
        self._prefetch(index)
        for each, new in zip(sums, self._add(sums, index, None), strict=True):
            each.add_incoming(new, step)
        index.add_incoming(builder.add(index, ir.Constant(_SIZE, WIDTH)), step)
        builder.branch(head)

        builder.position_at_end(left)
        builder.cbranch(builder.icmp_signed("<", whole, self.length), tail, end)

        builder.position_at_end(tail)
        masked = self._add(sums, whole, self._lanes_before(builder.sub(self.length, whole)))
        builder.branch(end)

        builder.position_at_end(end)
        totals = [builder.phi(_VECTOR) for _ in sums]
        for total, each, new in zip(totals, sums, masked, strict=True):
            total.add_incoming(each, left)
            total.add_incoming(new, tail)
        self._store(totals)

    def _pointer(self, base: Any, step: Any, factor: int, element: Any) -> Any:
        offset = self.builder.mul(step, ir.Constant(_SIZE, factor))
        return self.builder.inttoptr(self.builder.add(base, offset), element.as_pointer())

    def _prefetch(self, index: Any) -> None:
        """The rows two tiles on, at the same place. Past the weight's end it does nothing: a prefetch faults nowhere.

        Into the second level of cache, not the first: that has few places for lines under way, and those of Zen 4 read half as fast.
        """
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
        prefetch = self.builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        for row in self.next_rows:
            place = self.builder.bitcast(self.builder.gep(row, [index]), _BYTE.as_pointer())
            self.builder.call(prefetch, [place, ir.Constant(_WORD, 0), ir.Constant(_WORD, 2), ir.Constant(_WORD, 1)])

    def _add(self, sums: list[Any], index: Any, mask: Any) -> list[Any]:
        builder = self.builder
        weights = [self._widen(self._load(row, index, self.element, mask)) for row in self.rows]
        tokens = [self._load(token, index, _FLOAT, mask) for token in self.tokens]
        products = [builder.fmul(weight, token, flags=_FLAGS) for token in tokens for weight in weights]
        return [builder.fadd(each, product, flags=_FLAGS) for each, product in zip(sums, products, strict=True)]

    def _load(self, base: Any, index: Any, element: Any, mask: Any) -> Any:
        builder, vector = self.builder, ir.VectorType(element, WIDTH)
        place = builder.bitcast(builder.gep(base, [index]), vector.as_pointer())
        align = 4 if element == _FLOAT else 2
        if mask is None:
            return builder.load(place, align=align)
        suffix = {"float": "f32", "half": "f16"}.get(str(element), str(element))
        kind = ir.FunctionType(vector, [vector.as_pointer(), _WORD, mask.type, vector])
        load = builder.module.declare_intrinsic(f"llvm.masked.load.v{WIDTH}{suffix}.p0", (), kind)
        return builder.call(load, [place, ir.Constant(_WORD, align), mask, ir.Constant(vector, [0] * WIDTH)])

    def _widen(self, vector: Any) -> Any:
        if self.stored == types.uint16:
            words = ir.VectorType(_WORD, WIDTH)
            return self.builder.bitcast(self.builder.shl(self.builder.zext(vector, words), ir.Constant(words, [16] * WIDTH)), _VECTOR)
        return self.builder.fpext(vector, _VECTOR) if self.stored == types.int16 else vector

    def _lanes_before(self, number: Any) -> Any:
        lanes = ir.VectorType(_SIZE, WIDTH)
        spread = ir.Constant(lanes, ir.Undefined)
        for lane in range(WIDTH):
            spread = self.builder.insert_element(spread, number, ir.Constant(_WORD, lane))
        return self.builder.icmp_signed("<", ir.Constant(lanes, list(range(WIDTH))), spread)

    def _store(self, totals: list[Any]) -> None:
        """Adds up the lanes of each total, and puts the sums, which are all of a token's rows and then the next token's, where they go."""
        builder, num_rows = self.builder, len(self.rows)
        for first in range(0, len(totals), WIDTH):
            sums = self._sums(totals[first : first + WIDTH])
            for place in range(first, min(first + WIDTH, len(totals)), num_rows):
                chosen = ir.Constant(ir.VectorType(_WORD, num_rows), list(range(place - first, place - first + num_rows)))
                rows = builder.shuffle_vector(sums, ir.Constant(sums.type, ir.Undefined), chosen)
                builder.store(rows, builder.bitcast(self.outputs[place // num_rows], rows.type.as_pointer()), align=4)

    def _sums(self, totals: list[Any]) -> Any:
        """One vector with the sum of each of the totals, in their order: halves of all of them are added, then halves of the halves.

        Two vectors' halves go into one, so that 16 totals take 15 additions; each alone would take 4 and as many moves.
        """
        vectors = list(totals)
        while len(vectors) & (len(vectors) - 1):
            vectors.append(ir.Constant(_VECTOR, [0.0] * WIDTH))
        part = WIDTH  # lanes that belong to one total
        while part > 1:
            part //= 2
            if len(vectors) > 1:
                vectors = [self._add_halves(first, second, part) for first, second in zip(vectors[::2], vectors[1::2], strict=True)]
            else:
                vectors = [self._add_halves(vectors[0], None, part)]
        return vectors[0]

    def _add_halves(self, first: Any, second: Any, part: int) -> Any:
        """Of every 2 x `part` lanes the lower plus the upper ones, `second`'s behind `first`'s."""
        num_lanes = first.type.count * (1 if second is None else 2)
        lower = [lane for lane in range(num_lanes) if lane // part % 2 == 0]
        kind = ir.VectorType(_WORD, len(lower))
        other = ir.Constant(first.type, ir.Undefined) if second is None else second
        halves = [self.builder.shuffle_vector(first, other, ir.Constant(kind, [lane + up for lane in lower])) for up in (0, part)]
        return self.builder.fadd(*halves)
