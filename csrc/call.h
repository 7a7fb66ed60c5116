// A call as the drivers see it, those of the CPU (cpu.h) and of the GPU (cuda.h) alike.
#pragma once

#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "arith.h"
#include "coded.h"

namespace ires {

// What is done: the same for every tensor of a call.
struct Operation {
    OpCode code;
    int inputs;             // subtract 2, add 1 + residuals, scale 1, add_difference 1 + 2 pairs
    const double* factors;  // add: one per residual, add_difference: one per pair, scale: one, subtract: none
    bool stochastic;
    uint64_t seed;
};

IRES_HD int item_size(DType t) {
    switch (t) {
        case DType::f64: return 8;
        case DType::f32: return 4;
        case DType::f16: case DType::bf16: return 2;
        default: return 1;
    }
}

// An operand that is decoded as it is used: numbers of `coded` from `first` on. Without `coded` it is not one.
struct Decoded {
    const Coded* coded = nullptr;
    int64_t first = 0;
};

// One output tensor of a call. Strides are in elements, operand-major (the output first), and empty where all operands
// are contiguous.
struct Item {
    int64_t n;
    uint64_t stream;
    void* out;
    DType out_type;
    std::vector<const void*> in;
    std::vector<DType> in_types;
    std::vector<int64_t> sizes, strides;
    // Empty, or for each input what it is decoded from, on a CPU; then `in` has no pointer for it, and all is contiguous.
    std::vector<Decoded> decoded;
};

// Merges dimensions that are contiguous in every operand; an item that is contiguous altogether loses its strides.
inline void coalesce(Item& item) {
    if (item.sizes.empty()) return;
    const size_t dims = item.sizes.size(), operands = item.in.size() + 1;
    std::vector<int64_t> sizes;
    std::vector<std::vector<int64_t>> strides(operands);
    for (size_t d = 0; d < dims; ++d) {
        if (item.sizes[d] == 1) continue;
        bool joins = !sizes.empty();
        for (size_t k = 0; joins && k < operands; ++k)
            joins = strides[k].back() == item.strides[k * dims + d] * item.sizes[d];
        if (joins) sizes.back() *= item.sizes[d];
        else sizes.push_back(item.sizes[d]);
        for (size_t k = 0; k < operands; ++k) {
            if (joins) strides[k].back() = item.strides[k * dims + d];
            else strides[k].push_back(item.strides[k * dims + d]);
        }
    }
    bool contiguous = sizes.size() <= 1;
    for (size_t k = 0; contiguous && k < operands; ++k) contiguous = sizes.empty() || strides[k][0] == 1;
    item.sizes.clear();
    item.strides.clear();
    if (contiguous) return;
    item.sizes = sizes;
    for (const auto& of_operand : strides) item.strides.insert(item.strides.end(), of_operand.begin(), of_operand.end());
}

// Subnormals are kept and rounding is to nearest even for as long as this lives, whatever the caller's thread
// (torch.set_flush_denormal, a library built with -ffast-math) has set.
class IeeeMode {
public:
#if defined(__SSE__)
    IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~IeeeMode() { _mm_setcsr(saved_); }
private:
    unsigned saved_;
#elif defined(__aarch64__)
    IeeeMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
    }
    ~IeeeMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
private:
    uint64_t saved_;
#else
public:
    IeeeMode() {}
#endif
};

}  // namespace ires
