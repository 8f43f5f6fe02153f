// What the kernels of the dense mode share: a block's samples times signs on tensor cores, and the sums that it leaves.
//
// A tile is 8 rows of 128 coordinates of each of kDenseSamples gradients, in shared memory. Each warp makes the signs
// of its 128 columns, once for all samples, and multiplies [samples x coordinates] by [coordinates x columns].
//
// Precision: tensor cores take bfloat16, so a number is the sum of bfloat16 parts, three for the 24 bits of a float32.
// All sums are float32. Tensor cores may truncate where they add, so a chain in them is one row of a tile long, and
// chains add up in ordinary arithmetic.
#pragma once

#include "../philox.h"
#include "hadamard.cuh"

namespace gvendi {

constexpr int kTileRows = 8;
constexpr int kParts = 3;
// A word holds two coordinates of one part. Word 8 s + 2 q + h of a row: coordinates 32 q + 2 s + h and 16 further, the
// operand order of the product with the signs: step s, lanes with lane % 4 = q, register pair h.
constexpr int kRowWords = kSignCoordinates / 2;
constexpr int kSamplePitch = kTileRows * kRowWords + 8;
constexpr int kPartWords = kDenseSamples * kSamplePitch;
static_assert(kSamplePitch % 32 == 8, "a quarter warp's 8-byte reads touch every bank once");
static_assert(kDenseSamples == 2 * kWarps, "two samples a warp");
static_assert(kSignCoordinates == 32 * 4 && kDenseSamples == 16, "fragments of m16n8k16");

constexpr int kWarpColumns = kDenseColumns / kWarps;
constexpr int kColumnTiles = kWarpColumns / 8;
constexpr int kSignPitch = 40;
constexpr int kSignWords = 8 * kSignPitch;
constexpr size_t kSharedWords = kParts * kPartWords + kWarps * kSignWords;
static_assert(kSharedWords * sizeof(uint32_t) <= 160 * 1024, "fits sm_80");

// parts[n][slot], n = 0 .. N - 1: bfloat16 pairs that add up to (low, high).
template <int N, int Slots>
GV_DEVICE void split(uint32_t (&parts)[N][Slots], int slot, float low, float high) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const uint32_t pair = pack_bf16(low, high);
    parts[n][slot] = pair;
    low -= as_float(pair << 16);
    high -= as_float(pair & 0xffff0000u);
  }
}

// words[n]: the signs of coordinates j + 32 quad .. + 31 in column first + 8 n + group. One call of philox covers 128
// coordinates from a multiple of 128; a row that begins elsewhere needs two.
GV_DEVICE void row_signs(uint32_t (&words)[kColumnTiles], SignKey key, int64_t j, int first, uint32_t* signs,
                         int lane) {
  const int group = lane / 4, quad = lane % 4;
  const uint64_t block = static_cast<uint64_t>(j) / kSignCoordinates;
  const int skip = static_cast<int>(j % kSignCoordinates), from = skip / 32 + quad, shift = skip % 32;
#pragma unroll
  for (int n = 0; n < kColumnTiles; n += 4) {
    const uint32_t column = static_cast<uint32_t>(first + 8 * n + lane);
    uint32_t made[4];
    sign_words(key, block, column, made);
#pragma unroll
    for (int w = 0; w < 4; ++w) signs[w * kSignPitch + lane] = made[w];
    if (skip != 0) {
      sign_words(key, block + 1, column, made);
#pragma unroll
      for (int w = 0; w < 4; ++w) signs[(4 + w) * kSignPitch + lane] = made[w];
    }
    warp_sync();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t* word = signs + from * kSignPitch + 8 * c + group;
      words[n + c] = shift == 0 ? word[0] : word[0] >> shift | word[kSignPitch] << (32 - shift);
    }
    warp_sync();
  }
}

// z += one row of the tile, all samples, times its signs. Bit k of a word is coordinate k of the lane's 32.
GV_DEVICE void project_row(float (&z)[kColumnTiles][4], const uint32_t* row, const uint32_t (&words)[kColumnTiles],
                           int lane) {
  const uint32_t* at = row + lane / 4 * kSamplePitch + 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < kColumnTiles; half += kColumnTiles / 2) {
    float sum[kColumnTiles / 2][4] = {};
    // Unrolled further, the operands of all steps are loaded at once and spill.
#pragma unroll 1
    for (int s = 0; s < 8; ++s) {
      uint32_t left[kParts][4];
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        const uint2 low = *reinterpret_cast<const uint2*>(at + n * kPartWords + 8 * s);
        const uint2 high = *reinterpret_cast<const uint2*>(at + n * kPartWords + 8 * kSamplePitch + 8 * s);
        left[n][0] = low.x, left[n][1] = high.x, left[n][2] = low.y, left[n][3] = high.y;
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles / 2; ++c) {
        // +-1 in bfloat16: the sign bits of coordinates 2 s and 2 s + 16, then of 2 s + 1 and 2 s + 17.
        const uint32_t word = words[half + c];
        const uint32_t right[2] = {(word << (15 - 2 * s) & 0x80008000u) | 0x3f803f80u,
                                   (word << (14 - 2 * s) & 0x80008000u) | 0x3f803f80u};
#pragma unroll
        for (int n = kParts - 1; n >= 0; --n) mma_bf16(sum[c], left[n], right);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles / 2; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) z[half + c][i] += sum[c][i];
  }
}

// The block's row of partial.
GV_DEVICE void store_sums(const DenseSums& p, const float (&z)[kColumnTiles][4], int64_t slab, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int sample = lane / 4 + 8 * (i / 2), column = warp * kWarpColumns + 8 * n + 2 * (lane % 4) + i % 2;
      if (p.column + column < p.K)
        p.partial[(slab * kDenseSamples + sample) * kDenseColumns + column] = z[n][i];
    }
}

// out += scale times the sum of p.slabs rows of partial, in order; defined in dense_sketch.cu.
cudaError_t dense_reduce(const DenseSums& p, void* stream);

// `kernel` on every kDenseColumns columns, each time followed by its reduction.
template <typename Params>
cudaError_t launch_columns(void (*kernel)(Params), Params p, void* stream) {
  for (p.column = 0; p.column < p.K; p.column += kDenseColumns) {
    cudaError_t error = launch(kernel, p.slabs, kThreads, kSharedWords * sizeof(uint32_t), stream, p);
    if (error == cudaSuccess) error = dense_reduce(p, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether a launch takes these sums; it sets slabs and column itself.
inline bool takes(const DenseSums& p) {
  return p.samples >= 0 && p.samples <= kDenseSamples && p.K > 0 && p.K % kDenseStep == 0;
}

}  // namespace gvendi
