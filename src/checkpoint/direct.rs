//! A file whose aligned reads go past the system's page cache, where the system can do that.
//!
//! Weights that are larger than memory are read again and again: through the page cache each read costs a copy, and pushes out
//! pages that something else needs. A read goes directly when its position, its length and its buffer are multiples of
//! [`PAGE_BYTES`]; everything else, the last part of a page at the end of a file, and files on systems that refuse, are read in
//! the ordinary way.
//!
//! Knows nothing of what is in the file.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{ByteSource, open_file};

/// What direct reads are aligned to: a page, and a multiple of every common disk's blocks.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A file opened for ordinary reads and, where that is possible, for direct ones.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: File,
    direct: Option<File>,
    refused: AtomicBool,
}

impl DirectFile {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// As [`open_file`].
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = open_file(path)?;
        let direct = open_direct(path, &file);
        Ok(Self { file, direct, refused: AtomicBool::new(false) })
    }

    /// Whether aligned reads go past the page cache, as far as is known.
    pub(crate) fn is_direct(&self) -> bool {
        // Only a hint: a read that sees the old value is refused once more.
        self.direct.is_some() && !self.refused.load(Ordering::Relaxed)
    }

    /// Fills what it can of `buffer` with direct reads; returns how many bytes those were.
    fn read_directly(&self, direct: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let (read, refused) = fill_pages(|buffer, offset| read_at(direct, buffer, offset), buffer, offset)?;
        if refused {
            self.refused.store(true, Ordering::Relaxed); // See `is_direct`.
        }
        Ok(read)
    }
}

impl ByteSource for DirectFile {
    fn len(&self) -> io::Result<u64> {
        ByteSource::len(&self.file)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let pages = buffer.len() / PAGE_BYTES * PAGE_BYTES;
        let aligned = buffer.as_ptr().align_offset(PAGE_BYTES) == 0 && offset.is_multiple_of(PAGE_BYTES as u64);
        let read = match &self.direct {
            Some(direct) if aligned && self.is_direct() => self.read_directly(direct, &mut buffer[..pages], offset)?,
            _ => 0,
        };
        match &mut buffer[read..] {
            [] => Ok(()),
            rest => self.file.read_exact_at(rest, offset + read as u64),
        }
    }
}

/// Reads until `buffer` is full, the file ends, a read ends within a page or the system refuses; how far it came, and whether
/// it was refused.
fn fill_pages(
    mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
    buffer: &mut [u8],
    offset: u64,
) -> io::Result<(usize, bool)> {
    let mut done = 0;
    while done < buffer.len() {
        match read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                return Ok((done, true));
            }
            Err(error) => return Err(error),
        }
        if !done.is_multiple_of(PAGE_BYTES) {
            break;
        }
    }
    Ok((done, false))
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path, file: &File) -> Option<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path).ok()?;
    // The path may name another file by now.
    let (ours, other) = (file.metadata().ok()?, direct.metadata().ok()?);
    ((ours.dev(), ours.ino()) == (other.dev(), other.ino())).then_some(direct)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path, _: &File) -> Option<File> {
    None
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(not(unix))]
fn read_at(_: &File, _: &mut [u8], _: u64) -> io::Result<usize> {
    Err(ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of `length` bytes, and what is in it.
    fn file(length: usize) -> (tempfile::TempDir, DirectFile, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..length).map(|at| (at / 7 + at) as u8).collect();
        std::fs::write(directory.path().join("f"), &bytes).unwrap();
        let file = DirectFile::open(&directory.path().join("f")).unwrap();
        (directory, file, bytes)
    }

    #[test]
    fn every_read_gives_the_files_bytes() {
        let (_directory, file, bytes) = file(3 * PAGE_BYTES + 100);
        let mut buffer = vec![0; 5 * PAGE_BYTES];
        let aligned = buffer.as_ptr().align_offset(PAGE_BYTES);
        for start in [aligned, aligned + 1] {
            for offset in [0, 1, PAGE_BYTES, PAGE_BYTES + 512] {
                for length in [0, 1, 100, PAGE_BYTES, 2 * PAGE_BYTES, 2 * PAGE_BYTES + 100] {
                    let end = (offset + length).min(bytes.len());
                    let part = &mut buffer[start..][..end - offset];
                    part.fill(0);
                    file.read_exact_at(part, offset as u64).unwrap();
                    assert!(part == &bytes[offset..end], "{start} {offset} {length}");
                }
            }
            let error = file.read_exact_at(&mut buffer[start..][..PAGE_BYTES], 3 * PAGE_BYTES as u64).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        }
        assert_eq!(file.len().unwrap(), bytes.len() as u64);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let (directory, file, _) = file(4 * PAGE_BYTES);
        std::fs::File::options().write(true).open(directory.path().join("f")).unwrap().set_len(5000).unwrap();
        let mut buffer = vec![0; 4 * PAGE_BYTES];
        let aligned = buffer.as_ptr().align_offset(PAGE_BYTES);
        let error = file.read_exact_at(&mut buffer[aligned..][..3 * PAGE_BYTES], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn short_reads_interruptions_and_refusals_lose_nothing() {
        let mut buffer = vec![0; 3 * PAGE_BYTES];
        let mut script = |answers: &[Result<usize, ErrorKind>]| {
            let (mut answers, mut offsets) = (answers.iter(), Vec::new());
            let result = fill_pages(
                |_, offset| {
                    offsets.push(offset as usize);
                    answers.next().unwrap().map_err(Into::into)
                },
                &mut buffer,
                0,
            );
            (result.map_err(|error| error.kind()), offsets)
        };
        let page = PAGE_BYTES;
        assert_eq!(script(&[Ok(page), Ok(2 * page)]), (Ok((3 * page, false)), vec![0, page]));
        assert_eq!(script(&[Err(ErrorKind::Interrupted), Ok(3 * page)]), (Ok((3 * page, false)), vec![0, 0]));
        assert_eq!(script(&[Ok(page), Ok(100)]), (Ok((page + 100, false)), vec![0, page]));
        assert_eq!(script(&[Ok(page), Ok(0)]), (Ok((page, false)), vec![0, page]));
        assert_eq!(script(&[Ok(page), Err(ErrorKind::InvalidInput)]), (Ok((page, true)), vec![0, page]));
        assert_eq!(script(&[Err(ErrorKind::Other)]), (Err(ErrorKind::Other), vec![0]));
    }
}
