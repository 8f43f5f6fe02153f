// H S x of one row, x [d] -> [K], by a team of threads: a gather of K bins from ceil(d / K) blocks of x, then the
// Walsh-Hadamard transform, Sylvester order, as 32 x 32 (x 2, 4, 8): five stages in registers, an exchange through
// shared memory, five more. A stage by shuffles costs one shared-memory access a value, an exchange costs two, so
// shuffles serve only K < 1024, where registers hold fewer stages.
//
// Rows are gathered from global memory directly. A wide block moves in runs of 16 coordinates, so 16 lanes read one
// sector of bfloat16 or two of float32, each exactly once: staging them in shared memory would add a write and leave
// the reads as they are.
#pragma once

#include "device.h"
#include "kernels.h"
#include "tile.h"

namespace gvendi {

// Floats of shared memory: a padded 32 x 32 square per warp; a team's K bins fit beside the padding.
constexpr int kPitch = 33;
constexpr int kSquare = 32 * kPitch;
constexpr int kBufferFloats = kWarps * kSquare;
static_assert(kBufferFloats * sizeof(float) <= 48 * 1024, "no opt-in to larger shared memory");
static_assert(kBufferFloats >= kThreads * 32, "the bins of all teams fit");

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

GV_DEVICE float load_value(const float* p) { return load_constant(p); }
GV_DEVICE float load_value(const Bf16* p) {
  return as_float(static_cast<uint32_t>(load_constant(reinterpret_cast<const uint16_t*>(p))) << 16);
}
GV_DEVICE float load_value(const Fp16* p) {
  return half_to_float(load_constant(reinterpret_cast<const uint16_t*>(p)));
}

// kGroup entries of a packed table in one load.
template <int G>
GV_DEVICE void load_entries(uint32_t (&entries)[G], const uint16_t* p) {
  uint32_t words[G / 2];
  if constexpr (G == 8) {
    const uint4 w = load_constant(reinterpret_cast<const uint4*>(p));
    words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
  } else if constexpr (G == 4) {
    const uint2 w = load_constant(reinterpret_cast<const uint2*>(p));
    words[0] = w.x, words[1] = w.y;
  } else {
    words[0] = load_constant(reinterpret_cast<const uint32_t*>(p));
  }
#pragma unroll
  for (int i = 0; i < G; ++i) entries[i] = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
}

// x += S row, in gather order: bin t + kTeamThreads v.
template <int K, typename T>
GV_DEVICE void gather(float (&x)[Tile<K>::kValues], const T* row, const uint16_t* table, int blocks, int t) {
  using S = Tile<K>;
  // The loads of one block are enough in flight; those of several need too many registers.
#pragma unroll 1
  for (int block = 0; block < blocks; ++block, row += K, table += K) {
#pragma unroll
    for (int v = 0; v < S::kValues; v += S::kGroup) {
      uint32_t entries[S::kGroup];
      load_entries(entries, table + (v / S::kGroup * S::kTeamThreads + t) * S::kGroup);
#pragma unroll
      for (int i = 0; i < S::kGroup; ++i) {
        const float value = entries[i] & kEmpty ? 0.0f : load_value(row + (entries[i] & kIndexMask));
        x[v + i] += as_float(as_bits(value) ^ ((entries[i] & kNegative) << 16));
      }
    }
  }
}

template <int K>
GV_DEVICE void fold(float (&x)[Tile<K>::kValues], const Rows& rows, int64_t row, int t) {
  const int64_t offset = row * rows.stride;
  if (rows.table == nullptr) {
    const float* from = static_cast<const float*>(rows.data) + offset + t;
#pragma unroll
    for (int v = 0; v < Tile<K>::kValues; ++v) x[v] += load_constant(from + v * Tile<K>::kTeamThreads);
  } else if (rows.dtype == kBfloat16) {
    gather<K>(x, static_cast<const Bf16*>(rows.data) + offset, rows.table, rows.blocks, t);
  } else if (rows.dtype == kFloat16) {
    gather<K>(x, static_cast<const Fp16*>(rows.data) + offset, rows.table, rows.blocks, t);
  } else {
    gather<K>(x, static_cast<const float*>(rows.data) + offset, rows.table, rows.blocks, t);
  }
}

// Stages of distance 1 .. kEnd / 2 between registers.
template <int kEnd, int R>
GV_DEVICE void butterflies(float (&x)[R]) {
#pragma unroll
  for (int h = 1; h < kEnd; h *= 2)
#pragma unroll
    for (int i = 0; i < R; ++i)
      if ((i & h) == 0) {
        const float low = x[i], high = x[i + h];
        x[i] = low + high;
        x[i + h] = low - high;
      }
}

// Swaps lane and register within a warp, through the warp's own square.
GV_DEVICE void transpose(float (&x)[32], float* square, int lane) {
  // The square may still be read by lanes that are behind.
  warp_sync();
#pragma unroll
  for (int r = 0; r < 32; ++r) square[r * kPitch + lane] = x[r];
  warp_sync();
#pragma unroll
  for (int r = 0; r < 32; ++r) x[r] = square[lane * kPitch + r];
}

// Brings the team's W warps together in registers: register v_sub W + w' of warp w gets bin value v = w 32/W + v_sub of
// warp w'. The bins are then lane + 32 (register + 32 w). All threads of the block call it.
template <int K>
GV_DEVICE void exchange_warps(float (&x)[32], float* team, int t) {
  using S = Tile<K>;
  constexpr int W = S::kTeamWarps;
  const int lane = t % 32, warp = t / 32;
  block_sync();
#pragma unroll
  for (int v = 0; v < 32; ++v) team[v * S::kTeamThreads + t] = x[v];
  block_sync();
#pragma unroll
  for (int i = 0; i < 32; ++i) x[i] = team[(warp * (32 / W) + i / W) * S::kTeamThreads + i % W * 32 + lane];
  // The squares of transpose lie over the team's bins.
  block_sync();
}

// H x from gather order to product order, which is bin t + kTeamThreads v for K < 1024 and 32 t + v else. All threads
// of the block call it, those without a row with any x.
template <int K>
GV_DEVICE void transform(float (&x)[Tile<K>::kValues], float* buffer) {
  using S = Tile<K>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  butterflies<S::kValues>(x);
  if constexpr (K < 1024) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2)
#pragma unroll
      for (int v = 0; v < S::kValues; ++v) {
        const float other = shuffle_xor(x[v], mask);
        x[v] = lane & mask ? other - x[v] : other + x[v];
      }
  } else {
    if constexpr (S::kTeamWarps > 1) {
      exchange_warps<K>(x, buffer + warp / S::kTeamWarps * K, threadIdx.x % S::kTeamThreads);
      butterflies<S::kTeamWarps>(x);
    }
    transpose(x, buffer + warp * kSquare, lane);
    butterflies<32>(x);
  }
}

// Between product order and an order whose stores to memory are contiguous; its own inverse.
template <int K>
GV_DEVICE void reorder(float (&x)[Tile<K>::kValues], float* buffer) {
  if constexpr (K >= 1024) transpose(x, buffer + threadIdx.x / 32 * kSquare, threadIdx.x % 32);
}

// Bin of register v of thread t after reorder.
template <int K>
GV_DEVICE int bin_of(int t, int v) {
  if constexpr (K >= 1024) return t / 32 * 1024 + t % 32 + 32 * v;
  return t + Tile<K>::kTeamThreads * v;
}

}  // namespace gvendi
