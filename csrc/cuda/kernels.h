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
constexpr int kDenseStep = 64;       // K of the dense mode is a multiple of it
constexpr int kMaxSlabs = 512;       // partial sums of one dense launch; of ids, at least one per 128 coordinates

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

// out [samples, K] += K^-1/2 Pi^T g, samples <= kDenseSamples, K a multiple of kDenseStep; partial is
// [slabs, kDenseSamples, kDenseColumns]. slabs and column are set by the launch.
struct DenseSums {
  float *partial, *out;
  int64_t slabs;
  int32_t samples, K, column;
  uint32_t key_low, key_high;
  float scale;
};

// g = vec(sum_t e_t a_t^T), a [T, I], e [T, O] of one dtype; segments int64 [samples, 2] on the device.
struct DenseSketch : DenseSums {
  const void *a, *e;
  int64_t a_stride, e_stride, I, O;
  const int64_t* segments;
  int32_t dtype;
};

// The samples' rows in the order (id mod groups, id, sample, row), with groups = dense_token_groups(d); a run is what
// one id has of them. sample and row are of each of these rows; id and begin of each run, begin one entry longer; first
// [groups + 1] holds each group's first run.
struct Touches {
  const int64_t *sample, *row, *id, *begin, *first;
};

// g = vec(sum_t onehot(id_t) e_t^T), e [T, d]. strips is set by the launch.
struct DenseTokenSketch : DenseSums {
  const void* e;
  int64_t e_stride, d, strips;
  Touches touches;
  int32_t dtype;
};

int fold_hadamard(const FoldHadamard& p, int K, void* stream);
int linear_sketch(const LinearSketch& p, int K, void* stream);
int dense_sketch(DenseSketch p, void* stream);
// Partial sums that a dense launch writes; a function of the weight's shape alone.
int64_t dense_slabs(int64_t O, int64_t I);

int dense_token_sketch(DenseTokenSketch p, void* stream);
// Groups of ids that add up apart, and partial sums that a launch writes: functions of the width alone.
int64_t dense_token_groups(int64_t d);
int64_t dense_token_slabs(int64_t d);

// bucket int16 [width] in 0..K-1 and sign int8 [width] of +-1, host -> out [ceil(width / K), K], host: what each thread
// gathers, in the order in which it reads. Throws std::invalid_argument if two coordinates of a block share a bin.
void pack_table(int K, int64_t width, const int16_t* bucket, const int8_t* sign, uint16_t* out);

}  // namespace gvendi
