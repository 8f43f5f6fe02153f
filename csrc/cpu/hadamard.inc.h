// H S x of one row: x [d] or several x_p with one table each, -> [K], K = 16 runs. Stages run from distance 1 upwards
// with one rounding each, so that the bits do not depend on how a pass groups them.

namespace {

GV_INLINE float scalar(const float* p) { return *p; }
GV_INLINE float scalar(const Bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
GV_INLINE const T* row_of(const Rows& x, int64_t t) {
  return static_cast<const T*>(x.data) + t * x.stride;
}

// Butterflies of distance H, 2H, ... below R on R runs in registers.
template <int H, int R>
GV_INLINE void butterflies(F (&v)[R]) {
  if constexpr (H < R) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
      if ((i & H) == 0) {
        const F low = v[i], high = v[i + H];
        v[i] = low + high;
        v[i + H] = difference(low, high);
      }
    butterflies<2 * H>(v);
  }
}

// v (+)= runs that the moves gather from x.
template <bool kAssign, bool kFull, int R, typename T>
GV_INLINE void gather(F (&v)[R], const T* x, const Move* moves) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const F moved = load_permuted(x + moves[r].offset, kFull ? 0xffffu : moves[r].mask, moves[r].lanes);
    v[r] = kAssign ? moved : v[r] + moved;
  }
}

// v (+)= runs c .. c + R of the wide blocks of S x.
template <bool kAssign, int R, typename T>
GV_INLINE void gather_blocks(F (&v)[R], const T* x, const TableView& s, int c, int begin, int end) {
  for (int block = begin; block < end; ++block) {
    const Move* moves = s.moves + block * (s.dim / kRun) + c;
    const T* from = x + static_cast<int64_t>(block) * s.dim;
    if ((block + 1) * static_cast<int64_t>(s.dim) <= s.wide)
      gather<kAssign, true>(v, from, moves);
    else
      gather<kAssign, false>(v, from, moves);
  }
}

template <bool kAssign, int R>
GV_INLINE void gather_part(F (&v)[R], const Rows& part, int64_t t, int c, int begin, int end) {
  if (part.table == nullptr) {
    const float* x = row_of<float>(part, t) + c * kRun;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) v[r] = kAssign ? load(x + r * kRun) : v[r] + load(x + r * kRun);
  } else if (part.bf16) {
    gather_blocks<kAssign>(v, row_of<Bf16>(part, t), *part.table, c, begin, end);
  } else {
    gather_blocks<kAssign>(v, row_of<float>(part, t), *part.table, c, begin, end);
  }
}

template <typename T>
void add_narrow(float* sums, const T* x, const TableView& s) {
  for (int64_t j = s.wide; j < s.width; ++j) sums[s.bucket[j]] += scalar(x + j) * static_cast<float>(s.sign[j]);
}

GV_INLINE bool has_narrow(const Rows& x) { return x.table != nullptr && x.table->wide < x.table->width; }

template <typename T>
GV_INLINE void prefetch(const T* x, int64_t width) {
  for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + j);
}

// Folds row t of all parts into buffer [K] with the first log2(16 R) stages done.
template <int R>
GV_INLINE void fold_first(const Rows* parts, int count, int64_t t, int K, float* buffer) {
  bool narrow = false;
  for (int p = 0; p < count; ++p) narrow = narrow || has_narrow(parts[p]);
  if (narrow) memset(buffer, 0, sizeof(float) * static_cast<size_t>(K));
  for (int p = 0; narrow && p < count; ++p) {
    if (!has_narrow(parts[p])) continue;
    if (parts[p].bf16)
      add_narrow(buffer, row_of<Bf16>(parts[p], t), *parts[p].table);
    else
      add_narrow(buffer, row_of<float>(parts[p], t), *parts[p].table);
  }
  for (int c = 0; c < K / kRun; c += R) {
    F v[R];
    if (narrow) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) v[r] = load(buffer + (c + r) * kRun);
    } else {
      gather_part<true>(v, parts[0], t, c, 0, 1);
    }
    for (int p = 0; p < count; ++p) {
      const int begin = p == 0 && !narrow ? 1 : 0, end = parts[p].table == nullptr ? 1 : parts[p].table->blocks;
      if (begin < end) gather_part<false>(v, parts[p], t, c, begin, end);
    }
    transform_lanes(v);
    butterflies<1>(v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(buffer + (c + r) * kRun, v[r]);
  }
}

// Returns the distance, in runs, of the first stage that is still to do.
int fold_row(const Rows* parts, int count, int64_t t, int K, float* buffer) {
  if constexpr (kMaxRuns == 16) {
    if (K >= 16 * kRun) return fold_first<16>(parts, count, t, K, buffer), 16;
    if (K >= 8 * kRun) return fold_first<8>(parts, count, t, K, buffer), 8;
  }
  return fold_first<4>(parts, count, t, K, buffer), 4;
}

template <int Q>
GV_INLINE void pass(float* buffer, int K, int distance) {
  const int runs = K / kRun;
  for (int base = 0; base < runs; base += Q * distance)
    for (int j = base; j < base + distance; ++j) {
      F v[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) v[q] = load(buffer + (j + q * distance) * kRun);
      butterflies<1>(v);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) store(buffer + (j + q * distance) * kRun, v[q]);
    }
}

// How many of the last stages' runs (1, 2 or 4) one butterfly of the last pass holds.
GV_INLINE int last_radix(int K, int distance) {
  int left = K / kRun / distance;
  while (left > 4) left /= 4;
  return left;
}

// Stages from `distance` up to those of the last pass.
GV_INLINE int middle_passes(float* buffer, int K, int distance) {
  const int last = last_radix(K, distance);
  for (; distance * last < K / kRun; distance *= 4) pass<4>(buffer, K, distance);
  return distance;
}

void transform_rest(float* buffer, int K, int distance) {
  distance = middle_passes(buffer, K, distance);
  if (distance * 4 == K / kRun) pass<4>(buffer, K, distance);
  if (distance * 2 == K / kRun) pass<2>(buffer, K, distance);
}

// H x of buffer [K], in place.
void transform(float* buffer, int K) {
  const Rows self = {buffer, 0, false, nullptr};
  transform_rest(buffer, K, fold_row(&self, 1, 0, K, buffer));
}

// out [K] += scale * sum, and the sum of the chunks' partial rows in chunk order, into the first of them.
GV_INLINE void add_scaled(float* out, const float* sum, float scale, int K) {
  for (int c = 0; c < K; c += kRun) store(out + c, load(out + c) + load(sum + c) * all(scale));
}
GV_INLINE void reduce_chunks(float* partial, int64_t first, int64_t end, int64_t width) {
  float* into = partial + first * width;
  for (int64_t chunk = first + 1; chunk < end; ++chunk)
    for (int64_t c = 0; c < width; c += kRun) store(into + c, load(into + c) + load(partial + chunk * width + c));
}

GV_INLINE float inverse_sqrt(int K) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(K))); }

}  // namespace
