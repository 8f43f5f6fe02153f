// Python module gvendi_fast._cpu. Tensors arrive as (address, row stride in elements, is bfloat16); the Python side has
// checked shapes and owns every buffer. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace py = pybind11;
using namespace gvendi;

namespace {

using Address = uintptr_t;
using Matrix = std::tuple<Address, int64_t, bool>;
using Part = std::tuple<Address, int64_t, bool, const Table*>;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows with their table's view beside them, as Rows points at it.
struct BoundRows {
  explicit BoundRows(const Part& part) {
    const Table* table = std::get<3>(part);
    if (table != nullptr) view = table->view();
    rows = {at<const void>(std::get<0>(part)), std::get<1>(part), std::get<2>(part), nullptr};
    has_table = table != nullptr;
  }
  Rows get() const { return {rows.data, rows.stride, rows.bf16, has_table ? &view : nullptr}; }

  TableView view{};
  Rows rows{};
  bool has_table = false;
};

Rows plain(const Matrix& x) { return {at<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), nullptr}; }

// segments int64 [B, 2] cut into chunks of at most kChunkRows rows of one sample.
struct ChunkList {
  ChunkList(Address segments, int64_t samples) {
    const int64_t* spans = at<const int64_t>(segments);
    first.reserve(static_cast<size_t>(samples) + 1);
    for (int64_t b = 0; b < samples; ++b) {
      first.push_back(static_cast<int64_t>(begin.size()));
      for (int64_t t = spans[2 * b]; t < spans[2 * b + 1]; t += kChunkRows) {
        begin.push_back(t);
        end.push_back(std::min<int64_t>(t + kChunkRows, spans[2 * b + 1]));
      }
    }
    first.push_back(static_cast<int64_t>(begin.size()));
  }
  Chunks get() const {
    return {static_cast<int64_t>(first.size()) - 1, static_cast<int64_t>(begin.size()), first.data(), begin.data(),
            end.data()};
  }

  std::vector<int64_t> first, begin, end;
};

// Rows by sample, within a sample by expert, and else as they came, so that a sample's sum does not depend on its batch.
struct RowOrder {
  RowOrder(const int64_t* experts, const int64_t* samples, int64_t R, int64_t E, int64_t B)
      : order(static_cast<size_t>(R)), ends(static_cast<size_t>(B)) {
    std::vector<int64_t> by_expert(order.size()), place(static_cast<size_t>(E));
    for (int64_t r = 0; r < R; ++r) by_expert[static_cast<size_t>(r)] = r;
    sort(by_expert, experts, place, order);
    by_expert.swap(order);
    sort(by_expert, samples, ends, order);
  }
  ChunkList chunks() const {
    std::vector<int64_t> spans;
    spans.reserve(2 * ends.size());
    for (size_t b = 0; b < ends.size(); ++b) {
      spans.push_back(b == 0 ? 0 : ends[b - 1]);
      spans.push_back(ends[b]);
    }
    return ChunkList(reinterpret_cast<Address>(spans.data()), static_cast<int64_t>(ends.size()));
  }

  std::vector<int64_t> order, ends;

 private:
  // Stable counting sort of rows by key; place [keys] becomes the end of each key's rows.
  static void sort(const std::vector<int64_t>& rows, const int64_t* key, std::vector<int64_t>& place,
                   std::vector<int64_t>& sorted) {
    for (const int64_t r : rows) ++place[static_cast<size_t>(key[r])];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), int64_t{0});
    for (const int64_t r : rows) sorted[static_cast<size_t>(place[static_cast<size_t>(key[r])]++)] = r;
  }
};

ExpertRows expert_rows(const Matrix& x, const ExpertTables& tables) {
  return {at<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), tables.views()};
}

void run_fold_hadamard(const Part& x, int64_t T, int K, Address out, int threads) {
  const BoundRows rows(x);
  kernels().fold_hadamard(rows.get(), T, K, at<float>(out), threads);
}

void run_linear_sketch(const Part& a, const std::vector<Part>& parts, Address segments, int64_t samples, int K,
                       Address partial, Address buffers, Address out, int threads) {
  const BoundRows left(a);
  const std::vector<BoundRows> bound(parts.begin(), parts.end());
  std::vector<Rows> right;
  right.reserve(bound.size());
  for (const BoundRows& part : bound) right.push_back(part.get());
  const ChunkList chunks(segments, samples);
  kernels().linear_sketch(left.get(), right.data(), static_cast<int>(right.size()), chunks.get(), K,
                          at<float>(partial), at<float>(buffers), at<float>(out), threads);
}

// experts, samples int64 [R], each checked to lie in its range; a without tables: stacked biases.
void run_expert_sketch(const Matrix& a, const ExpertTables* a_tables, const Matrix& e, const ExpertTables& e_tables,
                       Address experts, Address samples, int64_t R, int64_t E, int64_t B, int K, Address partial,
                       Address buffers, Address out, int threads) {
  const RowOrder rows(at<const int64_t>(experts), at<const int64_t>(samples), R, E, B);
  const ChunkList chunks = rows.chunks();
  const ExpertRows inputs = a_tables == nullptr ? ExpertRows{} : expert_rows(a, *a_tables);
  kernels().expert_sketch(a_tables == nullptr ? nullptr : &inputs, expert_rows(e, e_tables),
                          {rows.order.data(), at<const int64_t>(experts)}, chunks.get(), K, at<float>(partial),
                          at<float>(buffers), at<float>(out), threads);
}

void run_token_sketch(Address ids, const Table& id_table, const Part& e, Address segments, int64_t samples, int K,
                      Address partial, Address out, int threads) {
  const BoundRows rows(e);
  const ChunkList chunks(segments, samples);
  kernels().token_sketch(at<const int64_t>(ids), id_table.view(), rows.get(), chunks.get(), K, at<float>(partial),
                         at<float>(out), threads);
}

void run_vector_sketch(const std::optional<Matrix>& x, const Part& e, Address segments, int64_t samples, int K,
                       int norm, double eps, Address partial, Address buffers, Address out, int threads) {
  const BoundRows rows(e);
  const Rows inputs = x ? plain(*x) : Rows{};
  const ChunkList chunks(segments, samples);
  kernels().vector_sketch(x ? &inputs : nullptr, rows.get(), chunks.get(), K, static_cast<Norm>(norm), eps,
                          at<float>(partial), at<float>(buffers), at<float>(out), threads);
}

// Without a table only the width of the logits counts, and folded is null.
void run_softmax_fold(const Matrix& x, int64_t T, int64_t V, Address labels, const Table* table, float cap, float scale,
                      Address work, Address loss, Address folded, int threads) {
  TableView view{};
  view.width = V;
  if (table != nullptr) view = table->view();
  kernels().softmax_fold(at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), T, at<const int64_t>(labels), view,
                         cap, scale, at<float>(work), at<float>(loss), table == nullptr ? nullptr : at<float>(folded),
                         threads);
}

void run_dense_sketch(const Matrix& a, int64_t I, const Matrix& e, int64_t O, Address segments, int64_t samples, int K,
                      uint32_t key_low, uint32_t key_high, Address partial, Address buffers, Address out,
                      int threads) {
  if (samples > kDenseSamples) throw py::value_error("dense_sketch: too many samples for one call");
  kernels().dense_sketch(plain(a), I, plain(e), O, at<const int64_t>(segments), samples, K, {key_low, key_high},
                         at<float>(partial), at<float>(buffers), at<float>(out), threads);
}

void run_dense_token_sketch(Address id, Address sample, Address row, Address groups, const Matrix& e, int64_t d,
                            int64_t samples, int K, uint32_t key_low, uint32_t key_high, Address partial,
                            Address buffers, Address out, int threads) {
  if (samples > kDenseSamples) throw py::value_error("dense_token_sketch: too many samples for one call");
  const Touches touches = {at<const int64_t>(id), at<const int64_t>(sample), at<const int64_t>(row),
                           at<const int64_t>(groups)};
  kernels().dense_token_sketch(touches, plain(e), d, samples, K, {key_low, key_high}, at<float>(partial),
                               at<float>(buffers), at<float>(out), threads);
}

void run_covariance(const Matrix& x, int64_t N, int K, Address panels, Address master, int threads) {
  if (K % kPanel != 0) throw py::value_error("covariance: K must be a multiple of " + std::to_string(kPanel));
  kernels().covariance(plain(x), N, K, at<float>(panels), at<double>(master), threads);
}

void run_gain(Address c, bool wide, int64_t N, int K, int sign, int J, int C, Address t, Address weight, Address table,
              Address out, int64_t stride, int threads) {
  if (C % kGainColumns != 0 || C > kGainMaxColumns || J + 2 > C) throw py::value_error("gain: wrong number of columns");
  const GainNodes nodes = {sign, J, C, at<const double>(t), at<const double>(weight), at<const double>(table)};
  kernels().gain(at<const void>(c), wide, N, K, nodes, at<double>(out), stride, threads);
}

void run_entropy(const Matrix& x, Address boundaries, int64_t G, int64_t K, double q, Address buffers, int64_t buffer,
                 Address out, int threads) {
  kernels().entropy(plain(x), at<const int64_t>(boundaries), G, K, q, at<double>(buffers), buffer, at<double>(out),
                    threads);
}

// scores 0: none.
void run_assign(const Matrix& x, int64_t N, int64_t K, Address centroids, int64_t C, Address scores, double margin,
                Address buffers, Address label, Address cosine, Address second, Address second_cosine, int threads) {
  const Nearests out = {at<int64_t>(label), at<int64_t>(second), at<float>(cosine), at<float>(second_cosine)};
  kernels().assign(plain(x), N, K, at<const float>(centroids), C, at<const float>(scores), margin,
                   at<float>(buffers), out, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of gvendi_fast; called through gvendi_fast.kernels.backends.cpu only";
  m.attr("VERSION") = GVENDI_VERSION;
  m.attr("CHUNK_ROWS") = kChunkRows;
  m.attr("COVARIANCE_ROWS") = kCovarianceRows;
  m.attr("PANEL") = kPanel;
  m.attr("PAD") = kPad;
  m.attr("DENSE_SAMPLES") = kDenseSamples;
  m.attr("DENSE_GROUPS") = kDenseGroups;
#ifdef _OPENMP
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  py::class_<Table>(m, "Table")
      .def(py::init([](int dim, int64_t width, Address bucket, Address sign) {
        return Table(dim, width, at<const int16_t>(bucket), at<const int8_t>(sign));
      }));
  py::class_<ExpertTables>(m, "ExpertTables")
      .def(py::init([](int dim, int64_t experts, int64_t width, Address bucket, Address sign) {
        return ExpertTables(dim, experts, width, at<const int16_t>(bucket), at<const int8_t>(sign));
      }));
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa);
  m.def("current_isa", &current_isa);
  m.def("fold_hadamard", &run_fold_hadamard, NoGil());
  m.def("linear_sketch", &run_linear_sketch, NoGil());
  m.def("expert_sketch", &run_expert_sketch, NoGil());
  m.def("token_sketch", &run_token_sketch, NoGil());
  m.def("vector_sketch", &run_vector_sketch, NoGil());
  m.def("softmax_fold", &run_softmax_fold, NoGil());
  m.def("dense_groups", &dense_groups);
  m.def("dense_buffer", &dense_buffer);
  m.def("dense_sketch", &run_dense_sketch, NoGil());
  m.def("dense_token_sketch", &run_dense_token_sketch, NoGil());
  m.def("covariance", &run_covariance, NoGil());
  m.def("gain", &run_gain, NoGil());
  m.def("entropy_buffer", &entropy_buffer);
  m.def("entropy", &run_entropy, NoGil());
  m.def("assign", &run_assign, NoGil());
}
