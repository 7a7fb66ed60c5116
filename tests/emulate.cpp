// The GPU kernels on a CPU, thread by thread: implements what csrc/cuda.cu does with the same schedules, tables and kernel
// bodies. Built as a shared library and called by tests/backends/test_emulation.py.
//
// Every access is held against what a GPU allows (the address is a multiple of the access) and against the operands (none
// of it outside); accesses and written bytes are counted.
#include <cstdio>
#include <stdexcept>

namespace {
void access(const void* read, size_t bytes, size_t multiple);
void access(void* written, size_t bytes, size_t multiple);
}
#define IRES_ACCESS(address, bytes, multiple) access(address, bytes, multiple)

#include "kernel.h"

using namespace ires;

namespace {

struct Span {
    uintptr_t begin, end;
};
std::vector<Span> spans;  // of the operands of the tensors of a launch, by address
uint64_t narrow, wide;  // accesses of up to 8 bytes, and of 16
uint64_t written;       // bytes

void access(const void* p, size_t bytes, size_t multiple) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (address % multiple != 0) throw std::logic_error("an address is not a multiple of " + std::to_string(multiple));
    const auto before = [](uintptr_t a, const Span& s) { return a < s.begin; };
    const auto after = std::upper_bound(spans.begin(), spans.end(), address, before);
    if (after == spans.begin() || address + bytes > (after - 1)->end)
        throw std::logic_error("an access outside of all operands");
    if (bytes >= 16) wide += bytes / 16;
    else ++narrow;
}

void access(void* p, size_t bytes, size_t multiple) {
    access(static_cast<const void*>(p), bytes, multiple);
    written += bytes;
}

// What an item's operands cover; overlapping ones (an operand that is the target) as one.
void note_spans(const std::vector<Item>& items) {
    std::vector<Span> all;
    for (const Item& item : items) {
        const size_t dims = item.sizes.size();
        for (size_t k = 0; k <= item.in.size(); ++k) {
            int64_t reach = item.n ? 1 : 0;
            if (!dims) reach = item.n;
            for (size_t d = 0; d < dims && item.n; ++d) reach += (item.sizes[d] - 1) * item.strides[k * dims + d];
            const auto begin = reinterpret_cast<uintptr_t>(gpu::detail::operand(item, k));
            all.push_back({begin, begin + uintptr_t(reach * item_size(gpu::detail::operand_type(item, k)))});
        }
    }
    std::sort(all.begin(), all.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    spans.clear();
    for (const Span& span : all) {
        if (!spans.empty() && span.begin < spans.back().end) spans.back().end = std::max(spans.back().end, span.end);
        else spans.push_back(span);
    }
}

template <class Table, class C, bool kStochastic>
void thread_of_mixed(const gpu::Launch& launch, const Table& table, uint32_t block, uint32_t thread) {
    if (launch.kernel == gpu::kStrided) gpu::strided_elements<C, kStochastic>(table, block, launch.blocks, thread);
    else gpu::mixed_tile<C, kStochastic>(table, block, thread);
}

template <class Table, class M>
void thread_of_fixed(const gpu::Launch& launch, const Table& table, uint32_t block, uint32_t thread) {
    if (!launch.stochastic) return gpu::fixed_tile<M, false>(table, block, thread);
    if constexpr (M::kNarrows) gpu::fixed_tile<M, true>(table, block, thread);
    else throw std::logic_error("a stochastic launch where no rounding drops bits");
}

template <class Table> using Body = void (*)(const gpu::Launch&, const Table&, uint32_t, uint32_t);

template <class Table, class... M> Body<Table> fixed_body(int kernel, gpu::MixList<M...>) {
    static constexpr Body<Table> bodies[] = {&thread_of_fixed<Table, M>...};
    return bodies[kernel];
}

template <class Table> Body<Table> body(const gpu::Launch& launch) {
    if (launch.kernel >= 0) return fixed_body<Table>(launch.kernel, gpu::Hot{});
    if (launch.in_double && launch.stochastic) return &thread_of_mixed<Table, double, true>;
    if (launch.in_double) return &thread_of_mixed<Table, double, false>;
    return launch.stochastic ? &thread_of_mixed<Table, float, true> : &thread_of_mixed<Table, float, false>;
}

// `ends`: how many blocks at either end of a launch to run, 0 for all.
template <class Table> void execute(const gpu::Launch& launch, uint32_t ends) {
    Table table;
    memset(static_cast<void*>(&table), 0xa5, sizeof table);
    table.head = launch.head;
    std::copy(launch.words.begin(), launch.words.end(), table.words);
    const Body<Table> one = body<Table>(launch);
    for (uint32_t block = 0; block < launch.blocks; ++block) {
        if (ends && block >= ends && block + ends < launch.blocks) block = launch.blocks - ends;
        for (uint32_t thread = 0; thread < gpu::kThreads; ++thread) one(launch, table, block, thread);
    }
}

char error[512];

}  // namespace

// Arrays hold one entry an item, or one an operand of each item (the output first); sizes and strides one after another.
// Returns the number of launches, or -1 with the reason in emulate_error(). `counts` receives narrow
// and 16-byte accesses and the bytes written.
extern "C" int64_t emulate(int code, int inputs, const double* factors, int stochastic, uint64_t seed, uint64_t offset,
                           int64_t items, const int64_t* n, const uint64_t* streams, const uint64_t* pointers,
                           const int* types, const int* dims, const int64_t* sizes, const int64_t* strides, uint64_t words,
                           uint64_t blocks, uint32_t ends, uint64_t* counts) {
    using Small = gpu::Table<4096>;
    using Large = gpu::Table<32760>;
    const Operation op{OpCode(code), inputs, factors, stochastic != 0, seed};
    const size_t operands = size_t(inputs) + 1;
    std::vector<Item> list;
    for (int64_t i = 0; i < items; ++i, pointers += operands, types += operands) {
        Item item{n[i], streams[i], reinterpret_cast<void*>(pointers[0]), DType(types[0]), {}, {}, {}, {}};
        for (size_t k = 1; k < operands; ++k) {
            item.in.push_back(reinterpret_cast<const void*>(pointers[k]));
            item.in_types.push_back(DType(types[k]));
        }
        item.sizes.assign(sizes, sizes + dims[i]);
        item.strides.assign(strides, strides + size_t(dims[i]) * operands);
        sizes += dims[i];
        strides += size_t(dims[i]) * operands;
        coalesce(item);
        list.push_back(item);
    }
    narrow = wide = written = 0;
    note_spans(list);
    try {
        const gpu::Limits limits{std::min<size_t>(size_t(words), Large::kWords), uint32_t(blocks)};
        const std::vector<gpu::Launch> launches = gpu::schedule(op, list, offset, gpu::Hot::fixed(), limits);
        for (const gpu::Launch& launch : launches) {
            if (launch.words.size() <= Small::kWords) execute<Small>(launch, ends);
            else execute<Large>(launch, ends);
        }
        counts[0] = narrow;
        counts[1] = wide;
        counts[2] = written;
        return int64_t(launches.size());
    } catch (const std::exception& e) {
        std::snprintf(error, sizeof error, "%s", e.what());
        return -1;
    }
}

extern "C" const char* emulate_error() { return error; }

// Parts as in csrc/coded.h; codes begin `skipped` bytes into their tensor and have so many. Returns the bytes written.
extern "C" int64_t emulate_decode(const int* kinds, const float* table, const int64_t* sizes, const char* codes, int64_t bytes,
                                  const char* scale, const char* zero, const char* over, int64_t first, int64_t n, float* out) {
    Coded c{};
    c.type = CodeType(kinds[0]);
    c.high_first = kinds[1] != 0;
    c.scale_type = ScaleType(kinds[2]);
    c.zero_type = ZeroType(kinds[3]);
    c.second = Second(kinds[4]);
    memcpy(c.table, table, sizeof c.table);
    c.matrices = sizes[0], c.rows = sizes[1], c.columns = sizes[2], c.row_bytes = sizes[3];
    c.block_rows = sizes[4], c.block_columns = sizes[5], c.skipped = sizes[6], c.seconds = sizes[7];
    c.codes = codes, c.scale = scale, c.zero = zero, c.over = over;
    const auto begin = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    spans = {{begin(codes), begin(codes) + uintptr_t(bytes)}, {begin(out), begin(out) + uintptr_t(n) * 4}};
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    written = 0;
    try {
        for (int64_t i = 0; i < n; i += gpu::kDecoded)
            gpu::decode_numbers(c, c.table, first, n, reinterpret_cast<char*>(out), i);
        return int64_t(written);
    } catch (const std::exception& e) {
        std::snprintf(error, sizeof error, "%s", e.what());
        return -1;
    }
}
