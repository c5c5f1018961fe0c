#include "widening.hpp"

#include <algorithm>
#include <mutex>
#include <span>

#include <ATen/Parallel.h>

#include "hestia/core/quantised.hpp"
#include "hestia/model/tensors.hpp"
#include "tensor_reader.hpp"

namespace hestia {
namespace {

using torch::Tensor;

/// Rows of one matrix.
struct Piece {
  const Widening* tensor;
  std::int64_t matrix;
  std::int64_t begin;
  std::int64_t count;

  [[nodiscard]] std::int64_t num_rows() const { return tensor->destination_MRC.size(1); }
  [[nodiscard]] std::int64_t num_columns() const { return tensor->destination_MRC.size(2); }
  [[nodiscard]] std::int64_t value_bytes_of_row() const {
    const Tensor& destination = tensor->destination_MRC;
    return static_cast<std::int64_t>(tensor->values.bytes.size()) / (destination.size(0) * destination.size(1));
  }
};

// Whole rows of a stored tensor, as bytes.
Tensor read_rows(TensorReader& reader, const TensorView& view, std::int64_t row_bytes, std::int64_t first,
                 std::int64_t count) {
  Tensor bytes = torch::empty({count * row_bytes}, torch::kUInt8);
  reader.read(view, static_cast<std::size_t>(first * row_bytes),
              {static_cast<std::byte*>(bytes.data_ptr()), bytes.nbytes()});
  return bytes;
}

std::span<const std::uint8_t> octets(const Tensor& bytes) {
  return {bytes.const_data_ptr<std::uint8_t>(), bytes.nbytes()};
}

void widen(const Architecture& architecture, const Piece& piece, TensorReader& reader, TensorReader& scale_reader) {
  const Widening& tensor = *piece.tensor;
  const std::int64_t columns = piece.num_columns();
  const std::int64_t first = piece.matrix * piece.num_rows() + piece.begin;
  const Tensor destination_RC = tensor.destination_MRC[piece.matrix].narrow(0, piece.begin, piece.count);
  const Tensor stored = read_rows(reader, tensor.values, piece.value_bytes_of_row(), first, piece.count);
  if (!tensor.scales) {
    destination_RC.copy_(stored.view(torch_dtype(tensor.values.dtype)).view({piece.count, columns}));
    return;
  }
  Tensor wide_RC = torch::empty({piece.count, columns}, torch::kFloat32);
  const std::span<float> wide = {wide_RC.mutable_data_ptr<float>(), static_cast<std::size_t>(wide_RC.numel())};
  const TensorView& scales = *tensor.scales;
  const std::int64_t scale_bytes = scales.shape.back() * static_cast<std::int64_t>(dtype_size(scales.dtype));
  if (architecture.quantisation == Quantisation::kMxfp4) {
    dequantise_mxfp4(octets(stored), octets(read_rows(scale_reader, scales, scale_bytes, first, piece.count)), wide);
  } else {
    const std::int64_t block = architecture.scale_block_rows;
    const std::int64_t begin = piece.begin / block;
    const std::int64_t end = (piece.begin + piece.count + block - 1) / block;
    const Tensor factors = read_rows(scale_reader, scales, scale_bytes, begin, end - begin)
                               .view(torch_dtype(scales.dtype))
                               .to(torch::kFloat32);
    dequantise_e4m3(octets(stored), {factors.const_data_ptr<float>(), static_cast<std::size_t>(factors.numel())},
                    columns, block, architecture.scale_block_columns, wide);
  }
  destination_RC.copy_(wide_RC);
}

}  // namespace

void widen_tensors(const Architecture& architecture, const std::vector<Widening>& tensors,
                   const WideningOptions& options) {
  std::vector<Piece> pieces;
  for (const Widening& tensor : tensors) {
    const Tensor& destination = tensor.destination_MRC;
    // Whole blocks of scales.
    const std::int64_t unit =
        tensor.scales && architecture.quantisation == Quantisation::kFp8Blocks ? architecture.scale_block_rows : 1;
    const std::int64_t columns = std::max<std::int64_t>(1, destination.size(2));
    const std::int64_t step = std::max<std::int64_t>(1, options.piece_values / columns / unit) * unit;
    for (std::int64_t matrix = 0; matrix < destination.size(0); ++matrix) {
      for (std::int64_t begin = 0; begin < destination.size(1); begin += step) {
        pieces.push_back({&tensor, matrix, begin, std::min(step, destination.size(1) - begin)});
      }
    }
  }
  std::mutex advancing;
  at::parallel_for(0, static_cast<std::int64_t>(pieces.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    const torch::NoGradGuard no_grad;
    TensorReader reader;
    TensorReader scale_reader;  // Another sequence.
    for (std::int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[static_cast<std::size_t>(i)];
      widen(architecture, piece, reader, scale_reader);
      if (options.advance) {
        const std::lock_guard lock(advancing);
        options.advance(piece.count * piece.value_bytes_of_row());
      }
    }
  });
}

}  // namespace hestia
