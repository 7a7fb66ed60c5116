// The Python binding: raw pointers, element counts and small integers in; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>

#include "cpu.h"
#include "cuda.h"
#include "fused.h"
#include "look.h"
#include "tile.h"

namespace py = pybind11;

namespace {

const void* pointer(const py::handle& h) { return reinterpret_cast<const void*>(h.cast<uintptr_t>()); }

ires::DType dtype(const py::handle& h) {
    const int code = h.cast<int>();
    if (code < 0 || code >= ires::kDTypes) throw py::value_error("unknown dtype code " + std::to_string(code));
    return static_cast<ires::DType>(code);
}

// What is not there is None. Buffers are checked for the bytes that any number of the tensor may need.
struct Bytes {
    const char* p = nullptr;
    int64_t n = 0;
};

Bytes bytes(const py::handle& h) {
    if (h.is_none()) return {};
    if (py::isinstance<py::tuple>(h)) {  // (pointer, bytes), on a device
        const py::tuple t = py::reinterpret_borrow<py::tuple>(h);
        return {static_cast<const char*>(pointer(t[0])), t[1].cast<int64_t>()};
    }
    Py_buffer view;
    if (PyObject_GetBuffer(h.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    const Bytes found{static_cast<const char*>(view.buf), int64_t(view.len)};
    PyBuffer_Release(&view);  // the caller's reference keeps it
    return found;
}

template <class E> E choice(const py::handle& h, E last) {
    const int code = h.cast<int>();
    if (code < 0 || code > int(last)) throw py::value_error("unknown code " + std::to_string(code));
    return static_cast<E>(code);
}

void need(int64_t wanted, const Bytes& got, const char* what) {
    if (got.n < wanted)
        throw py::value_error(std::string(what) + " has " + std::to_string(got.n) + " bytes, wanted " + std::to_string(wanted));
}

// (code type, high nibble first, transposed, table of 16 or (), (matrices, rows, columns, bytes of a row),
//  (block rows, block columns), scale type, zero type, second scale), see coded.h.
ires::Coded coded(const py::tuple& t) {
    using namespace ires;
    Coded c{};
    c.type = choice(t[0], CodeType::nibbles);
    c.high_first = t[1].cast<bool>();
    c.transposed = t[2].cast<bool>();
    const auto table = t[3].cast<std::vector<float>>();
    const auto shape = t[4].cast<std::vector<int64_t>>(), block = t[5].cast<std::vector<int64_t>>();
    c.scale_type = choice(t[6], ScaleType::e8m0);
    c.zero_type = choice(t[7], ZeroType::bytes_less_128);
    c.second = choice(t[8], Second::over);
    if (shape.size() != 4 || block.size() != 2 || (table.size() != 16 && !table.empty()) ||
        (c.type == CodeType::nibbles && table.empty()))
        throw py::value_error("a layout that is none");
    std::copy(table.begin(), table.end(), c.table);
    c.matrices = shape[0], c.rows = shape[1], c.columns = shape[2], c.row_bytes = shape[3];
    c.block_rows = block[0], c.block_columns = block[1];
    if (c.matrices < 1 || c.rows < 1 || c.columns < 1 || c.block_rows < 1 || c.block_columns < 1 ||
        c.row_bytes < (c.columns * code_bits(c.type) + 7) / 8)
        throw py::value_error("sizes that are none");
    if (c.zero_type != ZeroType::none && c.type <= CodeType::e5m2) throw py::value_error("floats have no zero");
    return c;
}

// (codes, bytes of codes in front of these, scale, zero point, second scale, group index).
ires::Coded coded(const py::tuple& layout, const py::tuple& parts) {
    using namespace ires;
    Coded c = coded(layout);
    const Bytes codes = bytes(parts[0]), scale = bytes(parts[2]), zero = bytes(parts[3]), over = bytes(parts[4]), group = bytes(parts[5]);
    c.skipped = parts[1].cast<int64_t>();
    const int64_t columns = grid_columns(c), rows = grid_rows(c), cells = c.matrices * rows * columns;
    need(cells * scale_bytes(c.scale_type), scale, "scale");
    if (c.zero_type == ZeroType::i8) need(cells, zero, "zero point");
    if (c.zero_type == ZeroType::nibbles_less_8) need((c.matrices * rows + 7) / 8 * columns * 4, zero, "zero point");
    if (c.zero_type == ZeroType::bytes_less_128) need((c.matrices * rows + 3) / 4 * columns * 4, zero, "zero point");
    c.seconds = over.n / 4;
    if (c.second != Second::none && c.seconds != 1) need(c.matrices * 4, over, "second scale");
    if (group.p) {
        need(c.columns * 4, group, "group index");
        int32_t largest = -1;
        for (int64_t i = 0; i < c.columns; ++i) largest = std::max(largest, read_at<int32_t>(group.p, i));
        if (largest >= columns) throw py::value_error("group index " + std::to_string(largest) + " of " + std::to_string(columns));
    }
    c.codes = codes.p, c.scale = scale.p, c.zero = zero.p, c.over = over.p, c.group = group.p;
    return c;
}

void need_numbers(const ires::Coded& c, int64_t first, int64_t n) {
    if (first < 0 || n < 1 || first + n > c.matrices * c.rows * c.columns) throw py::value_error("numbers that the tensor has not");
}

// The bytes of codes [first, first + n) must be there.
void need_codes(const ires::Coded& c, int64_t first, int64_t n, const Bytes& codes) {
    need_numbers(c, first, n);
    const int bits = code_bits(c.type);
    const int64_t last = first + n - 1, whole = c.matrices * c.rows * c.row_bytes;
    const int64_t from = c.transposed ? first / (c.rows * c.columns) * c.rows * c.row_bytes
                                      : first / c.columns * c.row_bytes + first % c.columns * bits / 8;
    const int64_t to = c.transposed ? (last / (c.rows * c.columns) + 1) * c.rows * c.row_bytes
                                    : last / c.columns * c.row_bytes + last % c.columns * bits / 8 + 1;
    if (c.skipped < 0 || c.skipped > from || whole < to) throw py::value_error("codes that begin behind the first number");
    need(to - c.skipped, codes, "codes");
}

// What items of a call are decoded from; these point to it.
using Codeds = std::deque<ires::Coded>;

// (n, stream, (pointer, ...), (dtype, ...), sizes, strides): the output first; strides by operand, or both empty. Maybe
// also, for each input, None or (layout, parts, first): what it is decoded from.
ires::Item item(const py::tuple& t, Codeds* codeds = nullptr) {
    ires::Item out;
    out.n = t[0].cast<int64_t>();
    out.stream = t[1].cast<uint64_t>();
    const py::tuple pointers = t[2], dtypes = t[3];
    if (pointers.size() != dtypes.size() || pointers.size() < 2) throw py::value_error("one dtype per pointer");
    out.out = const_cast<void*>(pointer(pointers[0]));
    out.out_type = dtype(dtypes[0]);
    for (size_t k = 1; k < pointers.size(); ++k) {
        out.in.push_back(pointer(pointers[k]));
        out.in_types.push_back(dtype(dtypes[k]));
    }
    out.sizes = t[4].cast<std::vector<int64_t>>();
    out.strides = t[5].cast<std::vector<int64_t>>();
    if (out.strides.size() != out.sizes.size() * pointers.size()) throw py::value_error("one stride per size and operand");
    if (t.size() == 6) return out;
    if (!codeds || !out.sizes.empty()) throw py::value_error("decoded operands are for contiguous tensors on the CPU");
    const py::tuple decoded = t[6];
    if (decoded.size() != out.in.size()) throw py::value_error("one of each input");
    for (size_t k = 0; k < decoded.size(); ++k) {
        out.decoded.emplace_back();
        if (decoded[k].is_none()) continue;
        const py::tuple from = decoded[k];
        const int64_t first = from[2].cast<int64_t>();
        codeds->push_back(coded(from[0], from[1]));
        need_codes(codeds->back(), first, out.n, bytes(from[1].cast<py::tuple>()[0]));
        if (out.in_types[k] != ires::DType::f32) throw py::value_error("decoded numbers are f32");
        out.decoded[k] = {&codeds->back(), first};
    }
    return out;
}

// `factors` has to outlive what is returned.
ires::Operation operation(int code, const std::vector<double>& factors, bool stochastic, uint64_t seed) {
    ires::Operation op{static_cast<ires::OpCode>(code), 0, factors.data(), stochastic, seed};
    switch (op.code) {
        case ires::OpCode::subtract: op.inputs = 2; break;
        case ires::OpCode::add: op.inputs = 1 + int(factors.size()); break;
        case ires::OpCode::scale: op.inputs = 1; break;
        case ires::OpCode::add_difference: op.inputs = 1 + 2 * int(factors.size()); break;
        default: throw py::value_error("unknown operation code " + std::to_string(code));
    }
    const bool none = op.code == ires::OpCode::subtract, one = op.code == ires::OpCode::scale;
    if (none ? !factors.empty() : factors.empty() || (one && factors.size() != 1)) throw py::value_error("wrong number of factors");
    return op;
}

std::vector<ires::Item> items(const py::list& list, const ires::Operation& op, Codeds* codeds = nullptr) {
    std::vector<ires::Item> out;
    out.reserve(list.size());
    for (const py::handle& h : list) {
        out.push_back(item(h.cast<py::tuple>(), codeds));
        if (int(out.back().in.size()) != op.inputs) throw py::value_error("wrong number of operands");
    }
    return out;
}

py::object run(int code, const py::list& list, const std::vector<double>& factors, bool stochastic, uint64_t seed,
               uint64_t offset, int threads, const std::string& isa, bool want_tally) {
    const ires::Operation op = operation(code, factors, stochastic, seed);
    Codeds codeds;
    std::vector<ires::Item> all = items(list, op, &codeds);
    ires::Tally tally;
    {
        const py::gil_scoped_release release;
        ires::run(op, all, offset, threads, isa, want_tally ? &tally : nullptr);
    }
    if (!want_tally) return py::none();
    return py::make_tuple(tally.updates, tally.lost, tally.nan_in, tally.inf_in, tally.nan_out, tally.overflow, tally.dot,
                          tally.norm2);
}

#if defined(IRES_CUDA)
void cuda_run(int code, const py::list& list, const std::vector<double>& factors, bool stochastic, uint64_t seed,
              uint64_t offset, int device, uintptr_t stream) {
    const ires::Operation op = operation(code, factors, stochastic, seed);
    std::vector<ires::Item> all = items(list, op);
    const py::gil_scoped_release release;
    ires::gpu::run(op, all, offset, device, stream);
}
#endif

// (fd, offset, host pointer, device pointer, bytes)
ires::Read read(const py::handle& h) {
    const py::tuple t = h.cast<py::tuple>();
    return {t[0].cast<int>(), t[1].cast<int64_t>(), reinterpret_cast<char*>(t[2].cast<uintptr_t>()),
            const_cast<void*>(pointer(t[3])), t[4].cast<size_t>()};
}

// Where the device is: a GPU and one of its streams, or the host itself, for tests.
struct Place {
    int device;  // kHost: the host
    uintptr_t stream;
};
constexpr int kHost = -1;

void copy_to(const Place& place, const ires::Read& read) {
    if (place.device == kHost) {
        memcpy(read.device, read.host, read.bytes);
        return;
    }
#if defined(IRES_CUDA)
    ires::gpu::copy(read, place.device, place.stream);
#else
    throw std::invalid_argument("the extension was built without nvcc");
#endif
}

void run_on(const Place& place, const ires::Operation& op, std::vector<ires::Item>& items, uint64_t offset) {
    if (place.device == kHost) {
        ires::run(op, items, offset, 1, "", nullptr);
        return;
    }
#if defined(IRES_CUDA)
    ires::gpu::run(op, items, offset, place.device, place.stream);
#else
    throw std::invalid_argument("the extension was built without nvcc");
#endif
}

// Reads, copies and, where there are items, computes one tile (tile.h). Returns None, or (which read, errno or 0 for the
// end of the file, position in the file).
py::object load_tile(const py::list& list, int code, const py::list& computed, const std::vector<double>& factors,
                     bool stochastic, uint64_t seed, uint64_t offset, int device, uintptr_t stream) {
    std::vector<ires::Read> reads;
    reads.reserve(list.size());
    for (const py::handle& h : list) reads.push_back(read(h));
    const ires::Operation op = operation(code, factors, stochastic, seed);
    std::vector<ires::Item> all = items(computed, op);
    const Place place{device, stream};
    ires::Unread unread;
    {
        const py::gil_scoped_release release;
        unread = ires::read_tile(reads, [&](const ires::Read& read) { copy_to(place, read); });
        if (!unread.failed && !all.empty()) run_on(place, op, all, offset);
    }
    if (!unread.failed) return py::none();
    return py::make_tuple(unread.read, unread.error, unread.at);
}

void decode(const py::tuple& layout, const py::tuple& parts, int64_t first, int64_t n, uintptr_t out, int threads,
            const std::string& isa) {
    const ires::Coded c = coded(layout, parts);
    need_codes(c, first, n, bytes(parts[0]));
    const py::gil_scoped_release release;
    ires::decode(c, first, n, reinterpret_cast<float*>(out), threads, isa);
}

#if defined(IRES_CUDA)
// Parts on the device, without a group index, which is looked at here.
void cuda_decode(const py::tuple& layout, const py::tuple& parts, int64_t first, int64_t n, uintptr_t out, int device,
                 uintptr_t stream) {
    if (!parts[5].is_none()) throw py::value_error("a group index is decoded on the CPU");
    const ires::Coded c = coded(layout, parts);
    if (c.transposed) throw py::value_error("a transposed tensor is decoded on the CPU");
    need_codes(c, first, n, bytes(parts[0]));
    const py::gil_scoped_release release;
    ires::gpu::decode(c, first, n, reinterpret_cast<float*>(out), device, stream);
}
#endif

// Values and codes of n numbers from `first` on, as pointers.
void encode(const py::tuple& layout, const py::handle& scales, int64_t first, int64_t n, uintptr_t values, uintptr_t out,
            const std::optional<std::pair<uint64_t, uint64_t>>& draw, int threads, const std::string& isa) {
    const ires::Coded c = coded(layout, py::make_tuple(py::none(), 0, scales, py::none(), py::none(), py::none()));
    if ((c.type != ires::CodeType::e4m3 && c.type != ires::CodeType::i8) || c.zero_type != ires::ZeroType::none)
        throw py::value_error("a layout that is not encoded");
    need_numbers(c, first, n);
    const ires::Draw words{draw ? draw->first : 0, draw ? draw->second : 0};
    const py::gil_scoped_release release;
    ires::encode(c, first, n, reinterpret_cast<const float*>(values), draw ? &words : nullptr,
                 reinterpret_cast<uint8_t*>(out), threads, isa);
}

void measure(const py::tuple& layout, int64_t first, int64_t n, uintptr_t values, uintptr_t largest, int64_t cells,
             const std::string& isa) {
    const ires::Coded c = coded(layout);
    need_numbers(c, first, n);
    if (cells != c.matrices * grid_rows(c) * grid_columns(c)) throw py::value_error("one number for each block is wanted");
    const py::gil_scoped_release release;
    ires::measure(c, first, n, reinterpret_cast<const float*>(values), reinterpret_cast<float*>(largest), isa);
}

// An item of f32 for `store` and `measure_results`, where the numbers of `coded` from `first` on are its results.
ires::Item results(const py::tuple& t, const ires::Operation& op, const ires::Coded& coded, int64_t first, Codeds* codeds) {
    if ((coded.type != ires::CodeType::e4m3 && coded.type != ires::CodeType::i8) || coded.zero_type != ires::ZeroType::none ||
        coded.row_bytes != coded.columns)
        throw py::value_error("a layout that is not encoded");
    const ires::Item one = item(t, codeds);
    if (int(one.in.size()) != op.inputs) throw py::value_error("wrong number of operands");
    if (one.out_type != ires::DType::f32 || one.in_types[0] != ires::DType::f32 || !one.sizes.empty())
        throw py::value_error("contiguous results of f32 are encoded, and a target that is decoded");
    need_numbers(coded, first, one.n);
    return one;
}

// The bytes of the record of n old elements, given the new ones; at `out` is room for `most_packed`. 0 where the dtype has none.
int64_t pack(int type, uintptr_t old, uintptr_t now, int64_t n, uintptr_t out, const std::string& isa) {
    const ires::DType known = dtype(py::int_(type));
    const py::gil_scoped_release release;
    return ires::pack(known, reinterpret_cast<const void*>(old), reinterpret_cast<const void*>(now), n,
                      reinterpret_cast<char*>(out), isa);
}

void unpack(int type, uintptr_t record, uintptr_t now, int64_t n, const std::string& isa) {
    const ires::DType known = dtype(py::int_(type));
    const py::gil_scoped_release release;
    ires::unpack(known, reinterpret_cast<const char*>(record), reinterpret_cast<void*>(now), n, isa);
}

bool fits(int type, uintptr_t record, uintptr_t now, int64_t n, const std::string& isa) {
    const ires::DType known = dtype(py::int_(type));
    const py::gil_scoped_release release;
    return ires::fits(known, reinterpret_cast<const char*>(record), reinterpret_cast<const void*>(now), n, isa);
}

// The largest of results; `largest` has one number for each of so many cells.
void measure_results(int code, const py::tuple& t, const std::vector<double>& factors, const py::tuple& layout, int64_t first,
                     uintptr_t largest, int64_t cells, const std::string& isa) {
    const ires::Operation op = operation(code, factors, false, 0);
    const ires::Coded c = coded(layout);
    Codeds codeds;
    const ires::Item one = results(t, op, c, first, &codeds);
    if (cells != c.matrices * grid_rows(c) * grid_columns(c)) throw py::value_error("one number for each block is wanted");
    const py::gil_scoped_release release;
    ires::measure_results(op, one, uint64_t(first), c, reinterpret_cast<float*>(largest), isa);
}

// The codes of results, in n bytes at `out`; `parts` has the scales that there are now and the codes that there were.
py::object store(int code, const py::tuple& t, const std::vector<double>& factors, const py::tuple& layout,
                 const py::tuple& parts, int64_t first, bool renewed, uintptr_t out,
                 const std::optional<std::pair<uint64_t, uint64_t>>& draw, const std::string& isa, bool want_tally) {
    const ires::Operation op = operation(code, factors, false, 0);
    const ires::Coded c = coded(layout, parts);
    Codeds codeds;
    const ires::Item one = results(t, op, c, first, &codeds);
    need_codes(c, first, one.n, bytes(parts[0]));
    const ires::Draw words{draw ? draw->first : 0, draw ? draw->second : 0};
    const ires::Recoded to{&c, renewed, draw ? &words : nullptr, reinterpret_cast<uint8_t*>(out)};
    ires::Tally tally;
    ires::Stored stored;
    {
        const py::gil_scoped_release release;
        ires::store(op, one, uint64_t(first), to, isa, want_tally ? &tally : nullptr, &stored);
    }
    if (!want_tally) return py::none();
    return py::make_tuple(tally.updates, stored.lost, tally.nan_in, tally.inf_in, stored.nan_out, tally.overflow, stored.dot,
                          stored.norm2, stored.noise);
}

// (descriptor, offset, bytes), or (-1, address, bytes, where they are kept or 0, address of the count of those that are, the
// type by which they are packed there or -1).
ires::Stretch stretch(const py::handle& h) {
    const py::tuple t = h.cast<py::tuple>();
    ires::Stretch found{t[0].cast<int>(), 0, nullptr, t[2].cast<size_t>(), nullptr, nullptr, {}};
    if (found.fd != ires::kMemory) {
        found.offset = t[1].cast<int64_t>();
        return found;
    }
    found.memory = static_cast<const char*>(pointer(t[1]));
    found.keep = reinterpret_cast<char*>(t[3].cast<uintptr_t>());
    found.kept = reinterpret_cast<int64_t*>(t[4].cast<uintptr_t>());
    if (t[5].cast<int>() >= 0) found.packed = dtype(t[5]);
    return found;
}

// Target, instruct and base: each a buffer or a pointer to elements of its type; or, `fit_files`, its (descriptor, offset,
// bytes) in files, one after the other.
ires::FitRun fit_run(int64_t n, int out_type, const py::tuple& types, size_t operands, const std::vector<float>& alphas) {
    using namespace ires;
    if (types.size() != 3 || operands != 3 || alphas.size() > size_t(kFitAlphas)) throw py::value_error("three operands");
    FitRun run{n, dtype(py::int_(out_type)), {}, {}, alphas.data(), int(alphas.size())};
    bool wide = run.out_type == DType::f64;
    for (size_t k = 0; k < 3; ++k) {
        run.in_types[k] = dtype(types[k]);
        wide |= run.in_types[k] == DType::f64;
    }
    if (wide || n < 0) throw py::value_error("f64 is not counted here");
    return run;
}

py::tuple fit_found(const ires::Fit& found, const std::vector<float>& alphas) {
    return py::make_tuple(found.elements, found.both, found.conflicts,
                          std::vector<uint64_t>(found.within, found.within + ires::kFitSteps), found.base, found.drift,
                          found.update, found.cross, std::vector<double>(found.moved, found.moved + alphas.size()));
}

py::tuple fit(int64_t n, int out_type, const py::tuple& types, const py::tuple& operands, const std::vector<float>& alphas,
              const std::string& isa) {
    ires::FitRun run = fit_run(n, out_type, types, operands.size(), alphas);
    for (size_t k = 0; k < 3; ++k) {
        if (py::isinstance<py::int_>(operands[k])) {
            run.in[k] = pointer(operands[k]);
            continue;
        }
        const Bytes memory = bytes(operands[k]);
        need(n * item_size(run.in_types[k]), memory, "an operand");
        run.in[k] = memory.p;
    }
    ires::Fit found;
    {
        const py::gil_scoped_release release;
        ires::fit(run, isa, &found);
    }
    return fit_found(found, alphas);
}

// Returns what `fit` does, or where reading ended: (operand, which of its runs, errno or 0 for the end of the file, position).
py::tuple fit_files(int64_t n, int out_type, const py::tuple& types, const py::tuple& operands, const std::vector<float>& alphas,
                    const std::string& isa) {
    const ires::FitRun run = fit_run(n, out_type, types, operands.size(), alphas);
    ires::Runs runs[3];
    for (size_t k = 0; k < 3; ++k) {
        for (const py::handle& h : operands[k]) runs[k].add(stretch(h));
        if (runs[k].bytes() != n * item_size(run.in_types[k])) throw py::value_error("as many bytes as elements are wanted");
    }
    ires::Fit found;
    ires::Unread unread;
    int failed = 0;
    {
        const py::gil_scoped_release release;
        unread = ires::fit_files(run, runs, isa, &found, &failed);
    }
    if (unread.failed) return py::make_tuple(failed, unread.read, unread.error, unread.at);
    return fit_found(found, alphas);
}

// An item whose inputs have no pointers: of each the stretches that it consists of, with the address where all of it is to
// stay or 0; or the address of `most` elements that are the same for each piece. Returns None, or where reading ended:
// (operand, which of its stretches, errno or 0 for the end of the file, position).
py::object run_fused(int code, const py::tuple& t, const py::tuple& operands, int64_t most, const std::vector<double>& factors,
                     bool stochastic, uint64_t seed, uint64_t offset, const std::string& isa) {
    const ires::Operation op = operation(code, factors, stochastic, seed);
    const ires::Item one = item(t);
    if (int(one.in.size()) != op.inputs || operands.size() != one.in.size()) throw py::value_error("wrong number of operands");
    if (!one.sizes.empty() || one.n < 0 || most < ires::kPieceStep) throw py::value_error("contiguous results are wanted");
    std::vector<ires::Source> sources(operands.size());
    for (size_t k = 0; k < sources.size(); ++k) {
        if (py::isinstance<py::int_>(operands[k])) {
            sources[k].constant = static_cast<const char*>(pointer(operands[k]));
            continue;
        }
        const py::tuple parts = operands[k];
        sources[k].runs.emplace(reinterpret_cast<char*>(parts[1].cast<uintptr_t>()));
        for (const py::handle& h : parts[0]) sources[k].runs->add(stretch(h));
        if (sources[k].runs->bytes() != one.n * item_size(one.in_types[k]))
            throw py::value_error("as many bytes as elements are wanted");
    }
    ires::Unread unread;
    int failed = 0;
    {
        const py::gil_scoped_release release;
        unread = ires::run_fused(op, one, sources, offset, most, isa, &failed);
    }
    if (!unread.failed) return py::none();
    return py::make_tuple(failed, unread.read, unread.error, unread.at);
}

void memory_loop(const py::tuple& t, int threads, const std::string& isa) {
    const ires::Item one = item(t);
    const py::gil_scoped_release release;
    ires::run_memory(one, threads, isa);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU and GPU kernels of ires_kernels; called through ires_kernels.backends.native";
    m.def("run", &run, py::arg("op"), py::arg("items"), py::arg("factors"), py::arg("stochastic"), py::arg("seed"),
          py::arg("offset"), py::arg("threads"), py::arg("isa"), py::arg("tally"));
    m.def("run_fused", &run_fused, py::arg("op"), py::arg("item"), py::arg("operands"), py::arg("most"), py::arg("factors"),
          py::arg("stochastic"), py::arg("seed"), py::arg("offset"), py::arg("isa"));
    m.def("load_tile", &load_tile, py::arg("reads"), py::arg("op"), py::arg("items"), py::arg("factors"),
          py::arg("stochastic"), py::arg("seed"), py::arg("offset"), py::arg("device"), py::arg("stream"));
    m.def("decode", &decode, py::arg("layout"), py::arg("parts"), py::arg("first"), py::arg("n"), py::arg("out"),
          py::arg("threads"), py::arg("isa"));
    m.def("encode", &encode, py::arg("layout"), py::arg("scales"), py::arg("first"), py::arg("n"), py::arg("values"),
          py::arg("out"), py::arg("draw"), py::arg("threads"), py::arg("isa"));
    m.def("measure", &measure, py::arg("layout"), py::arg("first"), py::arg("n"), py::arg("values"), py::arg("largest"),
          py::arg("cells"), py::arg("isa"));
    m.def("measure_results", &measure_results, py::arg("op"), py::arg("item"), py::arg("factors"), py::arg("layout"),
          py::arg("first"), py::arg("largest"), py::arg("cells"), py::arg("isa"));
    m.def("most_packed", [](int type, int64_t n) { return ires::most_packed(dtype(py::int_(type)), n); }, py::arg("type"),
          py::arg("n"));
    m.def("pack", &pack, py::arg("type"), py::arg("old"), py::arg("now"), py::arg("n"), py::arg("out"), py::arg("isa"));
    m.def("unpack", &unpack, py::arg("type"), py::arg("record"), py::arg("now"), py::arg("n"), py::arg("isa"));
    m.def("fits", &fits, py::arg("type"), py::arg("record"), py::arg("now"), py::arg("n"), py::arg("isa"));
    m.def("store", &store, py::arg("op"), py::arg("item"), py::arg("factors"), py::arg("layout"), py::arg("parts"),
          py::arg("first"), py::arg("renewed"), py::arg("out"), py::arg("draw"), py::arg("isa"), py::arg("tally"));
    for (const auto& [name, found] : {std::pair("fit", &fit), std::pair("fit_files", &fit_files)})
        m.def(name, found, py::arg("n"), py::arg("out_type"), py::arg("types"), py::arg("operands"), py::arg("alphas"),
              py::arg("isa"));
    m.def("memory_loop", &memory_loop, py::arg("item"), py::arg("threads"), py::arg("isa"));
    m.def("isas", &ires::isas);
#if defined(IRES_CUDA)
    m.def("cuda_run", &cuda_run, py::arg("op"), py::arg("items"), py::arg("factors"), py::arg("stochastic"), py::arg("seed"),
          py::arg("offset"), py::arg("device"), py::arg("stream"));
    m.def("cuda_decode", &cuda_decode, py::arg("layout"), py::arg("parts"), py::arg("first"), py::arg("n"), py::arg("out"),
          py::arg("device"), py::arg("stream"));
    m.def("cuda_driver", &ires::gpu::driver_version);
    m.attr("cuda_least_driver") = ires::gpu::least_driver_version();
    m.attr("cuda_built") = true;
    m.attr("cuda_targets") = IRES_CUDA;
#else
    m.attr("cuda_least_driver") = 0;
    m.attr("cuda_built") = false;
    m.attr("cuda_targets") = "";
#endif
}
