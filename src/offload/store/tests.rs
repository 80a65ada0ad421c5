//! Experts read from files of every layout, and what is wrong with them.

use super::*;
use crate::checkpoint::ByteSource;
use proptest::prelude::*;

fn source(name: &str, bytes: Vec<u8>) -> NamedSource {
    let bytes: &'static [u8] = bytes.leak();
    (name.into(), Arc::new(bytes))
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

fn piece(part: Part, source: usize, offset: u64, rows: usize, columns: usize) -> Piece {
    Piece { part, source, offset, dtype: Dtype::Bf16, rows, columns, layout: Layout::Rows }
}

fn message(sources: &[NamedSource], pieces: Vec<Piece>) -> String {
    ExpertStore::new(sources.to_vec(), vec![vec![pieces]]).unwrap_err().to_string()
}

#[test]
fn what_cannot_be_read_is_named_before_it_is() {
    let sources = [source("f", bytes(1000))];
    let up = piece(Part::Up, 0, 0, 10, 50);
    assert!(ExpertStore::new(sources.to_vec(), vec![vec![vec![up.clone()]]]).is_ok());
    let outside = message(&sources, vec![Piece { offset: 1, ..up.clone() }]);
    assert_eq!(outside, "f: Up of expert 0 of layer 0: expected [10, 50] bf16 at 1 within the file's 1000 bytes");
    assert!(message(&sources, vec![Piece { offset: u64::MAX, ..up.clone() }]).contains("within the file's"));
    assert!(message(&sources, vec![Piece { rows: usize::MAX, ..up.clone() }]).contains("within the file's"));
    let twice = message(&sources, vec![up.clone(), up.clone()]);
    assert_eq!(twice, "expert 0 of layer 0: expected one Up, got two");
    assert_eq!(message(&sources, vec![]), "expert 0 of layer 0: expected at least one piece, got none");
    assert!(message(&sources, vec![Piece { source: 1, ..up.clone() }]).contains("expected a source below 1, got 1"));
    assert!(message(&sources, vec![Piece { dtype: Dtype::Q8_0, ..up.clone() }]).contains("a multiple of 32 columns"));
    assert!(ExpertStore::new(sources.to_vec(), vec![vec![]]).is_err());
    let store = ExpertStore::new(sources.to_vec(), vec![vec![vec![up]]]).unwrap();
    assert_eq!((store.layers(), store.experts(0), store.experts(1), store.slab_bytes(7)), (1, 1, 0, 0));
    let error = |layer, expert, bytes| store.load(layer, expert, &mut [Slab::new(bytes)]).unwrap_err().to_string();
    assert_eq!(error(0, 1, 8192), "layer 0: expert 1 is out of range, expected one of 1");
    assert_eq!(error(3, 0, 8192), "layer 3: expert 0 is out of range, expected one of 0");
    assert_eq!(error(0, 0, 4096), "slabs: expected [8192] bytes, got [4096]");
}

#[test]
fn neighbours_are_read_at_once_and_slabs_depend_on_shapes_alone() {
    let sources = [source("f", bytes(100_000))];
    let expert = |at: u64| vec![piece(Part::Up, 0, at, 100, 50), piece(Part::Down, 0, at + 10_000, 50, 100)];
    let store = ExpertStore::new(sources.to_vec(), vec![vec![expert(0), expert(4096), expert(79_999)]]).unwrap();
    for stored in &store.experts {
        assert_eq!((stored.fillings.len(), stored.fillings[0].runs.len()), (1, 1));
        assert_eq!(stored.slab_bytes, [2 * (12_288 + 4096)]);
    }
    // Far apart, and in another file.
    let far = vec![piece(Part::Up, 0, 0, 1, 50), piece(Part::Gate, 0, 8192, 1, 50), piece(Part::Down, 1, 8292, 1, 50)];
    let sources = [source("f", bytes(10_000)), source("g", bytes(10_000))];
    let stored = ExpertStore::new(sources.to_vec(), vec![vec![far]]).unwrap();
    assert_eq!(stored.experts[0].fillings[0].runs.len(), 3);
}

#[test]
fn every_piece_of_a_large_expert_has_its_own_slab() {
    let sources = [source("f", bytes(4 << 20))];
    let expert =
        |first: u64, second: u64| vec![piece(Part::Up, 0, first, 512, 512), piece(Part::Down, 0, second, 512, 600)];
    // One behind the other in both orders, the second beginning in the first one's last page.
    let (up, down) = (2 * 512 * 512, 2 * 512 * 600);
    let layer = vec![expert(10, 10 + up), expert(10 + down, 10)];
    let store = ExpertStore::new(sources.to_vec(), vec![layer]).unwrap();
    for (stored, first) in store.experts.iter().zip([0, 614_400 / 4096]) {
        assert_eq!(stored.slab_bytes, [528_384, 618_496]);
        let runs: Vec<_> =
            stored.fillings.iter().map(|filling| (filling.runs.len(), filling.runs[0].bytes.end)).collect();
        assert_eq!((runs, stored.fillings[0].runs[0].offset), (vec![(1, 528_384), (1, 618_496)], 4096 * first));
    }
    let mut slabs = store.slabs(0, 1).unwrap();
    let loaded = store.load(0, 1, &mut slabs).unwrap();
    assert_eq!(loaded.matrix(Part::Up).unwrap().row(0), &bytes(4 << 20)[10 + down as usize..][..1024]);
    assert!(store.slabs(0, 2).is_err());
}

#[test]
fn a_flipped_bit_is_found_at_every_load_but_the_first() {
    #[derive(Debug)]
    struct Disk(std::sync::Mutex<Vec<u8>>);
    impl ByteSource for Disk {
        fn len(&self) -> std::io::Result<u64> {
            Ok(self.0.lock().unwrap().len() as u64)
        }
        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
            let bytes = self.0.lock().unwrap();
            let part = bytes.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
            buffer.copy_from_slice(part.ok_or(std::io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }
    // Longer than a chunk, in two runs.
    let disk = Arc::new(Disk(std::sync::Mutex::new(bytes(3 << 20))));
    let sources: Vec<NamedSource> = vec![("disk".into(), disk.clone())];
    let pieces = vec![piece(Part::Up, 0, 5_001, 1 << 10, 1 << 10), piece(Part::Down, 0, 2_900_001, 10, 10)];
    let store = ExpertStore::new(sources, vec![vec![pieces]]).unwrap();
    let mut slabs = store.slabs(0, 0).unwrap();
    let mut load = || store.load(0, 0, &mut slabs).map(|_| ()).map_err(|error| error.to_string());
    load().unwrap();
    let flip = |at: usize| disk.0.lock().unwrap()[at] ^= 4;
    for at in [5_001, 1 << 20, 5_000 + (2 << 20), 2_900_001, 2_900_200] {
        flip(at);
        let message = load().unwrap_err();
        assert!(message.starts_with("disk: expert 0 of layer 0: expected checksum "), "{message}");
        flip(at);
        load().unwrap();
    }
    // Around the pieces others may write.
    [5_000, 5_001 + (2 << 20), 2_900_000, 2_900_201].into_iter().for_each(flip);
    load().unwrap();
    disk.0.lock().unwrap().truncate(2_900_200);
    assert!(load().unwrap_err().starts_with("disk: expert 0 of layer 0: expected 4096 bytes at 2899968, got"));
}

proptest! {
    #[test]
    fn a_load_gives_the_pieces_of_the_files(
        places in prop::collection::vec((0usize..2, 0u64..30_000, 0usize..50, 0usize..700, 0usize..7), 1..5),
    ) {
        let (first, second) = (bytes(180_000), bytes(190_000));
        let sources = vec![source("f", first.clone()), source("g", second.clone())];
        let pieces: Vec<Piece> = places
            .iter()
            .zip([Part::Up, Part::Down, Part::Gate, Part::GateUp])
            .map(|(&(source, offset, rows, columns, dtype), part)| {
                let dtype = Dtype::ALL[dtype];
                let columns = columns / dtype.block() * dtype.block();
                Piece { part, source, offset, dtype, rows, columns, layout: Layout::Rows }
            })
            .collect();
        let store = ExpertStore::new(sources, vec![vec![pieces.clone()]]).unwrap();
        let mut slabs = store.slabs(0, 0).unwrap();
        for (filling, slab) in store.experts[0].fillings.iter().zip(&slabs) {
            prop_assert!(filling.runs.iter().all(|run| run.bytes.end <= slab.size()));
        }
        let loaded = store.load(0, 0, &mut slabs).unwrap();
        for Piece { part, source, offset, dtype, rows, columns, .. } in pieces {
            let matrix = loaded.matrix(part).unwrap();
            prop_assert_eq!((matrix.shape(), matrix.dtype()), ([rows, columns], dtype));
            let (file, row_bytes) = ([&first, &second][source], dtype.row_bytes(columns).unwrap());
            for row in 0..rows {
                prop_assert_eq!(matrix.row(row), &file[offset as usize + row * row_bytes..][..row_bytes]);
            }
        }
    }
}

/// What a piece is in memory, row by row.
fn formed(piece: &Piece, files: [&[u8]; 2]) -> Vec<u8> {
    let Piece { source, offset, rows, columns, .. } = *piece;
    let from = &files[source][offset as usize..];
    match piece.layout {
        Layout::Rows => from[..rows * piece.dtype.row_bytes(columns).unwrap()].to_vec(),
        Layout::Columns => {
            let size = piece.dtype.block_bytes();
            let number = |row: usize, column: usize| &from[(column * rows + row) * size..][..size];
            (0..rows).flat_map(|row| (0..columns).flat_map(move |column| number(row, column))).copied().collect()
        }
        Layout::Apart { source, scales } => {
            let blocks = rows * columns / 32;
            mxfp4::joined(&from[..16 * blocks], &files[source][scales as usize..][..blocks]).unwrap()
        }
    }
}

/// Two files for all cases.
static FILES: std::sync::LazyLock<[Vec<u8>; 2]> = std::sync::LazyLock::new(|| [bytes(5_000_000), bytes(5_100_000)]);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn pieces_that_lie_otherwise_are_brought_into_form(
        kinds in prop::collection::vec(0usize..5, 1..4),
        places in prop::collection::vec((0usize..2, 0u64..90_000), 6),
        rows in 0usize..70,
        blocks in 0usize..7,
        far in prop::bool::ANY,
    ) {
        // Longer than a chunk, some of them.
        let rows = if far { rows * 150 } else { rows };
        let [first, second] = &*FILES;
        let source = |name: &str, bytes: &'static [u8]| -> NamedSource { (name.into(), Arc::new(bytes)) };
        let sources = vec![source("f", first), source("g", second)];
        let pieces: Vec<Piece> = kinds
            .iter()
            .zip([Part::Up, Part::Down, Part::Gate])
            .enumerate()
            .map(|(at, (&kind, part))| {
                let (here, there) = (places[2 * at], places[2 * at + 1]);
                let (dtype, layout) = match kind {
                    0 => (Dtype::Bf16, Layout::Rows),
                    1 => (Dtype::F32, Layout::Columns),
                    2 => (Dtype::Bf16, Layout::Columns),
                    _ => (Dtype::Mxfp4, Layout::Apart { source: there.0, scales: there.1 }),
                };
                Piece { part, source: here.0, offset: here.1, dtype, rows, columns: 32 * blocks, layout }
            })
            .map(|piece| match piece.dtype {
                Dtype::Mxfp4 => piece,
                // Odd ones too.
                _ => Piece { columns: piece.columns / 2 + 1, ..piece },
            })
            .collect();
        let store = ExpertStore::new(sources, vec![vec![pieces.clone()]]).unwrap();
        let mut slabs = store.slabs(0, 0).unwrap();
        for _ in 0..2 {
            let loaded = store.load(0, 0, &mut slabs).unwrap();
            for piece in &pieces {
                let matrix = loaded.matrix(piece.part).unwrap();
                let expected = formed(piece, [first, second]);
                let got: Vec<u8> = (0..rows).flat_map(|row| matrix.row(row)).copied().collect();
                prop_assert!(got == expected, "{piece:?}");
            }
        }
    }
}

#[test]
fn pieces_that_lie_otherwise_are_checked_too() {
    let sources = [source("f", bytes(1000)), source("g", bytes(1000))];
    let up = Piece { layout: Layout::Columns, ..piece(Part::Up, 0, 1, 10, 50) };
    let outside = "f: Up of expert 0 of layer 0: expected [10, 50] bf16 at 1 within the file's 1000 bytes";
    assert_eq!(message(&sources, vec![up]), outside);
    let apart = |source, scales| Piece {
        dtype: Dtype::Mxfp4,
        columns: 64,
        layout: Layout::Apart { source, scales },
        ..piece(Part::Up, 0, 0, 10, 64)
    };
    assert!(ExpertStore::new(sources.to_vec(), vec![vec![vec![apart(1, 980)]]]).is_ok());
    let outside = "g: Up of expert 0 of layer 0: expected [10, 64] mxfp4 at 981 within the file's 1000 bytes";
    assert_eq!(message(&sources, vec![apart(1, 981)]), outside);
    assert!(message(&sources, vec![apart(2, 0)]).contains("expected a source below 2, got 2"));
    let odd = message(&sources, vec![Piece { dtype: Dtype::Bf16, ..apart(1, 0) }]);
    assert!(odd.starts_with("Up of expert 0 of layer 0: expected bf16 row by row, got Apart"), "{odd}");
    let odd = message(&sources, vec![Piece { layout: Layout::Columns, ..apart(1, 0) }]);
    assert_eq!(odd, "Up of expert 0 of layer 0: expected mxfp4 row by row, got Columns");
}
