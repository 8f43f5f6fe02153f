// out [B, K] += K^-1/2 sum over j = o I + i of Pi[j] g_b[j], g_b[o][i] = sum_t e_t[o] a_t[i] over a sample's rows;
// a [T, I], e [T, O], Pi in {+-1}^{O I x K} from ../philox.h; a launch takes kDenseSamples samples and kDenseColumns
// columns.
//
// A block goes through a slab of tiles of 8 x 128 coordinates (o x i). Each warp forms the gradient tile of two samples
// on tensor cores and leaves it in shared memory; then each warp makes the signs of its 128 columns, once for all
// samples, and multiplies [samples x coordinates] by [coordinates x columns] on tensor cores. Slabs depend on O and I
// alone and add up in order: the same bits every time and in every batch.
//
// Precision: 16-bit inputs are multiplied as they are. A float32 is the sum of three bfloat16 parts, 24 bits; dropped
// are products of parts below 2^-26 of the whole. All sums are float32. Tensor cores may truncate where they add, so a
// chain in them is at most 16 rows of a sample or one row of a tile long, and chains add up in ordinary arithmetic. For
// the gradient tile between the two products see dense.cuh.
//
// Work per tile and sample: 2 rows 1024 operations for the gradient (6 times that for float32) and 2 * 2 * 1024 per
// column for the projection; rows of a and e come from L2, T (128 + 8) element bytes a tile.
#include "dense.cuh"

namespace gvendi {
namespace {

constexpr int kTileO = kTileRows, kTileI = kSignCoordinates;

// What products take of T: as many parts, and the instruction.
template <typename T>
constexpr int kOperands = sizeof(T) == 4 ? 3 : 1;

template <typename T>
GV_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const T*) {
  mma_bf16(c, a, b);
}
GV_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Fp16*) {
  mma_f16(c, a, b);
}

GV_DEVICE uint32_t load_bits(const float* p) { return as_bits(load_constant(p)); }
template <typename T>
GV_DEVICE uint32_t load_bits(const T* p) {
  static_assert(sizeof(T) == 2, "a 16-bit number");
  return load_constant(reinterpret_cast<const uint16_t*>(p));
}

// Numbers of a word, and of the four that one load brings.
template <typename T>
constexpr int kPerWord = 4 / sizeof(T);
template <typename T>
constexpr int kChunk = 4 * kPerWord<T>;

// x: neighbours at p.
template <typename T>
GV_DEVICE void load_chunk(uint32_t (&x)[4], const T* p) {
  const uint4 w = load_constant(reinterpret_cast<const uint4*>(p));
  x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w;
}

// The same where `count` of them exist; the others are 0.
template <typename T>
GV_DEVICE void load_chunk(uint32_t (&x)[4], const T* p, int count, bool aligned) {
  if (aligned && count >= kChunk<T>) {
    load_chunk(x, p);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] = 0;
#pragma unroll
    for (int k = 0; k < kPerWord<T>; ++k)
      if (kPerWord<T> * j + k < count) x[j] |= load_bits(p + kPerWord<T> * j + k) << (16 * k);
  }
}

// parts[n][slot]: number c of two chunks as pairs, whose sum they are.
template <int N, int Slots>
GV_DEVICE void pair_up(uint32_t (&parts)[N][Slots], int slot, const uint32_t (&first)[4], const uint32_t (&second)[4],
                       int c) {
  if constexpr (N == 1) {
    const uint32_t x = first[c / 2], y = second[c / 2];
    parts[0][slot] = c % 2 == 0 ? low_halves(x, y) : high_halves(x, y);
  } else {
    float low = as_float(first[c]), high = as_float(second[c]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t pair = pack_bf16(low, high);
      parts[n][slot] = pair;
      low -= as_float(pair << 16);
      high -= as_float(pair & 0xffff0000u);
    }
  }
}

struct Place {
  int64_t o, i;
};

// Row of 16 that is number k of a lane's four.
GV_DEVICE int row_of(int k, int quad) { return 2 * quad + k % 2 + 8 * (k / 2); }

// What a lane reads of a tile: with group = lane / 4 and quad = lane % 4, e in column o = group of it, and a in columns
// i = 32 (group / 2) + 8 (group % 2) .. + 7 and 16 further.
template <typename T>
struct Columns {
  const T *a, *e;
  // Columns of a from the lane's first one on, at most a tile's; whether there is its column of e.
  int left;
  bool in_o, aligned;
};

// g += a^T e over rows row .. row + 15, those from `end` on as 0. Whole: all rows and columns are there and aligned.
template <bool Whole, typename T>
GV_DEVICE void add_outer(float (&g)[8][4], const DenseSketch& p, const Columns<T>& at, int64_t row, int64_t end,
                         int quad) {
  constexpr int N = kOperands<T>;
  uint32_t y[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t t = row + row_of(k, quad);
    y[k][0] = Whole || (t < end && at.in_o) ? load_bits(at.e + t * p.e_stride) : 0;
  }
  uint32_t right[N][2];
  pair_up(right, 0, y[0], y[1], 0);
  pair_up(right, 1, y[2], y[3], 0);
#pragma unroll
  for (int m = 0; m < 8; m += kChunk<T>) {
    uint32_t x[4][2][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t t = row + row_of(k, quad);
        const int i = m + 16 * h;
        if constexpr (Whole)
          load_chunk(x[k][h], at.a + t * p.a_stride + i);
        else
          load_chunk(x[k][h], at.a + (t < end ? t * p.a_stride + i : 0), t < end ? at.left - i : 0, at.aligned);
      }
#pragma unroll
    for (int c = 0; c < kChunk<T>; ++c) {
      uint32_t left[N][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) pair_up(left, r, x[r / 2 * 2][r % 2], x[r / 2 * 2 + 1][r % 2], c);
      float sum[4] = {};
      // The smallest products first.
#pragma unroll
      for (int order = N - 1; order >= 0; --order)
#pragma unroll
        for (int n = 0; n <= order; ++n) multiply_add(sum, left[n], right[order - n], at.a);
#pragma unroll
      for (int i = 0; i < 4; ++i) g[m + c][i] += sum[i];
    }
  }
}

// g = a^T e over rows begin .. end, i x o: g[m][2 h + d] belongs to o = 2 quad + d of the tile and to i = m + 16 h from
// the lane's first column on.
template <typename T>
GV_DEVICE void gradient_tile(float (&g)[8][4], const DenseSketch& p, int64_t begin, int64_t end, Place tile, int lane) {
  const int group = lane / 4, quad = lane % 4;
  const int64_t first = tile.i + 32 * (group / 2) + 8 * (group % 2);
  const T* a = static_cast<const T*>(p.a);
  // Tiles and lanes begin at multiples of 8 columns.
  const bool aligned =
      reinterpret_cast<uintptr_t>(a) % 16 == 0 && p.a_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const int left = static_cast<int>(p.I - first < kTileI ? p.I - first : kTileI);
  const Columns<T> at = {a + first, static_cast<const T*>(p.e) + tile.o + group, left, tile.o + group < p.O, aligned};
  int64_t row = begin;
  // Of float32, whose parts fill the registers, a second loop would spill.
  if constexpr (kOperands<T> == 1) {
    if (aligned && tile.i + kTileI <= p.I && tile.o + kTileO <= p.O)
#pragma unroll 1
      for (; row + 16 <= end; row += 16) add_outer<true>(g, p, at, row, end, quad);
  }
#pragma unroll 1
  for (; row < end; row += 16) add_outer<false>(g, p, at, row, end, quad);
}

// g scaled; what takes the scale back goes to the sample's place in `downs`.
GV_DEVICE void scale_tile(float (&g)[8][4], float* downs, int lane) {
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < 8; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float size = as_float(as_bits(g[m][i]) & 0x7fffffffu);
      largest = size > largest ? size : largest;
    }
  const Scale scale = scale_of(largest_of(largest));
#pragma unroll
  for (int m = 0; m < 8; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) g[m][i] *= scale.up;
  if (lane < kTileRows) downs[lane * kDenseSamples] = scale.down;
}

// The tile of samples warp and warp + 8.
GV_DEVICE void store_tile(uint32_t* planes, const float (&near)[8][4], const float (&far)[8][4], int warp, int lane) {
  const int group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int m = 0; m < 8; m += 2)
#pragma unroll
    for (int d = 0; d < 2; ++d) {
      uint32_t parts[2][2][kParts];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        split(parts[0][h], near[m + h][d], near[m + h][2 + d]);
        split(parts[1][h], far[m + h][d], far[m + h][2 + d]);
      }
      const int step = 4 * (group % 2) + m / 2, place = 4 * warp + group / 2;
      store_parts(planes + (2 * quad + d) * kRowPitch + step * kStepWords + 4 * place, parts[0], parts[1]);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) dense_sketch_slab(DenseSketch p) {
  uint32_t* planes = shared_memory<uint32_t>();
  float* downs = reinterpret_cast<float*>(planes + kParts * kPartWords);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* signs = planes + kParts * kPartWords + kDowns + warp * kSignWords;
  const int first = p.column + warp * kWarpColumns;
  const uint32_t sign_bits = kSignBits | static_cast<uint32_t>(p.K) >> 31;
  const int64_t strips = (p.I + kTileI - 1) / kTileI, tiles = strips * ((p.O + kTileO - 1) / kTileO);
  const int64_t slab = blockIdx.x;
  float z[kColumnTiles][4] = {};
  for (int64_t number = tiles * slab / p.slabs; number < tiles * (slab + 1) / p.slabs; ++number) {
    const Place tile = {number / strips * kTileO, number % strips * kTileI};
    block_sync();
    float later[8][4] = {}, earlier[8][4];
#pragma unroll 1
    for (int sample = warp; sample < kDenseSamples; sample += kWarps) {
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) earlier[m][i] = later[m][i], later[m][i] = 0.0f;
      if (sample < p.samples)
        gradient_tile<T>(later, p, p.segments[2 * sample], p.segments[2 * sample + 1], tile, lane);
      scale_tile(later, downs + sample, lane);
    }
    store_tile(planes, earlier, later, warp, lane);
    block_sync();
    if (first >= p.K) continue;
#pragma unroll 1
    for (int o = 0; o < kTileO && tile.o + o < p.O; ++o) {
      uint32_t words[kColumnTiles];
      row_signs(words, {p.key_low, p.key_high}, (tile.o + o) * p.I + tile.i, first, signs, lane);
      project_row(z, planes + o * kRowPitch, downs + o * kDenseSamples, words, sign_bits, lane);
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
  void (*const kernel)(DenseSketch) = p.dtype == kBfloat16  ? dense_sketch_slab<Bf16>
                                      : p.dtype == kFloat16 ? dense_sketch_slab<Fp16>
                                                            : dense_sketch_slab<float>;
  return launch_columns(kernel, p, stream);
}

}  // namespace gvendi
