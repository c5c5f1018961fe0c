#include "subword_models.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "token_decoders.hpp"
#include "unicode.hpp"

namespace hestia {

namespace {

constexpr std::string_view kSpaceSign = "\xE2\x96\x81";  // U+2581

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(left) << 32U | static_cast<std::uint32_t>(right);
}
std::int32_t merged_id(std::uint64_t merge) {
  return static_cast<std::int32_t>(merge & UINT32_MAX);
}

// Sennrich et al. 2016: symbols are joined pair by pair, the pair with the lowest rank first and the leftmost of those.
class BytePairModel final : public SubwordModel {
 public:
  BytePairModel(const JsonNode& node, bool byte_level) : byte_level_(byte_level) {
    refuse_options(node);
    read_vocabulary(node);
    read_merges(node);
    ignore_merges_ = node.flag("ignore_merges", false);
    fuse_unknown_ = node.flag("fuse_unk", false);
    set_byte_fallback(node.flag("byte_fallback", false));
    if (node.has("unk_token")) {
      const std::string name = node.text("unk_token");
      set_unknown(id_of(name));
      if (unknown_id() < 0) {
        node.fail(fmt::format("unk_token \"{}\" is not in the vocabulary; fetch the file again", name));
      }
    }
    if (byte_level_) {
      index_bytes();
    } else {
      index_code_points();
      cuts_before_space_ = !ignore_merges_ && can_cut_before_space();
    }
  }

  void encode(std::string_view piece, EncodeScratch& scratch, std::vector<std::int32_t>& ids) const override {
    if (!cuts_before_space_) {
      encode_part(piece, scratch, ids);
      return;
    }
    std::size_t begin = 0;
    for (std::size_t at = piece.find(kSpaceSign); at != std::string_view::npos;) {
      if (at > begin) {
        encode_part(piece.substr(begin, at - begin), scratch, ids);
        begin = at;
      }
      do {
        at += kSpaceSign.size();
      } while (piece.substr(at).starts_with(kSpaceSign));
      at = piece.find(kSpaceSign, at);
    }
    if (begin < piece.size()) {
      encode_part(piece.substr(begin), scratch, ids);
    }
  }

 private:
  static void refuse_options(const JsonNode& node) {
    for (const char* option : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (node.has(option) && !node.text(option).empty()) {
        node.fail(fmt::format("{} \"{}\", which Hestia does not read", option, node.text(option)));
      }
    }
    if (node.has("dropout") && node.at("dropout").value() != 0.0) {
      node.fail(fmt::format("dropout {}, which Hestia does not read: encodings must not change from call to call",
                            node.at("dropout").value().dump()));
    }
  }

  void read_vocabulary(const JsonNode& node) {
    const JsonNode vocabulary = node.at("vocab");
    if (!vocabulary.value().is_object()) {
      vocabulary.fail(fmt::format("must be an object of tokens and ids, got {}; fetch the file again",
                                  vocabulary.value().type_name()));
    }
    std::vector<std::string> tokens;
    // Ids may leave gaps, but no more of them than there are tokens.
    const std::size_t limit = 2 * vocabulary.value().size() + 1024;
    for (const auto& [token, id] : vocabulary.value().items()) {
      if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= limit) {
        vocabulary.fail(fmt::format("the id of \"{}\" must be an integer below {}, got {}; fetch the file again", token,
                                    limit, id.dump()));
      }
      const auto at = id.get<std::size_t>();
      if (at >= tokens.size()) {
        tokens.resize(at + 1);
      }
      if (!tokens[at].empty()) {
        vocabulary.fail(
            fmt::format("\"{}\" and \"{}\" have the same id {}; fetch the file again", tokens[at], token, at));
      }
      tokens[at] = token;
    }
    set_tokens(std::move(tokens));
  }

  void read_merges(const JsonNode& node) {
    const JsonNode list = node.at("merges");
    if (!list.value().is_array()) {
      list.fail(fmt::format("must be a list, got {}; fetch the file again", list.value().type_name()));
    }
    merges_ = FlatMap(list.value().size());
    std::uint64_t rank = 0;
    for (const nlohmann::json& merge : list.value()) {
      std::string left;
      std::string right;
      if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      } else if (merge.is_string()) {
        const auto both = merge.get<std::string>();
        const std::size_t space = both.find(' ');
        left = both.substr(0, space);
        right = space == std::string::npos ? "" : both.substr(space + 1);
      }
      const std::int32_t left_id = id_of(left);
      const std::int32_t right_id = id_of(right);
      const std::int32_t new_id = id_of(left + right);
      if (left.empty() || right.empty() || left_id < 0 || right_id < 0 || new_id < 0) {
        list.fail(fmt::format("merge {} must be two tokens whose concatenation is one, got {}; fetch the file again",
                              rank, merge.dump()));
      }
      merges_.set(pair_key(left_id, right_id), rank << 32U | static_cast<std::uint32_t>(new_id));
      ++rank;
    }
  }

  void index_bytes() {
    byte_symbols_.fill(-1);
    for (std::size_t id = 0; id < tokens().size(); ++id) {
      const std::string& token = tokens()[id];
      if (token.empty() || !is_byte_level(token)) {
        continue;
      }
      const std::string bytes = bytes_of_byte_level(token);
      if (bytes.size() == 1) {
        byte_symbols_.at(static_cast<unsigned char>(bytes[0])) = static_cast<std::int32_t>(id);
      }
      if (ignore_merges_) {
        whole_pieces_[bytes] = static_cast<std::int32_t>(id);
      }
    }
  }

  void index_code_points() {
    for (std::size_t id = 0; id < tokens().size(); ++id) {
      const std::string& token = tokens()[id];
      if (!token.empty() && code_point_at(token, 0).size == token.size()) {
        code_point_symbols_.set(code_point_at(token, 0).value, id);
      }
      if (!token.empty() && ignore_merges_) {
        whole_pieces_[token] = static_cast<std::int32_t>(id);
      }
    }
  }

  // When no token holds a space sign after another character, no merge crosses the place before one, and what lies on
  // its two sides can be encoded apart.
  [[nodiscard]] bool can_cut_before_space() const {
    if (id_of(kSpaceSign) < 0) {
      return false;  // It would be unknown, and unknown characters fuse.
    }
    return std::none_of(tokens().begin(), tokens().end(), [](const std::string& token) {
      for (std::size_t at = token.find(kSpaceSign); at != std::string::npos; at = token.find(kSpaceSign, at + 1)) {
        if (at > 0 && !std::string_view(token).substr(0, at).ends_with(kSpaceSign)) {
          return true;
        }
      }
      return false;
    });
  }

  void encode_part(std::string_view piece, EncodeScratch& scratch, std::vector<std::int32_t>& ids) const {
    if (scratch.cache.find(piece, ids)) {
      return;
    }
    const std::size_t before = ids.size();
    if (ignore_merges_) {
      const auto whole = whole_pieces_.find(std::string(piece));
      if (whole != whole_pieces_.end()) {
        ids.push_back(whole->second);
        scratch.cache.keep(piece, ids, 1);
        return;
      }
    }
    fill_symbols(piece, scratch.symbols);
    if (scratch.symbols.size() <= kShort) {
      merge_short(scratch);
    } else {
      merge_long(scratch);
    }
    ids.insert(ids.end(), scratch.symbols.begin(), scratch.symbols.end());
    scratch.cache.keep(piece, ids, ids.size() - before);
  }

  // Characters, or what stands for those that the vocabulary lacks. The order of an unknown token and a byte token that
  // follows it is that of the tokenizers library.
  void fill_symbols(std::string_view piece, std::vector<std::int32_t>& symbols) const {
    symbols.clear();
    bool pending = false;  // An unknown token that has not been written yet.
    for (std::size_t at = 0; at < piece.size();) {
      const CodePoint current =
          byte_level_ ? CodePoint{static_cast<unsigned char>(piece[at]), 1} : code_point_at(piece, at);
      const std::int32_t id =
          byte_level_ ? byte_symbols_.at(current.value)
                      : static_cast<std::int32_t>(code_point_symbols_.find(current.value));  // kNone becomes -1.
      const std::string_view text = piece.substr(at, current.size);
      at += current.size;
      if (id >= 0) {
        if (pending) {
          symbols.push_back(unknown_id());
          pending = false;
        }
        symbols.push_back(id);
        continue;
      }
      if (byte_fallback() && append_bytes(text, symbols)) {
        continue;
      }
      if (unknown_id() >= 0) {
        if (pending && !fuse_unknown_) {
          symbols.push_back(unknown_id());
        }
        pending = true;
      }
    }
    if (pending) {
      symbols.push_back(unknown_id());
    }
  }

  void merge_short(EncodeScratch& scratch) const {
    std::vector<std::int32_t>& symbols = scratch.symbols;
    std::vector<std::uint64_t>& merges = scratch.merges;  // Of each symbol with its right neighbour.
    merges.clear();
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      merges.push_back(merges_.find(pair_key(symbols[i], symbols[i + 1])));
    }
    while (!merges.empty()) {
      const auto best = std::min_element(merges.begin(), merges.end());
      if (*best == FlatMap::kNone) {
        return;
      }
      const auto at = static_cast<std::size_t>(best - merges.begin());
      symbols[at] = merged_id(*best);
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
      merges.erase(best);
      if (at > 0) {
        merges[at - 1] = merges_.find(pair_key(symbols[at - 1], symbols[at]));
      }
      if (at < merges.size()) {
        merges[at] = merges_.find(pair_key(symbols[at], symbols[at + 1]));
      }
    }
  }

  void push_candidate(EncodeScratch& scratch, std::int32_t at) const {
    const EncodeScratch::Symbol& symbol = scratch.list[static_cast<std::size_t>(at)];
    if (symbol.next < 0) {
      return;
    }
    const std::int32_t right = scratch.list[static_cast<std::size_t>(symbol.next)].id;
    const std::uint64_t merge = merges_.find(pair_key(symbol.id, right));
    if (merge != FlatMap::kNone) {
      scratch.heap.push_back({merge, at, symbol.id, right});
      std::push_heap(scratch.heap.begin(), scratch.heap.end(), later);
    }
  }

  static bool later(const EncodeScratch::Candidate& a, const EncodeScratch::Candidate& b) {
    return a.merge != b.merge ? a.merge > b.merge : a.at > b.at;
  }

  void merge_long(EncodeScratch& scratch) const {
    auto& list = scratch.list;
    list.clear();
    scratch.heap.clear();
    for (std::size_t i = 0; i < scratch.symbols.size(); ++i) {
      const auto at = static_cast<std::int32_t>(i);
      list.push_back({scratch.symbols[i], at - 1, i + 1 < scratch.symbols.size() ? at + 1 : -1});
    }
    for (std::size_t i = 0; i < list.size(); ++i) {
      push_candidate(scratch, static_cast<std::int32_t>(i));
    }
    while (!scratch.heap.empty()) {
      const EncodeScratch::Candidate best = scratch.heap.front();
      std::pop_heap(scratch.heap.begin(), scratch.heap.end(), later);
      scratch.heap.pop_back();
      auto& left = list[static_cast<std::size_t>(best.at)];
      if (left.id != best.left || left.next < 0) {
        continue;  // Joined to something else meanwhile.
      }
      auto& right = list[static_cast<std::size_t>(left.next)];
      if (right.id != best.right) {
        continue;
      }
      left.id = merged_id(best.merge);
      right.id = -1;
      left.next = right.next;
      if (left.next >= 0) {
        list[static_cast<std::size_t>(left.next)].previous = best.at;
      }
      if (left.previous >= 0) {
        push_candidate(scratch, left.previous);
      }
      push_candidate(scratch, best.at);
    }
    scratch.symbols.clear();
    for (std::int32_t at = 0; at >= 0; at = list[static_cast<std::size_t>(at)].next) {
      scratch.symbols.push_back(list[static_cast<std::size_t>(at)].id);
    }
  }

  static constexpr std::size_t kShort = 48;

  bool byte_level_;
  bool ignore_merges_ = false;
  bool fuse_unknown_ = false;
  bool cuts_before_space_ = false;
  FlatMap merges_;              // Two ids to rank and new id.
  FlatMap code_point_symbols_;  // Of a vocabulary of characters.
  std::array<std::int32_t, 256> byte_symbols_{};
  std::unordered_map<std::string, std::int32_t> whole_pieces_;  // Filled when merges are ignored for them.
};

// Kudo 2018: of all ways to cut a piece into tokens the one with the highest sum of scores.
class UnigramModel final : public SubwordModel {
 public:
  explicit UnigramModel(const JsonNode& node) {
    std::vector<std::string> tokens;
    lowest_score_ = 0.0;
    for (const JsonNode& entry : node.list("vocab")) {
      const nlohmann::json& pair = entry.value();
      if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_number()) {
        entry.fail(fmt::format("must be a token and its score, got {}; fetch the file again", pair.dump()));
      }
      tokens.push_back(pair[0].get<std::string>());
      scores_.push_back(pair[1].get<double>());
      lowest_score_ = scores_.size() == 1 ? scores_.back() : std::min(lowest_score_, scores_.back());
    }
    set_tokens(std::move(tokens));
    if (node.has("unk_id")) {
      set_unknown(node.integer("unk_id"));
      if (static_cast<std::size_t>(unknown_id()) >= scores_.size()) {
        node.fail(fmt::format("unk_id must be below {}, got {}; fetch the file again", scores_.size(), unknown_id()));
      }
    }
    set_byte_fallback(node.flag("byte_fallback", false));
    for (std::size_t id = 0; id < scores_.size(); ++id) {
      add_to_trie(this->tokens()[id], static_cast<std::int32_t>(id));
    }
  }

  void encode(std::string_view piece, EncodeScratch& scratch, std::vector<std::int32_t>& ids) const override {
    if (scratch.cache.find(piece, ids)) {
      return;
    }
    const std::size_t before = ids.size();
    find_best_path(piece, scratch.nodes);
    // The ends of the path's parts, last first; unknown parts next to each other are one.
    std::vector<std::size_t> ends = {piece.size()};
    for (std::size_t end = piece.size(); end > 0;) {
      const EncodeScratch::Node& node = scratch.nodes[end];
      const auto begin = static_cast<std::size_t>(node.begin);
      const bool fuses = begin > 0 && node.id == unknown_id() && scratch.nodes[begin].id == unknown_id();
      if (begin > 0 && !fuses) {
        ends.push_back(begin);
      }
      end = begin;
    }
    std::size_t begin = 0;
    for (auto end = ends.rbegin(); end != ends.rend(); ++end) {
      append_part(piece.substr(begin, *end - begin), ids);
      begin = *end;
    }
    scratch.cache.keep(piece, ids, ids.size() - before);
  }

 private:
  static constexpr double kUnknownPenalty = 10.0;  // Below the lowest score, as sentencepiece has it.

  void add_to_trie(std::string_view token, std::int32_t id) {
    std::uint64_t node = 0;
    for (const char c : token) {
      const std::uint64_t key = node << 8U | static_cast<unsigned char>(c);
      std::uint64_t child = children_.find(key);
      if (child == FlatMap::kNone) {
        child = id_of_node_.size();
        id_of_node_.push_back(-1);
        children_.set(key, child);
      }
      node = child;
    }
    id_of_node_[node] = id;
  }

  void find_best_path(std::string_view piece, std::vector<EncodeScratch::Node>& nodes) const {
    nodes.assign(piece.size() + 1, {});
    const auto offer = [&](std::size_t begin, std::size_t end, std::int32_t id, double score) {
      EncodeScratch::Node& node = nodes[end];
      if (node.begin < 0 || score > node.score) {
        node = {score, static_cast<std::int64_t>(begin), id};
      }
    };
    for (std::size_t at = 0; at < piece.size();) {
      const double score_here = nodes[at].score;
      const std::size_t character = code_point_at(piece, at).size;
      bool has_character = false;
      std::uint64_t node = 0;
      for (std::size_t end = at; end < piece.size();) {
        node = children_.find(node << 8U | static_cast<unsigned char>(piece[end]));
        if (node == FlatMap::kNone) {
          break;
        }
        ++end;
        const std::int32_t id = id_of_node_[node];
        if (id >= 0) {
          offer(at, end, id, scores_[static_cast<std::size_t>(id)] + score_here);
          has_character = has_character || end - at == character;
        }
      }
      if (!has_character) {
        if (unknown_id() < 0) {
          throw RunError(fmt::format("tokenizer: \"{}\" is not in the vocabulary, which has no unknown token",
                                     piece.substr(at, character)));
        }
        offer(at, at + character, unknown_id(), lowest_score_ - kUnknownPenalty + score_here);
      }
      at += character;
    }
  }

  void append_part(std::string_view part, std::vector<std::int32_t>& ids) const {
    const std::int32_t id = id_of(part);
    if (id >= 0) {
      ids.push_back(id);
    } else if (!byte_fallback() || !append_bytes(part, ids)) {
      ids.push_back(unknown_id());
    }
  }

  std::vector<double> scores_;
  double lowest_score_ = 0.0;
  FlatMap children_;  // Trie node and byte to node.
  std::vector<std::int32_t> id_of_node_ = {-1};
};

}  // namespace

bool PieceCache::make_key(std::string_view piece, Key& key) {
  if (piece.empty() || piece.size() >= sizeof(Key)) {
    return false;
  }
  key = {};
  std::memcpy(key.data(), piece.data(), piece.size());
  key.back() |= static_cast<std::uint64_t>(piece.size()) << 56U;
  return true;
}

std::size_t PieceCache::slot_of(const Key& key) {
  std::uint64_t hash = key[0] * 0x9E3779B97F4A7C15ULL;
  for (std::size_t i = 1; i < kKeyWords; ++i) {
    hash = (hash ^ (hash >> 32U) ^ key.at(i)) * 0xBF58476D1CE4E5B9ULL;
  }
  return hash >> 49U;
}

bool PieceCache::find(std::string_view piece, std::vector<std::int32_t>& ids) const {
  Key key;
  if (!make_key(piece, key)) {
    return false;
  }
  const Slot& slot = slots_[slot_of(key)];
  if (slot.key != key) {
    return false;
  }
  ids.insert(ids.end(), slot.ids.begin(), slot.ids.begin() + slot.count);
  return true;
}

void PieceCache::keep(std::string_view piece, const std::vector<std::int32_t>& ids, std::size_t count) {
  Key key;
  if (count > kMaxIds || !make_key(piece, key)) {
    return;
  }
  Slot& slot = slots_[slot_of(key)];
  slot.key = key;
  slot.count = static_cast<std::uint32_t>(count);
  std::copy(ids.end() - static_cast<std::ptrdiff_t>(count), ids.end(), slot.ids.begin());
}

std::int32_t SubwordModel::id_of(std::string_view token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? -1 : found->second;
}

void SubwordModel::set_tokens(std::vector<std::string> tokens) {
  tokens_ = std::move(tokens);
  ids_.reserve(tokens_.size());
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    if (!tokens_[id].empty()) {
      ids_[tokens_[id]] = static_cast<std::int32_t>(id);
    }
  }
}

void SubwordModel::set_byte_fallback(bool byte_fallback) {
  byte_fallback_ = byte_fallback;
  for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    byte_ids_.at(byte) = id_of(fmt::format("<0x{:02X}>", byte));
  }
}

bool SubwordModel::append_bytes(std::string_view text, std::vector<std::int32_t>& ids) const {
  const auto id_of_byte = [&](char c) { return byte_ids_.at(static_cast<unsigned char>(c)); };
  if (std::any_of(text.begin(), text.end(), [&](char c) { return id_of_byte(c) < 0; })) {
    return false;
  }
  std::transform(text.begin(), text.end(), std::back_inserter(ids), id_of_byte);
  return true;
}

std::unique_ptr<SubwordModel> make_subword_model(const JsonNode& node, bool byte_level) {
  const std::string type = !node.has("type") && node.has("merges") ? "BPE" : node.text("type");
  if (type == "BPE") {
    return std::make_unique<BytePairModel>(node, byte_level);
  }
  if (type == "Unigram") {
    if (byte_level) {
      node.fail("a Unigram model after a ByteLevel pre-tokenizer, which Hestia does not read");
    }
    return std::make_unique<UnigramModel>(node);
  }
  node.fail(fmt::format("a model of type \"{}\", which Hestia does not read; it reads BPE and Unigram", type));
}

}  // namespace hestia
