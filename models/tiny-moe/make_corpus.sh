#!/usr/bin/env bash
# Makes the text that the bundled tiny MoE model is trained, validated and evaluated on.
#
#   ./make_corpus.sh OUT      writes OUT/{train,valid,eval}/{scripture,code,reference}.txt
#
# Fetches pinned packages through apt-get and cargo, unpacks them in a temporary directory (nothing is installed)
# and hands them to make_corpus.py, which selects and renders the text. The same package versions give the same
# bytes. Needs Debian 12 on amd64 with libreadline8, cargo and python3. eval/ beside this script is a copy of OUT/eval.
# Sources, sizes, checksums and licences: LICENSES.md.
set -euo pipefail

BIBLE_KJV=4.38
WORDNET=1:3.0-37

if [ $# -ne 1 ]; then
    echo "usage: $0 OUT" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# scripture and reference: two Debian data packages, and the program that decompresses the first.
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download \
    "bible-kjv=$BIBLE_KJV" "bible-kjv-text=$BIBLE_KJV" "wordnet-base=$WORDNET"
for package in *.deb; do
    dpkg -x "$package" debian
done
# -f: one verse per line, each after its reference, instead of numbered pages.
debian/usr/bin/bible -f -p debian/usr/lib 'Gen1:1-Rev22:21' </dev/null >verses.txt

# code: the crates that make_corpus.py names, as the dependencies of an empty crate.
mkdir -p crates/src
touch crates/src/lib.rs
"$here/make_corpus.py" manifest >crates/Cargo.toml
cargo vendor --quiet --versioned-dirs --manifest-path crates/Cargo.toml vendor >/dev/null

"$here/make_corpus.py" scripture verses.txt "$out"
"$here/make_corpus.py" reference debian/usr/share/wordnet "$out"
"$here/make_corpus.py" code vendor "$out"

cd "$out"
sha256sum {train,valid,eval}/{scripture,code,reference}.txt | while read -r sum file; do
    printf '%9d  %s  %s\n' "$(wc -c <"$file")" "$sum" "$file"
done
