// label [N] = the c of the largest cosine <x_n, c> / ||x_n||, second [N] the c of the next; x [N, K] rows, unit centroids
// [C, K]. Equal products go to the lower c. Products and norms are doubles of 16 lanes over exact float products, so
// that every bit depends on its row and centroid alone: not on threads, blocks, or whether the ISA fuses.
//
// scores [N, C] are float32 products <x_n, c> of any library, whatever the order of its sums. Each errs by at most
// margin / 2 * ||x_n||, so that no c further than the margin below the second largest score can be one of the two:
// only the others are computed here. Without scores, and where float32 could overflow or vanish, every c is.

namespace {

// Norms between which float32 products of rows with unit centroids keep their relative error.
constexpr double kLeastNorm = 1e-25, kLargestNorm = 1e30;

GV_INLINE double sum_lanes(const double* lanes) {
  double total = 0.0;
  for (int l = 0; l < kRun; ++l) total += lanes[l];
  return total;
}

template <typename T>
GV_INLINE void widen_row(const T* x, int64_t K, float* row) {
  for (int64_t k = 0; k < K; k += kRun) {
    const int valid = static_cast<int>(K - k < kRun ? K - k : kRun);
    store(row + k, load_masked(x + k, (1u << valid) - 1));
  }
}

// <x, y>: x has zeros up to a multiple of 16.
GV_INLINE double exact_dot(const float* x, const float* y, int64_t K) {
  double lanes[kRun] = {0};
  int64_t k = 0;
  for (; k + kRun <= K; k += kRun)
    for (int l = 0; l < kRun; ++l) lanes[l] += static_cast<double>(x[k + l]) * static_cast<double>(y[k + l]);
  for (int l = 0; k + l < K; ++l) lanes[l] += static_cast<double>(x[k + l]) * static_cast<double>(y[k + l]);
  return sum_lanes(lanes);
}

GV_INLINE double second_largest(const float* scores, int64_t C) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t c = 0; c < C; ++c) {
    if (scores[c] > second) {
      second = scores[c] > first ? first : scores[c];
      first = scores[c] > first ? scores[c] : first;
    }
  }
  return static_cast<double>(second);
}

struct Nearest {
  int64_t label[2] = {-1, -1};
  double product[2] = {-INFINITY, -INFINITY};
  // In ascending order of c, so that a tie stays with the lower.
  void offer(int64_t c, double value) {
    if (!(value > product[1])) return;
    const bool best = value > product[0];
    label[1] = best ? label[0] : c;
    product[1] = best ? product[0] : value;
    label[0] = best ? c : label[0];
    product[0] = best ? value : product[0];
  }
};

void assign_row(const float* row, int64_t K, const float* centroids, int64_t C, const float* scores, double margin,
                int64_t n, const Nearests& out) {
  const double norm = __builtin_sqrt(exact_dot(row, row, K));
  const bool guided = scores != nullptr && norm >= kLeastNorm && norm <= kLargestNorm;
  const double least = guided ? second_largest(scores, C) - margin * norm : 0.0;
  Nearest found;
  for (int64_t c = 0; c < C; ++c)
    if (!guided || static_cast<double>(scores[c]) >= least) found.offer(c, exact_dot(row, centroids + c * K, K));
  out.label[n] = found.label[0];
  out.second[n] = found.label[1];
  // A row of zeros or without finite numbers has no cosine, and one centroid no second.
  out.cosine[n] = found.label[0] < 0 ? NAN : static_cast<float>(found.product[0] / norm);
  out.second_cosine[n] = found.label[1] < 0 ? NAN : static_cast<float>(found.product[1] / norm);
}

void assign(const Rows& x, int64_t N, int64_t K, const float* centroids, int64_t C, const float* scores, double margin,
            float* buffers, const Nearests& out, int threads) {
  const int64_t padded = (K + kRun - 1) / kRun * kRun;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t n = 0; n < N; ++n) {
    float* row = buffers + thread_number() * padded;
    if (x.bf16)
      widen_row(row_of<Bf16>(x, n), K, row);
    else
      widen_row(row_of<float>(x, n), K, row);
    assign_row(row, K, centroids, C, scores == nullptr ? nullptr : scores + n * C, margin, n, out);
  }
}

}  // namespace
