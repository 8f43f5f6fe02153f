// A table in the order in which the threads of hadamard.cuh read it.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "tile.h"

namespace gvendi {
namespace {

struct Pack {
  int64_t width;
  const int16_t* bucket;
  const int8_t* sign;
  uint16_t* out;

  template <int K>
  void operator()() const {
    const int64_t blocks = (width + K - 1) / K;
    std::fill(out, out + blocks * K, static_cast<uint16_t>(kEmpty));
    for (int64_t j = 0; j < width; ++j) {
      if (bucket[j] < 0 || bucket[j] >= K)
        throw std::invalid_argument("bucket of coordinate " + std::to_string(j) + " is outside 0..K-1");
      uint16_t& entry = out[j / K * K + packed_position<K>(bucket[j])];
      if (entry != kEmpty)
        throw std::invalid_argument("coordinate " + std::to_string(j) + " shares a bin with one of its own block");
      entry = static_cast<uint16_t>(static_cast<uint32_t>(j % K) | (sign[j] < 0 ? kNegative : 0u));
    }
  }
};

}  // namespace

void pack_table(int K, int64_t width, const int16_t* bucket, const int8_t* sign, uint16_t* out) {
  if (!with_dim(K, Pack{width, bucket, sign, out}))
    throw std::invalid_argument("K must be a power of two from 64 to 8192, got " + std::to_string(K));
}

}  // namespace gvendi
