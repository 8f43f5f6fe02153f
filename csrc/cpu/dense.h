// The dense mode: how a weight is cut into units of work, and what a kernel needs besides its tensors. The cut depends
// on the weight's shape alone, so that the order of a sum depends on nothing else.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "table.h"

namespace gvendi {

constexpr int kDenseSamples = 32;  // samples of one call
constexpr int kDenseGroups = 64;   // units add up in at most so many groups, each with its own partial sum
constexpr int kDenseChunk = 128;   // rows of tokens that add up in registers
// Rows and columns of a unit; a narrow weight takes more rows, an embedding one long one.
constexpr int kDenseRows = 16, kDenseStrip = 1024, kDenseNarrowRows = 64, kDenseTokenStrip = 16384;
// Floats of a unit's gradient: a range of coordinates is padded to whole blocks of signs on both sides.
constexpr int64_t kDenseCoordinates = kDenseRows * (kDenseStrip + kSignCoordinates);
constexpr int64_t kDenseTables = 4 * (kSignCoordinates / 4) * kRun;  // sums of four coordinates, for four samples
constexpr int64_t kDensePanels = kDenseChunk * (kDenseNarrowRows + 2 * kRun);
static_assert(kDenseCoordinates >= kDenseTokenStrip + 2 * kSignCoordinates);

// A weight [O, I] in units of `rows` rows and, where I is wide, strips of `width` columns.
struct Cut {
  int64_t rows, width, strips, units;
};

// static: an inline function's code could be linked from the object of a wider instruction set.
static constexpr Cut cut_of(int64_t O, int64_t I) {
  const int64_t strips = (I + kDenseStrip - 1) / kDenseStrip;
  const int64_t share = (I + strips - 1) / strips;
  const int64_t width = strips == 1 ? I : (share + kSignCoordinates - 1) / kSignCoordinates * kSignCoordinates;
  const int64_t rows = width * kDenseNarrowRows <= kDenseRows * kDenseStrip ? kDenseNarrowRows : kDenseRows;
  return {rows, width, strips, (O + rows - 1) / rows * strips};
}

static constexpr int64_t dense_groups(int64_t O, int64_t I) {
  const int64_t units = cut_of(O, I).units;
  return units < kDenseGroups ? units : kDenseGroups;
}

// Floats of one thread's buffers.
static constexpr int64_t dense_buffer(int64_t samples, int64_t K) {
  return samples * kDenseCoordinates + kDenseTables + kDensePanels + kSignCoordinates / 32 * K;
}

// Which rows of e belong to which row of an embedding: entries sorted by (id mod kDenseGroups, id, sample, row); those
// of group g are groups[g] .. groups[g+1].
struct Touches {
  const int64_t *id, *sample, *row, *groups;
};

}  // namespace gvendi
