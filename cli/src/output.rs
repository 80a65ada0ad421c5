//! Where a command's result goes: one opener for all of them, so that no run ends without a place for its result, and none
//! destroys what it reads or what was there before.
//!
//! `Destination::open` (directory and permissions, before anything is loaded) `→ apart_from` the run's inputs `→ Output::write`:
//! a temporary file beside the target, whole and on disk, then renamed over it. What is no file (a device, a pipe, a descriptor of this
//! process) is written as it is. Of a symbolic link the target is replaced, and a file that was there keeps its mode.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use phase_moe::{Error, Weights};
use tempfile::{Builder, NamedTempFile};

use crate::mistake::UserMistake;

/// A path that can be written to, as far as the system can tell beforehand.
#[must_use]
pub struct Destination {
    /// The option that names it.
    option: &'static str,
    /// As the user gave it: what messages name.
    named: PathBuf,
    target: Target,
}

/// A destination that is none of the run's inputs.
#[must_use]
pub struct Output(Destination);

enum Target {
    /// A file, there already or not, at the end of all symbolic links.
    File(PathBuf),
    /// A device or a pipe.
    Stream,
    /// A descriptor of this process, `/dev/stdout` for one: what stands in it already stays.
    Descriptor,
}

/// More links than this are a circle.
const MAX_LINKS: usize = 40;

/// How the names of temporary files begin. Not with the target's name, which may be as long as a name can be.
const TEMPORARY: &str = ".phase-moe-";

impl Destination {
    /// Looks whether a file can be written at `path`, the value of `option`. Nothing is there afterwards that was not there before.
    pub fn open(option: &'static str, path: &Path) -> Result<Self> {
        let refused = |reason: String| UserMistake(format!("{option} {}: {reason}", path.display()));
        let at = |target| Ok(Self { option, named: path.into(), target });
        let Some(end) = end_of_links(path).map_err(refused)? else { return at(Target::Descriptor) };
        match fs::metadata(&end) {
            Ok(there) if there.is_dir() => return Err(refused("expected a file, got a directory".into()).into()),
            // Opening a pipe would wait for its reader.
            Ok(there) if !there.is_file() => return at(Target::Stream),
            Ok(_) => drop(OpenOptions::new().write(true).open(&end).map_err(|error| refused(error.to_string()))?),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(refused(error.to_string()).into()),
        }
        let directory = directory_of(&end);
        let directory_named = directory.display();
        match fs::metadata(directory) {
            Ok(there) if there.is_dir() => {}
            Ok(_) => {
                return Err(refused(format!("expected a file in a directory, but {directory_named} is a file")).into());
            }
            Err(error) => return Err(refused(format!("{error}: directory {directory_named}")).into()),
        }
        // What is made to see whether one can be made goes at once, so that a run that is broken off leaves nothing.
        match temporary(&end) {
            Ok(_) => at(Target::File(end)),
            Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                Err(refused(format!("{error}: no file can be made in directory {directory_named}")).into())
            }
            Err(error) => Err(Error::Io { path: path.into(), reason: error }.into()),
        }
    }

    /// The place for a result, if it is none of `inputs`, whatever it is called.
    pub fn apart_from(self, inputs: &Inputs) -> Result<Output> {
        let Self { option, named, .. } = &self;
        let own = match &self.target {
            Target::File(file) => Identity::of(file),
            Target::Stream | Target::Descriptor => None,
        };
        match inputs.0.iter().find(|(_, input)| own.as_ref() == Some(input)) {
            None => Ok(Output(self)),
            Some((input, _)) => {
                let path = named.display();
                Err(UserMistake(format!("{option} {path}: expected another file than {input}, got the same")).into())
            }
        }
    }
}

impl Output {
    /// Writes all of it. Where that fails, what was there before is there still, unless it is no file.
    pub fn write(self, bytes: &[u8]) -> Result<()> {
        let Self(Destination { named, target, .. }) = self;
        let to = |options: &mut OpenOptions| options.open(&named).and_then(|mut file| file.write_all(bytes));
        let written = match &target {
            Target::File(file) => replace(file, bytes),
            Target::Stream => to(OpenOptions::new().write(true)),
            Target::Descriptor => to(OpenOptions::new().append(true)),
        };
        Ok(written.map_err(|error| Error::Io { path: named.clone(), reason: error })?)
    }
}

/// The files that a run reads: what each is to the user, and which file it is.
#[derive(Default)]
pub struct Inputs(Vec<(String, Identity)>);

/// Files beside a checkpoint's tensors that are read where they are there.
const BESIDE: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

impl Inputs {
    /// The same and the value of an option.
    pub fn file(self, option: &str, path: &Path) -> Self {
        self.with(|| option.into(), path)
    }

    /// The same and the texts that `--text` names.
    pub fn texts(self, paths: &[PathBuf]) -> Self {
        paths.iter().fold(self, |inputs, path| inputs.file("--text", path))
    }

    /// The same and all files of a model.
    pub fn model(mut self, files: &Weights) -> Self {
        for (name, _) in files.checkpoint().sources() {
            let path = Path::new(name);
            self = self.with(|| format!("the model's {name}"), path);
            // The name may not be all of a path that is no UTF-8.
            if let (Some(directory), Some(file)) = (files.directory(), path.file_name()) {
                self = self.with(|| format!("the model's {name}"), &directory.join(file));
            }
        }
        if let Some(directory) = files.directory() {
            self = BESIDE
                .iter()
                .fold(self, |inputs, name| inputs.with(|| format!("the model's {name}"), &directory.join(name)));
        }
        self
    }

    fn with(mut self, what: impl FnOnce() -> String, path: &Path) -> Self {
        self.0.extend(Identity::of(path).map(|identity| (what(), identity)));
        self
    }
}

/// Which file a path leads to, whatever it is called.
#[derive(PartialEq)]
struct Identity(#[cfg(unix)] (u64, u64), #[cfg(not(unix))] PathBuf);

impl Identity {
    /// `None` where there is nothing.
    #[cfg(unix)]
    fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(path).ok().map(|file| Self((file.dev(), file.ino())))
    }

    #[cfg(not(unix))]
    fn of(path: &Path) -> Option<Self> {
        path.canonicalize().ok().map(Self)
    }
}

/// The directory that a file is in or will be.
fn directory_of(file: &Path) -> &Path {
    match file.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    }
}

/// What a path stands for at the end of all symbolic links, there or not; `None` for a descriptor of this process.
fn end_of_links(path: &Path) -> Result<Option<PathBuf>, String> {
    let mut end = path.to_owned();
    for _ in 0..MAX_LINKS {
        // A path that names a directory, there or not, has no name of a file.
        if end.file_name().is_none() || end.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err("expected a file, got a directory".into());
        }
        if is_descriptor(&end) {
            return Ok(None);
        }
        match fs::read_link(&end) {
            Ok(next) => end = directory_of(&end).join(next),
            Err(_) => return Ok(Some(end)),
        }
    }
    Err(format!("expected a file, got more than {MAX_LINKS} symbolic links one after another"))
}

fn is_descriptor(path: &Path) -> bool {
    let names = ["/dev/stdout", "/dev/stderr", "/dev/stdin"].map(Path::new);
    let folders = ["/dev/fd", "/proc/self/fd"].map(Path::new);
    names.contains(&path) || path.parent().is_some_and(|parent| folders.contains(&parent))
}

/// A temporary file beside `target`, gone with its value.
fn temporary(target: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(TEMPORARY);
    // What a new file is made with; the system takes off what the user does not want.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(directory_of(target)).map_err(without_path)
}

/// The system's reason alone: the name of a temporary file says nothing to anybody.
fn without_path(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error.kind().into(),
    }
}

/// Writes `bytes` beside `target` and puts them in its place.
fn replace(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = temporary(target)?;
    file.as_file_mut().write_all(bytes)?;
    if let Ok(before) = fs::metadata(target) {
        keep_access(file.as_file(), &before)?;
    }
    // A disk may be full without having said so yet.
    match file.as_file().sync_all() {
        Err(error) if !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => return Err(error),
        _ => {}
    }
    match file.persist(target) {
        Ok(_) => Ok(()),
        // A file that is a mount of its own cannot be replaced, nor can another user's where only owners may.
        Err(refused) if matches!(refused.error.kind(), ErrorKind::ResourceBusy | ErrorKind::PermissionDenied) => {
            fs::write(target, bytes)
        }
        Err(refused) => Err(without_path(refused.error)),
    }
}

/// Gives a file the mode of the one that was there, and its owner where that is allowed.
#[cfg(unix)]
fn keep_access(file: &File, before: &fs::Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    // Only root may; the mode comes after, because a change of owners takes some bits away.
    let _ = fchown(file, Some(before.uid()), Some(before.gid()));
    file.set_permissions(before.permissions())
}

#[cfg(not(unix))]
fn keep_access(file: &File, before: &fs::Metadata) -> io::Result<()> {
    file.set_permissions(before.permissions())
}
