#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "hestia/core/files.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia {

/// One thread's way to stored tensors: it opens the file that it reads from for itself (`MappedFile::reopened`).
class TensorReader {
 public:
  /// TensorView::read. Throws as that does.
  void read(const TensorView& tensor, std::size_t offset, std::span<std::byte> to) {
    if (tensor.file == nullptr || to.empty()) {
      tensor.read(offset, to);
      return;
    }
    if (file_ != tensor.file) {
      own_ = tensor.file->reopened();
      file_ = tensor.file;
    }
    own_.read(static_cast<std::size_t>(tensor.bytes.data() - file_->bytes().data()) + offset, to);
  }

 private:
  std::shared_ptr<const MappedFile> file_;
  MappedFile own_;  // of the same file
};

}  // namespace hestia
