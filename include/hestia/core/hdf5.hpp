#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hestia {

/// Element types the HDF5 wrapper stores. kFloat16 is IEEE half stored as 16-bit HDF5 floats (h5py reads
/// numpy.float16).
enum class H5Type { kUInt8, kUInt16, kInt64, kFloat16, kFloat32, kFloat64 };

/// How a dataset that grows row by row is laid out on disk.
struct H5RowStorage {
  std::int64_t chunk_rows = 1;  ///< Rows of one chunk, the unit that is compressed, read and written.
  int deflate_level = 4;        ///< 1 to 9; 0: not compressed.
  bool shuffle = true;          ///< Group the bytes of equal significance before deflating.
};

/// A thin owner of one HDF5 file over the C API. Paths are absolute ("/sequences/id"); missing groups are made on
/// write. Not thread-safe. Errors throw InputError (reading) or RunError (writing) with file, dataset and HDF5's
/// reason.
class H5File {
 public:
  /// Creates `path` (truncating an existing file); what was written can be read back.
  [[nodiscard]] static H5File create(const std::filesystem::path& path);
  /// Opens `path` read-only. Throws InputError when it is missing or not HDF5.
  [[nodiscard]] static H5File open(const std::filesystem::path& path);
  H5File(H5File&&) noexcept;
  H5File& operator=(H5File&&) noexcept;
  H5File(const H5File&) = delete;
  H5File& operator=(const H5File&) = delete;
  ~H5File();

  /// Writes a whole dataset, chunked and deflate-compressed when it has more than 4 KiB. `data` holds product(shape)
  /// elements of the type's C++ counterpart (kFloat16: std::uint16_t bit patterns).
  void write(const std::string& name, H5Type type, const std::vector<std::int64_t>& shape, const void* data);
  /// Writes a 1-D dataset of variable-length UTF-8 strings.
  void write_strings(const std::string& name, const std::vector<std::string>& values);

  /// Creates a dataset [0, row_shape...] that grows along its first axis.
  void create_rows(const std::string& name, H5Type type, const std::vector<std::int64_t>& row_shape,
                   const H5RowStorage& storage);
  /// The same for variable-length UTF-8 strings, one a row, in chunks of `chunk_rows`.
  void create_string_rows(const std::string& name, std::int64_t chunk_rows);
  /// Writes rows [first, first + count), growing the dataset where they reach past its end. `data` as for `write`.
  /// Whole chunks are the fast case: a part of one is read and compressed again.
  void write_rows(const std::string& name, H5Type type, std::int64_t first, std::int64_t count, const void* data);
  void write_string_rows(const std::string& name, std::int64_t first, const std::vector<std::string>& values);

  void write_attribute(const std::string& object, const std::string& name, std::int64_t value);
  void write_attribute(const std::string& object, const std::string& name, const std::string& value);
  void write_attribute(const std::string& object, const std::string& name, const std::vector<std::int64_t>& values);

  [[nodiscard]] bool contains(const std::string& name) const;
  [[nodiscard]] std::vector<std::int64_t> shape(const std::string& name) const;
  /// Rows of one chunk of a dataset; all of them (at least 1) where it is not chunked.
  [[nodiscard]] std::int64_t chunk_rows(const std::string& name) const;
  /// Reads a whole dataset converted to the C++ type asked for (uint16 for kFloat16 gives values, not bits: use float).
  [[nodiscard]] std::vector<double> read_doubles(const std::string& name) const;
  [[nodiscard]] std::vector<float> read_floats(const std::string& name) const;
  [[nodiscard]] std::vector<std::int64_t> read_ints(const std::string& name) const;
  [[nodiscard]] std::vector<std::string> read_strings(const std::string& name) const;
  /// Rows [first, first + count) along the first axis, row-major, converted as above; only the chunks they lie in are
  /// read. Throws std::out_of_range past the end.
  [[nodiscard]] std::vector<std::uint16_t> read_uint16_rows(const std::string& name, std::int64_t first,
                                                            std::int64_t count) const;
  [[nodiscard]] std::vector<std::int64_t> read_int_rows(const std::string& name, std::int64_t first,
                                                        std::int64_t count) const;
  [[nodiscard]] std::vector<float> read_float_rows(const std::string& name, std::int64_t first,
                                                   std::int64_t count) const;
  [[nodiscard]] std::vector<std::string> read_string_rows(const std::string& name, std::int64_t first,
                                                          std::int64_t count) const;
  [[nodiscard]] std::int64_t read_int_attribute(const std::string& object, const std::string& name) const;
  [[nodiscard]] std::string read_string_attribute(const std::string& object, const std::string& name) const;
  [[nodiscard]] std::vector<std::int64_t> read_ints_attribute(const std::string& object, const std::string& name) const;

  /// Flushes and closes; throws RunError when the disk refuses (the destructor swallows errors).
  void close();

 private:
  struct Impl;
  explicit H5File(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace hestia
