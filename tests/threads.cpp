// The threaded loops under ThreadSanitizer, with no Python in the process: every operation on many threads, called from
// several threads at once, on contiguous and strided tensors, with and without a tally, into tensors of their own and
// into parts of one. Each result is compared with that of one thread. Built and run by tests/sanitize.py; prints the
// number of failures last.
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu.h"

using namespace ires;

namespace {

constexpr int64_t kElements = (int64_t(1) << 21) + 77;  // many chunks, and an odd end
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
    Item item{n, 1, out + first * step * item_size(c.out), c.out, {}, {}, {}, {}};
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

}  // namespace

int main() {
    int failures = 0;
    for (const std::string& isa : isas()) {
        for (const Case& c : kCases) failures += check(c, isa);
        std::vector<char> out(size_t(4 * kElements));
        const std::vector<std::vector<char>> in(2, out);
        run_memory(item(kCases[0], kElements, out.data(), in, 0), kThreads, isa);
    }
    printf("failures %d\n", failures);
    return failures != 0;
}
