// out [B, K] += K^-1/2 sum over j = v d + i of Pi[j] g_b[j], g_b[v][i] = sum of e_t[i] over a sample's rows with id v;
// ids [T], e [T, d], Pi in {+-1}^{V d x K} from ../philox.h; a launch takes kDenseSamples samples and kDenseColumns
// columns. Rows come in the order of `Touches`, so that the signs of an id are made once for all samples that use it.
//
// A slab is a group of ids (id mod groups) and a strip: of each id one aligned block of 128 coordinates, which one call
// of philox covers. A block of threads goes through its slab in tiles of 8 ids. A warp adds up the rows of two samples,
// four coordinates a lane, and leaves the sums in shared memory; then each warp projects the tile on its 128 columns as
// dense.cuh says. Which group an id belongs to, and the order in it, depend on the id alone, and a sample that lacks an
// id adds +0, so that a sample's bits do not depend on its batch.
//
// Precision: e is widened, sums over rows are float32 in chains of kChainRows; from there on see dense.cuh.
//
// Work per id that occurs and strip: 128 calls of philox and 2 * 2 * 16 * 128 operations a column, however few of the
// samples use it; T d element bytes for the rows, once for every kDenseColumns columns.
#include "dense.cuh"

namespace gvendi {
namespace {

constexpr int kChainRows = 16;
// Bounds of two samples' rows in the runs of a tile, first and last of each, in the warp's signs.
constexpr int kBounds = 4;
static_assert(kTileRows * kBounds == 32 && 32 * sizeof(int64_t) <= kSignWords * sizeof(uint32_t), "an entry a lane");
static_assert((kParts * kPartWords + kDowns) % 2 == 0 && kSignWords % 2 == 0, "entries are aligned");

// Blocks of signs that d coordinates can touch when they begin at a multiple of d.
int64_t strips_of(int64_t d) {
  const int64_t step = (d & -d) < kSignCoordinates ? d & -d : kSignCoordinates;
  return (d + kSignCoordinates - 1 - step) / kSignCoordinates + 1;
}

// The strip's four coordinates of lane 4 s + q: 32 q + 2 s, the next, and 16 further.
GV_DEVICE int coordinate_of(int lane, int k) { return 32 * (lane % 4) + 2 * (lane / 4) + k % 2 + 16 * (k / 2); }

// First coordinate of the strip of the id whose coordinates begin at `place`.
GV_DEVICE int64_t block_of(int64_t place, int64_t strip) {
  return (place / kSignCoordinates + strip) * kSignCoordinates;
}

// First of rows begin .. end of a run whose sample is not below `sample`.
GV_DEVICE int64_t lower_bound(const int64_t* of_row, int64_t begin, int64_t end, int sample) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (of_row[middle] < sample)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// g += e over the rows in places begin .. end of the order; `from` is the column of the strip's first coordinate.
template <typename T>
GV_DEVICE void add_rows(float (&g)[4], const DenseTokenSketch& p, int64_t begin, int64_t end, int64_t from, int lane) {
  const T* e = static_cast<const T*>(p.e);
#pragma unroll 1
  for (int64_t place = begin; place < end; place += kChainRows) {
    float sum[4] = {};
#pragma unroll
    for (int n = 0; n < kChainRows; ++n) {
      const int64_t row = place + n < end ? p.touches.row[place + n] * p.e_stride : 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t i = from + coordinate_of(lane, k);
        sum[k] += place + n < end && i >= 0 && i < p.d ? load_value(e + row + i) : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) g[k] += sum[k];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) dense_token_slab(DenseTokenSketch p) {
  uint32_t* planes = shared_memory<uint32_t>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* downs = reinterpret_cast<float*>(planes + kParts * kPartWords);
  uint32_t* signs = planes + kParts * kPartWords + kDowns + warp * kSignWords;
  int64_t* bounds = reinterpret_cast<int64_t*>(signs);
  const int first = p.column + warp * kWarpColumns;
  const uint32_t sign_bits = kSignBits | static_cast<uint32_t>(p.K) >> 31;
  const int64_t slab = blockIdx.x, group = slab / p.strips, strip = slab % p.strips;
  const int64_t end = p.touches.first[group + 1];
  float z[kColumnTiles][4] = {};
  for (int64_t run = p.touches.first[group]; run < end; run += kTileRows) {
    const int rows = static_cast<int>(end - run < kTileRows ? end - run : kTileRows);
    block_sync();
    if (lane / kBounds < rows) {
      const int64_t* begin = p.touches.begin + run + lane / kBounds;
      bounds[lane] = lower_bound(p.touches.sample, begin[0], begin[1], warp + lane % kBounds / 2 * kWarps + lane % 2);
    }
    warp_sync();
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const int64_t place = p.touches.id[run + row] * p.d;
      uint32_t later[2][kParts] = {}, earlier[2][kParts];
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kParts; ++n) earlier[0][n] = later[0][n], earlier[1][n] = later[1][n];
        const int64_t* bound = bounds + row * kBounds + 2 * half;
        float g[4] = {};
        add_rows<T>(g, p, bound[0], bound[1], block_of(place, strip) - place, lane);
        float largest = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float size = as_float(as_bits(g[k]) & 0x7fffffffu);
          largest = size > largest ? size : largest;
        }
        const Scale scale = scale_of(largest_of(largest));
        split(later[0], g[0] * scale.up, g[2] * scale.up);
        split(later[1], g[1] * scale.up, g[3] * scale.up);
        if (lane == 0) downs[row * kDenseSamples + warp + half * kWarps] = scale.down;
      }
      store_parts(planes + row * kRowPitch + lane / 4 * kStepWords + 4 * (4 * warp + lane % 4), earlier, later);
    }
    block_sync();
    if (first >= p.K) continue;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const int64_t place = p.touches.id[run + row] * p.d, block = block_of(place, strip);
      // The last strip lies behind some ids of a width that is no multiple of 128.
      if (block >= place + p.d) continue;
      uint32_t words[kColumnTiles];
      row_signs(words, {p.key_low, p.key_high}, block, first, signs, lane);
      project_row(z, planes + row * kRowPitch, downs + row * kDenseSamples, words, sign_bits, lane);
    }
  }
  store_sums(p, z, slab, warp, lane);
}

}  // namespace

int64_t dense_token_groups(int64_t d) {
  const int64_t strips = strips_of(d);
  return strips < kMaxSlabs ? kMaxSlabs / strips : 1;
}

int64_t dense_token_slabs(int64_t d) { return dense_token_groups(d) * strips_of(d); }

int dense_token_sketch(DenseTokenSketch p, void* stream) {
  if (!takes(p)) return cudaErrorInvalidValue;
  if (p.samples == 0 || p.d == 0) return cudaSuccess;
  p.strips = strips_of(p.d);
  p.slabs = dense_token_slabs(p.d);
  void (*const kernel)(DenseTokenSketch) = p.dtype == kBfloat16  ? dense_token_slab<Bf16>
                                           : p.dtype == kFloat16 ? dense_token_slab<Fp16>
                                                                 : dense_token_slab<float>;
  return launch_columns(kernel, p, stream);
}

}  // namespace gvendi
