// The threaded loops under ThreadSanitizer, with no Python in the process: every operation on many threads, called from
// several threads at once, on contiguous and strided tensors, with and without a tally, into tensors of their own and
// into parts of one; quantized tensors decoded, on the way into an operation too, and encoded; models that are only
// looked at; operands that are read piece by piece, from files and from memory that is kept aside; and bits that are
// packed. Each result is compared with that of one thread. Built and run by tests/sanitize.py; prints the number of
// failures last.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu.h"
#include "fused.h"
#include "look.h"

using namespace ires;

namespace {

constexpr int64_t kElements = (int64_t(1) << 21) + 77;  // many chunks, and an odd end
constexpr int64_t kRows = 1031, kColumns = 2080;
constexpr int kThreads = 4;
const double kFactors[] = {0.7, -0.2};

std::vector<char> bytes(int64_t n, DType type, unsigned seed) {
    std::vector<char> out(size_t(n * item_size(type)));
    for (char& c : out) c = char((seed = seed * 1664525u + 1013904223u) >> 26);  // small exponents: few NaNs
    return out;
}

struct Case {
    OpCode code;
    int inputs, factors;
    DType out, in;
    bool strided, stochastic;
};
const Case kCases[] = {
    {OpCode::subtract, 2, 0, DType::f32, DType::bf16, false, false},
    {OpCode::add, 3, 2, DType::bf16, DType::bf16, false, true},
    {OpCode::scale, 1, 1, DType::f16, DType::f32, true, false},
    {OpCode::add_difference, 3, 1, DType::bf16, DType::bf16, true, true},
    {OpCode::add_difference, 3, 1, DType::f64, DType::f32, false, false},
    {OpCode::add_difference, 3, 1, DType::e4m3, DType::bf16, false, false},
};

// One item that covers `n` elements, or every other one of twice as many.
Item item(const Case& c, int64_t n, char* out, const std::vector<std::vector<char>>& in, int64_t first) {
    const int64_t step = c.strided ? 2 : 1;
    Item item{n, 1, out + first * step * item_size(c.out), c.out, {}, {}, {}, {}, {}};
    for (const auto& operand : in) {
        item.in.push_back(operand.data() + first * step * item_size(c.in));
        item.in_types.push_back(c.in);
    }
    if (c.strided) {
        item.sizes = {n};
        item.strides.assign(in.size() + 1, step);
    }
    return item;
}

int check(const Case& c, const std::string& isa) {
    const int64_t n = c.strided ? kElements / 4 : kElements, size = c.strided ? 2 * n : n;
    std::vector<std::vector<char>> in;
    for (int k = 0; k < c.inputs; ++k) in.push_back(bytes(size, c.in, unsigned(k) + 1));
    const Operation op{c.code, c.inputs, kFactors, c.stochastic, 7};
    const auto once = [&](std::vector<char>& out, int threads, int parts, Tally* tally) {
        std::vector<Item> items;
        for (int part = 0; part < parts; ++part) {
            const int64_t first = n * part / parts;
            items.push_back(item(c, n * (part + 1) / parts - first, out.data(), in, first));
        }
        run(op, items, 0, threads, isa, tally);
    };
    int failures = 0;
    for (const int parts : {1, 3}) {
        std::vector<char> wanted(size_t(size * item_size(c.out)));
        Tally single;
        const bool counts = c.code != OpCode::scale;  // nobody asks how much of a scaling was lost
        once(wanted, 1, parts, counts ? &single : nullptr);
        std::vector<std::vector<char>> found(3, std::vector<char>(wanted.size()));
        std::vector<Tally> tallies(found.size());
        std::vector<std::thread> callers;
        for (size_t i = 0; i < found.size(); ++i)
            callers.emplace_back([&, i] { once(found[i], kThreads, parts, counts && i ? &tallies[i] : nullptr); });
        for (std::thread& caller : callers) caller.join();
        for (size_t i = 0; i < found.size(); ++i) {
            failures += found[i] != wanted;
            const Tally &one = single, &many = tallies[i];
            failures += counts && i && (many.updates != one.updates || many.lost != one.lost || many.nan_out != one.nan_out);
        }
    }
    printf("%s, operation %d, %d inputs%s%s: %d failures\n", isa.c_str(), int(c.code), c.inputs, c.strided ? ", strided" : "",
           c.stochastic ? ", stochastic" : "", failures);
    return failures;
}

struct Coding {
    const char* name;
    CodeType type;
    bool transposed;
    int64_t block_rows, block_columns;
    ScaleType scale_type;
    ZeroType zero_type;
    bool encodes;
};
const Coding kCodings[] = {
    {"fp8 blocks", CodeType::e4m3, false, 128, 128, ScaleType::f32, ZeroType::none, true},
    {"fp8 rows", CodeType::e4m3, false, 1, kColumns, ScaleType::bf16, ZeroType::none, true},
    {"fp8 of 32", CodeType::e4m3, false, 1, 32, ScaleType::e8m0, ZeroType::none, true},
    {"int8 rows", CodeType::i8, false, 1, kColumns, ScaleType::f16, ZeroType::none, true},
    {"int8 with zeros", CodeType::i8, false, 1, 64, ScaleType::f32, ZeroType::i8, false},
    {"4 bits", CodeType::nibbles, false, 1, 32, ScaleType::e8m0, ZeroType::none, false},
    {"4 bits, transposed", CodeType::nibbles, true, 1, 32, ScaleType::e4m3, ZeroType::none, false},
};

// Whether several callers at a time, each of all of it, make the bytes that one makes alone.
template <class T, class Make> bool same(size_t count, const Make& make) {
    std::vector<T> wanted(count);
    make(wanted.data(), 1);
    std::vector<std::vector<T>> found(3, std::vector<T>(count));
    std::vector<std::thread> callers;
    for (std::vector<T>& one : found) callers.emplace_back([&] { make(one.data(), kThreads); });
    for (std::thread& caller : callers) caller.join();
    bool all = true;
    for (const std::vector<T>& one : found) all &= memcmp(one.data(), wanted.data(), count * sizeof(T)) == 0;
    return all;
}

int check_coded(const Coding& k, const std::string& isa) {
    constexpr int64_t n = kRows * kColumns;
    const std::vector<char> codes = bytes(n, DType::e4m3, 1), scales = bytes(n, DType::f32, 2), zeros = bytes(n, DType::e4m3, 3);
    Coded c{};
    c.type = k.type, c.transposed = k.transposed, c.matrices = 1, c.rows = kRows, c.columns = kColumns;
    for (int i = 0; i < 16; ++i) c.table[i] = float(i - 8);
    c.row_bytes = kColumns * code_bits(k.type) / 8;
    c.block_rows = k.block_rows, c.block_columns = k.block_columns, c.scale_type = k.scale_type, c.zero_type = k.zero_type;
    c.seconds = 1, c.codes = codes.data(), c.scale = scales.data(), c.zero = zeros.data();

    const std::vector<char> instruct = bytes(n, DType::bf16, 4), base = bytes(n, DType::bf16, 5);
    const Operation op{OpCode::add_difference, 3, kFactors, false, 7};
    const auto sum = [&](void* out, DType type, int64_t first, int64_t count) {
        Item one{count, 1, out, type, {nullptr}, {DType::f32, DType::bf16, DType::bf16}, {}, {}, {{&c, first}, {}, {}}};
        for (const auto& operand : {&instruct, &base}) one.in.push_back(operand->data() + 2 * first);
        return one;
    };
    int failures = 0;
    failures += !same<float>(n, [&](float* out, int threads) { decode(c, 0, n, out, threads, isa); });
    for (const bool counts : {false, true})
        failures += !same<uint16_t>(n, [&](uint16_t* out, int threads) {
            Tally tally;
            std::vector<Item> items{sum(out, DType::bf16, 0, n)};
            run(op, items, 0, threads, isa, counts ? &tally : nullptr);
        });
    if (k.encodes) {
        std::vector<float> values(n);
        decode(c, 0, n, values.data(), 1, isa);
        const Draw draw{7, 1};
        for (const Draw* words : {static_cast<const Draw*>(nullptr), &draw}) {
            failures += !same<uint8_t>(n, [&](uint8_t* out, int threads) {
                encode(c, 0, n, values.data(), words, out, threads, isa);
            });
            // As a merge does it: pieces of one tensor, each by a thread.
            failures += !same<uint8_t>(n, [&](uint8_t* out, int threads) {
                std::vector<std::thread> team;
                for (int part = 0; part < threads; ++part)
                    team.emplace_back([&, part] {
                        const int64_t first = n * part / threads, count = n * (part + 1) / threads - first;
                        Coded piece = c;
                        piece.codes += first, piece.skipped = first;
                        Tally tally;
                        Stored stored;
                        store(op, sum(nullptr, DType::f32, first, count), uint64_t(first),
                              {&piece, part % 2 == 0, words, out + first}, isa, part ? &tally : nullptr, &stored);
                    });
                for (std::thread& one : team) one.join();
            });
        }
        const size_t cells = size_t(grid_rows(c) * grid_columns(c));
        failures += !same<float>(cells, [&](float* out, int) { measure(c, 0, n, values.data(), out, isa); });
        failures += !same<float>(cells, [&](float* out, int) {
            measure_results(op, sum(nullptr, DType::f32, 0, n), 0, c, out, isa);
        });
    }
    printf("%s, %s: %d failures\n", isa.c_str(), k.name, failures);
    return failures;
}

Stretch in_file(FILE* file, int64_t begin, int64_t bytes) { return {fileno(file), begin, nullptr, size_t(bytes), nullptr, nullptr}; }

// Three models that are compared, in memory and out of one file.
int check_looked_at(DType type, const std::string& isa) {
    const std::vector<char> model = bytes(3 * kElements, type, 1);
    const float alphas[] = {0.3f, 1.0f};
    const int64_t size = kElements * item_size(type);
    FitRun run{kElements, type, {type, type, type}, {model.data(), model.data() + size, model.data() + 2 * size}, alphas, 2};
    FILE* const file = tmpfile();
    int failures = !file || fwrite(model.data(), 1, model.size(), file) != model.size() || fflush(file);
    if (failures) return failures;
    const auto compared = [&](bool in_files) {
        return !same<Fit>(1, [&](Fit* out, int) {
            if (!in_files) return fit(run, isa, out);
            Runs runs[3];
            for (int k = 0; k < 3; ++k) {
                runs[k].add(in_file(file, k * size, size / 2));
                runs[k].add(in_file(file, k * size + size / 2, size - size / 2));
            }
            int failed = 0;
            if (fit_files(run, runs, isa, out, &failed).failed) out->elements = uint64_t(-1);
        });
    };
    failures = compared(false) + compared(true);
    fclose(file);
    printf("%s, looked at, type %d: %d failures\n", isa.c_str(), int(type), failures);
    return failures;
}

// A target in memory that is kept aside as it is changed, and a file that has the other operands, in two stretches each.
int check_fused(bool stochastic, const std::string& isa) {
    const DType type = DType::bf16;
    const std::vector<char> target = bytes(kElements, type, 1), others = bytes(2 * kElements, type, 2);
    const int64_t size = kElements * item_size(type);
    FILE* const file = tmpfile();
    int failures = !file || fwrite(others.data(), 1, others.size(), file) != others.size() || fflush(file);
    if (failures) return failures;
    const Operation op{OpCode::add_difference, 3, kFactors, stochastic, 7};
    failures = !same<char>(size_t(2 * size), [&](char* out, int threads) {
        std::vector<std::thread> team;
        memcpy(out, target.data(), size_t(size));
        for (int part = 0; part < threads; ++part)
            team.emplace_back([&, part] {
                const int64_t first = kElements * part / threads, n = kElements * (part + 1) / threads - first;
                char* const here = out + 2 * first;
                Item one{n, 1, here, type, std::vector<const void*>(3), {type, type, type}, {}, {}, {}};
                std::vector<Source> sources(3);
                int64_t kept = 0;
                sources[0].runs.emplace();
                sources[0].runs->add({kMemory, 0, here, size_t(2 * n), here + size, &kept});
                for (int k = 0; k < 2; ++k) {
                    const int64_t begin = k * size + 2 * first, half = n | 1;  // bytes: not at the end of an element
                    Runs& runs = sources[size_t(k + 1)].runs.emplace();
                    runs.add(in_file(file, begin, half));
                    runs.add(in_file(file, begin + half, 2 * n - half));
                }
                int failed = 0;
                if (run_fused(op, one, sources, uint64_t(first), n, isa, &failed).failed || kept != 2 * n) here[0] ^= 1;
            });
        for (std::thread& one : team) one.join();
    });
    fclose(file);
    printf("%s, read by pieces%s: %d failures\n", isa.c_str(), stochastic ? ", stochastic" : "", failures);
    return failures;
}

// What an update did to the bits, packed and unpacked: nothing, a few steps, and anything.
int check_packed(DType type, const std::string& isa) {
    const std::vector<char> now = bytes(kElements, type, 1), any = bytes(kElements, type, 2);
    std::vector<char> old = now;
    for (size_t i = old.size() / 4; i < old.size() / 2; i += size_t(item_size(type))) old[i] = char(old[i] ^ 1);
    std::copy(any.begin() + int64_t(any.size() / 2), any.end(), old.begin() + int64_t(old.size() / 2));
    std::atomic<bool> gives_back{true};
    int failures = !same<char>(size_t(most_packed(type, kElements)), [&](char* out, int) {
        const int64_t used = pack(type, old.data(), now.data(), kElements, out, isa);
        std::vector<char> again = now;
        unpack(type, out, again.data(), kElements, isa);
        if (again != old) out[0] ^= 1, gives_back = false;
        std::fill(out + used, out + most_packed(type, kElements), 0);
    });
    failures += !gives_back;
    printf("%s, packed, type %d: %d failures\n", isa.c_str(), int(type), failures);
    return failures;
}

}  // namespace

int main() {
    int failures = 0;
    for (const std::string& isa : isas()) {
        for (const Case& c : kCases) failures += check(c, isa);
        for (const Coding& k : kCodings) failures += check_coded(k, isa);
        for (const DType type : {DType::f32, DType::f16, DType::bf16, DType::e4m3}) failures += check_looked_at(type, isa);
        for (const bool stochastic : {false, true}) failures += check_fused(stochastic, isa);
        for (const DType type : {DType::f32, DType::f16, DType::bf16}) failures += check_packed(type, isa);
        std::vector<char> out(size_t(4 * kElements));
        const std::vector<std::vector<char>> in(2, out);
        run_memory(item(kCases[0], kElements, out.data(), in, 0), kThreads, isa);
    }
    printf("failures %d\n", failures);
    return failures != 0;
}
