// The CPU driver: splits tensors into chunks, hands them to threads, walks strides. Knows no arithmetic.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace ires {
namespace {

// Chunks are claimed one by one, so that a slow or busy core does not hold up the rest.
constexpr int64_t kChunk = int64_t(1) << 17;           // elements
constexpr int64_t kBytesPerThread = int64_t(1) << 21;  // below this a thread costs more than it brings
constexpr int64_t kGather = 1024;                      // elements copied together where strides are not 1
constexpr int64_t kDecoded = 2048;                     // numbers decoded together: with two such operands, in the L1 cache
constexpr int64_t kRecoded = 1024;                     // the same, where the results become codes

void* at(void* p, DType type, int64_t elements) { return static_cast<char*>(p) + elements * item_size(type); }
const void* at(const void* p, DType type, int64_t elements) { return static_cast<const char*>(p) + elements * item_size(type); }

#if defined(__x86_64__)
bool v3_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("fma");
}
#endif

template <class T>
void copy_elements(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
    constexpr int64_t kSize = sizeof(T);
    for (int64_t i = 0; i < n; ++i) memcpy(to + i * to_stride * kSize, from + i * from_stride * kSize, kSize);
}

void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n, int size) {
    switch (size) {
        case 1: return copy_elements<uint8_t>(to, to_stride, from, from_stride, n);
        case 2: return copy_elements<uint16_t>(to, to_stride, from, from_stride, n);
        case 4: return copy_elements<uint32_t>(to, to_stride, from, from_stride, n);
        default: return copy_elements<uint64_t>(to, to_stride, from, from_stride, n);
    }
}

// Elements [first, first + n) of a strided item, in row-major order: by inner rows where these are contiguous in every
// operand, else by small gathered copies.
void run_strided(const Loops& loops, const Operation& op, const Item& item, uint64_t offset, int64_t first, int64_t n,
                 Tally* tally) {
    const size_t inputs = size_t(op.inputs), operands = inputs + 1, dims = item.sizes.size();
    const auto size_of = [&](size_t k) { return item_size(k == 0 ? item.out_type : item.in_types[k - 1]); };
    const auto inner = [&](size_t k) { return item.strides[k * dims + dims - 1]; };
    bool rows = true;
    for (size_t k = 0; k < operands; ++k) rows &= inner(k) == 1;

    std::vector<int64_t> at(dims);
    int64_t rest = first;
    for (size_t d = dims; d-- > 0; rest /= item.sizes[d]) at[d] = rest % item.sizes[d];
    const auto address = [&](size_t k) {
        int64_t elements = 0;
        for (size_t d = 0; d < dims; ++d) elements += at[d] * item.strides[k * dims + d];
        char* p = static_cast<char*>(k == 0 ? item.out : const_cast<void*>(item.in[k - 1]));
        return p + elements * size_of(k);
    };

    std::vector<char> gathered(rows ? 0 : operands * kGather * 8);
    const auto buffer = [&](size_t k) { return gathered.data() + k * kGather * 8; };
    std::vector<const void*> in(inputs);
    for (int64_t done = 0; done < n;) {
        int64_t m = std::min(item.sizes[dims - 1] - at[dims - 1], n - done);
        if (!rows) m = std::min(m, kGather);
        for (size_t k = 1; k < operands; ++k) {
            in[k - 1] = rows ? address(k) : buffer(k);
            if (!rows) copy_strided(buffer(k), 1, address(k), inner(k), m, size_of(k));
        }
        void* out = rows ? address(0) : buffer(0);
        const Run run{m, offset + uint64_t(first + done), item.stream, item.out_type, item.in_types.data(), out, in.data()};
        loops.run(op, run, tally);
        if (!rows) copy_strided(address(0), inner(0), buffer(0), 1, m, size_of(0));
        done += m;
        at[dims - 1] += m;
        for (size_t d = dims - 1; d > 0 && at[d] == item.sizes[d]; --d) {
            at[d] = 0;
            ++at[d - 1];
        }
    }
}

// An item with inputs that are decoded, a small piece at a time.
class Pieces {
public:
    Pieces(const Loops& loops, const Operation& op, const Item& item, uint64_t offset)
        : loops_(loops), op_(op), item_(item), offset_(offset), numbers_(size_t(op.inputs)), types_(item.in_types),
          in_(size_t(op.inputs)), from_(size_t(op.inputs)) {}

    // Computes elements [i, i + m) into `out`; m <= kDecoded. `target` takes the place of input 0, in f32.
    void run(int64_t i, int64_t m, DType out_type, void* out, const float* target, Tally* tally) {
        for (size_t k = 0; k < in_.size(); ++k) {
            from_[k] = item_.decoded.empty() ? Decoded{} : item_.decoded[k];
            from_[k].first += i;
            if (!from_[k].coded) in_[k] = at(item_.in[k], item_.in_types[k], i);
        }
        if (target) in_[0] = target, from_[0] = {}, types_[0] = DType::f32;
        const Run run{m, offset_ + uint64_t(i), item_.stream, out_type, types_.data(), out, in_.data()};
        if (loops_.run_scaled(op_, run, from_.data(), tally)) return;
        for (size_t k = 0; k < in_.size(); ++k)
            if (from_[k].coded) in_[k] = numbers(k, i, m);
        loops_.run(op_, run, tally);
    }

    // Elements [i, i + m) of an input that is decoded.
    const float* numbers(size_t k, int64_t i, int64_t m) {
        const Decoded& from = item_.decoded[k];
        loops_.decode(*from.coded, from.first + i, m, numbers_[k].x);
        return numbers_[k].x;
    }

private:
    struct alignas(64) Numbers { float x[kDecoded]; };
    const Loops& loops_;
    const Operation& op_;
    const Item& item_;
    const uint64_t offset_;
    std::vector<Numbers> numbers_;
    std::vector<DType> types_;
    std::vector<const void*> in_;
    std::vector<Decoded> from_;
};

// Elements [first, first + n) of an item with operands that are decoded.
void run_decoded(const Loops& loops, const Operation& op, const Item& item, uint64_t offset, int64_t first, int64_t n,
                 Tally* tally) {
    Pieces pieces(loops, op, item, offset);
    for (int64_t i = first; i < first + n; i += kDecoded)
        pieces.run(i, std::min(kDecoded, first + n - i), item.out_type, at(item.out, item.out_type, i), nullptr, tally);
}

struct Isa {
    const char* name;
    const Loops* loops;
    bool (*here)();
};

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"v4", &v4::loops, [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && v3_here();
     }},
    {"v3", &v3::loops, v3_here},
    {"v2", &v2::loops, [] { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }},
#else
    {"portable", &portable::loops, [] { return true; }},
#endif
};

const Loops& find_loops(const std::string& name) {
    for (const Isa& isa : kIsas)
        if (isa.here() && (name.empty() || name == isa.name)) return *isa.loops;
    throw std::invalid_argument("instruction set '" + name + "' is not available on this CPU");
}

// Runs `work` on up to `threads` threads, the caller's among them. Fewer if the system will not start more: chunks are
// claimed, so nothing is left undone.
void on_threads(int threads, const std::function<void(int)>& work) {
    const auto guarded = [&work](int id) {
        const IeeeMode mode;
        work(id);
    };
    std::vector<std::thread> team;
    team.reserve(size_t(threads));
    try {
        for (int id = 1; id < threads; ++id) team.emplace_back(guarded, id);
    } catch (const std::system_error&) {
    }
    guarded(0);
    for (std::thread& t : team) t.join();
}

// Calls part(item, first, n, thread) for every chunk of every item.
template <class Part>
void for_chunks(const std::vector<Item>& items, int threads, const Part& part, int64_t chunk = kChunk) {
    std::vector<int64_t> ends;  // running count of chunks
    int64_t chunks = 0, bytes = 0;
    for (const Item& item : items) {
        chunks += (item.n + chunk - 1) / chunk;
        bytes += item.n * item_size(item.out_type);
        for (DType type : item.in_types) bytes += item.n * item_size(type);
        ends.push_back(chunks);
    }
    threads = int(std::max<int64_t>(1, std::min({int64_t(threads), chunks, bytes / kBytesPerThread})));
    std::atomic<int64_t> next{0};
    on_threads(threads, [&](int id) {
        for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
            const size_t i = size_t(std::upper_bound(ends.begin(), ends.end(), c) - ends.begin());
            const int64_t first = (c - (i ? ends[i - 1] : 0)) * chunk;
            part(items[i], first, std::min(chunk, items[i].n - first), id);
        }
    });
}

}  // namespace

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas)
        if (isa.here()) names.push_back(isa.name);
    return names;
}

void run(const Operation& op, std::vector<Item>& items, uint64_t offset, int threads, const std::string& isa, Tally* tally) {
    const Loops& loops = find_loops(isa);
    for (Item& item : items) coalesce(item);
    std::vector<Tally> tallies(tally ? size_t(std::max(1, threads)) : 0);
    for_chunks(items, threads, [&](const Item& item, int64_t first, int64_t n, int thread) {
        Tally* mine = tally ? &tallies[size_t(thread)] : nullptr;
        if (!item.sizes.empty()) return run_strided(loops, op, item, offset, first, n, mine);
        if (!item.decoded.empty()) return run_decoded(loops, op, item, offset, first, n, mine);
        std::vector<const void*> in;
        for (size_t k = 0; k < item.in.size(); ++k) in.push_back(at(item.in[k], item.in_types[k], first));
        void* out = at(item.out, item.out_type, first);
        const Run run{n, offset + uint64_t(first), item.stream, item.out_type, item.in_types.data(), out, in.data()};
        loops.run(op, run, mine);
    });
    for (const Tally& t : tallies) *tally += t;
}

void decode(const Coded& coded, int64_t first, int64_t n, float* out, int threads, const std::string& isa) {
    const Loops& loops = find_loops(isa);
    Item item{};
    item.n = n;
    item.out_type = DType::f32;
    // Transposed: whole bands of lines, counted from `first`.
    const int64_t chunk = coded.transposed ? std::max<int64_t>(kChunk / (32 * coded.rows), 1) * 32 * coded.rows : kChunk;
    for_chunks({item}, threads, [&](const Item&, int64_t from, int64_t count, int) {
        loops.decode(coded, first + from, count, out + from);
    }, chunk);
}

void encode(const Coded& coded, int64_t first, int64_t n, const float* values, const Draw* draw, uint8_t* out, int threads,
            const std::string& isa) {
    const Loops& loops = find_loops(isa);
    Item item{};
    item.n = n;
    item.out_type = DType::f32;
    for_chunks({item}, threads, [&](const Item&, int64_t from, int64_t count, int) {
        loops.encode(coded, first + from, count, values + from, draw, out + from);
    });
}

void measure(const Coded& coded, int64_t first, int64_t n, const float* values, float* largest, const std::string& isa) {
    find_loops(isa).measure(coded, first, n, values, largest);
}

void store(const Operation& op, const Item& item, uint64_t offset, const Recoded& to, const std::string& isa, Tally* tally,
           Stored* stored) {
    const IeeeMode mode;
    const Loops& loops = find_loops(isa);
    const Coded& coded = *to.coded;
    alignas(64) float values[kRecoded], update[kRecoded], again[kRecoded];
    alignas(64) static const float zeros[kRecoded] = {};
    Pieces pieces(loops, op, item, offset);
    for (int64_t i = 0; i < item.n; i += kRecoded) {
        const int64_t m = std::min(kRecoded, item.n - i), at = int64_t(offset) + i;
        const bool is_coded = !item.decoded.empty() && item.decoded[0].coded;
        const float* const target = is_coded ? pieces.numbers(0, i, m) : static_cast<const float*>(item.in[0]) + i;
        pieces.run(i, m, DType::f32, values, target, tally);
        loops.encode(coded, at, m, values, to.draw, to.out + i);
        if (to.renewed) loops.decode(coded, at, m, again);
        const char* const before = coded.codes + (at - coded.skipped);
        loops.keep(m, values, to.renewed ? again : target, reinterpret_cast<const uint8_t*>(before), to.out + i);
        if (!tally) continue;
        pieces.run(i, m, DType::f32, update, zeros, nullptr);  // what is added to 0 is the update
        Coded now = coded;
        now.codes = reinterpret_cast<const char*>(to.out), now.skipped = int64_t(offset);
        loops.decode(now, at, m, again);
        *stored += loops.count_stored(m, target, update, values, again);
    }
}

void measure_results(const Operation& op, const Item& item, uint64_t offset, const Coded& coded, float* largest,
                     const std::string& isa) {
    const IeeeMode mode;
    const Loops& loops = find_loops(isa);
    alignas(64) float values[kRecoded];
    Pieces pieces(loops, op, item, offset);
    for (int64_t i = 0; i < item.n; i += kRecoded) {
        const int64_t m = std::min(kRecoded, item.n - i), at = int64_t(offset) + i;
        pieces.run(i, m, DType::f32, values, nullptr, nullptr);
        loops.measure(coded, at, m, values, largest);
    }
}

void fit(const FitRun& run, const std::string& isa, Fit* found) {
    const IeeeMode mode;
    find_loops(isa).fit(run, found);
}

int64_t most_packed(DType type, int64_t n) {
    // What there is before it is known that a block is better left as it is, with the zeros at its end; and the heads.
    return (n + std::min(n, kBlockPacked) + 64) * item_size(type) + 32 * (n / kLeastPacked + 4);
}

int64_t pack(DType type, const void* old, const void* now, int64_t n, char* out, const std::string& isa) {
    return find_loops(isa).pack(type, old, now, n, out);
}

void unpack(DType type, const char* record, void* now, int64_t n, const std::string& isa) {
    find_loops(isa).unpack(type, record, now, n);
}

bool fits(DType type, const char* record, const void* now, int64_t n, const std::string& isa) {
    return find_loops(isa).fits(type, record, now, n);
}

void run_memory(const Item& item, int threads, const std::string& isa) {
    const Loops& loops = find_loops(isa);
    std::atomic<bool> known{true};
    for_chunks({item}, threads, [&](const Item& item, int64_t first, int64_t n, int) {
        const void* in[3] = {};
        for (size_t k = 0; k < item.in.size(); ++k) in[k] = at(item.in[k], item.in_types[k], first);
        void* out = at(item.out, item.out_type, first);
        const Run run{n, 0, 0, item.out_type, item.in_types.data(), out, in};
        if (!loops.memory(run, int(item.in.size()))) known = false;
    });
    if (!known) throw std::invalid_argument("no memory loop for these element sizes");
}

}  // namespace ires
