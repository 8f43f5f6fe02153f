// out [B, K] += K^-1/2 sum over j = o I + i of Pi[j] g_b[j], g_b[o][i] = sum_t e_t[o] a_t[i] over a sample's rows;
// a [T, I], e [T, O], Pi in {+-1}^{O I x K} from philox.h. For an embedding g_b[id_t] = sum_t e_t, ids [T], e [T, d].
//
// A unit is a tile of the weight. Its gradient is formed for every sample, then its signs are made once, 128
// coordinates at a time, and serve all samples; the gradient never exists whole. Four coordinates have 16 signed sums,
// (+-g0 +- g1) + (+-g2 +- g3), and four sign bits of 16 columns look up 16 of them in one permute.
// Units belong to a fixed number of groups, each with its own partial sum, so that no bit depends on the threads.

namespace {

constexpr int kQuads = kSignCoordinates / 4;
constexpr int kTogether = 4;                    // samples whose look-ups share one index
constexpr int kTileColumns = kTileRuns * kRun;  // columns of one tile of the gradient
static_assert(kDenseTables == kTogether * kQuads * kRun);
static_assert(kDenseNarrowRows % kTileRows == 0 && kDensePanels >= kDenseChunk * (kDenseNarrowRows + kTileColumns));

GV_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where rows first .. first + rows, columns begin .. begin + width of the weight lie in a sample's gradient buffer: a
// unit of whole rows is one range of coordinates, a strip has one range per row; a range starts at a multiple of 128.
struct Unit {
  int64_t I, first, rows, begin, width;

  bool whole() const { return width == I; }
  int64_t coordinate(int64_t row) const { return (first + row) * I + begin; }
  int64_t ranges() const { return whole() ? 1 : rows; }
  int64_t stride() const { return round_up(width, kSignCoordinates) + kSignCoordinates; }
  int64_t length() const { return whole() ? rows * width : width; }
  int64_t place(int64_t row) const {
    return whole() ? coordinate(0) % kSignCoordinates + row * width
                   : row * stride() + coordinate(row) % kSignCoordinates;
  }
  int64_t size() const { return whole() ? round_up(place(rows), kSignCoordinates) : rows * stride(); }
};

GV_INLINE Unit unit_of(const Cut& cut, int64_t number, int64_t O, int64_t I) {
  const int64_t first = number / cut.strips * cut.rows, begin = number % cut.strips * cut.width;
  return {I, first, O - first < cut.rows ? O - first : cut.rows, begin, I - begin < cut.width ? I - begin : cut.width};
}

// One thread's buffers and the sums that its group adds to: z [samples][K], `apart` floats from sample to sample.
struct Dense {
  Dense(float* buffer, int64_t samples, int columns, SignKey sign_key)
      : gradient(buffer), tables(buffer + samples * kDenseCoordinates), panels(tables + kDenseTables),
        words(reinterpret_cast<uint32_t*>(panels + kDensePanels)), K(columns), key(sign_key) {}

  float *gradient, *tables, *panels;
  uint32_t* words;
  int K;
  SignKey key;
  float* z = nullptr;
  int64_t apart = 0;
};

GV_INLINE void make_words(const Dense& dense, int64_t block) {
  const uint64_t number = static_cast<uint64_t>(block);
  for (int c = 0; c < dense.K; c += kRun) {
    U x[4] = {all_words(static_cast<uint32_t>(number)), all_words(static_cast<uint32_t>(number >> 32)),
              count_from(static_cast<uint32_t>(c)), all_words(0)};
    philox4x32_10(x, dense.key);
    for (int w = 0; w < 4; ++w) store_words(dense.words + w * dense.K + c, x[w]);
  }
}

// table [32][16]: entry n of quad q is the sum of g[4 q + i], negated where bit i of n is set.
GV_INLINE void make_table(float* table, const float* g) {
  const float signs[4][kRun] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
  const F s0 = load(signs[0]), s1 = load(signs[1]), s2 = load(signs[2]), s3 = load(signs[3]);
  for (int q = 0; q < kQuads; ++q, g += 4)
    store(table + q * kRun, (all(g[0]) * s0 + all(g[1]) * s1) + (all(g[2]) * s2 + all(g[3]) * s3));
}

// z_n += Pi^T g of one block of 128 coordinates, for N samples at once.
template <int N>
GV_INLINE void add_block(const Dense& dense, float* const (&z)[kTogether]) {
  for (int c = 0; c < dense.K; c += kRun) {
    F sums[N];
    for (int n = 0; n < N; ++n) sums[n] = zero();
    for (int w = 0; w < 4; ++w) {
      U index = load_words(dense.words + w * dense.K + c);
      const float* table = dense.tables + w * (kQuads / 4) * kRun;
#pragma GCC unroll 8
      for (int q = 0; q < kQuads / 4; ++q) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[n] = sums[n] + look_up(table + (n * kQuads + q) * kRun, index);
        index = next_index(index);
      }
    }
    for (int n = 0; n < N; ++n) store(z[n] + c, load(z[n] + c) + sums[n]);
  }
}

// Adds blocks first .. first + count, which lie at `offset` in the buffers of the samples in slots [n]. Slot s is the
// s-th buffer, slots[s] the sample whose gradient it holds.
void add_range(const Dense& dense, const int64_t* slots, int64_t n, int64_t first, int64_t count, int64_t offset) {
  for (int64_t block = 0; block < count; ++block) {
    make_words(dense, first + block);
    for (int64_t s = 0; s < n; s += kTogether) {
      const int64_t together = n - s < kTogether ? n - s : kTogether;
      float* z[kTogether] = {nullptr, nullptr, nullptr, nullptr};
      for (int64_t m = 0; m < together; ++m) {
        const float* g = dense.gradient + (s + m) * kDenseCoordinates + offset + block * kSignCoordinates;
        make_table(dense.tables + m * kQuads * kRun, g);
        z[m] = dense.z + slots[s + m] * dense.apart;
      }
      if (together == 4) add_block<4>(dense, z);
      if (together == 3) add_block<3>(dense, z);
      if (together == 2) add_block<2>(dense, z);
      if (together == 1) add_block<1>(dense, z);
    }
  }
}

// Rows t .. t + count of x, columns begin .. begin + width, into panel [count, stride] with zeros to the right.
template <typename T>
void pack(const Rows& x, int64_t t, int64_t count, int64_t begin, int64_t width, int64_t stride, float* panel) {
  for (int64_t r = 0; r < count; ++r) {
    const T* row = row_of<T>(x, t + r) + begin;
    int64_t j = 0;
    for (; j < width && j + kRun <= stride; j += kRun) store(panel + r * stride + j, load_at(row, j, width));
    for (; j < stride; ++j) panel[r * stride + j] = j < width ? scalar(row + j) : 0.0f;
  }
}

GV_INLINE void pack(const Rows& x, int64_t t, int64_t count, int64_t begin, int64_t width, int64_t stride,
                    float* panel) {
  if (x.bf16)
    pack<Bf16>(x, t, count, begin, width, stride, panel);
  else
    pack<float>(x, t, count, begin, width, stride, panel);
}

// held[m] = sum_t left[t][m] right[t].
GV_INLINE void tile_of(const float* left, int64_t stride, const float* right, int64_t count,
                       float (&held)[kTileRows][kTileColumns]) {
  F sums[kTileRows][kTileRuns];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileRuns; ++n) sums[m][n] = zero();
  for (int64_t t = 0; t < count; ++t) {
    F y[kTileRuns];
#pragma GCC unroll 2
    for (int n = 0; n < kTileRuns; ++n) y[n] = load(right + t * kTileColumns + n * kRun);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
      const F x = all(left[t * stride + m]);
#pragma GCC unroll 2
      for (int n = 0; n < kTileRuns; ++n) sums[m][n] = sums[m][n] + x * y[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileRuns; ++n) store(held[m] + n * kRun, sums[m][n]);
}

// The unit's gradient of the sample of rows begin .. end, with zeros before and after every range.
void form_gradient(const Rows& a, const Rows& e, int64_t begin, int64_t end, const Unit& unit, float* panels,
                   float* gradient) {
  const int64_t stride = round_up(unit.rows, kTileRows);
  float *left = panels, *right = panels + kDenseChunk * stride, held[kTileRows][kTileColumns];
  memset(gradient, 0, sizeof(float) * static_cast<size_t>(unit.size()));
  for (int64_t t = begin; t < end; t += kDenseChunk) {
    const int64_t count = end - t < kDenseChunk ? end - t : kDenseChunk;
    pack(e, t, count, unit.first, unit.rows, stride, left);
    for (int64_t c = 0; c < unit.width; c += kTileColumns) {
      const int64_t width = unit.width - c < kTileColumns ? unit.width - c : kTileColumns;
      pack(a, t, count, unit.begin + c, width, kTileColumns, right);
      for (int64_t r = 0; r < unit.rows; r += kTileRows) {
        tile_of(left + r, stride, right, count, held);
        for (int64_t m = 0; m < kTileRows && r + m < unit.rows; ++m) {
          float* into = gradient + unit.place(r + m) + c;
          for (int64_t j = 0; j < width; ++j) into[j] += held[m][j];
        }
      }
    }
  }
}

// Adds the unit's gradients in the first n buffers.
void add_unit(const Dense& dense, const Unit& unit, const int64_t* slots, int64_t n) {
  for (int64_t range = 0; range < unit.ranges(); ++range) {
    const int64_t first = unit.coordinate(range) / kSignCoordinates;
    const int64_t end = unit.coordinate(range) + unit.length();
    const int64_t offset = unit.place(range) / kSignCoordinates * kSignCoordinates;
    add_range(dense, slots, n, first, round_up(end, kSignCoordinates) / kSignCoordinates - first, offset);
  }
}

GV_INLINE void clear_sums(const Dense& dense, int64_t samples) {
  for (int64_t b = 0; b < samples; ++b)
    memset(dense.z + b * dense.apart, 0, sizeof(float) * static_cast<size_t>(dense.K));
}

// out_b += K^-1/2 times the sum of a sample's partial sums [groups, K], in order.
GV_INLINE void reduce_groups(float* partial, int64_t groups, int64_t sample, int K, float* out) {
  float* own = partial + sample * groups * K;
  reduce_chunks(own, 0, groups, K);
  add_scaled(out + sample * K, own, inverse_sqrt(K), K);
}

void dense_sketch(const Rows& a, int64_t I, const Rows& e, int64_t O, const int64_t* segments, int64_t samples, int K,
                  SignKey key, float* partial, float* buffers, float* out, int threads) {
  const Cut cut = cut_of(O, I);
  const int64_t groups = dense_groups(O, I);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Dense dense(buffers + thread_number() * dense_buffer(samples, K), samples, K, key);
    dense.apart = groups * K;
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; ++group) {
      dense.z = partial + group * K;
      clear_sums(dense, samples);
      for (int64_t number = group * cut.units / groups; number < (group + 1) * cut.units / groups; ++number) {
        const Unit unit = unit_of(cut, number, O, I);
        int64_t slots[kDenseSamples], n = 0;
        for (int64_t b = 0; b < samples; ++b) {
          if (segments[2 * b] == segments[2 * b + 1]) continue;
          form_gradient(a, e, segments[2 * b], segments[2 * b + 1], unit, dense.panels,
                        dense.gradient + n * kDenseCoordinates);
          slots[n++] = b;
        }
        add_unit(dense, unit, slots, n);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < samples; ++b) reduce_groups(partial, groups, b, K, out);
  }
}

// One row of an embedding: the touches begin .. end have its id; those of one sample add up.
void add_token(Dense& dense, const Touches& touches, int64_t begin, int64_t end, const Rows& e, int64_t d) {
  for (int64_t column = 0; column < d; column += kDenseTokenStrip) {
    const Unit unit = {d, touches.id[begin], 1, column, d - column < kDenseTokenStrip ? d - column : kDenseTokenStrip};
    int64_t slots[kDenseSamples], n = 0;
    for (int64_t entry = begin; entry < end; ++n) {
      float *gradient = dense.gradient + n * kDenseCoordinates, *into = gradient + unit.place(0);
      memset(gradient, 0, sizeof(float) * static_cast<size_t>(unit.size()));
      slots[n] = touches.sample[entry];
      for (; entry < end && touches.sample[entry] == slots[n]; ++entry)
        for (int64_t j = 0; j < unit.width; ++j)
          into[j] += e.bf16 ? scalar(row_of<Bf16>(e, touches.row[entry]) + column + j)
                            : scalar(row_of<float>(e, touches.row[entry]) + column + j);
    }
    add_unit(dense, unit, slots, n);
  }
}

void dense_token_sketch(const Touches& touches, const Rows& e, int64_t d, int64_t samples, int K, SignKey key,
                        float* partial, float* buffers, float* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Dense dense(buffers + thread_number() * dense_buffer(samples, K), samples, K, key);
    dense.apart = kDenseGroups * static_cast<int64_t>(K);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < kDenseGroups; ++group) {
      dense.z = partial + group * K;
      clear_sums(dense, samples);
      for (int64_t begin = touches.groups[group], end = begin; begin < touches.groups[group + 1]; begin = end) {
        while (end < touches.groups[group + 1] && touches.id[end] == touches.id[begin]) ++end;
        add_token(dense, touches, begin, end, e, d);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < samples; ++b) reduce_groups(partial, kDenseGroups, b, K, out);
  }
}

}  // namespace
