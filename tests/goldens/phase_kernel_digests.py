"""The digests of the published phase kernel's output that tests in `src/routing` hold ours against, from an implementation of its own.

    python3 phase_kernel_digests.py        # half a minute; the standard library alone

Everything is written out as it is defined: the ring is walked position by position, ChaCha8 makes its blocks (Bernstein 2008, 8 rounds,
64-bit counter), a seed becomes a key as rand_core's `seed_from_u64` does it (PCG32), and numbers are drawn as rand 0.8 draws them. A
digest is FNV-1a over the little-endian bytes of the i32 output. Each line has the test's arguments and the digest.
"""

import math

M32 = 2**32 - 1
M64 = 2**64 - 1


class ChaCha8:
    """The words of rand_chacha's `ChaCha8Rng::seed_from_u64(seed)`, one after the other."""

    def __init__(self, seed):
        self.key = []
        for _ in range(8):
            seed = (seed * 6364136223846793005 + 11634580027462260723) & M64
            word, turn = (((seed >> 18) ^ seed) >> 27) & M32, seed >> 59
            self.key.append(((word >> turn) | (word << (32 - turn))) & M32)
        self.block, self.words = 0, []

    def refill(self):
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *self.key, self.block & M32, self.block >> 32, 0, 0]
        x = start[:]

        def quarter(a, b, c, d):
            for left, right, into, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[left] = (x[left] + x[right]) & M32
                x[into] ^= x[left]
                x[into] = ((x[into] << turn) | (x[into] >> (32 - turn))) & M32

        for _ in range(4):
            for a in range(4):
                quarter(a, a + 4, a + 8, a + 12)
            for a in range(4):
                quarter(a, (a + 1) % 4 + 4, (a + 2) % 4 + 8, (a + 3) % 4 + 12)
        self.words = [(now + before) & M32 for now, before in zip(x, start)][::-1]
        self.block += 1

    def number(self, bits):
        value = 0
        for shift in range(0, bits, 32):
            if not self.words:
                self.refill()
            value |= self.words.pop() << shift
        return value

    def below(self, bound, bits):
        """rand 0.8's `gen_range(0..bound)` on an integer of so many bits."""
        zone = (bound << (bits - bound.bit_length())) - 1
        while True:
            product = self.number(bits) * bound
            if product & ((1 << bits) - 1) <= zone:
                return product >> bits


def permutations(rows, seed):
    rng = ChaCha8(seed)
    orders = []
    for _ in range(2):
        order = list(range(rows))
        for last in range(rows - 1, 0, -1):
            other = rng.below(last + 1, 32)
            order[last], order[other] = order[other], order[last]
        orders.append(order)
    return orders


def kernel(source_degrees, target_degrees, source_order, target_order, tokens, top_k, seed):
    """[tokens, top_k] columns, −1 where fewer were accepted."""
    n = len(source_degrees)
    column_at = [0] * n
    for column, position in enumerate(source_order):
        column_at[position] = column
    source_offset, target_offset = [0] * n, [0] * n
    for offset, degrees in ((source_offset, source_degrees), (target_offset, target_degrees)):
        for row in range(1, n):
            offset[row] = (offset[row - 1] + degrees[row - 1]) % n
    rows = []
    for token in range(tokens):
        kept, accepted, rng = [-1] * top_k, 0, ChaCha8((seed + token) & M64)
        for step in range(source_degrees[token]):
            column = column_at[(source_offset[token] + step) % n]
            if (target_order[token] - target_offset[column]) % n < target_degrees[column]:
                slot = accepted if accepted < top_k else rng.below(accepted + 1, 64)
                if slot < top_k:
                    kept[slot] = column
                accepted += 1
        rows.append(kept)
    return rows


def dispatch(tokens, experts, top_k, seed, density=0.3, oversample=4):
    """[tokens, top_k] experts of equal shares: the many-tokens form."""
    width = -(-tokens // experts)
    n = width * experts
    degree = lambda columns: min(max(math.floor(columns + 0.5), 1), n)
    source_order, target_order = permutations(n, seed)
    sampled = min(max(top_k * oversample, top_k + 1), n)
    degrees = [degree(density * n)] * n, [degree(density * width)] * n
    rows = []
    for columns in kernel(*degrees, source_order, target_order, tokens, sampled, seed):
        distinct = list(dict.fromkeys(column // width for column in columns if column >= 0))[:top_k]
        rows.append(distinct + [-1] * (top_k - len(distinct)))
    return rows


def digest(rows):
    value = 0xCBF29CE484222325
    for row in rows:
        for byte in b"".join(number.to_bytes(4, "little", signed=True) for number in row):
            value = ((value ^ byte) * 0x100000001B3) & M64
    return f"{value:#018x}"


def main():
    print("kernel: rows, top_k, seed")
    for n, top_k, seed in ((8, 2, 42), (64, 4, 7), (300, 2, 42), (1024, 2, M64 - 3)):
        orders = permutations(n, (seed + 7777) & M64)
        degrees = [[(row * factor + plus) % (n + 1) for row in range(n)] for factor, plus in ((7, 3), (5, 1))]
        print(n, top_k, seed, digest(kernel(*degrees, *orders, n, top_k, seed)))
    print("first permutation of 8 from 7819:", permutations(8, 42 + 7777)[0])
    print("equal shares: tokens, experts, top_k, seed")
    for arguments in ((16, 4, 2, 1), (1000, 8, 2, 42), (4096, 64, 8, 42), (4096, 128, 8, 42), (1, 8, 2, 42)):
        print(*arguments, digest(dispatch(*arguments)))


if __name__ == "__main__":
    main()
