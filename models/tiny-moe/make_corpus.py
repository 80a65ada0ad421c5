#!/usr/bin/env python3
"""Renders the fetched packages as plain text. make_corpus.sh runs it; see there.

    make_corpus.py manifest                 the Cargo.toml that names the crates
    make_corpus.py scripture VERSES OUT     the King James Bible, as `bible -f` prints it
    make_corpus.py reference WORDNET OUT    WordNet, from its data.* files
    make_corpus.py code VENDOR OUT          Rust crates, from `cargo vendor --versioned-dirs`

What is held out is held out whole: books, crates, and for the dictionary (whose entries stand alone) entries.
"""

import hashlib
import re
import sys
from pathlib import Path

# Books as `bible -f` abbreviates them; a book named in neither list is trained on.
VALID_BOOKS = ["Est", "Eccl", "Amos", "Phi", "1Pet"]
EVAL_BOOKS = ["Ruth", "Jonah", "Jas"]

BOOK_TITLES = dict(
    line.split(" ", 1)
    for line in """\
Ge Genesis
Exo Exodus
Lev Leviticus
Num Numbers
Deu Deuteronomy
Josh Joshua
Jdgs Judges
Ruth Ruth
1Sm 1 Samuel
2Sm 2 Samuel
1Ki 1 Kings
2Ki 2 Kings
1Chr 1 Chronicles
2Chr 2 Chronicles
Ezra Ezra
Neh Nehemiah
Est Esther
Job Job
Psa Psalms
Prv Proverbs
Eccl Ecclesiastes
SSol Song of Solomon
Isa Isaiah
Jer Jeremiah
Lam Lamentations
Eze Ezekiel
Dan Daniel
Hos Hosea
Joel Joel
Amos Amos
Obad Obadiah
Jonah Jonah
Mic Micah
Nahum Nahum
Hab Habakkuk
Zep Zephaniah
Hag Haggai
Zec Zechariah
Mal Malachi
Mat Matthew
Mark Mark
Luke Luke
John John
Acts Acts
Rom Romans
1Cor 1 Corinthians
2Cor 2 Corinthians
Gal Galatians
Eph Ephesians
Phi Philippians
Col Colossians
1Th 1 Thessalonians
2Th 2 Thessalonians
1Tim 1 Timothy
2Tim 2 Timothy
Titus Titus
Phmn Philemon
Heb Hebrews
Jas James
1Pet 1 Peter
2Pet 2 Peter
1Jn 1 John
2Jn 2 John
3Jn 3 John
Jude Jude
Rev Revelation""".splitlines()
)

# Dictionary entries for eval and for valid, cut from the front of the shuffled list.
EVAL_REFERENCE_BYTES = 32_000
VALID_REFERENCE_BYTES = 100_000

# Every crate is under MIT, alone or as a choice.
TRAIN_CRATES = """
anyhow 1.0.104
bytes 1.12.1
chrono 0.4.45
clap_builder 4.6.7
crossbeam-channel 0.5.17
crossbeam-epoch 0.9.21
crossbeam-utils 0.8.23
futures-util 0.3.34
hashbrown 0.15.5
http 1.5.0
hyper 1.12.0
indexmap 2.14.2
itertools 0.14.0
ndarray 0.16.1
nom 8.0.0
num-bigint 0.4.8
petgraph 0.8.3
rand 0.9.5
rayon 1.12.0
rayon-core 1.13.0
regex-syntax 0.8.11
serde_core 1.0.229
serde_derive 1.0.229
serde_json 1.0.154
syn 2.0.119
toml_edit 0.22.27
tower 0.5.3
"""

# Trained-on crates' files that say they derive from work under other terms (Apache-2.0 alone, BSD).
OTHER_LICENCE = {"tz_data.rs", "rk_step.rs", "peak_ewma.rs"}

VALID_CODE = """
thread_local 1.1.10
    src/cached.rs src/lib.rs src/thread_id.rs
url 2.5.8
    src/host.rs src/origin.rs src/path_segments.rs src/quirks.rs src/slicing.rs
"""

EVAL_CODE = """
heck 0.5.0
    src/snake.rs
httparse 1.10.1
    src/iter.rs src/simd/swar.rs
semver 1.0.28
    src/eval.rs src/parse.rs
"""


def crates(listing):
    """`name version` lines, each with the indented files below it, as (name, version, files)."""
    found = []
    for line in listing.strip().splitlines():
        if line.startswith(" "):
            found[-1][2].extend(line.split())
        else:
            found.append((*line.split(), []))
    return found


def normalised(text):
    """Line feeds, no trailing blanks, at most one empty line in a row, one line feed at the end."""
    lines = [line.rstrip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def write(out, split, name, text):
    path = Path(out, split, f"{name}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(normalised(text).encode())


def manifest():
    print('[package]\nname = "corpus"\nversion = "0.0.0"\nedition = "2021"\n\n[dependencies]')
    for name, version, _ in crates(TRAIN_CRATES) + crates(VALID_CODE) + crates(EVAL_CODE):
        print(f'{name} = {{ version = "={version}", default-features = false }}')


def scripture(verses, out):
    """A heading per chapter, then one verse per line."""
    splits = {"train": [], "valid": [], "eval": []}
    heading = None
    for line in Path(verses).read_text("ascii").splitlines():
        book, chapter, verse = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line).groups()
        split = "valid" if book in VALID_BOOKS else "eval" if book in EVAL_BOOKS else "train"
        if heading != (book, chapter):
            heading = (book, chapter)
            splits[split].append(f"\n{BOOK_TITLES[book]} {chapter}\n")
        splits[split].append(verse)
    for split, lines in splits.items():
        write(out, split, "scripture", "\n".join(lines))


def reference(wordnet, out):
    """One line per synset: `word, word (part of speech): definition; "example"`."""
    entries = []
    for pos in ["noun", "verb", "adj", "adv"]:
        for line in Path(wordnet, f"data.{pos}").read_text("ascii").splitlines():
            if not line.startswith("  "):  # the licence, at the head of each file
                offset = line[:8]
                rank = hashlib.sha256(f"{pos} {offset}".encode()).digest()
                entries.append((rank, dictionary_entry(line)))
    # Ordered by a hash of each synset's identity: a shuffle without a generator to seed.
    shuffled = iter([text for _, text in sorted(entries)])

    for split, limit_bytes in [("eval", EVAL_REFERENCE_BYTES), ("valid", VALID_REFERENCE_BYTES)]:
        taken, taken_bytes = [], 0
        while taken_bytes < limit_bytes:
            taken.append(next(shuffled))
            taken_bytes += len(taken[-1]) + 1
        write(out, split, "reference", "\n".join(taken))
    write(out, "train", "reference", "\n".join(shuffled))


def dictionary_entry(line):
    """Renders a line of a data file: offset, file, type, word count, a word and an id per word, ... | gloss.

    The format is wndb(5WN)'s; the count is hexadecimal, and (a), (p), (ip) after a word tell where it may stand.
    """
    data, gloss = line.split("|", 1)
    fields = data.split()
    kind = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}[fields[2]]
    word_count = int(fields[3], 16)
    words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * word_count : 2]]
    gloss = re.sub(r"`([^`']*)'", r"'\1'", " ".join(gloss.replace("_", " ").split())).rstrip("; ")
    return f"{', '.join(words)} ({kind}): {gloss}"


def code(vendor, out):
    """Source files as they are, in order of crate and path."""
    sources = []
    for name, version, _ in crates(TRAIN_CRATES):
        for path in sorted(Path(vendor, f"{name}-{version}", "src").rglob("*.rs")):
            text = normalised(path.read_text("utf-8"))
            if path.name not in OTHER_LICENCE and is_written_by_hand(path, text):
                sources.append(text)
    write(out, "train", "code", "\n".join(sources))

    for split, listing in [("valid", VALID_CODE), ("eval", EVAL_CODE)]:
        sources = [
            Path(vendor, f"{name}-{version}", file).read_text("utf-8")
            for name, version, files in crates(listing)
            for file in files
        ]
        write(out, split, "code", "\n".join(sources))


def is_written_by_hand(path, text):
    """False for generated files, tables, and files that are mostly literals."""
    return not (
        {"gen", "unicode_tables", "tables", "tables.rs"} & set(path.parts)
        or re.search(r"@generated|automatically generated|do not edit", text[:2000], re.IGNORECASE)
        or max(map(len, text.split("\n"))) > 240
        or len(re.findall(r"[0-9]", text)) > 0.08 * len(text)
        or len(re.findall(r"[^\x00-\x7f]", text)) > 0.01 * len(text)
    )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"manifest": manifest, "scripture": scripture, "reference": reference, "code": code}[command](*arguments)
