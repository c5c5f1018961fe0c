"""Goldens of tokenizer_json_test.cpp and unicode_test.cpp, from the tokenizers and sentencepiece libraries.

    make_tokenizer_goldens.py                   writes goldens/NAME/hashes.txt of every vocabulary beside this file, and
                                                goldens/unicode.txt
    make_tokenizer_goldens.py --train           makes the vocabularies anew first (training breaks ties by chance)
    make_tokenizer_goldens.py --expect TOKENIZER --first N --count M
                                                prints what the library makes of strings N to N + M, one JSON object a
                                                line, for `check_tokenizer TOKENIZER`

Every vocabulary is trained on strings of the generator below, which tests/support/tokenizer_fuzz.hpp holds too. A line
of hashes.txt stands for 500 strings: SHA-256 (its first 16 digits) of their ids, and of the texts that these ids and
some random ids decode to. A line of unicode.txt stands for 0x4000 code points: their first one, and hashes of what the
library makes of them (UNICODE names them).
"""

import argparse
import collections
import hashlib
import io
import json
import struct
import sys
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "goldens"
STRINGS = 100_000
BLOCK = 500
SEED = 0x4865737469610000
TRAINING = range(10_000_000, 10_006_000)  # Numbers of the strings that vocabularies are trained on.
MASK = 2**64 - 1

SYLLABLES = ["the", "ing", "er", "on", "ka", "lo", "mi", "str", "pe", "sha", "ne", "ri", "tion", "é", "ß", "ñ"]
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2003", "\u180e", "\u0085", "\u2028",
          "\x0b", "\u200b"]
CODE = ["for (int i = 0; i < n; ++i) {\n", "    return x[i] += 1;\n}\n", "def f(self, *args):\n\treturn None\n",
        "#include <vector>\n", "https://example.org/a?b=c&d=%20", "std::vector<int>", "if x != y && !z || w == 0x1F:",
        "SELECT * FROM t WHERE a='b';", '{"key": [1, 2.5e-3, null]}', "camelCaseName snake_case_name",
        "/* comment */ // more", "$HOME/.config/\\n"]
EMOJI = ["\U0001F600", "\U0001F468\u200d\U0001F469\u200d\U0001F467", "\U0001F44D\U0001F3FD", "\U0001F1E9\U0001F1EA",
         "\u2764\ufe0f", "1\ufe0f\u20e3", "\U0001F3F3\ufe0f\u200d\U0001F308", "\u263a", "\U0001F9D1\u200d\U0001F4BB",
         "\u2122"]
MARKED = ["<|end|>", " <|end|> ", "<|end|>\n\n", "<s>", "</s>", "<unk>", "\u2581", "<0x0A>", "word<|w|>x", " <|w|> ",
          "a <mask> b", "<mask>", "<|user|>", "[INST]"]
PUNCTUATION = ["'s", "'LL", "don't", "'\u017f", "...", "!?", '"', "\u2019", "\u2014", "-", "--", "(", "),", "\u3002",
               "\u00bf", "_"]
SCRIPTS = [(0x41, 0x5B), (0x61, 0x7B), (0xC0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x531, 0x58B), (0x590, 0x600),
           (0x600, 0x700), (0x900, 0x980), (0x980, 0xA00), (0xB80, 0xC00), (0xE00, 0xE80), (0xF00, 0xFDB),
           (0x1000, 0x10A0), (0x10A0, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2200), (0x2460, 0x2600), (0x3040, 0x3100),
           (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0xF900, 0xFB07), (0xFF01, 0xFFE7), (0x1D400, 0x1D800)]
ZEROS = [0x30, 0x30, 0x30, 0x660, 0x966, 0xFF10, 0x2160, 0x2070]


class SplitMix64:
    def __init__(self, seed):
        self.state = seed & MASK

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, bound):
        limit = MASK - MASK % bound
        value = self.next()
        while value >= limit:
            value = self.next()
        return value % bound


class Fuzz:
    """One string of the corpus: the counterpart of TokenizerFuzz."""

    def __init__(self, number):
        self.random = SplitMix64(SEED + number)
        self.parts = []
        for _ in range(1 + self.random.below(12)):
            self.atom()
        self.bytes = b"".join(self.parts)

    def ids(self, vocab_size):
        count = 1 + self.random.below(12)
        return [self.random.below(vocab_size) for _ in range(count)]

    def one_of(self, texts):
        self.parts.append(texts[self.random.below(len(texts))].encode())

    def point(self, code):
        self.parts.append(chr(code).encode())

    def atom(self):
        below = self.random.below
        kind = below(16)
        if kind < 4:
            if below(4) != 0:
                self.parts.append(b" ")
            for _ in range(1 + below(3)):
                self.one_of(SYLLABLES)
        elif kind == 4:
            for _ in range(1 + below(4)):
                self.one_of(SPACES)
        elif kind == 5:
            zero = ZEROS[below(len(ZEROS))]
            for _ in range(1 + below(6)):
                self.point(zero + below(10))
        elif kind == 6:
            self.one_of(CODE)
        elif kind == 7:
            self.one_of(EMOJI)
        elif kind == 8:
            self.point(0x41 + below(58))
            for _ in range(1 + below(3)):
                self.point(0x300 + below(0x70))
        elif kind < 12:
            begin, end = SCRIPTS[below(len(SCRIPTS))]
            for _ in range(1 + below(6)):
                self.point(begin + below(end - begin))
        elif kind == 12:
            code = below(0x110000)
            self.point(0x41 if 0xD800 <= code < 0xE000 else code)
        elif kind == 13:
            for _ in range(1 + below(4)):
                self.parts.append(bytes([0x80 + below(0x80)]))
        elif kind == 14:
            self.one_of(MARKED)
        else:
            self.one_of(PUNCTUATION)


# ---- Vocabularies: one of the shape of each family, and some for components that no family has.

GPT2 = pre_tokenizers.ByteLevel.alphabet()
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = "|".join([LETTERS % ("*", "+"), LETTERS % ("+", "*"), r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
                  r"\s*[\r\n]+|\s+(?!\S)|\s+"])
LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])


def byte_level_bpe(normalizer, pre_tokenizer, added=(), **model):
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=GPT2, show_progress=False), added


def fallback_bpe(normalizer, pre_tokenizer, added=(), **model):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **model))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = LLAMA_DECODER
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=760, special_tokens=specials, limit_alphabet=200, show_progress=False)
    return tokenizer, trainer, added


def unigram(normalizer, pre_tokenizer, decoder, added=()):
    tokenizer = Tokenizer(models.Unigram())
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(vocab_size=900, unk_token="<unk>", special_tokens=specials, show_progress=False)
    return tokenizer, trainer, added


def special(name, **flags):
    return AddedToken(name, special=True, normalized=flags.pop("normalized", False), **flags)


def shapes():
    split = pre_tokenizers.Split
    byte_level = pre_tokenizers.ByteLevel
    plain = byte_level(add_prefix_space=False, use_regex=False)
    ends = [special("<|end|>"), special("<|user|>")]
    phi = [special("<|end|>", rstrip=True), special("<|user|>", rstrip=True), AddedToken("<mask>", lstrip=True),
           AddedToken("<|w|>", single_word=True)]
    spaces = [AddedToken(" " * count, normalized=True, special=False) for count in range(2, 6)]
    return {
        "olmoe": byte_level_bpe(normalizers.NFC(), byte_level(add_prefix_space=False), ends + spaces),
        "qwen": byte_level_bpe(normalizers.NFC(), pre_tokenizers.Sequence(
            [split(Regex(QWEN), "isolated"), plain]), ends),
        "gpt_oss": byte_level_bpe(None, pre_tokenizers.Sequence([split(Regex(O200K), "isolated"), plain]), ends,
                                  ignore_merges=True),
        "deepseek": byte_level_bpe(None, pre_tokenizers.Sequence([
            split(Regex(r"[\r\n]"), "isolated"),
            split(Regex(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅḀ-ἕ]+"), "isolated"),
            split(Regex(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), "isolated"),
            split(Regex(r"\s+$"), "isolated"),
            split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            plain]), ends),
        "smollm2": byte_level_bpe(None, pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]), ends),
        "mixtral": fallback_bpe(LLAMA_NORMALIZER, None, byte_fallback=True, fuse_unk=True),
        "phi": fallback_bpe(LLAMA_NORMALIZER, None, phi, byte_fallback=True, fuse_unk=True),
        "metaspace": fallback_bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), ends,
                                  byte_fallback=True),
        "unigram_bytes": unigram(
            normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), ends),
        "unigram_unknown": unigram(
            normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                     pre_tokenizers.Punctuation("merged_with_previous"),
                                     pre_tokenizers.Metaspace(prepend_scheme="always", split=False)]), None),
        "characters": fallback_bpe(normalizers.NFKD(), pre_tokenizers.Sequence([
            split("-", "merged_with_next"), split(Regex(r"[eo]+"), "merged_with_previous"),
            pre_tokenizers.Digits(individual_digits=False), split(Regex(r"\d\d"), "removed"),
            split(Regex(r"\p{Lu}"), "contiguous"), pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()]),
            [AddedToken("<|w|>", single_word=True, normalized=True)]),
        "characters_fused": fallback_bpe(None, pre_tokenizers.Sequence([
            split(Regex(r"\w+"), "removed", invert=True), split(Regex(r"[a-g]"), "merged_with_next", invert=True)]),
            fuse_unk=True),
        "prefix_space": byte_level_bpe(normalizers.NFKC(), byte_level(add_prefix_space=True), ends),
    }


# Byte tokens belong to the vocabulary; training could only add them as special tokens.
def as_model_bytes(data, fallback):
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    data["model"]["byte_fallback"] = fallback
    return data


def training_texts(numbers):
    """Strings, and the same without their rare characters: a Unigram vocabulary holds every character that it is trained on."""
    texts = [Fuzz(number).bytes.decode("utf-8", "replace") for number in numbers]
    characters = {character for character, _ in collections.Counter("".join(texts)).most_common(250)}
    return texts, ["".join(character for character in text if character in characters) for text in texts]


def trained(tokenizer, trainer, added, texts, fallback):
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer.from_str(json.dumps(as_model_bytes(json.loads(tokenizer.to_str()), fallback)))
    tokenizer.add_tokens(list(added))
    return tokenizer


def train():
    texts, frequent = training_texts(TRAINING)
    train_sentencepiece(frequent)
    for name, shape in shapes().items():
        fallback = name in ("mixtral", "phi", "metaspace", "unigram_bytes")
        tokenizer = trained(*shape, frequent if name.startswith("unigram") else texts, fallback)
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        (FOLDER / name / "tokenizer.json").write_text(text + "\n")


# One as Mixtral's, one that drops extra spaces and knows no bytes. Both are BPE: splits that tie in a Unigram model are
# settled differently by versions of the library. Normalisation rules would make the files large.
SENTENCEPIECE = {
    "sentencepiece_bpe": dict(model_type="bpe", vocab_size=700, byte_fallback=True, split_digits=True, remove_extra_whitespaces=False,
                              allow_whitespace_only_pieces=True, pad_id=3, control_symbols=["<|end|>"]),
    "sentencepiece_unknown": dict(model_type="bpe", vocab_size=500, user_defined_symbols=["<mask>"]),
}


def train_sentencepiece(texts):
    for name, options in SENTENCEPIECE.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, num_threads=1,
                                                 character_coverage=1.0, normalization_rule_name="identity",
                                                 minloglevel=2, **options)
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        (FOLDER / name / "tokenizer.model").write_bytes(model.getvalue())


class TokenizersReference:
    """A tokenizer.json in the tokenizers library, which takes text only: broken UTF-8 is replaced first."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(
            [text.decode("utf-8", "replace") for text in texts], add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode_batch(ids, skip_special_tokens=True)


class SentencePieceReference:
    """A tokenizer.model in the sentencepiece library, which takes any bytes."""

    def __init__(self, path):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = self.processor.get_piece_size()

    def encode(self, texts):
        return self.processor.encode(texts)

    def decode(self, ids):
        return self.processor.decode(ids)


def reference(path):
    path = Path(path)
    return TokenizersReference(Tokenizer.from_file(str(path))) if path.suffix == ".json" else SentencePieceReference(path)


def is_text(text):
    try:
        text.decode()
        return True
    except UnicodeDecodeError:
        return False


def results(reference, first, count):
    """For each string: ids, their text, random ids, their text."""
    for begin in range(first, first + count, BLOCK):
        strings = [Fuzz(number) for number in range(begin, min(begin + BLOCK, first + count))]
        ids = reference.encode([s.bytes for s in strings])
        random_ids = [s.ids(reference.size) for s in strings]
        yield from zip(ids, reference.decode(ids), random_ids, reference.decode(random_ids))


def expected_lines(reference, first, count):
    """What check_tokenizer reads."""
    for i, (ids, text, random_ids, random_text) in enumerate(results(reference, first, count), first):
        yield json.dumps({"string": i, "ids": ids, "text": text, "random_ids": random_ids, "random_text": random_text})


def hash_lines(reference):
    lines = []
    of_ids, of_texts = hashlib.sha256(), hashlib.sha256()
    for number, (ids, text, _, random_text) in enumerate(results(reference, 0, STRINGS), 1):
        of_ids.update(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))
        for decoded in (text.encode(), random_text.encode()):
            of_texts.update(struct.pack("<I", len(decoded)) + decoded)
        if number % BLOCK == 0:
            lines.append(f"{of_ids.hexdigest()[:16]} {of_texts.hexdigest()[:16]}\n")
            of_ids, of_texts = hashlib.sha256(), hashlib.sha256()
    return "".join(lines)


# ---- Unicode: what the library says of every code point.

def splits(pre_tokenizer):
    """Which code points it parts from the letters around them, as a string of 0 and 1."""
    def of(characters):
        whole = lambda character: pre_tokenizer.pre_tokenize_str(f"a{character}a") == [(f"a{character}a", (0, 3))]
        return "".join("0" if whole(character) else "1" for character in characters)
    return of


def normalised(normalizer):
    """Every code point by itself, before a mark and after a letter, normalised."""
    return lambda characters: normalizer.normalize_str("".join(f"{c}\n{c}\u0301\no{c}\n" for c in characters))


UNICODE = [splits(pre_tokenizers.WhitespaceSplit()), splits(pre_tokenizers.Digits(individual_digits=True)),
           splits(pre_tokenizers.Punctuation("isolated")), normalised(normalizers.NFC()),
           normalised(normalizers.NFD()), normalised(normalizers.NFKC()), normalised(normalizers.NFKD()),
           normalised(normalizers.Lowercase())]
UNICODE_BLOCK = 0x4000


def unicode_lines():
    for begin in range(0, 0x110000, UNICODE_BLOCK):
        characters = [chr(code) for code in range(begin, begin + UNICODE_BLOCK) if not 0xD800 <= code < 0xE000]
        hashes = (hashlib.sha256(of(characters).encode()).hexdigest()[:16] for of in UNICODE)
        yield f"{begin:06X} {' '.join(hashes)}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--expect", metavar="TOKENIZER")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=STRINGS)
    arguments = parser.parse_args()
    if arguments.expect:
        for line in expected_lines(reference(arguments.expect), arguments.first, arguments.count):
            print(line)
        return
    if arguments.train:
        train()
    (FOLDER / "unicode.txt").write_text("".join(unicode_lines()))
    for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
        (folder / "hashes.txt").write_text(hash_lines(reference(next(folder.glob("tokenizer.*")))))
        print(folder.name, file=sys.stderr)


if __name__ == "__main__":
    main()
