// The CPU side: loops.cpp, compiled once per instruction set, and the driver cpu.cpp, which chooses one of them, splits
// tensors into chunks and hands these to threads.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "coded.h"

namespace ires {

// Sums of the report over one call. Field meanings: docs/numerics.md, "What is counted".
struct Tally {
    uint64_t updates = 0, lost = 0, nan_in = 0, inf_in = 0, nan_out = 0, overflow = 0;
    double dot = 0, norm2 = 0;
    void operator+=(const Tally& o) {
        updates += o.updates;
        lost += o.lost;
        nan_in += o.nan_in;
        inf_in += o.inf_in;
        nan_out += o.nan_out;
        overflow += o.overflow;
        dot += o.dot;
        norm2 += o.norm2;
    }
};

// Sums of what is stored as codes, of which a Tally knows nothing.
struct Stored {
    uint64_t lost = 0, nan_out = 0;
    double dot = 0, norm2 = 0;
    double noise = 0;  // of (stored - value)^2
    void operator+=(const Stored& o) {
        lost += o.lost;
        nan_out += o.nan_out;
        dot += o.dot;
        norm2 += o.norm2;
        noise += o.noise;
    }
};

constexpr int kFitSteps = 8, kFitAlphas = 8;

// How the update instruct - base fits a target that descends from the base too, by fit.h.
struct Fit {
    uint64_t elements = 0;                // target, instruct and base are finite; all else is of these
    uint64_t both = 0, conflicts = 0;     // drift and update are not 0; have different signs
    uint64_t within[kFitSteps] = {};      // the update is at most 2^k - 1 ulps
    double base = 0, drift = 0, update = 0, cross = 0;  // sums of squares, and of drift * update
    double moved[kFitAlphas] = {};        // sums of moved * update, by alpha
};

struct FitRun {
    int64_t n;
    DType out_type;  // of the target; not f64, and no input is
    DType in_types[3];
    const void* in[3];  // target, instruct, base
    const float* alphas;
    int count;
};

// A run of consecutive elements. Pointers need no alignment. `out` may equal an input exactly.
struct Run {
    int64_t n;
    uint64_t index;   // flat index of the first element in its whole tensor
    uint64_t stream;
    DType out_type;
    const DType* in_types;
    void* out;
    const void* const* in;
};

// Where the random words of stochastic rounding come from.
struct Draw { uint64_t seed, stream; };

struct Loops {
    // Computes one run on the calling thread. `tally` may be null; if it is not, `out` must not alias an input. A scaling
    // has no update that could be lost, so it has no tally.
    void (*run)(const Operation&, const Run&, Tally* tally);
    // The same with inputs that are decoded, of as many elements as there are in the run; `from` has one of each input, and
    // those that are not decoded are in the run. False, and nothing done, where there is no faster loop than by `decode`.
    bool (*run_scaled)(const Operation&, const Run&, const Decoded* from, Tally* tally);
    // Touches the same bytes as `run` would, with no arithmetic worth the name: the ceiling the benchmarks divide by.
    // False: no such loop for these element sizes.
    bool (*memory)(const Run&, int inputs);
    // Numbers [first, first + n) of a quantized tensor, on the calling thread.
    void (*decode)(const Coded&, int64_t first, int64_t n, float* out);
    // The codes of values [first, first + n), of 8 bits and without zeros, by the scales of `coded`; to nearest without
    // `draw`. And their share in the largest finite magnitude of each block.
    void (*encode)(const Coded&, int64_t first, int64_t n, const float* values, const Draw* draw, uint8_t* out);
    void (*measure)(const Coded&, int64_t first, int64_t n, const float* values, float* largest);
    // Codes that stay: those of values that are `again` what the codes of `before` stand for. And what was stored.
    void (*keep)(int64_t n, const float* values, const float* again, const uint8_t* before, uint8_t* codes);
    Stored (*count_stored)(int64_t n, const float* target, const float* update, const float* values, const float* stored);
    void (*fit)(const FitRun&, Fit*);
    // Of bf16, f16 and f32, see pack.h: the bytes of a record, of others 0; and what makes the old elements of the new ones.
    int64_t (*pack)(DType, const void* old, const void* now, int64_t n, char* out);
    void (*unpack)(DType, const char* record, void* now, int64_t n);
    bool (*fits)(DType, const char* record, const void* now, int64_t n);
};

#if defined(__x86_64__)
namespace v2 { extern const Loops loops; }
namespace v3 { extern const Loops loops; }
namespace v4 { extern const Loops loops; }
#else
namespace portable { extern const Loops loops; }
#endif

// Names of the instruction sets that were compiled in and that this CPU runs, best first.
std::vector<std::string> isas();

// `offset` is the flat index of each item's first element. Throws std::invalid_argument for an unknown `isa`.
void run(const Operation& op, std::vector<Item>& items, uint64_t offset, int threads, const std::string& isa, Tally* tally);
// The numbers [first, first + n) of a quantized tensor. Throws as `run` does.
void decode(const Coded& coded, int64_t first, int64_t n, float* out, int threads, const std::string& isa);
void encode(const Coded& coded, int64_t first, int64_t n, const float* values, const Draw* draw, uint8_t* out, int threads,
            const std::string& isa);
void measure(const Coded& coded, int64_t first, int64_t n, const float* values, float* largest, const std::string& isa);

// Results of an operation that become codes of a tensor: on the calling thread, by pieces whose numbers stay in the L1
// cache. The output of `item` is not used. `offset` counts within the tensor, as well.
struct Recoded {
    const Coded* coded;   // the scales that there are now, and the codes of the target before
    bool renewed;         // whether operand 0 is not what these are decoded to: by other scales, or another operand
    const Draw* draw;     // null: to nearest
    uint8_t* out;
};
// With `tally` both are counted: of the numbers, and of what is stored.
void store(const Operation& op, const Item& item, uint64_t offset, const Recoded& to, const std::string& isa, Tally* tally,
           Stored* stored);
// `measure` of such results.
void measure_results(const Operation& op, const Item& item, uint64_t offset, const Coded& coded, float* largest,
                     const std::string& isa);
void fit(const FitRun& run, const std::string& isa, Fit* found);  // adds to what was found
void run_memory(const Item& item, int threads, const std::string& isa);

// A record of the old elements, given the new ones, on the calling thread; returns its bytes, or 0 for a dtype that has none.
constexpr int64_t kBlockPacked = int64_t(1) << 15;
constexpr int64_t kLeastPacked = 1024;       // elements, if a record is made in several calls; of the last one less
int64_t most_packed(DType type, int64_t n);  // room that these want
int64_t pack(DType type, const void* old, const void* now, int64_t n, char* out, const std::string& isa);
void unpack(DType type, const char* record, void* now, int64_t n, const std::string& isa);
bool fits(DType type, const char* record, const void* now, int64_t n, const std::string& isa);  // whether these are the new ones

}  // namespace ires
