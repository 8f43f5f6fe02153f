// How K bins lie in a block of threads, and where a packed table keeps a bin; for host and device.
#pragma once

#include <cstdint>

namespace gvendi {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// A team of threads owns a row, kValues bins each: before the transform thread t of a team has bins t + kTeamThreads v.
template <int K>
struct Tile {
  static_assert(K >= 64 && K <= 8192 && (K & (K - 1)) == 0, "K is a power of two from 64 to 8192");
  static constexpr int kValues = K >= 1024 ? 32 : K / 32;
  static constexpr int kTeamThreads = K / kValues;
  static constexpr int kTeamWarps = kTeamThreads / 32;
  static constexpr int kTeams = kWarps / kTeamWarps;
  // Table entries that one load brings: 16 bytes where a thread has as many.
  static constexpr int kGroup = kValues < 8 ? kValues : 8;
  static_assert(kTeamWarps * kTeams == kWarps, "teams fill the block");
};

// Entry of a packed table: coordinate within its block of K, or no coordinate at all; bit 15 negates.
constexpr uint32_t kIndexMask = 0x1fff, kEmpty = 0x4000, kNegative = 0x8000;

// Where bin c of a block stands in the packed table.
template <int K>
constexpr int packed_position(int c) {
  using S = Tile<K>;
  const int t = c % S::kTeamThreads, v = c / S::kTeamThreads;
  return (v / S::kGroup * S::kTeamThreads + t) * S::kGroup + v % S::kGroup;
}

// call.template operator()<K>() for the K that is asked for; false if there is none.
template <typename Call>
bool with_dim(int K, const Call& call) {
  switch (K) {
    case 64: return call.template operator()<64>(), true;
    case 128: return call.template operator()<128>(), true;
    case 256: return call.template operator()<256>(), true;
    case 512: return call.template operator()<512>(), true;
    case 1024: return call.template operator()<1024>(), true;
    case 2048: return call.template operator()<2048>(), true;
    case 4096: return call.template operator()<4096>(), true;
    case 8192: return call.template operator()<8192>(), true;
    default: return false;
  }
}

}  // namespace gvendi
