// The Python binding: raw pointers, element counts and small integers in; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "cpu.h"
#include "cuda.h"

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
