// Per row of raw logits x [V]: l = scale x, or cap tanh(scale x / cap); p = softmax(l); loss = logsumexp(l) - l[label];
// e = (p - onehot(label)) dl/dx in place of x; folded [K] = S e, from the unrounded e, unless folded is null.

namespace {

constexpr int kSumRuns = 64;  // runs that a float32 sum of exponentials spans before it goes to a double

template <int R>
struct Exponential {
  F power[R], tail[R];  // e^x = power * (1 + tail), power an exact power of two
};

// R registers at once: one alone is a chain of twenty operations that leaves the pipes idle. x is clamped at -87.9,
// where power is 0; x <= 88. e^r = 1 + r + r^2 P(r) with |r| <= ln(2)/2; P's error is 3e-9, the whole's below 2 ulp.
template <int R>
GV_INLINE Exponential<R> exponential(const F (&x)[R]) {
  // Adding 1.5 * 2^23 rounds to an integer; the 127 biases the exponent that power_of_two reads.
  const F magic = all(12583039.0f);
  // ln 2 in two parts; n times the first is exact.
  const F high = all(0x1.62e4p-1f), low = all(0x1.7f7d1cp-20f);
  const float coefficients[] = {0x1.123a6cp-7f, 0x1.5558f4p-5f, 0x1.555490p-3f, 0x1.fffffcp-2f};
  Exponential<R> y;
  F r[R], p[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) r[i] = larger(all(-87.9f), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) y.power[i] = r[i] * all(0x1.715476p+0f) + magic;
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) r[i] = (r[i] - (y.power[i] - magic) * high) - (y.power[i] - magic) * low;
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) p[i] = all(0x1.6a2352p-10f);
#pragma GCC unroll 4
  for (const float coefficient : coefficients)
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) p[i] = p[i] * r[i] + all(coefficient);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) y.tail[i] = r[i] + r[i] * r[i] * p[i];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) y.power[i] = power_of_two(y.power[i]);
  return y;
}

struct Tanh {
  F value, slope;
};

// From e^-2|u| - 1 without cancellation: tanh = -w / (2 + w), slope = 4 (1 + w) / (2 + w)^2, w = expm1(-2|u|).
GV_INLINE Tanh tanh_of(F u) {
  const F one = all(1.0f), two = all(2.0f);
  const F minus[1] = {zero() - two * absolute(u)};
  const Exponential<1> y = exponential(minus);
  const F power = y.power[0], tail = y.tail[0], w = power * tail + (power - one);
  const F inverse = one / (two + w);
  return {with_sign_of(zero() - w * inverse, u), all(4.0f) * (power * (one + tail)) * inverse * inverse};
}

// n lanes from p; a constant n = 16 is a plain load.
template <typename T>
GV_INLINE F load_n(const T* p, int n) {
  return n == kRun ? load(p) : load_masked(p, (1u << n) - 1);
}
template <typename T>
GV_INLINE void store_n(T* p, F x, int n) {
  if (n == kRun)
    store(p, x);
  else
    store_first(p, x, n);
}

template <bool kCap, typename T>
GV_INLINE F logit(const T* x, int n, F scale, F cap, F inverse_cap) {
  F l = load_n(x, n) * scale;
  if (kCap) l = cap * tanh_of(l * inverse_cap).value;
  return n == kRun ? l : select_first(l, n, all(-__builtin_inff()));
}

// Adds the run of e at coordinate j to folded.
GV_INLINE void fold_run(float* folded, const TableView& s, int64_t j, F e, int n) {
  if (j < s.wide) {
    const Move& to = s.targets[j / kRun];
    store(folded + to.offset, load(folded + to.offset) + permute(e, to.lanes));
    return;
  }
  float held[kRun];
  store(held, e);
  for (int l = 0; l < n; ++l) folded[s.bucket[j + l]] += held[l] * static_cast<float>(s.sign[j + l]);
}

// What the passes over one row share. work: V floats that take the exponentials, rounded up to a run unless it is x.
template <typename T>
struct Row {
  T* x;
  float *work, *folded;
  const TableView& table;
  F scale, cap, inverse_cap;
};

// The largest logit of R runs, or of the first n lanes of one run; a capped logit is kept in work.
template <bool kCap, int R, typename T>
GV_INLINE void scan(const Row<T>& row, int64_t j, int n, F (&highest)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const F l = logit<kCap>(row.x + j + i * kRun, n, row.scale, row.cap, row.inverse_cap);
    if (kCap) store_n(row.work + j + i * kRun, l, n);
    highest[i] = larger(highest[i], l);
  }
}

// work = exp(l - top), added to sum.
template <bool kCap, int R, typename T>
GV_INLINE void raise(const Row<T>& row, int64_t j, int n, F top, F& sum) {
  F l[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    l[i] = kCap ? load_n(row.work + j + i * kRun, n) : load_n(row.x + j + i * kRun, n) * row.scale;
    if (n < kRun) l[i] = select_first(l[i], n, all(-__builtin_inff()));
    l[i] = l[i] - top;
  }
  const Exponential<R> y = exponential(l);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const F power = y.power[i] * (all(1.0f) + y.tail[i]);
    store_n(row.work + j + i * kRun, power, n);
    sum = sum + power;
  }
}

// x = e, added to folded.
template <bool kCap, int R, typename T>
GV_INLINE void finish(const Row<T>& row, int64_t j, int n, F share) {
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const int64_t at = j + i * kRun;
    F e = load_n(row.work + at, n) * share;
    if (kCap) e = e * tanh_of(load_n(row.x + at, n) * row.scale * row.inverse_cap).slope;
    store_n(row.x + at, e, n);
    if (row.folded != nullptr) fold_run(row.folded, row.table, at, e, n);
  }
}

template <bool kCap, typename T>
GV_INLINE void softmax_row(const Row<T>& row, int64_t label, float* loss) {
  constexpr int kStep = 4 * kRun;
  const int64_t V = row.table.width, body = V / kRun * kRun, quads = V / kStep * kStep;
  const int rest = static_cast<int>(V - body);

  const F lowest = all(-__builtin_inff());
  F highest[4] = {lowest, lowest, lowest, lowest};
  for (int64_t j = 0; j < quads; j += kStep) scan<kCap, 4>(row, j, kRun, highest);
  for (int64_t j = quads; j < body; j += kRun) scan<kCap, 1>(row, j, kRun, highest);
  if (rest > 0) scan<kCap, 1>(row, body, rest, highest);
  float lanes[kRun], top = -__builtin_inff();
  store(lanes, larger(larger(highest[0], highest[1]), larger(highest[2], highest[3])));
  for (float lane : lanes) top = lane > top ? lane : top;

  store(lanes, logit<kCap>(row.x + label, 1, row.scale, row.cap, row.inverse_cap));
  const double label_logit = static_cast<double>(lanes[0]);
  double total = 0.0;
  for (int64_t j = 0; j < V;) {
    const int64_t end = V - j < kSumRuns * kRun ? V : j + kSumRuns * kRun;
    F block = zero();
    for (; j + kStep <= end; j += kStep) raise<kCap, 4>(row, j, kRun, all(top), block);
    for (; j + kRun <= end; j += kRun) raise<kCap, 1>(row, j, kRun, all(top), block);
    if (j < end) raise<kCap, 1>(row, j, rest, all(top), block);
    j = end;
    total += static_cast<double>(sum(block));
  }
  *loss = static_cast<float>(log(total) + (static_cast<double>(top) - label_logit));
  // p - 1 as (exp - total) / total: the label's run needs no case of its own below.
  row.work[label] = static_cast<float>(static_cast<double>(row.work[label]) - total);

  float scale[kRun];
  store(scale, row.scale);
  const F share = all(static_cast<float>(static_cast<double>(scale[0]) / total));
  if (row.folded != nullptr) memset(row.folded, 0, sizeof(float) * static_cast<size_t>(row.table.dim));
  for (int64_t j = 0; j < quads; j += kStep) finish<kCap, 4>(row, j, kRun, share);
  for (int64_t j = quads; j < body; j += kRun) finish<kCap, 1>(row, j, kRun, share);
  if (rest > 0) finish<kCap, 1>(row, body, rest, share);
}

template <typename T>
GV_INLINE void softmax_row(T* x, float* work, int64_t label, const TableView& table, float cap,
                           float scale, float* loss, float* folded) {
  const Row<T> row = {x, work, folded, table, all(scale), all(cap), all(cap > 0 ? 1.0f / cap : 0.0f)};
  if (cap > 0)
    softmax_row<true>(row, label, loss);
  else
    softmax_row<false>(row, label, loss);
}

void softmax_fold(void* x, int64_t stride, bool bf16, int64_t T, const int64_t* labels, const TableView& table,
                  float cap, float scale, float* work, float* loss, float* folded, int threads) {
  const int64_t padded = (table.width + kRun - 1) / kRun * kRun;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < T; ++t) {
    float *own = work + thread_number() * padded, *row_fold = folded == nullptr ? nullptr : folded + t * table.dim;
    if (bf16) {
      softmax_row(static_cast<Bf16*>(x) + t * stride, own, labels[t], table, cap, scale, loss + t, row_fold);
    } else {
      float* row = static_cast<float*>(x) + t * stride;
      softmax_row(row, cap > 0 ? own : row, labels[t], table, cap, scale, loss + t, row_fold);
    }
  }
}

}  // namespace
