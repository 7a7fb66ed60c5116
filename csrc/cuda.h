// The GPU side as the Python binding sees it.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"
#include "coded.h"
#include "tile.h"

namespace ires {
namespace gpu {

// Queues the launches of a call on a stream (a cudaStream_t) of a device and returns; nothing is allocated or waited for.
// `offset` is the flat index of each item's first element. Throws std::runtime_error with what CUDA said and where.
void run(const Operation& op, std::vector<Item>& items, uint64_t offset, int device, uintptr_t stream);

// Queues the decoding of numbers [first, first + n) of a quantized tensor that is not transposed, all of whose parts are
// on the device. Throws std::runtime_error.
void decode(const Coded& coded, int64_t first, int64_t n, float* out, int device, uintptr_t stream);

// Queues a copy of what was read from host memory to the device on a stream. Throws std::runtime_error.
void copy(const Read& read, int device, uintptr_t stream);

// The CUDA version that the driver is for, 0 without one, and the least that will do; as 1000 * major + 10 * minor.
int driver_version();
int least_driver_version();

}  // namespace gpu
}  // namespace ires
