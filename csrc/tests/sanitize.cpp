// Runs every kernel on every instruction set of this CPU at awkward sizes, each buffer its own allocation of exactly
// the promised size, and compares with plain double loops. Built with the sanitizers by -DGVENDI_SANITIZE=ON.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"

using namespace gvendi;

namespace {

std::mt19937 random_words(1);
int failures = 0;

double uniform() { return random_words() / 2147483648.0 - 1.0; }

std::vector<int> permutation(int n) {
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_words);
  return order;
}

// A table of the two-level kind that gvendi_fast.kernels.sketch_matrix makes.
struct Axis {
  Axis(int dim, int64_t width) : K(dim), bucket(static_cast<size_t>(width)), sign(static_cast<size_t>(width)) {
    for (int64_t begin = 0; begin < width; begin += dim) {
      const int count = static_cast<int>(std::min<int64_t>(dim, width - begin));
      const bool wide = 4 * count >= dim;
      const std::vector<int> order = permutation(wide ? dim / kRun : dim);
      for (int j = 0; j < count;) {
        const std::vector<int> lanes = permutation(kRun);
        for (int l = 0; l < (wide ? kRun : 1) && j < count; ++l, ++j)
          bucket[static_cast<size_t>(begin + j)] =
              static_cast<int16_t>(wide ? order[static_cast<size_t>(j / kRun)] * kRun + lanes[static_cast<size_t>(l)]
                                        : order[static_cast<size_t>(j)]);
      }
    }
    for (int8_t& s : sign) s = random_words() & 1 ? 1 : -1;
    table = std::make_unique<Table>(dim, width, bucket.data(), sign.data());
    view = table->view();
  }
  int64_t width() const { return static_cast<int64_t>(bucket.size()); }
  // Without its first coordinates, so that it begins inside a block.
  Axis& without(int64_t count) {
    bucket.erase(bucket.begin(), bucket.begin() + count);
    sign.erase(sign.begin(), sign.begin() + count);
    table = std::make_unique<Table>(K, width(), bucket.data(), sign.data(), true);
    view = table->view();
    return *this;
  }

  int K;
  std::vector<int16_t> bucket;
  std::vector<int8_t> sign;
  std::unique_ptr<Table> table;
  TableView view;
};

// Rows with a gap between them; the last row ends the allocation.
struct Data {
  Data(int64_t rows, int64_t width, bool is_bf16) : bf16(is_bf16), stride(width + 3) {
    const size_t size = rows == 0 ? 0 : static_cast<size_t>((rows - 1) * stride + width);
    bf16 ? words.resize(size) : floats.resize(size);
    for (size_t i = 0; i < size; ++i) {
      const float x = static_cast<float>(uniform());
      if (bf16)
        words[i] = static_cast<uint16_t>(bits_of(x) >> 16);
      else
        floats[i] = x;
    }
  }
  static uint32_t bits_of(float x) {
    uint32_t bits;
    std::copy_n(reinterpret_cast<const char*>(&x), sizeof bits, reinterpret_cast<char*>(&bits));
    return bits;
  }
  double at(int64_t t, int64_t j) const {
    const size_t i = static_cast<size_t>(t * stride + j);
    if (!bf16) return static_cast<double>(floats[i]);
    const uint32_t bits = static_cast<uint32_t>(words[i]) << 16;
    float x;
    std::copy_n(reinterpret_cast<const char*>(&bits), sizeof x, reinterpret_cast<char*>(&x));
    return static_cast<double>(x);
  }
  void* pointer() { return bf16 ? static_cast<void*>(words.data()) : static_cast<void*>(floats.data()); }
  Rows rows(const TableView* view) { return {pointer(), stride, bf16, view}; }

  bool bf16;
  int64_t stride;
  std::vector<uint16_t> words;
  std::vector<float> floats;
};

std::vector<double> transformed(const Data& x, int64_t t, const Axis& axis) {
  std::vector<double> y(static_cast<size_t>(axis.K));
  for (size_t j = 0; j < axis.bucket.size(); ++j)
    y[static_cast<size_t>(axis.bucket[j])] += axis.sign[j] * x.at(t, static_cast<int64_t>(j));
  for (size_t step = 1; step < y.size(); step *= 2)
    for (size_t i = 0; i < y.size(); ++i)
      if ((i & step) == 0) {
        const double low = y[i], high = y[i + step];
        y[i] = low + high;
        y[i + step] = low - high;
      }
  return y;
}

void expect(const char* what, const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
  double largest = 1e-30, worst = 0.0;
  for (double x : want) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - want[i]);
    worst = std::isfinite(error) ? std::max(worst, error / largest) : INFINITY;
  }
  if (worst <= tolerance) return;
  ++failures;
  std::printf("%s %s: error %g above %g of %g\n", current_isa().c_str(), what, worst, tolerance, largest);
}

std::vector<float> floats(int64_t n, float value = 0.0f) { return std::vector<float>(static_cast<size_t>(n), value); }

// Pi^T g / sqrt(K) with the scalar signs.
std::vector<double> projected(const std::vector<double>& gradient, int K, SignKey key) {
  std::vector<double> z(static_cast<size_t>(K));
  for (size_t block = 0; block * kSignCoordinates < gradient.size(); ++block)
    for (size_t c = 0; c < z.size(); ++c) {
      uint32_t words[4];
      sign_words(key, block, static_cast<uint32_t>(c), words);
      const size_t first = block * kSignCoordinates, end = std::min(gradient.size(), first + kSignCoordinates);
      for (size_t j = first; j < end; ++j)
        z[c] += ((words[(j - first) / 32] >> (j % 32) & 1) != 0 ? -gradient[j] : gradient[j]) / std::sqrt(K);
    }
  return z;
}

// The only sample takes all rows of the weight gradient [O, I], and of the embedding's gradient [I, O].
void run_dense(Data& a, int64_t I, Data& e, int64_t O, const std::vector<int64_t>& ids, int64_t T, int K, int threads) {
  // The plain loops take a while: few columns, and of e as many as make two units where I is wide.
  if (K > 128) return;
  O = std::min(O, std::max<int64_t>(1, 20000 / I));
  const SignKey key = {0x01234567u, 0x89abcdefu};
  std::vector<double> weight(static_cast<size_t>(O * I)), embedding(weight.size());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t i = 0; i < I; ++i) weight[static_cast<size_t>(o * I + i)] += e.at(t, o) * a.at(t, i);
      embedding[static_cast<size_t>(ids[static_cast<size_t>(t)] * O + o)] += e.at(t, o);
    }
  const int64_t segments[2] = {0, T};
  std::vector<float> partial = floats(dense_groups(O, I) * K, NAN), buffers = floats(threads * dense_buffer(1, K), NAN);
  std::vector<float> z = floats(K);
  kernels().dense_sketch(a.rows(nullptr), I, e.rows(nullptr), O, segments, 1, K, key, partial.data(), buffers.data(),
                         z.data(), threads);
  expect("dense_sketch", z, projected(weight, K, key), 1e-5);

  std::vector<int64_t> rows(static_cast<size_t>(T)), sample(rows.size()), id(rows.size()), groups = {0};
  std::iota(rows.begin(), rows.end(), 0);
  const auto group = [&](int64_t t) { return ids[static_cast<size_t>(t)] % kDenseGroups; };
  std::stable_sort(rows.begin(), rows.end(), [&](int64_t s, int64_t t) {
    const int64_t left = ids[static_cast<size_t>(s)], right = ids[static_cast<size_t>(t)];
    return group(s) != group(t) ? group(s) < group(t) : left < right;
  });
  for (size_t n = 0; n < rows.size(); ++n) id[n] = ids[static_cast<size_t>(rows[n])];
  for (int64_t g = 0; g < kDenseGroups; ++g)
    groups.push_back(groups.back() + std::count_if(rows.begin(), rows.end(), [&](int64_t t) { return group(t) == g; }));
  partial = floats(static_cast<int64_t>(kDenseGroups) * K, NAN);
  z = floats(K);
  kernels().dense_token_sketch({id.data(), sample.data(), rows.data(), groups.data()}, e.rows(nullptr), O, 1, K, key,
                               partial.data(), buffers.data(), z.data(), threads);
  expect("dense_token_sketch", z, projected(embedding, K, key), 1e-5);
}

// Ragged groups of m, 1 and m - 1 rows. Order 2 comes from the matrix itself, an order beside it from the eigenvalues.
void run_entropy(int64_t m, int64_t K, bool bf16, int threads) {
  Data x(2 * m + 2, K, bf16);
  const std::vector<int64_t> boundaries = {1, m + 1, m + 2, 2 * m + 1};
  const int64_t groups = m > 1 ? 3 : 2, buffer = entropy_buffer(m, K);
  std::vector<double> want;
  for (size_t g = 0; g < static_cast<size_t>(groups); ++g) {
    const int64_t begin = boundaries[g], end = boundaries[g + 1];
    const auto product = [&](int64_t s, int64_t t) {
      double sum = 0.0;
      for (int64_t k = 0; k < K; ++k) sum += x.at(s, k) * x.at(t, k);
      return sum;
    };
    double squares = 0.0;
    for (int64_t s = begin; s < end; ++s)
      for (int64_t t = begin; t < end; ++t)
        squares += std::pow(product(s, t), 2) / (product(s, s) * product(t, t) * std::pow(end - begin, 2));
    want.push_back(-std::log(squares));
  }
  for (const double q : {2.0, 2.0 + 1e-9, 1.0, 0.5, static_cast<double>(INFINITY)}) {
    std::vector<double> buffers(static_cast<size_t>(threads * buffer), NAN), h(want.size(), NAN);
    kernels().entropy(x.rows(nullptr), boundaries.data(), groups, K, q, buffers.data(), buffer, h.data(), threads);
    const double most = std::log(std::min(m, K)) + 1e-9;
    if (!std::all_of(h.begin(), h.end(), [&](double value) { return 0 <= value && value <= most; })) {
      ++failures;
      std::printf("%s entropy of order %g: outside 0..%g\n", current_isa().c_str(), q, most);
    }
    // One direction has the entropy 0, which no relative error measures.
    if (std::fabs(q - 2) < 1e-6 && m > 1 && K > 1) expect("entropy", std::vector<float>(h.begin(), h.end()), want, 1e-6);
  }
}

// T rows of odd widths against C centroids, guided by rounded products and not; the last centroid repeats the first.
void run_assign(int64_t T, int64_t K, int64_t C, bool bf16, int threads) {
  Data x(T, K, bf16);
  std::vector<float> centroids = floats(C * K);
  for (int64_t c = 0; c < C; ++c) {
    double square = 0.0;
    std::vector<double> drawn(static_cast<size_t>(K));
    for (double& value : drawn) square += (value = uniform()) * value;
    for (int64_t k = 0; k < K; ++k)
      centroids[static_cast<size_t>(c * K + k)] = c > 1 && c == C - 1
                                                      ? centroids[static_cast<size_t>(k)]
                                                      : static_cast<float>(drawn[static_cast<size_t>(k)] / std::sqrt(square));
  }
  const auto product = [&](int64_t t, int64_t c) {
    double sum = 0.0;
    for (int64_t k = 0; k < K; ++k) sum += x.at(t, k) * static_cast<double>(centroids[static_cast<size_t>(c * K + k)]);
    return sum;
  };
  std::vector<float> scores = floats(T * C);
  std::vector<double> best(static_cast<size_t>(T)), next(C > 1 ? static_cast<size_t>(T) : 0);
  for (int64_t t = 0; t < T; ++t) {
    double square = 0.0;
    for (int64_t k = 0; k < K; ++k) square += x.at(t, k) * x.at(t, k);
    std::vector<double> cosines;
    for (int64_t c = 0; c < C; ++c) {
      cosines.push_back(product(t, c) / std::sqrt(square));
      scores[static_cast<size_t>(t * C + c)] = static_cast<float>(product(t, c) + 0.01 * std::sqrt(square) * uniform());
    }
    std::sort(cosines.rbegin(), cosines.rend());
    best[static_cast<size_t>(t)] = cosines[0];
    if (C > 1) next[static_cast<size_t>(t)] = cosines[1];
  }
  std::vector<float> buffers = floats(threads * ((K + kRun - 1) / kRun * kRun), NAN);
  std::vector<int64_t> before;
  for (const float* guide : {static_cast<const float*>(nullptr), static_cast<const float*>(scores.data())}) {
    std::vector<int64_t> label(static_cast<size_t>(T), -2), second(label);
    std::vector<float> cosine = floats(T, NAN), second_cosine = floats(T, NAN);
    kernels().assign(x.rows(nullptr), T, K, centroids.data(), C, guide, 0.021, buffers.data(),
                     {label.data(), second.data(), cosine.data(), second_cosine.data()}, threads);
    expect("assign", cosine, best, 1e-6);
    expect("the second of assign", second_cosine, next, 1e-6);
    if (guide != nullptr && label != before) {
      ++failures;
      std::printf("%s assign: guided labels differ\n", current_isa().c_str());
    }
    for (size_t t = 0; t < label.size(); ++t)
      if ((C > 2 && label[t] == C - 1) || (C == 1 ? second[t] != -1 : second[t] < 0)) {
        ++failures;
        std::printf("%s assign: labels %d and %d\n", current_isa().c_str(), static_cast<int>(label[t]),
                    static_cast<int>(second[t]));
      }
    before = label;
  }
}

// Three experts, the last without a row, their rows in turns and in falling order within each; the second one's tables
// are parts of longer ones.
void run_experts(Data& a, Data& e, int64_t T, int K, int threads) {
  const int64_t I = a.stride - 3, O = e.stride - 3;
  std::vector<Axis> in, out_axis;
  std::vector<TableView> in_views, out_views;
  for (int x = 0; x < 3; ++x) {
    const int64_t cut = x == 1 ? 5 : 0;
    in_views.push_back(in.emplace_back(K, I + cut).without(cut).view);
    out_views.push_back(out_axis.emplace_back(K, O + cut).without(cut).view);
  }
  std::vector<int64_t> expert(static_cast<size_t>(T)), order(expert.size()), begin, end;
  for (int64_t t = 0; t < T; ++t) expert[static_cast<size_t>(t)] = t % 2;
  std::iota(order.rbegin(), order.rend(), 0);
  std::stable_sort(order.begin(), order.end(), [](int64_t s, int64_t t) { return s % 2 < t % 2; });
  for (int64_t t = 0; t < T; t += kChunkRows) {
    begin.push_back(t);
    end.push_back(std::min<int64_t>(t + kChunkRows, T));
  }
  const int64_t count = static_cast<int64_t>(begin.size());
  const std::vector<int64_t> first = {0, count};
  std::vector<double> sum(static_cast<size_t>(K)), bias(sum.size());
  for (int64_t t = 0; t < T; ++t) {
    const size_t x = static_cast<size_t>(t % 2);
    const std::vector<double> left = transformed(a, t, in[x]), right = transformed(e, t, out_axis[x]);
    for (size_t c = 0; c < sum.size(); ++c) {
      sum[c] += left[c] * right[c] / std::sqrt(K);
      bias[c] += right[c] / std::sqrt(K);
    }
  }
  std::vector<float> partial = floats(count * K, NAN), buffers = floats(threads * 2 * (K + kPad), NAN), z = floats(K);
  const ExpertRows inputs = {a.pointer(), a.stride, a.bf16, in_views.data()};
  const ExpertRows part = {e.pointer(), e.stride, e.bf16, out_views.data()};
  const Chunks chunks = {1, count, first.data(), begin.data(), end.data()};
  kernels().expert_sketch(&inputs, part, {order.data(), expert.data()}, chunks, K, partial.data(), buffers.data(),
                          z.data(), threads);
  expect("expert_sketch", z, sum, 1e-5);
  z = floats(K);
  kernels().expert_sketch(nullptr, part, {order.data(), expert.data()}, chunks, K, partial.data(), buffers.data(),
                          z.data(), threads);
  expect("expert_sketch of biases", z, bias, 1e-5);
}

void run(int64_t T, int64_t width, int K, bool bf16, int threads) {
  const int64_t V = width;
  const Axis in(K, width), out_axis(K, std::max<int64_t>(1, width / 2));
  Data a(T, width, bf16), e(T, out_axis.width(), bf16);
  const size_t columns = static_cast<size_t>(K);

  // One chunk per 64 rows of the only sample; none where there are no rows.
  std::vector<int64_t> begin, end;
  for (int64_t t = 0; t < T; t += kChunkRows) {
    begin.push_back(t);
    end.push_back(std::min<int64_t>(t + kChunkRows, T));
  }
  const int64_t count = static_cast<int64_t>(begin.size());
  const std::vector<int64_t> first = {0, count};
  const Chunks chunks = {1, count, first.data(), begin.data(), end.data()};

  std::vector<double> want(columns * static_cast<size_t>(T)), sum(columns), tokens(columns);
  std::vector<int64_t> ids(static_cast<size_t>(T));
  for (int64_t t = 0; t < T; ++t) {
    ids[static_cast<size_t>(t)] = t % V;
    const std::vector<double> x = transformed(a, t, in), y = transformed(e, t, out_axis);
    const unsigned bucket = static_cast<unsigned>(in.bucket[static_cast<size_t>(t % V)]);
    for (size_t c = 0; c < columns; ++c) {
      want[static_cast<size_t>(t) * columns + c] = x[c];
      sum[c] += x[c] * y[c] / std::sqrt(K);
      const int parity = __builtin_parity(static_cast<unsigned>(c) & bucket) ? -1 : 1;
      tokens[c] += parity * in.sign[static_cast<size_t>(t % V)] * y[c] / std::sqrt(K);
    }
  }

  std::vector<float> spread = floats(T * K, NAN);
  kernels().fold_hadamard(a.rows(&in.view), T, K, spread.data(), threads);
  expect("fold_hadamard", spread, want, 1e-5);

  std::vector<float> partial = floats(count * K, NAN), buffers = floats(threads * 2 * (K + kPad), NAN), z = floats(K);
  const Rows part = e.rows(&out_axis.view);
  kernels().linear_sketch(a.rows(&in.view), &part, 1, chunks, K, partial.data(), buffers.data(), z.data(), threads);
  expect("linear_sketch", z, sum, 1e-5);
  z = floats(K);
  kernels().linear_sketch({spread.data(), K, false, nullptr}, &part, 1, chunks, K, partial.data(), buffers.data(),
                          z.data(), threads);
  expect("linear_sketch of a transformed input", z, sum, 1e-5);
  z = floats(K);
  kernels().token_sketch(ids.data(), in.view, part, chunks, K, partial.data(), z.data(), threads);
  expect("token_sketch", z, tokens, 1e-5);

  const int64_t padded = (width + kRun - 1) / kRun * kRun;
  std::vector<float> own = floats(count * padded, NAN);
  Data x(T, width, !bf16);
  for (const Norm norm : {Norm::kNone, Norm::kRms, Norm::kLayer}) {
    Data v(1, width, false);
    std::vector<double> total(static_cast<size_t>(width));
    for (int64_t t = 0; t < T; ++t) {
      double mean = 0.0, square = 0.0;
      for (int64_t j = 0; j < width; ++j) mean += norm == Norm::kLayer ? x.at(t, j) / static_cast<double>(width) : 0.0;
      for (int64_t j = 0; j < width; ++j) square += (x.at(t, j) - mean) * (x.at(t, j) - mean);
      const double scale = 1.0 / std::sqrt(square / static_cast<double>(width) + 1e-2);
      for (int64_t j = 0; j < width; ++j)
        total[static_cast<size_t>(j)] += a.at(t, j) * (norm == Norm::kNone ? 1.0 : (x.at(t, j) - mean) * scale);
    }
    std::transform(total.begin(), total.end(), v.floats.begin(), [](double y) { return static_cast<float>(y); });
    std::vector<double> right = transformed(v, 0, in);
    for (double& value : right) value /= std::sqrt(K);
    z = floats(K);
    const Rows inputs = x.rows(nullptr);
    kernels().vector_sketch(norm == Norm::kNone ? nullptr : &inputs, a.rows(&in.view), chunks, K, norm, 1e-2,
                            own.data(), buffers.data(), z.data(), threads);
    expect("vector_sketch", z, right, 1e-5);
  }

  for (const float cap : {0.0f, 2.0f}) {
    Data logits(T, V, bf16);
    const Data before = logits;
    std::vector<float> work = floats(bf16 || cap > 0 ? threads * padded : 0, NAN);
    std::vector<float> loss = floats(T, NAN), folded = floats(T * K, NAN);
    kernels().softmax_fold(logits.pointer(), logits.stride, bf16, T, ids.data(), in.view, cap, 0.5f, work.data(),
                           loss.data(), folded.data(), threads);
    std::vector<double> losses(static_cast<size_t>(T));
    for (int64_t t = 0; t < T; ++t) {
      const auto logit = [&](int64_t j) {
        const double l = 0.5 * before.at(t, j);
        return cap > 0 ? cap * std::tanh(l / cap) : l;
      };
      double total = 0.0;
      for (int64_t j = 0; j < V; ++j) total += std::exp(logit(j));
      losses[static_cast<size_t>(t)] = std::log(total) - logit(ids[static_cast<size_t>(t)]);
    }
    // A vocabulary of one has the loss 0, which no relative error measures.
    if (V > 1) expect("softmax_fold", loss, losses, 1e-5);
  }

  run_experts(a, e, T, K, threads);
  run_dense(a, width, e, out_axis.width(), ids, T, K, threads);

  Data rows(T, K, bf16);
  std::vector<float> panels = floats(std::min<int64_t>(T, kCovarianceRows) * K, NAN);
  std::vector<double> master(columns * columns), trace(1);
  kernels().covariance(rows.rows(nullptr), T, K, panels.data(), master.data(), threads);
  for (size_t c = 0; c < columns; ++c) trace[0] += master[c * columns + c];
  expect("covariance", {static_cast<float>(T)}, trace, 1e-5);
}

// Rows of coordinates of a diagonal A; the first nodes of a quadrature, and columns of zeros up to a whole group.
template <typename T>
void run_gain(int64_t N, int K, int J, int sign, int threads) {
  const size_t columns = static_cast<size_t>((J + 2 + kGainColumns - 1) / kGainColumns * kGainColumns);
  const size_t dim = static_cast<size_t>(K), nodes = static_cast<size_t>(J), rows = static_cast<size_t>(N);
  std::vector<T> c(rows * dim);
  std::generate(c.begin(), c.end(), [] { return static_cast<T>(uniform()); });
  std::vector<double> t(nodes), weight(nodes), table(dim * columns), lambda(dim), out(4 * rows, NAN);
  for (size_t j = 0; j < nodes; ++j) weight[j] = t[j] = 1e-3 * std::exp(static_cast<double>(j));
  for (size_t k = 0; k < dim; ++k) {
    lambda[k] = 1.0 + static_cast<double>(k);
    table[k * columns] = 1.0;
    table[k * columns + 1] = lambda[k];
    for (size_t j = 0; j < nodes; ++j) table[k * columns + 2 + j] = 1.0 / (lambda[k] + t[j]);
  }
  const GainNodes at = {sign, J, static_cast<int>(columns), t.data(), weight.data(), table.data()};
  kernels().gain(c.data(), sizeof(T) == sizeof(double), N, K, at, out.data(), N, threads);
  std::vector<float> got;
  std::vector<double> want;
  for (size_t n = 0; n < rows; ++n) {
    double r = 0.0, mu = 0.0;
    for (size_t k = 0; k < dim; ++k) {
      const double e = static_cast<double>(c[n * dim + k]) * static_cast<double>(c[n * dim + k]);
      r += e;
      mu += e * lambda[k];
    }
    mu = sign < 0 ? std::max(1.0, mu / r) : mu / r;
    double change = (mu + sign > 0.0 ? (mu + sign) * std::log(mu + sign) : 0.0) - mu * std::log(mu);
    for (size_t j = 0; j < nodes; ++j) {
      double g = 0.0;
      for (size_t k = 0; k < dim; ++k)
        g += static_cast<double>(c[n * dim + k]) * static_cast<double>(c[n * dim + k]) / (lambda[k] + t[j]) / r;
      change += weight[j] * (std::log1p(sign / (mu + t[j])) - std::log1p(sign * g));
    }
    for (const size_t part : {size_t{0}, size_t{1}, size_t{3}}) got.push_back(static_cast<float>(out[part * rows + n]));
    want.insert(want.end(), {change, mu, r});
  }
  expect("gain", got, want, 1e-5);
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    // The same data for each, whatever ran before.
    random_words.seed(1);
    for (const int K : {64, 128, 256, 1024})
      for (const int64_t T : {0, 1, 7, 63, 1000})
        for (const int64_t width : {1, 15, 16, 63, 64, 65, 200, 1000, 1100}) {
          // The long ones only where they add a block or a chunk.
          if (T == 1000 && (K > 256 || width > 65)) continue;
          run(T, width, K, false, 2);
          run(T, width, K, true, 1);
        }
    for (const int K : {1, 63, 64, 65, 200})
      for (const int64_t N : {0, 1, 3, 4, 8, 9, 33})
        for (const int J : {1, 6, 7, 30, 62}) {
          run_gain<float>(N, K, J, 1, 2);
          run_gain<double>(N, K, J, -1, 1);
        }
    for (const int64_t m : {1, 2, 7, 16, 17, 65, 130})
      for (const int64_t K : {1, 3, 15, 64, 129}) {
        run_entropy(m, K, false, 2);
        run_entropy(m, K, true, 1);
      }
    std::printf("%s: %d failures\n", isa.c_str(), failures);
  }
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    for (const int64_t K : {1, 15, 16, 17, 100, 1024})
      for (const int64_t C : {1, 2, 3, 33})
        for (const int64_t T : {0, 1, 70}) {
          run_assign(T, K, C, false, 2);
          run_assign(T, K, C, true, 1);
        }
    std::printf("%s, assign: %d failures\n", isa.c_str(), failures);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
