// out [B, K] += K^-1/2 sum over j = o I + i of Pi[j] g_b[j], g_b[o][i] = sum_t e_t[o] a_t[i] over a sample's rows;
// a [T, I], e [T, O], Pi in {+-1}^{O I x K} from ../philox.h; a launch takes kDenseSamples samples and kDenseColumns
// columns.
//
// A block goes through a slab of tiles of 8 x 128 coordinates (o x i). Each warp forms the gradient tile of two samples
// on tensor cores and leaves it in shared memory; then each warp makes the signs of its 128 columns, once for all
// samples, and multiplies [samples x coordinates] by [coordinates x columns] on tensor cores. Slabs depend on O and I
// alone and add up in order: the same bits every time and in every batch.
//
// Precision: tensor cores take bfloat16, so a number is the sum of bfloat16 parts: one for bfloat16 inputs, two for
// float16, three for float32 and for the gradient tile between the two products, 24 bits. Dropped are products of parts
// below 2^-26 of the whole. All sums are float32. Tensor cores may truncate where they add, so a chain in them is at
// most 16 rows of a sample or one row of a tile long, and chains add up in ordinary arithmetic.
//
// Work per tile and sample: 2 rows 1024 operations for the gradient (6 times that for float32, 4 for float16) and
// 3 * 2 * 1024 per column for the projection; rows of a and e come from L2, T (128 + 8) element bytes a tile.
#include "dense.cuh"

namespace gvendi {
namespace {

constexpr int kTileO = kTileRows, kTileI = kSignCoordinates;

GV_DEVICE void widen(float& low, float& high, uint32_t word, const Bf16*) {
  low = as_float(word << 16);
  high = as_float(word & 0xffff0000u);
}
GV_DEVICE void widen(float& low, float& high, uint32_t word, const Fp16*) {
  low = half_to_float(static_cast<uint16_t>(word));
  high = half_to_float(static_cast<uint16_t>(word >> 16));
}

// What one 16-byte load brings.
template <typename T>
constexpr int kChunk = 16 / sizeof(T);

// x = neighbours at p, `count` of which exist, the others 0.
template <typename T>
GV_DEVICE void load_chunk(float (&x)[kChunk<T>], const T* p, int64_t count, bool aligned) {
  if (!aligned || count < kChunk<T>) {
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) x[j] = j < count ? load_value(p + j) : 0.0f;
    return;
  }
  const uint4 w = load_constant(reinterpret_cast<const uint4*>(p));
  if constexpr (sizeof(T) == 4) {
    x[0] = as_float(w.x), x[1] = as_float(w.y), x[2] = as_float(w.z), x[3] = as_float(w.w);
  } else {
    widen(x[0], x[1], w.x, p), widen(x[2], x[3], w.y, p), widen(x[4], x[5], w.z, p), widen(x[6], x[7], w.w, p);
  }
}

struct Place {
  int64_t o, i;
};

// Row of 16 that is number k of a lane's four.
GV_DEVICE int row_of(int k, int quad) { return 2 * quad + k % 2 + 8 * (k / 2); }

// g = a^T e over rows begin .. end, i x o. With group = lane / 4, quad = lane % 4: g[m][2 h + d] belongs to
// i = 32 (group / 2) + 8 (group % 2) + m + 16 h and o = 2 quad + d of the tile.
template <typename T, int N>
GV_DEVICE void gradient_tile(float (&g)[8][4], const DenseSketch& p, int64_t begin, int64_t end, Place tile, int lane) {
  const int group = lane / 4, quad = lane % 4;
  const T* a = static_cast<const T*>(p.a);
  const T* e = static_cast<const T*>(p.e) + tile.o + group;
  const bool in_o = tile.o + group < p.O;
  const int64_t first = tile.i + 32 * (group / 2) + 8 * (group % 2);
  // Tiles and lanes begin at multiples of 8 columns.
  const bool aligned =
      reinterpret_cast<uintptr_t>(a) % 16 == 0 && p.a_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
#pragma unroll 1
  for (int64_t row = begin; row < end; row += 16) {
    float y[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t t = row + row_of(k, quad);
      y[k] = t < end && in_o ? load_value(e + t * p.e_stride) : 0.0f;
    }
    uint32_t right[N][2];
    split<N>(right, 0, y[0], y[1]);
    split<N>(right, 1, y[2], y[3]);
#pragma unroll
    for (int m = 0; m < 8; m += kChunk<T>) {
      float x[4][2][kChunk<T>];
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t t = row + row_of(k, quad), i = first + m + 16 * h;
          load_chunk(x[k][h], a + (t < end ? t * p.a_stride + i : 0), t < end ? p.I - i : 0, aligned);
        }
#pragma unroll
      for (int c = 0; c < kChunk<T>; ++c) {
        uint32_t left[N][4];
#pragma unroll
        for (int r = 0; r < 4; ++r) split<N>(left, r, x[r / 2 * 2][r % 2][c], x[r / 2 * 2 + 1][r % 2][c]);
        float sum[4] = {};
        // The smallest products first.
#pragma unroll
        for (int order = kParts - 1; order >= 0; --order)
#pragma unroll
          for (int n = 0; n < N; ++n)
            if (order - n >= 0 && order - n < N) mma_bf16(sum, left[n], right[order - n]);
#pragma unroll
        for (int i = 0; i < 4; ++i) g[m + c][i] += sum[i];
      }
    }
  }
}

GV_DEVICE void store_tile(uint32_t* sample, const float (&g)[8][4], int lane) {
  const int group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int m = 0; m < 8; ++m)
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      uint32_t parts[kParts][1];
      split<kParts>(parts, 0, g[m][d], g[m][2 + d]);
      const int word = (2 * quad + d) * kRowWords + 8 * (4 * (group % 2) + m / 2) + 2 * (group / 2) + m % 2;
#pragma unroll
      for (int n = 0; n < kParts; ++n) sample[n * kPartWords + word] = parts[n][0];
    }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 1) dense_sketch_slab(DenseSketch p) {
  uint32_t* planes = shared_memory<uint32_t>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* signs = planes + kParts * kPartWords + warp * kSignWords;
  const int first = p.column + warp * kWarpColumns;
  const int64_t strips = (p.I + kTileI - 1) / kTileI, tiles = strips * ((p.O + kTileO - 1) / kTileO);
  const int64_t slab = blockIdx.x;
  float z[kColumnTiles][4] = {};
  for (int64_t number = tiles * slab / p.slabs; number < tiles * (slab + 1) / p.slabs; ++number) {
    const Place tile = {number / strips * kTileO, number % strips * kTileI};
    block_sync();
#pragma unroll 1
    for (int sample = warp; sample < kDenseSamples; sample += kWarps) {
      float g[8][4] = {};
      if (sample < p.samples)
        gradient_tile<T, N>(g, p, p.segments[2 * sample], p.segments[2 * sample + 1], tile, lane);
      store_tile(planes + sample * kSamplePitch, g, lane);
    }
    block_sync();
    if (first >= p.K) continue;
#pragma unroll 1
    for (int o = 0; o < kTileO && tile.o + o < p.O; ++o) {
      uint32_t words[kColumnTiles];
      row_signs(words, {p.key_low, p.key_high}, (tile.o + o) * p.I + tile.i, first, signs, lane);
      project_row(z, planes + o * kRowWords, words, lane);
    }
  }
  store_sums(p, z, slab, warp, lane);
}

__global__ void __launch_bounds__(kDenseStep) dense_reduce_slabs(DenseSums p) {
  constexpr int kGroups = kDenseColumns / kDenseStep;
  const int sample = blockIdx.x / kGroups, column = blockIdx.x % kGroups * kDenseStep + threadIdx.x;
  if (p.column + column >= p.K) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t slab = 0; slab < p.slabs; ++slab)
    sum += p.partial[(slab * kDenseSamples + sample) * kDenseColumns + column];
  p.out[static_cast<int64_t>(sample) * p.K + p.column + column] += p.scale * sum;
}

}  // namespace

cudaError_t dense_reduce(const DenseSums& p, void* stream) {
  const int64_t blocks = p.samples * static_cast<int64_t>(kDenseColumns / kDenseStep);
  return launch(dense_reduce_slabs, blocks, kDenseStep, 0, stream, p);
}

int64_t dense_slabs(int64_t O, int64_t I) {
  const int64_t tiles = (O + kTileO - 1) / kTileO * ((I + kTileI - 1) / kTileI);
  return tiles < kMaxSlabs ? tiles : kMaxSlabs;
}

int dense_sketch(DenseSketch p, void* stream) {
  if (!takes(p)) return cudaErrorInvalidValue;
  p.slabs = dense_slabs(p.O, p.I);
  if (p.slabs == 0 || p.samples == 0) return cudaSuccess;
  void (*const kernel)(DenseSketch) = p.dtype == kBfloat16  ? dense_sketch_slab<Bf16, 1>
                                      : p.dtype == kFloat16 ? dense_sketch_slab<Fp16, 2>
                                                            : dense_sketch_slab<float, kParts>;
  return launch_columns(kernel, p, stream);
}

}  // namespace gvendi
