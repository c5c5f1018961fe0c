#include "hestia/core/safetensors.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <future>
#include <limits>
#include <set>
#include <stdexcept>
#include <system_error>
#include <tuple>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"

namespace hestia {

namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kAlignment = 8;
constexpr std::string_view kMetadataKey = "__metadata__";
constexpr auto kLargestDimension = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  std::size_t size;
};

constexpr DTypeInfo kDTypes[] = {
    {DType::kBool, "BOOL", 1}, {DType::kU8, "U8", 1},          {DType::kI8, "I8", 1},         {DType::kI16, "I16", 2},
    {DType::kU16, "U16", 2},   {DType::kF16, "F16", 2},        {DType::kBF16, "BF16", 2},     {DType::kI32, "I32", 4},
    {DType::kU32, "U32", 4},   {DType::kF32, "F32", 4},        {DType::kF64, "F64", 8},       {DType::kI64, "I64", 8},
    {DType::kU64, "U64", 8},   {DType::kF8E4M3, "F8_E4M3", 1}, {DType::kF8E5M2, "F8_E5M2", 1}};

const DTypeInfo& info(DType dtype) {
  for (const DTypeInfo& entry : kDTypes) {
    if (entry.dtype == dtype) {
      return entry;
    }
  }
  throw std::invalid_argument("safetensors: unknown dtype");
}

// Sorted objects: insertion into Hestia's ordered Json is linear, and headers hold tens of thousands of names.
using SortedJson = nlohmann::json;

// Finds the first key that an object holds twice. A pass of its own: nlohmann's parser with a callback walks all
// members of the parent again after each one, which takes minutes on a header of 50,000 names.
class RepeatedKeys final : public nlohmann::json_sax<SortedJson> {
 public:
  static constexpr std::size_t kDeepest = 64;  // a header has 3 levels; printing a value takes stack for each

  [[nodiscard]] const std::string& first() const { return first_; }
  [[nodiscard]] bool too_deep() const { return depth_ > kDeepest; }

  bool null() override { return true; }
  bool boolean(bool /*value*/) override { return true; }
  bool number_integer(number_integer_t /*value*/) override { return true; }
  bool number_unsigned(number_unsigned_t /*value*/) override { return true; }
  bool number_float(number_float_t /*value*/, const string_t& /*text*/) override { return true; }
  bool string(string_t& /*value*/) override { return true; }
  bool binary(binary_t& /*value*/) override { return true; }
  bool start_array(std::size_t /*size*/) override { return ++depth_ <= kDeepest; }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool start_object(std::size_t /*size*/) override {
    keys_.emplace_back();
    return ++depth_ <= kDeepest;
  }
  bool end_object() override {
    std::vector<std::string>& keys = keys_.back();
    std::ranges::sort(keys);
    if (const auto twice = std::ranges::adjacent_find(keys); twice != keys.end() && first_.empty()) {
      first_ = *twice;
    }
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool key(string_t& key) override {
    keys_.back().push_back(key);
    return true;
  }
  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    return false;
  }

 private:
  std::vector<std::vector<std::string>> keys_;  // of each object that is open
  std::string first_;
  std::size_t depth_ = 0;
};

// Parses JSON and refuses repeated keys, of which nlohmann keeps the last without a word. `fail` makes the error.
template <class Fail>
SortedJson parse_without_duplicates(std::string_view text, const Fail& fail) {
  // nlohmann takes a zero byte for the end of the text.
  if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) {
    throw fail(fmt::format("is not valid JSON at byte {}", zero));
  }
  // Both passes at once: each takes milliseconds for thousands of tensors.
  std::future<RepeatedKeys> repeated = std::async(std::launch::async, [text] {
    RepeatedKeys keys;
    SortedJson::sax_parse(text, &keys);
    return keys;
  });
  SortedJson json;
  try {
    json = SortedJson::parse(text);
  } catch (const SortedJson::parse_error& error) {
    throw fail(fmt::format("is not valid JSON at byte {}", error.byte));
  } catch (const SortedJson::exception&) {
    throw fail("is not valid JSON");
  }
  if (!json.is_object()) {
    throw fail(fmt::format("must be a JSON object, got {}", json.type_name()));
  }
  const RepeatedKeys keys = repeated.get();
  if (keys.too_deep()) {
    throw fail(fmt::format("is nested deeper than {} levels", RepeatedKeys::kDeepest));
  }
  if (!keys.first().empty()) {
    throw fail(fmt::format("holds the name \"{}\" twice", keys.first()));
  }
  return json;
}

// A JSON value for a message: hostile ones are long.
std::string shown(const SortedJson& value) {
  constexpr std::size_t kLongest = 80;
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > kLongest) {
    text.resize(kLongest);
    text += "...";
  }
  return text;
}

bool is_index(const SortedJson& value) {
  return value.is_number_unsigned() || (value.is_number_integer() && value.get<std::int64_t>() >= 0);
}

// Product of shape and element size; nullopt when negative entries or an overflow make it meaningless.
std::optional<std::uint64_t> byte_size(const std::vector<std::int64_t>& shape, DType dtype) {
  std::uint64_t total = dtype_size(dtype);
  bool empty = false;
  for (const std::int64_t dimension : shape) {
    if (dimension < 0) {
      return std::nullopt;
    }
    if (dimension == 0) {
      empty = true;
      continue;
    }
    if (total > std::numeric_limits<std::uint64_t>::max() / static_cast<std::uint64_t>(dimension)) {
      return std::nullopt;
    }
    total *= static_cast<std::uint64_t>(dimension);
  }
  return empty ? 0 : total;
}

}  // namespace

std::size_t dtype_size(DType dtype) {
  return info(dtype).size;
}

std::string_view dtype_name(DType dtype) {
  return info(dtype).name;
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DTypeInfo& entry : kDTypes) {
    if (entry.name == name) {
      return entry.dtype;
    }
  }
  return std::nullopt;
}

std::int64_t TensorView::num_elements() const {
  return static_cast<std::int64_t>(bytes.size() / dtype_size(dtype));
}

void TensorView::read(std::size_t offset, std::span<std::byte> to) const {
  if (file != nullptr) {
    file->read(static_cast<std::size_t>(bytes.data() - file->bytes().data()) + offset, to);
  } else if (!to.empty()) {
    std::memcpy(to.data(), bytes.data() + offset, to.size());
  }
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(std::make_shared<MappedFile>(path)) {
  const std::span<const std::byte> bytes = file_->bytes();
  const auto fail = [&](const std::string& what) {
    return InputError(fmt::format("{}: {}; fetch or write the file again", path.string(), what));
  };
  if (bytes.size() < kLengthBytes) {
    throw fail(fmt::format("not a safetensors file, it must hold at least 8 bytes, got {}", bytes.size()));
  }
  std::uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), kLengthBytes);
  if (header_size > kMaxHeaderBytes) {
    throw fail(fmt::format("the header may take {} bytes at most, got {} (not a safetensors file?)", kMaxHeaderBytes,
                           header_size));
  }
  if (header_size > bytes.size() - kLengthBytes) {
    throw fail(fmt::format("the file is truncated: its header takes {} bytes, got {}", header_size,
                           bytes.size() - kLengthBytes));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, header_size);
  const SortedJson header =
      parse_without_duplicates(text, [&](const std::string& what) { return fail("the header " + what); });
  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + header_size);
  struct Range {
    std::uint64_t begin;
    std::uint64_t end;
    const std::string* name;
  };
  std::vector<Range> ranges;
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadataKey) {
      if (!entry.is_object()) {
        throw fail(fmt::format("{} must be an object of strings, got {}", kMetadataKey, entry.type_name()));
      }
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) {
          throw fail(fmt::format("{} \"{}\" must be a string, got {}", kMetadataKey, key, value.type_name()));
        }
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    const std::string subject = fmt::format("tensor \"{}\"", name);
    if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets")) {
      throw fail(fmt::format("{} must have dtype, shape and data_offsets, got {}", subject, shown(entry)));
    }
    const SortedJson& spelling = entry.at("dtype");
    const std::optional<DType> dtype =
        spelling.is_string() ? dtype_from_name(spelling.get_ref<const std::string&>()) : std::nullopt;
    if (!dtype) {
      throw fail(fmt::format("{} has an unknown dtype, got {}", subject, shown(spelling)));
    }
    TensorView view;
    view.name = name;
    view.dtype = *dtype;
    const SortedJson& shape = entry.at("shape");
    if (!shape.is_array()) {
      throw fail(fmt::format("{} must have a list as shape, got {}", subject, shown(shape)));
    }
    for (const SortedJson& dimension : shape) {
      if (!is_index(dimension) || dimension.get<std::uint64_t>() > kLargestDimension) {
        throw fail(fmt::format("{} has a dimension that is not a size, got {}", subject, shown(dimension)));
      }
      view.shape.push_back(dimension.get<std::int64_t>());
    }
    const SortedJson& offsets = entry.at("data_offsets");
    if (!offsets.is_array() || offsets.size() != 2 || !is_index(offsets[0]) || !is_index(offsets[1])) {
      throw fail(fmt::format("{} must have two data_offsets, got {}", subject, shown(offsets)));
    }
    const auto begin = offsets[0].get<std::uint64_t>();
    const auto end = offsets[1].get<std::uint64_t>();
    if (begin > end) {
      throw fail(fmt::format("{} has reversed data_offsets, got [{}, {}]", subject, begin, end));
    }
    if (end > data.size()) {
      throw fail(fmt::format("{} ends at byte {}, but the file holds {} bytes of data (truncated?)", subject, end,
                             data.size()));
    }
    const std::optional<std::uint64_t> expected = byte_size(view.shape, view.dtype);
    if (!expected) {
      throw fail(fmt::format("{} has a shape whose size overflows, got {}", subject, shown(shape)));
    }
    if (*expected != end - begin) {
      throw fail(fmt::format("{} of dtype {} and shape {} takes {} bytes, got {}", subject, dtype_name(view.dtype),
                             shown(shape), *expected, end - begin));
    }
    view.bytes = data.subspan(begin, end - begin);
    view.file = file_;
    const auto inserted = tensors_.emplace(name, std::move(view)).first;
    ranges.push_back({begin, end, &inserted->first});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::tie(a.begin, a.end, *a.name) < std::tie(b.begin, b.end, *b.name);
  });
  std::uint64_t covered = 0;
  std::string_view previous;
  for (const Range& range : ranges) {
    if (range.begin < covered) {
      throw fail(
          fmt::format("tensors \"{}\" and \"{}\" overlap at byte {} of the data", previous, *range.name, range.begin));
    }
    if (range.begin > covered) {
      throw fail(fmt::format("bytes {} to {} of the data, before tensor \"{}\", belong to no tensor", covered,
                             range.begin, *range.name));
    }
    covered = range.end;
    previous = *range.name;
    names_.push_back(*range.name);
  }
  if (covered != data.size()) {
    throw fail(fmt::format("the tensors take {} bytes, but the file holds {} bytes of data", covered, data.size()));
  }
}

bool SafetensorsFile::contains(std::string_view name) const {
  return tensors_.find(name) != tensors_.end();
}

const TensorView& SafetensorsFile::tensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    const std::string near = nearest_name(name, names_);
    throw InputError(fmt::format(
        "{}: there is no tensor \"{}\"{}", path().string(), name,
        near.empty() ? "; check that this is the right file" : fmt::format("; did you mean \"{}\"?", near)));
  }
  return found->second;
}

namespace {

// In the order given. Some at a time: checking a header of thousands of tensors takes milliseconds. Of several that
// fail, the first says why.
std::vector<SafetensorsFile> opened(const std::vector<std::filesystem::path>& paths) {
  constexpr std::size_t kAtOnce = 8;
  std::vector<SafetensorsFile> files;
  files.reserve(paths.size());
  for (std::size_t begin = 0; begin < paths.size(); begin += kAtOnce) {
    std::vector<std::future<SafetensorsFile>> some;
    for (std::size_t i = begin; i < std::min(begin + kAtOnce, paths.size()); ++i) {
      some.push_back(std::async(std::launch::async, [&path = paths[i]] { return SafetensorsFile(path); }));
    }
    for (std::future<SafetensorsFile>& file : some) {
      files.push_back(file.get());
    }
  }
  return files;
}

}  // namespace

SafetensorsCheckpoint::SafetensorsCheckpoint(const std::filesystem::path& directory) : directory_(directory) {
  const std::filesystem::path single = directory / "model.safetensors";
  const std::filesystem::path index_path = directory / "model.safetensors.index.json";
  // The whole file goes first where both are present, as in Hugging Face's own loader.
  if (std::filesystem::exists(single)) {
    files_.emplace_back(single);
    for (const std::string& name : files_.front().names()) {
      file_of_[name] = 0;
    }
    return;
  }
  if (!std::filesystem::exists(index_path)) {
    throw InputError(fmt::format(
        "{}: holds neither model.safetensors nor model.safetensors.index.json; give the directory of a checkpoint",
        directory.string()));
  }
  const SortedJson index = parse_without_duplicates(read_text_file(index_path), [&](const std::string& what) {
    return InputError(fmt::format("{}: the index {}; fetch the file again", index_path.string(), what));
  });
  const auto found = index.find("weight_map");
  if (found == index.end() || !found->is_object() || found->empty()) {
    throw InputError(fmt::format("{}: weight_map must be an object that names tensors and their files, got {}; {}",
                                 index_path.string(), found == index.end() ? "none" : shown(*found),
                                 "fetch the file again"));
  }
  const SortedJson& weight_map = *found;
  Problems problems;
  std::map<std::string, std::size_t> file_numbers;
  for (const auto& [name, shard] : weight_map.items()) {
    if (!shard.is_string() || std::filesystem::path(shard.get<std::string>()).has_parent_path()) {
      problems.add(fmt::format("{}: \"{}\" must name a file of the same folder, got {}; fetch the file again",
                               index_path.string(), name, shown(shard)));
      continue;
    }
    file_numbers.emplace(shard.get<std::string>(), 0);
  }
  std::vector<std::filesystem::path> paths;
  for (auto& [shard, number] : file_numbers) {
    if (!std::filesystem::exists(directory / shard)) {
      problems.add(fmt::format("{}: the shard {} is missing; fetch it again", directory.string(), shard));
      continue;
    }
    number = paths.size();
    paths.push_back(directory / shard);
  }
  problems.throw_input_if_any();
  files_ = opened(paths);
  for (std::size_t number = 0; number < files_.size(); ++number) {
    for (const std::string& name : files_[number].names()) {
      const auto [entry, inserted] = file_of_.emplace(name, number);
      if (!inserted) {
        problems.add(fmt::format("{}: \"{}\" is in two shards, {} and {}; fetch the shards again", directory.string(),
                                 name, files_[entry->second].path().filename().string(),
                                 files_[number].path().filename().string()));
      }
    }
  }
  for (const auto& [name, shard] : weight_map.items()) {
    if (!files_[file_numbers.at(shard.get<std::string>())].contains(name)) {
      problems.add(fmt::format("{}: \"{}\" should be in {}, which does not hold it; fetch the shard again",
                               index_path.string(), name, shard.get<std::string>()));
    }
  }
  problems.throw_input_if_any();
}

std::vector<std::string> SafetensorsCheckpoint::names() const {
  std::vector<std::string> all;
  for (const SafetensorsFile& file : files_) {
    all.insert(all.end(), file.names().begin(), file.names().end());
  }
  return all;
}

bool SafetensorsCheckpoint::contains(std::string_view name) const {
  return file_of_.find(name) != file_of_.end();
}

const TensorView& SafetensorsCheckpoint::tensor(std::string_view name) const {
  const auto found = file_of_.find(name);
  if (found == file_of_.end()) {
    const std::string near = nearest_name(name, names());
    throw InputError(fmt::format(
        "{}: there is no tensor \"{}\"{}", directory_.string(), name,
        near.empty() ? "; check that this is the right checkpoint" : fmt::format("; did you mean \"{}\"?", near)));
  }
  return files_[found->second].tensor(name);
}

void SafetensorsWriter::add(std::string name, DType dtype, std::vector<std::int64_t> shape,
                            std::span<const std::byte> bytes) {
  const std::optional<std::uint64_t> expected = byte_size(shape, dtype);
  if (!expected || *expected != bytes.size()) {
    throw std::invalid_argument(
        fmt::format("safetensors: tensor \"{}\" has {} bytes, which its shape does not take", name, bytes.size()));
  }
  if (name == kMetadataKey) {
    throw std::invalid_argument(fmt::format("safetensors: no tensor can be called \"{}\"", name));
  }
  if (!names_.insert(name).second) {
    throw std::invalid_argument(fmt::format("safetensors: tensor \"{}\" is added twice", name));
  }
  data_bytes_ += bytes.size();
  tensors_.push_back({std::move(name), dtype, std::move(shape), bytes, {}});
}

void SafetensorsWriter::set_metadata(std::string key, std::string value) {
  metadata_[std::move(key)] = std::move(value);
}

void SafetensorsWriter::write(const std::filesystem::path& path) const {
  Json::object_t entries;  // names are distinct, so that none need be looked for among those before it
  if (!metadata_.empty()) {
    entries.emplace_back(kMetadataKey, metadata_);
  }
  // Wider types first, as other writers do: with the header padded to 8 bytes every tensor is then aligned to its
  // element size.
  std::vector<const TensorView*> order;
  for (const TensorView& tensor : tensors_) {
    order.push_back(&tensor);
  }
  std::stable_sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) {
    return dtype_size(a->dtype) > dtype_size(b->dtype);
  });
  std::uint64_t offset = 0;
  for (const TensorView* tensor : order) {
    entries.emplace_back(tensor->name, Json{{"dtype", std::string(dtype_name(tensor->dtype))},
                                            {"shape", tensor->shape},
                                            {"data_offsets", {offset, offset + tensor->bytes.size()}}});
    offset += tensor->bytes.size();
  }
  std::string text = Json(std::move(entries)).dump();
  text.append((kAlignment - text.size() % kAlignment) % kAlignment, ' ');
  write_file_atomically(path, [&](const std::filesystem::path& temporary) {
    std::ofstream stream(temporary, std::ios::binary);
    const std::uint64_t header_size = text.size();
    stream.write(reinterpret_cast<const char*>(&header_size), kLengthBytes);
    stream.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const TensorView* tensor : order) {
      stream.write(reinterpret_cast<const char*>(tensor->bytes.data()),
                   static_cast<std::streamsize>(tensor->bytes.size()));
    }
    stream.close();
    if (!stream) {
      throw RunError(fmt::format("{}: cannot be written, {}; check folder, space and permissions", path.string(),
                                 std::system_category().message(errno)));
    }
  });
}

void write_sharded(const std::filesystem::path& directory, const std::vector<TensorView>& tensors,
                   std::size_t max_shard_bytes, const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter> shards(1);
  std::vector<std::size_t> shard_of;
  std::size_t total = 0;
  std::set<std::string> names;
  for (const TensorView& tensor : tensors) {
    if (!names.insert(tensor.name).second) {
      throw std::invalid_argument(fmt::format("safetensors: tensor \"{}\" is given twice", tensor.name));
    }
    if (!shards.back().empty() && shards.back().data_bytes() + tensor.bytes.size() > max_shard_bytes) {
      shards.emplace_back();
    }
    shards.back().add(tensor.name, tensor.dtype, tensor.shape, tensor.bytes);
    shard_of.push_back(shards.size() - 1);
    total += tensor.bytes.size();
  }
  const bool single = shards.size() == 1;
  const auto shard_name = [&](std::size_t number) {
    return single ? std::string("model.safetensors")
                  : fmt::format("model-{:05d}-of-{:05d}.safetensors", number + 1, shards.size());
  };
  for (std::size_t number = 0; number < shards.size(); ++number) {
    for (const auto& [key, value] : metadata) {
      shards[number].set_metadata(key, value);
    }
    shards[number].write(directory / shard_name(number));
  }
  // What an earlier checkpoint of the other kind left would be read in place of this one, or make people wonder.
  const std::filesystem::path index_path = directory / "model.safetensors.index.json";
  if (single) {
    std::filesystem::remove(index_path);
    return;
  }
  Json::object_t weight_map;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    weight_map.emplace_back(tensors[i].name, shard_name(shard_of[i]));
  }
  const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
  write_text_atomically(index_path, index.dump(2) + "\n");
  std::filesystem::remove(directory / "model.safetensors");
}

}  // namespace hestia
