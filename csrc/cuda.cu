// The GPU kernels and their launches. What a thread does is in kernel.h, what a launch covers in schedule.h.
#include "cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernel.h"

namespace ires {
namespace gpu {
namespace {

// Tables come in two sizes, because a launch copies all of its parameter.
using Small = Table<4096>;
#if CUDART_VERSION >= 12010
using Large = Table<32760>;
#else
using Large = Small;
#endif

template <class M, class Table>
__global__ void __launch_bounds__(kThreads) fixed_nearest(const __grid_constant__ Table table) {
    fixed_tile<M, false>(table, blockIdx.x, threadIdx.x);
}
template <class M, class Table>
__global__ void __launch_bounds__(kThreads) fixed_stochastic(const __grid_constant__ Table table) {
    fixed_tile<M, true>(table, blockIdx.x, threadIdx.x);
}
template <class C, class Table>
__global__ void __launch_bounds__(kThreads) mixed_nearest(const __grid_constant__ Table table) {
    mixed_tile<C, false>(table, blockIdx.x, threadIdx.x);
}
template <class C, class Table>
__global__ void __launch_bounds__(kThreads) mixed_stochastic(const __grid_constant__ Table table) {
    mixed_tile<C, true>(table, blockIdx.x, threadIdx.x);
}
template <class C, class Table>
__global__ void __launch_bounds__(kThreads) strided_nearest(const __grid_constant__ Table table) {
    strided_elements<C, false>(table, blockIdx.x, gridDim.x, threadIdx.x);
}
template <class C, class Table>
__global__ void __launch_bounds__(kThreads) strided_stochastic(const __grid_constant__ Table table) {
    strided_elements<C, true>(table, blockIdx.x, gridDim.x, threadIdx.x);
}

__global__ void __launch_bounds__(kThreads)
decoding(const __grid_constant__ Coded coded, int64_t first, int64_t n, char* out) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = coded.table[threadIdx.x];
    __syncthreads();
    decode_numbers(coded, table, first, n, out, (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kDecoded);
}

template <class Table> using Kernel = void (*)(Table);

template <class Table, class... M> Kernel<Table> fixed_kernel(int kernel, bool stochastic, MixList<M...>) {
    const auto both = [](auto mix) -> std::pair<Kernel<Table>, Kernel<Table>> {
        using Mixed = decltype(mix);
        if constexpr (Mixed::kNarrows) return {fixed_nearest<Mixed, Table>, fixed_stochastic<Mixed, Table>};
        else return {fixed_nearest<Mixed, Table>, nullptr};
    };
    static const std::pair<Kernel<Table>, Kernel<Table>> kernels[] = {both(M{})...};
    return stochastic ? kernels[kernel].second : kernels[kernel].first;
}

template <class Table> Kernel<Table> find_kernel(const Launch& launch) {
    if (launch.kernel >= 0) return fixed_kernel<Table>(launch.kernel, launch.stochastic, Hot{});
    static const Kernel<Table> kernels[2][2][2] = {
        {{mixed_nearest<float, Table>, mixed_nearest<double, Table>},
         {mixed_stochastic<float, Table>, mixed_stochastic<double, Table>}},
        {{strided_nearest<float, Table>, strided_nearest<double, Table>},
         {strided_stochastic<float, Table>, strided_stochastic<double, Table>}},
    };
    return kernels[launch.kernel == kStrided][launch.stochastic][launch.in_double];
}

template <class Table> cudaError_t start(const Launch& launch, cudaStream_t stream) {
    Table table;
    table.head = launch.head;
    std::copy(launch.words.begin(), launch.words.end(), table.words);
    void* parameters[] = {&table};
    return cudaLaunchKernel(reinterpret_cast<const void*>(find_kernel<Table>(launch)), dim3(launch.blocks), dim3(kThreads),
                            parameters, 0, stream);
}

const char* name(DType type) {
    static const char* const names[] = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"};
    return names[int(type)];
}

// The operation, the sizes and the types of a call, for errors.
std::string describe(const Operation& op, const std::vector<Item>& items) {
    static const char* const names[] = {"subtract", "add", "scale", "add_difference"};
    std::string text = std::string(names[int(op.code)]) + " of " + std::to_string(items.size()) + " tensor(s)";
    if (items.empty()) return text;
    const auto fewer = [](const Item& a, const Item& b) { return a.n < b.n; };
    const auto largest = std::max_element(items.begin(), items.end(), fewer);
    text += ", the largest of " + std::to_string(largest->n) + " elements, " + name(largest->out_type) + " from";
    for (size_t k = 0; k < largest->in_types.size() && k < 8; ++k) text += std::string(" ") + name(largest->in_types[k]);
    if (largest->in_types.size() > 8) text += " and " + std::to_string(largest->in_types.size() - 8) + " more";
    return text;
}

[[noreturn]] void fail(cudaError_t error, const std::string& where, const Operation& op, const std::vector<Item>& items) {
    cudaGetLastError();  // a call that failed leaves its error for the next one to find
    throw std::runtime_error(describe(op, items) + ": CUDA error " + std::to_string(int(error)) + " (" +
                             cudaGetErrorString(error) + ") " + where);
}

}  // namespace

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// The runtime in here works with drivers of its own major version on; large tables want a driver that knows them.
int least_driver_version() {
    const int major = CUDART_VERSION / 1000 * 1000;
    return Large::kWords > Small::kWords ? std::max(major, 12010) : major;
}

void run(const Operation& op, std::vector<Item>& items, uint64_t offset, int device, uintptr_t stream) {
    for (Item& item : items) coalesce(item);
    static const std::vector<Fixed> fixed = Hot::fixed();
    const std::vector<Launch> launches = schedule(op, items, offset, fixed, {Large::kWords});
    if (launches.empty()) return;
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) fail(error, "choosing device " + std::to_string(device), op, items);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    for (size_t i = 0; i < launches.size(); ++i) {
        const bool small = launches[i].words.size() <= Small::kWords;
        error = small ? start<Small>(launches[i], on) : start<Large>(launches[i], on);
        if (error == cudaSuccess) continue;
        std::string where = "in launch " + std::to_string(i + 1) + " of " + std::to_string(launches.size());
        where += " on device " + std::to_string(device);
        if (i) where += "; those before it are queued, so some targets change";
        fail(error, where, op, items);
    }
}

void decode(const Coded& coded, int64_t first, int64_t n, float* out, int device, uintptr_t stream) {
    constexpr int64_t kEach = int64_t(kThreads) * kDecoded, kMost = int64_t(kMaxBlocks) * kEach;
    cudaError_t error = cudaSetDevice(device);
    for (int64_t done = 0; error == cudaSuccess && done < n; done += kMost) {
        const int64_t count = std::min(kMost, n - done);
        decoding<<<dim3(unsigned((count + kEach - 1) / kEach)), dim3(kThreads), 0, reinterpret_cast<cudaStream_t>(stream)>>>(
            coded, first + done, count, reinterpret_cast<char*>(out + done));
        error = cudaGetLastError();
    }
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error("decoding " + std::to_string(n) + " numbers on device " + std::to_string(device) +
                             ": CUDA error " + std::to_string(int(error)) + " (" + cudaGetErrorString(error) + ")");
}

void copy(const Read& read, int device, uintptr_t stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(read.device, read.host, read.bytes, cudaMemcpyHostToDevice,
                                reinterpret_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error("copying " + std::to_string(read.bytes) + " bytes to device " + std::to_string(device) +
                             ": CUDA error " + std::to_string(int(error)) + " (" + cudaGetErrorString(error) + ")");
}

}  // namespace gpu
}  // namespace ires
