#include "table.h"

#include <algorithm>
#include <stdexcept>

namespace gvendi {

Table::Table(int dim, int64_t width, const int16_t* bucket, const int8_t* sign, bool is_part)
    : dim_(dim), width_(width), sign_(sign, sign + width), bucket_(bucket, bucket + width) {
  if (dim < 64 || dim > 8192 || (dim & (dim - 1)) != 0)
    throw std::invalid_argument("dim must be a power of two, 64..8192");
  for (int64_t j = 0; j < width; ++j)
    if (bucket[j] < 0 || bucket[j] >= dim || (sign[j] != 1 && sign[j] != -1))
      throw std::invalid_argument("a table's buckets must lie in 0..dim-1 and its signs be +1 or -1");
  const int64_t rest = width % dim;
  // A last block below dim/4 is a plain permutation and stays with its buckets (gvendi_fast.kernels.sketch_matrix.is_two_level).
  wide_ = 4 * rest >= dim ? width : width - rest;
  if (is_part && !is_two_level()) wide_ = 0;
  blocks_ = static_cast<int>((wide_ + dim - 1) / dim);
  moves_.assign(static_cast<size_t>(blocks_) * static_cast<size_t>(dim / kRun), Move{});
  targets_.assign(static_cast<size_t>((wide_ + kRun - 1) / kRun), Move{});
  for (int block = 0; block < blocks_; ++block) {
    const int64_t begin = static_cast<int64_t>(block) * dim;
    pack_block(block, begin, static_cast<int>(std::min<int64_t>(dim, wide_ - begin)));
  }
}

bool Table::is_two_level() const {
  std::vector<uint32_t> taken;
  for (int64_t first = 0; first < wide_; first += kRun) {
    if (first % dim_ == 0) taken.assign(static_cast<size_t>(dim_ / kRun), 0);
    uint32_t& lanes = taken[static_cast<size_t>(bucket_[static_cast<size_t>(first)] / kRun)];
    if (lanes != 0) return false;
    for (int64_t j = first; j < std::min(first + kRun, wide_); ++j) {
      const int bucket = bucket_[static_cast<size_t>(j)];
      const uint32_t lane = 1u << (bucket % kRun);
      if (bucket / kRun != bucket_[static_cast<size_t>(first)] / kRun || (lanes & lane) != 0) return false;
      lanes |= lane;
    }
  }
  return true;
}

void Table::pack_block(int block, int64_t begin, int count) {
  for (int source = 0; source * kRun < count; ++source) {
    const int64_t first = begin + source * kRun;
    const int valid = std::min(kRun, count - source * kRun);
    const int target = bucket_[first] / kRun;
    Move& move = moves_[static_cast<size_t>(block) * static_cast<size_t>(dim_ / kRun) + static_cast<size_t>(target)];
    int from[kRun];
    std::fill(from, from + kRun, -1);
    for (int lane = 0; lane < valid; ++lane) {
      const int to = bucket_[first + lane] % kRun;
      if (bucket_[first + lane] / kRun != target || from[to] != -1)
        throw std::invalid_argument("a table's wide block must move aligned runs of 16 as units");
      from[to] = lane;
    }
    // Lanes past the width are zero where they are read, so that any order of theirs will do.
    int spare = valid;
    for (int to = 0; to < kRun; ++to) {
      if (from[to] == -1) from[to] = spare++;
      const bool negative = from[to] < valid && sign_[first + from[to]] < 0;
      move.lanes[to] = static_cast<uint32_t>(from[to]) * 0x10001u | (negative ? 0x80000000u : 0u);
    }
    if (move.mask != 0) throw std::invalid_argument("two runs of one block share a destination");
    move.mask = (1u << valid) - 1;
    Move& there = targets_[static_cast<size_t>(first / kRun)];
    there = move;
    move.offset = static_cast<uint32_t>(source * kRun);
    there.offset = static_cast<uint32_t>(target * kRun);
  }
}

TableView Table::view() const {
  return {width_, wide_, dim_, blocks_, moves_.data(), targets_.data(), bucket_.data(), sign_.data()};
}

ExpertTables::ExpertTables(int dim, int64_t experts, int64_t width, const int16_t* bucket, const int8_t* sign) {
  tables_.reserve(static_cast<size_t>(experts));
  for (int64_t x = 0; x < experts; ++x) tables_.emplace_back(dim, width, bucket + x * width, sign + x * width, true);
  for (const Table& table : tables_) views_.push_back(table.view());
}

}  // namespace gvendi
