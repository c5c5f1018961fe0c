#include "hestia/core/hdf5.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>
#include <hdf5.h>

#include "hestia/core/error.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kChunkedFromBytes = 4096;
constexpr hsize_t kMaxChunkElements = 1 << 18;
constexpr unsigned kDeflateLevel = 4;
constexpr std::size_t kLargestExpansion = 1100;
constexpr std::size_t kSmallestLimit = 4096;

// Closes an HDF5 identifier of any kind at the end of the scope.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&&) = delete;
  ~Handle() {
    if (id_ >= 0) {
      close_(id_);
    }
  }
  [[nodiscard]] hid_t get() const { return id_; }
  [[nodiscard]] bool valid() const { return id_ >= 0; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

herr_t take_description(unsigned, const H5E_error2_t* error, void* data) {
  auto* text = static_cast<std::string*>(data);
  if (text->empty() && error->desc != nullptr) {
    *text = error->desc;
  }
  return 0;
}

// The innermost reason on HDF5's error stack, which is then cleared.
std::string reason() {
  std::string text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_description, &text);
  H5Eclear2(H5E_DEFAULT);
  return text.empty() ? "HDF5 gave no reason" : text;
}

// HDF5 prints its error stack to stderr unless told not to; our messages carry the reason.
void silence() {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

Handle half_type() {
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose);
  H5Tset_fields(type.get(), 15, 10, 5, 0, 10);
  H5Tset_size(type.get(), 2);
  H5Tset_ebias(type.get(), 15);
  return type;
}

Handle file_type(H5Type type) {
  switch (type) {
    case H5Type::kUInt8:
      return {H5Tcopy(H5T_STD_U8LE), H5Tclose};
    case H5Type::kUInt16:
      return {H5Tcopy(H5T_STD_U16LE), H5Tclose};
    case H5Type::kInt64:
      return {H5Tcopy(H5T_STD_I64LE), H5Tclose};
    case H5Type::kFloat16:
      return half_type();
    case H5Type::kFloat32:
      return {H5Tcopy(H5T_IEEE_F32LE), H5Tclose};
    case H5Type::kFloat64:
      return {H5Tcopy(H5T_IEEE_F64LE), H5Tclose};
  }
  return {-1, H5Tclose};
}

std::size_t type_size(H5Type type) {
  switch (type) {
    case H5Type::kUInt8:
      return 1;
    case H5Type::kUInt16:
    case H5Type::kFloat16:
      return 2;
    case H5Type::kFloat32:
      return 4;
    case H5Type::kInt64:
    case H5Type::kFloat64:
      return 8;
  }
  return 0;
}

Handle link_creation() {
  Handle list(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(list.get(), 1);
  return list;
}

Handle string_type() {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type.get(), H5T_VARIABLE);
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  return type;
}

}  // namespace

struct H5File::Impl {
  explicit Impl(std::filesystem::path file) : path(std::move(file)) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    if (id >= 0) {
      H5Fclose(id);
    }
  }
  std::filesystem::path path;
  hid_t id = -1;

  [[nodiscard]] RunError write_error(const std::string& object) const {
    return RunError(
        fmt::format("{}: {} cannot be written, {}; check space and permissions", path.string(), object, reason()));
  }
  // H5Lexists wants every parent to exist: walk the path.
  [[nodiscard]] bool exists(const std::string& name) const {
    std::size_t end = name.find('/', 1);
    while (true) {
      const std::string part = name.substr(0, end);
      if (part != "/" && H5Lexists(id, part.c_str(), H5P_DEFAULT) <= 0) {
        H5Eclear2(H5E_DEFAULT);
        return false;
      }
      if (end == std::string::npos) {
        return true;
      }
      end = name.find('/', end + 1);
    }
  }
  [[nodiscard]] InputError read_error(const std::string& object) const {
    return InputError(fmt::format("{}: {} cannot be read, {}; write the file again", path.string(), object, reason()));
  }
  [[nodiscard]] InputError missing(const std::string& object) const {
    return InputError(fmt::format("{}: there is no {}; check that this is the right file", path.string(), object));
  }
  [[nodiscard]] Handle open_dataset(const std::string& name) const {
    if (!exists(name)) {
      throw missing("dataset " + name);
    }
    Handle dataset(H5Dopen2(id, name.c_str(), H5P_DEFAULT), H5Dclose);
    if (!dataset.valid()) {
      throw read_error("dataset " + name);
    }
    return dataset;
  }
  [[nodiscard]] std::vector<std::int64_t> dataset_shape(const std::string& name) const {
    const Handle dataset = open_dataset(name);
    const Handle space(H5Dget_space(dataset.get()), H5Sclose);
    const int rank = H5Sget_simple_extent_ndims(space.get());
    if (rank < 0) {
      throw read_error("dataset " + name);
    }
    std::vector<hsize_t> dimensions(static_cast<std::size_t>(rank));
    H5Sget_simple_extent_dims(space.get(), dimensions.data(), nullptr);
    return {dimensions.begin(), dimensions.end()};
  }
  // Deflate packs a thousand bytes into one at best: a damaged header that claims more must not take all memory.
  void check_claim(const Handle& dataset, const std::string& name, std::size_t count) const {
    const Handle stored(H5Dget_type(dataset.get()), H5Tclose);
    const std::size_t largest = kLargestExpansion * (std::filesystem::file_size(path) + kSmallestLimit);
    if (count > largest / std::max<std::size_t>(1, H5Tget_size(stored.get()))) {
      throw InputError(fmt::format("{}: dataset {} claims more elements than its file can hold, got {}; {}",
                                   path.string(), name, count, "write the file again"));
    }
  }
  template <class Value>
  [[nodiscard]] std::vector<Value> read(const std::string& name, hid_t memory_type) const {
    const Handle dataset = open_dataset(name);
    const Handle space(H5Dget_space(dataset.get()), H5Sclose);
    const hssize_t found = H5Sget_simple_extent_npoints(space.get());
    if (found < 0) {
      throw read_error("dataset " + name);
    }
    const auto count = static_cast<std::size_t>(found);
    check_claim(dataset, name, count);
    std::vector<Value> values(count);
    if (count > 0 && H5Dread(dataset.get(), memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) < 0) {
      throw read_error("dataset " + name);
    }
    return values;
  }
  // The file space of rows [first, first + count) of a dataset, selected, and its memory counterpart.
  struct RowSpaces {
    Handle file;
    Handle memory;
    std::size_t elements;
  };
  [[nodiscard]] RowSpaces rows(const Handle& dataset, const std::string& name, std::int64_t first,
                               std::int64_t count) const {
    Handle file(H5Dget_space(dataset.get()), H5Sclose);
    const int rank = H5Sget_simple_extent_ndims(file.get());
    if (rank < 1) {
      throw read_error("dataset " + name);
    }
    std::vector<hsize_t> extent(static_cast<std::size_t>(rank));
    H5Sget_simple_extent_dims(file.get(), extent.data(), nullptr);
    if (first < 0 || count < 0 || static_cast<hsize_t>(first) + static_cast<hsize_t>(count) > extent[0]) {
      throw std::out_of_range(
          fmt::format("hdf5: rows {} to {} of dataset {}, which has {}", first, first + count, name, extent[0]));
    }
    std::vector<hsize_t> start(extent.size(), 0);
    start[0] = static_cast<hsize_t>(first);
    extent[0] = static_cast<hsize_t>(count);
    std::size_t elements = 1;
    for (const hsize_t dimension : extent) {
      elements *= dimension;
    }
    Handle memory(H5Screate_simple(rank, extent.data(), nullptr), H5Sclose);
    if (elements > 0) {
      H5Sselect_hyperslab(file.get(), H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr);
    }
    return {std::move(file), std::move(memory), elements};
  }
  template <class Value>
  [[nodiscard]] std::vector<Value> read_rows(const std::string& name, hid_t memory_type, std::int64_t first,
                                             std::int64_t count) const {
    const Handle dataset = open_dataset(name);
    const RowSpaces spaces = rows(dataset, name, first, count);
    check_claim(dataset, name, spaces.elements);
    std::vector<Value> values(spaces.elements);
    if (!values.empty() &&
        H5Dread(dataset.get(), memory_type, spaces.memory.get(), spaces.file.get(), H5P_DEFAULT, values.data()) < 0) {
      throw read_error("dataset " + name);
    }
    return values;
  }
  void create_rows(const std::string& name, const Handle& type, const std::vector<std::int64_t>& row_shape,
                   const H5RowStorage& storage) const {
    std::vector<hsize_t> extent = {0};
    extent.insert(extent.end(), row_shape.begin(), row_shape.end());
    std::vector<hsize_t> largest = extent;
    largest[0] = H5S_UNLIMITED;
    std::vector<hsize_t> chunk = extent;
    chunk[0] = static_cast<hsize_t>(storage.chunk_rows);
    const auto rank = static_cast<int>(extent.size());
    const Handle space(H5Screate_simple(rank, extent.data(), largest.data()), H5Sclose);
    const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    H5Pset_chunk(properties.get(), rank, chunk.data());
    if (storage.deflate_level > 0) {
      if (storage.shuffle) {
        H5Pset_shuffle(properties.get());
      }
      H5Pset_deflate(properties.get(), static_cast<unsigned>(storage.deflate_level));
    }
    const Handle links = link_creation();
    const Handle dataset(
        H5Dcreate2(id, name.c_str(), type.get(), space.get(), links.get(), properties.get(), H5P_DEFAULT), H5Dclose);
    if (!dataset.valid()) {
      throw write_error("dataset " + name);
    }
  }
  void write_rows(const std::string& name, const Handle& type, std::int64_t first, std::int64_t count,
                  const void* data) const {
    if (first < 0 || count < 0) {
      throw std::invalid_argument(fmt::format("hdf5: {} rows from {} of dataset {}", count, first, name));
    }
    const Handle dataset = open_dataset(name);
    std::vector<std::int64_t> extent = dataset_shape(name);
    if (extent.empty()) {
      throw write_error("dataset " + name);
    }
    if (first + count > extent[0]) {
      std::vector<hsize_t> grown(extent.begin(), extent.end());
      grown[0] = static_cast<hsize_t>(first) + static_cast<hsize_t>(count);
      if (H5Dset_extent(dataset.get(), grown.data()) < 0) {
        throw write_error("dataset " + name);
      }
    }
    const RowSpaces spaces = rows(dataset, name, first, count);
    if (spaces.elements > 0 &&
        H5Dwrite(dataset.get(), type.get(), spaces.memory.get(), spaces.file.get(), H5P_DEFAULT, data) < 0) {
      throw write_error("dataset " + name);
    }
  }
  // A dataset of texts is read as stored: HDF5 does not convert between character sets.
  [[nodiscard]] Handle text_type(const std::string& name) const {
    Handle stored(H5Dget_type(open_dataset(name).get()), H5Tclose);
    if (H5Tget_class(stored.get()) != H5T_STRING || H5Tis_variable_str(stored.get()) <= 0) {
      throw InputError(fmt::format("{}: dataset {} does not hold variable-length strings; write the file again",
                                   path.string(), name));
    }
    return stored;
  }
  static std::vector<std::string> take_texts(const std::vector<char*>& pointers) {
    std::vector<std::string> values;
    values.reserve(pointers.size());
    for (char* pointer : pointers) {
      values.emplace_back(pointer == nullptr ? "" : pointer);
      H5free_memory(pointer);
    }
    return values;
  }
  [[nodiscard]] std::vector<const char*> c_texts(const std::vector<std::string>& values,
                                                 const std::string& object) const {
    std::vector<const char*> pointers;
    pointers.reserve(values.size());
    for (const std::string& value : values) {
      pointers.push_back(c_text(value, object));
    }
    return pointers;
  }
  // HDF5 strings end at the first zero byte: better no file than a shortened text in it.
  [[nodiscard]] const char* c_text(const std::string& value, const std::string& object) const {
    if (value.find('\0') != std::string::npos) {
      throw RunError(fmt::format("{}: {} cannot be written, a text in it holds a zero byte; remove the byte",
                                 path.string(), object));
    }
    return value.c_str();
  }
  // Opens an object for its attributes, making the group when it is missing.
  [[nodiscard]] Handle open_object(const std::string& object, bool create) const {
    if (object == "/" || exists(object)) {
      return {H5Oopen(id, object.c_str(), H5P_DEFAULT), H5Oclose};
    }
    if (create) {
      const Handle links = link_creation();
      return {H5Gcreate2(id, object.c_str(), links.get(), H5P_DEFAULT, H5P_DEFAULT), H5Gclose};
    }
    throw missing("object " + object);
  }
  void attribute(const std::string& object, const std::string& name, hid_t stored, hid_t memory, hid_t space,
                 const void* data) const {
    const Handle owner = open_object(object, true);
    if (H5Aexists(owner.get(), name.c_str()) > 0) {
      H5Adelete(owner.get(), name.c_str());
    }
    const Handle attribute(H5Acreate2(owner.get(), name.c_str(), stored, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
    if (!attribute.valid() || H5Awrite(attribute.get(), memory, data) < 0) {
      throw write_error(fmt::format("attribute {} of {}", name, object));
    }
  }
  [[nodiscard]] Handle open_attribute(const std::string& object, const std::string& name) const {
    const Handle owner = open_object(object, false);
    if (H5Aexists(owner.get(), name.c_str()) <= 0) {
      throw missing(fmt::format("attribute {} of {}", name, object));
    }
    Handle attribute(H5Aopen(owner.get(), name.c_str(), H5P_DEFAULT), H5Aclose);
    if (!attribute.valid()) {
      throw read_error(fmt::format("attribute {} of {}", name, object));
    }
    return attribute;
  }
};

H5File::H5File(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
H5File::H5File(H5File&&) noexcept = default;
H5File& H5File::operator=(H5File&&) noexcept = default;

H5File::~H5File() = default;

H5File H5File::create(const std::filesystem::path& path) {
  silence();
  auto impl = std::make_unique<Impl>(path);
  impl->id = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  if (impl->id < 0) {
    throw RunError(fmt::format("{}: cannot be created, {}; check the folder and permissions", path.string(), reason()));
  }
  return H5File(std::move(impl));
}

H5File H5File::open(const std::filesystem::path& path) {
  silence();
  if (!std::filesystem::exists(path)) {
    throw InputError(fmt::format("{}: no such file; check the path", path.string()));
  }
  auto impl = std::make_unique<Impl>(path);
  impl->id = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  if (impl->id < 0) {
    throw InputError(fmt::format("{}: not a readable HDF5 file, {}; write the file again", path.string(), reason()));
  }
  return H5File(std::move(impl));
}

void H5File::write(const std::string& name, H5Type type, const std::vector<std::int64_t>& shape, const void* data) {
  if (std::any_of(shape.begin(), shape.end(), [](std::int64_t dimension) { return dimension < 0; })) {
    throw std::invalid_argument(fmt::format("hdf5: dataset {} has a negative dimension", name));
  }
  const std::vector<hsize_t> dimensions(shape.begin(), shape.end());
  const Handle space(H5Screate_simple(static_cast<int>(dimensions.size()), dimensions.data(), nullptr), H5Sclose);
  const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  std::int64_t bytes = static_cast<std::int64_t>(type_size(type));
  for (const std::int64_t dimension : shape) {
    bytes *= dimension;
  }
  if (bytes > kChunkedFromBytes) {
    // Whole trailing dimensions, as many leading entries as fit: a reader of one sequence touches few chunks.
    std::vector<hsize_t> chunk = dimensions;
    hsize_t elements = 1;
    for (const hsize_t dimension : chunk) {
      elements *= dimension;
    }
    for (std::size_t axis = 0; axis < chunk.size() && elements > kMaxChunkElements; ++axis) {
      const hsize_t rest = elements / chunk[axis];
      chunk[axis] = std::max<hsize_t>(1, kMaxChunkElements / rest);
      elements = rest * chunk[axis];
    }
    H5Pset_chunk(properties.get(), static_cast<int>(chunk.size()), chunk.data());
    H5Pset_shuffle(properties.get());
    H5Pset_deflate(properties.get(), kDeflateLevel);
  }
  const Handle stored = file_type(type);
  const Handle links = link_creation();
  const Handle dataset(
      H5Dcreate2(impl_->id, name.c_str(), stored.get(), space.get(), links.get(), properties.get(), H5P_DEFAULT),
      H5Dclose);
  if (!dataset.valid() ||
      (bytes > 0 && H5Dwrite(dataset.get(), stored.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)) {
    throw impl_->write_error("dataset " + name);
  }
}

void H5File::write_strings(const std::string& name, const std::vector<std::string>& values) {
  const std::vector<const char*> pointers = impl_->c_texts(values, "dataset " + name);
  const hsize_t count = values.size();
  const Handle space(H5Screate_simple(1, &count, nullptr), H5Sclose);
  const Handle type = string_type();
  const Handle links = link_creation();
  const Handle dataset(
      H5Dcreate2(impl_->id, name.c_str(), type.get(), space.get(), links.get(), H5P_DEFAULT, H5P_DEFAULT), H5Dclose);
  if (!dataset.valid() ||
      (count > 0 && H5Dwrite(dataset.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, pointers.data()) < 0)) {
    throw impl_->write_error("dataset " + name);
  }
}

void H5File::create_rows(const std::string& name, H5Type type, const std::vector<std::int64_t>& row_shape,
                         const H5RowStorage& storage) {
  impl_->create_rows(name, file_type(type), row_shape, storage);
}

void H5File::create_string_rows(const std::string& name, std::int64_t chunk_rows) {
  // What is stored in the rows is places of a heap, which filters do not see.
  impl_->create_rows(name, string_type(), {}, {chunk_rows, 0, false});
}

void H5File::write_rows(const std::string& name, H5Type type, std::int64_t first, std::int64_t count,
                        const void* data) {
  impl_->write_rows(name, file_type(type), first, count, data);
}

void H5File::write_string_rows(const std::string& name, std::int64_t first, const std::vector<std::string>& values) {
  const std::vector<const char*> pointers = impl_->c_texts(values, "dataset " + name);
  impl_->write_rows(name, string_type(), first, static_cast<std::int64_t>(values.size()), pointers.data());
}

void H5File::write_attribute(const std::string& object, const std::string& name, std::int64_t value) {
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  impl_->attribute(object, name, H5T_STD_I64LE, H5T_NATIVE_INT64, space.get(), &value);
}

void H5File::write_attribute(const std::string& object, const std::string& name, const std::string& value) {
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle type = string_type();
  const char* pointer = impl_->c_text(value, fmt::format("attribute {} of {}", name, object));
  impl_->attribute(object, name, type.get(), type.get(), space.get(), &pointer);
}

void H5File::write_attribute(const std::string& object, const std::string& name,
                             const std::vector<std::int64_t>& values) {
  const hsize_t count = values.size();
  const Handle space(H5Screate_simple(1, &count, nullptr), H5Sclose);
  const std::int64_t none = 0;  // HDF5 refuses a null pointer even where there is nothing to read
  impl_->attribute(object, name, H5T_STD_I64LE, H5T_NATIVE_INT64, space.get(), values.empty() ? &none : values.data());
}

bool H5File::contains(const std::string& name) const {
  return impl_->exists(name);
}

std::vector<std::int64_t> H5File::shape(const std::string& name) const {
  return impl_->dataset_shape(name);
}

std::int64_t H5File::chunk_rows(const std::string& name) const {
  const Handle dataset = impl_->open_dataset(name);
  const Handle properties(H5Dget_create_plist(dataset.get()), H5Pclose);
  std::vector<hsize_t> chunk(H5S_MAX_RANK);
  if (H5Pget_layout(properties.get()) == H5D_CHUNKED &&
      H5Pget_chunk(properties.get(), static_cast<int>(chunk.size()), chunk.data()) > 0) {
    return static_cast<std::int64_t>(chunk[0]);
  }
  const std::vector<std::int64_t> extent = impl_->dataset_shape(name);
  return extent.empty() ? 1 : std::max<std::int64_t>(1, extent[0]);
}

std::vector<double> H5File::read_doubles(const std::string& name) const {
  return impl_->read<double>(name, H5T_NATIVE_DOUBLE);
}

std::vector<float> H5File::read_floats(const std::string& name) const {
  return impl_->read<float>(name, H5T_NATIVE_FLOAT);
}

std::vector<std::int64_t> H5File::read_ints(const std::string& name) const {
  return impl_->read<std::int64_t>(name, H5T_NATIVE_INT64);
}

std::vector<std::string> H5File::read_strings(const std::string& name) const {
  return Impl::take_texts(impl_->read<char*>(name, impl_->text_type(name).get()));
}

std::vector<std::uint16_t> H5File::read_uint16_rows(const std::string& name, std::int64_t first,
                                                    std::int64_t count) const {
  return impl_->read_rows<std::uint16_t>(name, H5T_NATIVE_UINT16, first, count);
}

std::vector<std::int64_t> H5File::read_int_rows(const std::string& name, std::int64_t first, std::int64_t count) const {
  return impl_->read_rows<std::int64_t>(name, H5T_NATIVE_INT64, first, count);
}

std::vector<float> H5File::read_float_rows(const std::string& name, std::int64_t first, std::int64_t count) const {
  return impl_->read_rows<float>(name, H5T_NATIVE_FLOAT, first, count);
}

std::vector<std::string> H5File::read_string_rows(const std::string& name, std::int64_t first,
                                                  std::int64_t count) const {
  return Impl::take_texts(impl_->read_rows<char*>(name, impl_->text_type(name).get(), first, count));
}

std::int64_t H5File::read_int_attribute(const std::string& object, const std::string& name) const {
  const Handle attribute = impl_->open_attribute(object, name);
  const Handle space(H5Aget_space(attribute.get()), H5Sclose);
  std::int64_t value = 0;
  if (H5Sget_simple_extent_npoints(space.get()) != 1 || H5Aread(attribute.get(), H5T_NATIVE_INT64, &value) < 0) {
    throw impl_->read_error(fmt::format("attribute {} of {}", name, object));
  }
  return value;
}

std::string H5File::read_string_attribute(const std::string& object, const std::string& name) const {
  const Handle attribute = impl_->open_attribute(object, name);
  const Handle stored(H5Aget_type(attribute.get()), H5Tclose);
  const Handle space(H5Aget_space(attribute.get()), H5Sclose);
  char* pointer = nullptr;
  if (H5Tget_class(stored.get()) != H5T_STRING || H5Tis_variable_str(stored.get()) <= 0 ||
      H5Sget_simple_extent_npoints(space.get()) != 1 || H5Aread(attribute.get(), stored.get(), &pointer) < 0) {
    throw impl_->read_error(fmt::format("attribute {} of {}", name, object));
  }
  std::string value = pointer == nullptr ? "" : pointer;
  H5free_memory(pointer);
  return value;
}

std::vector<std::int64_t> H5File::read_ints_attribute(const std::string& object, const std::string& name) const {
  const Handle attribute = impl_->open_attribute(object, name);
  const Handle space(H5Aget_space(attribute.get()), H5Sclose);
  const hssize_t count = H5Sget_simple_extent_npoints(space.get());
  std::vector<std::int64_t> values(count > 0 ? static_cast<std::size_t>(count) : 0);
  if (count > 0 && H5Aread(attribute.get(), H5T_NATIVE_INT64, values.data()) < 0) {
    throw impl_->read_error(fmt::format("attribute {} of {}", name, object));
  }
  return values;
}

void H5File::close() {
  if (impl_->id >= 0) {
    const hid_t id = std::exchange(impl_->id, -1);
    const bool flushed = H5Fflush(id, H5F_SCOPE_LOCAL) >= 0;
    if (H5Fclose(id) < 0 || !flushed) {
      throw impl_->write_error("the file");
    }
  }
}

}  // namespace hestia
