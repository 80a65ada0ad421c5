//! Disks and files that fail: a typed error for those who need what is broken, the right bytes for all others.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{NamedTensor, tensor_bytes};
use crate::error::{ExpertFault, Fault};
use crate::offload::Part;
use crate::offload::store::Layout;
use crate::offload::store::Piece;
use crate::{CacheOptions, Checkpoint, Dtype, Error, ExpertCache, ExpertStore};

use super::disk::{bed, bed_of, broken, set, wait_until};

#[test]
fn a_failed_read_harms_only_those_who_need_that_expert() {
    let errors: [fn() -> std::io::Error; 3] =
        [broken, || ErrorKind::PermissionDenied.into(), || ErrorKind::UnexpectedEof.into()];
    for make in errors {
        let bed = bed(1, 8, 4, |_| ());
        bed.break_expert(3, make);
        let error = bed.run(0, &[1, 3, 5]).unwrap_err();
        let Error::Expert(ExpertFault { file, layer, expert, fault }) = &error else { panic!("{error}") };
        assert_eq!((file.as_str(), *layer, *expert), ("disk", 0, 3));
        assert!(matches!(fault, Fault::Read { reason, .. } if reason.kind() == make().kind()));
        assert!(error.to_string().starts_with("disk: expert 3 of layer 0: expected "), "{error}");
        assert!(!error.is_user_error());
        bed.run(0, &[1, 5]).unwrap();
        assert!(bed.run(0, &[3]).is_err());
        bed.disk.repair();
        // The logical set has it since the first step: it does not depend on reads.
        assert_eq!(bed.run(0, &[1, 3, 5]).unwrap().0.hits, 3);
    }
}

#[test]
fn threads_that_need_others_go_on_beside_those_who_fail() {
    let bed = bed(1, 16, 8, |options| options.readers = 3);
    bed.break_expert(7, broken);
    std::thread::scope(|scope| {
        for thread in 0..6usize {
            let bed = &bed;
            scope.spawn(move || {
                for turn in 0..100 {
                    if thread % 2 == 0 {
                        assert!(bed.run(0, &[turn % 7, 7]).is_err());
                    } else {
                        bed.run(0, &[turn % 7, 8 + turn % 8]).unwrap();
                    }
                }
            });
        }
    });
    bed.disk.repair();
    bed.run(0, &[6, 7]).unwrap();
}

#[test]
fn all_who_wait_for_a_read_hear_that_it_failed() {
    let bed = bed(1, 8, 4, |_| ());
    bed.break_expert(2, broken);
    bed.disk.hold(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert!(bed.run(0, &[2]).is_err()));
        }
        wait_until(|| bed.cache.statistics().requests == 16);
        bed.disk.open();
    });
    bed.disk.repair();
    bed.run(0, &[2]).unwrap();
}

#[test]
fn a_flipped_bit_is_found_when_the_expert_comes_back() {
    let bed = bed(1, 8, 2, |_| ());
    bed.run(0, &[0, 1]).unwrap();
    let flip = || bed.disk.bytes.lock().unwrap()[40 + 4 * 1024 + 100] ^= 1;
    flip();
    bed.run(0, &[0, 1]).unwrap();
    bed.run(0, &[4, 5]).unwrap();
    let error = bed.run(0, &[0, 1]).unwrap_err();
    let Error::Expert(ExpertFault { fault: Fault::Checksum { expected, got }, expert: 0, layer: 0, .. }) = error else {
        panic!("{error}")
    };
    assert_ne!(expected, got);
    bed.run(0, &[1, 4]).unwrap();
    flip();
    bed.run(0, &[0, 1]).unwrap();
}

#[test]
fn a_fault_in_the_middle_of_a_stream_leaves_the_cache_whole() {
    let bed = bed(1, 12, 3, |_| ());
    bed.break_expert(8, broken);
    let all: Vec<usize> = (0..12).collect();
    for _ in 0..3 {
        assert!(bed.run(0, &all).is_err());
    }
    bed.disk.repair();
    bed.run(0, &all).unwrap();
    assert!(bed.cache.statistics().peak_bytes <= 3 * bed.slab());
}

#[test]
fn a_slow_disk_gives_the_right_bytes() {
    let bed = bed_of(1, 6, 1 << 11, 2, |_| ());
    bed.disk.set_fault(|_| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        Ok(())
    });
    bed.cache.prefetch(0, &bed.set([5])).unwrap();
    bed.run(0, &[0, 1, 2, 5]).unwrap();
    assert!(bed.cache.statistics().waiting > std::time::Duration::ZERO);
}

#[test]
fn a_source_that_panics_is_an_error() {
    let bed = bed(1, 8, 2, |options| options.readers = 1);
    bed.disk.set_fault(|_| panic!("a broken source"));
    let message = bed.run(0, &[1]).unwrap_err().to_string();
    assert!(message.contains("expert 1 of layer 0") && message.contains("a panic"), "{message}");
    bed.disk.repair();
    bed.run(0, &[1]).unwrap();
}

/// A safetensors file of eight experts, one tensor each, of more than a page.
fn write(path: &Path, first: f32) {
    let tensor = |id: usize| NamedTensor::f32(format!("{id}"), [10, 300], &[first + id as f32; 3000]);
    std::fs::write(path, tensor_bytes(&(0..8).map(tensor).collect::<Vec<_>>(), None).unwrap()).unwrap();
}

fn cache(path: &Path) -> ExpertCache {
    let file = Checkpoint::open_files(&[path]).unwrap();
    let expert = |id: usize| {
        let entry = file.entry(&format!("{id}")).unwrap();
        let (part, dtype, layout) = (Part::Up, Dtype::F32, Layout::Rows);
        let (source, offset) = (entry.source, entry.offset);
        vec![Piece { part, source, offset, dtype, rows: 10, columns: 300, layout }]
    };
    let store = ExpertStore::new(file.sources().to_vec(), vec![(0..8).map(expert).collect()]).unwrap();
    let budget = 2 * store.slab_bytes(0);
    ExpertCache::new(Arc::new(store), CacheOptions::new(budget)).unwrap()
}

/// Runs a step and checks its experts' numbers.
fn run(cache: &ExpertCache, ids: [usize; 2]) -> Result<(), Error> {
    let run = cache.run(0, &set(8, ids), |group| {
        for (id, expert) in group {
            let matrix = expert.matrix(Part::Up).unwrap();
            let value = (id.index() as f32).to_le_bytes();
            assert!((0..10).all(|row| matrix.row(row).chunks(4).all(|number| number == value)));
        }
        Ok(())
    });
    run.map(|_| ())
}

#[test]
fn a_file_that_is_truncated_gives_an_error_and_no_signal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.safetensors");
    write(&path, 0.0);
    let cache = cache(&path);
    run(&cache, [0, 7]).unwrap();
    run(&cache, [1, 2]).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(50_000).unwrap();
    let message = run(&cache, [6, 7]).unwrap_err().to_string();
    assert!(message.contains("m.safetensors: expert 6 of layer 0: expected "), "{message}");
    run(&cache, [0, 1]).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert!(run(&cache, [2, 3]).is_err());
    write(&path, 0.0);
    run(&cache, [6, 7]).unwrap();
}

#[test]
fn a_file_that_is_replaced_removed_or_forbidden_is_still_the_one_that_was_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.safetensors");
    write(&path, 0.0);
    let cache = cache(&path);
    run(&cache, [0, 1]).unwrap();
    let other = directory.path().join("other");
    write(&other, 100.0);
    std::fs::rename(&other, &path).unwrap();
    run(&cache, [2, 3]).unwrap();
    std::fs::remove_file(&path).unwrap();
    run(&cache, [4, 5]).unwrap();
    run(&cache, [0, 1]).unwrap();
}

#[cfg(unix)]
#[test]
fn a_file_that_becomes_unreadable_stays_open() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.safetensors");
    write(&path, 0.0);
    let cache = cache(&path);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    run(&cache, [2, 3]).unwrap();
}

#[test]
fn a_file_that_is_overwritten_in_place_is_found_by_its_checksum() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.safetensors");
    write(&path, 0.0);
    let cache = cache(&path);
    for ids in [[0, 1], [2, 3], [4, 5]] {
        run(&cache, ids).unwrap();
    }
    write(&path, 100.0);
    assert!(matches!(run(&cache, [0, 1]), Err(Error::Expert(ExpertFault { fault: Fault::Checksum { .. }, .. }))));
    run(&cache, [4, 5]).unwrap_err();
}
