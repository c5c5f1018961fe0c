#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "flat_map.hpp"
#include "json_node.hpp"

namespace hestia {

/// Ids of pieces met before: a table of fixed size in which a newer piece takes the place of an older one. Long pieces
/// and long encodings are not kept.
class PieceCache {
 public:
  /// Appends the ids of `piece` and returns true when it is there.
  bool find(std::string_view piece, std::vector<std::int32_t>& ids) const;
  /// Keeps the last `count` of `ids` as the encoding of `piece`.
  void keep(std::string_view piece, const std::vector<std::int32_t>& ids, std::size_t count);

 private:
  static constexpr std::size_t kKeyWords = 4;
  static constexpr std::size_t kMaxIds = 7;
  static constexpr std::size_t kSlots = std::size_t{1} << 15U;
  using Key = std::array<std::uint64_t, kKeyWords>;  // Bytes, zeros, and the size in the last one.
  struct Slot {
    Key key{};  // A size of 0 is no piece.
    std::array<std::int32_t, kMaxIds> ids{};
    std::uint32_t count = 0;
  };
  static bool make_key(std::string_view piece, Key& key);
  static std::size_t slot_of(const Key& key);
  std::vector<Slot> slots_ = std::vector<Slot>(kSlots);
};

/// What one thread needs while it encodes.
struct EncodeScratch {
  struct Symbol {
    std::int32_t id = 0;
    std::int32_t previous = -1;
    std::int32_t next = -1;
  };
  struct Candidate {
    std::uint64_t merge = 0;  // Rank and new id.
    std::int32_t at = 0;      // Its left symbol.
    std::int32_t left = 0;
    std::int32_t right = 0;
  };
  struct Node {
    double score = 0.0;
    std::int64_t begin = -1;
    std::int32_t id = 0;
  };
  PieceCache cache;
  std::vector<std::int32_t> symbols;
  std::vector<std::uint64_t> merges;
  std::vector<Symbol> list;
  std::vector<Candidate> heap;
  std::vector<Node> nodes;
};

/// A vocabulary and the rule that cuts a piece of text into its tokens. Thread-safe.
class SubwordModel {
 public:
  SubwordModel() = default;
  SubwordModel(const SubwordModel&) = delete;
  SubwordModel& operator=(const SubwordModel&) = delete;
  virtual ~SubwordModel() = default;

  /// Appends the ids of `piece` to `ids`: valid UTF-8, or any bytes in a byte-level vocabulary.
  virtual void encode(std::string_view piece, EncodeScratch& scratch, std::vector<std::int32_t>& ids) const = 0;
  /// Id of a token by its spelling; -1 when there is none.
  [[nodiscard]] std::int32_t id_of(std::string_view token) const;
  /// Spellings by id; empty where the vocabulary leaves an id out.
  [[nodiscard]] const std::vector<std::string>& tokens() const { return tokens_; }
  /// The id that stands for what the vocabulary cannot spell; -1 when there is none.
  [[nodiscard]] std::int32_t unknown_id() const { return unknown_id_; }
  [[nodiscard]] bool byte_fallback() const { return byte_fallback_; }

 protected:
  /// Takes spellings by id. Of two alike the later one is found by its spelling.
  void set_tokens(std::vector<std::string> tokens);
  void set_unknown(std::int32_t id) { unknown_id_ = id; }
  /// Whether text without tokens is spelt by its bytes' tokens <0x00> to <0xFF>.
  void set_byte_fallback(bool byte_fallback);
  /// Appends the tokens of the bytes of `text`; false, and nothing appended, when one has no token.
  bool append_bytes(std::string_view text, std::vector<std::int32_t>& ids) const;

 private:
  std::vector<std::string> tokens_;
  std::unordered_map<std::string_view, std::int32_t> ids_;
  std::array<std::int32_t, 256> byte_ids_{};
  std::int32_t unknown_id_ = -1;
  bool byte_fallback_ = false;
};

/// The model of a `tokenizer.json`: type BPE or Unigram. `byte_level`: pieces are bytes, see PreTokenizer. Throws
/// InputError naming another type, an option that Hestia does not read, or what is wrong with the vocabulary.
[[nodiscard]] std::unique_ptr<SubwordModel> make_subword_model(const JsonNode& node, bool byte_level);

}  // namespace hestia
