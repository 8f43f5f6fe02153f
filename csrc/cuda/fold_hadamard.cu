// out [T, K] = H S x, x [T, d]; one team a row. Bytes moved: T (d element + 4 K).
#include "hadamard.cuh"

namespace gvendi {
namespace {

template <int K>
__global__ void __launch_bounds__(kThreads, 2) fold_hadamard_rows(FoldHadamard p) {
  using S = Tile<K>;
  float* buffer = shared_memory<float>();
  const int t = threadIdx.x % S::kTeamThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * S::kTeams + threadIdx.x / S::kTeamThreads;
  float x[S::kValues] = {};
  if (row < p.rows) fold<K>(x, p.x, row, t);
  transform<K>(x, buffer);
  reorder<K>(x, buffer);
  if (row >= p.rows) return;
#pragma unroll
  for (int v = 0; v < S::kValues; ++v) p.out[row * K + bin_of<K>(t, v)] = x[v];
}

struct Launch {
  const FoldHadamard& p;
  void* stream;
  cudaError_t* error;

  template <int K>
  void operator()() const {
    const int64_t blocks = (p.rows + Tile<K>::kTeams - 1) / Tile<K>::kTeams;
    *error = launch(fold_hadamard_rows<K>, blocks, kThreads, kBufferFloats * sizeof(float), stream, p);
  }
};

}  // namespace

int fold_hadamard(const FoldHadamard& p, int K, void* stream) {
  cudaError_t error = cudaSuccess;
  if (p.rows > 0 && !with_dim(K, Launch{p, stream, &error})) return cudaErrorInvalidValue;
  return error;
}

}  // namespace gvendi
