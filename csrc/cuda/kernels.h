// The launches' calling convention. All pointers but a table's source are device addresses, the caller's; every
// function returns a cudaError_t (0: launched) and works on the current device, on `stream` (a CUstream).
// Letters: T rows, K sketch dimension, B samples.
#pragma once

#include <cstdint>

namespace gvendi {

constexpr int kChunkRows = 16;  // rows of one sample that one block sums
constexpr int kMaxParts = 4;
constexpr int kDenseSamples = 16;    // samples of one dense launch, the rows of a tensor-core tile
constexpr int kDenseColumns = 1024;  // columns of one dense launch
constexpr int kMaxSlabs = 512;       // partial sums of one dense launch

enum Dtype : int { kFloat32, kBfloat16, kFloat16 };

// Rows with unit stride inside a row. table null: S x or H S x itself, float32 [T, K].
struct Rows {
  const void* data;
  int64_t stride;
  const uint16_t* table;  // [blocks, K] as pack_table writes it
  int32_t blocks;
  int32_t dtype;
};

struct FoldHadamard {
  Rows x;
  int64_t rows;
  float* out;  // [T, K] = H S x
};

// out [B, K] += K^-1/2 sum_t (H S a_t) * (H sum_p S_p e_pt). chunks int64 [count, 2] holds (begin, end) of at most
// kChunkRows rows of one sample, first int64 [B + 1] each sample's first chunk, partial is [count, K].
struct LinearSketch {
  Rows a;
  Rows parts[kMaxParts];
  int32_t parts_count;
  float scale;
  const int64_t* chunks;
  const int64_t* first;
  int64_t count, samples;
  float* partial;
  float* out;
};

// out [samples, K] += K^-1/2 Pi^T vec(sum_t e_t a_t^T), a [T, I], e [T, O] of one dtype; segments int64 [samples, 2] on
// the device, samples <= kDenseSamples, K a multiple of 64; partial is [slabs, kDenseSamples, kDenseColumns]. slabs and
// column are set by the launch.
struct DenseSketch {
  const void *a, *e;
  int64_t a_stride, e_stride, I, O, slabs;
  const int64_t* segments;
  float *partial, *out;
  int32_t dtype, samples, K, column;
  uint32_t key_low, key_high;
  float scale;
};

int fold_hadamard(const FoldHadamard& p, int K, void* stream);
int linear_sketch(const LinearSketch& p, int K, void* stream);
int dense_sketch(DenseSketch p, void* stream);
// Partial sums that a dense launch writes; a function of the weight's shape alone.
int64_t dense_slabs(int64_t O, int64_t I);

// bucket int16 [width] in 0..K-1 and sign int8 [width] of +-1, host -> out [ceil(width / K), K], host: what each thread
// gathers, in the order in which it reads. Throws std::invalid_argument if two coordinates of a block share a bin.
void pack_table(int K, int64_t width, const int16_t* bucket, const int8_t* sign, uint16_t* out);

}  // namespace gvendi
