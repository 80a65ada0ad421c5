"""Byte pairs as llama.cpp cuts text for the names of `tokenizer.ggml.pre`, by hand.

    python cli/tests/text/make_splits.py > cli/tests/text/splits.json

Made with regex 2026.11.19 and nothing else: patterns are those of llama.cpp's `src/llama-vocab.cpp` (for `deepseek-llm`, whose
list of letters it writes out, by the Unicode property that the list is of), pieces are merged by rank as GPT-2's encoder does. The vocabulary's pairs
were counted over whole texts, so that they cross every boundary that a split may set. For `refact`, `gpt-4o` and `glm4` the
same ids came from tokenizers 0.23.2 with the models' own pre-tokenizers (`Digits` and `ByteLevel`), which `--check` runs.
"""

import collections
import json
import sys
import unicodedata

import regex

TEXTS = [
    "It's 1234567 o'clock, DON'T say I'LL wait  2   hours\n\n\tif x == 10:\r\n    return y_2 + 345  \n",
    "naïve Ωmega ώ ΐ K Å 12½ ²³ Straße ЁЖИК Հայ ᲐᲑ Ꭰꭰ ǅ ʔ ﬁ",
    "中文 字12,000 と かな カナ 한국어。　「引用」！？ ‘q’ “w” ～",
    "é e\u0301 हिन्दी ไทย עברית 🙂🙂 a\u00a0b …— end.   ",
    "  two  spaces\n \n line1\r\n\r\nline2 $x^2~`|<>=+ 'tis 'RE 's",
    "12",
    " 7 77 777 7777",
]
# Where capitals, contractions and slashes stand within words: few splits tell these apart.
CAPITALS = [
    "iPhone camelCaseWord HTTPServer aBcD DON'T don'T I'LL she'll",
    "ΩμέγαΑβγ ЁжикЁЖ ǅungla éÉe\u0301E\u0301x हिन्दीA",
    "src/lib.rs //\n/* a/b */\r\n12345/678",
]
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
QWEN_2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# As the tokenizer's own file has it, which llama.cpp quotes beside its approximation.
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WIDE = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
# Name, patterns, whether a whole word that is a token needs no merges.
SPLITS = {
    "gpt-2": ([GPT_2], False),
    "llama-bpe": ([LLAMA_3], True),
    "lfm2": ([LLAMA_3], True),
    "qwen2": ([QWEN_2], False),
    "qwen35": ([QWEN_35], False),
    "glm4": ([LLAMA_3], False),
    "chatglm-bpe": ([LLAMA_3], False),
    "refact": ([r"\p{N}", GPT_2], False),
    "gpt-4o": ([GPT_4O], False),
    "minimax-m2": ([GPT_4O], False),
    "deepseek-llm": ([r"[\r\n]", r"\s?" + CASED + "+", WIDE, r"\s+$", EAST_ASIAN, r"\p{N}+"], False),
    "deepseek-coder": ([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"], False),
    "deepseek-v3": ([
        r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""], False),
}


def letters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            table[byte] = chr(byte)
        else:
            table[byte], extra = chr(256 + extra), extra + 1
    return table


LETTERS = letters()


def spelled(text):
    return [LETTERS[byte] for byte in text.encode()]


def learned(texts, count):
    words, merges = [spelled(text) for text in texts for _ in range(2)], []
    for _ in range(count):
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(pair)
        words = [merged(word, pair) for word in words]
    return merges


def merged(word, pair):
    out, at = [], 0
    while at < len(word):
        if tuple(word[at : at + 2]) == pair:
            out.append(word[at] + word[at + 1])
            at += 2
        else:
            out.append(word[at])
            at += 1
    return out


def cut(text, patterns):
    pieces = [text]
    for pattern in patterns:
        parts = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                parts += [piece[end : match.start()], match.group()]
                end = match.end()
            parts.append(piece[end:])
        pieces = [part for part in parts if part]
    return pieces


def encode(text, patterns, whole, ids, ranks):
    out = []
    for piece in cut(text, patterns):
        word = spelled(piece)
        if whole and "".join(word) in ids:
            word = ["".join(word)]
        while len(word) > 1:
            best = min(zip(word, word[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            word = merged(word, best)
        out += [ids[token] for token in word]
    return out


def check(texts, tokens, merges, wanted):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers as pre

    split = lambda pattern: pre.Split(Regex(pattern), "isolated")
    own = {
        "refact": pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
        "gpt-4o": pre.Sequence([split(GPT_4O.replace(CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "glm4": pre.Sequence([split(LLAMA_3.replace(CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
    }
    for name, pre_tokenizer in own.items():
        if name not in wanted:
            continue
        tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizer
        for text, ids in zip(texts, wanted[name]):
            assert tokenizer.encode(text).ids == ids, (name, text)
    print("the same", file=sys.stderr)


def goldens(texts, count, names):
    merges = learned(texts, count)
    tokens = [LETTERS[byte] for byte in range(256)]
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    ids, ranks = {token: id for id, token in enumerate(tokens)}, {pair: rank for rank, pair in enumerate(merges)}
    wanted = {name: [encode(text, *SPLITS[name], ids, ranks) for text in texts] for name in names}
    if "--check" in sys.argv:
        check(texts, tokens, merges, wanted)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in merges], "texts": texts, "ids": wanted}


elsewhere = ("gpt-4o", "minimax-m2", "qwen2", "qwen35")
all_splits = goldens(TEXTS, 160, [name for name in SPLITS if name not in elsewhere])
capitals = goldens(CAPITALS, 90, ["gpt-4o", "minimax-m2", "llama-bpe"])
assert capitals["ids"]["gpt-4o"] != capitals["ids"]["llama-bpe"]
# Texts of Qwen's are brought into Unicode's form C first, by their own tokenizers, so that these are.
composed = goldens([unicodedata.normalize("NFC", text) for text in TEXTS + CAPITALS], 220, ["qwen2", "qwen35"])
assert composed["ids"]["qwen2"] != composed["ids"]["qwen35"]
json.dump(all_splits | {"capitals": capitals, "composed": composed}, sys.stdout, ensure_ascii=False)
print()
