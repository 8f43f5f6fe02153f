// out [B, K] += K^-1/2 sum_t (H S_i a_t) * (H sum_p S_p e_pt) over each sample's rows; a [T, I], e_p [T, O_p].
// One block sums a chunk of at most kChunkRows rows of a sample into partial [chunks, K]: a team takes every
// kTeams-th row, teams add up in order; a second kernel adds a sample's chunks in order. No atomics, so the same bits
// every time and in every batch.
//
// Bytes moved: T (I + sum O_p) element for the rows, 8 K / kChunkRows a row for the partial sums, which stay in L2, and
// tables of 2 (I + sum O_p) a row from L1. Prediction, not a measurement, from issue rates: the loads and stores of a
// row keep a multiprocessor busy for (I + sum O_p) / 12 + K / 8 cycles (two sectors a cycle in a gather, 128 bytes
// a cycle in tables and exchanges). Where its share of DRAM needs longer for the row, copy bandwidth bounds the kernel
// and 0.7 to 0.9 of it is expected; else the quotient of the two times, below a half for 16-bit rows narrower than K.
#include "hadamard.cuh"

namespace gvendi {
namespace {

template <int K>
__global__ void __launch_bounds__(kThreads, 2) linear_sketch_chunk(LinearSketch p) {
  using S = Tile<K>;
  float* buffer = shared_memory<float>();
  const int t = threadIdx.x % S::kTeamThreads, team = threadIdx.x / S::kTeamThreads;
  const int64_t chunk = blockIdx.x, begin = p.chunks[2 * chunk];
  const int rows = static_cast<int>(p.chunks[2 * chunk + 1] - begin);
  float sum[S::kValues] = {};
  // All threads go round equally often: the transform has barriers.
#pragma unroll 1
  for (int base = 0; base < rows; base += S::kTeams) {
    const bool live = base + team < rows;
    const int64_t row = begin + base + team;
    float x[S::kValues] = {}, y[S::kValues] = {};
    if (live)
#pragma unroll 1
      for (int part = 0; part < p.parts_count; ++part) fold<K>(y, p.parts[part], row, t);
    transform<K>(y, buffer);
    if (p.a.table != nullptr) {
      if (live) fold<K>(x, p.a, row, t);
      transform<K>(x, buffer);
    } else {
      const float* from = static_cast<const float*>(p.a.data) + row * p.a.stride;
#pragma unroll
      for (int v = 0; v < S::kValues; ++v)
        if (live) x[v] = load_constant(from + bin_of<K>(t, v));
      reorder<K>(x, buffer);
    }
#pragma unroll
    for (int v = 0; v < S::kValues; ++v) sum[v] += x[v] * y[v];
  }
  reorder<K>(sum, buffer);
  block_sync();
#pragma unroll
  for (int v = 0; v < S::kValues; ++v) buffer[team * K + bin_of<K>(t, v)] = sum[v];
  block_sync();
  for (int c = threadIdx.x; c < K; c += kThreads) {
    float total = buffer[c];
#pragma unroll
    for (int other = 1; other < S::kTeams; ++other) total += buffer[other * K + c];
    p.partial[chunk * K + c] = total;
  }
}

template <int K>
constexpr int kReduceThreads = K < kThreads ? K : kThreads;

template <int K>
__global__ void __launch_bounds__(kThreads) linear_sketch_reduce(LinearSketch p) {
  constexpr int kGroups = K / kReduceThreads<K>;
  const int64_t sample = blockIdx.x / kGroups;
  const int c = blockIdx.x % kGroups * kReduceThreads<K> + threadIdx.x;
  const int64_t begin = p.first[sample], end = p.first[sample + 1];
  if (begin == end) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t chunk = begin; chunk < end; ++chunk) sum += p.partial[chunk * K + c];
  p.out[sample * K + c] += p.scale * sum;
}

struct Launch {
  const LinearSketch& p;
  void* stream;
  cudaError_t* error;

  template <int K>
  void operator()() const {
    *error = launch(linear_sketch_chunk<K>, p.count, kThreads, kBufferFloats * sizeof(float), stream, p);
    if (*error != cudaSuccess) return;
    *error = launch(linear_sketch_reduce<K>, p.samples * (K / kReduceThreads<K>), kReduceThreads<K>, 0, stream, p);
  }
};

}  // namespace

int linear_sketch(const LinearSketch& p, int K, void* stream) {
  cudaError_t error = cudaSuccess;
  if (p.count > 0 && !with_dim(K, Launch{p, stream, &error})) return cudaErrorInvalidValue;
  return error;
}

}  // namespace gvendi
