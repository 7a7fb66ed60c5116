// The Python binding: raw pointers, element counts and small integers in; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>

#include "cpu.h"
#include "cuda.h"
#include "tile.h"

namespace py = pybind11;

namespace {

const void* pointer(const py::handle& h) { return reinterpret_cast<const void*>(h.cast<uintptr_t>()); }

ires::DType dtype(const py::handle& h) {
    const int code = h.cast<int>();
    if (code < 0 || code >= ires::kDTypes) throw py::value_error("unknown dtype code " + std::to_string(code));
    return static_cast<ires::DType>(code);
}

// (n, stream, (pointer, ...), (dtype, ...), sizes, strides): the output first; strides by operand, or both empty.
ires::Item item(const py::tuple& t) {
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
    return out;
}

// `factors` has to outlive what is returned.
ires::Operation operation(int code, const std::vector<double>& factors, bool stochastic, uint64_t seed) {
    ires::Operation op{static_cast<ires::OpCode>(code), 0, factors.data(), stochastic, seed};
    switch (op.code) {
        case ires::OpCode::subtract: op.inputs = 2; break;
        case ires::OpCode::add: op.inputs = 1 + int(factors.size()); break;
        case ires::OpCode::scale: op.inputs = 1; break;
        case ires::OpCode::add_difference: op.inputs = 3; break;
        default: throw py::value_error("unknown operation code " + std::to_string(code));
    }
    const size_t wanted = op.code == ires::OpCode::subtract ? 0 : op.code == ires::OpCode::add ? factors.size() : 1;
    if (factors.size() != wanted) throw py::value_error("wrong number of factors");
    return op;
}

std::vector<ires::Item> items(const py::list& list, const ires::Operation& op) {
    std::vector<ires::Item> out;
    out.reserve(list.size());
    for (const py::handle& h : list) {
        out.push_back(item(h.cast<py::tuple>()));
        if (int(out.back().in.size()) != op.inputs) throw py::value_error("wrong number of operands");
    }
    return out;
}

py::object run(int code, const py::list& list, const std::vector<double>& factors, bool stochastic, uint64_t seed,
               uint64_t offset, int threads, const std::string& isa, bool want_tally) {
    const ires::Operation op = operation(code, factors, stochastic, seed);
    std::vector<ires::Item> all = items(list, op);
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
    m.def("load_tile", &load_tile, py::arg("reads"), py::arg("op"), py::arg("items"), py::arg("factors"),
          py::arg("stochastic"), py::arg("seed"), py::arg("offset"), py::arg("device"), py::arg("stream"));
    m.def("memory_loop", &memory_loop, py::arg("item"), py::arg("threads"), py::arg("isa"));
    m.def("isas", &ires::isas);
#if defined(IRES_CUDA)
    m.def("cuda_run", &cuda_run, py::arg("op"), py::arg("items"), py::arg("factors"), py::arg("stochastic"), py::arg("seed"),
          py::arg("offset"), py::arg("device"), py::arg("stream"));
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
