// One axis of the sketch matrix, (S x)[bucket[j]] += sign[j] * x[j], arranged for the kernels.
#pragma once

#include <cstdint>
#include <vector>

namespace gvendi {

constexpr int kRun = 16;  // lanes that move as a unit, gvendi_fast.kernels.sketch_matrix.RUN

// Where 16 coordinates go. Destination lane l takes source lane lanes[l] & 15, negated where bit 31 is set. Bits 16..19
// repeat the lane for a permutation of 16-bit words.
struct Move {
  uint32_t lanes[kRun];
  uint32_t offset;  // in a block's moves: first coordinate of the source; in targets: first bin of the destination
  uint32_t mask;    // which of the 16 source lanes exist: a run of low bits
};

// What a kernel sees. Coordinates [0, wide) lie in blocks that move in runs of 16, [wide, width) in at most one
// narrow block; of a part of a table that does not begin with a block, all are narrow.
struct TableView {
  int64_t width, wide;
  int dim, blocks;
  const Move* moves;      // [blocks, dim/16] by destination run: what to gather; mask 0 where nothing comes
  const Move* targets;    // [ceil(wide/16)] by source run: where to scatter
  const int16_t* bucket;  // [width]
  const int8_t* sign;     // [width]
};

class Table {
 public:
  // bucket int16 [width] in 0..dim-1 and sign int8 [width] of +-1 are copied.
  // Throws std::invalid_argument where they are not the two-level permutation of gvendi_fast.kernels.sketch_matrix, or,
  // with is_part, any coordinates of one: then they are moved one by one.
  Table(int dim, int64_t width, const int16_t* bucket, const int8_t* sign, bool is_part = false);
  TableView view() const;

 private:
  bool is_two_level() const;
  void pack_block(int block, int64_t begin, int count);

  int dim_;
  int64_t width_, wide_;
  int blocks_;
  std::vector<Move> moves_, targets_;
  std::vector<int8_t> sign_;
  std::vector<int16_t> bucket_;
};

// The tables of stacked experts, or a part of each: bucket and sign [E, width].
class ExpertTables {
 public:
  ExpertTables(int dim, int64_t experts, int64_t width, const int16_t* bucket, const int8_t* sign);
  const TableView* views() const { return views_.data(); }

 private:
  std::vector<Table> tables_;
  std::vector<TableView> views_;
};

}  // namespace gvendi
