// Python module gvendi_fast._cuda. Tensors arrive as addresses and strides in elements; the Python side has checked
// shapes, owns every buffer and names the device and its stream. No libcuda is needed to load the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifdef GVENDI_EMULATE
#include "device.h"
#else
#include <cuda_runtime_api.h>
#endif
#include "kernels.h"

namespace py = pybind11;
using namespace gvendi;

namespace {

using Address = uintptr_t;
using Part = std::tuple<Address, int64_t, int32_t, Address, int32_t>;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(int error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// This module carries its own CUDA runtime, whose current device is not that of the caller's.
void use_device(int device, const char* kernel) { check(cudaSetDevice(device), kernel); }

Rows rows_of(const Part& part) {
  const auto [data, stride, dtype, table, blocks] = part;
  return {at<const void>(data), stride, at<const uint16_t>(table), blocks, dtype};
}

float inverse_root(int K) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(K))); }

void run_fold_hadamard(const Part& x, int64_t rows, int K, Address out, int device, Address stream) {
  use_device(device, "fold_hadamard");
  check(fold_hadamard({rows_of(x), rows, at<float>(out)}, K, at<void>(stream)), "fold_hadamard");
}

void run_linear_sketch(const Part& a, const std::vector<Part>& parts, Address chunks, int64_t count, Address first,
                       int64_t samples, int K, Address partial, Address out, int device, Address stream) {
  if (parts.empty() || parts.size() > kMaxParts) throw py::value_error("linear_sketch: between 1 and MAX_PARTS parts");
  LinearSketch p = {};
  p.a = rows_of(a);
  std::transform(parts.begin(), parts.end(), p.parts, rows_of);
  p.parts_count = static_cast<int32_t>(parts.size());
  p.scale = inverse_root(K);
  p.chunks = at<const int64_t>(chunks);
  p.first = at<const int64_t>(first);
  p.count = count;
  p.samples = samples;
  p.partial = at<float>(partial);
  p.out = at<float>(out);
  use_device(device, "linear_sketch");
  check(linear_sketch(p, K, at<void>(stream)), "linear_sketch");
}

// What the dense mode's launches share: samples, K, the two words of the key, partial and out.
using Sums = std::tuple<int32_t, int32_t, uint32_t, uint32_t, Address, Address>;

void set_sums(DenseSums& p, const Sums& sums) {
  const auto [samples, K, key_low, key_high, partial, out] = sums;
  p.samples = samples;
  p.K = K;
  p.key_low = key_low;
  p.key_high = key_high;
  p.partial = at<float>(partial);
  p.out = at<float>(out);
  p.scale = inverse_root(K);
}

void run_dense_sketch(Address a, int64_t a_stride, int64_t I, Address e, int64_t e_stride, int64_t O, int32_t dtype,
                      Address segments, const Sums& sums, int device, Address stream) {
  DenseSketch p = {};
  set_sums(p, sums);
  p.a = at<const void>(a);
  p.e = at<const void>(e);
  p.a_stride = a_stride;
  p.e_stride = e_stride;
  p.I = I;
  p.O = O;
  p.segments = at<const int64_t>(segments);
  p.dtype = dtype;
  use_device(device, "dense_sketch");
  check(dense_sketch(p, at<void>(stream)), "dense_sketch");
}

void run_dense_token_sketch(const std::array<Address, 5>& touches, Address e, int64_t e_stride, int64_t d,
                            int32_t dtype, const Sums& sums, int device, Address stream) {
  DenseTokenSketch p = {};
  set_sums(p, sums);
  p.touches = {at<const int64_t>(touches[0]), at<const int64_t>(touches[1]), at<const int64_t>(touches[2]),
               at<const int64_t>(touches[3]), at<const int64_t>(touches[4])};
  p.e = at<const void>(e);
  p.e_stride = e_stride;
  p.d = d;
  p.dtype = dtype;
  use_device(device, "dense_token_sketch");
  check(dense_token_sketch(p, at<void>(stream)), "dense_token_sketch");
}

void run_pack_table(int K, int64_t width, Address bucket, Address sign, Address out) {
  pack_table(K, width, at<const int16_t>(bucket), at<const int8_t>(sign), at<uint16_t>(out));
}

// (number of devices, why there is none).
std::tuple<int, std::string> devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return {0, cudaGetErrorString(error)};
  return {count, count == 0 ? "the driver names none" : ""};
}

}  // namespace

PYBIND11_MODULE(GVENDI_MODULE, m) {
  m.doc() = "CUDA kernels of gvendi_fast; called through gvendi_fast.kernels.backends.cuda only";
  m.attr("VERSION") = GVENDI_VERSION;
  m.attr("ARCHITECTURES") = GVENDI_ARCHITECTURES;
  m.attr("CHUNK_ROWS") = kChunkRows;
  m.attr("MAX_PARTS") = kMaxParts;
  m.attr("DENSE_SAMPLES") = kDenseSamples;
  m.attr("DENSE_COLUMNS") = kDenseColumns;
  m.def("devices", &devices);
  m.def("pack_table", &run_pack_table);
  m.def("dense_slabs", &dense_slabs);
  m.def("dense_token_groups", &dense_token_groups);
  m.def("dense_token_slabs", &dense_token_slabs);
  m.def("fold_hadamard", &run_fold_hadamard, NoGil());
  m.def("linear_sketch", &run_linear_sketch, NoGil());
  m.def("dense_sketch", &run_dense_sketch, NoGil());
  m.def("dense_token_sketch", &run_dense_token_sketch, NoGil());
#ifdef GVENDI_EMULATE
  // 0: threads run in order, 1: in reverse, others: the seed of a random order.
  m.def("set_thread_order", [](int order) { block.order = order; });
#endif
}
