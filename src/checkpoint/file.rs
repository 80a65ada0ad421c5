//! Files as they are opened here: only what lies on a disk, and text without the mark that some editors put before it.
//!
//! Opening a FIFO waits for somebody to write, and reading a device may never end; a checkpoint is neither.

use std::fs::{File, FileType};
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::error::{Error, Result};

/// What UTF-8 text may begin with: U+FEFF, which is no part of it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Opens a file for reading; anything but a file, or a link to one, is refused without waiting for it.
///
/// # Errors
/// When the system cannot open it; [`ErrorKind::InvalidData`] for a FIFO, a socket or a device.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    match not_a_file(path.metadata()?.file_type()) {
        Some(kind) => Err(io::Error::new(ErrorKind::InvalidData, format!("expected a file, got {kind}"))),
        None => File::open(path),
    }
}

/// What can be opened and is neither a file nor a directory, by name.
pub(super) fn not_a_file(kind: FileType) -> Option<&'static str> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let names = [
            (kind.is_fifo(), "a FIFO"),
            (kind.is_socket(), "a socket"),
            (kind.is_char_device() || kind.is_block_device(), "a device"),
        ];
        if let Some((_, name)) = names.into_iter().find(|(is, _)| *is) {
            return Some(name);
        }
    }
    (!kind.is_file() && !kind.is_dir()).then_some("something else")
}

/// The bytes of a file.
///
/// # Errors
/// [`Error::Io`] as [`open_file`].
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut open_file(path)?, &mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|error| Error::io(path, error))
}

/// The text of a file in UTF-8, as [`text`].
///
/// # Errors
/// [`Error::Io`] as [`open_file`] and [`text`].
pub(crate) fn read_text(path: &Path) -> Result<String> {
    text(read_file(path)?).map_err(|error| Error::io(path, error))
}

/// Bytes as UTF-8 text, without a byte order mark before it; everything else stays as it is, ends of lines too.
///
/// # Errors
/// [`ErrorKind::InvalidData`] for other bytes.
pub fn text(bytes: Vec<u8>) -> io::Result<String> {
    let marked = bytes.starts_with(BYTE_ORDER_MARK);
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let wide = matches!(error.as_bytes(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]);
        let got = if wide { "UTF-16" } else { "other bytes" };
        io::Error::new(ErrorKind::InvalidData, format!("expected UTF-8 text, got {got}"))
    })?;
    if marked {
        text.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_before_the_text_goes_and_everything_else_stays() {
        for (bytes, expected) in [
            (&b"\xef\xbb\xbfa\r\n\0b"[..], "a\r\n\0b"),
            (b"a\xef\xbb\xbf", "a\u{feff}"),
            (b"\xef\xbb\xbf\xef\xbb\xbfa", "\u{feff}a"),
            (b"\xef\xbb\xbf", ""),
            (b"", ""),
        ] {
            assert_eq!(text(bytes.to_vec()).unwrap(), expected);
        }
        for (bytes, expected) in
            [(&b"\xff\xfea\0"[..], "got UTF-16"), (b"\xfe\xff\0a", "got UTF-16"), (b"\xe9", "got other bytes")]
        {
            let error = text(bytes.to_vec()).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidData && error.to_string().ends_with(expected), "{error}");
        }
    }
}
