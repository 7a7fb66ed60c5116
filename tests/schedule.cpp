// The tables that csrc/schedule.h builds for GPU launches, read back as a kernel reads them. Compiled and run by
// tests/backends/test_schedule.py; pointers here lead nowhere, so sizes may be anything. Prints the number of failures last.
#include <cstdio>
#include <map>
#include <random>

#include "kernel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

using namespace ires;
using gpu::Launch;

namespace {

int failures = 0;
#define CHECK(condition)                                              \
    do {                                                              \
        if (!(condition) && ++failures <= 20)                         \
            std::printf("line %d: %s is false\n", __LINE__, #condition); \
    } while (0)

constexpr size_t kSmall = gpu::Table<4096>::kWords, kLarge = gpu::Table<32760>::kWords;
const std::vector<gpu::Fixed> kFixed = gpu::Hot::fixed();

// The next good place for n elements, `shift` bytes on.
void* somewhere(int64_t n, DType type, int shift = 0) {
    static uintptr_t next = uintptr_t(1) << 46;
    const uintptr_t here = next;
    next += (uintptr_t(n) * uintptr_t(item_size(type)) + 255) / 256 * 256 + 256;
    return reinterpret_cast<void*>(here + uintptr_t(shift));
}

Item make(int64_t n, const std::vector<DType>& types, uint64_t stream = 0, const std::vector<int>& shifts = {}) {
    Item item{n, stream, nullptr, types[0], {}, {types.begin() + 1, types.end()}, {}, {}};
    for (size_t k = 0; k < types.size(); ++k) {
        void* p = somewhere(n, types[k], k < shifts.size() ? shifts[k] : 0);
        if (k == 0) item.out = p;
        else item.in.push_back(p);
    }
    return item;
}

Operation operation(OpCode code, const std::vector<double>& factors, int inputs, bool stochastic = false) {
    return {code, inputs, factors.data(), stochastic, 42};
}

std::vector<Launch> plan(const Operation& op, const std::vector<Item>& items, const gpu::Limits& limits = {kLarge}) {
    return gpu::schedule(op, items, 7, kFixed, limits);
}

// A launch as a kernel sees it.
struct View {
    gpu::Header head;
    const uint64_t* words;
};

int64_t tile_of(const Launch& launch) {
    if (launch.kernel == gpu::kMixed) return gpu::kThreads * gpu::mixed_vector(launch.in_double);
    return gpu::kThreads * kFixed[size_t(launch.kernel)].vector * kFixed[size_t(launch.kernel)].unroll;
}

// Every element of every item is in one tile of one launch, and the table says what the item said.
void covers(const std::vector<Item>& items, const std::vector<Launch>& launches, const gpu::Limits& limits) {
    std::map<uint64_t, int64_t> reached;  // by the address of the output: where the next tile has to begin
    std::map<uint64_t, const Item*> by_address;
    for (const Item& item : items) by_address[reinterpret_cast<uintptr_t>(item.out)] = &item;
    for (const Launch& launch : launches) {
        CHECK(launch.words.size() <= limits.words);
        CHECK(launch.blocks >= 1 && launch.blocks <= limits.blocks);
        if (launch.kernel == gpu::kStrided) continue;
        const View view{launch.head, launch.words.data()};
        const uint32_t operands = launch.head.operands;
        const int64_t tile = tile_of(launch);
        uint32_t before = 0;
        for (uint32_t i = 0; i < launch.head.items; ++i) {
            const uint32_t end = gpu::tiles_up_to(view, operands, i);
            CHECK(end > before);
            const gpu::Tile first = gpu::find_tile(view, operands, before, int(tile));
            const gpu::Tile last = gpu::find_tile(view, operands, end - 1, int(tile));
            CHECK(first.at == gpu::items_at(operands, launch.head.items) + i * gpu::item_words(operands) && last.at == first.at);
            CHECK(first.at + gpu::item_words(operands) <= launch.words.size());
            const auto found = by_address.find(launch.words[first.at]);
            CHECK(found != by_address.end());
            if (found == by_address.end()) continue;
            const Item& item = *found->second;
            CHECK(first.n == item.n && first.stream == item.stream && last.n == item.n);
            CHECK(last.begin == first.begin + (end - before - 1) * tile);
            for (size_t k = 0; k < operands; ++k) {
                CHECK(launch.words[first.at + k] == reinterpret_cast<uintptr_t>(gpu::detail::operand(item, k)));
                CHECK(gpu::type_of(view, uint32_t(k)) == gpu::detail::operand_type(item, k));
            }
            const auto at = reached.find(launch.words[first.at]);
            if (at == reached.end()) CHECK(first.begin <= 0 && first.begin > -8);
            else CHECK(first.begin == at->second);
            CHECK(last.begin < item.n);
            reached[launch.words[first.at]] = last.begin + tile;
            before = end;
        }
        CHECK(before == launch.blocks);
    }
    for (const Item& item : items) {
        if (item.n == 0 || !item.sizes.empty()) continue;
        CHECK(reached[reinterpret_cast<uintptr_t>(item.out)] >= item.n);
    }
}

const std::vector<DType> kBf16x4(4, DType::bf16), kBf16x3(3, DType::bf16);

void sizes() {
    const Operation op = operation(OpCode::add_difference, {0.5}, 3);
    CHECK(plan(op, {}).empty());
    CHECK(plan(op, {make(0, kBf16x4), make(0, kBf16x4)}).empty());
    CHECK(plan(op, {make(0, kBf16x4, 0, {2, 2, 2, 2})}).empty());  // nothing in front of nothing either
    Item strided = make(0, kBf16x4);
    strided.sizes = {3, 0};
    strided.strides = {7, 2, 7, 2, 7, 2, 7, 2};
    CHECK(plan(op, {strided}).empty());
    const int64_t tile = 4096;  // 256 threads, 8 elements, twice
    const struct { int64_t n; uint32_t tiles; } cases[] = {
        {1, 1}, {7, 1}, {333, 1}, {tile - 1, 1}, {tile, 1}, {tile + 1, 2}, {33333, 9}, {(int64_t(1) << 31) + 5, 524289},
        {(int64_t(1) << 40) + 1, 268435457}};
    for (const auto& c : cases) {
        const std::vector<Item> items{make(c.n, kBf16x4, 5)};
        const auto launches = plan(op, items);
        CHECK(launches.size() == 1 && launches[0].blocks == c.tiles && launches[0].words.size() <= kSmall);
        CHECK(launches[0].head.seed == 42 && launches[0].head.offset == 7 && launches[0].head.code == OpCode::add_difference);
        covers(items, launches, {kLarge});
    }
    // Empty tensors between others leave no trace.
    const std::vector<Item> items{make(0, kBf16x4), make(5, kBf16x4), make(0, kBf16x4), make(tile + 1, kBf16x4), make(0, kBf16x4)};
    const auto launches = plan(op, items);
    CHECK(launches.size() == 1 && launches[0].head.items == 2 && launches[0].blocks == 3);
    covers(items, launches, {kLarge});
}

// More tiles than a launch may have blocks: on in the next one.
void grid_limit() {
    const Operation op = operation(OpCode::scale, {0.5}, 1);
    const std::vector<DType> types(2, DType::e5m2);
    const int64_t tile = 256 * 8, n = tile * (int64_t(gpu::kMaxBlocks) * 2 + 3) - 1;
    const std::vector<Item> items{make(tile * 5, types), make(n, types), make(1, types)};
    const auto launches = plan(op, items);
    CHECK(launches.size() == 3);
    CHECK(launches[0].blocks == gpu::kMaxBlocks && launches[1].blocks == gpu::kMaxBlocks && launches[2].blocks == 3 + 5 + 1);
    covers(items, launches, {kLarge});
}

void lists() {
    const Operation op = operation(OpCode::add_difference, {0.5}, 3);
    std::vector<Item> items;
    for (int i = 0; i < 300; ++i) items.push_back(make(1 + i * 977, kBf16x4, uint64_t(i)));
    auto launches = plan(op, items);
    CHECK(launches.size() == 1 && launches[0].head.items == 300 && launches[0].words.size() > kSmall);
    covers(items, launches, {kLarge});
    launches = plan(op, items, {kSmall});
    const size_t fit = (kSmall - 8) * 2 / 15;  // 7 words and a half each
    CHECK(launches.size() == (300 + fit - 1) / fit && launches[0].head.items == fit);
    covers(items, launches, {kSmall});
    // Types alternate: a launch for each mix, in the order of their first tensors.
    for (size_t i = 0; i < items.size(); i += 3) items[i].in_types[1] = DType::f16;
    launches = plan(op, items);
    CHECK(launches.size() == 2 && launches[0].kernel == gpu::kMixed && launches[1].kernel >= 0);
    CHECK(launches[0].head.items == 100 && launches[1].head.items == 200);
    covers(items, launches, {kLarge});
}

void kernels() {
    const auto one = [](const Operation& op, const std::vector<DType>& types) { return plan(op, {make(99, types)}).at(0); };
    const double factors[] = {0.5, 0.25};
    for (size_t f = 0; f < kFixed.size(); ++f) {  // every fixed kernel is found, and rounds at random only where it narrows
        const std::vector<DType> types(kFixed[f].types, kFixed[f].types + kFixed[f].operands);
        const Launch launch = one({kFixed[f].code, kFixed[f].operands - 1, factors, true, 0}, types);
        CHECK(launch.kernel == int(f) && !launch.in_double && launch.stochastic == (types[0] != DType::f32));
    }
    const Operation op{OpCode::add, 2, factors, true, 0};
    const Launch mixed = one(op, {DType::e5m2, DType::bf16, DType::f32});
    CHECK(mixed.kernel == gpu::kMixed && !mixed.in_double && mixed.stochastic);
    const Launch wide = one(op, {DType::f32, DType::f64, DType::f32});
    CHECK(wide.kernel == gpu::kMixed && wide.in_double && wide.stochastic);
    CHECK(!one(op, {DType::f64, DType::f32, DType::f32}).stochastic && one(op, {DType::f64, DType::f32, DType::f32}).in_double);
    CHECK(one({OpCode::add, 3, factors, false, 0}, kBf16x4).kernel == gpu::kMixed);  // two residuals
}

void factors() {
    const double tiny = 1e-40, third = 1.0 / 3;
    const double list[] = {third, tiny};
#if defined(__SSE__)
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040);  // a caller that flushes subnormals
#endif
    const Launch single = plan({OpCode::add, 3, list, false, 0}, {make(9, kBf16x4)}).at(0);
    const Launch wide = plan({OpCode::add, 3, list, false, 0}, {make(9, std::vector<DType>(4, DType::f64))}).at(0);
    const Launch difference = plan({OpCode::add_difference, 3, list, false, 0}, {make(9, kBf16x4)}).at(0);
#if defined(__SSE__)
    _mm_setcsr(saved);
#endif
    CHECK(bit_cast<float>(uint32_t(single.words[2])) == float(third) && single.words[3] == bit_cast<uint32_t>(1e-40f));
    CHECK(single.words[3] != 0);
    CHECK(bit_cast<double>(wide.words[2]) == third && bit_cast<double>(wide.words[3]) == tiny);
    CHECK(bit_cast<float>(uint32_t(difference.words[3])) == float(third));
}

// Views that are shifted alike start in front of themselves, so that tiles after the first are aligned.
void alignment() {
    const Operation add{OpCode::add, 2, nullptr, false, 0};
    const double half = 0.5;
    const auto first = [&](const std::vector<DType>& types, const std::vector<int>& shifts) {
        Operation op = add;
        op.factors = &half;
        const Launch launch = plan(op, {make(100000, types, 0, shifts)}).at(0);
        return int64_t(launch.words[gpu::items_at(3, 1) + 3 + 1]);
    };
    CHECK(first(kBf16x3, {0, 0, 0}) == 0);
    CHECK(first(kBf16x3, {16, 32, 48}) == 0);
    for (int shift = 1; shift < 8; ++shift) CHECK(first(kBf16x3, {2 * shift, 2 * shift + 16, 2 * shift}) == -shift);
    CHECK(first(kBf16x3, {2, 4, 2}) == 0);   // no place fits all
    CHECK(first(kBf16x3, {1, 1, 1}) == 0);   // odd addresses: none fits any
    const std::vector<DType> mixed{DType::bf16, DType::bf16, DType::e4m3};
    CHECK(first(mixed, {6, 6, 3}) == -3);
    CHECK(first(mixed, {6, 6, 11}) == -3);   // 8 bytes at a time of the narrow one
    CHECK(first(mixed, {6, 6, 4}) == 0);
}

void strides() {
    const double half = 0.5;
    const Operation op{OpCode::add, 2, &half, true, 0};
    Item item = make(35, kBf16x3, 9);
    item.sizes = {5, 7};
    item.strides = {8, 1, 7, 1, 1, 5};
    Item flat = make(35, kBf16x3);
    const auto launches = plan(op, {item, flat});
    CHECK(launches.size() == 2 && launches[0].kernel == gpu::kStrided && launches[1].kernel >= 0);
    const Launch& launch = launches[0];
    CHECK(launch.blocks == 1 && launch.head.dims == 2 && launch.stochastic && launch.head.items == 1);
    const uint64_t wanted[] = {5, 7, 8, 1, 7, 1, 1, 5};
    CHECK(std::equal(wanted, wanted + 8, launch.words.begin() + gpu::sizes_at(3)));
    const uint32_t at = gpu::strided_item_at(3, 2);
    CHECK(launch.words.size() == at + gpu::item_words(3) && launch.words[at] == reinterpret_cast<uintptr_t>(item.out));
    CHECK(launch.words[at + 3] == 35 && launch.words[at + 5] == 9);
    item.n = int64_t(gpu::kMaxBlocks) * 1000;  // beyond a grid: threads take several elements
    CHECK(plan(op, {item}).at(0).blocks == gpu::kMaxBlocks);
}

void too_large() {
    const std::vector<double> factors(5000, 0.5);
    const auto fits = [&](int residuals, size_t words, int dims) {
        Item item = make(5, std::vector<DType>(size_t(residuals) + 2, DType::bf16));
        item.sizes.assign(size_t(dims), 1);
        item.strides.assign(size_t(dims) * size_t(residuals + 2), 1);
        try {
            const auto launches = plan(operation(OpCode::add, factors, residuals + 1), {item}, {words});
            return launches.size() == 1 && launches[0].words.size() <= words;
        } catch (const std::length_error& error) {
            CHECK(std::string(error.what()).find("pass fewer residuals") != std::string::npos);
            return false;
        }
    };
    CHECK(fits(1, kSmall, 0) && fits(160, kSmall, 0) && !fits(170, kSmall, 0));
    CHECK(fits(1350, kLarge, 0) && !fits(1370, kLarge, 0) && !fits(4000, kLarge, 0));
    CHECK(fits(1, kSmall, 64) && fits(2, kSmall, 64) && fits(40, kLarge, 64) && !fits(70, kLarge, 64));
}

// Anything, under any limits.
void random_lists() {
    std::mt19937 draw(1);
    const auto below = [&draw](uint32_t n) { return uint32_t(draw() % n); };
    const double factors[] = {0.5, 0.25, 0.125};
    for (int round = 0; round < 2000; ++round) {
        const OpCode codes[] = {OpCode::subtract, OpCode::add, OpCode::scale, OpCode::add_difference};
        const OpCode code = codes[below(4)];
        const int inputs = code == OpCode::scale ? 1 : code == OpCode::subtract ? 2 : code == OpCode::add ? 2 + int(below(3)) : 3;
        const int kinds = 1 + int(below(3));
        std::vector<std::vector<DType>> types(static_cast<size_t>(kinds));
        for (auto& kind : types)
            for (int k = 0; k <= inputs; ++k) kind.push_back(below(2) ? DType::bf16 : DType(int(below(6))));
        const gpu::Limits limits{below(2) ? kLarge : 30 + below(200), below(2) ? gpu::kMaxBlocks : 1 + below(20)};
        std::vector<Item> items;
        for (uint32_t i = 0, count = 1 + below(40); i < count; ++i) {
            const bool huge = limits.blocks == gpu::kMaxBlocks && !below(10);
            const int64_t n = int64_t(below(4) ? below(20000) : below(2)) << (huge ? 20 : 0);
            items.push_back(make(n, types[below(uint32_t(kinds))], draw(), {int(below(16)), int(below(16))}));
        }
        covers(items, plan({code, inputs, factors, below(2) == 0, 0}, items, limits), limits);
    }
}

}  // namespace

int main() {
    sizes();
    grid_limit();
    lists();
    kernels();
    factors();
    alignment();
    strides();
    too_large();
    random_lists();
    std::printf("failures %d\n", failures);
    return failures != 0;
}
